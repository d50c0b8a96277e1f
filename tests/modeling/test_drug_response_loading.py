"""Drug response models load with the Auto classes in a fresh process: with cellglot, and from saved code."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cellglot import DrugResponseForConditionalGeneration, DrugResponseForPreTraining, ExpressionFeatureExtractor
from cellglot.modeling.drug_response import configuration_drug_response
from cellglot.registration import METHODS

from ..drug_response.responses import GENES, responses
from .test_drug_response import tiny_config

LOAD = """
import sys
trust = sys.argv[1] == "trust"
if trust:
    sys.modules["cellglot"] = None  # any import of it fails
    sys.modules["rdkit"] = None  # nor does loading need it
else:
    import cellglot
import transformers
import torch
from safetensors.torch import load_file, save_file
options = {"trust_remote_code": True} if trust else {}
root, out = sys.argv[2:]
batch = load_file(f"{root}/batch")
expected = {
    "pretrained/AutoModel": "DrugResponseModel",
    "pretrained/AutoModelForPreTraining": "DrugResponseForPreTraining",
    "generation/AutoModel": "DrugResponseModel",
    "generation/AutoModelForPreTraining": "DrugResponseForConditionalGeneration",
}
extractor = transformers.AutoFeatureExtractor.from_pretrained(f"{root}/generation", **options)
assert type(extractor).__name__ == "ExpressionFeatureExtractor"
expression = extractor(batch["values"].numpy(), return_tensors="pt")["expression"]
asked = extractor.conditions(["urea"] * 3, ["A549"] * 3, 300, "nM")
conditions = {name: torch.from_numpy(values) for name, values in asked.items()}
tensors = {"expression": expression, **conditions}
for name, class_name in expected.items():
    folder, auto = name.split("/")
    path = f"{root}/{folder}"
    model = getattr(transformers, auto).from_pretrained(path, **options).eval()
    assert type(model).__name__ == class_name, type(model)
    assert type(transformers.AutoConfig.from_pretrained(path, **options)) is type(model.config)
    assert ("transformers_modules" in type(model).__module__) == trust, type(model)
    with torch.no_grad():
        if "Generation" in class_name:
            tensors[name] = model(expression=expression, **conditions).predictions
        else:
            tensors[name] = model(expression=expression).embeddings
    if auto != "AutoModel":
        # What was loaded without cellglot is saved as complete as it was.
        model.save_pretrained(f"{out}-again/{folder}")
extractor.save_pretrained(f"{out}-again/generation")
save_file({k: v.contiguous() for k, v in tensors.items()}, out)
save_file(batch, f"{out}-again/batch")
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with one checkpoint of each class, and what they say of some profiles."""
    root = tmp_path_factory.mktemp("saved")
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data)
    sizes = {"n_genes": GENES, "n_drugs": len(extractor.drugs), "n_cell_lines": len(extractor.cell_lines)}
    torch.manual_seed(0)
    pretrained = DrugResponseForPreTraining(tiny_config(**sizes)).eval()
    pretrained.save_pretrained(root / "pretrained")
    generation = DrugResponseForConditionalGeneration(tiny_config(**sizes)).eval()
    generation.save_pretrained(root / "generation")
    extractor.save_pretrained(root / "generation")
    values = torch.from_numpy(data.expression[:3])
    save_file({"values": values}, root / "batch")
    expression = extractor(values.numpy(), return_tensors="pt")["expression"]
    asked = extractor.conditions(["urea"] * 3, ["A549"] * 3, 300, "nM")
    conditions = {name: torch.from_numpy(values) for name, values in asked.items()}
    with torch.no_grad():
        return root, {
            "expression": expression,
            **conditions,
            "pretrained/AutoModel": pretrained(expression).embeddings,
            "pretrained/AutoModelForPreTraining": pretrained(expression).embeddings,
            "generation/AutoModel": generation.model(expression).embeddings,
            "generation/AutoModelForPreTraining": generation(expression=expression, **conditions).predictions,
        }


@pytest.mark.slow
def test_auto_classes_with_and_without_cellglot_give_equal_outputs(checkpoints, tmp_path, monkeypatch):
    root, expected = checkpoints
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "load.py").write_text(LOAD)
    for route, source in (("local", root), ("trust", root), ("trust", tmp_path / "trust-again")):
        out = tmp_path / (route if source == root else "third")
        command = [sys.executable, "load.py", route, str(source), str(out)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found = load_file(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # Other processes may have other numbers of threads, and so other orders of sums.
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, r=route, n=name: f"{r}, {n}: {m}"
            )


def test_saved_configurations_map_every_auto_class_that_is_registered():
    mapped = configuration_drug_response.AUTO_MAP
    assert set(mapped) - {"AutoConfig"} == set(METHODS["drug_response"].models)
    names = METHODS["drug_response"].models["AutoModelForPreTraining"]
    classes = (mapped["AutoModelForPreTraining"], configuration_drug_response.GENERATION_CLASS)
    assert tuple(path.split(".")[1] for path in classes) == names
