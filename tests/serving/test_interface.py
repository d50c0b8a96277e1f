"""What stands between a visitor and the server's files."""

from pathlib import Path

import pytest

from cellglot.serving import UploadError, uploaded_cells


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
