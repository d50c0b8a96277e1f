"""Triplet text: any range of cells out of a file of any size and order, or an error that says which line is wrong."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from cellglot.datasets_scripts import matrix_triplet
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.matrix_triplet import is_by_cell, sort_by_cell, triplet_blocks

from ..conftest import synthetic_cells

N_CELLS, N_GENES = 211, 53


@pytest.fixture
def counts() -> sp.csr_matrix:
    matrix = sp.lil_matrix(synthetic_cells(N_CELLS, N_GENES, seed=3).X)
    # Cells without a line: the first, the last, and more of them than a block has
    matrix[[0, 1, *range(90, 120), N_CELLS - 1]] = 0
    return matrix.tocsr()


def write(path: Path, counts: sp.csr_matrix, order: np.ndarray | None = None) -> Path:
    entries = counts.tocoo()
    lines = np.stack([entries.col + 1, entries.row + 1, entries.data], axis=1).astype(int)
    np.savetxt(path, lines if order is None else lines[order], fmt="%d", delimiter="\t")
    return path


def read(path: Path, cells: range, shape: tuple[int, int] = (N_CELLS, N_GENES), **options) -> np.ndarray:
    blocks = list(triplet_blocks(path, shape, cells, **options))
    assert [start for start, _ in blocks] == list(range(cells.start, cells.stop, options.get("cells_per_block", 512)))
    return sp.vstack([block for _, block in blocks]).toarray() if blocks else np.empty((0, shape[1]))


# A read ends in the middle of a line, of a cell, behind one, or never.
@pytest.mark.parametrize("bytes_per_read", [1, 7, 997, 1 << 20])
@pytest.mark.parametrize("cells_per_block", [7, 512])
def test_blocks_are_the_cells_of_the_matrix(tmp_path, monkeypatch, counts, bytes_per_read, cells_per_block):
    monkeypatch.setattr(matrix_triplet, "BYTES_PER_READ", bytes_per_read)
    path = write(tmp_path / "UMI.count.matrix", counts)
    assert is_by_cell(path)
    np.testing.assert_array_equal(read(path, range(N_CELLS), cells_per_block=cells_per_block), counts.toarray())


@pytest.mark.parametrize("cells", [range(13), range(13, 101), range(95, 118), range(200, N_CELLS), range(17, 17)])
def test_any_range_of_cells_is_found(tmp_path, counts, cells):
    path = write(tmp_path / "UMI.count.matrix", counts)
    np.testing.assert_array_equal(read(path, cells, cells_per_block=5), counts[cells.start : cells.stop].toarray())


def test_a_last_line_may_lack_its_end(tmp_path, counts):
    path = write(tmp_path / "UMI.count.matrix", counts)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    np.testing.assert_array_equal(read(path, range(N_CELLS)), counts.toarray())


@pytest.mark.parametrize("by", ["gene", "chance"])
def test_a_file_in_another_order_is_sorted_through_buckets(tmp_path, monkeypatch, counts, by):
    monkeypatch.setattr(matrix_triplet, "BYTES_PER_READ", 997)
    order = {
        "gene": np.argsort(counts.tocoo().col, kind="stable"),
        "chance": np.random.default_rng(0).permutation(counts.nnz),
    }[by]
    path = write(tmp_path / "UMI.count.matrix", counts, order)
    assert not is_by_cell(path)
    sort_by_cell(path, tmp_path / "sorted", N_CELLS, lines_per_bucket=101)
    assert is_by_cell(tmp_path / "sorted")
    np.testing.assert_array_equal(read(tmp_path / "sorted", range(N_CELLS)), counts.toarray())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["UMI.count.matrix", "sorted"]


def test_one_cell_out_of_order_is_refused(tmp_path, counts):
    order = np.arange(counts.nnz)
    order[[500, 900]] = order[[900, 500]]
    path = write(tmp_path / "UMI.count.matrix", counts, order)
    with pytest.raises(CorpusError, match=r"before byte [\d,]+ are not in ascending order .*sort -s -n -k 2,2"):
        read(path, range(N_CELLS))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("54\t9\t1", r"has gene 54, expected 1 to 53"),
        ("0\t9\t1", r"has gene 0, expected 1 to 53"),
        ("3\t212\t1", r"has cell 212, expected 1 to 211"),
        ("3\t0\t1", r"has cell 0, expected 1 to 211"),
        ("3\t211\t0", r"has count 0, expected 1 or more"),
        ("3\t211\t1.5", r"three whole numbers, gene, cell and count, with tabs .*1\.5"),
        ("3\t211", r"three whole numbers.*got 2.*Fetch the file again if its end is missing"),
        ("3 211 1", r"three whole numbers.*got 1"),
    ],
)
def test_a_line_that_is_no_triplet_of_the_screen_is_named(tmp_path, counts, line, message):
    path = write(tmp_path / "UMI.count.matrix", counts)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CorpusError, match=message):
        read(path, range(N_CELLS))


def test_an_empty_file_is_a_matrix_of_zeros(tmp_path):
    path = tmp_path / "UMI.count.matrix"
    path.write_bytes(b"")
    assert is_by_cell(path)
    assert not read(path, range(N_CELLS)).any()
