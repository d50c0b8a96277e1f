"""Gene expression and chromatin accessibility of the same bone marrow cells: the NeurIPS 2021 multiome benchmark.

69,249 mononuclear cells of ten donors, measured at four sites (GEO GSE194122, 10x Multiome): 13,431 genes and 116,490
peaks. A row is a cell: `gene_index` and `count` as in every corpus, `peak_index` and `peak_count` likewise for the
peaks of `peaks.parquet` (BED coordinates on GRCh38, 0-based, end excluded).

    python datasets_scripts/bmmc_multiome.py --output data/bmmc                      # the whole file of GEO
    python datasets_scripts/bmmc_multiome.py --config gex2atac --output data/bmmc    # the competition's own split files

Splits are the competition's, by batch (site and donor), never by cell: train, validation (its test set of phase 1:
s1d2, s3d7) and test (that of phase 2, final: site 4). Site 4 measured donor 1 too, who is in train at sites 1 and 2:
drop batch s4d1 where a donor must be new as well as the site. The configs `gex2atac` and `atac2gex` are the files of
phase 2 of "predict modality" as competitors had them: train and test (1,000 cells drawn of site 4), and 10,000 peaks
where peaks are what is predicted. Their counts are read, not the normalized values in X.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line, row_parts
from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_columns, ragged_features, ragged_table
from cellglot.datasets_scripts.source_counts import source_counts
from cellglot.tokenization.count_matrix import CountMatrix, check_counts
from cellglot.tokenization.gene_ids import examples

PEAK_TABLE = "peaks.parquet"
COUNTS = "counts"  # the layer; X is normalized
GEO_FILE = "GSE194122_openproblems_neurips2021_multiome_BMMC_processed.h5ad.gz"
GEO = "https://ftp.ncbi.nlm.nih.gov/geo/series/GSE194nnn/GSE194122/suppl"
COMPETITION = "https://openproblems-bio.s3.amazonaws.com/public/phase2-private-data/predict_modality"
# What the competition calls them: modality 1 is given, modality 2 is predicted.
DATASETS = {"gex2atac": "openproblems_bmmc_multiome_phase2_rna", "atac2gex": "openproblems_bmmc_multiome_phase2_mod2"}
# Source: openproblems-bio/neurips2021_multimodal_viash, src/common/datasets/process_inhouse_datasets
SPLIT_OF_BATCH = {
    **dict.fromkeys(("s1d1", "s1d3", "s2d1", "s2d4", "s2d5", "s3d3", "s3d6", "s3d10"), "train"),
    **dict.fromkeys(("s1d2", "s3d7"), "validation"),
    **dict.fromkeys(("s4d1", "s4d8", "s4d9"), "test"),
}


@dataclass(frozen=True)
class SplitPart(Part):
    """The cells of one split among those of a range of rows."""

    split: str = ""


def _competition_sources(dataset: str) -> list[Source]:
    names = [f"{dataset}.censor_dataset.output_{s}_mod{m}.h5ad" for s in ("train", "test") for m in (1, 2)]
    return [Source(name, f"{COMPETITION}/{dataset}/{name}") for name in names]


class BMMCMultiome(CorpusBuilder):
    """Paired expression and chromatin accessibility of single cells; splits by site and donor."""

    VERSION = datasets.Version("1.0.0")
    SOURCES = {
        "default": [Source(GEO_FILE, f"{GEO}/{GEO_FILE}", unpack=True)],
        **{config: _competition_sources(dataset) for config, dataset in DATASETS.items()},
    }
    # The picture shows the first, which all configs have.
    LABELS = ("batch", "cell_type")
    CARD = {
        "license": "unknown",
        "pretty_name": "BMMC multiome (NeurIPS 2021)",
        "tags": ["biology", "single-cell", "multiome", "scATAC-seq"],
    }

    @property
    def _labels(self) -> list[str]:
        # The competition kept cell types to itself.
        return ["cell_type", "batch"] if self.config.name == "default" else ["batch"]

    def _info(self) -> datasets.DatasetInfo:
        features = ragged_features({name: datasets.Value("string") for name in (*self._labels, "site", "donor")})
        features["peak_index"] = datasets.List(datasets.Value("int32"))
        features["peak_count"] = datasets.List(datasets.Value("float32"))
        return datasets.DatasetInfo(
            description=__doc__ or "",
            features=features,
            homepage="https://www.ncbi.nlm.nih.gov/geo/query/acc.cgi?acc=GSE194122",
            license="GEO states none; see https://www.ncbi.nlm.nih.gov/geo/info/disclaimer.html",
            citation="Luecken et al., A sandbox for prediction and integration of DNA, RNA, and proteins in single "
            "cells, NeurIPS Datasets and Benchmarks (2021)",
        )

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        if self.config.name != "default":
            return {split: self._paired_parts(files, f"output_{split}_mod1.h5ad") for split in ("train", "test")}
        with source_counts(files[GEO_FILE], COUNTS) as matrix:
            require_columns(matrix.obs, self._labels, matrix.name)
            split_of_cell = _split_of_cell(matrix)
            parts: dict[str, list[Part]] = {}
            for split in dict.fromkeys(SPLIT_OF_BATCH.values()):
                inside = split_of_cell == split
                ranges = [(p.start, p.stop, int(inside[p.start : p.stop].sum())) for p in row_parts("", len(inside))]
                parts[split] = [SplitPart(GEO_FILE, a, b, n, split) for a, b, n in ranges if n]
            # A subset of the batches may lack a split; the published file has them all.
            return {split: found for split, found in parts.items() if found}

    def _paired_parts(self, files: dict[str, Path], ending: str) -> list[Part]:
        first = next(name for name in files if name.endswith(ending))
        with source_counts(files[first], COUNTS) as mod1, source_counts(files[_other(first)], COUNTS) as mod2:
            require_columns(mod1.obs, self._labels, mod1.name)
            if not mod1.obs.index.equals(mod2.obs.index):
                raise CorpusError(
                    f"{mod1.name} and {mod2.name} are not of the same cells in the same order ({mod1.n_cells:,} and "
                    f"{mod2.n_cells:,}): expected both files of one split of 'predict modality'."
                )
            return row_parts(first, mod1.n_cells)

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        with source_counts(files[part.file], COUNTS) as matrix:
            if isinstance(part, SplitPart):
                of_split = _split_of_cell(matrix) == part.split
                yield from self._blocks(matrix, matrix, part, of_split)
                return
            with source_counts(files[_other(part.file)], COUNTS) as other:
                cells = np.ones(matrix.n_cells, dtype=bool)
                yield from self._blocks(*_by_modality(matrix, other), part, cells)

    def _blocks(self, expression: CountMatrix, peaks: CountMatrix, part: Part, cells: np.ndarray) -> Iterator[pa.Table]:
        """Rows of the cells of a part that are marked, from one file with both modalities, or two."""
        genes, chromatin = _columns(expression, "GEX"), _columns(peaks, "ATAC")
        obs = expression.obs[self._labels].astype("string")
        obs[["site", "donor"]] = obs["batch"].str.extract(r"^(s\d+)(d\d+)$")
        for start, stop in part.blocks():
            if not cells[start:stop].any():
                continue
            rows, counts = expression.read_block(start, stop, cells)
            check_counts(expression, rows, counts)
            accessible = counts
            if peaks is not expression:
                accessible = peaks.read_block(start, stop, cells)[1]
                check_counts(peaks, rows, accessible)
            table = ragged_table(counts[:, genes], obs.iloc[rows])
            for name, column in ragged_columns(accessible[:, chromatin], "peak_index", "peak_count").items():
                table = table.append_column(name, column)
            yield table

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        tables = []
        for name in files:
            if name.endswith("_mod2.h5ad"):
                continue
            with source_counts(files[name], COUNTS) as first, source_counts(files[_other(name)], COUNTS) as second:
                expression, peaks = _by_modality(first, second)
                tables.append({GENE_TABLE: _gene_table(expression), PEAK_TABLE: _peak_table(peaks)})
        for name, table in tables[0].items():
            if not table.equals(tables[-1][name]):
                raise CorpusError(f"train and test differ in their {name}: expected the files of one phase and task.")
        return tables[0]


def _other(name: str) -> str:
    """The file with the other modality of the same cells: itself, where one file has both."""
    return name.replace("_mod1.h5ad", "_mod2.h5ad")


def _split_of_cell(matrix: CountMatrix) -> np.ndarray:
    """(cells,) the split of each cell's batch."""
    batches = matrix.obs["batch"].astype(str)
    unknown = sorted(set(batches) - set(SPLIT_OF_BATCH))
    if unknown:
        raise CorpusError(
            f"{matrix.name}: obs['batch'] has {examples(unknown)}, of which the competition's splits know nothing; "
            f"expected some of {', '.join(SPLIT_OF_BATCH)}."
        )
    return batches.map(SPLIT_OF_BATCH).to_numpy()


def _columns(matrix: CountMatrix, modality: str) -> np.ndarray:
    """Positions of the features of a modality, "GEX" or "ATAC"."""
    require_columns(matrix.var, ["feature_types"], f"{matrix.name}: var")
    columns = np.flatnonzero(matrix.var["feature_types"] == modality)
    if not len(columns):
        found = examples(matrix.var["feature_types"].unique())
        raise CorpusError(f"{matrix.name}: no feature has var['feature_types'] {modality!r}; there is {found}.")
    return columns


def _by_modality(first: CountMatrix, second: CountMatrix) -> tuple[CountMatrix, CountMatrix]:
    """(matrix with genes, matrix with peaks) of two that may be the same."""
    require_columns(first.var, ["feature_types"], f"{first.name}: var")
    return (first, second) if (first.var["feature_types"] == "GEX").any() else (second, first)


def _gene_table(matrix: CountMatrix) -> pd.DataFrame:
    genes = _columns(matrix, "GEX")
    ids = np.asarray(matrix.gene_names(), dtype=object)
    return pd.DataFrame({"gene_id": ids[genes], "gene_symbol": matrix.var.index.astype(str)[genes]})


def _peak_table(matrix: CountMatrix) -> pd.DataFrame:
    """Peaks named chr-start-end; names of scaffolds, such as GL000194.1, are chromosomes too."""
    names = pd.Series(matrix.var.index.astype(str)[_columns(matrix, "ATAC")])
    fields = names.str.extract(r"^(?P<chromosome>.+)-(?P<start>\d+)-(?P<end>\d+)$")
    bad = fields["start"].isna()
    if bad.any():
        raise CorpusError(
            f"{matrix.name}: {bad.sum():,} peaks are not named chr-start-end, e.g. {examples(names[bad])}. "
            "Check that var_names are those of the published file."
        )
    peaks = pd.DataFrame({"peak_id": names, "chromosome": fields["chromosome"]})
    return peaks.assign(start=fields["start"].astype("int64"), end=fields["end"].astype("int64"))


if __name__ == "__main__":
    command_line(BMMCMultiome)
