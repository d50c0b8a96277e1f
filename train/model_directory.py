"""A complete model directory: config, weights, tokenizer, code for the trust route, card, metrics. Whole or absent."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import write_json


def write_model_directory(
    model: Any, tokenizer: Any, path: Path, *, card: str, report: Mapping[str, Any], files: Mapping[str, Path]
) -> None:
    """Writes everything that `from_pretrained` and a reader of the card need.

    tokenizer  or feature extractor or processor; None where the model has none
    card       Markdown for README.md
    report     figures for metrics.json
    files      name in the directory -> file to copy (the card's pictures)
    An earlier directory of that name is replaced once the new one is complete.
    """
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    write_json(partial / "metrics.json", report)
    for name, source in files.items():
        shutil.copyfile(source, partial / name)
    if path.exists():
        shutil.rmtree(path)
    os.rename(partial, path)
