"""CSV counts: every value as pandas reads it, wherever blocks and ranges are cut; ragged lines named."""

import numpy as np
import pandas as pd
import pytest

from cellglot.datasets_scripts import csv_counts
from cellglot.datasets_scripts.corpus_errors import CorpusError

from ..conftest import synthetic_cells


@pytest.fixture
def cells():
    return synthetic_cells(23, 17)


@pytest.fixture
def path(cells, tmp_path):
    path = tmp_path / "matrix.csv"
    cells.to_df().astype(int).to_csv(path, index_label="sample_name")
    return path


def joined(parts):
    names, counts = zip(*parts, strict=True)
    return [name for block in names for name in block], np.concatenate([block.toarray() for block in counts])


@pytest.mark.parametrize("bytes_per_block", [1, 64, 10_000])
def test_blocks_of_any_size_give_what_pandas_reads(path, cells, bytes_per_block):
    parts = list(csv_counts.blocks(path, bytes_per_block=bytes_per_block))
    assert len(parts) == (1 if bytes_per_block == 10_000 else 23 if bytes_per_block == 1 else len(parts))
    names, counts = joined(parts)
    expected = pd.read_csv(path, index_col=0)
    assert names == expected.index.tolist() == cells.obs_names.tolist()
    np.testing.assert_array_equal(counts, expected.to_numpy())
    assert all(block.data.all() and block.dtype == np.float32 for _, block in parts)


@pytest.mark.parametrize("size", [1, 37, 100, 10**6])
def test_ranges_that_adjoin_give_every_line_once(path, cells, size):
    end = path.stat().st_size
    parts = [part for start in range(0, end, size) for part in csv_counts.blocks(path, start, min(start + size, end))]
    names, counts = joined(parts)
    assert names == cells.obs_names.tolist()
    np.testing.assert_array_equal(counts, cells.X.toarray())


def test_the_header_names_the_columns(path, cells):
    columns, first = csv_counts.header(path)
    assert columns == ["sample_name", *cells.var_names]
    assert path.read_bytes()[first:].startswith(b"cell0,")
    assert csv_counts.count_rows(path) == 23


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_quotes_decimals_line_ends_and_empty_names_are_read(tmp_path, end):
    path = tmp_path / "matrix.csv"
    newline = "\r\n" if end == "\r\n" else "\n"
    lines = ['"sample_name","A","B,1","C"', '"a,1",1.5,0,2e3', "b,0.0,.25,1E-2", ",0,0,16777216"]
    path.write_bytes((newline.join(lines) + end).encode())
    assert csv_counts.header(path)[0] == ["sample_name", "A", "B,1", "C"]
    names, counts = joined(csv_counts.blocks(path))
    assert names == ["a,1", "b", ""]
    np.testing.assert_array_equal(counts, np.array([[1.5, 0, 2000], [0, 0.25, 0.01], [0, 0, 16777216]], np.float32))
    assert csv_counts.count_rows(path) == 3


def test_a_file_without_cells_gives_no_block(tmp_path):
    path = tmp_path / "matrix.csv"
    path.write_text("sample_name,A\n")
    assert list(csv_counts.blocks(path)) == []
    assert csv_counts.count_rows(path) == 0


@pytest.mark.parametrize("bytes_per_block", [8, 10_000])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c,1,2", r"line 4: expected 4 fields \(sample_name and 3 genes\), found 3\. Fetch"),
        ("c,1,2,3,4", r"line 4: expected 4 fields \(sample_name and 3 genes\), found 5\."),
        ("", r"line 4: expected 4 fields .*, found 1\."),
        ("c,1,,3", r"line 4: expected a count of gene 'B', found ''"),
        ("c,1,NA,3", r"line 4: expected a count of gene 'B', found 'NA'"),
        ("c,1,2,-3", r"line 4: expected a count of gene 'C', found '-3'"),
        ("c,1,2,3e", r"line 4: expected a count of gene 'C', found '3e'"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message, bytes_per_block):
    path = tmp_path / "matrix.csv"
    path.write_text(f"sample_name,A,B,C\na,1,0,2\nb,0,1,0\n{line}\nd,0,0,1\n")
    with pytest.raises(CorpusError, match=message):
        list(csv_counts.blocks(path, bytes_per_block=bytes_per_block))


def test_a_file_cut_off_within_a_line_is_said_to_be(path):
    text = path.read_bytes()
    path.write_bytes(text[: text.rindex(b",")])
    with pytest.raises(CorpusError, match=r"line 24: expected 18 fields .*found 17\. It is the last one: .*cut off"):
        list(csv_counts.blocks(path))


def test_lines_of_later_ranges_have_their_number_in_the_file(path):
    text = path.read_text().splitlines()
    text[20] += ",1"
    path.write_text("\n".join(text))
    with pytest.raises(CorpusError, match="line 21:"):
        list(csv_counts.blocks(path, path.stat().st_size // 2))
