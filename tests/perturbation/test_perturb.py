"""`perturb_cells` against one cell at a time, and what it does with input that makes no sense."""

import gc
import tempfile
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from cellglot import perturb_cells
from cellglot.perturb import CellStates
from cellglot.perturbation.cells import open_cells
from cellglot.perturbation.statistics import shifts_to_states

from ..conftest import ensembl, make_tokenizer, synthetic_cells
from ..modeling.test_geneformer import tiny_model
from .naive import naive_effects

N_GENES = 31
CONTEXT = 17


def setup(
    layout: Literal["v1", "v2"] = "v1", n_cells: int = 5, seed: int = 0, shortest: int = 3
) -> tuple[list, Any, Any]:
    """Cells of several lengths up to the model's context, a model and its tokenizer."""
    tokenizer = make_tokenizer(N_GENES, layout)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, num_hidden_layers=3)
    rng = np.random.default_rng(seed)
    special = 2 if layout == "v2" else 0
    lengths = rng.integers(shortest, CONTEXT - special, size=n_cells)
    lengths[0] = CONTEXT - special
    cells = [rng.choice(tokenizer.gene_token_ids, n, replace=False) for n in lengths]
    if special:
        cells = [np.array([tokenizer.cls_token_id, *cell, tokenizer.eos_token_id]) for cell in cells]
    return cells, model, tokenizer


def run(source: Any, model: Any, tokenizer: Any, **options: Any) -> pd.DataFrame:
    return perturb_cells(source, model, tokenizer, progress=False, **options)


def names(tokenizer: Any, *tokens: int) -> list[str]:
    return tokenizer.convert_ids_to_tokens([int(token) for token in tokens])


# ---- what is computed


@pytest.mark.parametrize(("layout", "pooling"), [("v1", "mean"), ("v2", "mean"), ("v2", "cls")])
@pytest.mark.parametrize("kind", ["delete", "overexpress"])
@pytest.mark.parametrize("layer", [0, -1])
def test_all_genes_equal_one_cell_at_a_time(layout, kind, pooling, layer):
    cells, model, tokenizer = setup(layout, n_cells=3)
    rng = np.random.default_rng(1)
    states = {name: rng.normal(size=32).astype(np.float32) for name in ("a", "b")}
    dataset = datasets.Dataset.from_dict({"input_ids": cells, "state": ["a"] * len(cells)})
    options = {"kind": kind, "layer": layer, "pooling": pooling, "effect": "gene", "max_tokens": 40}
    frame = run(dataset, model, tokenizer, states=CellStates("state", "a", "b", embeddings=states), **options)
    n_checked = 0
    for i, cell in enumerate(cells):
        genes = cell[1:-1] if layout == "v2" else cell
        of_cell = frame[frame["cell"] == i]
        expected_genes = genes if kind == "delete" else genes[1:]
        assert of_cell.loc[of_cell["affected"] == "cell", "gene"].tolist() == names(tokenizer, *expected_genes)
        for gene in expected_genes:
            rows = of_cell[of_cell["gene"] == names(tokenizer, gene)[0]]
            expected = naive_effects(
                model, cell, kind, [gene], layout=layout, pooling=pooling, layer=layer, states=states.values()
            )
            assert rows["affected"].tolist() == ["cell", *names(tokenizer, *expected.affected)]
            assert set(rows["position"]) == {genes.tolist().index(gene)}
            # 1e-5: float32 sums in another order
            np.testing.assert_allclose(rows["cosine_similarity"], [expected.cell, *expected.genes], atol=1e-5)
            np.testing.assert_allclose(rows[["shift_to_a", "shift_to_b"]].iloc[0], expected.shifts, atol=1e-5)
            assert rows[["shift_to_a", "shift_to_b"]].iloc[1:].isna().all(axis=None)
            n_checked += len(rows)
    assert n_checked == len(frame)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_inserted_genes_push_the_tail_out_of_both_cells(layout):
    cells, model, tokenizer = setup(layout, n_cells=3)
    full = cells[0]
    genes = full[1:-1] if layout == "v2" else full
    absent = np.setdiff1d(tokenizer.gene_token_ids, genes)[:2]
    # One gene of the pair is the cell's last; it must stay, and another be pushed out.
    groups = [[absent[0]], [*absent], [genes[-1], absent[0]]]
    frame = run(
        cells, model, tokenizer, kind="overexpress", genes=[names(tokenizer, *g) for g in groups], effect="gene"
    )
    assert frame["cell"].nunique() == len(cells)
    for group in groups:
        label = "+".join(names(tokenizer, *group))
        for i, cell in enumerate(cells):
            rows = frame[(frame["gene"] == label) & (frame["cell"] == i)]
            expected = naive_effects(model, cell, "overexpress", group, layout=layout, max_tokens=CONTEXT)
            assert rows["affected"].tolist()[1:] == names(tokenizer, *expected.affected)
            np.testing.assert_allclose(rows["cosine_similarity"], [expected.cell, *expected.genes], atol=1e-5)
    assert set(frame.loc[frame["gene"] == names(tokenizer, absent[0])[0], "position"]) <= {-1, *range(CONTEXT)}


@pytest.mark.parametrize("kind", ["activate", "inhibit"])
def test_quartile_shifts_equal_a_cell_made_by_hand(kind):
    _, model, tokenizer = setup()
    cell = np.arange(2, 10)
    moved = {"activate": [2, 3, 4, 5, 6, 8, 7, 9], "inhibit": [3, 4, 5, 2, 6, 7, 8, 9]}[kind]
    gene = 8 if kind == "activate" else 2
    frame = run([cell], model, tokenizer, kind=kind, genes=names(tokenizer, gene))
    with torch.no_grad():
        before, after = (
            model.bert(torch.tensor(np.array([ids])), num_layers=2).last_hidden_state[0] for ids in (cell, moved)
        )
    others = [g for g in cell.tolist() if g != gene]
    similarity = [
        torch.cosine_similarity(before[cell.tolist().index(g)], after[moved.index(g)], dim=0).item() for g in others
    ]
    np.testing.assert_allclose(frame["cosine_similarity"], [np.mean(similarity)], atol=1e-5)


def test_of_all_genes_those_that_would_not_move_are_skipped_and_counted():
    _, model, tokenizer = setup()
    cell = np.arange(2, 10)
    for kind, stay in (("overexpress", [0]), ("activate", [0]), ("inhibit", [7])):
        frame = run([cell], model, tokenizer, kind=kind)
        assert sorted({*range(8)} - set(frame["position"])) == stay, kind
        assert frame.attrs["report"].endswith("; 1 as they change nothing")
    # A gene that was asked for by name stays in the table.
    listed = run([cell], model, tokenizer, kind="overexpress", genes=names(tokenizer, 2))
    np.testing.assert_allclose(listed["cosine_similarity"], [1], atol=1e-6)


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["delete", "overexpress", "inhibit", "activate"])
def test_results_do_not_depend_on_the_batches(layout, kind):
    cells, model, tokenizer = setup(layout, n_cells=7)
    frames = [run(cells, model, tokenizer, kind=kind, effect="gene", max_tokens=n) for n in (1, 50, 100_000)]
    for frame in frames[1:]:
        exact = ["cell", "gene", "position", "affected"]
        pd.testing.assert_frame_equal(frame[exact], frames[0][exact])
        np.testing.assert_allclose(frame["cosine_similarity"], frames[0]["cosine_similarity"], atol=1e-5)


def test_genes_one_at_a_time_and_together():
    cells, model, tokenizer = setup(n_cells=9, shortest=9)
    a, b = names(tokenizer, *cells[0][[2, 5]])
    frame = run(cells, model, tokenizer, genes=[a, [b, a], b])
    assert frame.loc[frame["cell"] == 0, "gene"].tolist() == [a, f"{b}+{a}", b]
    assert frame.loc[frame["cell"] == 0, "position"].tolist() == [2, 5, 5]
    for i, cell in enumerate(cells):
        held = [name in names(tokenizer, *cell) for name in (a, b)]
        expected = [a] * held[0] + [f"{b}+{a}"] * all(held) + [b] * held[1]
        assert frame.loc[frame["cell"] == i, "gene"].tolist() == expected
        if all(held):
            together = naive_effects(model, cell, "delete", tokenizer.convert_tokens_to_ids([a, b]), layout="v1").cell
            value = frame[(frame["cell"] == i) & (frame["gene"] == f"{b}+{a}")]["cosine_similarity"]
            np.testing.assert_allclose(value, [together], atol=1e-5)
    assert f"; {len(cells) - frame['cell'].nunique()} hold none of the genes" in frame.attrs["report"]


def test_an_anchor_is_perturbed_with_each_other_gene():
    cells, model, tokenizer = setup(n_cells=9)
    anchor = int(cells[0][4])
    frame = run(cells, model, tokenizer, anchor=names(tokenizer, anchor)[0])
    holders = [i for i, cell in enumerate(cells) if anchor in cell]
    assert sorted(set(frame["cell"])) == holders
    others = [g for g in cells[0].tolist() if g != anchor]
    rows = frame[frame["cell"] == 0]
    assert rows["gene"].tolist() == [f"{names(tokenizer, anchor)[0]}+{name}" for name in names(tokenizer, *others)]
    assert rows["position"].tolist() == [cells[0].tolist().index(g) for g in others]
    expected = [naive_effects(model, cells[0], "delete", [anchor, g], layout="v1").cell for g in others]
    np.testing.assert_allclose(rows["cosine_similarity"], expected, atol=1e-5)
    inserted = run(cells, model, tokenizer, kind="overexpress", anchor=names(tokenizer, anchor)[0])
    assert inserted["cell"].nunique() == len(cells)
    few = run(cells[:1], model, tokenizer, anchor=names(tokenizer, anchor)[0], genes=names(tokenizer, *others[:2]))
    pd.testing.assert_frame_equal(few, rows.iloc[:2].reset_index(drop=True), check_exact=False, atol=1e-5)


def test_genes_go_by_any_name():
    cells, model, _ = setup()
    table = pd.DataFrame({"alias": ["GATA4"], "ensembl_id": [ensembl(N_GENES)[int(cells[0][3]) - 2]]})
    from cellglot import RankValueTokenizer

    from ..conftest import vocabulary_table

    tokenizer = RankValueTokenizer.from_vocabulary(vocabulary_table(ensembl(N_GENES), [1.0] * N_GENES), aliases=table)
    gene = table["ensembl_id"][0]
    frames = [run(cells, model, tokenizer, genes=name) for name in (gene, f"{gene}.7", "GATA4", "gata4", ["GATA4"])]
    for frame in frames:
        assert set(frame["gene"]) == {gene}
        pd.testing.assert_frame_equal(frame, frames[0])


# ---- where cells come from


def test_anndata_file_dataset_and_tokens_agree(tmp_path):
    _, model, tokenizer = setup()
    adata = synthetic_cells(11, N_GENES)
    tokens = tokenizer.encode_anndata(adata, max_length=CONTEXT, obs_columns=["cell_type"])
    tokens.save_to_disk(tmp_path / "tokens")
    adata.write_h5ad(tmp_path / "c.h5ad")
    expected = run(list(tokens["input_ids"]), model, tokenizer)
    for source in (adata, tmp_path / "c.h5ad", tokens, tmp_path / "tokens", str(tmp_path / "tokens")):
        frame = run(source, model, tokenizer)
        named = "cell_name" in frame
        assert named == (source is adata or str(source).endswith("h5ad"))
        if named:
            assert frame.pop("cell_name").tolist() == [f"cell{i}" for i in frame["cell"]]
        pd.testing.assert_frame_equal(frame, expected)


def test_names_follow_cells_that_pass_the_filter():
    _, model, tokenizer = setup()
    adata = synthetic_cells(6, N_GENES)
    adata.obs["filter_pass"] = [0, 1, 0, 1, 1, 0]
    frame = run(adata, model, tokenizer, genes=ensembl(1), kind="overexpress")
    assert frame["cell_name"].tolist() == ["cell1", "cell3", "cell4"]
    assert frame["cell"].tolist() == [0, 1, 2]


def test_counts_may_lie_in_a_layer():
    _, model, tokenizer = setup()
    adata = synthetic_cells(5, N_GENES)
    expected = run(adata, model, tokenizer)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.toarray() / 7
    pd.testing.assert_frame_equal(run(adata, model, tokenizer, counts_layer="counts"), expected)


def test_states_of_a_column():
    from cellglot.embedding import embed_tokens

    _, model, tokenizer = setup()
    adata = synthetic_cells(23, N_GENES)
    adata.obs["state"] = adata.obs["cell_type"].astype(object)
    adata.obs.loc["cell3", "state"] = None
    frame = run(adata, model, tokenizer, states=CellStates("state", "B", "T", ["NK"]))
    start = np.flatnonzero(adata.obs["state"] == "B")
    assert sorted(set(frame["cell"])) == start.tolist()
    assert f"; {23 - len(start)} are of other states" in frame.attrs["report"]
    cells = [np.array(ids) for ids in tokenizer.encode_anndata(adata, max_length=CONTEXT)["input_ids"]]
    embeddings = embed_tokens(cells, model, tokenizer)
    means = [embeddings[(adata.obs["state"] == s).to_numpy()].mean(axis=0) for s in ("B", "T", "NK")]
    row = frame.iloc[7]
    gene = tokenizer.convert_tokens_to_ids([row["gene"]])
    expected = naive_effects(model, cells[row["cell"]], "delete", gene, layout="v1", states=means)
    np.testing.assert_allclose(
        row[["shift_to_B", "shift_to_T", "shift_to_NK"]].astype(float), expected.shifts, atol=1e-5
    )


def test_tables_go_to_files_with_what_is_known_of_them(tmp_path):
    _, model, tokenizer = setup()
    states = CellStates("cell_type", "B", "T", ["NK"])
    frame = run(synthetic_cells(23, N_GENES), model, tokenizer, states=states, max_cells=3)
    assert frame.attrs["report"].split(" edits in ")[0] == f"{len(frame):,}"
    frame.to_parquet(tmp_path / "effects.parquet")
    read = pd.read_parquet(tmp_path / "effects.parquet")
    pd.testing.assert_frame_equal(read, frame)
    assert read.attrs == frame.attrs
    for table in (frame, read, frame[frame["position"] > 0]):
        assert list(shifts_to_states(table)["state"].unique()) == ["T", "NK"]
    frame.to_json(tmp_path / "effects.json")


@pytest.mark.parametrize("kind", ["AnnData", "Dataset"])
def test_states_may_be_numbers_and_missing_in_some_cells(kind):
    _, model, tokenizer = setup()
    adata = synthetic_cells(9, N_GENES)
    adata.obs["state"] = pd.array([1, 2, None, 1, 2, 1, 1, 2, 2], dtype="Int64")
    source = adata
    if kind == "Dataset":
        source = tokenizer.encode_anndata(adata, max_length=CONTEXT, obs_columns=["state"])
    frame = run(source, model, tokenizer, states=CellStates("state", "1", "2"))
    assert sorted(set(frame["cell"])) == [0, 3, 5, 6]


def test_counts_become_tokens_in_a_file_that_goes_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _, model, tokenizer = setup()
    adata = synthetic_cells(9, N_GENES)
    cells = open_cells(adata, tokenizer, max_length=CONTEXT)
    (file,) = cells._tokens.cache_files
    assert tmp_path in Path(file["filename"]).parents
    expected = tokenizer.encode_anndata(adata, max_length=CONTEXT)["input_ids"]
    assert [tokens.tolist() for tokens in cells.iter_tokens()] == list(expected)
    assert [cells.tokens(i).tolist() for i in range(len(cells))] == list(expected)
    del cells
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    run(adata, model, tokenizer)
    with pytest.raises(ValueError, match="obs has no column 'absent'"):
        open_cells(adata, tokenizer, label_column="absent", max_length=CONTEXT)
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    # A file that the caller names is the caller's.
    run(adata, model, tokenizer, cache_file=tmp_path / "tokens.arrow")
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.arrow"]


def test_a_sample_of_cells_is_drawn_by_seed():
    cells, model, tokenizer = setup(n_cells=13)
    everything = run(cells, model, tokenizer)
    samples = [run(cells, model, tokenizer, max_cells=4, seed=seed) for seed in (0, 0, 1)]
    chosen = [sorted(set(sample["cell"])) for sample in samples]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 4
    expected = everything[everything["cell"].isin(chosen[0])]
    np.testing.assert_allclose(samples[0]["cosine_similarity"], expected["cosine_similarity"], atol=1e-5)
    assert "; 9 were not sampled (max_cells)" in samples[0].attrs["report"]


def test_empty_cells_and_cells_of_one_gene_are_left_out_and_counted():
    for layout in ("v1", "v2"):
        cells, model, tokenizer = setup(layout)
        one = cells[1][:1] if layout == "v1" else cells[1][[0, 1, -1]]
        empty = np.array([], dtype=int)
        frame = run([cells[2], one, empty, cells[3]], model, tokenizer)
        assert sorted(set(frame["cell"])) == [0, 3]
        assert frame.attrs["report"].endswith(
            " edits in 2 of 4 cells; 1 cells are empty; 1 edits skipped as they leave no other gene"
        )
        with pytest.raises(
            ValueError, match=r"Nothing to perturb: 0 edits in 0 of 2 cells; 1 cells are empty; 1 edits"
        ):
            run([one, empty], model, tokenizer)


def test_training_mode_is_left_as_it_was():
    cells, model, tokenizer = setup()
    expected = run(cells, model, tokenizer)
    model.train()
    pd.testing.assert_frame_equal(run(cells, model, tokenizer), expected)
    assert model.bert.training


@pytest.mark.gpu
def test_gpu_equals_cpu():
    cells, model, tokenizer = setup("v2")
    expected = run(cells, model, tokenizer, effect="gene")
    found = run(cells, model.cuda(), tokenizer, effect="gene")
    # TF32 off by default: float32 on both
    np.testing.assert_allclose(found["cosine_similarity"], expected["cosine_similarity"], atol=1e-4)


# ---- input that makes no sense

GENE = ensembl(1)[0]
STATES = CellStates("cell_type", "B", "T")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "knockout"}, "Expected kind 'delete', 'overexpress', 'inhibit' or 'activate', found 'knockout'"),
        (
            {"genes": ["ENSG99999999999", GENE]},
            r"1 of the genes to perturb are not in the vocabulary: 'ENSG99999999999'",
        ),
        ({"genes": []}, "Expected genes='all' or names of genes, found none"),
        ({"genes": [GENE, GENE + ".3"]}, "is listed twice"),
        ({"genes": [[GENE, GENE]]}, "one is also another of its group"),
        ({"genes": [GENE], "anchor": GENE}, "one is also the anchor"),
        ({"anchor": "nothing"}, "not in the vocabulary: 'nothing'"),
        ({"rank_shift": 1}, "it means nothing for 'delete'"),
        ({"kind": "inhibit", "rank_shift": 4}, "Expected rank_shift 1, 2 or 3 quartiles, found 4"),
        ({"layer": 1}, r"Expected layer 0 \(last\) to -3 \(input\), found 1"),
        ({"effect": "genes"}, "Expected effect 'cell' or 'gene'"),
        ({"pooling": "max"}, "Expected pooling 'mean' or 'cls'"),
        ({"pooling": "cls"}, "no <cls>; use pooling='mean'"),
        ({"max_cells": 0}, "Expected max_cells of at least 1, found 0"),
        ({"states": CellStates("disease", "B", "T")}, "obs has no column 'disease'"),
        (
            {"states": CellStates("cell_type", "platelet", "T")},
            "No cell has cell_type 'platelet'; the column holds 'B'",
        ),
        ({"states": CellStates("cell_type", "B", "platelet")}, "No cell has cell_type 'platelet'"),
        ({"states": CellStates("cell_type", "B", "T", embeddings={"B": np.ones(32)})}, "No embedding of state 'T'"),
        (
            {"states": CellStates("cell_type", "B", "T", embeddings={"B": np.ones(7), "T": np.ones(7)})},
            "Expected finite embeddings of the model's width 32, found width 7",
        ),
        (
            {"states": CellStates("cell_type", "B", "T", embeddings={s: np.full(32, np.nan) for s in "BT"})},
            "values that are not finite",
        ),
        ({"cells": np.ones(11, dtype=bool)}, "select them before"),
    ],
)
def test_options_that_make_no_sense(options, message):
    _, model, tokenizer = setup()
    with pytest.raises(ValueError, match=message):
        run(synthetic_cells(11, N_GENES), model, tokenizer, **options)


def test_states_must_differ():
    for goal, alternatives in (("B", []), ("T", ["T"])):
        with pytest.raises(ValueError, match="must differ"):
            CellStates("cell_type", "B", goal, alternatives)
    with pytest.raises(ValueError, match="Expected alternatives as a list"):
        CellStates("cell_type", "B", "T", "NK")


@pytest.mark.parametrize("kind", ["delete", "inhibit", "activate"])
def test_a_gene_that_no_cell_holds(kind):
    cells, model, tokenizer = setup()
    absent = names(tokenizer, *np.setdiff1d(tokenizer.gene_token_ids, np.concatenate(cells)))
    assert absent
    with pytest.raises(
        ValueError, match=rf"No cell \(of 5\) holds the genes to {kind}.*kind='overexpress' can do without"
    ):
        run(cells, model, tokenizer, kind=kind, genes=absent[:1])
    with pytest.raises(ValueError, match="holds the genes to delete together"):
        run(cells, model, tokenizer, anchor=absent[0])


def test_of_many_genes_some_that_no_cell_holds_are_a_warning(caplog):
    cells, model, tokenizer = setup()
    absent = names(tokenizer, *np.setdiff1d(tokenizer.gene_token_ids, np.concatenate(cells)))
    present = names(tokenizer, cells[0][0])
    frame = run(cells, model, tokenizer, genes=[*absent, *present])
    assert set(frame["gene"]) == set(present)
    assert (
        f"{len(absent)} of the {len(absent) + 1} genes or groups are in none of the {frame['cell'].nunique()} cells to "
        f"perturb: '{absent[0]}'"
    ) in caplog.text


def test_genes_that_no_cell_of_the_sample_holds_are_named(caplog):
    _, model, tokenizer = setup()
    gene = [names(tokenizer, token)[0] for token in range(2, 9)]
    cells = [np.array([2, 3, 4]), np.array([2, 5, 6]), np.array([2, 7, 8])]
    listed = [gene[0], [gene[3], gene[4]], [gene[5], gene[6]], gene[1]]
    frame = run(cells, model, tokenizer, genes=listed)
    assert "genes or groups" not in caplog.text
    held = set(frame.loc[frame["cell"] == 1, "gene"])
    assert held == {gene[0], f"{gene[3]}+{gene[4]}"}
    # Of these states, the second cell alone is perturbed.
    dataset = datasets.Dataset.from_dict({"input_ids": cells, "state": ["a", "b", "a"]})
    run(dataset, model, tokenizer, genes=listed, states=CellStates("state", "b", "a"))
    absent = f"'{gene[5]}+{gene[6]}', '{gene[1]}'"
    assert f"2 of the 4 genes or groups are in none of the 1 cells to perturb: {absent}." in caplog.text
    caplog.clear()
    sample = run(cells, model, tokenizer, genes=listed, max_cells=1)
    n_absent = 4 - sample["gene"].nunique()
    assert f"{n_absent} of the 4 genes or groups are in none of the 1 cells to perturb" in caplog.text


def test_cells_that_no_tokenizer_made():
    cells, model, tokenizer = setup()
    bad = {
        r"Cell 1 has 18 tokens, but model and tokenizer read 17 at the most. .*max_length=17": np.arange(2, 20),
        r"Cell 1 has the token 0, no gene of this vocabulary \(2 to 32\).*without padding": np.array([5, 6, 0]),
        r"Cell 1 has the token 33": np.array([5, 33]),
        r"Cell 1 holds a gene more than once": np.array([5, 6, 5]),
    }
    for message, cell in bad.items():
        with pytest.raises(ValueError, match=message):
            run([cells[0], cell], model, tokenizer)
    v2 = setup("v2")
    with pytest.raises(ValueError, match=r"Cell 1 does not start with <cls> and end with <eos>.*token 7"):
        run([v2[0][0], np.array([7, 8, 9])], *v2[1:])


def test_tokens_take_no_options_of_counts():
    cells, model, tokenizer = setup()
    with pytest.raises(ValueError, match="are tokens already; 'gene_ids', 'counts_layer'"):
        run(cells, model, tokenizer, counts_layer="raw", gene_ids="x")
    with pytest.raises(ValueError, match=r"found a list of token arrays. Make one: datasets.Dataset.from_dict"):
        run(cells, model, tokenizer, states=STATES)
    with pytest.raises(ValueError, match="The dataset has no column 'cell_type'; it has 'input_ids'"):
        run(datasets.Dataset.from_dict({"input_ids": cells}), model, tokenizer, states=STATES)


def test_models_that_do_not_fit():
    cells, model, tokenizer = setup()
    with pytest.raises(ValueError, match="do not belong together"):
        run(cells, tiny_model(vocab_size=50), tokenizer)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite: its weights hold NaN"):
        run(cells, model, tokenizer)


def test_a_state_of_empty_cells_has_no_embedding():
    cells, model, tokenizer = setup()
    dataset = datasets.Dataset.from_dict({"input_ids": [cells[0].tolist(), []], "cell_type": ["B", "T"]})
    with pytest.raises(ValueError, match="All 1 cells of state 'T' are empty"):
        run(dataset, model, tokenizer, states=STATES)
