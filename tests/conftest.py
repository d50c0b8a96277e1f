"""Fixtures shared by all tests.

No test needs a network, nor sees what earlier versions left in a cache: the Hub client is told so before its import.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cellglot-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own: threads that wait for each other must not spin on another's
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellglot.tokenization.rank_value import SPECIAL_TOKENS, RankValueTokenizer

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("CELLGLOT_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("realdata") and not REAL_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{REAL_DATA} is absent; set CELLGLOT_DATA"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    return REAL_DATA


def ensembl(n: int, start: int = 1) -> list[str]:
    """n human gene ids."""
    return [f"ENSG{i:011d}" for i in range(start, start + n)]


def vocabulary_table(genes: list[str], medians: Sequence[float] | np.ndarray, layout: str = "v1") -> pd.DataFrame:
    special = SPECIAL_TOKENS[layout]
    tokens = [*special, *genes]
    return pd.DataFrame(
        {
            "token": tokens,
            "token_id": np.arange(len(tokens)),
            "nonzero_median": [np.nan] * len(special) + list(medians),
        }
    )


def make_tokenizer(
    n_genes: int = 7, layout: Literal["v1", "v2"] = "v1", medians: np.ndarray | None = None, **options
) -> RankValueTokenizer:
    medians = np.ones(n_genes) if medians is None else medians
    return RankValueTokenizer.from_vocabulary(vocabulary_table(ensembl(n_genes), medians, layout), layout, **options)


def synthetic_cells(n_cells: int, n_genes: int, seed: int = 0, density: float = 0.4) -> Any:
    """Cells of three types with type-specific genes, as integer counts in CSR."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.5, 4, size=(3, n_genes)) * (rng.random((3, n_genes)) < density)
    cell_type = rng.integers(3, size=n_cells)
    counts = rng.poisson(rate[cell_type]).astype(np.float32)
    obs = pd.DataFrame(
        {"cell_type": np.array(["B", "NK", "T"])[cell_type], "donor": rng.integers(4, size=n_cells).astype(str)},
        index=pd.Index([f"cell{i}" for i in range(n_cells)]),
    )
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=pd.Index(ensembl(n_genes))))
