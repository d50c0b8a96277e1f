"""Genes of an upload, by whichever of its names the model knows."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellglot.serving import counted, name_genes
from cellglot.tokenization.gene_ids import GeneResolver

IDS = [f"ENSG{i:011d}" for i in range(40)]
SYMBOLS = [f"GENE{i}" for i in range(40)]
MODEL = GeneResolver(IDS[:30], dict(zip(SYMBOLS, IDS, strict=True)))


def cells(index: list[str], **columns: list[str]) -> ad.AnnData:
    counts = np.arange(3 * len(index), dtype=np.float32).reshape(3, -1)
    return ad.AnnData(counts, var=pd.DataFrame(columns, index=pd.Index(index)))


@pytest.mark.parametrize(
    "adata",
    [
        cells(IDS),
        cells([f"{name}.7" for name in IDS]),
        cells([name.lower() for name in SYMBOLS]),
        cells([str(i) for i in range(40)], anything=SYMBOLS, other=["x"] * 40),
    ],
    ids=["ids", "versions", "symbols", "column"],
)
def test_genes_get_the_models_names_and_keep_their_counts(adata: ad.AnnData) -> None:
    named, said = name_genes(adata, MODEL)
    assert list(named.var_names[:30]) == IDS[:30]
    assert not set(named.var_names[30:]) & set(IDS[:30])
    np.testing.assert_array_equal(named.X, adata.X)
    assert said == "30 of the 30 genes that the model knows are among theirs"


def test_two_names_of_a_gene_count_once() -> None:
    with pytest.warns(UserWarning, match="not unique"):
        named, said = name_genes(cells([IDS[0], SYMBOLS[0], IDS[1]]), MODEL)
    assert list(named.var_names) == [IDS[0], IDS[0], IDS[1]]
    assert said.startswith("2 of the 30")


def test_cells_of_other_genes_are_refused_in_words() -> None:
    other = [f"other{i}" for i in range(40)]
    with pytest.raises(ValueError, match=r"such as 'ENSG0.*, 30 in all, found 41 .* knows 1\."):
        name_genes(cells([*other, SYMBOLS[3]]), MODEL)
    # A tenth of those that could match is enough
    named, _ = name_genes(cells([*other, *SYMBOLS[3:6]]), MODEL)
    assert list(named.var_names[-3:]) == IDS[3:6]


def test_how_many_cells_are_looked_at() -> None:
    assert counted(2000, 31_000) == "**2,000 of 31,000 cells**"
    assert counted(1234, 1234) == "**1,234 cells**"
