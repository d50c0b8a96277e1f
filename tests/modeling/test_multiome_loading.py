"""Multiome models and their processor load in a fresh process: with cellglot, and without it from the saved code."""

import functools
import json
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
import torch
import transformers
from safetensors.torch import save_file

root, again, out = sys.argv[1:]
cells = tuple(anndata.read_h5ad(f"{root}/{name}.h5ad") for name in ("rna", "atac"))


def load(home, **options):
    for folder, auto in (("set", "AutoModelForSequenceClassification"), ("t5", "AutoModelForSeq2SeqLM"),
                         ("subword", "AutoModelForSeq2SeqLM"), ("t5", "AutoModel"), ("set", "AutoModel")):
        path, tensors = f"{root}/{folder}", {}
        processor = transformers.AutoProcessor.from_pretrained(path, **options)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(path, **options)
        tensors["binary"] = torch.from_numpy(extractor(cells)["expression"].toarray())
        batch = processor(cells, task="atac2gex")
        tensors["ids"], tensors["labels"] = batch["input_ids"], batch["labels"]
        assert list(processor.cell_strings(cells))[0][0].split()[0] in processor.feature_extractor.genes
        model = getattr(transformers, auto).from_pretrained(path, **options).eval()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            tensors[auto] = model.generate(**inputs) if auto == "AutoModelForSeq2SeqLM" else model(**inputs)[0]
        config = transformers.AutoConfig.from_pretrained(path, **options)
        assert type(config).__name__ == "MultiomeT5Config"
        for part in (model, processor, config):
            assert type(part).__module__.split(".")[0] == home, type(part)
        if home != "cellglot" and auto != "AutoModel":
            model.save_pretrained(f"{again}/{folder}")
            processor.save_pretrained(f"{again}/{folder}")
        yield {f"{home}/{folder}/{name}": tensor.contiguous() for name, tensor in tensors.items()}


sys.modules["cellglot"] = None  # any import of it fails
found = {k: v for part in load("transformers_modules", trust_remote_code=True) for k, v in part.items()}
del sys.modules["cellglot"]
import cellglot
found |= {k: v for part in load("cellglot") for k, v in part.items()}
save_file(found, out)
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
    done = subprocess.run(
        [sys.executable, "load.py", str(root), "again", "found"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")
    homes = ("transformers_modules", "cellglot")
    assert found.keys() == {f"{home}/{name}" for home in homes for name in expected}
    for name, tensor in expected.items():
        for home in homes:
            # Other processes may have other numbers of threads, and so other orders of sums.
            message = functools.partial("{}, {}: {}".format, home, name)
            assert_close(found[f"{home}/{name}"], tensor, rtol=1e-5, atol=1e-5, msg=message)
    # What was loaded without cellglot is saved as complete as it was.
    for folder in ("set", "t5", "subword"):
        first, second = (
            {path.name: path.read_bytes() for path in (home / folder).iterdir()} for home in (root, tmp_path / "again")
        )
        told, told_again = (json.loads(files.pop("tokenizer_config.json")) for files in (first, second))
        assert first == second
        # transformers adds how the tokenizer was loaded.
        assert {name: told_again[name] for name in told} == told


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
