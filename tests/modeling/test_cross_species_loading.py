"""Cross-species models and SAUCIE load with the Auto classes in a fresh process: with cellglot, and from saved code."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cellglot import (
    CrossSpeciesForMaskedReconstruction,
    CrossSpeciesForTranslation,
    PCAProjectionFeatureExtractor,
    SaucieModel,
)
from cellglot.modeling.baselines import configuration_saucie
from cellglot.modeling.cross_species import configuration_cross_species
from cellglot.registration import METHODS

from ..conftest import synthetic_cells
from .test_cross_species import COMPONENTS, rotation, tiny_batch, tiny_model
from .test_saucie import tiny_saucie

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
batch = load_file(f"{root}/batch")
expected = {
    "reconstruction/AutoModel": "CrossSpeciesModel",
    "reconstruction/AutoModelForPreTraining": "CrossSpeciesForMaskedReconstruction",
    "translation/AutoModel": "CrossSpeciesModel",
    "translation/AutoModelForPreTraining": "CrossSpeciesForTranslation",
    "saucie/AutoModel": "SaucieModel",
}
tensors = {}
for name, class_name in expected.items():
    folder, auto = name.split("/")
    path = f"{root}/{folder}"
    model = getattr(transformers, auto).from_pretrained(path, **options).eval()
    assert type(model).__name__ == class_name, type(model)
    assert type(transformers.AutoConfig.from_pretrained(path, **options)) is type(model.config)
    assert ("transformers_modules" in type(model).__module__) == trust, type(model)
    inputs = {name: batch[name] for name in ("projections", "source")}
    if "Translation" in class_name:
        inputs["target"] = torch.zeros_like(batch["source"])
    with torch.no_grad():
        output = model(**inputs)
    tensors[name] = output.translations if "Translation" in class_name else output.embeddings
    if auto != "AutoModel" or folder == "saucie":
        # What was loaded without cellglot is saved as complete as it was.
        model.save_pretrained(f"{out}-again/{folder}")
extractor = transformers.AutoFeatureExtractor.from_pretrained(f"{root}/translation", **options)
assert type(extractor).__name__ == "PCAProjectionFeatureExtractor"
tensors["projections"] = extractor(batch["counts"].numpy(), "mouse", return_tensors="pt")["projections"]
extractor.save_pretrained(f"{out}-again/translation")
save_file({k: v.contiguous() for k, v in tensors.items()}, out)
save_file(batch, f"{out}-again/batch")
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with one checkpoint of each class, and what they say of some cells."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("saved")
    projections, source, _ = tiny_batch()
    reconstructor = tiny_model("components")
    reconstructor.save_pretrained(root / "reconstruction")
    translator = CrossSpeciesForTranslation.from_pretrained(root / "reconstruction").eval()
    translator.set_aligner("mouse", "human", rotation())
    translator.save_pretrained(root / "translation")
    saucie = tiny_saucie()
    saucie.save_pretrained(root / "saucie")
    cells = {"human": synthetic_cells(53, 47), "mouse": synthetic_cells(43, 41, seed=1)}
    extractor = PCAProjectionFeatureExtractor.fit(cells, n_components=COMPONENTS, min_cells=1, progress=False)
    extractor.save_pretrained(root / "translation")
    counts = torch.from_numpy(cells["mouse"][:, extractor.gene_ids("mouse")].X.toarray())
    save_file({"projections": projections, "source": source, "counts": counts}, root / "batch")
    with torch.no_grad():
        embeddings = reconstructor(projections, source).embeddings
        return root, {
            "reconstruction/AutoModel": embeddings,
            "reconstruction/AutoModelForPreTraining": embeddings,
            "translation/AutoModel": embeddings,
            "translation/AutoModelForPreTraining": translator(
                projections, source, torch.zeros_like(source)
            ).translations,
            "saucie/AutoModel": saucie(projections, source).embeddings,
            "projections": extractor(counts.numpy(), "mouse", return_tensors="pt")["projections"],
        }


@pytest.mark.slow
def test_auto_classes_with_and_without_cellglot_give_identical_outputs(checkpoints, tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    ("model_type", "module"), [("cross_species", configuration_cross_species), ("saucie", configuration_saucie)]
)
def test_auto_map_names_what_is_registered(model_type, module):
    method = METHODS[model_type]
    registered = {auto: name if isinstance(name, str) else name[0] for auto, name in method.models.items()}
    registered["AutoConfig"] = method.config
    assert {auto: path.partition(".")[2] for auto, path in module.AUTO_MAP.items()} == registered


def test_the_auto_class_of_pretraining_loads_the_model_that_was_saved(checkpoints):
    from transformers import AutoModelForPreTraining

    root, _ = checkpoints
    assert configuration_cross_species.TRANSLATION_CLASS.endswith(
        METHODS["cross_species"].models["AutoModelForPreTraining"][1]
    )
    assert type(AutoModelForPreTraining.from_pretrained(root / "translation")) is CrossSpeciesForTranslation
    reconstruction = AutoModelForPreTraining.from_pretrained(root / "reconstruction")
    assert type(reconstruction) is CrossSpeciesForMaskedReconstruction
    assert SaucieModel.from_pretrained(root / "saucie").config.auto_map == configuration_saucie.AUTO_MAP


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import cellglot; from transformers import AutoFeatureExtractor, AutoModelForPreTraining",
        "from transformers import AutoFeatureExtractor, AutoModelForPreTraining; import cellglot",
        "from cellglot import translate_cells; from transformers import pipeline, AutoFeatureExtractor, "
        "AutoModelForPreTraining",
    ],
)
def test_registration_works_in_any_order_of_imports(checkpoints, code, tmp_path):
    root, _ = checkpoints
    lines = f"path = {str(root / 'translation')!r}\n{code}\n" + "\n".join(
        f"print(type({auto}.from_pretrained(path)).__module__)"
        for auto in ("AutoFeatureExtractor", "AutoModelForPreTraining")
    )
    result = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == [
        "cellglot.tokenization.pca_projection",
        "cellglot.modeling.cross_species.modeling_cross_species",
    ], result.stderr
