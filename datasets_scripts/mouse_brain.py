"""Mouse nervous system: 160,796 cells of 19 regions, 10x Chromium, with the taxonomy of mousebrain.org.

`l5_all.loom` is HDF5 with 27,998 genes x 160,796 cells of UMI counts, stored dense and compressed. Row attributes
`Accession` (Ensembl id) and `Gene` become gene_id and gene_symbol, column attributes the cells' labels.

    python datasets_scripts/mouse_brain.py --output data/mouse_brain
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line, row_parts
from cellglot.datasets_scripts.corpus_errors import require_columns
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_features, ragged_table
from cellglot.datasets_scripts.source_counts import source_counts

LOOM = "l5_all.loom"
LABELS = (
    "Class",
    "ClusterName",
    "TaxonomyRank1",
    "TaxonomyRank2",
    "TaxonomyRank3",
    "TaxonomyRank4",
    "Tissue",
    "Region",
)


class MouseBrain(CorpusBuilder):
    """Cells of the adolescent mouse nervous system."""

    VERSION = datasets.Version("1.0.0")
    # The authors publish no checksum.
    SOURCES = {"default": [Source(LOOM, f"https://storage.googleapis.com/linnarsson-lab-loom/{LOOM}")]}
    CARD = {
        "license": "other",
        "license_name": "none-stated",
        "license_link": "http://mousebrain.org",
        "pretty_name": "Mouse nervous system (mousebrain.org)",
        "tags": ["biology", "single-cell", "mouse", "brain"],
    }
    LABELS = LABELS

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=(
                "UMI counts of cells of the adolescent mouse nervous system, with cell type and region. Genes go by "
                "Ensembl id; genes.parquet has their symbols."
            ),
            features=ragged_features({name: datasets.Value("string") for name in LABELS}),
            homepage="http://mousebrain.org",
            license="None stated by the authors; ask them before you pass the data on.",
            citation=(
                "Zeisel et al., Molecular Architecture of the Mouse Nervous System, Cell 174, 999-1014 (2018), "
                "doi:10.1016/j.cell.2018.06.021"
            ),
        )

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        with source_counts(files[LOOM]) as counts:
            require_columns(counts.obs, ["CellID", *LABELS], f"{files[LOOM]} (column attributes)")
            require_columns(counts.var, ["Accession", "Gene"], f"{files[LOOM]} (row attributes)")
            return {"train": row_parts(LOOM, counts.n_cells)}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        with source_counts(files[LOOM]) as counts:
            obs = counts.obs[list(LABELS)]
            for start, stop in part.blocks():
                yield ragged_table(counts.read_block(start, stop)[1], obs.iloc[start:stop])

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        with source_counts(files[LOOM]) as counts:
            columns = {"gene_id": "Accession", "gene_symbol": "Gene"}
            return {GENE_TABLE: pd.DataFrame({new: counts.var[old].to_numpy() for new, old in columns.items()})}


if __name__ == "__main__":
    command_line(MouseBrain)
