"""Every class loads with the Auto classes in a fresh process: with cellglot, and without it from the saved code."""

import subprocess
import sys

import pytest
import torch

from cellglot import GeneformerForMaskedLM
from cellglot.modeling.geneformer.configuration_geneformer import AUTO_MAP
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
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer
options = {"trust_remote_code": True} if trust else {}
folder, out = sys.argv[2:]
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
genes = [f"ENSG{i:011d}.3" for i in range(1, 100)]
ids = tokenizer.encode_expression(range(99), genes)["input_ids"]
tensors = {"ids": torch.tensor(ids)}
with torch.no_grad():
    for name, auto in (("encoder", AutoModel), ("masked_lm", AutoModelForMaskedLM)):
        model = auto.from_pretrained(folder, **options).eval()
        tensors[name] = model(tensors["ids"])[0]
        print(type(model).__module__)
assert type(AutoConfig.from_pretrained(folder, **options)).__name__ == "GeneformerConfig"
if trust:
    assert "transformers_modules" in type(model).__module__, type(model)
    # What was loaded without cellglot is saved as complete as it was.
    model.save_pretrained(out + "-again")
    tokenizer.save_pretrained(out + "-again")
from safetensors.torch import save_file
save_file({k: v.contiguous() for k, v in tensors.items()}, out)
"""


def run(*arguments, cwd, env=None):
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    tokenizer = make_tokenizer(99)
    model = GeneformerForMaskedLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=101)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor(tokenizer.encode_expression(range(99), ensembl(99))["input_ids"])
    with torch.no_grad():
        expected = {"ids": ids, "masked_lm": model(ids).logits, "encoder": model.bert(ids).last_hidden_state}
    return folder, expected


@pytest.mark.slow
def test_auto_classes_with_and_without_cellglot_give_identical_outputs(model_directory, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    folder, expected = model_directory
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "load.py").write_text(LOAD)
    for route, source in (("local", folder), ("trust", folder), ("trust", tmp_path / "trust-again")):
        out = tmp_path / (route if source == folder else "third")
        run("load.py", route, source, out, cwd=tmp_path)
        found = load_file(out)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (route, name)


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
    line = f"{code}\nprint(type(AutoModel.from_pretrained({str(model_directory[0])!r})).__module__)"
    assert run("-c", line, cwd=tmp_path).strip().endswith("cellglot.modeling.geneformer.modeling_geneformer")


def test_importing_cellglot_imports_no_torch(tmp_path):
    code = (
        "import sys, cellglot; assert cellglot.__version__; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run("-c", code, cwd=tmp_path).split() == ["False", "False"]


def test_auto_map_names_what_is_registered():
    registered = {"AutoConfig": METHODS["geneformer"].config, **METHODS["geneformer"].models}
    assert {auto: path.partition(".")[2] for auto, path in AUTO_MAP.items()} == registered


def test_without_cellglot_or_trust_the_tokenizer_s_missing_methods_show(model_directory, tmp_path):
    """The trap the README warns of: a plain tokenizer, or a question, but never a wrong encoding."""
    code = (
        "from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(model_directory[0])!r})\n"
        "print(hasattr(t, 'encode_expression'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert result.returncode != 0 or result.stdout.strip() == "False"
