"""sci-Plex 3: single cells of three cancer lines after 188 drugs at four doses (Srivatsan et al., Science 2020).

A549, K562 and MCF7, 24 hours (some A549 wells 72) at 10 nM to 10 uM, wells with vehicle only as controls; nuclei were
labelled with a hash for well and plate before they were pooled. `dose_um` is in MICROMOLAR everywhere: the sources give
nanomolar, which is divided by 1,000; it is 0 where `vehicle` is true. `smiles` is the structure of the drug (without
the drawing hints of ChemAxon that follow a blank in the source), null for vehicle.

    python datasets_scripts/sciplex3.py --output data/sciplex3                               # GEO GSM4150378
    python datasets_scripts/sciplex3.py --config scperturb --output data/sciplex3            # scPerturb's .h5ad
    python datasets_scripts/sciplex3.py --config h5ad --data-dir FOLDER --output data/sciplex3

default    the triplet text of GEO: all 799,317 nuclei and 110,983 genes (human, and the mouse genes of the joint
           reference), with the figures of hash calling. The paper keeps nuclei with 5 hash molecules and a ratio of 5
           for well and plate each. Nuclei without a called well have null treatments
scperturb  the same as harmonized by scPerturb, release 1.4. Earlier releases name each gene by the one before it and
           are refused. Structures are joined from GEO's table by the name of the drug
chemcpa    the nuclei and 2,000 genes that chemCPA kept: `expression`, log(1 + counts scaled to the median depth), not
           `count`
h5ad       every .h5ad in --data-dir with raw counts (layer "counts", else X) and obs as in these suites: cell_type or
           cell_line; product_name, condition or perturbation; dose or dose_value in nM (or in the unit of dose_unit);
           and, where there are such, SMILES, pathway, target, replicate, time_point or time, vehicle or control

There is one split, `train`: the authors published none. Hold out whole drugs, doses, lines or replicates, never cells.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import h5py
import pandas as pd
import pyarrow as pa
import pyarrow.feather

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line, parts_folder, row_parts
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.matrix_triplet import is_by_cell, sort_by_cell, triplet_blocks
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_columns, ragged_features
from cellglot.datasets_scripts.sciplex3_annotations import (
    TREATMENT,
    WELL_AND_HASHES,
    check_suite,
    drug_key,
    read_genes,
    read_obs,
    read_wells,
    suite_genes,
    suite_treatments,
)
from cellglot.datasets_scripts.source_counts import source_counts
from cellglot.tokenization.count_matrix import check_counts
from cellglot.tokenization.gene_ids import examples

GEO = "https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM4150nnn/GSM4150378/suppl"
MATRIX = "GSM4150378_sciPlex3_A549_MCF7_K562_screen_UMI.count.matrix.gz"
CELLS = "GSM4150378_sciPlex3_A549_MCF7_K562_screen_cell.annotations.txt.gz"
GENES = "GSM4150378_sciPlex3_A549_MCF7_K562_screen_gene.annotations.txt.gz"
PDATA = "GSM4150378_sciPlex3_pData.txt.gz"
WELLS = "GSM4150378_sciPlex3_A549_MCF7_K562_hashTable_metadata.txt.gz"
# GEO publishes no checksums; these are what a published reanalysis recorded of its files.
SHA256 = {
    MATRIX: "7d632716aa6ed0fc1780996003d0abc440ff78340609bceaaa4c8ade9345d00a",
    CELLS: "5db11591747a49f07ceb90a070971d60816591911f1022171adba7d8d032f379",
    GENES: "fbe43028cfb75dc5ebf383cbbbb100da6b51e7be8e2e74f6354f7c59b9fda7c2",
    PDATA: "860ba5c21846e2cfe97c39c805895982ef9db4b108cdf8b841a4a91be65024c2",
    WELLS: "98a65191d343d149c5742cf6e7b734d403e853d165da800fa2daea41b978a2ff",
}
SCPERTURB = "SrivatsanTrapnell2020_sciplex3.h5ad"
CHEMCPA = "sciplex_complete_middle_subset.h5ad"
# Made here of the cells' annotations, in the order of the matrix, and kept on disk for the parts to read
OBS = "obs.feather"


def _geo(name: str, *, unpack: bool = False) -> Source:
    return Source(name, f"{GEO}/{name}", f"sha256:{SHA256[name]}", unpack)


class SciPlex3(CorpusBuilder):
    """Counts, drug, dose in micromolar, structure and cell line of each nucleus."""

    VERSION = datasets.Version("1.0.0")
    SOURCES = {
        "default": [_geo(MATRIX, unpack=True), _geo(CELLS), _geo(GENES), _geo(PDATA), _geo(WELLS)],
        "scperturb": [
            Source(
                SCPERTURB,
                f"https://zenodo.org/records/13350497/files/{SCPERTURB}",
                "md5:c9e70629505d98c7ca1a837f62b14e89",
            ),
            _geo(WELLS),
        ],
        "chemcpa": [Source(CHEMCPA, f"https://f003.backblazeb2.com/file/chemCPA-datasets/{CHEMCPA}")],
        "h5ad": [],
    }
    LABELS = ("cell_type", "pathway", "dose_um", "product_name")
    CARD = {"license": "other", "pretty_name": "sci-Plex 3", "tags": ["biology", "single-cell", "drug-response"]}

    @property
    def _value(self) -> str:
        return "expression" if self.config.name == "chemcpa" else "count"

    def _info(self) -> datasets.DatasetInfo:
        columns = TREATMENT | (WELL_AND_HASHES if self.config.name == "default" else {})
        features = ragged_features({name: datasets.Value(kind) for name, kind in columns.items()})
        features[self._value] = features.pop("count")
        return datasets.DatasetInfo(
            description=__doc__ or "",
            features=features,
            homepage="https://www.ncbi.nlm.nih.gov/geo/query/acc.cgi?acc=GSM4150378",
            license="GEO states none; scPerturb: CC BY 4.0",
            citation="Srivatsan et al., Science 367, 45-51 (2020), doi:10.1126/science.aax6234",
        )

    def sources(self) -> Sequence[Source]:
        if self.config.name != "h5ad":
            return super().sources()
        folder = Path(self.config.data_dir or ".")
        names = sorted(path.name for path in folder.glob("*.h5ad")) if self.config.data_dir else []
        if not names:
            given = self.config.data_dir or "a folder not given"
            raise CorpusError(f"Config h5ad reads the .h5ad files of --data-dir; {given} has none.")
        return [Source(name) for name in names]

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        if self.config.name != "default":
            parts: list[Part] = []
            for name in self._h5ad_files(files):
                with self._h5ad(files[name]) as matrix:
                    check_suite(matrix.obs, matrix.name)
                    parts += row_parts(name, matrix.n_cells)
            return {"train": parts}
        folder = parts_folder(self._output_dir) / "sources"
        obs = read_obs(files[CELLS], files[PDATA], files[WELLS])
        files[OBS] = folder / OBS
        pyarrow.feather.write_feather(obs, str(files[OBS]), compression="uncompressed")
        if not is_by_cell(files[MATRIX]):
            ordered = folder / "UMI.count.matrix.by_cell"
            if not ordered.exists() or ordered.stat().st_mtime_ns < files[MATRIX].stat().st_mtime_ns:
                sort_by_cell(files[MATRIX], ordered, len(obs))
            files[MATRIX] = ordered
        return {"train": row_parts(MATRIX, len(obs))}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        if self.config.name != "default":
            yield from self._h5ad_tables(files, part)
            return
        obs = pyarrow.feather.read_table(files[OBS], memory_map=True)
        shape = (len(obs), len(read_genes(files[GENES])))
        for start, counts in triplet_blocks(files[MATRIX], shape, range(part.start, part.stop)):
            block = obs.slice(start, counts.shape[0])
            columns = {name: _decoded(block[name]) for name in block.column_names}
            yield pa.table({**columns, **ragged_columns(counts)})

    def _h5ad_tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        structures = {}
        if WELLS in files:
            wells = read_wells(files[WELLS])
            structures = dict(zip(wells["name"].map(drug_key), wells["SMILES"], strict=True))
        with self._h5ad(files[part.file]) as matrix:
            for start, stop in part.blocks():
                rows, values = matrix.read_block(start, stop)
                if self._value == "count":
                    check_counts(matrix, rows, values)
                obs = suite_treatments(matrix.obs.iloc[rows], matrix.name, structures)
                columns = {name: pa.Array.from_pandas(obs[name]) for name in obs}
                yield pa.table({**columns, **ragged_columns(values, value=self._value)})

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        if self.config.name == "default":
            return {GENE_TABLE: read_genes(files[GENES])}
        tables = {}
        for name in self._h5ad_files(files):
            with self._h5ad(files[name]) as matrix:
                tables[name] = suite_genes(matrix)
        first, *others = tables
        different = [name for name in others if not tables[name].equals(tables[first])]
        if different:
            raise CorpusError(
                f"{examples(different)} have other genes than {first}, or another order of them. "
                "Put files of the same genes into --data-dir, e.g. after adata[:, shared]."
            )
        return {GENE_TABLE: tables[first]}

    def _h5ad_files(self, files: dict[str, Path]) -> list[str]:
        return [name for name in files if name.endswith(".h5ad")]

    def _h5ad(self, path: Path) -> Any:
        """The values of a suite's file, as a context."""
        with h5py.File(path, "r") as file:
            has_counts = "layers/counts" in file
        return source_counts(path, "counts" if has_counts and self._value == "count" else None)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


if __name__ == "__main__":
    command_line(SciPlex3)
