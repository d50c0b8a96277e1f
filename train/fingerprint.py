"""A short name for what a run was made from, to notice when it has changed."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def fingerprint(files: Iterable[Path], tables: Iterable[str | None], facts: Mapping[str, Any]) -> str:
    """SHA-256 of names, sizes and both ends of the files, of the whole tables, and of the facts; 16 digits.

    files   count files and the like, which may be large
    tables  paths of small files, or of folders of JSON files; None is skipped
    facts   what else matters, as JSON can write it
    """
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(file.read(1 << 16))
            file.seek(-min(1 << 16, path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    for table in filter(None, tables):
        for part in sorted(Path(table).glob("*.json")) if Path(table).is_dir() else [Path(table)]:
            digest.update(part.read_bytes())
    digest.update(json.dumps(dict(facts), sort_keys=True).encode())
    return digest.hexdigest()[:16]
