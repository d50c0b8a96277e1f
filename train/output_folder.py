"""The output folder of a run: empty, resumed, or an earlier run's, which is kept until the new one is sound."""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from .checkpoint import list_checkpoints, remove_partial
from .config import write_run_record
from .loop_config import LoopConfig
from .publishing import prepare_publication


def prepare_output(config: LoopConfig, accelerator: Accelerator) -> Path:
    """The output folder, checked: empty, or resumed, or an earlier run's that is put aside until `keep_output`.

    Raises  FileExistsError if it holds a run that has begun and neither resume nor overwrite is set, or other files;
            HubError if the model is to be published where it cannot be
    """
    output = Path(config.output)
    if accelerator.is_main_process:
        prepare_publication(config)
        holds_run = (output / "run.json").exists()
        if holds_run and config.overwrite:
            shutil.rmtree(_put_aside(output), ignore_errors=True)
            os.rename(output, _put_aside(output))
        elif holds_run and not config.resume and any(output.glob("**/metrics.jsonl")):
            # (A run that never came to train, for an error in its options, gives way to the corrected command.)
            raise FileExistsError(
                f"{output} holds an earlier run. Pass --resume to go on with it, --overwrite to start anew, or another "
                "--output."
            )
        elif not holds_run and output.exists() and any(output.iterdir()):
            raise FileExistsError(f"{output} holds files that are no run of this script. Pass another --output.")
        output.mkdir(parents=True, exist_ok=True)
        remove_partial(output / "checkpoints")
        if not (output / "run.json").exists():
            # From here on the folder is known as a run, even if this process is killed a moment later.
            write_run_record(output / "run.json", config)
    accelerator.wait_for_everyone()
    return output


def keep_output(output: Path, accelerator: Accelerator) -> None:
    """Removes the run that was put aside: data and options of the new one are sound."""
    if accelerator.is_main_process:
        shutil.rmtree(_put_aside(output), ignore_errors=True)


def abandon_output(output: Path, accelerator: Accelerator) -> None:
    """Undoes `prepare_output` after an error in data or options: an earlier run comes back."""
    if not accelerator.is_main_process:
        return
    if _put_aside(output).exists():
        shutil.rmtree(output, ignore_errors=True)
        os.rename(_put_aside(output), output)
    elif not (output / "data" / "data.json").exists() and not list_checkpoints(output / "checkpoints"):
        (output / "run.json").unlink(missing_ok=True)


def _put_aside(output: Path) -> Path:
    return output.with_name(f".replaced-{output.name}")
