"""spaces/geneformer: by clicks in a browser, through its API, and with what it should refuse."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from .conftest import Served, client, drawn_figures, opened, prepare, served, some_cells

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("geneformer")
    bundle = prepare("geneformer", folder / "model", "--pretrain-epochs", "1", "--finetune-epochs", "1")
    (folder / "uploads").mkdir()
    with served("geneformer", bundle, folder / "uploads") as running:
        yield running


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_by_clicks(space: Served, browser: Any, screenshots: Path, width: int, theme: str) -> None:
    with opened(space, browser, width, theme) as page:
        page.get_by_role("button", name="Analyse the built-in").click()
        page.get_by_text("700 cells").first.wait_for(timeout=90_000)
        page.get_by_role("button", name="Perturb", exact=True).click()
        page.get_by_text("by strength").wait_for(timeout=90_000)
        page.wait_for_function("document.querySelectorAll('.gradio-container img').length >= 5")
        page.wait_for_timeout(500)
        page.screenshot(path=screenshots / f"geneformer-{width}-{theme}.png", full_page=True)
        page.get_by_role("button", name="Try: overexpress NKG7").click()
        page.get_by_text("NKG7, overexpressed").wait_for(timeout=90_000)
        assert page.get_by_label("overexpress").is_checked()
        figures = drawn_figures(page)
    assert len(figures) == 5
    assert min(figures) > 200


def test_upload_perturb_and_nothing_kept(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file

    api = client(space)
    said, *_ = api.predict(handle_file(some_cells(53, tmp_path / "mine.h5ad")), api_name="/analyse")
    assert "53 cells" in said
    said, *figures = api.predict("CD3D", "overexpress", api_name="/perturb")
    assert "CD3D" in said
    assert len(figures) == 3
    assert not list(space.folder.rglob("*.h5ad"))


def test_sessions_do_not_mix(space: Served, tmp_path: Path) -> None:
    from gradio_client import handle_file

    sizes = [17, 23, 29, 31, 37, 41]
    paths = {n: some_cells(n, tmp_path / f"{n}.h5ad") for n in sizes}

    def ask(n: int) -> tuple[str, str]:
        api = client(space)
        said, *_ = api.predict(handle_file(paths[n]), api_name="/analyse")
        return said, api.predict("FTL", "delete", api_name="/perturb")[0]

    with ThreadPoolExecutor(len(sizes)) as pool:
        answers = list(pool.map(ask, sizes))
    for n, (said, perturbed) in zip(sizes, answers, strict=True):
        assert f"**{n} cells**" in said
        assert "FTL" in perturbed


@pytest.mark.parametrize("what", ["text", "unknown genes", "no file"])
def test_errors_are_in_words(space: Served, tmp_path: Path, what: str) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    path = tmp_path / "bad.h5ad"
    if what == "text":
        path.write_text("hello")
    elif what == "unknown genes":
        ad.AnnData(sp.csr_matrix(np.ones((20, 7), np.float32))).write_h5ad(path)
    expected = {"text": "Expected an .h5ad file", "unknown genes": "vocabulary", "no file": "found none"}[what]
    with pytest.raises(AppError, match=expected):
        client(space).predict(None if what == "no file" else handle_file(path), api_name="/analyse")


def test_files_of_the_server_cannot_be_named(space: Served) -> None:
    import urllib.request

    # By hand: Gradio's own client would send a file of its side
    endpoint = f"{space.url}/gradio_api/call/analyse"
    secret = space.folder.parent / "model" / "examples.h5ad"
    for path in ("/etc/passwd", "../../etc/passwd", str(secret), f"{space.folder}/../model/examples.h5ad"):
        body = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}).encode()
        request = urllib.request.Request(endpoint, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            event = json.load(response)["event_id"]
        with urllib.request.urlopen(f"{endpoint}/{event}") as response:
            answer = response.read().decode()
        assert "event: error" in answer
        assert "event: complete" not in answer
        assert "root:" not in answer
    assert secret.exists()


def test_perturbing_before_cells_are_there_is_an_error(space: Served) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="analyse a file"):
        client(space).predict("CD3D", "delete", api_name="/perturb")
