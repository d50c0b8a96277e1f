"""Run configuration: a dataclass, a YAML recipe that lists only differences, and command-line overrides."""

import argparse
import dataclasses
import difflib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Config = TypeVar("Config")


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and a help text."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def parse_config(config_class: type[Config], argv: list[str] | None = None, description: str | None = None) -> Config:
    """The configuration that `--recipe FILE` and the other command-line options give; the latter win.

    Raises  SystemExit with a message for an unknown key (with the nearest known one) or a value of the wrong type
    """
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--recipe", metavar="FILE", help="YAML file with any of the options below")
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = _pop_recipe(argv, parser)
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    flags = [] if recipe is None else _recipe_flags(Path(recipe), names, parser)
    if any(word == "--recipe" or word.startswith("--recipe=") for word in argv):
        parser.error("--recipe can be given once.")
    known, unknown = parser.parse_known_args([*flags, *argv])
    if unknown:
        parser.error(_unknown_keys([word.lstrip("-").split("=")[0] for word in unknown], names))
    values = {name: getattr(known, name) for name in names}
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))


def chosen_option(name: str, argv: list[str]) -> str | None:
    """The value of one option on the command line, else in the recipe, before it is known which options there are.

    Returns None where neither has it, or the recipe cannot be read: `parse_config` then says what is wrong with it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", dest="value")
    parser.add_argument("--recipe")
    try:
        given, _ = parser.parse_known_args(argv)
        if given.value is not None or given.recipe is None:
            return given.value
        recipe = yaml.safe_load(Path(given.recipe).read_text(encoding="utf-8"))
    except (argparse.ArgumentError, OSError, yaml.YAMLError):
        return None
    value = recipe.get(name) if isinstance(recipe, dict) else None
    return None if value is None else str(value)


def _pop_recipe(argv: list[str], parser: Any) -> str | None:
    """Removes --recipe FILE from argv, so that its options can be put before the others."""
    for i, word in enumerate(argv):
        if word == "--recipe":
            if i + 1 == len(argv):
                parser.error("--recipe needs the path of a YAML file.")
            del argv[i]
            return argv.pop(i)
        if word.startswith("--recipe="):
            return argv.pop(i).partition("=")[2]
    return None


def _recipe_flags(path: Path, names: list[str], parser: Any) -> list[str]:
    """The recipe as command-line words, so that types and choices are checked in one place."""
    if not path.is_file():
        parser.error(f"--recipe {path}: no such file.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        parser.error(f"--recipe {path} is not valid YAML: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"--recipe {path}: expected `option: value` lines, found a {type(recipe).__name__}.")
    unknown = [str(key) for key in recipe if key not in names]
    if unknown:
        parser.error(f"--recipe {path}: {_unknown_keys(unknown, names)}")
    flags: list[str] = []
    for key, value in recipe.items():
        if value is None or value == []:
            # There is no word for these on a command line.
            parser.set_defaults(**{key: value})
        else:
            # YAML reads a bare `no` as false, which an option with that choice does not mean.
            choices = next(a.choices for a in parser._actions if a.dest == key)
            value = "no" if value is False and "no" in (choices or ()) else value
            flags += [f"--{key}", *_words(value)]
    return flags


def _words(value: Any) -> list[str]:
    """A recipe's value as words: items of a list, `name=item` of a mapping to items or lists of them."""
    if isinstance(value, dict):
        return [f"{name}={word}" for name, items in value.items() if items is not None for word in _words(items)]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _unknown_keys(unknown: list[str], names: list[str]) -> str:
    messages = []
    for key in unknown:
        close = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
        messages.append(f"unknown option {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return "; ".join(messages)


def write_run_record(path: Path, config: Any, **facts: Any) -> None:
    """Writes what a run depends on as JSON: configuration, command, versions, commit, and the facts given."""
    packages = ("cellglot", "torch", "transformers", "accelerate", "datasets", "tokenizers", "anndata", "numpy")
    record = {
        "config": dataclasses.asdict(config),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        **facts,
    }
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it. NaN, which JSON has no word for, becomes null."""
    write_atomically(path, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this module lies in, marked if changed; None for an installed package."""
    try:
        command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
