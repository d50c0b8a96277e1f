"""Cell embeddings on disk, written a block at a time.

Every file is written under a temporary name beside its place and renamed when complete: a crash leaves what was there.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Receives the names of a block of cells and their embeddings, (cells, width)
Writer = Callable[[Sequence[str], np.ndarray], None]


def embedding_writer(
    output: Path, source: Path | None, key: str, width: int, overwrite: bool
) -> contextlib.AbstractContextManager[Writer]:
    """Opens `output` for embeddings of the cells of `source` (None for an AnnData), by its suffix.

    Raises  ValueError for a suffix or source that does not fit, FileExistsError for what would be overwritten
    """
    if output.suffix == ".parquet":
        return _parquet_writer(output, key, width, overwrite)
    if output.suffix != ".h5ad":
        raise ValueError(f"Expected an output ending in .parquet or .h5ad, found {str(output)!r}.")
    if source is None:
        raise ValueError(
            "An .h5ad output is a copy of an .h5ad input, and the input is an AnnData: leave output out and write the "
            "annotated copy with .write_h5ad, or pass the path of the file."
        )
    if source.suffix != ".h5ad":
        raise ValueError(f"An .h5ad output is a copy of an .h5ad input, found {source}; write .parquet instead.")
    return _h5ad_writer(output, source, key, width, overwrite)


def read_embeddings(path: str | os.PathLike, key: str = "X_geneformer") -> tuple[list[str], np.ndarray]:
    """Names of cells and their embeddings, (cells, width) float32, from an output of `embed_cells`."""
    if Path(path).suffix == ".h5ad":
        import h5py
        from anndata.io import read_elem

        with h5py.File(path, "r") as file:
            read: Any = read_elem
            obs, rows = read(file["obs"]), read(file[f"obsm/{key}"])
            return [str(name) for name in obs.index], rows
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["cell", key])
    width = table.schema.field(key).type.list_size
    blocks = [chunk.flatten().to_numpy().reshape(-1, width) for chunk in table.column(key).chunks]
    return table.column("cell").to_pylist(), np.concatenate([np.empty((0, width), np.float32), *blocks])


@contextlib.contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        with open(partial, "rb") as file:
            # Else a power cut after the rename could leave a file with the right name and no content.
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _parquet_writer(output: Path, key: str, width: int, overwrite: bool) -> Iterator[Writer]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists: choose another name, or pass overwrite=True.")
    schema = pa.schema({"cell": pa.string(), key: pa.list_(pa.float32(), width)})
    with replaced_when_complete(output) as partial, pq.ParquetWriter(partial, schema) as file:

        def write(names: Sequence[str], embeddings: np.ndarray) -> None:
            rows = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), width)
            cells = pa.array([str(name) for name in names])
            file.write_batch(pa.RecordBatch.from_arrays([cells, rows], schema=schema))

        yield write


@contextlib.contextmanager
def _h5ad_writer(output: Path, source: Path, key: str, width: int, overwrite: bool) -> Iterator[Writer]:
    """Writes obsm[key] of a copy of `source`, which is renamed to `output` in the end; they may be the same file."""
    import h5py

    # A link stays a link: the file it points to is replaced.
    source, output = source.resolve(), output.resolve()
    in_place = source == output
    if output.exists() and not in_place and not overwrite:
        raise FileExistsError(f"{output} exists: choose another name, or pass overwrite=True.")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    state = _state(source)
    try:
        opened = h5py.File(source, "r")
    except OSError as error:
        raise OSError(f"{source} cannot be read: truncated or corrupt, or no HDF5 file ({error}).") from error
    with opened as file:
        present: Any = file.get("obsm", {})
        if isinstance(present, h5py.Dataset):
            raise ValueError(
                f"{source} is in AnnData's format from before version 0.7: read it with anndata and write it anew."
            )
        if key in present and not overwrite:
            raise FileExistsError(f"{source} holds obsm[{key!r}] already: pass another key, or overwrite=True.")
    with replaced_when_complete(output) as partial:
        shutil.copyfile(source, partial)
        with h5py.File(partial, "r+") as file:
            obsm = file.require_group("obsm")
            # Encoding marks of AnnData's on-disk format
            for name, value in (("encoding-type", "dict"), ("encoding-version", "0.1.0")):
                obsm.attrs.setdefault(name, value)
            if key in obsm:
                del obsm[key]
            rows = obsm.create_dataset(key, (0, width), np.float32, maxshape=(None, width), chunks=(1024, width))
            rows.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

            def write(names: Sequence[str], embeddings: np.ndarray) -> None:
                start = len(rows)
                rows.resize(start + len(embeddings), axis=0)
                rows[start:] = embeddings

            yield write
        shutil.copymode(source, partial)
        if in_place and _state(source) != state:
            raise OSError(
                f"{source} was changed by another program while its cells were embedded; it is left as it is."
            )


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
