"""Publishing from a training run, where the Hub is out of reach: before the run begins, and after it has ended."""

from types import SimpleNamespace
from typing import Any

import pytest

from cellglot.hub import HubError
from cellglot.train.labelled_cells_config import LabelledCellsConfig
from cellglot.train.loop_config import LoopConfig
from cellglot.train.output_folder import prepare_output
from cellglot.train.publishing import publish_run

from ..test_publication import MODEL, write

MAIN: Any = SimpleNamespace(is_main_process=True)


def test_a_run_that_cannot_be_published_says_so_before_it_begins(tmp_path):
    """The Hub is out of reach in the processes of tests."""
    config = LoopConfig(output=str(tmp_path / "run"), push_to_hub="org/x")
    with pytest.raises(HubError, match="org/x cannot be published to: HF_HUB_OFFLINE is set"):
        prepare_output(config, MAIN)
    assert not (tmp_path / "run").exists()
    with pytest.raises(HubError, match="found 'x'"):
        LoopConfig(push_to_hub="x")
    with pytest.raises(ValueError, match="private needs push_to_hub"):
        LoopConfig(private=True)
    with pytest.raises(ValueError, match="publishes one model: leave out folds"):
        LabelledCellsConfig(push_to_hub="org/x", folds=3)


def test_a_finished_run_whose_upload_fails_says_how_to_repeat_it(tmp_path):
    folder = write(tmp_path / "run" / "model", MODEL)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    config = LoopConfig(output=str(tmp_path / "run"), push_to_hub="org/x", private=True)
    with pytest.raises(SystemExit) as error:
        publish_run(config, MAIN)
    assert str(error.value).endswith(f"To repeat: python train/push_to_hub.py {tmp_path / 'run'} org/x --private")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
