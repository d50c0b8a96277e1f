"""Multiome models and their processor load in a fresh process: with cellglot, and without it from the saved code."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from cellglot.modeling.multiome import (
    MultiomeT5Config,
    MultiomeT5EncoderModel,
    MultiomeT5ForConditionalGeneration,
    MultiomeT5ForFeaturePrediction,
)
from cellglot.modeling.multiome.configuration_multiome import AUTO_MAP
from cellglot.registration import METHODS
from cellglot.tokenization.binarized_string import BinarizedStringProcessor

from ..tokenization.test_binarized_string import pair, processor

LOAD = """
import sys
import anndata
trust = sys.argv[1] == "trust"
if trust:
    sys.modules["cellglot"] = None  # any import of it fails
else:
    import cellglot
import torch
import transformers
options = {"trust_remote_code": True} if trust else {}
root, out = sys.argv[2:]
cells = tuple(anndata.read_h5ad(f"{root}/{name}.h5ad") for name in ("rna", "atac"))
tensors = {}
for folder, auto in (("set", "AutoModelForSequenceClassification"), ("t5", "AutoModelForSeq2SeqLM"),
                     ("subword", "AutoModelForSeq2SeqLM"), ("t5", "AutoModel"), ("set", "AutoModel")):
    path = f"{root}/{folder}"
    processor = transformers.AutoProcessor.from_pretrained(path, **options)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(path, **options)
    tensors[f"{folder}/binary"] = torch.from_numpy(extractor(cells)["expression"].toarray())
    batch = processor(cells, task="atac2gex")
    tensors[f"{folder}/ids"], tensors[f"{folder}/labels"] = batch["input_ids"], batch["labels"]
    assert list(processor.cell_strings(cells))[0][0].split()[0] in processor.feature_extractor.genes
    model = getattr(transformers, auto).from_pretrained(path, **options).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        if auto == "AutoModelForSeq2SeqLM":
            tensors[f"{folder}/{auto}"] = model.generate(**inputs)
        else:
            tensors[f"{folder}/{auto}"] = model(**inputs)[0]
    assert type(transformers.AutoConfig.from_pretrained(path, **options)).__name__ == "MultiomeT5Config"
    if trust:
        assert "transformers_modules" in type(model).__module__, type(model)
        assert "transformers_modules" in type(processor).__module__, type(processor)
        # What was loaded without cellglot is saved as complete as it was.
        if auto != "AutoModel":
            model.save_pretrained(f"{out}-again/{folder}")
            processor.save_pretrained(f"{out}-again/{folder}")
from safetensors.torch import save_file
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with a checkpoint of each class and its processor, and what they make of some cells."""
    root, cells, expected = tmp_path_factory.mktemp("saved"), pair(), {}
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    sizes |= {"encoder_position_bias": False, "max_target_length": 9}
    for folder, kind, vocabulary in (
        ("set", MultiomeT5ForFeaturePrediction, "features"),
        ("t5", MultiomeT5ForConditionalGeneration, "features"),
        ("subword", MultiomeT5ForConditionalGeneration, "subword"),
    ):
        ours = processor(cells, vocabulary=vocabulary, encoding="binned")
        torch.manual_seed(0)
        model: Any = kind(MultiomeT5Config(**sizes, **ours.model_fields())).eval()
        model.save_pretrained(root / folder)
        ours.save_pretrained(root / folder)
        batch = ours(cells, task="atac2gex")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected[f"{folder}/ids"], expected[f"{folder}/labels"] = batch["input_ids"], batch["labels"]
        expected[f"{folder}/binary"] = torch.from_numpy(ours.feature_extractor(cells)["expression"].toarray())
        with torch.no_grad():
            if folder != "subword":
                expected[f"{folder}/AutoModel"] = model.encoder(**inputs).last_hidden_state
            if folder == "set":
                expected["set/AutoModelForSequenceClassification"] = model(**inputs).logits
            else:
                expected[f"{folder}/AutoModelForSeq2SeqLM"] = model.generate(**inputs)
    for name, adata in zip(("rna", "atac"), cells, strict=True):
        adata.write_h5ad(root / f"{name}.h5ad")
    return root, expected


@pytest.mark.slow
def test_auto_classes_with_and_without_cellglot_give_the_same_outputs(saved, tmp_path):
    root, expected = saved
    (tmp_path / "load.py").write_text(LOAD)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    again = tmp_path / "trust-again"
    for route, source in (("local", root), ("trust", root), ("trust", again)):
        out = tmp_path / (route if source == root else "third")
        if source == again:
            for name in ("rna", "atac"):
                (again / f"{name}.h5ad").write_bytes((root / f"{name}.h5ad").read_bytes())
        done = subprocess.run(
            [sys.executable, "load.py", route, str(source), str(out)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        found = load_file(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # Other processes may have other numbers of threads, and so other orders of sums.
            assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, r=route, n=name: f"{r}, {n}: {m}")


def test_auto_map_names_what_is_registered():
    classes = (MultiomeT5EncoderModel, MultiomeT5ForConditionalGeneration, MultiomeT5ForFeaturePrediction)
    expected = {of_model._auto_class: of_model.__name__ for of_model in classes}
    assert METHODS["multiome_t5"].models == expected
    expected["AutoConfig"] = "MultiomeT5Config"
    assert {auto: path.partition(".")[2] for auto, path in AUTO_MAP.items()} == expected


def test_the_saved_code_needs_no_compiler(saved):
    """What is copied along is what the processor needs, not the compiled loops of other tokenizers."""
    root, _ = saved
    code = {path.name: path.read_text() for path in (root / "set").glob("*.py")}
    assert "binarized_string.py" in code
    assert not [name for name, text in code.items() if "numba" in text]


def test_processor_survives_saving(tmp_path):
    for options in ({}, {"encoding": "rank"}, {"encoding": "binned", "vocabulary": "subword"}):
        ours = processor(**options)
        ours.encode(pair())  # fills what is computed on first use, which must not be saved
        ours.save_pretrained(tmp_path)
        again = BinarizedStringProcessor.from_pretrained(tmp_path)
        assert again.feature_extractor.to_dict() == ours.feature_extractor.to_dict()
        assert again.encode(pair()).to_dict() == ours.encode(pair()).to_dict()
        assert again.model_fields() == ours.model_fields()
        assert np.array_equal(
            again.decode_matrix(again.encode(pair())["labels"], "accessibility").toarray(), pair()[1].X.toarray() > 0
        )
