"""Spaces that `cross_species.py` compares: what each makes of human and mouse cells, fitted on training cells alone.

Axis letters: n cells, k components, d width of a space, g genes.
"""

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from cross_species_cells import Species

from cellglot.alignment import (
    AdversarialOptions,
    Alignment,
    adversarial_alignment,
    gene_alignment,
    ortholog_alignment,
    transport_alignment,
)
from cellglot.modeling.baselines import SaucieConfig, SaucieModel
from cellglot.modeling.cross_species import CrossSpeciesConfig, CrossSpeciesForTranslation
from cellglot.tokenization.pca_projection import PCAProjectionFeatureExtractor
from cellglot.train import pretrain

# Chosen among 10, 20, 30, 60 and 120 on splits of other seeds (100, 101) of the same cells
N_COMPONENTS = 20
TRAINING: dict[str, Any] = {
    "method": "cross_species",
    "model": "small",
    "n_components": N_COMPONENTS,
    "max_steps": 300,
    # Steps this small are no faster on two cores.
    "cpu_threads": 1,
    "learning_rate": 1e-3,
    "validation_fraction": 0.05,
    "eval_every": 0,
    "save_every": 10**9,
    "report": "false",
    "overwrite": "true",
}
TOKEN_AXES: dict[str, dict[str, Any]] = {
    "cells": {"batch_size": 128},
    "components": {"batch_size": 64, "num_patches": 5},
}
# As the test of the adversary on real cells: a larger rate in fewer steps than the paper's 3e-5, for hundreds of cells.
ADVERSARIAL = AdversarialOptions(
    learning_rate=5e-3, batch_size=256, epochs=5, epoch_steps=60, hidden_size=64, orthogonality=0.02
)
SAUCIE_STEPS, SAUCIE_BATCH, SAUCIE_RATE = 200, 128, 1e-3
SCVI_EPOCHS = 100
CELLS_PER_PASS = 1024
# Standard deviations from the mean that a gene may lie at the most
MOST = 10
NAMES = ("human", "mouse")


@dataclass
class Split:
    """One seed's view of a pair.

    train         species -> (n,) mask
    extractor     of both species' training cells
    projections   species -> (n, k) float32
    orthologs     species -> (n, shared genes) float32, each gene standardized on the species' training cells
    """

    pair: dict[str, Species]
    seed: int
    train: dict[str, np.ndarray]
    work: Path
    extractor: Any = None
    projections: dict[str, torch.Tensor] = field(default_factory=dict)
    orthologs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Space:
    """Cells of both species in one space.

    cells            species -> (n, d)
    reconstructions  species -> (n, k) projections as they come back, where the method has a way back
    """

    name: str
    cells: dict[str, np.ndarray]
    reconstructions: dict[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        self.cells = {name: np.asarray(rows, dtype=np.float64) for name, rows in self.cells.items()}

    def normalized(self, train: dict[str, np.ndarray]) -> "Space":
        """Each species centred on its training cells; one factor for both, so that their mean squared length is 1."""
        centred = {name: rows - rows[train[name]].mean(axis=0) for name, rows in self.cells.items()}
        spread = np.mean([np.square(rows[train[name]]).sum(axis=1).mean() for name, rows in centred.items()])
        return Space(self.name, {name: rows / np.sqrt(spread) for name, rows in centred.items()}, self.reconstructions)


def prepare(pair: dict[str, Species], seed: int, train: dict[str, np.ndarray], work: Path) -> tuple[Split, dict]:
    """The split with its projections, and the trained models, "cells" and "components"."""
    split = Split(pair, seed, train, work)
    models = {axis: pretrained(split, axis) for axis in TOKEN_AXES}
    split.extractor = PCAProjectionFeatureExtractor.from_pretrained(work / "cells" / "model")
    split.orthologs = {name: torch.from_numpy(standardized(pair[name], train[name])) for name in NAMES}
    split.projections = {
        name: split.extractor(pair[name].adata, name, return_tensors="pt")["projections"] for name in NAMES
    }
    return split, models


def standardized(species: Species, train: np.ndarray) -> np.ndarray:
    """(n, shared genes) float32, clipped: a gene that one training cell has is of hardly any spread."""
    x_ng = species.shared_expression()
    spread = x_ng[train].std(axis=0)
    return np.clip((x_ng - x_ng[train].mean(axis=0)) / np.where(spread > 0, spread, 1), -MOST, MOST)


# ---- the model


def pretrained(split: Split, axis: str) -> Any:
    """A CrossSpeciesForTranslation without aligners, trained by train/pretrain.py on the training cells."""
    output = split.work / axis
    if not (output / "model" / "config.json").exists():
        split.work.mkdir(parents=True, exist_ok=True)
        files = {name: split.work / f"{name}.h5ad" for name in NAMES}
        for name, path in files.items():
            split.pair[name].adata[split.train[name]].copy().write_h5ad(path)
        sources = [f"{name}={path}" for name, path in files.items()]
        options = {**TRAINING, **TOKEN_AXES[axis], "token_axis": axis, "seed": split.seed, "output": output}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        pretrain.main(["--sources", *sources, *words])
    return CrossSpeciesForTranslation.from_pretrained(output / "model").eval()


def untrained(trained: Any, seed: int) -> Any:
    """A model of the same configuration with random weights."""
    torch.manual_seed(seed)
    return CrossSpeciesForTranslation(CrossSpeciesConfig(**trained.config.to_diff_dict())).eval()


@torch.no_grad()
def model_space(name: str, model: Any, split: Split, w: torch.Tensor | None = None) -> Space:
    """Embeddings and reconstructions; with W, mouse cells enter as human ones (equation 7).

    Training and held-out cells are embedded apart, both species mixed, at most `CELLS_PER_PASS` together.
    """
    rng = np.random.default_rng(split.seed)
    width = model.config.hidden_size
    cells = {s: np.zeros((len(x), width), dtype=np.float32) for s, x in split.projections.items()}
    back = {s: np.zeros(x.shape, dtype=np.float32) for s, x in split.projections.items()}
    shown = {s: x if w is None or s == "human" else x @ w.T for s, x in split.projections.items()}
    for train in (True, False):
        chosen = [np.flatnonzero(split.train[s] == train) for s in NAMES]
        rows, source = np.concatenate(chosen), np.repeat([0, 1], [len(c) for c in chosen])
        order = rng.permutation(len(rows))
        for block in np.array_split(order, -(-len(order) // CELLS_PER_PASS)):
            x = torch.stack([shown[NAMES[source[i]]][rows[i]] for i in block])
            entered_as = torch.from_numpy(source[block] if w is None else np.zeros(len(block), dtype=np.int64))
            reconstructions, outputs = model.reconstruct(x, entered_as)
            for s, species in enumerate(NAMES):
                of_species = source[block] == s
                cells[species][rows[block[of_species]]] = outputs.embeddings.numpy()[of_species]
                back[species][rows[block[of_species]]] = reconstructions.numpy()[of_species]
    return Space(name, cells, back if w is None else None)


# ---- alignments


def alignments(split: Split) -> dict[str, Alignment]:
    """W of equation 7 from mouse to human and back by each way, in the intense representation."""
    (x, x_g), (y, y_g) = (
        (split.projections[name][split.train[name]], split.orthologs[name][split.train[name]])
        for name in ("mouse", "human")
    )
    genes = gene_alignment(x, y, *shared_coefficients(split))
    options: dict[str, Any] = {"seed": split.seed, "progress": False}
    adversarial = adversarial_alignment(x, y, ADVERSARIAL, restarts=range(2), **options)
    started = adversarial_alignment(x, y, ADVERSARIAL, start=genes.forward_dd, restarts=[0], **options)
    return {
        "adversarial": adversarial,
        "adversarial from genes": started,
        "orthologs": ortholog_alignment(x, y, x_g, y_g),
        "genes": genes,
        "transport": transport_alignment(x, y, x_g, y_g),
        "transport, least squares": transport_alignment(x, y, x_g, y_g, linear_map="least_squares"),
    }


def shared_coefficients(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, shared genes) coefficients in the mouse and in the human PCA of the orthologs that both kept."""
    names = {name: np.array(split.pair[name].genes)[split.pair[name].shared_g] for name in NAMES}
    kept = {name: pd.Index(split.extractor.gene_ids(name)).get_indexer(pd.Index(names[name])) for name in NAMES}
    both = (kept["human"] >= 0) & (kept["mouse"] >= 0)
    human, mouse = (
        torch.from_numpy(split.extractor.projection(name).components_kg[:, kept[name][both]]) for name in NAMES
    )
    return mouse, human


# ---- baselines


def shared_pca(split: Split) -> Space:
    """PCA of the shared one-to-one orthologs, standardized by species: the simplest cross-species space."""
    fitted = torch.cat([split.orthologs[name][split.train[name]] for name in NAMES])
    axes = torch.linalg.svd(fitted, full_matrices=False).Vh[:N_COMPONENTS]
    return Space("shared-ortholog PCA", {name: (split.orthologs[name] @ axes.T).numpy() for name in NAMES})


def saucie(name: str, inputs: dict[str, np.ndarray], split: Split, **penalties: Any) -> Space:
    """SAUCIE; where its penalties correct batches, these are the species, and human is the reference."""
    torch.manual_seed(split.seed)
    x = {s: torch.as_tensor(np.asarray(inputs[s]), dtype=torch.float32) for s in NAMES}
    scale = {s: x[s][split.train[s]].square().mean().sqrt() for s in NAMES}
    x = {s: rows / scale[s] for s, rows in x.items()}
    fitted = torch.cat([x[s][split.train[s]] for s in NAMES])
    batch = torch.tensor(np.repeat([0, 1], [split.train[s].sum() for s in NAMES]))
    model = SaucieModel(SaucieConfig(n_components=fitted.shape[1], **penalties))
    optimizer = torch.optim.Adam(model.parameters(), lr=SAUCIE_RATE)
    # Its narrowest kernels underflow, which is slow on CPUs.
    torch.set_flush_denormal(True)
    for _ in range(SAUCIE_STEPS):
        rows = torch.randint(len(fitted), (SAUCIE_BATCH,))
        optimizer.zero_grad()
        model(fitted[rows], batch[rows]).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = {s: model(x[s], torch.full((len(x[s]),), i)) for i, s in enumerate(NAMES)}
    back = {s: (output.reconstructions * scale[s]).numpy() for s, output in found.items()}
    return Space(name, {s: output.embeddings.numpy() for s, output in found.items()}, back)


def harmony(split: Split) -> Space | None:
    """Harmony on the shared-ortholog PCA of all cells: it has no way to place new ones, so it sees held-out cells."""
    if importlib.util.find_spec("harmonypy") is None:
        return None
    harmonypy = importlib.import_module("harmonypy")
    logging.getLogger("harmonypy").setLevel(logging.ERROR)
    cells = shared_pca(split).cells
    species = np.repeat(NAMES, [len(cells[name]) for name in NAMES])
    meta = pd.DataFrame({"species": species})
    found = harmonypy.run_harmony(
        np.concatenate([cells[name] for name in NAMES]), meta, "species", random_state=split.seed, verbose=False
    )
    corrected = np.asarray(found.Z_corr)
    corrected = corrected if len(corrected) == len(species) else corrected.T
    return Space("Harmony", {name: corrected[species == name] for name in NAMES})


def scvi(split: Split) -> Space | None:
    """scVI on the counts of the shared orthologs, species as batches, trained on training cells."""
    if importlib.util.find_spec("scvi") is None:
        return None
    import anndata as ad

    scvi = importlib.import_module("scvi")

    scvi.settings.seed = split.seed
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parts = {}
    for name in NAMES:
        species = split.pair[name]
        parts[name] = ad.AnnData(species.adata.X[:, species.shared_g].astype(np.float32))
        parts[name].var_names = [f"ortholog {i}" for i in range(parts[name].n_vars)]
    cells = ad.concat(parts, label="species", index_unique=" ")
    train = np.concatenate([split.train[name] for name in NAMES])
    fitted = cells[train].copy()
    scvi.model.SCVI.setup_anndata(fitted, batch_key="species")
    with contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
        model = scvi.model.SCVI(fitted, n_latent=N_COMPONENTS)
        model.train(max_epochs=SCVI_EPOCHS, accelerator="cpu", enable_progress_bar=False, logger=False)
        latent = model.get_latent_representation(cells)
    return Space("scVI", {name: latent[cells.obs["species"] == name] for name in NAMES})


# ---- all of them


def spaces(split: Split, models: dict[str, Any], found: dict[str, Alignment]) -> Iterator[Space]:
    """Every row of the tables, one after another."""
    x = split.projections
    yield Space("PCA, unaligned", {s: rows.numpy() for s, rows in x.items()}, {s: r.numpy() for s, r in x.items()})
    for way, alignment in found.items():
        mapped = x["mouse"] @ alignment.forward_dd.T
        yield Space(f"PCA, {way}", {"human": x["human"].numpy(), "mouse": mapped.numpy()})
    for axis, model in models.items():
        yield model_space(f"model, {axis}, unaligned", model, split)
        for way, alignment in found.items():
            yield model_space(f"model, {axis}, {way}", model, split, alignment.forward_dd)
        random = untrained(model, split.seed)
        yield model_space(f"untrained, {axis}, unaligned", random, split)
        yield model_space(f"untrained, {axis}, transport", random, split, found["transport"].forward_dd)
    shared = shared_pca(split)
    yield saucie("SAUCIE", {s: rows.numpy() for s, rows in x.items()}, split)
    # As published: clustering on the components each species has, correction on features that both have
    on_orthologs = saucie("SAUCIE, shared orthologs", shared.cells, split, lambda_b=0.1, lambda_c=0.0, lambda_d=0.0)
    on_orthologs.reconstructions = None  # of other components
    yield on_orthologs
    yield shared
    for space in (harmony(split), scvi(split)):
        if space is not None:
            yield space
