"""The schema of expression corpora: list columns that hold exactly the non-zero counts."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from cellglot.datasets_scripts.ragged_counts import ragged_columns, ragged_features, ragged_table

from ..conftest import synthetic_cells


def test_a_row_holds_a_cell_s_non_zero_counts_in_the_order_of_the_genes():
    cells = synthetic_cells(5, 7)
    table = ragged_table(cells.X, cells.obs)
    assert table.column_names == ["cell_name", "gene_index", "count", "cell_type", "donor"]
    for row, counts in zip(table.to_pylist(), cells.X.toarray(), strict=True):
        assert row["gene_index"] == np.flatnonzero(counts).tolist()
        assert row["count"] == counts[counts > 0].tolist()
    assert table["cell_name"].to_pylist() == cells.obs_names.tolist()


def test_columns_have_the_types_of_the_schema():
    wide = synthetic_cells(5, 7).X.astype(np.int64)
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    schema = ragged_features({}).arrow_schema
    for name, column in ragged_columns(wide).items():
        assert column.type.equals(pa.list_(schema.field(name).type.value_type))


def test_order_stored_zeros_and_repeated_genes_do_not_matter_and_the_input_is_kept():
    values = [3.0, 0.0, 1.0, 2.0, 5.0]
    matrix = sp.csr_matrix((values, [4, 1, 0, 4, 2], [0, 4, 4, 5]), shape=(3, 5))
    columns = ragged_columns(matrix, "peak_index", "value")
    assert columns["peak_index"].to_pylist() == [[0, 4], [], [2]]
    assert columns["value"].to_pylist() == [[1.0, 5.0], [], [5.0]]
    assert matrix.data.tolist() == values
    assert matrix.indices.tolist() == [4, 1, 0, 4, 2]


def test_a_slice_of_a_matrix_gives_its_own_rows():
    cells = synthetic_cells(7, 5).X
    assert ragged_columns(cells[3:5])["count"].to_pylist() == [row[row > 0].tolist() for row in cells.toarray()[3:5]]


def test_annotations_of_other_cells_are_refused():
    with pytest.raises(ValueError, match="a row of obs for each of 5 cells, found 3"):
        ragged_table(synthetic_cells(5, 7).X, pd.DataFrame(index=pd.RangeIndex(3)))
