"""Checkpoints of a training run: safetensors and JSON only, complete or absent.

A checkpoint is written to a temporary folder and renamed when all of it is on disk, so a process killed at any moment
leaves the previous ones intact. It holds all that the next step depends on: weights, optimizer, step, loss scaler and
the random state of each process (data order and masking depend on seed and epoch alone). Tensors are whole, whatever
the strategy, so another number of processes or another strategy can go on from it.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from .loop_config import RunError
from .strategy import OptimizerState, Strategy

_WEIGHTS = "model.safetensors"
_NAME = re.compile(r"^step-(\d{8})$")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.match(path.name))


def save_checkpoint(accelerator: Any, folder: Path, strategy: Strategy, state: dict[str, Any], keep_last: int) -> Path:
    """Writes checkpoint `state["step"]` from all processes and removes all but the last `keep_last`."""
    path = checkpoint_path(folder, state["step"])
    partial = folder / f".partial-{path.name}"
    # All processes take part in putting sharded tensors together.
    model, optimizer_state = strategy.whole_model(), strategy.optimizer_state()
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _save_weights(model, partial / _WEIGHTS)
        tensors = {f"{key}.{name}": x for name, values in optimizer_state.items() for key, x in values.items()}
        save_file(tensors, str(partial / "optimizer.safetensors"))
        if accelerator.scaler is not None:
            state = {**state, "scaler": accelerator.scaler.state_dict()}
        (partial / "state.json").write_text(json.dumps({**state, "n_processes": accelerator.num_processes}, indent=2))
    accelerator.wait_for_everyone()
    save_file(_random_state(), str(partial / _random_state_name(accelerator.process_index)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _sync_to_disk(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        for old in list_checkpoints(folder)[:-keep_last]:
            # Renamed first: a half-removed checkpoint must not look like a whole one.
            doomed = old.with_name(f".removed-{old.name}")
            os.rename(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    accelerator.wait_for_everyone()
    return path


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Puts a checkpoint's weights into the bare model, before it is shared out among processes."""
    if _quantized(model):
        unexpected = model.load_state_dict(load_file(str(path / _WEIGHTS)), strict=False).unexpected_keys
        assert not unexpected, unexpected
    else:
        load_model(model, str(path / _WEIGHTS))


def load_state(accelerator: Any, path: Path, strategy: Strategy) -> dict[str, Any]:
    """Restores optimizer, scaler and random state in place; returns the `state` that was saved.

    With another number of processes than wrote it, the random states are left as they are (dropout then differs).
    """
    state = json.loads((path / "state.json").read_text())
    optimizer_state: OptimizerState = {}
    for label, tensor in load_file(str(path / "optimizer.safetensors")).items():
        key, _, name = label.partition(".")
        optimizer_state.setdefault(name, {})[key] = tensor
    if not optimizer_state.keys() <= set(strategy.names):
        raise RunError(
            f"The optimizer's state in {path} names other weights than this model trains (such as "
            f"{sorted(optimizer_state.keys() - set(strategy.names))[0]!r}): it is of another model, or of an "
            "earlier version. Start again with --overwrite or another --output."
        )
    strategy.load_optimizer_state(optimizer_state)
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    if state["n_processes"] == accelerator.num_processes:
        _restore_random_state(load_file(str(path / _random_state_name(accelerator.process_index))))
    return state


def remove_partial(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in [*folder.glob(".partial-*"), *folder.glob(".removed-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _quantized(model: torch.nn.Module) -> bool:
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def _save_weights(model: torch.nn.Module, path: Path) -> None:
    if _quantized(model):
        # Quantized weights do not change and are loaded with the model: only what is trained needs to be kept.
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, str(path))
    else:
        save_model(model, str(path))


def _random_state_name(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync_to_disk(folder: Path) -> None:
    """Asks the system to put a folder's files on disk before the rename makes them count (power loss)."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
