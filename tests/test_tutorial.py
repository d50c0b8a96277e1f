"""The tutorial's blocks run as they stand, one after the other, on the real PBMCs; only training is cut short."""

import re
import shlex
import subprocess
import sys

import matplotlib
import pytest

from .conftest import ROOT

BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
# What makes each command a matter of seconds
SHORT = {
    "pretrain.py": "--max_steps 4 --warmup_steps 0 --report false --hidden_size 16 --num_hidden_layers 2",
    "finetune.py": "--epochs 0.1 --baselines false --cpu_threads 1",
    "cellglot.perturb": "--quiet",
}


def run_command(block):
    block = block.replace("\\\n", " ").removeprefix("accelerate launch ").removeprefix("python ")
    words = [sys.executable, *shlex.split(block)]
    words = [str(ROOT / word) if word.startswith("train/") else word for word in words]
    short = next(options for name, options in SHORT.items() if any(word.endswith(name) for word in words))
    result = subprocess.run([*words, *shlex.split(short)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict = {}
    for language, block in BLOCKS:
        if language == "bash":
            run_command(block.strip())
        else:
            # Two cells do for the perturbation.
            exec(compile(block.replace("max_cells=20", "max_cells=2"), "tutorial.md", "exec"), names)
    assert len(BLOCKS) >= 8
    assert names["adata"].obsm["X_geneformer"].shape == (700, 16)
    assert names["adata"].obs["cell_type_predicted"].notna().all()
    assert set(names["statistics"]["state"]) == {"Dendritic", "CD19+ B"}
    for figure in ("umap.png", "shift_ranking.png", "volcano.png", "runs/deletions-2/volcano.png"):
        assert (tmp_path / figure).stat().st_size > 5000
