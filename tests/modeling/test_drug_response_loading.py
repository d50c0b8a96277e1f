"""Drug response models, CPA and cVAE load with Auto classes in a fresh process: with cellglot, and from saved code."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cellglot import (
    CpaConfig,
    CpaModel,
    CvaeConfig,
    CvaeModel,
    DrugResponseForConditionalGeneration,
    DrugResponseForPreTraining,
    ExpressionFeatureExtractor,
)
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
batch, tensors = load_file(f"{root}/batch"), {}
expected = {
    "pretrained/AutoModel": "DrugResponseModel",
    "pretrained/AutoModelForPreTraining": "DrugResponseForPreTraining",
    "generation/AutoModel": "DrugResponseModel",
    "generation/AutoModelForPreTraining": "DrugResponseForConditionalGeneration",
    "cpa/AutoModel": "CpaModel",
    "cvae/AutoModel": "CvaeModel",
}
for again in ("", "_again") if trust else ("",):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(f"{root}/generation{again}", **options)
    assert type(extractor).__name__ == "ExpressionFeatureExtractor"
    expression = extractor(batch["values"].numpy(), return_tensors="pt")["expression"]
    asked = extractor.conditions(["urea"] * 3, ["A549"] * 3, 300, "nM")
    conditions = {name: torch.from_numpy(values) for name, values in asked.items()}
    tensors |= {f"{name}{again}": values for name, values in {"expression": expression, **conditions}.items()}
    for name, class_name in expected.items():
        folder, auto = name.split("/")
        path = f"{root}/{folder}{again}"
        model = getattr(transformers, auto).from_pretrained(path, **options).eval()
        assert type(model).__name__ == class_name, type(model)
        assert type(transformers.AutoConfig.from_pretrained(path, **options)) is type(model.config)
        assert ("transformers_modules" in type(model).__module__) == trust, type(model)
        with torch.no_grad():
            if "Generation" in class_name or folder in ("cpa", "cvae"):
                found = model(expression=expression, **conditions).predictions
            else:
                found = model(expression=expression).embeddings
        tensors[name + again] = found.contiguous()
        # What was loaded without cellglot is saved as complete as it was, and loads again.
        if folder in ("cpa", "cvae") or auto != "AutoModel":
            model.save_pretrained(f"{root}/{folder}_again")
    extractor.save_pretrained(f"{root}/generation_again")
save_file(tensors, out)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with one checkpoint of each class, and what they say of some profiles."""
    root = tmp_path_factory.mktemp("saved")
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data)
    known = {"n_drugs": len(extractor.drugs), "n_cell_lines": len(extractor.cell_lines)}
    sizes: dict[str, Any] = {"n_genes": GENES, **known}
    torch.manual_seed(0)
    pretrained = DrugResponseForPreTraining(tiny_config(**sizes)).eval()
    pretrained.save_pretrained(root / "pretrained")
    generation = DrugResponseForConditionalGeneration(tiny_config(**sizes)).eval()
    generation.save_pretrained(root / "generation")
    extractor.save_pretrained(root / "generation")
    cpa, cvae = CpaModel(CpaConfig(**sizes)).eval(), CvaeModel(CvaeConfig(**sizes)).eval()
    cpa.save_pretrained(root / "cpa")
    cvae.save_pretrained(root / "cvae")
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
            "cpa/AutoModel": cpa(expression, **conditions).predictions,
            "cvae/AutoModel": cvae(expression, **conditions).predictions,
        }


@pytest.mark.slow
def test_auto_classes_with_and_without_cellglot_give_equal_outputs(checkpoints, tmp_path, monkeypatch):
    root, expected = checkpoints
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "load.py").write_text(LOAD)
    for route, loads in (("local", ("",)), ("trust", ("", "_again"))):
        out = tmp_path / route
        command = [sys.executable, "load.py", route, str(root), str(out)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        # Other processes may have other numbers of threads, and so other orders of sums.
        wanted = {f"{name}{again}": tensor for again in loads for name, tensor in expected.items()}
        torch.testing.assert_close(load_file(out), wanted, rtol=1e-4, atol=1e-4, msg=lambda m, r=route: f"{r}: {m}")


def test_saved_configurations_map_every_auto_class_that_is_registered():
    mapped = configuration_drug_response.AUTO_MAP
    assert set(mapped) - {"AutoConfig"} == set(METHODS["drug_response"].models)
    names = METHODS["drug_response"].models["AutoModelForPreTraining"]
    classes = (mapped["AutoModelForPreTraining"], configuration_drug_response.GENERATION_CLASS)
    assert tuple(path.split(".")[1] for path in classes) == names
