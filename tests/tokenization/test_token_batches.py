"""Encoded blocks as Arrow record batches."""

import numpy as np
import pytest

from cellglot.tokenization.block_encoding import EncodedBlock
from cellglot.tokenization.token_batches import token_batch


def test_more_tokens_than_a_list_column_holds_are_refused():
    # Only the offsets matter: the tokens themselves would take 8 GB.
    block = EncodedBlock(np.arange(2), np.empty(0, np.int32), np.array([0, 5, 2**31]), 0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"2,147,483,648 tokens.*Lower cells_per_block"):
        token_batch(block, {}, drop_empty=False)
