"""Reads the counts and labels of an .h5ad file of unknown origin; run as a program of its own, under limits.

    python -I untrusted_h5ad.py FILE OUTPUT LIMITS

LIMITS is JSON (`Limits` of uploads.py). On success OUTPUT is an .npz of plain arrays, and stdout's last line tells what
was read; else that line says what is wrong, for people. Nothing is unpickled, no code or plugin is loaded, and only X,
layers/counts, raw, obs and var are looked at. A process of its own bounds memory and time, and a fault of the HDF5
library on a damaged file ends this process only.
"""

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

# Filters that HDF5 and h5py bring along; others would be plugins, loaded from the machine
KNOWN_FILTERS = {"gzip", "lzf", "shuffle", "fletcher32", "scaleoffset", "nbit"}
FILTER_NAMES = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
MAX_COLUMNS = 20
MAX_NODES = 2000
ROWS_AT_ONCE = 256


class Refused(Exception):
    """The file is not read; the message says why, and how to mend it."""


def limit_process(limits: dict[str, Any]) -> None:
    """Memory, CPU time and the size of what is written, enforced by the operating system."""
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"], limits["seconds"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["memory"], limits["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def child(group: h5py.Group, name: str, limits: dict[str, Any]) -> Any:
    """The node `name` of a group, None if there is none. Links to elsewhere are never followed."""
    link = group.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise Refused(
            f"{str(group.name).rstrip('/')}/{name} is a link to another place or file. "
            "Save the cells with adata.write_h5ad."
        )
    node = group[name]
    if isinstance(node, h5py.Dataset):
        check_dataset(node, limits)
    return node


def check_dataset(dataset: h5py.Dataset, limits: dict[str, Any]) -> None:
    """Refuses data outside the file, unknown filters, and more bytes than the limit once unpacked."""
    if dataset.external or dataset.is_virtual:
        raise Refused(f"{dataset.name} keeps its data in other files. Save the cells with adata.write_h5ad.")
    plist = dataset.id.get_create_plist()
    for i in range(plist.get_nfilters()):
        code = plist.get_filter(i)[0]
        if FILTER_NAMES.get(code) not in KNOWN_FILTERS:
            raise Refused(
                f"{dataset.name} is compressed by a filter of number {code}; expected gzip or lzf. "
                'Save the cells with adata.write_h5ad(path, compression="gzip").'
            )
    n_bytes = int(np.prod(dataset.shape, dtype=object) or 0) * dataset.dtype.itemsize
    if n_bytes > limits["unpacked_bytes"]:
        raise Refused(
            f"{dataset.name} unpacks to {n_bytes / 1e6:,.0f} MB; at most {limits['unpacked_bytes'] / 1e6:,.0f} MB are "
            "read. Upload fewer cells, as a sparse matrix."
        )


def check_size(shape: tuple[int, ...], limits: dict[str, Any]) -> None:
    n_cells, n_genes = shape
    if n_cells == 0 or n_genes == 0:
        raise Refused(f"Expected cells and genes, found {n_cells:,} cells x {n_genes:,} genes.")
    if n_cells > limits["cells"]:
        raise Refused(f"{n_cells:,} cells; at most {limits['cells']:,} are read. Upload a sample of them.")
    if n_genes > limits["genes"]:
        raise Refused(f"{n_genes:,} genes; at most {limits['genes']:,} are read. Is the matrix cells x genes?")


def text(attributes: Any, key: str) -> str:
    value = attributes.get(key, "")
    return value.decode() if isinstance(value, bytes) else str(value)


def read_matrix(node: Any, limits: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """CSR data, indices, indptr and shape of a matrix of the file, sparse or dense."""
    if isinstance(node, h5py.Dataset):
        return read_dense(node, limits)
    kind = text(node.attrs, "encoding-type") or text(node.attrs, "h5sparse_format")
    if kind not in ("csr_matrix", "csc_matrix"):
        raise Refused(
            f"{node.name} is no matrix (found {kind[:40] or 'a group'}). Save the cells with adata.write_h5ad."
        )
    shape = tuple(int(n) for n in np.ravel(node.attrs.get("shape", node.attrs.get("h5sparse_shape", ()))))
    if len(shape) != 2 or min(shape) < 0:
        raise Refused(f"{node.name} states no size. Save the cells with adata.write_h5ad.")
    check_size(shape, limits)
    data, indices, indptr = (child(node, name, limits) for name in ("data", "indices", "indptr"))
    if not all(isinstance(part, h5py.Dataset) and part.ndim == 1 for part in (data, indices, indptr)) or not (
        data.dtype.kind in "iufb" and indices.dtype.kind in "iu" and indptr.dtype.kind in "iu"
    ):
        raise Refused(f"{node.name} is an incomplete sparse matrix. Save the cells with adata.write_h5ad.")
    if data.size > limits["nonzero"]:
        raise Refused(f"{data.size:,} values; at most {limits['nonzero']:,} are read. Upload fewer cells.")
    rows, columns = shape if kind == "csr_matrix" else shape[::-1]
    parts = data[:], indices[:].astype(np.int64), indptr[:].astype(np.int64)
    consistent = (
        len(parts[2]) == rows + 1
        and len(parts[0]) == len(parts[1])
        and parts[2][0] == 0
        and parts[2][-1] == len(parts[0])
        and (np.diff(parts[2]) >= 0).all()
        and (len(parts[1]) == 0 or (parts[1].min() >= 0 and parts[1].max() < columns))
    )
    if not consistent:
        raise Refused(
            f"{node.name}: the indices do not fit {shape[0]:,} cells x {shape[1]:,} genes. The file is damaged."
        )
    if kind == "csc_matrix":
        parts = transposed(*parts, n_rows=shape[0])
    return *parts, shape  # type: ignore[return-value]


def transposed(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, *, n_rows: int) -> tuple[Any, Any, Any]:
    """CSR from CSC."""
    columns = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    order = np.argsort(indices, kind="stable")
    return data[order], columns[order], np.append(0, np.cumsum(np.bincount(indices, minlength=n_rows)))


def read_dense(
    dataset: h5py.Dataset, limits: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    if dataset.ndim != 2 or dataset.dtype.kind not in "iufb":
        raise Refused(f"{dataset.name}: expected a matrix of numbers, found {dataset.ndim} axes of {dataset.dtype}.")
    check_size(dataset.shape, limits)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    lengths = [0]
    for start in range(0, dataset.shape[0], ROWS_AT_ONCE):
        block = dataset[start : start + ROWS_AT_ONCE]
        cells, genes = np.nonzero(block)
        rows.append((block[cells, genes], genes))
        lengths.extend(np.bincount(cells, minlength=len(block)))
        if sum(len(values) for values, _ in rows) > limits["nonzero"]:
            raise Refused(f"More than {limits['nonzero']:,} values that are not 0. Upload fewer cells.")
    values, genes = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return values, genes, np.cumsum(lengths), dataset.shape


def is_counts(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.rint(values)).all())


def matrices(file: h5py.File, limits: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Where counts may be: name, matrix and the table of its genes."""
    for path in ("X", "layers/counts", "raw/X"):
        *groups, name = path.split("/")
        home: Any = file
        for group in groups:
            home = child(home, group, limits)
            if not isinstance(home, h5py.Group):
                break
        else:
            node = child(home, name, limits)
            if node is not None:
                yield path, node, child(home if groups == ["raw"] else file, "var", limits)


def read_strings(dataset: h5py.Dataset) -> np.ndarray:
    """(n,) text, as NumPy's own type: no Python objects leave this program."""
    if dataset.dtype.kind in "OS":
        values = dataset.asstr(errors="replace")[:] if h5py.check_string_dtype(dataset.dtype) else None
        if values is not None:
            return np.asarray(values, dtype=object)
    raise Refused(f"{dataset.name}: expected text, found {dataset.dtype}.")


def read_column(table: h5py.Group, name: str, n: int, limits: dict[str, Any]) -> np.ndarray | None:
    """(n,) text or numbers of a column; None for kinds that are not read (dates, nested tables, ...)."""
    node = child(table, name, limits)
    if isinstance(node, h5py.Group):
        if text(node.attrs, "encoding-type") != "categorical":
            return None
        codes, categories = child(node, "codes", limits), child(node, "categories", limits)
        if not isinstance(codes, h5py.Dataset) or not isinstance(categories, h5py.Dataset):
            return None
        if codes.dtype.kind not in "iu" or codes.shape != (n,) or categories.ndim != 1:
            raise Refused(f"{node.name} is a damaged categorical column.")
        names = read_strings(categories) if categories.dtype.kind in "OS" else categories[:].astype(str)
        values = codes[:].astype(np.int64)
        if len(values) and (values.max() >= len(names) or values.min() < -1):
            raise Refused(f"{node.name} is a damaged categorical column.")
        return np.append(names, "")[values] if len(names) else np.full(n, "")
    if not isinstance(node, h5py.Dataset) or node.shape != (n,):
        return None
    if node.dtype.kind in "iufb":
        return node[:]
    return read_strings(node) if h5py.check_string_dtype(node.dtype) else None


def read_table(node: Any, n: int, limits: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Names and columns of obs or var."""
    if not isinstance(node, h5py.Group):
        raise Refused("obs or var is missing or of an old layout. Open the file with anndata 0.8 or later and save it.")
    index_name = text(node.attrs, "_index") or "_index"
    index = read_column(node, index_name, n, limits)
    if index is None:
        raise Refused(
            f"{node.name} has no {n:,} names. The file is damaged, or matrix and tables do not belong together."
        )
    if len(node) > MAX_NODES:
        raise Refused(f"{node.name} has {len(node):,} columns; at most {MAX_NODES:,}.")
    columns: dict[str, np.ndarray] = {}
    for name in list(node):
        if name != index_name and len(columns) < MAX_COLUMNS:
            column = read_column(node, name, n, limits)
            if column is not None:
                columns[name[:60]] = column
    return index.astype(str), columns


def plain(values: np.ndarray, limits: dict[str, Any]) -> np.ndarray:
    """Text as a fixed-width array, cut to the width that names have."""
    if values.dtype.kind != "O":
        return values
    return np.asarray([str(value)[: limits["text_length"]] for value in values], dtype=np.str_)


def raw_counts(file: h5py.File, limits: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first matrix of whole numbers: its name, `read_matrix` of it, and the table of its genes."""
    found: list[str] = []
    for name, node, genes in matrices(file, limits):
        matrix = read_matrix(node, limits)
        if is_counts(matrix[0]):
            return name, matrix, genes
        unexpected = [value for value in matrix[0] if not (value >= 0 and value == np.rint(value))][:1]
        found.append(f"{name}: {unexpected[0]:.4g}")
    if not found:
        raise Refused("The file holds no matrix X. Save the cells with adata.write_h5ad.")
    raise Refused(
        f"Expected raw counts (whole numbers) in X, layers/counts or raw, found other values ({'; '.join(found)}). "
        "Save the counts as X before normalizing them."
    )


def read(path: str, limits: dict[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """Arrays by name, and where the counts were."""
    with h5py.File(path, "r", locking=False) as file:
        name, (data, indices, indptr, shape), genes = raw_counts(file, limits)
        arrays: dict[str, np.ndarray] = {
            "data": data.astype(np.float32),
            "indices": indices.astype(np.int32),
            "indptr": indptr.astype(np.int64),
            "shape": np.asarray(shape),
        }
        for table, axis, node in (("obs", 0, child(file, "obs", limits)), ("var", 1, genes)):
            index, columns = read_table(node, shape[axis], limits)
            arrays[f"{table}/index"] = plain(index.astype(object), limits)
            arrays |= {f"{table}/column/{key}": plain(values, limits) for key, values in columns.items()}
        return arrays, name


def main() -> int:
    path, output, options = sys.argv[1:]
    limits = json.loads(options)
    limit_process(limits)
    try:
        arrays, name = read(path, limits)
    except Refused as error:
        print(json.dumps({"refused": str(error)}))
        return 1
    except (MemoryError, OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        # What h5py raises on damaged files, and where HDF5 gets no more memory
        reason = f"is damaged, no .h5ad, or takes more than {limits['memory'] / 1e6:,.0f} MB to read"
        print(json.dumps({"refused": f"The file {reason} ({type(error).__name__}). Upload another, or fewer cells."}))
        return 1
    with open(output, "wb") as file:
        # Arrays are numbered, as members of a zip file should not be called what a stranger chose
        names = list(arrays)
        np.savez(file, allow_pickle=False, **{f"array{i}": arrays[key] for i, key in enumerate(names)})
    print(json.dumps({"counts": name, "names": names}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
