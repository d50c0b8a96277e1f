"""spaces/gene_graph: by clicks in a browser, through its API, and with what it should refuse."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Served, client, drawn_figures, opened, prepare, served, some_cells

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("gene-graph")
    bundle = prepare("gene_graph", folder / "model", "--epochs", "4")
    (folder / "uploads").mkdir()
    with served("gene_graph", bundle, folder / "uploads") as running:
        yield running


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_by_clicks(space: Served, browser: Any, screenshots: Path, width: int, theme: str) -> None:
    with opened(space, browser, width, theme) as page:
        page.get_by_role("button", name="Analyse the built-in").click()
        page.get_by_text("105 cells").first.wait_for(timeout=90_000)
        page.get_by_label("Type to explain").click()
        page.get_by_role("option", name="CD19+ B").click()
        page.get_by_text("CD19+ B, ").wait_for(timeout=90_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=screenshots / f"gene_graph-{width}-{theme}.png", full_page=True)
        figures = drawn_figures(page)
    assert len(figures) == 3
    assert min(figures) > 200


@pytest.mark.browser
def test_an_uploaded_file_leaves_its_box_and_an_error_leaves_the_results(
    space: Served, browser: Any, tmp_path: Path
) -> None:
    with opened(space, browser, 1200, "light") as page:
        page.set_input_files("input[type=file]", some_cells(53, tmp_path / "mine.h5ad"))
        page.get_by_text("mine").first.wait_for()
        page.get_by_role("button", name="Analyse my cells").click()
        page.get_by_text("53 cells").wait_for(timeout=90_000)
        page.get_by_text("Drop File Here").wait_for()
        page.wait_for_timeout(500)
        before = drawn_figures(page)
        page.get_by_role("button", name="Analyse my cells").click()
        page.get_by_text("Expected an .h5ad file, found none").wait_for()
        assert drawn_figures(page) == before
        assert page.get_by_text("53 cells").is_visible()
    assert len(before) == 3


def test_upload_explain_and_nothing_kept(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file

    api = client(space)
    read, *_ = api.predict(handle_file(some_cells(53, tmp_path / "mine.h5ad")), api_name="/analyse")
    assert "53 cells" in read
    said, genes, network = api.predict("CD19+ B", api_name="/explain")
    assert "CD19+ B" in said
    assert genes
    assert network
    assert not list(space.folder.rglob("*.h5ad"))


def test_errors_are_in_words(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="analyse a file"):
        client(space).predict("CD19+ B", api_name="/explain")
    api = client(space)
    api.predict(api_name="/analyse_examples")
    with pytest.raises(AppError, match="Expected a type of the list"):
        api.predict("<script>", api_name="/explain")
    (tmp_path / "bad.h5ad").write_text("hello")
    with pytest.raises(AppError, match=r"Expected an \.h5ad file"):
        api.predict(handle_file(tmp_path / "bad.h5ad"), api_name="/analyse")
