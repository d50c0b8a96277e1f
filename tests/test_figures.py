"""Figures are written in the format their name says, whole or not at all."""

import matplotlib
import matplotlib.pyplot as plt
import pytest

from cellglot.figures import save_figure

matplotlib.use("Agg")


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.SVG", b"<?xml")])
def test_the_suffix_is_the_format(tmp_path, name, start):
    save_figure(plt.subplots()[1], tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a figure's name to end in one of"):
        save_figure(plt.subplots()[1], tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())
