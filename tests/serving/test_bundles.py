"""The folder of a Space's model: whole or not there, and nothing else is overwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellglot.serving import bundle, keep, preparing

from ..hub_stub import Repository, running_hub


def make(output: Path, text: str) -> None:
    with preparing(output) as work:
        made = work / "run" / "model"
        made.mkdir(parents=True)
        (made / "about.json").write_text(text)
        keep(made, output)


def test_a_finished_bundle_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model"
    for text in ("first", "second"):
        make(output, text)
        assert (output / "about.json").read_text() == text
        assert list(output.parent.iterdir()) == [output]


def test_an_earlier_bundle_survives_a_failure(tmp_path: Path) -> None:
    make(tmp_path / "model", "first")
    with pytest.raises(ZeroDivisionError), preparing(tmp_path / "model") as work:
        (work / "half").write_text(str(1 / 0))
    assert (tmp_path / "model" / "about.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match=r"no model of a Space\. Pass another folder"):
        make(tmp_path, "first")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "first")
    assert bundle(tmp_path / "empty") == tmp_path / "empty"


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
