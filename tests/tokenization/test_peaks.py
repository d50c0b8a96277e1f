"""Names of peaks: both spellings read, malformed ones named."""

import pytest

from cellglot.tokenization.peaks import parse_peaks, peak_keys


def test_both_spellings_give_chromosome_start_and_end():
    chromosome, start, end = parse_peaks(["chr1-633515-633525", "chrX:7-11", "GL000194.1-0-13", "1-17-19"])
    assert list(chromosome) == ["chr1", "chrX", "GL000194.1", "1"]
    assert (start.tolist(), end.tolist()) == ([633515, 7, 0, 17], [633525, 11, 13, 19])


def test_spellings_of_one_peak_have_one_key():
    assert len(set(peak_keys(["chr1-7-11", "chr1:7-11", "1:7-11", "Chr1-7-11"]))) == 1
    assert len(set(peak_keys(["chrM-7-11", "MT-7-11", "chrMT:7-11"]))) == 1
    assert len(set(peak_keys(["chr1-7-11", "chr11-7-11", "chr1-7-13", "chr1-5-11"]))) == 4


@pytest.mark.parametrize(
    "name",
    [
        "CAMTA1",
        "chr1-7",
        "chr1-7-11-13",
        "chr1_7_11",
        "chr1-11-7",
        "chr1-7-7",
        "chr1:-7-11",
        "",
        "chr1-7-11 ",
        "chr1-7-11\n",
    ],
)
def test_malformed_peaks_are_named(name):
    with pytest.raises(ValueError, match="1 of 2 peaks are malformed") as error:
        parse_peaks(["chr1-7-11", name])
    assert repr(name) in str(error.value)
