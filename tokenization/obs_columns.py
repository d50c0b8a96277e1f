"""Cell annotations as Arrow columns."""

from typing import Any


def obs_column(values: Any) -> Any:
    """A column of obs as one Arrow array: its type must not depend on the block, which may hold missing values only.

    Raises  ValueError if the column mixes types
    """
    import pyarrow as pa

    try:
        column = pa.array(values.astype(object) if values.dtype == "category" else values, from_pandas=True)
    except pa.ArrowException as error:
        raise ValueError(f"obs[{values.name!r}] mixes types ({error}); convert it, e.g. with .astype(str).") from error
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
