"""Figures of a stranger's names."""

import io
from typing import Any

import numpy as np
import pytest

from cellglot.serving.figures import GREY, plot_bars, plot_cells, plot_matrix

# Formulas to matplotlib, the second a broken one
NAMES = ["$x_1$", r"$\frac{", "<b>& "]


def figures() -> dict[str, Any]:
    return {
        "bars": plot_bars(NAMES, [3.0, 1.0, -2.0], title=NAMES[1], axis=NAMES[0]),
        "cells": plot_cells(np.eye(3)[:, :2], NAMES, title=NAMES[1]),
        "matrix": plot_matrix(np.eye(3), NAMES, NAMES, title=NAMES[1], bar=NAMES[0]),
    }


@pytest.mark.parametrize("kind", ["bars", "cells", "matrix"])
def test_names_are_written_as_they_are(kind: str) -> None:
    figure = figures()[kind]
    figure.savefig(io.BytesIO(), format="png")
    written = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert sum(any(name in text for text in written) for name in NAMES) == len(NAMES)


def test_nothing_is_black_or_white_on_no_ground() -> None:
    figure = figures()["bars"]
    assert figure.patch.get_alpha() == 0
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    assert {text.get_color() for text in texts if text.get_text()} == {GREY}
