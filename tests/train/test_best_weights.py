"""Early stopping: the best weights come back, and a resumed run stops where an uninterrupted one does."""

import json
import signal

import numpy as np
import pytest
import torch

from cellglot.train.loop import LoopConfig, make_accelerator, train
from cellglot.train.output_folder import prepare_output

# Validation losses at steps 1, 2, ...: the best is at step 4, and step 7 is the third in a row without a better one.
LOSSES = (5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.2, 1.0, 0.5)


class Drifting(torch.nn.Module):
    """Its weight moves at every step, so that each step's weights can be told apart."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 2))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x, labels):
        return type("Output", (), {"loss": (self.weight * x).mean()})


def collate(rows, keys):
    return {"x": torch.ones(len(rows), 2), "labels": torch.zeros(len(rows), dtype=torch.long)}


def run(tmp_path, patience, interrupt_at=None, **options):
    config = LoopConfig(
        output=str(tmp_path), max_steps=9, batch_size=2, learning_rate=0.1, schedule="constant", warmup_steps=0,
        eval_every=1, save_every=2, patience=patience, cpu_threads=1, **options,
    )  # fmt: skip
    accelerator = make_accelerator(config)
    prepare_output(config, accelerator)
    model, seen = Drifting(), {}

    def validate(bare):
        # One validation a step
        step = len(seen) + first
        seen[step] = bare.weight.detach().clone()
        if step == interrupt_at:
            signal.raise_signal(signal.SIGTERM)
        return {"validation_loss": LOSSES[step - 1]}

    checkpoints = sorted(tmp_path.glob("checkpoints/step-*"))
    first = 1 + (json.loads((checkpoints[-1] / "state.json").read_text())["step"] if checkpoints else 0)
    result = train(model, [{"x": 0}] * 4, np.ones(4), collate, config, accelerator, validate=validate)
    return model, result, seen


def test_training_stops_after_patience_and_the_best_weights_come_back(tmp_path):
    model, result, seen = run(tmp_path, patience=3)
    assert (result.step, result.best_step) == (7, 4)
    assert result.metrics == {"validation_loss": 3.0}
    assert torch.equal(model.weight, seen[4])
    assert not torch.equal(seen[7], seen[4])


def test_with_enough_patience_the_last_improvement_counts(tmp_path):
    model, result, seen = run(tmp_path, patience=4)
    assert (result.step, result.best_step) == (9, 9)
    assert torch.equal(model.weight, seen[9])


@pytest.mark.parametrize("interrupt_at", [3, 5, 6])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(tmp_path, interrupt_at):
    whole, expected, _ = run(tmp_path / "whole", patience=3)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", patience=3, interrupt_at=interrupt_at)
    model, result, _ = run(tmp_path / "cut", patience=3, resume=True)
    assert (result.step, result.best_step, result.metrics) == (expected.step, expected.best_step, expected.metrics)
    assert torch.equal(model.weight, whole.weight)


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    whole, expected, _ = run(tmp_path, patience=3)
    model, result, seen = run(tmp_path, patience=3, resume=True)
    assert not seen
    assert (result.step, result.metrics) == (expected.step, expected.metrics)
    assert torch.equal(model.weight, whole.weight)


def test_patience_without_validations_is_refused():
    with pytest.raises(ValueError, match="set eval_every"):
        LoopConfig(patience=2)


def test_a_loss_that_is_no_number_is_no_improvement(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LOSSES", (3.0, float("nan"), 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0))
    model, result, seen = run(tmp_path, patience=3)
    assert (result.step, result.best_step) == (4, 1)
    assert torch.equal(model.weight, seen[1])


def test_without_any_number_there_is_nothing_to_keep(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LOSSES", (float("nan"),) * 9)
    with pytest.raises(FloatingPointError, match="finite"):
        run(tmp_path, patience=3)
