"""Speed of the cross-species method: an epoch of the `base` model beside scVI's, and exact Wasserstein distances.

    python benchmarks/cross_species_speed.py --json benchmarks/results/cross_species_speed.json

An epoch is one of training on the same real cells (scmixology: 1,408 cells, 22,746 genes), for scVI (scvi-tools,
defaults, minibatches of 128) on counts of all genes, for `base` (46.6M parameters, steps of 1,024 cells, 10% of the
entries masked) on their components, which are computed once: how long that takes is a row of its own. Wasserstein:
1,000 against 1,000 cells in 1,024 dimensions, beside POT's solver alone on distances that are ready, and with them.
"""

import argparse
import importlib
import importlib.util
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import answer_as_contender, interleaved, machine, median, print_table, run_contender, save_results, worst

DATA = Path(os.environ.get("CELLGLOT_DATA", "../shared/data"))
BATCH_SIZE, MEASURED_EPOCHS = 1024, 3


def projection(cells: str, components: str, seed: int) -> dict[str, Any]:
    """Fits and projects; the components of all cells are saved for `epoch_base`."""
    from cellglot import PCAProjectionFeatureExtractor

    start = time.perf_counter()
    extractor = PCAProjectionFeatureExtractor.fit({"human": cells}, seed=seed, progress=False)
    fitted = time.perf_counter()
    x_nk = extractor(cells, source="human")["projections"]
    seconds = time.perf_counter() - fitted
    np.save(components, x_nk)
    return {"fit_seconds": fitted - start, "seconds": seconds, "n_cells": len(x_nk), "n_components": x_nk.shape[1]}


def epoch_base(cells: str, components: str, seed: int) -> dict[str, Any]:
    """Median seconds of the epochs after the first."""
    import torch

    from cellglot.modeling.cross_species import CrossSpeciesConfig, CrossSpeciesForMaskedReconstruction
    from cellglot.onednn import OneDNNLinear

    torch.manual_seed(seed)
    x_nk = torch.from_numpy(np.load(components))
    source_n = torch.zeros(len(x_nk), dtype=torch.int64)
    config = CrossSpeciesConfig.from_preset("base", n_components=x_nk.shape[1], sources=["human"])
    model = CrossSpeciesForMaskedReconstruction(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    seconds = []
    for _ in range(1 + MEASURED_EPOCHS):
        start = time.perf_counter()
        for rows in torch.randperm(len(x_nk)).split(BATCH_SIZE):
            with OneDNNLinear():
                model(x_nk[rows], source_n[rows], labels=x_nk[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:])}


def epoch_scvi(cells: str, components: str, seed: int) -> dict[str, Any]:
    """Seconds of an epoch: what `MEASURED_EPOCHS` more of them add to a training."""
    import anndata as ad

    scvi = importlib.import_module("scvi")
    scvi.settings.seed = seed
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    adata = ad.read_h5ad(cells)
    scvi.model.SCVI.setup_anndata(adata)
    seconds = {}
    for n_epochs in (1, 1 + MEASURED_EPOCHS):
        model = scvi.model.SCVI(adata)
        start = time.perf_counter()
        model.train(max_epochs=n_epochs, accelerator="cpu", train_size=1.0, enable_progress_bar=False, logger=False)
        seconds[n_epochs] = time.perf_counter() - start
    return {"seconds": (seconds[1 + MEASURED_EPOCHS] - seconds[1]) / MEASURED_EPOCHS}


def wasserstein(cells: str, components: str, seed: int) -> dict[str, Any]:
    """Seconds of `exact_wasserstein`, and of POT on the same cells."""
    import ot

    from cellglot.metrics.wasserstein import exact_wasserstein

    rng = np.random.default_rng(seed)
    x_nd, y_md = rng.standard_normal((2, 1000, 1024))
    found: dict[str, list[float]] = {"seconds": [], "emd2": [], "dist_and_emd2": []}
    for _ in range(3):
        start = time.perf_counter()
        ours = exact_wasserstein(x_nd, y_md)
        found["seconds"].append(time.perf_counter() - start)
        start = time.perf_counter()
        costs = ot.dist(x_nd, y_md)
        ready = time.perf_counter()
        bare: Any = ot.emd2([], [], costs, numItermax=10_000_000)
        found["emd2"].append(time.perf_counter() - ready)
        found["dist_and_emd2"].append(time.perf_counter() - start)
        assert abs(ours - bare**0.5) < 1e-6 * ours
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    contenders = {
        "projection": projection,
        "epoch_base": epoch_base,
        "epoch_scvi": epoch_scvi,
        "wasserstein": wasserstein,
    }
    answer_as_contender(contenders)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=DATA / "cells/tian2019_scmixology_celseq2_dropseq.h5ad")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if importlib.util.find_spec("scvi") is None:
        print('scvi-tools is not installed, so its row is left out: pip install "cellglot[benchmark-cross-species]"')
        contenders.pop("epoch_scvi")
    with tempfile.TemporaryDirectory() as work:
        arguments = {"cells": str(options.cells), "components": f"{work}/components.npy", "seed": options.seed}
        facts = run_contender(__file__, "projection", arguments)
        timed = [name for name in contenders if name != "projection"]
        found = interleaved(__file__, timed, arguments, repeats=options.repeats)
    results: dict[str, Any] = {
        **machine(),
        "repeats": options.repeats,
        "seed": options.seed,
        "n_cells": facts["n_cells"],
        "n_components": facts["n_components"],
        "fit_seconds": facts["fit_seconds"],
        "project_seconds": facts["seconds"],
        "wasserstein_seconds": median(found["wasserstein"], "seconds"),
        "emd2_seconds": median(found["wasserstein"], "emd2"),
        "dist_and_emd2_seconds": median(found["wasserstein"], "dist_and_emd2"),
    }
    results["wasserstein_over_emd2"] = results["wasserstein_seconds"] / results["emd2_seconds"]
    rows = [
        ["fit of the PCA, once", results["fit_seconds"], facts["peak_rss_mb"]],
        ["projection, once", results["project_seconds"], facts["peak_rss_mb"]],
    ]
    for name in ("epoch_base", "epoch_scvi"):
        if name in found:
            results[f"{name}_seconds"] = median(found[name], "seconds")
            results[f"{name}_peak_rss_mb"] = worst(found[name], "peak_rss_mb")
            rows.append([name, results[f"{name}_seconds"], results[f"{name}_peak_rss_mb"]])
    if "epoch_scvi" in found:
        results["epoch_ratio"] = results["epoch_scvi_seconds"] / results["epoch_base_seconds"]
    memory = worst(found["wasserstein"], "peak_rss_mb")
    rows += [
        [f"{name}, 1,000 x 1,000 x 1,024", results[f"{key}_seconds"], memory]
        for name, key in (("exact Wasserstein", "wasserstein"), ("emd2", "emd2"), ("dist and emd2", "dist_and_emd2"))
    ]
    print_table(["what", "seconds", "peak MB"], rows)
    save_results(results, options.json)


if __name__ == "__main__":
    main()
