"""Every class loads with the Auto classes in a fresh process: with cellglot, and without it from the saved code."""

import subprocess
import sys

import pytest
import torch

from cellglot import (
    GeneformerForMaskedLM,
    GeneformerForMultiTaskSequenceClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
)
from cellglot.modeling.geneformer.configuration_geneformer import AUTO_MAP, MULTI_TASK_CLASS
from cellglot.registration import METHODS

from ..conftest import ensembl, make_tokenizer
from .test_geneformer import tiny_config

LOAD = """
import sys
trust = sys.argv[1] == "trust"
if trust:
    sys.modules["cellglot"] = None  # any import of it fails
else:
    import cellglot
import torch
import transformers
options = {"trust_remote_code": True} if trust else {}
root, out = sys.argv[2:]
tensors = {}
# folder of a checkpoint / Auto class that loads it
for name in ("masked_lm/AutoModel", "masked_lm/AutoModelForMaskedLM", "cell/AutoModelForSequenceClassification",
             "gene/AutoModelForTokenClassification", "multi/AutoModelForSequenceClassification"):
    folder, auto = name.split("/")
    folder = f"{root}/{folder}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    genes = [f"ENSG{i:011d}.3" for i in range(1, 100)]
    tensors["ids"] = torch.tensor(tokenizer.encode_expression(range(99), genes)["input_ids"])
    model = getattr(transformers, auto).from_pretrained(folder, **options).eval()
    with torch.no_grad():
        found = model(tensors["ids"])[0]
    tensors[name] = torch.cat(found, dim=-1) if isinstance(found, tuple) else found
    assert type(transformers.AutoConfig.from_pretrained(folder, **options)).__name__ == "GeneformerConfig"
    if trust:
        assert "transformers_modules" in type(model).__module__, type(model)
    if trust and auto != "AutoModel":
        # What was loaded without cellglot is saved as complete as it was.
        again = f"{out}-again/{name.split('/')[0]}"
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
from safetensors.torch import save_file
save_file({k: v.contiguous() for k, v in tensors.items()}, out)
"""


def run(*arguments, cwd, env=None):
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with one checkpoint of each class, and what they say of one cell."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(99)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 101}
    ids = torch.tensor(tokenizer.encode_expression(range(99), ensembl(99))["input_ids"])
    models = {
        "masked_lm/AutoModelForMaskedLM": GeneformerForMaskedLM(tiny_config(**sizes)),
        "cell/AutoModelForSequenceClassification": GeneformerForSequenceClassification(
            tiny_config(num_labels=3, **sizes)
        ),
        "gene/AutoModelForTokenClassification": GeneformerForTokenClassification(tiny_config(num_labels=3, **sizes)),
        "multi/AutoModelForSequenceClassification": GeneformerForMultiTaskSequenceClassification(
            tiny_config(tasks={"cell type": ["B", "T"], "a.b": ["x", "y", "z"]}, classifier_pooling="mean", **sizes)
        ),
    }
    expected = {"ids": ids}
    with torch.no_grad():
        for name, model in models.items():
            model.eval().save_pretrained(root / name.split("/")[0])
            tokenizer.save_pretrained(root / name.split("/")[0])
            logits = model(ids).logits
            expected[name] = torch.cat(logits, dim=-1) if isinstance(logits, tuple) else logits
        expected["masked_lm/AutoModel"] = models["masked_lm/AutoModelForMaskedLM"].bert(ids).last_hidden_state
    return root, expected


@pytest.fixture(scope="module")
def model_directory(checkpoints):
    return checkpoints[0] / "masked_lm"


@pytest.mark.slow
def test_auto_classes_with_and_without_cellglot_give_the_same_outputs(checkpoints, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    root, expected = checkpoints
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "load.py").write_text(LOAD)
    for route, source in (("local", root), ("trust", root), ("trust", tmp_path / "trust-again")):
        out = tmp_path / (route if source == root else "third")
        run("load.py", route, source, out, cwd=tmp_path)
        found = load_file(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # Other processes may have other numbers of threads, and so other orders of sums.
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, r=route, n=name: f"{r}, {n}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import cellglot; from transformers import AutoModel",
        "from transformers import AutoModel, AutoTokenizer, AutoConfig; import cellglot",
        "import cellglot; import transformers.models.bert.modeling_bert; from transformers import AutoModel",
        "import cellglot; from transformers import Trainer, pipeline, AutoModel",
        "from cellglot import GeneformerModel; from transformers import AutoModel",
    ],
)
def test_registration_works_in_any_order_of_imports(model_directory, code, tmp_path):
    line = f"{code}\nprint(type(AutoModel.from_pretrained({str(model_directory)!r})).__module__)"
    assert run("-c", line, cwd=tmp_path).strip().endswith("cellglot.modeling.geneformer.modeling_geneformer")


def test_importing_cellglot_imports_no_torch(tmp_path):
    code = (
        "import sys, cellglot; assert cellglot.__version__; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run("-c", code, cwd=tmp_path).split() == ["False", "False"]


def test_auto_map_names_what_is_registered():
    models = METHODS["geneformer"].models
    registered = {auto: name if isinstance(name, str) else name[0] for auto, name in models.items()}
    registered["AutoConfig"] = METHODS["geneformer"].config
    assert {auto: path.partition(".")[2] for auto, path in AUTO_MAP.items()} == registered
    assert MULTI_TASK_CLASS.partition(".")[2] == models["AutoModelForSequenceClassification"][1]


def test_without_cellglot_or_trust_the_tokenizer_s_missing_methods_show(model_directory, tmp_path):
    """The trap the README warns of: a plain tokenizer, or a question, but never a wrong encoding."""
    code = (
        "from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(model_directory)!r})\n"
        "print(hasattr(t, 'encode_expression'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert result.returncode != 0 or result.stdout.strip() == "False"
