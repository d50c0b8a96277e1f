"""A dry run of cross-species pre-training on made-up corpora of the full shape of the two atlases, phase by phase.

    python benchmarks/cross_species_dry_run.py --work DIR --json benchmarks/results/cross_species_dry_run.json

Human 49,417 nuclei x 50,281 genes and mouse 160,796 cells x 27,998 genes, with about as many genes detected in a cell
as in the published ones, in the Parquet files that human_cortex.py and mouse_brain.py leave. Then what pre-training by
train/recipes/cross_species_base.yaml does: the PCA of the training cells, the projection of all cells, some steps of
the model. Every phase is a process of its own, with its own peak memory (pages of mapped files that were read count,
though the system can take them back), and what a phase has finished is kept: `--phases fit` does one at a time.
`--share` leaves out cells, `--components` and `--passes` make the PCA cheaper: the table says what was run.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
from measure import answer_as_contender, machine, print_table, run_contender, save_results

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, row_parts
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_features, ragged_table
from cellglot.tokenization.streaming_pca import PASSES
from cellglot.train import pretrain
from cellglot.train.checkpoint import list_checkpoints
from cellglot.train.config import parse_config
from cellglot.train.cross_species_data import TRAIN, begin, find_sources, fit_extractor, prepare_data
from cellglot.train.loop import make_accelerator
from cellglot.train.output_folder import prepare_output
from cellglot.train.pretrain_cross_species import CrossSpeciesPretrainConfig

# (cells, genes, share of the genes detected in a cell, prefix of the gene ids). About 8,000 genes are detected in a
# nucleus by SMART-seq v4, about 2,200 in a cell by 10x v1.
SHAPES = {"human": (49_417, 50_281, 0.16, "SYMBOL"), "mouse": (160_796, 27_998, 0.08, "ENSMUSG")}
N_TYPES = 25
PHASES = (*SHAPES, "fit", "project", "train")
RECIPE = Path(__file__).parents[1] / "train" / "recipes" / "cross_species_base.yaml"


class SimulatedBrain(CorpusBuilder):
    """Cells of `N_TYPES` types, which differ in a tenth of their genes, made block by block."""

    VERSION = datasets.Version("1.0.0")
    SOURCES = {"default": []}
    N_CELLS: ClassVar[int]
    SPECIES: ClassVar[str]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=ragged_features({"Class": datasets.Value("string")}))

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        return {"train": row_parts(self.SPECIES, self.N_CELLS)}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        _, n_genes, density, _ = SHAPES[part.file]
        detected_tg = detection_rates(n_genes, density)
        for start, stop in part.blocks():
            rng = np.random.default_rng([1, start])
            cell_type = rng.integers(N_TYPES, size=stop - start)
            draws_ng = rng.random((stop - start, n_genes), dtype=np.float32)
            rates_ng = detected_tg[cell_type]
            cells, genes = np.nonzero(draws_ng < rates_ng)
            # A draw below its rate is uniform between 0 and it: its logarithm gives the count.
            counts = 1 + np.floor(-2 * np.log(np.maximum(draws_ng[cells, genes], 1e-30) / rates_ng[cells, genes]))
            indptr = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=stop - start))])
            matrix = sp.csr_matrix((counts.astype(np.float32), genes, indptr), shape=draws_ng.shape)
            names = [f"{part.file}{i}" for i in range(start, stop)]
            yield ragged_table(matrix, pd.DataFrame({"Class": [f"type {t}" for t in cell_type]}, index=pd.Index(names)))

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        _, n_genes, _, prefix = SHAPES[self.SPECIES]
        return {GENE_TABLE: pd.DataFrame({"gene_id": [f"{prefix}{i:011d}" for i in range(n_genes)]})}


def detection_rates(n_genes: int, density: float) -> np.ndarray:
    """(types, genes) share of the cells of each type that a gene is detected in; most genes are rare."""
    rng = np.random.default_rng(0)
    shared_g = np.clip(rng.gamma(0.5, 2 * density, n_genes), 1e-4, 0.98)
    own_tg = np.clip(rng.gamma(0.5, 2 * density, (N_TYPES, n_genes)), 1e-4, 0.98)
    return np.where(rng.random((N_TYPES, n_genes)) < 0.1, own_tg, shared_g).astype(np.float32)


def generate(species: str, work: str, share: float, **_: Any) -> dict[str, Any]:
    """Builds a corpus."""
    n_cells = int(SHAPES[species][0] * share)
    members = {"N_CELLS": n_cells, "SPECIES": species, "__module__": __name__}
    builder: Any = type("SimulatedBrain", (SimulatedBrain,), members)
    start = time.perf_counter()
    folder = builder(cache_dir=str(Path(work) / "cache")).prepare(Path(work) / species)
    gigabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    return {"seconds": time.perf_counter() - start, "what": f"{n_cells:,} cells, {gigabytes:.1f} GB of Parquet"}


def words(work: str, components: int, passes: int, steps: int, **_: Any) -> list[str]:
    """The command line of the recipe on the made-up corpora."""
    folder = Path(work)
    options = {"n_components": components, "pca_passes": passes, "max_steps": steps, "output": folder / "run"}
    options |= {"mixed_precision": "no", "num_workers": 0, "report": "false", "max_validation_cells": 1024}
    sources = ["--sources", f"human={folder / 'human'}", f"mouse={folder / 'mouse'}", "--cell_type", "Class"]
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["--recipe", str(RECIPE), *sources, *given]


def fit(**settings: Any) -> dict[str, Any]:
    """The PCA of the training cells of both corpora."""
    config, output = _run(settings)
    start = time.perf_counter()
    sources, mark = find_sources(config)
    begin(output / "data", mark)
    extractor = fit_extractor(config, sources, output / "data")
    n_cells = sum(int((source.split == TRAIN).sum()) for source in sources)
    what = f"{n_cells:,} training cells, {extractor.n_components:,} components, 1 + {config.pca_passes} passes"
    return {"seconds": time.perf_counter() - start, "what": what}


def project(**settings: Any) -> dict[str, Any]:
    """The projections of all cells, on disk."""
    config, output = _run(settings)
    start = time.perf_counter()
    data = prepare_data(config, output / "data")
    n_cells, seconds = len(data.train) + len(data.validation), time.perf_counter() - start
    return {"seconds": seconds, "what": f"{n_cells:,} cells, {n_cells / seconds:,.0f} cells/s"}


def train(**settings: Any) -> dict[str, Any]:
    """Steps of the model, by the script itself, which finds PCA and projections done."""
    start = time.perf_counter()
    pretrain.main(words(**settings))
    seconds = time.perf_counter() - start
    checkpoint = list_checkpoints(Path(settings["work"]) / "run" / "checkpoints")[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    steps, batch = state["step"], state["config"]["batch_size"]
    what = f"{steps} steps of {batch:,} cells, {state['seconds'] / steps:.1f} s each; validation, model directory"
    return {"seconds": seconds, "what": what}


def with_cpu_time(phase: Any, **settings: Any) -> dict[str, Any]:
    """What a phase found, with the CPU time of its process over all threads: what other processes do is not in it."""
    return phase(**settings) | {"cpu_seconds": time.process_time()}


def _run(settings: dict[str, Any]) -> tuple[CrossSpeciesPretrainConfig, Path]:
    """Configuration and output folder, as the script has them."""
    config = parse_config(CrossSpeciesPretrainConfig, words(**settings))
    return config, prepare_output(config, make_accelerator(config))


def main() -> None:
    phases = {name: functools.partial(generate, name) for name in SHAPES}
    phases |= {"fit": fit, "project": project, "train": train}
    answer_as_contender({name: functools.partial(with_cpu_time, phase) for name, phase in phases.items()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpora and run: 6 GB at full size")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="all unless named")
    parser.add_argument("--share", type=float, default=1.0, help="of the cells")
    parser.add_argument("--components", type=int, default=1200)
    parser.add_argument("--passes", type=int, default=PASSES, help="of the PCA, after the one for mean and scale")
    parser.add_argument("--steps", type=int, default=3, help="of the model")
    parser.add_argument("--json", type=Path, help="file for the results; those of phases that it has are kept")
    options = parser.parse_args()

    settings = {name: getattr(options, name) for name in ("share", "components", "passes", "steps")}
    done = json.loads(options.json.read_text())["phases"] if options.json and options.json.exists() else {}
    for phase in options.phases:
        print(f"{phase} ...", flush=True)
        done[phase] = run_contender(__file__, phase, {"work": str(options.work.absolute()), **settings})
        save_results({**machine(), **settings, "phases": done}, options.json)
    rows = [
        [name, done[name]["seconds"], done[name]["peak_rss_mb"], done[name]["what"]] for name in PHASES if name in done
    ]
    print_table(("phase", "seconds", "peak MB", "of"), rows)


if __name__ == "__main__":
    main()
