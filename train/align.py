"""Aligns the species of a pre-trained cross-species model, so that it translates (Pang & Tegnér 2020, section 2.2).

    accelerate launch train/align.py --model runs/cross-species/model                   # adversarial, as the paper
    accelerate launch train/align.py --recipe train/recipes/align_brain_small.yaml \\
        --model runs/cross-species-brain-small/model --orthologs orthologs.tsv
    accelerate launch train/align.py --model DIR --orthologs FILE --method procrustes_orthologs adversarial

Of several methods the first is saved, and the others are measured beside it. Cells are those of the pre-training run,
and those it held out are held out here too; --sources names others. Several processes share out the restarts of the
adversarial method; the other methods run on the first one.

Leaves in the output folder: `model/` (a complete model directory with aligners both ways, projection, code, card with
figures), `matchability.parquet` (every cell's score), `report.json`, `run.json`.
"""

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from cellglot.alignment import (
    AdversarialOptions,
    Alignment,
    adversarial_alignment,
    gene_alignment,
    ortholog_alignment,
    transport_alignment,
)
from cellglot.hub import reading
from cellglot.modeling.cross_species import CrossSpeciesForTranslation
from cellglot.tokenization.pca_projection import PCAProjectionFeatureExtractor
from cellglot.train.alignment_data import SharedExpression, SourceCells, load_cells, shared_expression
from cellglot.train.alignment_report import write_report
from cellglot.train.config import option, parse_config
from cellglot.train.loop import close
from cellglot.train.publishing import PublishingOptions, prepare_publication, publish_run

METHODS = ("adversarial", "procrustes_orthologs", "procrustes_genes", "optimal_transport")


@dataclass
class AlignConfig(PublishingOptions):
    """Options of alignment. An option by source is one value for all of them, or NAME=VALUE for some."""

    model: str = option("runs/cross-species/model", "model directory of train/pretrain.py --method cross_species")
    method: list[str] = option(
        ["adversarial"], f"one or more of {', '.join(METHODS)}: the first is saved, the others are measured beside it"
    )
    orthologs: str | None = option(
        None, "table of orthologs (BioMart or MGI export, gene_networks.py's Parquet, .csv or .tsv of gene pairs)"
    )
    sources: list[str] = option([], "NAME=PATH of each source of cells; absent: those of the pre-training run")
    layer: list[str] = option([], "layer with the raw counts, or raw, by source; absent: as the run")
    gene_ids: list[str] = option([], "column of var with gene ids, by source; absent: as the run")
    split_by: list[str] = option([], "column of obs whose groups are held out whole, by source; absent: as the run")
    cell_type: list[str] = option([], "column of obs with the class, by source, to measure with; absent: as the run")
    classes: str | None = option(None, "table of label, class: names alike what the sources name differently")
    validation_fraction: float | None = option(None, "share of the cells held out; absent: as the run")
    max_cells: int = option(10_000, "training cells of each source to align, drawn at random, at the most")
    max_validation_cells: int = option(5_000, "held-out cells of each source that figures are measured on, at the most")
    neighbours: int = option(10, "nearest cells that CSLS looks at")

    learning_rate: float = option(3e-5, "adversarial: of map and discriminator")
    batch_size: int = option(1024, "adversarial: cells of each source in a step")
    epochs: int = option(5, "adversarial: measured by the criterion after each")
    epoch_steps: int = option(1000, "adversarial: steps of an epoch")
    discriminator_steps: int = option(5, "adversarial: steps of the discriminator for one of the map")
    hidden_size: int = option(2048, "adversarial: width of the discriminator")
    hidden_layers: int = option(2, "adversarial: layers of the discriminator")
    dropout: float = option(0.1, "adversarial: of the discriminator's input")
    label_smoothing: float = option(0.1, "adversarial: s in the discriminator's targets s and 1 - s")
    orthogonality: float = option(0.01, "adversarial: b in W <- (1 + b) W - b (W W^T) W")
    restarts: int = option(3, "adversarial: starts, of which the criterion chooses one")
    start: Literal["axes", "random", "orthologs"] = option(
        "axes", "adversarial: principal axes on principal axes, any rotation, or that of procrustes_genes"
    )
    refinements: int = option(5, "adversarial: rounds of Procrustes on mutual nearest neighbours")

    transport: Literal["unbalanced", "fused", "gromov"] = option(
        "unbalanced", "optimal_transport: by orthologs, by these and distances within the sources, or by distances only"
    )
    transport_cells: int = option(2_000, "optimal_transport: cells of each source, at the most")
    epsilon: float = option(0.05, "optimal_transport: entropy of the unbalanced coupling")
    marginal_penalty: float = option(1.0, "optimal_transport: price of cells without counterpart, if unbalanced")
    structure: float = option(0.5, "optimal_transport: weight of distances within the sources, if fused")
    linear_map: Literal["rotation", "least_squares"] = option("rotation", "optimal_transport: what is fitted to it")
    ridge: float = option(0.1, "optimal_transport: penalty of least squares")

    output: str = option("runs/cross-species-aligned", "folder of the run")
    overwrite: bool = option(False, "replaces an earlier run in the output folder")
    seed: int = option(0, "seed of starts, batches and draws of cells")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.method if name not in METHODS]
        if unknown or not self.method or len(set(self.method)) < len(self.method):
            raise ValueError(f"method takes each of {', '.join(METHODS)} once, found {' '.join(self.method)!r}.")
        counts = ("max_cells", "max_validation_cells", "neighbours", "batch_size", "epochs", "epoch_steps")
        counts += ("discriminator_steps", "hidden_size", "hidden_layers", "restarts", "transport_cells")
        for name in (*counts, "learning_rate", "epsilon", "marginal_penalty", "ridge"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}.")
        if self.refinements < 0:
            raise ValueError(f"refinements cannot be negative, found {self.refinements}.")
        for name in ("dropout", "label_smoothing", "orthogonality", "structure"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie from 0 to below 1, found {getattr(self, name)}.")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, found {self.validation_fraction}.")
        if self.needs_orthologs and self.orthologs is None:
            raise ValueError(
                f"{' and '.join(self.needs_orthologs)} needs --orthologs FILE, a table of orthologous genes, e.g. of "
                "datasets_scripts/gene_networks.py --config orthologs_ensembl."
            )

    @property
    def needs_orthologs(self) -> list[str]:
        """What was asked for that a table of orthologs is needed for."""
        needs = [name for name in self.method if name.startswith("procrustes")]
        needs += ["optimal_transport"] if "optimal_transport" in self.method and self.transport != "gromov" else []
        return needs + (["start orthologs"] if "adversarial" in self.method and self.start == "orthologs" else [])


def align(
    method: str,
    source: SourceCells,
    target: SourceCells,
    shared: SharedExpression | None,
    config: AlignConfig,
    accelerator: Accelerator,
) -> Alignment | None:
    """The alignment of two sources by one method; None on processes that had no part in it."""
    x, y, k = source.train_nd, target.train_nd, config.neighbours
    main = accelerator.is_main_process
    if method == "adversarial":
        names = (field.name for field in dataclasses.fields(AdversarialOptions) if hasattr(config, field.name))
        options = AdversarialOptions(**{name: getattr(config, name) for name in names})
        start: Any = config.start
        if start == "orthologs":
            assert shared is not None
            start = gene_alignment(x, y, shared.a_dg, shared.b_dg).forward_dd
        restarts = range(accelerator.process_index, config.restarts, accelerator.num_processes)
        settings: dict[str, Any] = {"refinements": config.refinements, "seed": config.seed, "progress": main}
        # A process may be left without a restart.
        found = adversarial_alignment(x, y, options, start=start, restarts=restarts, **settings) if restarts else None
        return _best(found, accelerator)
    if not main:
        return None
    if method == "optimal_transport":
        # Drawn anew, since cells stand in the order of their files.
        rows, columns = (
            torch.randperm(len(cloud), generator=torch.Generator().manual_seed(config.seed))[: config.transport_cells]
            for cloud in (x, y)
        )
        x, y = x[rows.to(x.device)], y[columns.to(y.device)]
        expression = (None, None) if config.transport == "gromov" or shared is None else shared.coordinates(x, y)
        names = ("epsilon", "marginal_penalty", "structure", "linear_map", "ridge")
        options = {name: getattr(config, name) for name in names}
        return transport_alignment(x, y, *expression, kind=config.transport, k=k, **options)
    assert shared is not None
    if method == "procrustes_orthologs":
        return ortholog_alignment(x, y, *shared.coordinates(x, y), k=k)
    return gene_alignment(x, y, shared.a_dg, shared.b_dg, k=k)


def _best(found: Alignment | None, accelerator: Accelerator) -> Alignment | None:
    """The best of all processes' restarts by the criterion, the first of equal ones; on all of them."""
    if accelerator.num_processes == 1:
        return found
    here = None if found is None else dataclasses.replace(
        found, forward_dd=found.forward_dd.cpu(), backward_dd=found.backward_dd.cpu()
    )  # fmt: skip
    every = [a for a in gather_object([here]) if a is not None]
    best = max(every, key=lambda a: (a.criterion, -a.facts["restart"]))
    device = accelerator.device
    return dataclasses.replace(best, forward_dd=best.forward_dd.to(device), backward_dd=best.backward_dd.to(device))


def check_model(path: str) -> None:
    """Raises ValueError for a local path that is no model directory; anything else may be a repository."""
    local = Path(path)
    if (local.exists() or len(local.parts) > 2) and not (local / "preprocessor_config.json").exists():
        raise ValueError(
            f"{path} holds no preprocessor_config.json: pass --model with the model directory of "
            "train/pretrain.py --method cross_species, as a rule RUN/model."
        )


def check_output(config: AlignConfig) -> Path:
    """The output folder, which must be new, or another run's if `overwrite` is set.

    Raises  FileExistsError
    """
    output = Path(config.output)
    if output.exists() and any(output.iterdir()):
        if not (output / "run.json").exists() or (output / "checkpoints").exists():
            raise FileExistsError(f"{output} holds files that are no run of this script. Pass another --output.")
        if not config.overwrite:
            raise FileExistsError(f"{output} holds an earlier run: pass --overwrite, or another --output.")
    return output


def main(argv: list[str] | None = None) -> None:
    config = parse_config(AlignConfig, argv, description=__doc__)
    if find_spec("ot") is None:
        sys.exit('align.py needs POT: pip install "cellglot[train]"')
    # Restarts are shared out unevenly, and one outlasts the time-out of a barrier.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    is_main = accelerator.is_main_process
    try:
        output = check_output(config)
        check_model(config.model)
        if is_main:
            prepare_publication(config)
        with reading(config.model):
            extractor: PCAProjectionFeatureExtractor = PCAProjectionFeatureExtractor.from_pretrained(config.model)
            model = CrossSpeciesForTranslation.from_pretrained(config.model)
        if tuple(model.config.sources) != extractor.sources or model.config.n_components != extractor.n_components:
            raise ValueError(
                f"{config.model}: the model knows {model.config.n_components:,} components of "
                f"{', '.join(model.config.sources)}, the projection beside it {extractor.n_components:,} of "
                f"{', '.join(extractor.sources)}. They do not belong together."
            )
        if len(extractor.sources) < 2:
            raise ValueError(
                f"{config.model} knows one source, {', '.join(extractor.sources)}: there is nothing to align."
            )
        cells, mark = load_cells(config, extractor, accelerator.device, progress=is_main)
        found: dict[tuple[str, str], dict[str, Alignment]] = {}
        seconds: dict[tuple[str, str], dict[str, float]] = {}
        for target, source in combinations(extractor.sources, 2):
            pair, shared = (source, target), None
            if config.needs_orthologs:
                shared = shared_expression(config.orthologs or "", extractor, *pair, accelerator.device)
                accelerator.print(
                    f"{source} and {target} share {len(shared.shared.index_a):,} one-to-one orthologs "
                    f"(columns {' and '.join(shared.shared.columns)} of {config.orthologs})"
                )
            found[pair], seconds[pair] = {}, {}
            for method in config.method:
                begun = time.perf_counter()
                alignment = align(method, cells[source], cells[target], shared, config, accelerator)
                if alignment is not None:
                    found[pair][method] = alignment
                    seconds[pair][method] = time.perf_counter() - begun
                    accelerator.print(f"{source} -> {target}, {method}: criterion {alignment.criterion:.4f}")
        # The others do not wait: figures on many cells outlast the time-out of a barrier.
        if is_main:
            for (source, target), alignments in found.items():
                chosen = alignments[config.method[0]]
                model.set_aligner(source, target, chosen.forward_dd)
                model.set_aligner(target, source, chosen.backward_dd)
            partial = output.with_name(f".partial-{output.name}")
            shutil.rmtree(partial, ignore_errors=True)
            write_report(model, extractor, cells, found, seconds, config, mark, partial)
            shutil.rmtree(output, ignore_errors=True)
            partial.rename(output)
            print(f"Written to {output}")
    except (ValueError, OSError) as error:
        sys.exit(f"align.py: {error}")
    close(accelerator)
    publish_run(config, accelerator)


if __name__ == "__main__":
    main()
