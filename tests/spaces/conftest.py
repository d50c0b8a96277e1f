"""Spaces as their users meet them: prepared by their own script, served by their own app.py, in their own processes."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SPACES = Path(__file__).parents[2] / "spaces"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# Without these a browser calls home at every start
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@dataclass(frozen=True)
class Served:
    url: str
    folder: Path
    seconds_to_start: float
    process: Any


def prepare(method: str, output: Path, *options: str) -> Path:
    """The folder that a Space's prepare.py leaves, trained for much less long than its users would."""
    command = [sys.executable, str(SPACES / method / "prepare.py"), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@contextmanager
def served(method: str, bundle: Path, work: Path) -> Iterator[Served]:
    """The Space, running; its uploads lie in `work`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "CELLGLOT_SPACE_MODEL": str(bundle),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(work),
        "HF_HUB_OFFLINE": "1",
    }
    url, start = f"http://127.0.0.1:{port}", time.monotonic()
    log = work.with_suffix(".log")
    with log.open("w") as output:
        command = [sys.executable, str(SPACES / method / "app.py")]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        while True:
            try:
                urllib.request.urlopen(url, timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() - start < 120, log.read_text()[-3000:]
                time.sleep(0.1)
        yield Served(url, work, time.monotonic() - start, process)
    finally:
        process.terminate()
        process.wait(30)


def client(space: Served) -> Any:
    """A program that uses the Space, as a session of its own."""
    from gradio_client import Client

    return Client(space.url, verbose=False, analytics_enabled=False)


def some_cells(n: int, path: Path) -> Path:
    """File of n of the built-in cells."""
    from cellglot.datasets_scripts.pbmc import pbmc_cells

    pbmc_cells()[:n].copy().write_h5ad(path)
    return path


@contextmanager
def opened(space: Served, browser: Any, width: int, theme: str) -> Iterator[Any]:
    """The Space's page, which must ask no other host for anything and fit the width."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{space.url}/?__theme={theme}")
    yield page
    assert not [url for url in asked if not url.startswith((space.url, "data:", "blob:"))]
    assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    page.close()


def drawn_figures(page: Any) -> list[int]:
    """Width on the page of each figure that it shows; icons are images too, but small."""
    images = page.locator(".gradio-container img")
    sizes = images.evaluate_all("all => all.map(image => [image.naturalWidth, image.clientWidth])")
    return [shown for natural, shown in sizes if natural > 300]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium; Debian's package is chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: CELLGLOT_SCREENSHOTS, else a folder of the run."""
    folder = Path(os.environ.get("CELLGLOT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
