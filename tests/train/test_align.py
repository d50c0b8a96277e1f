"""train/align.py end to end on small data: what it leaves, that it translates, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellglot import CrossSpeciesConfig, CrossSpeciesForMaskedReconstruction, PCAProjectionFeatureExtractor
from cellglot.modeling.cross_species import CrossSpeciesForTranslation
from cellglot.train import align
from cellglot.train.align import AlignConfig, main
from cellglot.train.alignment_data import SharedExpression, run_options, shared_expression
from cellglot.train.config import parse_config, write_run_record
from cellglot.train.ortholog_table import SharedGenes
from cellglot.train.pretrain_cross_species import CrossSpeciesPretrainConfig

N_GENES, D = 37, 11
HUMAN = [f"ENSG{i:011d}" for i in range(N_GENES)]
MOUSE = [f"ENSMUSG{i:011d}" for i in range(100, 100 + N_GENES)]
TYPES = ["astrocyte", "microglia", "neuron"]


def brain(genes, n, seed, types=TYPES):
    """Cells of types that express alike in both species; genes in another order in each."""
    rate = np.random.default_rng(7).gamma(0.5, 6, size=(len(TYPES), N_GENES))
    rng = np.random.default_rng(seed)
    of = rng.choice([TYPES.index(name) for name in types], size=n)
    counts = rng.poisson(rate[of] * rng.gamma(5, 0.3, size=(n, 1))).astype(np.float32)
    order = rng.permutation(N_GENES)
    obs = pd.DataFrame({"cell_type": np.array(TYPES)[of]}, index=pd.Index([f"cell{seed}-{i}" for i in range(n)]))
    return ad.AnnData(
        sp.csr_matrix(counts[:, order]), obs=obs, var=pd.DataFrame(index=pd.Index(np.array(genes)[order]))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Cells of both species, their orthologs, and a pre-trained model's directory (of random weights)."""
    folder = tmp_path_factory.mktemp("brain")
    brain(HUMAN, 120, 0).write_h5ad(folder / "human.h5ad")
    brain(MOUSE, 150, 1).write_h5ad(folder / "mouse.h5ad")
    pd.DataFrame({"human": HUMAN, "mouse": MOUSE}).to_csv(folder / "orthologs.csv", index=False)
    sources = {name: folder / f"{name}.h5ad" for name in ("human", "mouse")}
    extractor = PCAProjectionFeatureExtractor.fit(sources, n_components=D, progress=False)
    config = CrossSpeciesConfig.from_preset(
        "small", n_components=D, hidden_size=32, intermediate_size=48, token_axis="components", num_patches=3
    )
    CrossSpeciesForMaskedReconstruction(config).save_pretrained(folder / "model")
    extractor.save_pretrained(folder / "model")
    return folder


QUICK = {"learning_rate": 1e-3, "batch_size": 32, "epochs": 1, "epoch_steps": 5, "hidden_size": 8, "restarts": 2}


def words(folder, method, output, **options):
    sources = [f"{name}={folder / name}.h5ad" for name in ("human", "mouse")]
    options = {
        "model": folder / "model", "orthologs": folder / "orthologs.csv", "output": output, "sources": sources,
        "cell_type": "cell_type", "validation_fraction": 0.3, "method": method.split(), **QUICK, **options,
    }  # fmt: skip
    flags = {
        name: value if isinstance(value, list) else [value] for name, value in options.items() if value is not None
    }
    return [str(word) for name, values in flags.items() for word in (f"--{name}", *values)]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    main(words(folder, "procrustes_genes adversarial procrustes_orthologs optimal_transport", output))
    return output


def test_leaves_a_complete_model_directory_and_nothing_half_written(finished):
    names = {path.name for path in (finished / "model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "projection.safetensors",
        "README.md",
    } <= names
    assert {"metrics.json", "modeling_cross_species.py", "pca_projection.py"} <= names
    assert {path.name for path in finished.iterdir()} == {"model", "matchability.parquet", "report.json", "run.json"}
    assert [path.name for path in finished.parent.iterdir()] == ["run"]
    assert not [path for path in finished.rglob("*") if path.suffix in {".bin", ".pkl", ".pt", ".tmp"}]


def aligners(run) -> list[Any]:
    """W of each aligner, in the order of the configuration."""
    return [aligner.weight for aligner in CrossSpeciesForTranslation.from_pretrained(run / "model").aligners]


def test_model_translates_both_ways_and_the_ways_undo_each_other(finished, folder):
    model = CrossSpeciesForTranslation.from_pretrained(finished / "model")
    extractor = PCAProjectionFeatureExtractor.from_pretrained(finished / "model")
    assert sorted(model.config.aligners) == [["human", "mouse"], ["mouse", "human"]]
    back, forth = aligners(finished)
    torch.testing.assert_close(back @ forth, torch.eye(D), atol=1e-4, rtol=0)
    cells = extractor(folder / "mouse.h5ad", "mouse", return_tensors="pt")
    translated = model.translate(cells["projections"], source="mouse", target="human")
    assert extractor.inverse(translated, "human").shape == (150, N_GENES)
    # The encoder and decoder are those that were pre-trained.
    before = CrossSpeciesForMaskedReconstruction.from_pretrained(folder / "model").state_dict()
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_aligned_cells_lie_with_their_type_and_the_report_says_so(finished):
    report = json.loads((finished / "report.json").read_text())
    rows = {row["method"]: row for row in report["methods"]}
    assert list(rows) == ["none", "procrustes_genes", "adversarial", "procrustes_orthologs", "optimal_transport"]
    for method in ("procrustes_genes", "procrustes_orthologs", "optimal_transport"):
        assert min(rows[method]["f1_to_target"], rows[method]["f1_to_source"]) > 0.9, method
    assert report["n_cells"]["mouse"] == {"train": 105, "held_out": 45}
    assert report["facts"]["mouse -> human"]["procrustes_genes"]["genes"] == N_GENES
    card = (finished / "model" / "README.md").read_text()
    assert f"| mouse -> human | procrustes_genes | {rows['procrustes_genes']['criterion']:.3f} |" in card
    assert "demonstration that the method runs" in card
    assert json.loads((finished / "model" / "metrics.json").read_text()) == report


def test_every_cell_has_a_score_and_types_without_counterpart_a_low_one(finished, folder, tmp_path):
    table = pd.read_parquet(finished / "matchability.parquet")
    assert table.groupby("source").size().to_dict() == {"human": 120, "mouse": 150}
    assert table["score"].between(0, 1).all()
    human = ad.read_h5ad(folder / "human.h5ad").obs
    of_human = table[table["source"] == "human"].set_index("cell")
    assert (of_human.loc[human.index, "class"] == human["cell_type"].astype(str)).all()

    brain(MOUSE, 150, 1, types=TYPES[:2]).write_h5ad(tmp_path / "mouse.h5ad")
    sources = [f"human={folder / 'human.h5ad'}", f"mouse={tmp_path / 'mouse.h5ad'}"]
    main(words(folder, "procrustes_genes", tmp_path / "run", sources=sources))
    table = pd.read_parquet(tmp_path / "run" / "matchability.parquet")
    median = table[table["source"] == "human"].groupby("class")["score"].median()
    assert median["neuron"] < 0.5 * median[TYPES[:2]].min()


def test_first_method_is_the_one_saved(finished, folder, tmp_path):
    main(words(folder, "procrustes_genes", tmp_path / "run"))
    one, first = (CrossSpeciesForTranslation.from_pretrained(run / "model") for run in (tmp_path / "run", finished))
    torch.testing.assert_close(one.state_dict(), first.state_dict())
    main(words(folder, "optimal_transport", tmp_path / "run", overwrite=True, transport="gromov", orthologs=None))
    assert not torch.allclose(aligners(tmp_path / "run")[0], aligners(finished)[0], atol=0.1)


def test_classes_of_other_names_are_made_one(folder, tmp_path):
    mouse = ad.read_h5ad(folder / "mouse.h5ad")
    mouse.obs["cell_type"] = "mouse " + mouse.obs["cell_type"].astype(str)
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    pd.DataFrame({"label": [f"mouse {name}" for name in TYPES], "class": TYPES}).to_csv(tmp_path / "c.csv", index=False)
    sources = [f"human={folder / 'human.h5ad'}", f"mouse={tmp_path / 'mouse.h5ad'}"]
    for classes, shared in ((None, False), (tmp_path / "c.csv", True)):
        run = tmp_path / f"run{shared}"
        main(words(folder, "procrustes_genes", run, sources=sources, classes=classes))
        f1 = json.loads((run / "report.json").read_text())["methods"][1]["f1_to_target"]
        assert (f1 is not None and f1 > 0.9) == shared
        card = (run / "model" / "README.md").read_text()
        assert ("No class of cells is known by one name" in card[: card.index("## Loading")]) == (not shared)


def test_options_of_the_pre_training_run_stand_in_for_those_not_given(folder, tmp_path):
    ran = CrossSpeciesPretrainConfig(
        sources=[f"human={folder / 'human.h5ad'}"], cell_type=["cell_type"], validation_fraction=0.4, seed=5
    )
    write_run_record(tmp_path / "run.json", ran)
    options = run_options(AlignConfig(model=str(tmp_path / "model")))
    assert options == ran
    given = run_options(AlignConfig(model=str(tmp_path / "model"), validation_fraction=0.2, layer=["counts"]))
    assert (given.validation_fraction, given.layer, given.seed) == (0.2, ["counts"], 5)


def test_an_aligned_model_is_aligned_anew_on_the_same_cells(finished, folder, tmp_path):
    given = {"model": finished / "model", "sources": None, "cell_type": None, "validation_fraction": None, "seed": 3}
    main(words(folder, "procrustes_genes", tmp_path / "run", **given))
    first, again = (json.loads((run / "report.json").read_text()) for run in (finished, tmp_path / "run"))
    assert again["n_cells"] == first["n_cells"]
    assert again["data"] == first["data"]
    # Genes leave nothing to chance: the same cells held out have the same figures.
    rows = [next(row for row in r["methods"] if row["method"] == "procrustes_genes") for r in (first, again)]
    assert rows[0]["f1_to_target"] == rows[1]["f1_to_target"]
    assert rows[0]["criterion"] == pytest.approx(rows[1]["criterion"], rel=1e-5)


def test_symbols_join_sources_that_have_other_ids(folder, tmp_path):
    """A table of symbols, and human cells by Ensembl ids that have symbols besides."""
    human = ad.read_h5ad(folder / "human.h5ad")
    human.var["gene_symbol"] = [f"GENE{HUMAN.index(name)}" for name in human.var_names]
    sources = {"human": human, "mouse": folder / "mouse.h5ad"}
    extractor = PCAProjectionFeatureExtractor.fit(sources, n_components=D, progress=False)
    path = tmp_path / "symbols.csv"
    table = pd.DataFrame({"human": [f"GENE{i}" for i in range(N_GENES)], "mouse": MOUSE})
    table.to_csv(path, index=False)
    shared = shared_expression(str(path), extractor, "mouse", "human", torch.device("cpu")).shared
    pairs = zip(shared.index_a, shared.index_b, strict=True)
    joined = {(extractor.gene_ids("mouse")[i], extractor.gene_ids("human")[j]) for i, j in pairs}
    assert joined == set(zip(MOUSE, HUMAN, strict=True))


def test_shared_expression_in_few_coordinates_keeps_inner_products():
    generator = torch.Generator().manual_seed(0)
    a_dg, b_dg = (torch.randn(3, 50, generator=generator) for _ in range(2))
    a_nd, b_md = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator)
    shared = SharedExpression(SharedGenes(np.arange(50), np.arange(50), ("a", "b")), a_dg, b_dg)
    few_a, few_b = shared.coordinates(a_nd, b_md)
    assert few_a.shape == (7, 6)
    torch.testing.assert_close(few_a @ few_b.T, (a_nd @ a_dg) @ (b_md @ b_dg).T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(few_a @ few_a.T, (a_nd @ a_dg) @ (a_nd @ a_dg).T, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_share_out_the_restarts_and_find_what_one_finds(folder, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    for n in (1, 2):
        script = [str(Path(align.__file__).resolve()), *words(folder, "adversarial", tmp_path / str(n), restarts=3)]
        done = subprocess.run([*launch, str(n), *script], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (CrossSpeciesForTranslation.from_pretrained(tmp_path / n / "model") for n in "12")
    torch.testing.assert_close(one.state_dict(), two.state_dict())
    facts = [json.loads((tmp_path / n / "report.json").read_text())["facts"] for n in "12"]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("recipe", ["align_brain_small", "align_paper"])
def test_recipes_are_options(recipe):
    path = Path(align.__file__).parent / "recipes" / f"{recipe}.yaml"
    config = parse_config(AlignConfig, ["--recipe", str(path), "--orthologs", "orthologs.tsv"])
    assert config.output.startswith("runs/cross-species")


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return str(stopped.value) + capsys.readouterr().err


def test_bad_input_is_named(folder, tmp_path, capsys):
    output = tmp_path / "run"
    (tmp_path / "other.csv").write_text("human,mouse\nTP53,Trp53\n")
    wrong = [f"human={folder / 'human.h5ad'}", f"rat={folder / 'mouse.h5ad'}"]
    few = tmp_path / "few.h5ad"
    brain(MOUSE, 2, 0).write_h5ad(few)
    zero, counted = tmp_path / "zero.h5ad", brain(MOUSE, 40, 0)
    counted.X = sp.csr_matrix(np.zeros(counted.shape, dtype=np.float32))
    counted.write_h5ad(zero)
    cases = [
        ({"sources": [wrong[0], f"mouse={zero}"]}, "none of its 40 cells has counts of the model's genes"),
        ({"orthologs": tmp_path / "other.csv"}, "joins no gene"),
        ({"orthologs": None}, "needs --orthologs FILE"),
        ({"sources": wrong}, "Expected one of the sources 'human', 'mouse', found 'rat'"),
        ({"sources": wrong[:1]}, "No cells of source 'mouse'"),
        ({"sources": [wrong[0], f"mouse={few}"]}, "two are the least"),
        ({"restarts": 0}, "restarts must be positive"),
        ({"sources": None}, "pass --sources"),
        ({"classes": folder / "orthologs.csv"}, "expected the columns label and class"),
        ({"model": folder}, "holds no preprocessor_config.json"),
        ({"model": tmp_path / "nowhere"}, "pass --model with the model directory"),
    ]
    for options, message in cases:
        assert message in refusal(words(folder, "procrustes_genes", output, **options), capsys), options
        assert not output.exists()
    assert "method takes each of adversarial" in refusal(words(folder, "procrustes", output), capsys)


def test_earlier_run_is_kept_unless_told_and_other_folders_always(finished, folder, tmp_path, capsys):
    assert "pass --overwrite" in refusal(words(folder, "procrustes_genes", finished), capsys)
    (tmp_path / "thesis.txt").write_text("all of it")
    message = refusal(words(folder, "procrustes_genes", tmp_path, overwrite=True), capsys)
    assert "no run of this script" in message
    assert (tmp_path / "thesis.txt").exists()
