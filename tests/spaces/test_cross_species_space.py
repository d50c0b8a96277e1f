"""spaces/cross_species: by clicks in a browser, through its API, and with what it should refuse."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import pytest

from .conftest import Served, client, drawn_figures, opened, prepare, served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("cross_species", tmp_path_factory.mktemp("cross-species") / "model", "--epochs", "4")


@pytest.fixture(scope="module")
def space(model: Path) -> Iterator[Served]:
    uploads = model.with_name("uploads")
    uploads.mkdir()
    with served("cross_species", model, uploads) as running:
        yield running


def some_mouse_cells(model: Path, path: Path, *, with_types: bool) -> Path:
    """File of 53 of the built-in mouse cells."""
    cells: Any = ad.read_h5ad(model / "mouse.h5ad")[:53].copy()
    if not with_types:
        del cells.obs["cell_type"]
    cells.write_h5ad(path)
    return path


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_by_clicks(space: Served, browser: Any, screenshots: Path, width: int, theme: str) -> None:
    with opened(space, browser, width, theme) as page:
        page.get_by_text("simulated").first.wait_for()
        page.get_by_role("button", name="Analyse the built-in").click()
        page.get_by_text("when genes are only renamed").wait_for(timeout=90_000)
        page.get_by_label("Mouse type").click()
        page.get_by_role("option", name="CD19+ B").click()
        page.get_by_text("CD19+ B, ").wait_for(timeout=90_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=screenshots / f"cross_species-{width}-{theme}.png", full_page=True)
        figures = drawn_figures(page)
    assert len(figures) == 6
    assert min(figures) > 200


def test_upload_look_at_and_nothing_kept(space: Served, model: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file

    api = client(space)
    path = some_mouse_cells(model, tmp_path / "mine.h5ad", with_types=True)
    read, *_ = api.predict(handle_file(path), api_name="/analyse")
    assert "53 cells" in read
    assert "when genes are only renamed" in read
    said, near, genes = api.predict("CD19+ B", api_name="/look_at")
    assert "CD19+ B" in said
    assert near
    assert genes
    assert not list(space.folder.rglob("*.h5ad"))


def test_cells_without_types_are_clustered(space: Served, model: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file

    api = client(space)
    path = some_mouse_cells(model, tmp_path / "mine.h5ad", with_types=False)
    read, *_ = api.predict(handle_file(path), api_name="/analyse")
    assert "No type is called" in read
    said, *_ = api.predict("cluster 1", api_name="/look_at")
    assert "nearest to human" in said


def test_errors_are_in_words(space: Served, model: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="analyse a file"):
        client(space).predict("CD19+ B", api_name="/look_at")
    api = client(space)
    api.predict(api_name="/analyse_examples")
    with pytest.raises(AppError, match="Expected a type of the list"):
        api.predict("<script>", api_name="/look_at")
    (tmp_path / "bad.h5ad").write_text("hello")
    with pytest.raises(AppError, match=r"Expected an \.h5ad file"):
        api.predict(handle_file(tmp_path / "bad.h5ad"), api_name="/analyse")
    cells = ad.read_h5ad(model / "mouse.h5ad")[:17].copy()
    cells.var_names = [f"gene{i}" for i in range(cells.n_vars)]
    cells.write_h5ad(tmp_path / "unknown.h5ad")
    with pytest.raises(AppError, match="of which the model knows 0"):
        api.predict(handle_file(tmp_path / "unknown.h5ad"), api_name="/analyse")
