"""Human cortex: about 50,000 nuclei of six cortical areas, SMART-seq v4, with the Allen Institute's taxonomy.

The files are `matrix.csv` (nuclei x about 50,000 genes, reads in introns and exons, first column `sample_name`) and
`metadata.csv`, joined by `sample_name`. Nuclei that the Allen Institute calls outliers (`outlier_call` True) have no
labels; they are left out of the config `default`, and kept, flagged, in the config `with_outliers`.

    python datasets_scripts/human_cortex.py --output data/human_cortex
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
from datasets.utils import tqdm

from cellglot.datasets_scripts import csv_counts
from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line
from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_features, ragged_table

FOLDER = "https://idk-etl-prod-download-bucket.s3.amazonaws.com/aibs_human_ctx_smart-seq"
# The Allen Institute publishes no checksums.
FILES = [Source("matrix.csv", f"{FOLDER}/matrix.csv"), Source("metadata.csv", f"{FOLDER}/metadata.csv")]
LABELS = ("subclass_label", "class_label", "cluster_label", "region_label")
# Further columns that are worth a split or a covariate
OTHER_LABELS = ("cortical_layer_label", "external_donor_name_label", "donor_sex_label")
# About 4,500 nuclei
BYTES_PER_PART = 512 << 20


class HumanCortex(CorpusBuilder):
    """Nuclei of human cortex; configs without and with those called outliers."""

    VERSION = datasets.Version("1.0.0")
    SOURCES = {"default": FILES, "with_outliers": FILES}
    CARD = {
        "license": "other",
        "license_name": "allen-institute-terms-of-use",
        "license_link": "https://alleninstitute.org/terms-of-use/",
        "pretty_name": "Human cortex, multiple areas, SMART-seq",
        "tags": ["biology", "single-cell", "human", "brain"],
    }
    LABELS = LABELS
    ROWS = "nuclei"

    def _info(self) -> datasets.DatasetInfo:
        labels = {name: datasets.Value("string") for name in (*LABELS, *OTHER_LABELS)}
        outliers = "left out" if self.config.name == "default" else "kept, with outlier_call true and no labels"
        return datasets.DatasetInfo(
            description=(
                "Single-nucleus read counts (introns and exons) of six human cortical areas. Genes go by the symbols "
                f"of matrix.csv. Nuclei that the Allen Institute calls outliers are {outliers}."
            ),
            features=ragged_features({**labels, "outlier_call": datasets.Value("bool")}),
            homepage="https://portal.brain-map.org/atlases-and-data/rnaseq/human-multiple-cortical-areas-smart-seq",
            license="Terms of use of the Allen Institute, https://alleninstitute.org/terms-of-use/",
            citation=(
                "Hodge et al., Conserved cell types with divergent features in human versus mouse cortex, Nature 573, "
                "61-68 (2019), doi:10.1038/s41586-019-1506-7"
            ),
        )

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        matrix = files["matrix.csv"]
        size = matrix.stat().st_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"Lines of {matrix.name}") as bar:
            n_rows, n_samples = csv_counts.count_rows(matrix, bar.update), len(_metadata(files))
        if n_rows != n_samples:
            raise CorpusError(
                f"{matrix} has {n_rows:,} nuclei, metadata.csv {n_samples:,}: one of them is truncated or of another "
                "release. Fetch both again."
            )
        starts = range(0, size, BYTES_PER_PART)
        return {"train": [Part("matrix.csv", start, min(start + BYTES_PER_PART, size)) for start in starts]}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        metadata = _metadata(files)
        for names, counts in csv_counts.blocks(files[part.file], part.start, part.stop):
            positions = metadata.index.get_indexer(pd.Index(names))
            if (positions < 0).any():
                unknown = [name for name, position in zip(names, positions, strict=True) if position < 0]
                raise CorpusError(
                    f"{files['metadata.csv']} lacks {len(unknown):,} of {len(names):,} nuclei of {part.file} (e.g. "
                    f"{unknown[0]!r}). Both have to be of one release: fetch them again."
                )
            obs = metadata.iloc[positions]
            if self.config.name == "default":
                kept = ~obs["outlier_call"].to_numpy()
                obs, counts = obs[kept], counts[kept]
            yield ragged_table(counts, obs)

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        columns, _ = csv_counts.header(files["matrix.csv"])
        require_columns(columns[:1], ["sample_name"], f"{files['matrix.csv']}, first of {len(columns):,} columns,")
        return {GENE_TABLE: pd.DataFrame({"gene_id": columns[1:]})}


def _metadata(files: dict[str, Path]) -> pd.DataFrame:
    """(nuclei,) labels by sample_name, None where there is none; outlier_call as bool."""
    path = files["metadata.csv"]
    # Text as it stands: a region or gene named NA is no missing value.
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    require_columns(table, ["sample_name", *LABELS, "outlier_call"], path)
    table = table.reindex(columns=["sample_name", *LABELS, *OTHER_LABELS, "outlier_call"])
    table = table.set_index("sample_name").replace("", None)
    if not table.index.is_unique:
        raise CorpusError(f"{path} names {table.index[table.index.duplicated()][0]!r} twice. Fetch it again.")
    calls = table["outlier_call"].str.lower()
    if not calls.isin(["true", "false"]).all():
        other = table["outlier_call"][~calls.isin(["true", "false"])].iloc[0]
        raise CorpusError(f"{path}: expected True or False in outlier_call, found {other!r}. Fetch it again.")
    return table.assign(outlier_call=calls == "true")


if __name__ == "__main__":
    command_line(HumanCortex)
