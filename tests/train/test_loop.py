"""The loop: accumulation and processes change nothing, a killed run goes on to the same losses, and it ends cleanly.

Runs are real ones of train/pretrain.py on synthetic cells, in processes of their own, because that is what gets killed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from cellglot.train import checkpoint
from cellglot.train.loop import (
    LoopConfig,
    learning_rate_at,
    make_accelerator,
    mean_loss,
    train,
)
from cellglot.train.metrics_log import read_metrics
from cellglot.train.output_folder import prepare_output

from ..conftest import ROOT, synthetic_cells

PRETRAIN = str(ROOT / "train" / "pretrain.py")
TINY = {
    "model": "small",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "batch_size": 13,
    "max_steps": 30,
    "save_every": 7,
    "eval_every": 10,
    "log_every": 1,
    "report": "false",
    "cpu_threads": 1,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(2):
        synthetic_cells(67, 31, seed=i).write_h5ad(folder / f"part{i}.h5ad")
    return folder


def command(corpus, output, launcher=(), **options):
    words = [word for name, value in {**TINY, **options}.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *launcher, PRETRAIN, "--data", str(corpus), "--output", str(output), *words]


def environment():
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run(corpus, output, launcher=(), expect=0, **options):
    words = command(corpus, output, launcher, **options)
    result = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert result.returncode == expect, result.stderr[-3000:]
    return result


def losses(output):
    return {line["step"]: line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line}


def start_and_signal_at(corpus, output, step, number, **options):
    """Starts a run and sends it a signal as soon as its log reaches `step`; returns the finished process."""
    process = subprocess.Popen(
        command(corpus, output, **options), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while max(losses(output), default=0) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    # Dropout, so that the random state matters.
    run(corpus, output, dropout=0.1)
    return output


def final_weights(output):
    return load_file(output / "model" / "model.safetensors")


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_with_the_same_losses(corpus, uninterrupted, tmp_path):
    output = tmp_path / "run"
    kills = 0
    for step in (3, 12, 23):
        resume = {"resume": "true"} if (output / "run.json").exists() else {}
        process = start_and_signal_at(corpus, output, step, signal.SIGKILL, dropout=0.1, **resume)
        kills += process.returncode == -signal.SIGKILL
        assert not (output / "model").exists()
    assert kills == 3
    result = run(corpus, output, dropout=0.1, resume="true")
    assert "Resuming at step" in result.stdout
    # To the last bit, training and validation alike.
    assert read_metrics(output / "metrics.jsonl") == read_metrics(uninterrupted / "metrics.jsonl")
    ours, expected = final_weights(output), final_weights(uninterrupted)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert [p.name for p in checkpoint.list_checkpoints(output / "checkpoints")] == ["step-00000028", "step-00000030"]
    assert not list((output / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on(corpus, uninterrupted, tmp_path, number):
    output = tmp_path / "run"
    process = start_and_signal_at(corpus, output, 4, number, dropout=0.1)
    assert process.returncode == 130
    (saved,) = checkpoint.list_checkpoints(output / "checkpoints")[-1:]
    assert json.loads((saved / "state.json").read_text())["step"] >= 4
    run(corpus, output, dropout=0.1, resume="true")
    assert losses(output) == losses(uninterrupted)


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_whole_step(corpus, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    run(corpus, whole, max_steps=10)
    run(corpus, pieces, max_steps=10, max_tokens=40, num_workers=2)
    np.testing.assert_allclose(list(losses(pieces).values()), list(losses(whole).values()), rtol=1e-4)


@pytest.mark.slow
def test_bf16_and_recomputed_activations_change_the_losses_little(corpus, tmp_path):
    run(corpus, tmp_path / "run", mixed_precision="bf16", gradient_checkpointing="true", dropout=0.0, max_steps=10)
    run(corpus, tmp_path / "plain", dropout=0.0, max_steps=10)
    a, b = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert a != b
    # bfloat16 keeps 8 bits: 0.4% a product
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=0.01)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses_and_resumes(corpus, tmp_path):
    options = {"dropout": 0.0, "max_steps": 6, "save_every": 3, "eval_every": 0}
    run(corpus, tmp_path / "plain", **options)
    compiled = tmp_path / "run"
    run(corpus, compiled, compile="true", **options)
    expected = losses(compiled)
    # 1e-5: fused kernels round elsewhere
    np.testing.assert_allclose(list(expected.values()), list(losses(tmp_path / "plain").values()), rtol=1e-5)
    shutil.rmtree(compiled / "checkpoints" / "step-00000006")
    run(corpus, compiled, compile="true", resume="true", **options)
    assert losses(compiled) == expected


def test_compile_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        fit_line(tmp_path, compile=True)


@pytest.mark.slow
def test_a_finished_or_foreign_folder_is_not_touched(corpus, uninterrupted, tmp_path):
    before = sorted(p.stat().st_mtime_ns for p in uninterrupted.rglob("*"))
    result = run(corpus, uninterrupted, expect=1)
    assert "holds an earlier run. Pass --resume to go on with it, --overwrite to start anew" in result.stderr
    assert sorted(p.stat().st_mtime_ns for p in uninterrupted.rglob("*")) == before
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    for options in ({}, {"overwrite": "true"}):
        assert "files that are no run" in run(corpus, tmp_path, expect=1, **options).stderr
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.slow
def test_resuming_with_other_options_is_refused(corpus, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    result = run(corpus, output, expect=1, resume="true", dropout=0.1, max_steps=40, learning_rate=0.5)
    assert "other options: max_steps was 30 and is 40, learning_rate was 0.005 and is 0.5" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" not in run(corpus, output, expect=1, resume="true", dropout=0.1, hidden_size=32).stderr
    # The record still says how the checkpoint came to be.
    assert json.loads((output / "run.json").read_text())["config"]["learning_rate"] == 0.005
    result = run(corpus, output, expect=1, resume="true", validation_fraction=0.3)
    assert "was made from other data or options" in result.stderr


@pytest.mark.slow
def test_optimizer_state_of_other_weights_is_refused(corpus, uninterrupted, tmp_path):
    # Earlier versions numbered the weights.
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    shutil.rmtree(output / "model")
    for path in checkpoint.list_checkpoints(output / "checkpoints"):
        state = load_file(path / "optimizer.safetensors")
        numbered = {f"{i}.{label.partition('.')[0]}": x for i, (label, x) in enumerate(state.items())}
        save_file(numbered, path / "optimizer.safetensors")
    result = run(corpus, output, expect=1, resume="true", dropout=0.1)
    assert "it is of another model, or of an earlier version. Start again with --overwrite" in result.stderr
    assert "Traceback" not in result.stderr


# ---- in this process: arithmetic and corner cases


class Line(torch.nn.Module):
    """y = w x; loss the mean squared error."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1, 3))

    def forward(self, x, y):
        class Output:
            loss = ((x @ self.w.T - y) ** 2).mean()

        return Output


def line_data(n=29):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    return [{"x": row, "y": row @ np.array([1, -2, 3], dtype=np.float32)} for row in x]


def collate_line(rows, keys):
    assert len(rows) == len(keys)
    return {"x": torch.tensor(np.stack([r["x"] for r in rows])), "y": torch.tensor([[r["y"]] for r in rows])}


def line_config(tmp_path, **options):
    defaults = {"batch_size": 7, "warmup_steps": 0, "learning_rate": 0.05, "max_tokens": 100, "max_steps": 40}
    return LoopConfig(output=str(tmp_path), **{**defaults, **options})


def fit_line(tmp_path, **options):
    config = line_config(tmp_path, **options)
    torch.manual_seed(0)
    model, data = Line(), line_data()
    accelerator = Accelerator(cpu=True)
    result = train(model, data, np.ones(len(data)), collate_line, config, accelerator)
    return model, result


def test_any_model_with_a_loss_trains(tmp_path):
    model, result = fit_line(tmp_path, max_steps=200)
    assert result.step == 200
    torch.testing.assert_close(model.w.detach(), torch.tensor([[1.0, -2.0, 3.0]]), atol=0.05, rtol=0)


def test_steps_equal_plain_torch(tmp_path):
    """The loop against ten lines of PyTorch: the same batches, AdamW, clipping and schedule."""
    from cellglot.train.batches import EpochPlan

    model, _ = fit_line(tmp_path, max_steps=12, max_grad_norm=0.5, max_tokens=3)
    reference, data = Line(), line_data()
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.001)
    config = line_config(tmp_path, max_steps=12)
    for step in range(12):
        epoch, position = divmod(step, 5)
        order = EpochPlan(np.ones(29), batch_size=7, max_tokens=100, epoch=epoch).order
        rows = [data[i] for i in order[position * 7 : position * 7 + 7]]
        reference(**collate_line(rows, rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, 12, config)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.w, reference.w, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate(schedule, tmp_path):
    config = line_config(tmp_path, schedule=schedule, warmup_steps=10, learning_rate=2.0)
    rates = np.array([learning_rate_at(step, 100, config) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10 * 2)
    assert rates[10] == 2.0
    assert (np.diff(rates[10:]) <= 0).all()
    assert rates[-1] == 2.0 if schedule == "constant" else 0 < rates[-1] < 0.05
    share = line_config(tmp_path, schedule=schedule, warmup_steps=0.1, learning_rate=2.0)
    np.testing.assert_allclose([learning_rate_at(step, 100, share) for step in range(100)], rates)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"of step \d+ is not finite .*Lower learning_rate"):
        fit_line(tmp_path, learning_rate=1e30, max_grad_norm=1e30, save_every=1)
    for path in checkpoint.list_checkpoints(tmp_path / "checkpoints"):
        assert all(torch.isfinite(x).all() for x in load_file(path / "model.safetensors").values())


def test_last_n_checkpoints_are_kept(tmp_path):
    fit_line(tmp_path, max_steps=20, save_every=4, keep_last=3)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000012", "step-00000016", "step-00000020"]
    suffixes = {p.suffix for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    fit_line(tmp_path, max_steps=4, save_every=4)
    (kept,) = checkpoint.list_checkpoints(tmp_path / "checkpoints")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fit_line(tmp_path, max_steps=4, save_every=2)
    assert checkpoint.list_checkpoints(tmp_path / "checkpoints") == [kept]
    config = line_config(tmp_path, resume=True)
    (tmp_path / "run.json").write_text("{}")
    prepare_output(config, Accelerator(cpu=True))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [kept.name]


def test_mean_loss_is_over_items_not_batches():
    data, model = line_data(), Line()
    expected = model(**collate_line(data, data)).loss.item()
    for tokens in (1, 7, 1000):
        found = mean_loss(model, data, np.ones(29), collate_line, Accelerator(cpu=True), max_tokens=tokens)
        assert found == pytest.approx(expected, rel=1e-6)


def test_trackers(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown tracker 'tensorbored'; accelerate knows .*tensorboard"):
        make_accelerator(line_config(tmp_path, trackers=["tensorbored"]))
    config = line_config(tmp_path, trackers=["tensorboard"], max_steps=5, log_every=5)
    data = line_data()
    train(Line(), data, np.ones(len(data)), collate_line, config, make_accelerator(config))
    assert list(Path(tmp_path).rglob("events.out.tfevents*"))
