"""train/pretrain.py --method cross_species on small data: what it leaves, resumes, shares out and refuses."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoFeatureExtractor, AutoModel

from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_table
from cellglot.modeling.cross_species import CrossSpeciesForMaskedReconstruction
from cellglot.tokenization.pca_projection import PCAProjectionFeatureExtractor
from cellglot.train import cross_species_data
from cellglot.train.cross_species_data import (
    TRAIN,
    UNUSED,
    VALIDATION,
    MaskedComponentCollator,
    ProjectedCells,
    by_source,
    fit_extractor,
    prepare_data,
)
from cellglot.train.metrics_log import read_metrics
from cellglot.train.pretrain import main
from cellglot.train.pretrain_cross_species import CrossSpeciesPretrainConfig

from ..conftest import ROOT, synthetic_cells

SMALL = {
    "method": "cross_species",
    "n_components": 7,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_patches": 3,
    "max_steps": 6,
    "batch_size": 32,
    "validation_fraction": 0.2,
    "eval_every": 3,
}
N_CELLS = {"human": 97, "mouse": 61}


def cells_of(source: str, seed: int = 0) -> Any:
    cells = synthetic_cells(N_CELLS[source], {"human": 31, "mouse": 23}[source], seed=seed + len(source))
    if source == "mouse":
        cells.var_names = [f"ENSMUSG{i:011d}" for i in range(cells.n_vars)]
    return cells


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    for source in N_CELLS:
        cells_of(source).write_h5ad(folder / f"{source}.h5ad")
    return folder


def words(files, **options):
    sources = [f"{source}={files / source}.h5ad" for source in N_CELLS]
    given = [word for name, value in {**SMALL, **options}.items() for word in (f"--{name}", *map(str, _many(value)))]
    return given if "sources" in options else ["--sources", *sources, *given]


def _many(value):
    return value if isinstance(value, list) else [value]


def config(files, **options):
    sources = [f"{source}={files / source}.h5ad" for source in N_CELLS]
    return replace(CrossSpeciesPretrainConfig(), **{"sources": sources, **SMALL, **options})


def losses(output):
    return {line["step"]: line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line}


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    main(words(files, output=output))
    return output


def test_leaves_a_complete_model_directory(finished, files):
    names = {p.name for p in (finished / "model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "projection.safetensors",
        "modeling_cross_species.py",
        "configuration_cross_species.py",
        "pca_projection.py",
        "README.md",
        "metrics.json",
        "loss_curve.png",
        "umap_source.png",
        "umap_class.png",
    } <= names
    assert not [p for p in finished.rglob("*") if p.suffix in {".bin", ".pkl", ".pt", ".tmp"}]
    extractor = AutoFeatureExtractor.from_pretrained(finished / "model")
    model = AutoModel.from_pretrained(finished / "model")
    assert model.config.sources == list(extractor.sources) == ["human", "mouse"]
    assert model.config.n_components == 7
    batch = extractor(cells_of("mouse"), source="mouse", return_tensors="pt")
    assert model(**batch).embeddings.shape == (61, 16)
    loaded: Any = CrossSpeciesForMaskedReconstruction.from_pretrained(finished / "model", output_loading_info=True)
    whole, info = loaded
    assert not info["missing_keys"]
    # What divides a source's projections is their own size.
    data = prepare_data(config(files), finished / "data")
    projections, source_n = data.train.read(np.arange(len(data.train)))
    expected = [np.sqrt((projections[source_n == s] ** 2).mean()) for s in (0, 1)]
    assert whole.config.projection_rms == pytest.approx(expected, rel=1e-5)


def test_report_and_card_hold_the_run_s_own_figures(finished):
    report = json.loads((finished / "report.json").read_text())
    log = read_metrics(finished / "metrics.jsonl")
    assert report["validation_loss"] == log[-1]["validation_loss"]
    assert report["n_train_cells"] == {"human": 78, "mouse": 49}
    assert report["n_validation_cells"] == {"human": 19, "mouse": 12}
    guesses = ["mean", "linear map", "nearest cells", "this model"]
    assert [(row["source"], row["guess"]) for row in report["masked"]] == [(s, g) for s in N_CELLS for g in guesses]
    card = (finished / "model" / "README.md").read_text()
    metrics = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == pytest.approx(report["validation_loss"], rel=1e-3)
    assert [m["value"] for m in metrics[1:]] == [
        round(row["explained"], 4) for row in report["masked"] if row["guess"] == "this model"
    ]
    # Six steps teach nothing, and the card says so before anything else.
    assert card.index("does not beat a copy") < card.index("are guessed no worse by") < card.index("## Loading")


def test_the_copy_s_loss_is_the_mean_square_of_what_is_masked(finished, files):
    report = json.loads((finished / "report.json").read_text())
    of_mean = [row for row in report["masked"] if row["guess"] == "mean"]
    data = prepare_data(config(files), finished / "data")
    measured = np.random.default_rng(0).permutation(len(data.validation))
    cells, source_n = data.validation.subset(measured).read(np.arange(len(measured)))
    masked = np.stack([np.random.default_rng((1_000_003, 0, i)).random(7, dtype=np.float32) < 0.1 for i in range(31)])
    assert report["copy_loss"] == pytest.approx((np.where(masked, cells, 0) ** 2).mean(), rel=1e-5)
    for s, row in enumerate(of_mean):
        of_source = source_n == s
        assert row["mse"] == pytest.approx((cells[of_source][masked[of_source]] ** 2).mean(), rel=1e-5)


def test_expression_that_the_projection_explains_is_the_extractor_s_own_figure(finished, files):
    """Through another path: the extractor's reconstruction error of the same held-out cells."""
    data = prepare_data(config(files), finished / "data")
    report = json.loads((finished / "report.json").read_text())
    rows = [row for row in report["expression"] if row["guess"] == "projection, nothing masked"]
    for source, row in zip(data.sources, rows, strict=True):
        error = data.extractor.reconstruction_error(source.parts, source.name, mask=source.split == VALIDATION)
        assert row["explained"] == pytest.approx(1 - error.unexplained_variance, rel=1e-4)


def test_pictures_are_pictures(finished):
    from matplotlib.image import imread

    for name in ("loss_curve.png", "umap_source.png", "umap_class.png"):
        image = imread(finished / name)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.01


def test_the_projection_is_fitted_on_training_cells_only(finished, files):
    data = prepare_data(config(files), finished / "data")
    train = {s.name: cells_of(s.name)[s.split == TRAIN].copy() for s in data.sources}
    expected = PCAProjectionFeatureExtractor.fit(train, n_components=7, progress=False)
    for source in data.sources:
        ours, theirs = data.extractor.projection(source.name), expected.projection(source.name)
        assert ours.n_cells == theirs.n_cells == (source.split == TRAIN).sum()
        np.testing.assert_allclose(ours.mean_g, theirs.mean_g, rtol=1e-6)
        np.testing.assert_allclose(ours.components_kg, theirs.components_kg, atol=1e-4)


def test_projections_on_disk_are_those_of_the_extractor(finished, files):
    data = prepare_data(config(files), finished / "data")
    for s, source in enumerate(data.sources):
        expected = data.extractor(cells_of(source.name), source=source.name)["projections"]
        for part, cells in ((TRAIN, data.train), (VALIDATION, data.validation)):
            found, _ = cells.read(np.flatnonzero(cells.source_n == s))
            # 1e-4 of values of some ten: blocks of other sizes are summed in another order.
            np.testing.assert_allclose(found, expected[source.split == part], atol=1e-4)
        assert not (source.split == UNUSED).any()


def test_cells_are_read_by_source_and_row(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 3)).astype(np.float32) for n in (5, 7)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    cells = ProjectedCells([tmp_path / "0.npy", tmp_path / "1.npy"], np.array([0, 1, 1, 0]), np.array([4, 6, 0, 1]))
    expected = np.stack([arrays[0][4], arrays[1][6], arrays[1][0], arrays[0][1]])
    np.testing.assert_array_equal(cells.read(np.arange(4))[0], expected)
    rows = cells.subset(np.array([2, 0])).__getitems__([1, 0])
    np.testing.assert_array_equal([row["projections"] for row in rows], expected[[0, 2]])
    assert [int(row["source"]) for row in rows] == [0, 1]
    # Files are opened anew in a data loader's process, not sent to it.
    assert cells.__getstate__()["_opened"] is None


def test_what_is_masked_depends_on_the_cell_s_key_alone():
    rows = [{"projections": np.full(200, i, dtype=np.float32), "source": i % 2} for i in range(5)]
    keys = [(0, 1, i) for i in range(5)]
    collate = MaskedComponentCollator(0.1)
    whole, part = collate(rows, keys), collate(rows[3:], keys[3:])
    assert (whole["masked"][3:] == part["masked"]).all()
    assert 0.05 < whole["masked"].float().mean() < 0.15
    assert (collate(rows, [(0, 2, i) for i in range(5)])["masked"] != whole["masked"]).any()
    # The model hides them; the collator leaves the cell whole, as the label it is compared with.
    assert (whole["projections"] == whole["labels"]).all()
    assert whole["source"].tolist() == [0, 1, 0, 1, 0]


def test_groups_are_held_out_whole(files, tmp_path):
    data = prepare_data(config(files, split_by=["human=donor"]), tmp_path / "data")
    human, mouse = data.sources
    donors = cells_of("human").obs["donor"].to_numpy()
    assert not set(donors[human.split == TRAIN]) & set(donors[human.split == VALIDATION])
    donors = cells_of("mouse").obs["donor"].to_numpy()
    assert set(donors[mouse.split == TRAIN]) & set(donors[mouse.split == VALIDATION])


def write_corpus(cells, folder):
    """Two files as a corpus builder leaves them."""
    folder.mkdir(parents=True)
    cells.var.rename_axis("gene_id").reset_index()[["gene_id"]].to_parquet(folder / GENE_TABLE)
    for i, part in enumerate((slice(0, 40), slice(40, None))):
        table = ragged_table(cells.X[part], cells.obs.iloc[part])
        pq.write_table(table, folder / f"human_cortex-train-{i:05d}-of-00002.parquet")


def test_a_corpus_in_parquet_trains_like_the_same_cells_in_a_file(files, finished, tmp_path):
    write_corpus(cells_of("human"), tmp_path / "human_cortex" / "default")
    sources = [f"human={tmp_path / 'human_cortex'}", f"mouse={files / 'mouse.h5ad'}"]
    main(words(files, sources=sources, output=tmp_path / "run", report="false"))
    np.testing.assert_allclose(list(losses(tmp_path / "run").values()), list(losses(finished).values()), rtol=1e-4)
    with pytest.raises(SystemExit, match=r"--layer raw: .* is a corpus, which has no layers"):
        main(words(files, sources=sources, output=tmp_path / "other", layer="human=raw"))
    described = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["source"]
    assert described == "human cells of human_cortex and mouse cells of mouse.h5ad"


def test_files_of_a_folder_are_one_source_and_failed_cells_take_no_part(files, tmp_path):
    (tmp_path / "human").mkdir()
    cells = cells_of("human")
    cells.obs["filter_pass"] = (np.arange(97) % 5 > 0).astype(int)
    cells[:50].copy().write_h5ad(tmp_path / "human" / "a.h5ad")
    cells[50:].copy().write_h5ad(tmp_path / "human" / "b.h5ad")
    sources = [f"human={tmp_path / 'human'}", f"mouse={files / 'mouse.h5ad'}"]
    data = prepare_data(config(files, sources=sources), tmp_path / "data")
    human = data.sources[0]
    assert (human.split == UNUSED).tolist() == (np.arange(97) % 5 == 0).tolist()
    part = data.train.subset(data.train.source_n == 0)
    expected = data.extractor(cells, source="human")["projections"][human.split == TRAIN]
    np.testing.assert_allclose(part.read(np.arange(len(part)))[0], expected, atol=1e-4)


def test_what_a_killed_preparation_has_finished_is_kept(files, tmp_path, monkeypatch):
    first = prepare_data(config(files), tmp_path / "data")
    projections = (tmp_path / "data" / "human.npy").read_bytes()
    # As a kill amid the mouse's projections would leave it
    (tmp_path / "data" / "data.json").unlink()
    (tmp_path / "data" / "mouse.npy").rename(tmp_path / "data" / ".partial-mouse.npy")
    monkeypatch.setattr(PCAProjectionFeatureExtractor, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = prepare_data(config(files), tmp_path / "data")
    assert (tmp_path / "data" / "human.npy").read_bytes() == projections
    assert again.rms == first.rms
    # But nothing made with other options
    (tmp_path / "data" / "data.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        prepare_data(config(files, n_components=5), tmp_path / "data")


@pytest.mark.parametrize("axis", ["cells", "components"])
def test_a_resumed_run_has_the_same_losses(axis, files, tmp_path):
    output = tmp_path / "run"
    options = {"token_axis": axis, "output": output, "dropout": 0.1, "save_every": 4, "report": "false"}
    main(words(files, **options))
    expected = read_metrics(output / "metrics.jsonl")
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    main([*words(files, **options), "--resume"])
    assert read_metrics(output / "metrics.jsonl") == expected
    # Across cells, max_tokens decides which of them see each other.
    resume = [*words(files, **options, max_tokens=16), "--resume"]
    if axis == "cells":
        with pytest.raises(SystemExit, match="max_tokens was 32768 and is 16"):
            main(resume)
    else:
        main(resume)


def run(files, output, n_processes, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if n_processes == 2 else []
    given = words(files, output=output, report="false", cpu_threads=1, dropout=0.0, **options)
    command = [sys.executable, *launcher, str(ROOT / "train" / "pretrain.py"), *given]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"token_axis": "components"},
        {"token_axis": "components", "max_tokens": 20},
        # Contexts of 8 cells, 4 a step: the same ones whether one process has all or two have two each.
        {"token_axis": "cells", "max_tokens": 8, "validation_fraction": 0.25},
    ],
)
def test_two_processes_have_the_losses_of_one(options, files, tmp_path):
    # Steps of 32 cells throughout: 118 training cells make three and a rest.
    one = run(files, tmp_path / "one", 1, **{**options, "max_steps": 3})
    two = run(files, tmp_path / "two", 2, **{**options, "max_steps": 3})
    assert json.loads((two / "run.json").read_text())["n_processes"] == 2
    # 1e-5: sums in another order
    np.testing.assert_allclose(list(losses(two).values()), list(losses(one).values()), rtol=1e-5)


def test_options_by_source():
    names = ["human", "mouse"]
    assert by_source([], names, "cell_type") == {"human": None, "mouse": None}
    assert by_source(["Class"], names, "cell_type") == {"human": "Class", "mouse": "Class"}
    assert by_source(["mouse=Class", "label"], names, "cell_type") == {"human": "label", "mouse": "Class"}
    with pytest.raises(ValueError, match="--cell_type rat=Class: no source is named 'rat'; there are human, mouse"):
        by_source(["rat=Class"], names, "cell_type")
    with pytest.raises(ValueError, match="one value for all sources, or NAME=VALUE for each"):
        by_source(["a", "b"], names, "cell_type")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, r"no cells were given[\s\S]*human_cortex.py --output[\s\S]*mouse_brain.py --output"),
        ({"sources": ["human.h5ad"]}, "Expected --sources as NAME=PATH.*found 'human.h5ad'"),
        ({"sources": ["human=nowhere"]}, "--sources nowhere does not exist"),
        ({"sources": ["human=EMPTY"]}, "holds neither a corpus with genes.parquet nor .h5ad, .loom, .h5 files"),
        ({"sources": ["human=NORMALIZED.h5ad"]}, "expected raw counts, found .*allow_fractional"),
        ({"split_by": "patient"}, "obs has no column 'patient'; it has cell_type, donor"),
        ({"sources": ["human=ONE_DONOR.h5ad"], "split_by": "donor"}, r"Source human: All 97 cells are of one group"),
        ({"cell_type": "celltype"}, "obs has no column 'celltype'; it has cell_type, donor"),
        ({"layer": "mouse=counts"}, "has no layer 'counts'; it has X"),
    ],
)
def test_bad_data_ends_with_one_clear_line(options, message, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    cells = cells_of("human")
    cells.obs["donor"] = "a"
    cells.write_h5ad("ONE_DONOR.h5ad")
    cells.X = cells.X * 0.3
    cells.write_h5ad("NORMALIZED.h5ad")
    given = words(files, output=tmp_path / "run", **options)
    if options.get("sources") == []:
        given.remove("--sources")
    with pytest.raises(SystemExit, match=message):
        main(given)
    # Nothing is left that would stand in the way of the corrected command.
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "options",
    [{"model": "v9"}, {"mask_probability": 1.0}, {"n_components": 0}, {"num_attention_heads": 3}, {"pca_passes": 0}],
)
def test_impossible_values_are_errors(options, files, capsys):
    with pytest.raises(SystemExit):
        main(words(files, **options))
    assert "error:" in capsys.readouterr().err


def test_fewer_cells_than_components_is_said(files, tmp_path, caplog):
    sources, mark = cross_species_data.find_sources(config(files, n_components=1200))
    cross_species_data.begin(tmp_path / "data", mark)
    extractor = fit_extractor(config(files, n_components=1200), sources, tmp_path / "data")
    # The mouse's genes are the fewest.
    assert extractor.n_components <= 23
    assert "components in place of 1200" in caplog.text
