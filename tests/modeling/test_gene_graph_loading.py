"""Gene-graph models load with the Auto classes in a fresh process, graph and all: with cellglot, and without it."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from cellglot.modeling.gene_graph import GeneGraphForReconstruction, GeneGraphForSequenceClassification
from cellglot.modeling.gene_graph.configuration_gene_graph import AUTO_MAP
from cellglot.registration import METHODS

from .test_gene_graph import N_GENES, make, some_expression

LOAD = """
import sys
trust = sys.argv[1] == "trust"
if trust:
    sys.modules["cellglot"] = None  # any import of it fails
else:
    import cellglot
import torch
import transformers
from safetensors.torch import load_file, save_file
options = {"trust_remote_code": True} if trust else {}
root, out = sys.argv[2:]
tensors = {}
x = load_file(f"{root}/expression.safetensors")["x"]
for name in ("autoencoder/AutoModel", "autoencoder/AutoModelForPreTraining", "classifier/AutoModel",
             "classifier/AutoModelForSequenceClassification", "autoencoder/AutoModelForSequenceClassification"):
    folder, auto = name.split("/")
    model = getattr(transformers, auto).from_pretrained(f"{root}/{folder}", **options).eval()
    with torch.no_grad():
        output = model(x)
    if name == "autoencoder/AutoModelForSequenceClassification":
        output.logits = output.hidden_states[0]  # its classifier is new
    tensors[name] = next(t for t in (output.get(k) for k in ("logits", "reconstructions", "last_hidden_state"))
                         if t is not None)
    config = transformers.AutoConfig.from_pretrained(f"{root}/{folder}", **options)
    assert type(config).__name__ == "GeneGraphConfig" and config.gene_ids[1] == "gene1"
    if trust:
        assert "transformers_modules" in type(model).__module__, type(model)
        # What was loaded without cellglot is saved as complete as it was.
        if name in ("autoencoder/AutoModelForPreTraining", "classifier/AutoModelForSequenceClassification"):
            model.save_pretrained(f"{out}-again/{folder}")
save_file({k: v.contiguous() for k, v in tensors.items()}, out)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with both kinds of checkpoints, and what they say of some cells."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("saved")
    options: dict[str, Any] = {"smoothing": "both", "gene_ids": [f"gene{i}" for i in range(N_GENES)]}
    autoencoder = make(GeneGraphForReconstruction, **options).eval()
    classifier = make(GeneGraphForSequenceClassification, **options).eval()
    autoencoder.save_pretrained(root / "autoencoder")
    classifier.save_pretrained(root / "classifier")
    x = some_expression()
    save_file({"x": x}, root / "expression.safetensors")
    with torch.no_grad():
        hidden = autoencoder(x).last_hidden_state
        expected = {
            "autoencoder/AutoModel": hidden,
            "autoencoder/AutoModelForSequenceClassification": hidden,
            "autoencoder/AutoModelForPreTraining": autoencoder(x).reconstructions,
            "classifier/AutoModel": classifier.gene_graph(x).last_hidden_state,
            "classifier/AutoModelForSequenceClassification": classifier(x).logits,
        }
    return root, expected


@pytest.mark.slow
@pytest.mark.parametrize("route", ["local", "trust"])
def test_auto_classes_with_and_without_cellglot_give_the_same_outputs(checkpoints, tmp_path, monkeypatch, route):
    from safetensors.torch import load_file

    root, expected = checkpoints
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "load.py").write_text(LOAD)
    sources = [root]
    if route == "trust":
        sources.append(tmp_path / "out0-again")
    for i, source in enumerate(sources):
        if i:
            (source / "expression.safetensors").write_bytes((root / "expression.safetensors").read_bytes())
        command = [sys.executable, "load.py", route, str(source), str(tmp_path / f"out{i}")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = load_file(tmp_path / f"out{i}")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # 1e-6: where in memory the weights lie decides in which order MKL adds
            assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_auto_map_names_what_is_registered():
    method = METHODS["gene_graph"]
    registered = {**method.models, "AutoConfig": method.config}
    assert {auto: path.partition(".")[2] for auto, path in AUTO_MAP.items()} == registered
