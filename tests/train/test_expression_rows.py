"""Expression on disk is the expression that was written, in any order, as training examples and batches."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellglot.train.expression_rows import ExpressionCollator, ExpressionExamples, ExpressionRows, write_expression


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((17, 7)) < 0.3, rng.random((17, 7)), 0).astype(np.float32)
    dense[4] = 0  # a cell without a count
    matrix = sp.csr_matrix(dense)
    write_expression([matrix[:5], matrix[5:5], matrix[5:]], tmp_path)
    return matrix, ExpressionRows(tmp_path, 7)


def test_rows_come_back_in_the_order_asked_for(written):
    matrix, rows = written
    assert len(rows) == 17
    for index in (np.arange(17), np.array([9, 4, 0, 9, 16]), np.array([], dtype=int)):
        np.testing.assert_array_equal(rows.read(index).toarray(), matrix[index].toarray())
    assert rows.__getstate__()["_opened"] is None


def test_cells_without_any_count_can_be_read(tmp_path):
    write_expression([sp.csr_matrix(np.zeros((3, 5), np.float32))], tmp_path)
    assert ExpressionRows(tmp_path, 5).read(np.array([2, 0])).toarray().tolist() == [[0] * 5] * 2


def test_a_batch_holds_cells_first_then_their_labels(written):
    matrix, rows = written
    examples = ExpressionExamples(rows, np.array([3, 11, 4]), np.array([2, -100, 0]))
    batch = ExpressionCollator(np.array([1.0, 2.0, 3.0]))(examples.__getitems__([2, 0]), [(0,), (1,)])
    assert list(batch) == ["expression", "labels", "class_weights"]
    np.testing.assert_array_equal(batch["expression"], matrix[[4, 3]].toarray())
    assert batch["expression"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 2]
    unlabelled = ExpressionExamples(rows, np.array([3]))
    assert list(ExpressionCollator()(unlabelled.__getitems__([0]), [(0,)])) == ["expression"]
