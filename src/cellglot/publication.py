"""What a folder uploads to the Hub: a run's model, a corpus or a Space. The folder says itself which it is.

Left out are checkpoints, optimizer states, hidden files and all that is no part of the kind; refused is text that holds
an access token or a path of this machine.
"""

import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from .hub import HubError, Kind, check_name, create_repository, explained, one_line

# Stands in a card for the name it is published under, or the folder
PLACEHOLDER = "PATH_OR_REPO"
CARD = "README.md"
# All that `save_pretrained` and `write_model_directory` leave; no optimizer state has one of these endings.
MODEL_FILES = {".json", ".md", ".model", ".png", ".py", ".safetensors", ".txt"}
# What a build in progress leaves beside a corpus
UNFINISHED = ("*.lock", "*.parts/*", "*.incomplete/*", "*.tmp")
# Of an earlier upload, these would be loaded together with the new ones.
LOADED_TOGETHER = (".parquet", ".safetensors")
TEXT = {".json", ".md", ".py", ".txt", ".yaml", ".toml", ".csv", ".tsv"}
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# An absolute path of two parts or more, that is no part of an address
PLACE = re.compile(r"(?<![\w/:.~-])(?:/[\w.@+-]+){2,}")


@dataclass(frozen=True)
class Publication:
    """What a folder would upload under a name.

    files     path in the repository -> file, or content that differs from the file's
    left_out  names of files and folders that stay here
    sdk       what runs it, if it is a Space
    """

    folder: Path
    repository: str
    kind: Kind
    files: dict[str, Path | bytes]
    left_out: list[str]
    sdk: str | None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def find_publication(folder: str | Path, repository: str) -> Publication:
    """What a folder would upload under a name: a run or its model directory, a corpus with its card, or a Space.

    Raises  HubError if it is none of them, not complete, or holds what must not be published
    """
    check_name(repository)
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder here. Pass a run, a model directory, a built corpus or a Space.")
    root, front = folder, _front_matter(folder)
    sdk = front.get("sdk")
    if sdk is None and (folder / "model" / "config.json").exists():
        root, front = folder / "model", _front_matter(folder / "model")
    if sdk is not None:
        kind: Kind = "space"
        names = _names(folder)
    elif (root / "config.json").exists():
        kind = "model"
        names = [path.name for path in root.iterdir() if path.suffix in MODEL_FILES and path.is_file()]
    elif ("configs" in front or "dataset_info" in front) and any(folder.rglob("*.parquet")):
        kind = "dataset"
        names = [name for name in _names(folder) if not any(fnmatch(name, pattern) for pattern in UNFINISHED)]
    else:
        raise HubError(_nothing_to_publish(folder))
    if not front:
        raise HubError(f"{root} has no {CARD} with metadata, the card that says what it is. Write one.")
    files: dict[str, Path | bytes] = {name: root / name for name in sorted(names) if not name.startswith(".")}
    files[CARD] = (root / CARD).read_text(encoding="utf-8").replace(PLACEHOLDER, repository).encode()
    if kind == "model":
        _check_code(root)
        record = next((path for path in (folder / "run.json", root.parent / "run.json") if path.exists()), None)
        if record is not None:
            files["run.json"] = _public_record(record)
    _check_text(files)
    sent = {name.split("/")[0] for name in files} | {root.name}
    left_out = sorted({path.name for path in (*folder.iterdir(), *root.iterdir())} - sent)
    return Publication(folder, repository, kind, files, left_out, sdk)


def publish(publication: Publication, *, private: bool = False) -> str:
    """Uploads it in one commit, so that it is there whole or not; returns its address.

    What the Hub has already is not sent again.
    Raises  HubError; nothing of the upload is to be seen then, and nothing here has changed
    """
    repository, kind = publication.repository, publication.kind
    url = create_repository(repository, kind, private=private, sdk=publication.sdk)
    with explained(f"{publication.folder} is complete, but could not be uploaded to {repository}"):
        hub = HfApi()
        there = hub.list_repo_files(repository, repo_type=kind)
        stale = [name for name in there if name.endswith(LOADED_TOGETHER) and name not in publication.files]
        hub.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, content) for name, content in publication.files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            repo_type=kind,
            commit_message=f"Upload {kind} with cellglot",
        )
    return url


def _front_matter(folder: Path) -> dict[str, Any]:
    """Metadata of a folder's card, with a `model-index` that is sound; empty where there is no card."""
    if not (folder / CARD).exists():
        return {}
    try:
        return ModelCard.load(folder / CARD).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"{folder / CARD} begins with metadata that the Hub would refuse: {one_line(error)}") from error


def _names(folder: Path) -> list[str]:
    """Files below a folder, but hidden ones and compiled code."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    hidden = re.compile(r"\.|__pycache__$")
    return [path.as_posix() for path in paths if not any(hidden.match(part) for part in path.parts)]


def _nothing_to_publish(folder: Path) -> str:
    folds = sorted(path.parent.parent.name for path in folder.glob("fold-*/model/config.json"))
    if folds:
        return f"{folder} holds {len(folds)} models, one a fold. Pass one of them, e.g. {folder / folds[0]}."
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    return (
        f"{folder} holds nothing to publish: expected a run with model/config.json (there once training has ended), a "
        f"model directory, a corpus with README.md and .parquet files, or a Space whose README.md names its sdk; found "
        f"{found}."
    )


def _check_code(model: Path) -> None:
    """Raises HubError unless all the code is there that the model's files send `trust_remote_code=True` to."""
    if "auto_map" not in json.loads((model / "config.json").read_text(encoding="utf-8")):
        raise HubError(f"{model} was saved without its code (no auto_map in config.json): load and save it once more.")
    for path in model.glob("*config.json"):
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})
        for named in auto_map.values():
            for reference in named if isinstance(named, list) else [named]:
                if reference is not None and not (model / f"{reference.split('.')[0]}.py").exists():
                    raise HubError(f"{path} names {reference}, but {model} has no such file: save the model again.")


def _public_record(path: Path) -> bytes:
    """run.json without the command, and with the last two parts of absolute paths."""
    record = json.loads(path.read_text(encoding="utf-8"))
    record.pop("command", None)
    return (json.dumps(_without_places(record), indent=2) + "\n").encode()


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return shown(value) if isinstance(value, str) else value


def shown(path: str) -> str:
    """A path as strangers may see it: of an absolute one (also after NAME=) the last two parts, others as they are."""
    name, equals, place = path.rpartition("=")
    return f"{name}{equals}{'/'.join(Path(place).parts[1:][-2:])}" if Path(place).is_absolute() else path


def _check_text(files: dict[str, Path | bytes]) -> None:
    """Raises HubError if a text file holds an access token, or a path of this machine."""
    for name, content in files.items():
        if Path(name).suffix not in TEXT:
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        tokens = ((found, "an access token") for found in TOKEN.finditer(text))
        places = ((found, "a path of this machine") for found in PLACE.finditer(text) if _is_here(found[0]))
        for found, what in (*tokens, *places):
            line = text.count("\n", 0, found.start()) + 1
            raise HubError(f"{name}, line {line}, holds {what}, which must not be published. Take it out.")


def _is_here(place: str) -> bool:
    path = Path(place)
    # What every machine has says nothing of this one.
    return path.parts[1] not in ("usr", "dev") and (path.is_relative_to(Path.home()) or os.path.exists(place))
