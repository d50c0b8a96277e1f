"""The folder of a Space's model and example cells: prepare.py leaves it whole or not at all, app.py finds it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Every bundle has it
ABOUT = "about.json"


@contextmanager
def preparing(output: Path) -> Iterator[Path]:
    """A folder for all that is made on the way to `output`, gone at the end.

    Raises  SystemExit, before any work, if `output` holds something else than an earlier bundle
    """
    if output.exists() and not (output / ABOUT).is_file() and (output.is_file() or any(output.iterdir())):
        raise SystemExit(f"{output} is there already and no model of a Space. Pass another folder as --output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that a bundle is renamed into its place; hidden, so that no upload of a Space takes it along
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".preparing-") as work:
        yield Path(work)


def keep(bundle: Path, output: Path) -> None:
    """Renames a finished bundle, which lies in the folder of `preparing`, to `output`; an earlier one goes."""
    if output.exists():
        output.rename(bundle.with_name("earlier"))
    bundle.rename(output)


def bundle(default: Path) -> Path:
    """The folder of a Space's model and example cells.

    default  where the Space's prepare.py leaves it; CELLGLOT_SPACE_MODEL names another folder, or a repository
    Raises   SystemExit if it is not there
    """
    name = os.environ.get("CELLGLOT_SPACE_MODEL")
    if name and not Path(name).is_dir():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name))
    folder = Path(name or default)
    if not (folder / ABOUT).is_file():
        raise SystemExit(
            f"Expected a model in {folder}, found none. Train one with `python {folder.parent / 'prepare.py'}`, or set "
            "CELLGLOT_SPACE_MODEL to the folder or the repository of one."
        )
    return folder
