"""What a folder would upload to the Hub, and what is refused before anything is sent."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cellglot.hub import HubError
from cellglot.publication import find_publication, shown
from cellglot.train.config import write_json

from .hub_stub import OWNER

SPACES = Path(__file__).parents[1] / "spaces"
CONFIG = '{"auto_map": {"AutoModel": "modeling_x.XModel"}}'
MODEL = {
    "README.md": "---\nlicense: other\n---\n# X\n",
    "config.json": CONFIG,
    "modeling_x.py": "",
    "model.safetensors": "",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_optimizer_states_and_checkpoints_stay_here(tmp_path):
    extra = dict.fromkeys(
        ("optimizer.pt", "training_args.bin", "rng.pkl", "checkpoint-1/model.safetensors", ".env"), ""
    )
    publication = find_publication(write(tmp_path / "m", MODEL | extra), "org/x")
    assert publication.files.keys() == MODEL.keys()
    assert publication.left_out == [".env", "checkpoint-1", "optimizer.pt", "rng.pkl", "training_args.bin"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": f"---\nlicense: other\n---\n\nlogin({OWNER})"}, "README.md, line 5, holds an access token"),
        ({"metrics.json": '{"data": "FOLDER/cells.h5ad"}'}, "metrics.json, line 1, holds a path of this machine"),
        ({"modeling_x.py": None}, "config.json names modeling_x.XModel, but .* has no such file"),
        ({"config.json": "{}"}, "was saved without its code"),
        ({"README.md": None}, "has no README.md with metadata"),
        ({"README.md": "---\nmodel-index:\n- name: x\n---\n"}, "begins with metadata that the Hub would refuse"),
        ({"README.md": "---\na: !!python/name:os.system\n---\n"}, "begins with metadata that the Hub would refuse"),
        (dict.fromkeys(MODEL), "m holds nothing to publish: expected a run with model/config.json .* found cells.h5ad"),
        ({**dict.fromkeys(MODEL), "fold-0/model/config.json": CONFIG}, "holds 1 models, one a fold. Pass one of them"),
    ],
)
def test_what_must_not_be_published_is_refused(tmp_path, files, message):
    found = {
        name: text.replace("FOLDER", str(tmp_path / "m")) for name, text in (MODEL | files).items() if text is not None
    }
    with pytest.raises(HubError, match=message) as error:
        find_publication(write(tmp_path / "m", found | {"cells.h5ad": ""}), "org/x")
    assert "\n" not in str(error.value)


def test_paths_in_a_published_record_lose_their_folders(tmp_path):
    write(tmp_path / "run" / "model", MODEL)
    config = {"data": "/data/me/data/cells.h5ad", "sources": ["human=/data/me/h.h5ad"], "layer": None, "seed": 3}
    write_json(tmp_path / "run" / "run.json", {"config": config, "command": ["x", "/data/me/data/cells.h5ad"]})
    content = find_publication(tmp_path / "run", "org/x").files["run.json"]
    assert isinstance(content, bytes)
    expected = config | {"data": "data/cells.h5ad", "sources": ["human=me/h.h5ad"]}
    assert json.loads(content) == {"config": expected}
    assert shown("org/name") == "org/name"


@pytest.mark.parametrize("folder", sorted(SPACES.glob("*/")), ids=lambda folder: folder.name)
def test_every_space_goes_along_with_its_model_and_starts_with_the_gradio_that_is_tested(folder, tmp_path):
    space = shutil.copytree(folder, tmp_path / "space", ignore=shutil.ignore_patterns("model", "__pycache__"))
    write(space / "model", MODEL | {"about.json": "{}", "examples.h5ad": ""})
    publication = find_publication(space, "org/space")
    assert (publication.kind, publication.sdk) == ("space", "gradio")
    expected = {"app.py", "prepare.py", "requirements.txt", "model/about.json", "model/examples.h5ad"}
    assert expected < publication.files.keys()
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert f"gradio=={front['sdk_version']}" in (SPACES.parent / "constraints.txt").read_text().splitlines()
    assert front["app_file"] in publication.files
