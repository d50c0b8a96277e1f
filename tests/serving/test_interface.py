"""What stands between a visitor and the server's files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellglot.serving import UploadError, bundle, uploaded_cells

from ..hub_stub import Repository, running_hub


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


def test_an_upload_is_read_and_removed(uploads: Path) -> None:
    path = uploads / "cells.h5ad"
    path.write_text("cells")
    assert uploaded_cells(str(path), Path.read_text) == "cells"
    assert not path.exists()


def test_an_upload_is_removed_when_reading_fails(uploads: Path) -> None:
    path = uploads / "cells.h5ad"
    path.write_text("cells")
    with pytest.raises(ZeroDivisionError):
        uploaded_cells(str(path), lambda _: 1 / 0)
    assert not path.exists()


@pytest.mark.parametrize("name", ["secret.h5ad", "uploads/../secret.h5ad", "uploads/link.h5ad"])
def test_other_files_are_neither_read_nor_removed(uploads: Path, name: str) -> None:
    secret = uploads.parent / "secret.h5ad"
    secret.write_text("secret")
    (uploads / "link.h5ad").symlink_to(secret)
    with pytest.raises(UploadError, match="found none"):
        uploaded_cells(str(uploads.parent / name), Path.read_text)
    assert secret.exists()


def test_the_model_comes_from_the_hub_by_its_name(tmp_path: Path) -> None:
    files = {"about.json": b"{}", "examples.h5ad": b"cells", "model.safetensors": b"weights"}
    ask = "from cellglot.serving import bundle; print(*sorted(p.name for p in bundle('nowhere').iterdir()))"
    with running_hub() as hub:
        hub.repositories["org/bundle"] = Repository("model", private=False)
        hub.repositories["org/bundle"].commit(files)
        environment = os.environ | hub.environment(tmp_path) | {"CELLGLOT_SPACE_MODEL": "org/bundle"}
        done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(files)


def test_a_space_without_a_model_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Train one with `python .*prepare\.py`, or set CELLGLOT_SPACE_MODEL"):
        bundle(tmp_path / "model")
