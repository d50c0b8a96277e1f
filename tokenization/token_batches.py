"""Encoded blocks as Arrow record batches, without a Python object a cell."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .block_encoding import EncodedBlock


def token_batch(block: EncodedBlock, obs: Mapping[str, Any], *, drop_empty: bool) -> Any:
    """A record batch: input_ids (list of int32, sharing memory with the block), length, and the columns of obs.

    obs         Arrow arrays over all cells of the file
    drop_empty  leaves out cells without tokens
    Raises      ValueError for more tokens than the 32-bit offsets of a list column can tell apart
    """
    import pyarrow as pa

    if block.offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"A block of {len(block.rows):,} cells has {block.offsets[-1]:,} tokens, but one of Arrow's lists holds "
            f"{np.iinfo(np.int32).max:,} at the most. Lower cells_per_block."
        )
    lengths = np.diff(block.offsets).astype(np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(block.offsets.astype(np.int32)), pa.array(block.tokens)),
        "length": pa.array(lengths),
    }
    columns |= {name: column.take(pa.array(block.rows)) for name, column in obs.items()}
    batch = pa.RecordBatch.from_pydict(columns)
    return batch.filter(pa.array(lengths > 0)) if drop_empty else batch
