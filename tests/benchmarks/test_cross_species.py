"""benchmarks/cross_species.py: what it measures on cells whose answer is known."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from ..conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from cross_species import _text, interval
from cross_species_cells import TAXONOMY_1, TAXONOMY_2, Species, categories, read_pair, training_cells
from cross_species_measures import (
    matchability_figures,
    mean_correlation,
    transfer_figures,
    translation_figures,
    wasserstein_figures,
)
from cross_species_spaces import Space, Split

CLASSES = {"human": {"neuron": 40, "microglia": 20}, "mouse": {"neuron": 50, "microglia": 30, "pericyte": 25}}
CENTRES = {"neuron": (9, 0, 0), "microglia": (0, 9, 0), "pericyte": (0, 0, 9)}


def species(name: str) -> tuple[Species, np.ndarray]:
    """Cells of known classes, and where they lie in three dimensions, which are also their three genes."""
    import anndata as ad

    rng = np.random.default_rng(len(name))
    labels = np.repeat(list(CLASSES[name]), list(CLASSES[name].values()))
    rows = np.array([CENTRES[c] for c in labels]) + rng.normal(size=(len(labels), 3), scale=0.3)
    rows = np.abs(rows).astype(np.float32)
    cells = ad.AnnData(sp.csr_matrix(rows))
    cells.var_names = ["a", "b", "c"]
    return Species(name, cells, sp.csr_matrix(rows), labels, labels, np.arange(3)), rows


@pytest.fixture
def split() -> tuple[Split, dict[str, np.ndarray]]:
    found = {name: species(name) for name in CLASSES}
    pair = {name: cells for name, (cells, _) in found.items()}
    train = {name: training_cells(cells, 0) for name, cells in pair.items()}
    extractor = SimpleNamespace(gene_ids=lambda source: ["a", "b", "c"])
    return Split(pair, 0, train, Path(), extractor), {name: rows for name, (_, rows) in found.items()}


def test_a_split_holds_out_a_share_of_every_class(split):
    for name, cells in split[0].pair.items():
        for label, n in CLASSES[name].items():
            held_out = ~split[0].train[name] & (cells.class_n == label)
            assert held_out.sum() == round(0.3 * n)


def test_normalized_spaces_compare(split):
    """Moving a species and a common factor change nothing."""
    split, rows = split
    spaces = [Space("a", rows), Space("b", {"human": 7 * rows["human"] + 2, "mouse": 7 * rows["mouse"] - 5})]
    first, second = (space.normalized(split.train) for space in spaces)
    for name in CLASSES:
        np.testing.assert_allclose(first.cells[name], second.cells[name], atol=1e-6)
        assert first.cells[name][split.train[name]].mean(axis=0) == pytest.approx(0, abs=1e-6)
    squares = [np.square(first.cells[name][split.train[name]]).sum(axis=1).mean() for name in CLASSES]
    assert np.mean(squares) == pytest.approx(1)


def test_classes_that_lie_together_score_and_those_swapped_do_not(split):
    split, rows = split
    good, swapped = Space("good", rows), Space("swapped", {**rows, "human": rows["human"][:, [1, 0, 2]]})
    assert transfer_figures(good, split)["mouse to human"] == transfer_figures(good, split)["human to mouse"] == 1
    assert transfer_figures(swapped, split)["mouse to human"] == transfer_figures(swapped, split)["human to mouse"] == 0
    assert wasserstein_figures(good, split)["wasserstein_ratio"] < 0.1
    assert wasserstein_figures(swapped, split)["wasserstein_ratio"] > 10


def test_cells_without_counterpart_match_least(split):
    split, rows = split
    assert matchability_figures(Space("good", rows), split)["matchability"] > 0.99


def test_translation_of_known_quality(split):
    split, rows = split
    held_out = {name: ~split.train[name] for name in CLASSES}

    def perfect(source: str, target: str) -> np.ndarray:
        return rows[source][held_out[source]]

    def opposite(source: str, target: str) -> np.ndarray:
        return -rows[source][held_out[source]]

    def silent(source: str, target: str) -> np.ndarray:
        return np.full((held_out[source].sum(), 3), np.nan)

    key = "mouse to human, all genes"
    found = {way.__name__: translation_figures(way, split)[key] for way in (perfect, opposite, silent)}
    assert found["perfect"] > 0.99
    assert found["opposite"] < -0.99
    assert found["silent"] is None


def test_correlation_and_interval_by_hand():
    x: Any = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    assert mean_correlation(x, np.array([[2.0, 4.0, 6.0], [1.0, 0.0, 1.0]])) == pytest.approx(0)  # 1 and -1
    assert mean_correlation(np.ones((1, 3)), np.ones((1, 3))) is None
    # t of two degrees of freedom, 4.303, times 0.1 / sqrt(3)
    assert interval([0.4, 0.5, 0.6])["ci"] == pytest.approx(0.2484, abs=1e-4)
    assert interval([0.4, None])["mean"] is None
    assert _text(interval([0.4, 0.5, 0.6])) == "0.500 ± 0.248"


@pytest.mark.realdata
def test_the_real_cells_are_those_that_the_card_describes(real_data, monkeypatch):
    import cross_species_cells

    monkeypatch.setattr(cross_species_cells, "DATA", real_data)
    pair = read_pair("merfish")
    assert {name: len(cells.type_n) for name, cells in pair.items()} == {"human": 267, "mouse": 1000}
    assert len(pair["human"].shared_g) == len(pair["mouse"].shared_g) > 900
    named = categories(pair)
    assert len(named) == 15
    assert {level for level, _ in named.values()} == set(TAXONOMY_1.values())
    assert {level for _, level in named.values()} == set(TAXONOMY_1)
    assert set(TAXONOMY_2.values()) <= set(TAXONOMY_1)
    genes = [cells.genes[cells.shared_g[0]].upper() for cells in pair.values()]
    assert genes[0] == genes[1]
