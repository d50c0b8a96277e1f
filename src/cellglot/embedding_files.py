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


def count_embeddings(path: str | os.PathLike, key: str = "X_geneformer") -> int:
    """Cells in an output of `embed_cells`."""
    if Path(path).suffix == ".h5ad":
        import h5py

        with h5py.File(path, "r") as file:
            return file[f"obsm/{key}"].shape[0]  # type: ignore[union-attr]
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def read_embeddings(
    path: str | os.PathLike, key: str = "X_geneformer", rows: np.ndarray | None = None
) -> tuple[list[str], np.ndarray]:
    """Names of cells and their embeddings, (cells, width) float32, from an output of `embed_cells`.

    rows  ascending positions of the cells to read; all if absent
    """
    if Path(path).suffix == ".h5ad":
        import h5py
        from anndata.io import read_elem

        with h5py.File(path, "r") as file:
            read: Any = read_elem
            obs, embeddings = read(file["obs"]), file[f"obsm/{key}"]
            names = obs.index if rows is None else obs.index[rows]
            return [str(name) for name in names], embeddings[:] if rows is None else embeddings[rows]  # type: ignore[index]
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, blocks, start = [], [], 0
    with pq.ParquetFile(path) as file:
        width = file.schema_arrow.field(key).type.list_size
        # A row group at a time, of which only the rows asked for are kept
        for i in range(file.num_row_groups):
            group = file.read_row_group(i, columns=["cell", key])
            stop = start + group.num_rows
            if rows is not None:
                group = group.take(pa.array(rows[(rows >= start) & (rows < stop)] - start))
            names += group.column("cell").to_pylist()
            blocks += [chunk.flatten().to_numpy().reshape(-1, width) for chunk in group.column(key).chunks]
            start = stop
    return names, np.concatenate([np.empty((0, width), np.float32), *blocks])


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
