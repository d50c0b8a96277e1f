"""Cells encoded while a model trains: the same tokens as stored ones, in an order that reads each block once."""

import shutil

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cellglot.train import on_the_fly, pretrain, pretrain_geneformer
from cellglot.train.batches import EpochPlan
from cellglot.train.metrics_log import read_metrics
from cellglot.train.on_the_fly import OnTheFlyCells, measure_lengths

from ..conftest import make_tokenizer, synthetic_cells

BLOCK = 5


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """(tokenizer, files, masks of training cells) of two files of 23 and 11 cells, some without a known gene."""
    monkeypatch.setattr(on_the_fly, "CELLS_PER_BLOCK", BLOCK)
    tokenizer = make_tokenizer(31)
    rng = np.random.default_rng(0)
    files, masks = [], []
    for i, n in enumerate((23, 11)):
        counts = rng.poisson(0.6, (n, 31)).astype(np.float32)
        counts[3] = 0
        adata = ad.AnnData(sp.csr_matrix(counts))
        adata.obs_names = [f"{i}-{k}" for k in range(n)]
        adata.var_names = list(tokenizer.gene_medians)
        adata.obs["n_counts"] = counts.sum(axis=1) + 1
        files.append(tmp_path / f"{i}.h5ad")
        adata.write_h5ad(files[-1], compression="gzip")
        masks.append(rng.random(n) < 0.8)
    masks[0][3] = masks[1][3] = True
    return tokenizer, files, masks


def on_the_fly_cells(corpus, tmp_path, batch_size=4):
    tokenizer, files, masks = corpus
    measured = [tmp_path / f"train-{i}.npy" for i in range(2)]
    for file, mask, path in zip(files, masks, measured, strict=True):
        measure_lengths(tokenizer, file, mask, path)
    return OnTheFlyCells(tokenizer, [(file, {}) for file in files], measured, batch_size)


def stored_tokens(corpus):
    tokenizer, files, masks = corpus
    found = []
    for file, mask in zip(files, masks, strict=True):
        found += tokenizer.encode_anndata(file, cells=mask, empty_cells="drop")["input_ids"]
    return found


def test_tokens_and_lengths_equal_the_stored_ones_in_any_order(corpus, tmp_path):
    cells, expected = on_the_fly_cells(corpus, tmp_path), stored_tokens(corpus)
    assert cells["length"].tolist() == [len(ids) for ids in expected]
    for order in (np.arange(len(cells)), np.random.default_rng(1).permutation(len(cells))):
        found = [cells.__getitems__([i])[0]["input_ids"].tolist() for i in order.tolist()]
        assert found == [expected[i] for i in order]
    chosen = np.array([7, 0, 19])
    assert [ids.tolist() for ids in cells.select(chosen)["input_ids"]] == [expected[i] for i in chosen]


def test_an_epoch_reads_each_block_once_and_keeps_few(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("cellglot.train.batches.WINDOW", 2)
    cells = on_the_fly_cells(corpus, tmp_path, batch_size=1)
    # One that stays within the blocks that are mixed: sorting by length brings in none besides.
    cells.n_kept = 4
    read = []
    encoded = OnTheFlyCells._encoded
    monkeypatch.setattr(OnTheFlyCells, "_encoded", lambda self, job: read.append(job[0]) or encoded(self, job))
    plan = EpochPlan(np.ones(len(cells)), batch_size=1, max_tokens=100, seed=3, blocks=cells.block_of_example)
    assert sorted(plan.order) == list(range(len(cells)))
    for i in plan.order.tolist():
        cells.__getitems__([i])
        assert len(cells._kept) <= 4
    # The first example changes places with another one, which may cost one more read.
    assert len(read) <= len(set(cells.block_of_example.tolist())) + 1


@pytest.mark.parametrize("sparse_files", [False, True], ids=["small files", "few cells of a file train"])
def test_blocks_that_are_not_full_are_read_once_an_epoch_too(sparse_files, tmp_path, monkeypatch):
    for module in ("batches", "on_the_fly"):
        monkeypatch.setattr(f"cellglot.train.{module}.WINDOW", 2)
        monkeypatch.setattr(f"cellglot.train.{module}.MEGABATCH_STEPS", 4)
    tokenizer, sources, measured = make_tokenizer(31), [], []
    for i in range(41):
        adata = synthetic_cells(23 if sparse_files else 7, 31, seed=i, density=0.9)
        mask = np.arange(adata.n_obs) % 3 == 0 if sparse_files else np.ones(7, dtype=bool)
        sources.append((adata, {}))
        measured.append(tmp_path / f"train-{i}.npy")
        measure_lengths(tokenizer, adata, mask, measured[-1])
    cells = OnTheFlyCells(tokenizer, sources, measured, batch_size=16)
    read = []
    encoded = OnTheFlyCells._encoded
    monkeypatch.setattr(OnTheFlyCells, "_encoded", lambda self, job: read.append(job[0]) or encoded(self, job))
    plan = EpochPlan(cells.lengths, batch_size=16, max_tokens=10**6, blocks=cells.block_of_example)
    cells.follow(plan.order)
    for step in range(len(plan)):
        for micro in plan.step(step)[0]:
            cells.__getitems__(list(micro.examples))
    # Not all blocks were kept, and few whose cells lie far apart in the order were read again.
    assert cells.n_kept < 20
    assert set(read) == set(range(41))
    assert len(read) <= 45


def test_blocks_are_read_before_their_turn_a_block_for_each_thread(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(on_the_fly, "available_threads", lambda: 3)
    cells = on_the_fly_cells(corpus, tmp_path)
    calls = []
    ordered_map = on_the_fly.ordered_map

    def counted(function, jobs, threads):
        calls.append([block for block, *_ in jobs])
        return ordered_map(function, jobs, threads=threads)

    monkeypatch.setattr(on_the_fly, "ordered_map", counted)
    # Backwards, and from the middle of an epoch on
    order = np.arange(len(cells))[::-1][4:]
    cells.follow(order)
    found = [cells[i]["input_ids"].tolist() for i in order.tolist()]
    expected = stored_tokens(corpus)
    assert found == [expected[i] for i in order]
    turns = list(dict.fromkeys(cells.block_of_example[order].tolist()))
    assert calls == [turns[k : k + 3] for k in range(0, len(turns), 3)]


def test_cells_that_do_not_train_are_not_encoded(corpus, tmp_path):
    _, files, masks = corpus
    adata = ad.read_h5ad(files[0])
    left_out, failed = np.flatnonzero(~masks[0])[0], np.flatnonzero(masks[0])[-1]
    counts = adata.to_df().to_numpy().copy()
    counts[[left_out, failed], 0] = 0.5
    adata.X = sp.csr_matrix(counts)
    adata.obs["filter_pass"] = (np.arange(adata.n_obs) != failed).astype(int)
    adata.write_h5ad(files[0])
    cells, expected = on_the_fly_cells(corpus, tmp_path), stored_tokens(corpus)
    assert [row["input_ids"].tolist() for row in cells.__getitems__(list(range(len(cells))))] == expected


def test_order_mixes_blocks_and_differs_between_epochs():
    blocks = np.repeat(np.arange(40), 8)
    orders = [
        EpochPlan(np.ones(320), batch_size=1, max_tokens=9, epoch=epoch, blocks=blocks).order for epoch in (0, 0, 1)
    ]
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()
    # Neighbours in the order are of one block about once in 16, not seven times in eight.
    assert (np.diff(blocks[orders[0]]) == 0).mean() < 0.2


def test_few_files_are_open_at_once(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(on_the_fly, "OPEN_FILES", 1)
    cells, expected = on_the_fly_cells(corpus, tmp_path), stored_tokens(corpus)
    found = [row["input_ids"].tolist() for row in cells.__getitems__(list(range(len(cells))))]
    assert found == expected
    assert len(cells._opened) == 1


def test_counts_stored_by_gene_are_refused(corpus, tmp_path):
    tokenizer, files, masks = corpus
    adata = ad.read_h5ad(files[0])
    adata.X = sp.csc_matrix(adata.to_df().to_numpy())
    adata.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(ValueError, match="stored by gene"):
        measure_lengths(tokenizer, tmp_path / "csc.h5ad", masks[0], tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


def test_more_than_one_worker_is_refused():
    with pytest.raises(ValueError, match="num_workers 0 or 1, found 2"):
        pretrain_geneformer.PretrainConfig(on_the_fly=True, num_workers=2)


def test_training_reads_cells_alike_with_a_worker_and_after_an_interruption(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(2):
        synthetic_cells(60, 31, seed=i).write_h5ad(tmp_path / "corpus" / f"{i}.h5ad")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    options = {**sizes, "data": tmp_path / "corpus", "batch_size": 16, "max_steps": 14, "save_every": 3}

    def losses(name, *flags, **more):
        given = {**options, "output": tmp_path / name, **more}
        pretrain.main([*(word for k, v in given.items() for word in (f"--{k}", str(v))), "--no_report", *flags])
        return [(r["step"], r["loss"]) for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]

    expected = losses("whole", "--on_the_fly")
    assert len(expected) == 14
    assert not list((tmp_path / "whole" / "data").glob("train-*.arrow"))
    assert losses("worker", "--on_the_fly", num_workers=1) == expected
    # As a kill after step 9 would leave it: later checkpoints and lines are gone.
    for folder in sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1:]:
        shutil.rmtree(folder)
    assert losses("whole", "--on_the_fly", "--resume") == expected
    with pytest.raises(SystemExit, match="other data or options"):
        losses("whole", "--resume")
