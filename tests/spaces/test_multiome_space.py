"""spaces/multiome: by clicks in a browser, through its API, and with what it should refuse."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from .conftest import Served, client, drawn_figures, opened, prepare, served, some_cells

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("multiome", tmp_path_factory.mktemp("multiome-model") / "model", "--epochs", "2")


@pytest.fixture(scope="module")
def space(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("multiome") / "uploads"
    folder.mkdir()
    with served("multiome", model, folder) as running:
        yield running


def test_it_says_what_is_simulated_and_beats_the_frequencies(model: Path) -> None:
    about = json.loads((model / "about.json").read_text())
    assert "simulated" in about["examples"]
    for task in ("gex2atac", "atac2gex"):
        figures = about["held_out"][task]
        assert figures["model"] > figures["frequency"] > figures["share there"]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_by_clicks(space: Served, browser: Any, screenshots: Path, width: int, theme: str) -> None:
    with opened(space, browser, width, theme) as page:
        page.get_by_role("button", name="Analyse the built-in").click()
        page.get_by_text("105 cells").first.wait_for(timeout=90_000)
        page.get_by_label("Cell", exact=True).click()
        page.get_by_role("option", name="CD19+ B").first.click()
        page.get_by_text("by frequency in CD19+ B").wait_for(timeout=90_000)
        page.wait_for_timeout(500)
        page.screenshot(path=screenshots / f"multiome-{width}-{theme}.png", full_page=True)
        assert len(drawn_figures(page)) == 3
        page.get_by_label("genes from peaks").click()
        page.get_by_text("genes are expressed").wait_for(timeout=90_000)
        page.wait_for_timeout(500)
        figures = drawn_figures(page)
    assert len(figures) == 3
    assert min(figures) > 200


def test_upload_predict_and_nothing_kept(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file

    api = client(space)
    cells = some_cells(53, tmp_path / "mine.h5ad")
    said, *_ = api.predict(handle_file(cells), api_name="/analyse")
    assert "53 cells" in said
    name = ad.read_h5ad(cells).obs_names[7]
    said, top, hits, rising = api.predict(name, "peaks from genes", api_name="/predict")
    assert name in said
    assert "rises most" in said
    assert "truly" not in said
    assert top
    assert rising
    assert not list(space.folder.rglob("*.h5ad"))
    assert hits["value"] is None


def test_errors_are_in_words(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    api = client(space)
    with pytest.raises(AppError, match="analyse a file"):
        api.predict("cell", "peaks from genes", api_name="/predict")
    api.predict(handle_file(some_cells(23, tmp_path / "mine.h5ad")), api_name="/analyse")
    with pytest.raises(AppError, match="Expected a cell of the list"):
        api.predict("<script>", "peaks from genes", api_name="/predict")
    (tmp_path / "bad.h5ad").write_text("hello")
    with pytest.raises(AppError, match=r"Expected an \.h5ad file"):
        api.predict(handle_file(tmp_path / "bad.h5ad"), api_name="/analyse")
    ad.AnnData(sp.csr_matrix(np.ones((20, 7), np.float32))).write_h5ad(tmp_path / "unknown.h5ad")
    with pytest.raises(AppError, match="of which the model knows 0"):
        api.predict(handle_file(tmp_path / "unknown.h5ad"), api_name="/analyse")
