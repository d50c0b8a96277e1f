"""Publishing, over HTTP to a Hub on this machine: every trainer, both ways to load, broken connections, refusals."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from torch.testing import assert_close

from ..conftest import ROOT, synthetic_cells
from ..drug_response.responses import responses
from ..hub_stub import OWNER, STRANGER, running_hub
from ..test_publication import write
from .test_align import HUMAN, MOUSE, brain
from .test_pretrain_multiome import planted

REPRO = "org/geneformer-repro"
PUSH = ROOT / "train" / "push_to_hub.py"
# Runs scripts one after the other in one process, which spares the imports.
TRAIN = """
import importlib, json, sys
for module, words in json.load(open(sys.argv[1])):
    importlib.import_module(module).main(words)
"""
# What each published model is loaded with; the one private model is among those that are loaded
LOADED = {
    REPRO: ("AutoModelForMaskedLM", "AutoTokenizer"),
    "org/cell-types": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "org/cross-species": ("AutoModelForPreTraining", "AutoFeatureExtractor"),
    "org/translation": ("AutoModelForPreTraining", "AutoFeatureExtractor"),
    "org/multiome": ("AutoModelForSequenceClassification", "AutoProcessor"),
    "org/autoencoder": ("AutoModelForPreTraining", None),
    "org/gene-graph": ("AutoModelForSequenceClassification", None),
    "org/drug-response": ("AutoModelForPreTraining", "AutoFeatureExtractor"),
    "org/responses": ("AutoModelForPreTraining", "AutoFeatureExtractor"),
}
ONE_OF_EACH_METHOD = (REPRO, "org/translation", "org/multiome", "org/gene-graph", "org/responses")
LOAD = """
import json, sys
route, table, out = sys.argv[1:]
if route == "trust":
    sys.modules["cellglot"] = None  # any import of it fails
else:
    import cellglot
import huggingface_hub, torch, transformers
# A download goes on after its last whole block; these files are smaller than the usual ten megabytes.
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 500
from safetensors.torch import save_file
options = {"trust_remote_code": True} if route == "trust" else {}
tensors = {}
for repository, (auto, reader) in json.loads(table).items():
    model = getattr(transformers, auto).from_pretrained(repository, **options).eval()
    assert ("transformers_modules" in type(model).__module__) == (route == "trust"), type(model)
    tensors |= {f"{repository}:{key}": value.clone().contiguous() for key, value in model.state_dict().items()}
    if reader is not None:
        reads = getattr(transformers, reader).from_pretrained(repository, **options)
        assert ("transformers_modules" in type(reads).__module__) == (route == "trust"), type(reads)
model = transformers.AutoModel.from_pretrained("org/geneformer-repro", **options).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("org/geneformer-repro", **options)
ids = tokenizer.encode_expression(range(1, 32), [f"ENSG{i:011d}" for i in range(1, 32)])["input_ids"]
with torch.no_grad():
    tensors["hidden"] = model(torch.tensor(ids)).last_hidden_state
save_file(tensors, out)
"""


def metadata(repository: Any) -> Any:
    """What a published card says of itself, with `eval_results` where its `model-index` is sound."""
    return ModelCard(repository.files["README.md"].decode()).data


def python(*words: Any, cwd: Path, env: dict[str, str], status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def words(**options: Any) -> list[str]:
    given = {"cpu_threads": 1, "batch_size": 16, **options}
    items = {name: value if isinstance(value, list) else [value] for name, value in given.items() if value is not None}
    return [word for name, value in items.items() for word in (f"--{name.replace('_', '-')}", *map(str, value))]


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files of every kind, named by absolute paths in the commands."""
    folder = tmp_path_factory.mktemp("work")
    synthetic_cells(120, 31).write_h5ad(folder / "cells.h5ad")
    brain(HUMAN, 120, 0).write_h5ad(folder / "human.h5ad")
    brain(MOUSE, 150, 1).write_h5ad(folder / "mouse.h5ad")
    for name, adata in zip(("rna", "atac"), planted(n_cells=100), strict=True):
        adata.write_h5ad(folder / f"{name}.h5ad")
    responses().to_anndata().write_h5ad(folder / "wells.h5ad")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def published(hub, folder, home):
    """Every trainer's run, published by itself; the second one starts from what the first has published."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    cells, wells = folder / "cells.h5ad", {"method": "drug_response", "data": folder / "wells.h5ad", **sizes}
    sources = [f"{name}={folder / name}.h5ad" for name in ("human", "mouse")]
    first = words(data=cells, output="runs/geneformer", max_steps=3, push_to_hub=REPRO, **sizes)
    env = hub.environment(home)
    python(ROOT / "train" / "pretrain.py", *first, cwd=folder, env=env)
    quick, of = {"max_steps": 2}, "cellglot.train."
    patches = {"method": "cross_species", "n_components": 7, "num_patches": 3, **sizes}
    t5 = {"method": "multiome", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    widths = {"method": "gene_graph", "hidden_sizes": [7, 5], "data": cells}
    runs = {
        "cell-types": (of + "finetune", quick | {"model": REPRO, "data": cells, "baselines": "false"}),
        "cross-species": (of + "pretrain", quick | patches | {"sources": sources, "report": "false"}),
        "translation": (
            of + "align",
            {"model": folder / "runs" / "cross-species" / "model",
             "sources": sources, "cell_type": "cell_type", "validation_fraction": 0.3, "private": "true",
             "batch_size": 32, "epochs": 2, "epoch_steps": 5, "hidden_size": 8, "restarts": 1, "cpu_threads": None},
        ),
        "multiome": (of + "pretrain", quick | t5 | {"cells": [folder / "rna.h5ad", folder / "atac.h5ad"]}),
        "autoencoder": (of + "pretrain", quick | widths),
        "gene-graph": (of + "finetune", quick | widths | {"model": "runs/autoencoder/model", "hidden_sizes": None,
                                                          "baselines": "false"}),
        "drug-response": (of + "pretrain", quick | wells),
        "responses": (of + "finetune", quick | wells | {"hold_out_drugs": 2, "model": "runs/drug-response/model"}),
    }  # fmt: skip
    jobs = []
    for name, (module, options) in runs.items():
        if name == "autoencoder":
            # A run that has ended is published by resuming it.
            jobs.append((module, words(**options, output=f"runs/{name}")))
            options = options | {"resume": "true"}
        jobs.append((module, words(**options, output=f"runs/{name}", push_to_hub=f"org/{name}")))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    python("-c", TRAIN, "jobs.json", cwd=folder, env=env)
    return hub


def texts(files: dict[str, bytes]) -> str:
    return "\n".join(
        content.decode() for name, content in files.items() if Path(name).suffix in (".json", ".md", ".py")
    )


@pytest.mark.slow
def test_every_trainer_publishes_its_whole_model_directory_and_nothing_else(published, folder):
    for name, (auto, _) in LOADED.items():
        repository = published.repositories[name]
        assert repository.private == (name == "org/translation")
        run = folder / "runs" / name.removeprefix("org/").replace("geneformer-repro", "geneformer")
        files = repository.files
        assert files.keys() == {path.name for path in (run / "model").iterdir()} | {"run.json"}, name
        unchanged = [key for key in files if key not in ("README.md", "run.json")]
        assert all(files[key] == (run / "model" / key).read_bytes() for key in unchanged)
        auto_map = json.loads(files["config.json"])["auto_map"]
        assert {"AutoConfig", "AutoModel", auto} <= auto_map.keys()
        assert {f"{path.split('.')[0]}.py" for path in auto_map.values()} <= files.keys()
        assert "hf_" not in texts(files).replace("hf_hub", "")
        assert str(folder) not in texts(files)
        assert str(ROOT) not in texts(files)


@pytest.mark.slow
def test_cards_hold_the_runs_own_figures_and_both_ways_to_load(published, folder):
    # The cross-species run was told to draw nothing; the alignment's curve is that of its criterion.
    curves = dict.fromkeys(LOADED.keys() - {"org/cross-species"}, "loss_curve.png")
    curves["org/translation"] = "criterion.png"
    for name in LOADED:
        repository = published.repositories[name]
        assert metadata(repository).eval_results, name
        assert (metadata(repository).license, metadata(repository).library_name) == ("other", "transformers")
        text = repository.files["README.md"].decode()
        assert f'"{name}"' in text
        assert "PATH_OR_REPO" not in text
        assert "trust_remote_code=True" in text
        assert "## Licence and citation" in text
        if name in curves:
            assert f"]({curves[name]})" in text
            assert repository.files[curves[name]].startswith(b"\x89PNG")
    report = json.loads((folder / "runs" / "geneformer" / "report.json").read_text())
    results = metadata(published.repositories[REPRO]).eval_results
    assert {result.metric_name: result.metric_value for result in results} == {
        "masked-gene loss (nats)": round(report["validation_loss"], 4),
        "cell types, linear probe": round(report["probe"][-1]["accuracy"], 4),
    }
    assert metadata(published.repositories["org/cell-types"]).base_model == REPRO


@pytest.mark.slow
def test_models_load_from_the_hub_both_ways_though_a_connection_breaks(published, folder, tmp_path):
    """And with the cache that this leaves, without any Hub."""
    expected = {
        f"{name}:{key}": tensor
        for name in ONE_OF_EACH_METHOD
        for key, tensor in load(published.repositories[name].files["model.safetensors"]).items()
    }
    found, table = {}, json.dumps({name: LOADED[name] for name in ONE_OF_EACH_METHOD})
    for route in ("cellglot", "trust"):
        published.broken["model.safetensors"] = 1_000
        asked = len(published.requests)
        env = published.environment(tmp_path / route)
        python("-c", LOAD, route, table, tmp_path / f"{route}.tensors", cwd=tmp_path, env=env)
        assert "bytes=1000-" in [header for *_, header in published.requests[asked:]]
        found[route] = load_file(tmp_path / f"{route}.tensors")
        assert expected.keys() <= found[route].keys()
        assert all((found[route][key] == tensor).all() for key, tensor in expected.items())
    assert_close(found["trust"]["hidden"], found["cellglot"]["hidden"])
    offline = published.environment(tmp_path / "cellglot") | {
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    table = json.dumps({REPRO: LOADED[REPRO]})
    asked = len(published.requests)
    python("-c", LOAD, "cellglot", table, tmp_path / "offline.tensors", cwd=tmp_path, env=offline)
    assert len(published.requests) == asked
    assert_close(load_file(tmp_path / "offline.tensors")["hidden"], found["cellglot"]["hidden"])


@pytest.fixture
def model(folder, published, tmp_path):
    """A run to be published, in a folder of its own."""
    shutil.copytree(folder / "runs" / "autoencoder", tmp_path / "run")
    return tmp_path / "run"


def push(hub: Any, folder: Path, *words: Any, token: str | None = OWNER, status: int = 0, **env: str) -> str:
    """What the command prints, or the one line that it fails with."""
    settings = hub.environment(folder.parent / "home", token) | env
    done = python(PUSH, folder.name, *words, cwd=folder.parent, env=settings, status=status)
    if status == 0:
        return done.stdout
    assert "Traceback" not in done.stderr
    (message,) = done.stderr.strip().splitlines()
    return message


@pytest.mark.slow
def test_an_upload_that_breaks_off_is_seen_whole_or_not_and_repeated_without_what_has_arrived(published, model):
    weights = (model / "model" / "model.safetensors").read_bytes()[:-4] + b"abcd"
    (model / "model" / "model.safetensors").write_bytes(weights)
    published.broken = {hashlib.sha256(weights).hexdigest(): 100, "commit/main": 0}
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    # Silent, since the client says of each transfer that it begins anew.
    message = push(published, model, "org/repeated", status=1, HF_HUB_VERBOSITY="critical")
    assert "run is complete, but could not be uploaded to org/repeated: " in message
    assert message.endswith("Run the same again: what has arrived is not sent twice.")
    assert published.repositories["org/repeated"].files == {}
    # The weights broke off, and were sent anew.
    assert hashlib.sha256(weights).hexdigest() in published.stored
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    asked = len(published.requests)
    assert push(published, model, "org/repeated").endswith(f"{published.url}/org/repeated\n")
    assert published.repositories["org/repeated"].files["model.safetensors"] == weights
    assert [path for method, path, _ in published.requests[asked:] if method == "PUT"] == []


@pytest.mark.slow
def test_a_dry_run_lists_what_would_be_sent_and_sends_nothing(published, model):
    asked = len(published.requests)
    printed = push(published, model, "org/dry", "--dry-run")
    listed = {line.split()[1] for line in printed.splitlines()[1:-1]}
    assert listed == published.repositories["org/autoencoder"].files.keys()
    assert "stays here: checkpoints, data, metrics.jsonl, report.json" in printed
    assert len(published.requests) == asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["org/new"], {"token": None}, "the Hub knows no such token, or none was given. Run `hf auth login`"),
        (["org/new"], {"token": STRANGER}, "the token may not write there. Take one with write access"),
        (["org/autoencoder"], {"token": STRANGER}, "org/autoencoder cannot be published to: the token may not write"),
        (["org/autoencoder", "--private"], {}, "is there already and public, where a private one was asked for"),
        (["org/new"], {"HF_HUB_OFFLINE": "1"}, "org/new cannot be published to: HF_HUB_OFFLINE is set. Unset it."),
        (["org/new"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "org/new cannot be published to: "),
        (["new"], {}, "A repository is named organization/name, of letters, digits, '-', '_' and '.'; found 'new'"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(published, model, words, settings, message):
    there = published.repositories.keys()
    assert message in push(published, model, *words, status=1, **settings)
    assert published.repositories.keys() == there


FAIL = """
import sys
from cellglot.embed import main
for name in sys.argv[1:]:
    assert main(["cells.h5ad", "--model", name, "--output", "out.parquet", "--quiet"]) == 1
"""


@pytest.mark.slow
def test_missing_and_private_models_are_told_of_in_one_line(published, folder, tmp_path):
    names = ("org/no-such", "org/translation")
    done = python("-c", FAIL, *names, cwd=folder, env=published.environment(tmp_path, None))
    said = "is no folder here, and the Hub shows no such repository: it is misspelt, or private. Check the name; "
    for line, name in zip(done.stderr.strip().splitlines(), names, strict=True):
        assert line.startswith(f"error: {name} {said}")
        assert "run `hf auth login`" in line
    done = python("-c", FAIL, "org/multiome", cwd=folder, env=published.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"})
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: org/multiome is no folder here, is not in the cache, and the Hub cannot be reached")


@pytest.mark.slow
def test_a_corpus_and_a_space_are_published_with_the_same_command(hub, tmp_path):
    card = '---\nconfigs:\n- config_name: default\n---\n# Cells\n\nload_dataset("PATH_OR_REPO")\n'
    corpus = write(tmp_path / "corpus", {"README.md": card, "default/x.parts/y": "", ".run/tasks.slurm": ""})
    for shard in ("a", "b"):
        pd.DataFrame({"n": [1]}).to_parquet(corpus / "default" / f"{shard}.parquet")
    assert "stays here: .run" in push(hub, corpus, "org/corpus")
    (corpus / "default" / "b.parquet").unlink()
    push(hub, corpus, "org/corpus")
    repository = hub.repositories["org/corpus"]
    # A shard of the earlier upload would be loaded together with the new ones.
    assert (repository.kind, repository.files.keys()) == ("dataset", {"README.md", "default/a.parquet"})
    assert b'load_dataset("org/corpus")' in repository.files["README.md"]
    front = "---\ntitle: Cells\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n---\n"
    space = {"README.md": front, "app.py": "print()", "requirements.txt": "cellglot", "model/config.json": "{}"}
    hidden = {".env": f"HF_TOKEN={OWNER}", "__pycache__/app.pyc": "", ".gradio/flagged.csv": ""}
    push(hub, write(tmp_path / "space", space | hidden), "org/space")
    repository = hub.repositories["org/space"]
    assert (repository.kind, repository.files.keys()) == ("space", space.keys())
