"""What `cross_species.py` measures on held-out cells: distances, trees, label transfer, reconstruction, translation.

Axis letters: n and m cells, k components, g genes, c classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from cross_species_cells import categories
from cross_species_spaces import NAMES, Space, Split, shared_pca

from cellglot.alignment import Alignment, Matchability
from cellglot.metrics.cluster_accuracy import hierarchical_cluster_accuracy, mean_embeddings
from cellglot.metrics.label_transfer import label_transfer
from cellglot.metrics.wasserstein import wasserstein_by_class, wasserstein_matrix

# Cells of a set in a resample at the most, resamples of a class against its own, and against each other class
WASSERSTEIN_CELLS, RESAMPLES, OTHER_RESAMPLES = 200, 10, 3
# Training cells of each species that matchability is fitted to at the most
MATCHABILITY_CELLS = 300
NEIGHBOURS = 15


def shared_classes(split: Split) -> np.ndarray:
    """(c,) classes that both species have."""
    return np.intersect1d(split.pair["human"].class_n, split.pair["mouse"].class_n)


def held_out(split: Split, name: str, of_classes: np.ndarray | None = None) -> np.ndarray:
    """(n,) mask of a species' held-out cells, of some classes only if these are given."""
    mask = ~split.train[name]
    return mask if of_classes is None else mask & np.isin(split.pair[name].class_n, of_classes)


# ---- (a) Wasserstein distances


def wasserstein_figures(space: Space, split: Split) -> dict[str, Any]:
    """Distance human to mouse of the same class, by class and on average, and of different classes.

    `space` is normalized: distances are in units of the root mean squared length of a cell from its species' mean.
    ratio  same / different: free of units, and the lower the better
    """
    shared = shared_classes(split)
    (x, x_classes), (y, y_classes) = (
        (space.cells[name][mask], split.pair[name].class_n[mask])
        for name in NAMES
        for mask in [held_out(split, name, shared)]
    )
    options = {"n_cells": WASSERSTEIN_CELLS, "seed": split.seed}
    same = wasserstein_by_class(x, x_classes, y, y_classes, n_resamples=RESAMPLES, **options).set_index("class")
    matrix, _ = wasserstein_matrix(x, x_classes, y, y_classes, n_resamples=OTHER_RESAMPLES, progress=False, **options)
    different = matrix.to_numpy()[~np.eye(len(matrix), dtype=bool)].mean()
    average = float(same.loc["average", "mean"])  # type: ignore[arg-type]
    return {
        "wasserstein": average,
        "wasserstein_sd": float(same.loc["average", "sd"]),  # type: ignore[arg-type]
        "wasserstein_different": float(different),
        "wasserstein_ratio": average / float(different),
        **{f"wasserstein {name}": float(row["mean"]) for name, row in same.iterrows() if name != "average"},
    }


def type_matrix(space: Space, split: Split) -> pd.DataFrame:
    """Distances of human classes (rows) to mouse cell types with enough cells (columns)."""
    named = categories(split.pair)
    cells, types = [], []
    for name in NAMES:
        known = np.array([f"{name}: {t}" in named for t in split.pair[name].type_n])
        mask = held_out(split, name) & known
        cells.append(space.cells[name][mask])
        types.append(split.pair[name].type_n[mask])
    options = {"n_cells": WASSERSTEIN_CELLS, "n_resamples": OTHER_RESAMPLES, "seed": split.seed}
    return wasserstein_matrix(cells[0], types[0], cells[1], types[1], progress=False, **options)[0]


# ---- (b) hierarchical cluster accuracy


def cluster_figures(space: Space, split: Split) -> dict[str, Any]:
    """Categories (species and type) that the tree of their held-out means puts right, on two levels of a taxonomy."""
    named = categories(split.pair)
    rows, labels = [], []
    for name in NAMES:
        mask = held_out(split, name)
        rows.append(space.cells[name][mask])
        labels.append([f"{name}: {t}" for t in split.pair[name].type_n[mask]])
    rows, labels = np.concatenate(rows), np.concatenate(labels)
    known = np.isin(labels, list(named))
    names, means = mean_embeddings(rows[known], labels[known])
    levels = [hierarchical_cluster_accuracy(means, [named[str(n)][level] for n in names]) for level in (0, 1)]
    return {
        "n_categories": len(names),
        **{f"taxonomy_{i}": float(found["n_right"]) for i, found in enumerate(levels, start=1)},
    }


# ---- (c) label transfer


def transfer_figures(space: Space, split: Split) -> dict[str, Any]:
    """Macro F1 on held-out cells of one species, of labels of the other's training cells.

    Cell types that have no counterpart stand in the reference, and a query cell that is given one of them is wrong.
    """
    figures = {}
    for reference, query in (("mouse", "human"), ("human", "mouse")):
        train, test = split.train[reference], ~split.train[query]
        found = label_transfer(
            space.cells[reference][train],
            split.pair[reference].class_n[train],
            space.cells[query][test],
            split.pair[query].class_n[test],
            k=NEIGHBOURS,
        )
        figures |= {f"{reference} to {query}": found["macro_f1"], f"n {reference} to {query}": found["n"]}
    return figures


def matchability_figures(space: Space, split: Split) -> dict[str, Any]:
    """Area under the ROC curve of the score of held-out mouse cells, of a class that human has against one it has not.

    Nothing where the mouse cells are all of shared classes.
    """
    from sklearn.metrics import roc_auc_score

    test = ~split.train["mouse"]
    has_counterpart = np.isin(split.pair["mouse"].class_n[test], shared_classes(split))
    if has_counterpart.all():
        return {}
    mouse, human = (torch.from_numpy(space.cells[name][split.train[name]]) for name in ("mouse", "human"))
    fitted = Matchability.fit(mouse, human, max_cells=MATCHABILITY_CELLS, seed=split.seed)
    scores = fitted.of_source(torch.from_numpy(space.cells["mouse"][test]))
    return {"matchability": float(roc_auc_score(has_counterpart, scores.numpy()))}


# ---- (d) genes


def expression_of(split: Split, name: str, mask: np.ndarray) -> np.ndarray:
    """(n, genes of the projection) float32 log-normalized expression."""
    species = split.pair[name]
    columns = species.adata.var_names.get_indexer(pd.Index(split.extractor.gene_ids(name)))
    assert (columns >= 0).all()
    return species.expression[mask][:, columns].toarray()


def reconstruction_figures(space: Space, split: Split) -> dict[str, Any]:
    """Share of the variance of held-out cells' expression about the training mean that comes back, by species.

    of PCA's  relative to what the projection itself keeps
    """
    assert space.reconstructions is not None
    figures = {}
    for name in NAMES:
        test = ~split.train[name]
        x_ng = expression_of(split, name, test)
        k = split.extractor.n_components
        mean_g = split.extractor.inverse(np.zeros((1, k), dtype=np.float32), name)
        lost = np.square(x_ng - split.extractor.inverse(space.reconstructions[name][test], name)).sum()
        whole = np.square(x_ng - split.extractor.inverse(split.projections[name][test], name)).sum()
        variance = np.square(x_ng - mean_g).sum()
        figures[f"{name} expression"] = float(1 - lost / variance)
        figures[f"{name}, of PCA's"] = float((variance - lost) / (variance - whole))
    return figures


Translation = Callable[[str, str], np.ndarray]


def translations(
    split: Split, models: dict[str, Any], found: dict[str, Alignment]
) -> Iterator[tuple[str, Translation]]:
    """Ways to make held-out cells of one species cells of the other: (source, target) -> (n, genes of the target).

    NaN where a way says nothing of a gene.
    """
    test = {name: ~split.train[name] for name in NAMES}
    train_means = {name: expression_of(split, name, split.train[name]).mean(axis=0) for name in NAMES}

    def of_mean(source: str, target: str) -> np.ndarray:
        return np.tile(train_means[target], (int(test[source].sum()), 1))

    yield "mean of the training cells", of_mean

    def copied(source: str, target: str) -> np.ndarray:
        """Orthologs copied, moved by the difference of the species' means; other genes are unknown."""
        rows = split.pair[source].shared_expression()
        here, there = (split.pair[s].shared_expression()[split.train[s]].mean(axis=0) for s in (source, target))
        columns = shared_columns(split, target)
        copies = np.full((int(test[source].sum()), len(train_means[target])), np.nan, dtype=np.float32)
        copies[:, columns[columns >= 0]] = (rows[test[source]] - here + there)[:, columns >= 0]
        return copies

    yield "orthologs copied", copied

    shared = shared_pca(split).normalized(split.train)

    def nearest(source: str, target: str) -> np.ndarray:
        """Mean expression of the nearest training cells of the target, by cosine in the shared-ortholog PCA."""
        from sklearn.neighbors import NearestNeighbors

        fitted = split.train[target]
        index = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine", algorithm="brute")
        rows = index.fit(shared.cells[target][fitted]).kneighbors(shared.cells[source][test[source]])[1]
        return expression_of(split, target, fitted)[rows].mean(axis=1)

    yield "nearest cells, shared-ortholog PCA", nearest

    for way, alignment in found.items():

        def linear(source: str, target: str, alignment: Alignment = alignment) -> np.ndarray:
            w = alignment.forward_dd if source == "mouse" else alignment.backward_dd
            return split.extractor.inverse(split.projections[source][test[source]] @ w.T, target)

        yield f"PCA, {way}", linear
    for axis, model in models.items():
        for way, alignment in found.items():
            model.set_aligner("mouse", "human", alignment.forward_dd)
            model.set_aligner("human", "mouse", alignment.backward_dd)

            def translated(source: str, target: str, model: Any = model) -> np.ndarray:
                found = model.translate(split.projections[source][test[source]], source=source, target=target)
                return split.extractor.inverse(found, target)

            yield f"model, {axis}, {way}", translated

    def classes_known(source: str, target: str) -> np.ndarray:
        """For each cell the mean of the target's training cells of its class, which is given."""
        fitted = split.train[target]
        expression, classes = expression_of(split, target, fitted), split.pair[target].class_n[fitted]
        means = {c: expression[classes == c].mean(axis=0) for c in shared_classes(split)}
        own = split.pair[source].class_n[test[source]]
        return np.stack([means.get(c, train_means[target]) for c in own])

    yield "class known", classes_known


def shared_columns(split: Split, name: str) -> np.ndarray:
    """(shared genes,) their positions among the genes of a species' projection, -1 for those it left out."""
    genes = np.array(split.pair[name].genes)[split.pair[name].shared_g]
    return pd.Index(split.extractor.gene_ids(name)).get_indexer(pd.Index(genes))


def translation_figures(translation: Translation, split: Split) -> dict[str, Any]:
    """How class means of translated cells agree with those of the target's own held-out cells, both ways.

    orthologs, all genes  Pearson's correlation over genes of how a class deviates from the mean of the classes, mean
                          over classes: of shared orthologs, of all genes of the target
    means                 the same of the class means themselves, over orthologs: a mean of all cells does well here
    """
    figures = {}
    shared = shared_classes(split)
    for source, target in (("mouse", "human"), ("human", "mouse")):
        (rows, own), (truth, true_classes) = (
            (translation(source, target), split.pair[source].class_n[~split.train[source]]),
            (expression_of(split, target, ~split.train[target]), split.pair[target].class_n[~split.train[target]]),
        )
        means_cg = np.stack([rows[own == c].mean(axis=0) for c in shared])
        truth_cg = np.stack([truth[true_classes == c].mean(axis=0) for c in shared])
        deviations, true_deviations = (means - means.mean(axis=0) for means in (means_cg, truth_cg))
        columns = shared_columns(split, target)
        orthologs = columns[columns >= 0]
        key = f"{source} to {target}"
        figures[f"{key}, orthologs"] = mean_correlation(deviations[:, orthologs], true_deviations[:, orthologs])
        figures[f"{key}, all genes"] = mean_correlation(deviations, true_deviations)
        figures[f"{key}, means"] = mean_correlation(means_cg[:, orthologs], truth_cg[:, orthologs])
    return figures


def mean_correlation(x_cg: np.ndarray, y_cg: np.ndarray) -> float | None:
    """Mean over rows of Pearson's correlation; None where a row is constant or unknown."""
    if not np.isfinite(x_cg).all() or (np.ptp(x_cg, axis=1) < 1e-4).any():
        return None
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(x_cg, y_cg, strict=True)]))
