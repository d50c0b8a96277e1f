"""`PCAProjectionFeatureExtractor`: cells in, their "intense representation" out, and back.

Per data set (source, here a species): filter cells and genes, scale each cell's counts to a common sum, log(1 + x),
scale the data set to [-50, 50], and project to principal components (1,200 in the paper).
Source: Pang & Tegner, "Representation Learning and Translation between the Mouse and Human Brain using a Deep
Transformer Architecture", ICML 2020 Workshop on Computational Biology, section 2.3.

The scaling to [-50, 50] is affine, one for all genes of a source: its offset is gone once cells are centred, so that it
is a factor here and cells stay sparse. It is fixed by the cells that were fitted; others may go beyond, and are not
clipped, which no inverse could undo. The paper states neither the thresholds of its filters nor a common sum of counts.

Axis letters: n cells, g genes, k components.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils.hub import cached_file

from .count_matrix import CountMatrix
from .gene_ids import GeneMatch, GeneResolver, canonical_id, examples, is_named
from .log_expression import LogExpression, common_genes, open_cells, symbols_of
from .split_products import CELLS_PER_PRODUCT, GeneSplit, linear
from .streaming_pca import OVERSAMPLING, PASSES, ExpressionMoments, principal_components

logger = logging.getLogger(__name__)

PROJECTION_FILE = "projection.safetensors"
# Each data set is scaled to this range (section 2.3).
LOWEST, HIGHEST = -50.0, 50.0
# Variance is a difference of float64 sums of float32 values: less of their mean square is rounding.
LEAST_VARIANCE_SHARE = 1e-12


@dataclass(frozen=True)
class SourceProjection:
    """What was fitted on one data set.

    gene_ids              genes that were kept
    gene_symbols          what the first file that has them calls these genes besides, or their ids again
    mean_g                (genes,) float32 mean of their log-normalized expression
    scale                 factor from log-normalized expression to [-50, 50]
    components_kg         (components, genes) float32, orthonormal rows
    explained_variance_k  (components,) float64 variance of log-normalized expression along each
    total_variance        summed over the genes
    n_cells               that were fitted
    """

    gene_ids: list[str]
    gene_symbols: list[str]
    mean_g: np.ndarray
    scale: float
    components_kg: np.ndarray
    explained_variance_k: np.ndarray
    total_variance: float
    n_cells: int


@dataclass
class ProjectionReport:
    """What a projection saw of the cells and genes it was given, summed over their files; filled while it runs."""

    n_cells: int = 0
    n_empty_cells: int = 0
    n_genes: int = 0
    n_matched_genes: int = 0
    n_missing_genes: int = 0
    n_collapsed_genes: int = 0


@dataclass(frozen=True)
class ReconstructionError:
    """How near cells come back from their projections, in log-normalized expression of the source's genes.

    unexplained_variance  share of the squared distance from the fitted mean that is lost; 0 is lossless
    expression_rmse       root mean square error of a value
    cell_correlation      median over the cells of Pearson's correlation with what came back
    projection_rmse       of projecting once more what came back, relative to the projections' root mean square
    """

    n_cells: int
    unexplained_variance: float
    expression_rmse: float
    cell_correlation: float
    projection_rmse: float


class PCAProjectionFeatureExtractor(FeatureExtractionMixin):
    """Projects the cells of each source to its principal components, and back. Build it with `fit`.

    n_components      of every source
    target_sum        counts a cell is scaled to; None where counts were not scaled
    allow_fractional  whether it was fitted on values other than integers
    """

    model_input_names = ["projections", "source"]
    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        projections: Mapping[str, SourceProjection] | None = None,
        *,
        target_sum: float | None = 1e4,
        allow_fractional: bool = False,
        projection_file: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        if projection_file is not None:
            projections = _read_projections(Path(projection_file), kwargs)
        for name in ("sources", "n_components", "projection_sha256", "feature_extractor_type"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self._projections = dict(projections or {})
        self._resolvers: dict[str, GeneResolver] = {}
        self.target_sum, self.allow_fractional = target_sum, allow_fractional

    # ---- fitting

    @classmethod
    def fit(
        cls,
        sources: Mapping[str, Any],
        *,
        n_components: int = 1200,
        cells: Mapping[str, np.ndarray] | None = None,
        layer: str | Mapping[str, str] | None = None,
        gene_ids: str | Mapping[str, Any] | None = None,
        target_sum: float | None = 1e4,
        allow_fractional: bool = False,
        min_genes: int = 1,
        min_cells: int = 3,
        passes: int = PASSES,
        oversampling: int = OVERSAMPLING,
        seed: int = 0,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> "PCAProjectionFeatureExtractor":
        """Projections of each source, in `passes` + 1 streaming passes over its cells.

        sources       name -> cells as of `open_cells` (AnnData, path, Parquet corpus, counts), or a list of these with
                      at least some genes in common
        n_components  fewer, with a message, where a source has no more cells or genes
        cells         source -> boolean mask of the cells to fit (the training cells), those of a list end to end
        layer         of counts, or source -> its layer
        gene_ids      column of `var` with gene identifiers, or source -> its column; for counts, the names themselves
        target_sum    counts a cell is scaled to, over all its genes; None leaves them
        min_genes     cells in which fewer genes are detected are left out, also those with obs["filter_pass"] not 1
        min_cells     genes that are detected in fewer of the cells are left out
        passes        over the cells after the one that finds mean and scale; see `principal_components`
        Raises        ValueError for what cannot be counts, or where nothing is left to fit
        """
        options = {"target_sum": target_sum, "allow_fractional": allow_fractional}
        if not sources:
            raise ValueError("Expected at least one source to fit, found none.")
        if (target_sum is not None and target_sum <= 0) or oversampling < 0:
            raise ValueError(
                f"Expected a positive target_sum, or None, and oversampling of 0 or more; found {target_sum} and "
                f"{oversampling}."
            )
        for given, what in ((cells, "cells"), (layer, "layer"), (gene_ids, "gene_ids")):
            unknown = sorted(set(given) - set(sources)) if isinstance(given, Mapping) else []
            if unknown:
                raise ValueError(f"{what} names {examples(unknown)}; the sources are {examples(sources)}.")
        fits = [
            _SourceFit(
                name,
                found if isinstance(found, list | tuple) else [found],
                None if cells is None else cells.get(name),
                layer.get(name) if isinstance(layer, Mapping) else layer,
                gene_ids.get(name) if isinstance(gene_ids, Mapping) else gene_ids,
                progress=progress,
                **options,
            )
            for name, found in sources.items()
        ]
        for source in fits:
            source.measure(min_genes, min_cells)
        most = min(n_components, *(limit for source in fits for limit in (source.n_cells - 1, len(source.gene_ids))))
        if most < n_components:
            told = "; ".join(f"{s.name}: {s.n_cells:,} cells, {len(s.gene_ids):,} genes" for s in fits)
            logger.warning("%s components in place of %s, the most these sources have (%s).", most, n_components, told)
        settings: dict[str, Any] = {"passes": passes, "oversampling": oversampling, "seed": seed, "device": device}
        projections = {source.name: source.project(most, **settings) for source in fits}
        rank = min(len(projection.components_kg) for projection in projections.values())
        if rank < most:
            logger.warning("%s components in place of %s: the cells vary in no more directions.", rank, most)
        return cls({name: _leading(projection, rank) for name, projection in projections.items()}, **options)

    # ---- what it knows

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources; their order gives the index that a model sees."""
        return tuple(self._projections)

    @property
    def n_components(self) -> int:
        return len(next(iter(self._projections.values())).components_kg) if self._projections else 0

    def projection(self, source: str) -> SourceProjection:
        """What was fitted on a source.

        Raises  ValueError for a source that was not fitted
        """
        if not self._projections:
            raise ValueError("Nothing was fitted: PCAProjectionFeatureExtractor.fit({name: cells, ...}) makes one.")
        if source not in self._projections:
            raise ValueError(
                f"Expected one of the sources {examples(self.sources, len(self.sources))}, found {source!r}. "
                "Name the one whose species the cells are of, or fit anew with this source."
            )
        return self._projections[source]

    def gene_ids(self, source: str) -> list[str]:
        """Genes of a source: the columns of `inverse`."""
        return list(self.projection(source).gene_ids)

    def gene_symbols(self, source: str) -> list[str]:
        """Symbols of these genes, as the cells that were fitted had them; the ids again where they had no others."""
        return list(self.projection(source).gene_symbols)

    # ---- projecting

    def __call__(
        self,
        cells: Any,
        source: str,
        *,
        return_tensors: str | None = "np",
        report: ProjectionReport | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Projections of cells, and the index of their source.

        cells           as of `fit`; counts without gene_ids have the genes of `gene_ids(source)` as columns
        return_tensors  "np" or "pt"
        options         as of `iter_projections`
        Returns         projections (cells, n_components) float32, source (cells,) int64
        """
        report = report if report is not None else ProjectionReport()
        blocks = list(self.iter_projections(cells, source, report=report, **options))
        projections = np.concatenate(blocks) if blocks else np.empty((0, self.n_components), dtype=np.float32)
        index = np.full(len(projections), self.sources.index(source), dtype=np.int64)
        return BatchFeature({"projections": projections, "source": index}, tensor_type=return_tensors)

    def iter_projections(
        self,
        cells: Any,
        source: str,
        *,
        mask: np.ndarray | None = None,
        layer: str | None = None,
        gene_ids: Any = None,
        allow_fractional: bool | None = None,
        report: ProjectionReport | None = None,
        device: str | torch.device = "cpu",
    ) -> Iterator[np.ndarray]:
        """Projections of cells in order, (cells of a block, n_components) float32 a block.

        Genes are matched by name, in any order. A gene that the cells lack is taken to be at its mean, which moves no
        projection; columns of one gene are summed. A cell without counts gets the projection of no expression.
        mask              (cells,) boolean, of the cells wanted; those of a list end to end
        gene_ids          column of `var` with gene identifiers, None for the known one that matches most; for counts,
                          the names of their columns
        allow_fractional  None: as was fitted
        report            filled with what was seen
        Raises            ValueError for an unknown source, for no gene of it, and for what cannot be counts
        """
        projection = self.projection(source)
        report = report if report is not None else ProjectionReport()
        weight_kg = torch.from_numpy(projection.components_kg).to(device)
        wanted = {"mask": mask, "layer": layer, "gene_ids": gene_ids, "allow_fractional": allow_fractional}
        split = weight = None
        for measured_g, expression in self._expression(cells, source, report, **wanted):
            if split is None or weight is None:
                split = GeneSplit(expression, device)
                weight = split.weight(weight_kg)
            offset_k = weight_kg @ torch.from_numpy(projection.mean_g * measured_g).to(device)
            for block in split.blocks(expression):
                projected = (split.product(block, weight) - offset_k) * projection.scale
                yield projected.cpu().numpy()

    def inverse(self, projections: Any, source: str) -> np.ndarray:
        """Log-normalized expression of projections: centring and scaling undone.

        projections  (cells, n_components), NumPy array or torch tensor; computed where a tensor lies
        Returns      (cells, genes of `gene_ids(source)`) float32, which may be slightly below zero
        Raises       ValueError for another number of components, TypeError for other things
        """
        projection = self.projection(source)
        if not isinstance(projections, np.ndarray | torch.Tensor):
            raise TypeError(f"Expected projections as NumPy array or torch tensor, found {type(projections).__name__}.")
        found = torch.as_tensor(projections).detach().float()
        if found.ndim != 2 or found.shape[1] != self.n_components:
            raise ValueError(f"Expected projections (cells, {self.n_components}), found shape {tuple(found.shape)}.")
        components, mean = (torch.from_numpy(a).to(found.device) for a in (projection.components_kg, projection.mean_g))
        return torch.addmm(mean, found / projection.scale, components).cpu().numpy()

    def reconstruction_error(self, cells: Any, source: str, **options: Any) -> ReconstructionError:
        """What is lost of cells, best ones held out, between projection and inverse.

        options  mask, layer, gene_ids, allow_fractional, as of `iter_projections`. Genes that the cells lack are not
                 judged
        Raises   ValueError for no cells, and as `iter_projections`
        """
        projection = self.projection(source)
        weight_kg = torch.from_numpy(projection.components_kg)
        sums, n_values, correlations = np.zeros(4), 0, []
        for measured_g, expression in self._expression(cells, source, ProjectionReport(), **options):
            kept = torch.from_numpy(np.flatnonzero(measured_g))
            mean_g = torch.from_numpy(projection.mean_g * measured_g)
            x_ng = torch.from_numpy(expression.toarray())
            p_nk = linear(x_ng, weight_kg) - weight_kg @ mean_g
            centred = p_nk @ weight_kg
            back = linear(centred, weight_kg)
            x_ng, centred, mean_kept = x_ng[:, kept], centred[:, kept], mean_g[kept]
            lost = x_ng - mean_kept - centred
            squares = (lost.square(), (x_ng - mean_kept).square(), (back - p_nk).square(), p_nk.square())
            sums += [float(values.double().sum()) for values in squares]
            n_values += lost.numel()
            correlations.append(_correlations(x_ng, centred + mean_kept))
        if not n_values:
            raise ValueError("Expected cells to judge the reconstruction by, found none.")
        correlation = np.concatenate(correlations)
        return ReconstructionError(
            len(correlation),
            float(sums[0] / sums[1]),
            float(np.sqrt(sums[0] / n_values)),
            float(np.nanmedian(correlation)),
            float(np.sqrt(sums[2] / sums[3])),
        )

    def _expression(
        self,
        cells: Any,
        source: str,
        report: ProjectionReport,
        *,
        mask: np.ndarray | None = None,
        layer: str | None = None,
        gene_ids: Any = None,
        allow_fractional: bool | None = None,
    ) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """(genes measured, expression over the source's genes) of blocks of cells; the report is filled and told."""
        genes = self.projection(source).gene_ids
        resolver = self._resolvers.setdefault(source, GeneResolver(genes))
        fractional = self.allow_fractional if allow_fractional is None else allow_fractional
        transform = LogExpression(resolver, self.target_sum, fractional)
        is_column = isinstance(gene_ids, str)
        for part in cells if isinstance(cells, list | tuple) else [cells]:
            with open_cells(part, layer=layer, gene_ids=genes if gene_ids is None or is_column else gene_ids) as matrix:
                match = transform.match(matrix, gene_ids if is_column else None)
                self._check_match(matrix, match, source)
                measured_g = np.zeros(len(genes), dtype=np.float32)
                measured_g[match.index_g[match.index_g >= 0]] = 1
                report.n_genes += matrix.n_genes
                report.n_matched_genes += match.n_matched
                report.n_collapsed_genes += match.n_collapsed
                n_missing = int((measured_g == 0).sum())
                report.n_missing_genes += n_missing
                if n_missing:
                    logger.warning(
                        "%s lacks %s of the %s genes of source %r; they are taken to be at their means.",
                        *(matrix.name, f"{n_missing:,}", f"{len(genes):,}", source),
                    )
                here, mask = _first_cells(mask, matrix)
                n_empty = 0
                for rows, expression in transform.blocks(matrix, match, here, CELLS_PER_PRODUCT):
                    report.n_cells += len(rows)
                    n_empty += int((np.diff(expression.indptr) == 0).sum())
                    yield measured_g, expression
                report.n_empty_cells += n_empty
                if n_empty:
                    logger.warning(
                        "%s: %s cells have no counts of the genes of source %r: all get the one projection of no "
                        "expression. Filter them, or tell them by it.",
                        *(matrix.name, f"{n_empty:,}", source),
                    )
        _check_used_up(mask)

    def _check_match(self, matrix: CountMatrix, match: GeneMatch, source: str) -> None:
        if match.n_matched:
            return
        other = [
            f"{n:,} are genes of source {name!r}"
            for name in self.sources
            if (
                n := self._resolvers.setdefault(name, GeneResolver(self.gene_ids(name))).match(match.gene_ids).n_matched
            )
        ]
        named = [gene for gene in match.gene_ids if is_named(gene)]
        raise ValueError(
            f"{matrix.name}: none of its {matrix.n_genes:,} genes (e.g. {examples(named)}) is among the "
            f"{len(self.gene_ids(source)):,} of source {source!r} (e.g. {examples(self.gene_ids(source))}). "
            + (f"{'; '.join(other)}: name that source. " if other else "")
            + "Pass the column of `var` with such identifiers as gene_ids=."
        )

    # ---- saving, loading

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds: all but genes and arrays, which are in `projection.safetensors`."""
        kept = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        described = [
            {
                "name": name,
                "n_cells": projection.n_cells,
                "n_genes": len(projection.gene_ids),
                # Both are sums of rounded numbers.
                "explained_variance_share": min(
                    float(projection.explained_variance_k.sum() / projection.total_variance), 1.0
                ),
            }
            for name, projection in self._projections.items()
        ]
        found = {"feature_extractor_type": type(self).__name__, "n_components": self.n_components, "sources": described}
        return kept | found

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes configuration, projections and code; each is written aside and renamed, the configuration last.

        kwargs   as of `push_to_hub`, where that is asked for
        Returns  paths of the files
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            (config,) = super().save_pretrained(partial)
            _write_projections(Path(partial) / PROJECTION_FILE, self._projections)
            described = json.loads(Path(config).read_text(encoding="utf-8"))
            described["projection_sha256"] = _sha256(Path(partial) / PROJECTION_FILE)
            Path(config).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            written = sorted(Path(partial).iterdir(), key=lambda path: path.name == Path(config).name)
            for path in written:
                os.replace(path, folder / path.name)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / path.name) for path in written]

    @classmethod
    def get_feature_extractor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The configuration with the path of its projections; from a folder, a repository, or the path of the JSON."""
        config, rest = super().get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
        path = Path(pretrained_model_name_or_path)
        known = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        given = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
        where = str(path.parent if path.is_file() else pretrained_model_name_or_path)
        return config | {"projection_file": cached_file(where, PROJECTION_FILE, **given)}, rest


class _SourceFit:
    """One source while it is fitted: its cells, which of them and of their genes are kept, mean and scale."""

    def __init__(
        self,
        name: str,
        parts: Sequence[Any],
        mask: np.ndarray | None,
        layer: str | None,
        gene_ids: Any,
        *,
        target_sum: float | None,
        allow_fractional: bool,
        progress: bool,
    ):
        self.name, self.parts, self.layer, self.progress = name, parts, layer, progress
        self.column = gene_ids if isinstance(gene_ids, str) else None
        self.names = None if self.column is not None else gene_ids
        if not parts:
            raise ValueError(f"Source {name!r} has no cells: expected an AnnData, a path, or a list of these.")
        self.masks, self.n_cells, named = [], 0, []
        self.symbols: dict[str, str] = {}
        for part in parts:
            with self._open(part) as matrix:
                here, mask = _first_cells(mask, matrix)
                self.masks.append(matrix.passing_cells(here))
                self.n_cells += matrix.n_cells if self.masks[-1] is None else int(self.masks[-1].sum())
                named.append((matrix.name, matrix.gene_names(self.column)))
                for gene, symbol in zip(named[-1][1], symbols_of(matrix), strict=True):
                    self.symbols.setdefault(canonical_id(gene), symbol)
        _check_used_up(mask)
        self.gene_ids = common_genes(named)
        self.transform = LogExpression(GeneResolver(self.gene_ids), target_sum, allow_fractional)

    def _open(self, part: Any) -> Any:
        return open_cells(part, layer=self.layer, gene_ids=self.names)

    def measure(self, min_genes: int, min_cells: int) -> None:
        """One pass: which cells and genes to keep, mean and scale."""
        moments = ExpressionMoments(len(self.gene_ids))
        for part, matrix, rows, expression in self._blocks("mean"):
            kept = np.diff(expression.indptr) >= min_genes
            if self.masks[part] is None:
                self.masks[part] = np.ones(matrix.n_cells, dtype=bool)
            self.masks[part][rows[~kept]] = False
            moments.update(expression if kept.all() else expression[kept])
        self.n_cells = moments.n_cells
        genes = np.flatnonzero(moments.n_detected_g >= max(min_cells, 1))
        if self.n_cells < 2 or not len(genes):
            raise ValueError(
                f"Source {self.name!r}: {self.n_cells:,} cells with {min_genes:,} genes or more, and {len(genes):,} of "
                f"{len(self.gene_ids):,} genes in {min_cells:,} cells or more; a projection needs two cells and a "
                "gene. Lower min_genes and min_cells, or see whether these are counts of cells."
            )
        self.gene_ids = [self.gene_ids[i] for i in genes]
        self.transform = LogExpression(
            GeneResolver(self.gene_ids), self.transform.target_sum, self.transform.allow_fractional
        )
        self.mean_g, self.total_variance = moments.mean_g[genes], float(moments.variance_g[genes].sum())
        if self.total_variance <= LEAST_VARIANCE_SHARE * float(moments.sum_of_squares_g[genes].sum()) / self.n_cells:
            raise ValueError(
                f"Source {self.name!r}: its {self.n_cells:,} cells have the same expression: there is nothing to "
                "project on. See whether these are counts of cells."
            )
        # The least expression is zero, unless every kept gene is in every cell, where the range is narrower by no more
        # than the least value.
        self.scale = (HIGHEST - LOWEST) / float(moments.max_g[genes].max())

    def project(self, n_components: int, *, passes: int, **settings: Any) -> SourceProjection:
        """The passes that find the components."""
        steps = iter(range(1, passes + 1))

        def blocks() -> Iterator[sp.csr_matrix]:
            for _, _, _, expression in self._blocks(f"pass {next(steps)} of {passes}"):
                yield expression

        found = principal_components(blocks, self.mean_g, n_components, passes=passes, **settings)
        return SourceProjection(
            self.gene_ids,
            [self.symbols[gene] for gene in self.gene_ids],
            self.mean_g.astype(np.float32),
            self.scale,
            found.components_kg,
            found.explained_variance_k,
            self.total_variance,
            self.n_cells,
        )

    def _blocks(self, what: str) -> Iterator[tuple[int, CountMatrix, np.ndarray, sp.csr_matrix]]:
        """(which part, its matrix, cell positions, expression) of blocks of the cells kept so far."""
        from tqdm.auto import tqdm

        described: dict[str, Any] = {"desc": f"PCA of {self.name}, {what}", "unit": "cell"}
        with tqdm(total=self.n_cells, **described, disable=not self.progress) as bar:
            for i, part in enumerate(self.parts):
                with self._open(part) as matrix:
                    match = self.transform.match(matrix, self.column)
                    for rows, expression in self.transform.blocks(matrix, match, self.masks[i], CELLS_PER_PRODUCT):
                        yield i, matrix, rows, expression
                        bar.update(len(rows))


def _first_cells(mask: np.ndarray | None, matrix: CountMatrix) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(a mask's part for the cells of a matrix, the rest of it)."""
    if mask is None:
        return None, None
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 1 or len(mask) < matrix.n_cells:
        raise ValueError(
            f"{matrix.name}: expected a boolean mask of its {matrix.n_cells:,} cells, found {mask.dtype} of shape "
            f"{mask.shape}."
        )
    return mask[: matrix.n_cells].copy(), mask[matrix.n_cells :]


def _check_used_up(mask: np.ndarray | None) -> None:
    if mask is not None and len(mask):
        raise ValueError(f"The mask has {len(mask):,} entries more than there are cells.")


def _leading(projection: SourceProjection, k: int) -> SourceProjection:
    if len(projection.components_kg) == k:
        return projection
    components, explained = projection.components_kg[:k].copy(), projection.explained_variance_k[:k]
    return replace(projection, components_kg=components, explained_variance_k=explained)


def _correlations(x_ng: torch.Tensor, y_ng: torch.Tensor) -> np.ndarray:
    """Pearson's correlation of each row of one with that of the other; not a number for constant rows."""
    x, y = (values - values.mean(1, keepdim=True) for values in (x_ng, y_ng))
    return ((x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()).numpy()


def _write_projections(path: Path, projections: Mapping[str, SourceProjection]) -> None:
    tensors, facts = {}, {}
    for name, projection in projections.items():
        tensors[f"{name}.mean"] = projection.mean_g
        tensors[f"{name}.scale"] = np.array(projection.scale)
        tensors[f"{name}.components"] = np.ascontiguousarray(projection.components_kg)
        tensors[f"{name}.explained_variance"] = projection.explained_variance_k
        facts[name] = {
            "gene_ids": projection.gene_ids,
            "gene_symbols": projection.gene_symbols,
            "total_variance": projection.total_variance,
            "n_cells": projection.n_cells,
        }
    # In one file, so that names and columns cannot come apart.
    save_file(tensors, str(path), metadata={"sources": json.dumps(facts)})


def _read_projections(path: Path, config: Mapping[str, Any]) -> dict[str, SourceProjection]:
    """The projections of a file, which must be the one its configuration was written with."""
    expected = config.get("projection_sha256")
    if expected is not None and _sha256(path) != expected:
        raise OSError(
            f"{path} is not the file that its preprocessor_config.json was saved with. Fetch or save both anew."
        )
    projections = {}
    with safe_open(str(path), framework="np") as file:
        for name, facts in json.loads(file.metadata()["sources"]).items():
            mean, scale, components, explained = (
                file.get_tensor(f"{name}.{tensor}") for tensor in ("mean", "scale", "components", "explained_variance")
            )
            projections[name] = SourceProjection(
                facts["gene_ids"],
                facts["gene_symbols"],
                mean,
                float(scale),
                components,
                explained,
                facts["total_variance"],
                facts["n_cells"],
            )
    return projections


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
