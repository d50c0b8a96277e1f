"""spaces/drug_response: by clicks in a browser, through its API, and with what it should refuse."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Served, client, drawn_figures, opened, prepare, served, some_cells

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("drug-response")
    bundle = prepare("drug_response", folder / "model", "--epochs", "1")
    (folder / "uploads").mkdir()
    with served("drug_response", bundle, folder / "uploads") as running:
        yield running


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_by_clicks(space: Served, browser: Any, screenshots: Path, width: int, theme: str) -> None:
    with opened(space, browser, width, theme) as page:
        page.get_by_label("Drug", exact=True).click()
        page.get_by_role("option", name="simulated drug B").click()
        page.get_by_role("button", name="Predict").click()
        page.get_by_text("go up the most").wait_for(timeout=90_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=screenshots / f"drug_response-{width}-{theme}.png", full_page=True)
        assert page.get_by_text("Simulated responses").count()
        page.get_by_role("button", name="Try: a new structure").click()
        page.get_by_text("This was not measured").wait_for(timeout=90_000)
        assert page.get_by_label("Another structure").input_value()
        page.get_by_role("button", name="Try: held out").click()
        page.get_by_text("none of them has seen this response").wait_for(timeout=90_000)
        assert not page.get_by_label("Another structure").input_value()
        page.wait_for_timeout(500)
        figures = drawn_figures(page)
    assert len(figures) == 3
    assert min(figures) > 200


def test_own_cells_and_nothing_kept(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file

    from cellglot.datasets_scripts.pbmc import pbmc_cells

    n_dendritic = int((pbmc_cells()[:53].obs["cell_type"] == "Dendritic").sum())
    assert 0 < n_dendritic < 53
    api = client(space)
    read = api.predict(handle_file(some_cells(53, tmp_path / "mine.h5ad")), api_name="/read_cells")
    assert "53 cells" in read
    said, changes, *_ = api.predict("simulated drug A", "10 uM", "Dendritic", "", api_name="/predict")
    assert f"from {n_dendritic} of your cells" in said
    assert changes
    assert not list(space.folder.rglob("*.h5ad"))


def test_held_out_trained_and_unmeasured_are_told_apart(space: Served) -> None:
    api = client(space)

    def said(*asked: str) -> str:
        return api.predict(*asked, api_name="/predict")[0]

    # Each drug is held out in one type, the first in the most frequent
    assert "Held out" in said("simulated drug A", "10 uM", "Dendritic", "")
    assert "fitted to this response" in said("simulated drug A", "10000 nM", "CD19+ B", "")
    assert "not measured" in said("simulated drug A", "250 nM", "CD19+ B", "")
    unseen = said("simulated drug A", "50 uM", "CD19+ B", "CCCCCc1ccccc1C(=O)NCC")
    assert "your structure" in unseen
    assert "beyond" in unseen


@pytest.mark.parametrize(("drug", "line"), [("aspirin", "Dendritic"), ("simulated drug A", "<b>")])
def test_unknown_drugs_and_types_are_refused_in_words(space: Served, drug: str, line: str) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="of the list, found"):
        client(space).predict(drug, "10 uM", line, "", api_name="/predict")


@pytest.mark.parametrize(
    ("dose", "structure", "words"),
    [
        ("10", "", "with its unit"),
        ("0 uM", "", "above 0"),
        ("-1 uM", "", "with its unit"),
        ("10 uM", "C1CC(", "no SMILES that RDKit can read"),
        ("10 uM", "C" * 300, "at most 200 characters"),
    ],
)
def test_errors_are_in_words(space: Served, dose: str, structure: str, words: str) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=words):
        client(space).predict("simulated drug A", dose, "Dendritic", structure, api_name="/predict")


def test_bad_files_are_refused_in_words(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "bad.h5ad").write_text("hello")
    with pytest.raises(AppError, match=r"Expected an \.h5ad file"):
        client(space).predict(handle_file(tmp_path / "bad.h5ad"), api_name="/read_cells")
