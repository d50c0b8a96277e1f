"""What is wrong with the files of a corpus, said once and clearly."""

import errno
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class CorpusError(ValueError):
    """A source that is missing, damaged or of another layout, or a full disk; the message says how to mend it."""


def require_columns(present: Iterable[Any], wanted: Sequence[str], name: str | Path) -> None:
    """Raises CorpusError if a table lacks a wanted column, naming it and what is there instead."""
    present = [str(column) for column in present]
    missing = [column for column in wanted if column not in present]
    if missing:
        found = ", ".join(present[:20]) + (f", ... ({len(present):,} in all)" if len(present) > 20 else "")
        raise CorpusError(
            f"{name} has no column {', '.join(map(repr, missing))}; it has {found or 'none'}. "
            "Check that it is the published file, unedited."
        )


def disk_full(error: OSError, folder: str | Path) -> CorpusError | None:
    """The error to raise instead of `error` if that means a full disk or quota, else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return CorpusError(
        f"The disk is full: writing to {folder} failed ({error.strerror}). Free some space and run the same command "
        "again: it continues with what is done. Or choose another disk with --output (HF_DATASETS_CACHE: downloads)."
    )
