"""Cells to binarized strings and back: a hand-worked cell, round trips, every kind of input, good and bad."""

import re
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from cellglot.datasets_scripts.ragged_counts import ragged_columns
from cellglot.tokenization.binarized_features import BinarizedFeatureExtractor, PairingReport
from cellglot.tokenization.binarized_string import TASKS, BinarizedStringProcessor
from cellglot.tokenization.paired_batches import PairedCellCollator
from cellglot.tokenization.paired_cells import ACCESSIBILITY, EXPRESSION

GENES, PEAKS, CELLS = 13, 17, 11
GENE_NAMES = [f"G{i}" for i in range(GENES)]
PEAK_NAMES = [f"chr{1 + i % 3}-{100 * i}-{100 * i + 90}" for i in range(PEAKS)]


def pair(seed=0, cells=CELLS) -> Any:
    """(expression, accessibility) of the same cells; the last cell has no counts."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"batch": [f"s{i % 2}" for i in range(cells)]}, index=[f"cell{i}" for i in range(cells)])
    matrices = [rng.poisson(rate, (cells, n)).astype(np.float32) for rate, n in ((1.0, GENES), (0.4, PEAKS))]
    found = []
    for matrix, names in zip(matrices, (GENE_NAMES, PEAK_NAMES), strict=True):
        matrix[-1] = 0
        found.append(ad.AnnData(sp.csr_matrix(matrix), obs=obs.copy(), var=pd.DataFrame(index=pd.Index(names))))
    return tuple(found)


def processor(cells: Any = None, **options: Any) -> BinarizedStringProcessor:
    # Counts of 13 genes, normalized to 10,000, are all above the paper's threshold.
    return BinarizedStringProcessor.from_cells(cells or pair(), **{"threshold": 7.0, "subword_size": 90, **options})


def dense_oracle(cells, threshold=7.0):
    """Binary matrices the slow way, entry by entry of dense arrays."""
    counts, fragments = (adata.X.toarray().astype(np.float64) for adata in cells)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {EXPRESSION: np.log1p(counts / totals * 10_000) >= threshold, ACCESSIBILITY: fragments > 0}


def test_hand_worked_cell():
    counts = sp.csr_matrix(np.array([[0, 50, 3, 3, 9_944]], dtype=np.float32))
    fragments = sp.csr_matrix(np.array([[2, 0, 1]], dtype=np.float32))
    genes, peaks = ["A", "B", "C", "D", "E"], ["chr1-1-2", "chr1-3-4", "chr2:5-6"]
    cells = ad.AnnData(counts, var=pd.DataFrame(index=genes)), ad.AnnData(fragments, var=pd.DataFrame(index=peaks))
    # log(1 + 3) = 1.4 is below 2.0, log(1 + 50) = 3.9 and log(1 + 9,944) = 9.2 above.
    ours = BinarizedStringProcessor.from_cells(cells)
    assert list(ours.cell_strings(cells)) == [("B E", "chr1-1-2 chr2:5-6")]
    # pad, end, unknown, two tasks; then genes and peaks
    assert ours.encode(cells, "gex2atac")[0] == {"input_ids": [3, 6, 9, 1], "length": 4, "labels": [10, 12, 1]}
    assert ours.encode(cells, "atac2gex")[0] == {"input_ids": [4, 10, 12, 1], "length": 4, "labels": [6, 9, 1]}
    rank = BinarizedStringProcessor.from_cells(cells, encoding="rank", threshold=1.0)
    assert next(rank.cell_strings(cells))[0] == "E B C D"
    binned = BinarizedStringProcessor.from_cells(cells, encoding="binned", n_bins=4)
    assert next(binned.cell_strings(cells))[0] == "B <bin_3> E <bin_3>"
    fine = BinarizedStringProcessor.from_cells(cells, encoding="binned", n_bins=4, bin_width=1.0)
    assert next(fine.cell_strings(cells))[0] == "B <bin_1> E <bin_3>"
    levels = fine.decode_matrix(["B <bin_1> E <bin_3>"], EXPRESSION, levels=True)
    assert levels.toarray().tolist() == [[0, 3.5, 0, 0, 5.5]]


def test_threshold_is_reached_at_exactly_its_value():
    values = sp.csr_matrix(np.array([[1.9999, 2.0, 2.0001]], dtype=np.float32))
    cells = ad.AnnData(values, var=pd.DataFrame(index=["A", "B", "C"]))
    extractor = BinarizedFeatureExtractor(["A", "B", "C"], [], expression_values="log_normalized")
    assert extractor(cells)["expression"].toarray().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("encoding", ["set", "rank", "binned"])
@pytest.mark.parametrize("vocabulary", ["features", "subword", "bpe"])
def test_strings_and_ids_round_trip_to_the_binary_matrix(vocabulary, encoding):
    cells, expected = pair(), dense_oracle(pair())
    options = {"vocabulary": vocabulary} if vocabulary != "bpe" else {"vocabulary": "subword", "subword_model": "bpe"}
    ours = processor(cells, encoding=encoding, **options)
    for task, (source, target) in TASKS.items():
        encoded = ours.encode(cells, task)
        for modality, column in ((source, "input_ids"), (target, "labels")):
            found = ours.decode_matrix(encoded[column], modality)
            assert np.array_equal(found.toarray() == 1, expected[modality])
    told = list(ours.cell_strings(cells))
    for k, modality in enumerate((EXPRESSION, ACCESSIBILITY)):
        found = ours.decode_matrix([strings[k] for strings in told], modality)
        assert np.array_equal(found.toarray() == 1, expected[modality])


@pytest.mark.parametrize("encoding", ["set", "rank", "binned"])
@pytest.mark.parametrize("vocabulary", ["features", "subword"])
def test_array_path_equals_the_tokenizer_on_the_strings(vocabulary, encoding):
    cells = pair()
    ours = processor(cells, encoding=encoding, vocabulary=vocabulary)
    encoded = ours.encode(cells, "gex2atac")
    told = list(ours.cell_strings(cells))
    texts = [f"<gex2atac> {expression}".strip() for expression, _ in told]
    assert ours.tokenizer(texts)["input_ids"] == list(encoded["input_ids"])
    assert ours.tokenizer([accessibility for _, accessibility in told])["input_ids"] == list(encoded["labels"])


def test_stock_t5_like_tokenizers_serve_as_they_are():
    """Any tokenizer that spells word by word: the processor brings the features, the tokenizer its own pieces."""
    trained = processor(vocabulary="subword")
    other = BinarizedStringProcessor(
        BinarizedFeatureExtractor(GENE_NAMES, PEAK_NAMES, threshold=7.0), trained.tokenizer
    )
    assert list(other.encode(pair())["input_ids"]) == list(trained.encode(pair())["input_ids"])
    assert "first_gene_token_id" not in other.model_fields()


def test_model_fields_tell_a_model_where_genes_peaks_and_bins_are():
    fields = processor(encoding="binned", n_bins=3).model_fields()
    # pad, end, unknown, two tasks, three bins, genes, peaks
    assert fields == {
        "vocab_size": 8 + GENES + PEAKS,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "gex2atac_token_id": 3,
        "atac2gex_token_id": 4,
        "first_bin_token_id": 5,
        "num_bins": 3,
        "first_gene_token_id": 8,
        "num_genes": GENES,
        "num_peaks": PEAKS,
    }
    with pytest.raises(ValueError, match="bins stand between"):
        processor(encoding="binned", vocabulary="subword").allowed_tokens("atac2gex")


def test_order_of_columns_and_duplicate_columns_do_not_matter():
    expression, accessibility = pair()
    ours = processor()
    expected = ours.encode((expression, accessibility)).to_dict()
    shuffled = (
        expression[:, np.random.default_rng(1).permutation(GENES)].copy(),
        accessibility[:, np.random.default_rng(2).permutation(PEAKS)].copy(),
    )
    assert ours.encode(shuffled).to_dict() == expected
    # A gene in two columns: their counts are summed.
    halves = expression.X.toarray()
    halves[:, 0] -= 1
    halves = np.hstack([halves, np.ones((CELLS, 1))])
    halves[halves < 0] = 0
    twice = ad.AnnData(
        sp.csr_matrix(halves),
        obs=expression.obs,
        var=pd.DataFrame({"gene_ids": [*GENE_NAMES, "G0"]}, index=[f"column{i}" for i in range(14)]),
    )
    summed = halves[:, :GENES].copy()
    summed[:, 0] += 1
    one = ad.AnnData(sp.csr_matrix(summed), obs=expression.obs, var=expression.var)
    found, wanted = (ours.encode((cells, accessibility))["input_ids"] for cells in (twice, one))
    assert list(found) == list(wanted)


def write_parquet(folder, expression, accessibility, rows_per_group=3, split="train"):
    """Two files, as `bmmc_multiome.py` leaves them, and the tables of features."""
    table = pa.table({"cell_name": list(expression.obs_names), "batch": list(expression.obs["batch"])})
    for adata, index, value in ((expression, "gene_index", "count"), (accessibility, "peak_index", "peak_count")):
        for name, column in ragged_columns(sp.csr_matrix(adata.X), index, value).items():
            table = table.append_column(name, column)
    for i, part in enumerate((table.slice(0, 7), table.slice(7))):
        pq.write_table(part, folder / f"bmmc-{split}-{i:05d}-of-00002.parquet", row_group_size=rows_per_group)
    names = list(expression.var_names)
    pd.DataFrame({"gene_id": names, "gene_symbol": names}).to_parquet(folder / "genes.parquet")
    pd.DataFrame({"peak_id": list(accessibility.var_names)}).to_parquet(folder / "peaks.parquet")


def write_h5mu(path, modalities):
    """MuData's layout: a group for each modality, each like an `.h5ad`."""
    with h5py.File(path, "w") as file:
        for name, adata in modalities.items():
            ad.io.write_elem(file, f"mod/{name}", adata)


def test_every_kind_of_input_gives_the_same_tokens(tmp_path):
    expression, accessibility = pair()
    ours = processor()
    options = {"obs_columns": ["batch"], "with_values": True}
    expected = ours.encode((expression, accessibility), **options).to_dict()
    for name, adata in (("rna", expression), ("atac", accessibility)):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    both = ad.concat([expression, accessibility], axis=1)
    both.obs = expression.obs
    for types in (("GEX", "ATAC"), ("Gene Expression", "Peaks")):
        both.var["feature_types"] = [types[0]] * GENES + [types[1]] * PEAKS
        # Columns of the modalities need not stand together.
        mixed = both[:, np.random.default_rng(0).permutation(GENES + PEAKS)].copy()
        assert ours.encode(mixed, **options).to_dict() == expected
    both.write_h5ad(tmp_path / "both.h5ad")
    (tmp_path / "corpus").mkdir()
    write_parquet(tmp_path / "corpus", expression, accessibility)
    write_h5mu(tmp_path / "both.h5mu", {"rna": expression, "prot": expression, "atac": accessibility})

    class MuData:
        mod = {"rna": expression, "atac": accessibility}

    for cells in (
        (tmp_path / "rna.h5ad", str(tmp_path / "atac.h5ad")),
        {"gex": expression, "atac": tmp_path / "atac.h5ad"},
        MuData(),
        tmp_path / "both.h5ad",
        tmp_path / "both.h5mu",
        tmp_path / "corpus",
    ):
        assert ours.encode(cells, **options, cells_per_block=4).to_dict() == expected
    assert ours.encode(tmp_path / "corpus", split="train", **options).to_dict() == expected
    with pytest.raises(FileNotFoundError, match="no cells of split 'dev'; its splits are train"):
        ours.encode(tmp_path / "corpus", split="dev")
    with pytest.raises(ValueError, match="Parquet folder, which has no layers"):
        ours.encode(tmp_path / "corpus", layer="counts")
    with pytest.raises(ValueError, match="split='train' is for a Parquet folder"):
        ours.encode((expression, accessibility), split="train")
    # One modality alone: nothing to write
    for task, alone in (("gex2atac", expression), ("atac2gex", accessibility)):
        assert ours.encode(alone, task).column_names == ["input_ids", "length"]
        assert list(ours.encode(alone, task)["input_ids"]) == list(ours.encode(pair(), task)["input_ids"])


def test_masked_cells_and_features_of_training_cells_only():
    cells = pair()
    train = np.arange(CELLS) < 5
    ours = processor(cells, train=train, min_cells=2)
    binary = dense_oracle(cells)
    for modality, names in ((EXPRESSION, GENE_NAMES), (ACCESSIBILITY, PEAK_NAMES)):
        enough = binary[modality][train].sum(axis=0) >= 2
        assert 0 < enough.sum() < len(names)
        assert ours.feature_extractor.features(modality) == [n for n, keep in zip(names, enough, strict=True) if keep]
    report = PairingReport()
    assert len(ours.encode(cells, cells_mask=~train, report=report)) == CELLS - 5
    assert (report.n_cells, report.n_genes, report.n_matched_genes) == (6, GENES, len(ours.feature_extractor.genes))
    assert report.n_empty_sources >= 1  # the cell without counts


def test_values_are_all_log_normalized_expression_above_threshold_or_not():
    cells = pair()
    rows = processor(cells).encode(cells, "atac2gex", with_values=True)
    counts = cells[0].X.toarray().astype(np.float64)
    expected = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 10_000)
    found = np.zeros((CELLS, GENES))
    for n, row in enumerate(rows):
        found[n, row["value_features"]] = row["values"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32
    assert (found > 0).sum() > dense_oracle(cells)[EXPRESSION].sum()


def test_other_names_of_genes_are_known():
    expression, accessibility = pair()
    expression.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(GENES)]
    ours = processor((expression, accessibility))
    by_id = expression.copy()
    by_id.var_names = [f"ENSG{i:011d}.7" for i in range(GENES)]
    by_id.var = by_id.var.drop(columns="gene_ids")
    colons = accessibility.copy()
    colons.var_names = [name.replace("-", ":", 1).removeprefix("chr") for name in PEAK_NAMES]
    assert ours.encode((by_id, colons)).to_dict() == ours.encode((expression, accessibility)).to_dict()


def test_collator_pads_and_samples_long_inputs_evenly():
    rows = [{"input_ids": np.arange(100, 120), "labels": [7, 8, 1]}, {"input_ids": [3, 5, 1], "labels": [1]}]
    batch = PairedCellCollator(0, max_source_length=6)(rows, [(0, 0, 0), (0, 0, 1)])
    kept = batch["input_ids"][0].tolist()
    assert (kept[0], kept[-1]) == (100, 119)
    assert kept == sorted(set(kept))
    assert batch["input_ids"][1].tolist() == [3, 5, 1, 0, 0, 0]
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 3]
    assert batch["labels"].tolist() == [[7, 8, 1], [1, -100, -100]]
    draws = [PairedCellCollator(0, max_source_length=6)(rows[:1], [(0, 0, k)])["input_ids"][0] for k in range(200)]
    counts = np.bincount(np.concatenate(draws), minlength=120)[101:119]
    # 4 of 18 places, 200 times: 44 each, give or take 6
    assert counts.min() > 20
    assert counts.max() < 75


@pytest.mark.parametrize(
    ("vocabulary", "encoding"), [("subword", "set"), ("features", "binned"), ("subword", "binned")]
)
def test_long_inputs_lose_whole_features_with_their_pieces_and_bins(vocabulary, encoding):
    ours = processor(vocabulary=vocabulary, encoding=encoding)
    rows = ours.encode(pair(), "gex2atac").to_list()
    told = [expression.split() for expression, _ in ours.cell_strings(pair())]
    longest = max(len(row["input_ids"]) for row in rows)
    for limit in range(4, longest):
        batch = ours.collator(max_source_length=limit, max_target_length=limit)(
            rows, [(limit, n) for n in range(CELLS)]
        )
        assert max(batch["input_ids"].shape[1], batch["labels"].shape[1]) <= limit
        texts = ours.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=False)
        for text, words in zip(texts, told, strict=True):
            kept = re.sub(r"<pad>|</s>|<gex2atac>", "", text).replace("<bin", " <bin").split()
            step = 2 if encoding == "binned" else 1
            features = list(zip(*(words[k::step] for k in range(step)), strict=True))
            found = list(zip(*(kept[k::step] for k in range(step)), strict=True))
            assert found == [feature for feature in features if feature in found]
    assert ours.decode_matrix(batch["labels"], ACCESSIBILITY).nnz > 0


def test_call_gives_a_padded_batch():
    ours = processor()
    batch = ours(pair(), task="atac2gex")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert np.array_equal(
        ours.decode_matrix(batch["labels"], EXPRESSION).toarray() == 1, dense_oracle(pair())[EXPRESSION]
    )


# ---- bad input


def test_unpaired_barcodes_say_how_many_match():
    expression, accessibility = pair()
    ours = processor()
    fewer = accessibility[2:].copy()
    with pytest.raises(ValueError, match=r"9 barcodes match.*'cell0', 'cell1' have no partner"):
        ours.encode((expression, fewer))
    with pytest.raises(ValueError, match="11 barcodes match, but in another order"):
        ours.encode((expression, accessibility[::-1].copy()))


def test_mudata_without_the_modalities_or_with_other_cells(tmp_path):
    expression, accessibility = pair()
    write_h5mu(tmp_path / "prot.h5mu", {"prot": expression})
    with pytest.raises(ValueError, match=r"Expected modalities named expression, rna, gex.*found 'prot'"):
        processor().encode(tmp_path / "prot.h5mu")
    write_h5mu(tmp_path / "unpaired.h5mu", {"rna": expression, "atac": accessibility[3:].copy()})
    with pytest.raises(ValueError, match=r"unpaired.h5mu, rna\) has 11 cells.*8 barcodes match"):
        processor().encode(tmp_path / "unpaired.h5mu")
    (tmp_path / "broken.h5mu").write_bytes(b"no HDF5")
    with pytest.raises(OSError, match=r"broken.h5mu cannot be read as MuData"):
        processor().encode(tmp_path / "broken.h5mu")


@pytest.mark.parametrize("value", [0.37, -1.0, np.nan])
def test_accessibility_must_be_counts_or_binary(value):
    expression, accessibility = pair()
    ours = processor()
    accessibility.X.data[3] = value
    with pytest.raises(ValueError, match=r"chr\d-\d+-\d+"):
        ours.encode((expression, accessibility))


def test_expression_must_be_what_the_processor_was_told():
    expression, accessibility = pair()
    normalized = expression.copy()
    normalized.X.data = np.log1p(normalized.X.data * 700)
    with pytest.raises(ValueError, match="expression_values='log_normalized'"):
        processor().encode((normalized, accessibility))
    logs = processor((normalized, accessibility), expression_values="log_normalized")
    assert len(logs.encode((normalized, accessibility))) == CELLS
    expression.X.data *= 50
    with pytest.raises(ValueError, match="expression_values='counts'"):
        logs.encode((expression, accessibility))


def test_another_genome_build_is_told_by_its_peaks(caplog):
    expression, accessibility = pair()
    ours = processor()
    lifted = accessibility.copy()
    lifted.var_names = [*PEAK_NAMES[:2], *(name.replace("0-", "7-", 1) for name in PEAK_NAMES[2:])]
    with pytest.raises(
        ValueError, match=r"2 of 17 peaks \(11\.8%\) are in the vocabulary.*'chr3-207-290'.*genome build"
    ):
        ours.encode((expression, lifted))
    assert not caplog.records
    assert len(ours.encode((expression, lifted), min_matched_features=0.1)) == CELLS
    assert "AnnData: 2 of 17 peaks are in the vocabulary of 17; the others are left out" in caplog.text
    caplog.clear()
    # More peaks in the file than in the vocabulary, or fewer, are no other build.
    few = processor((expression, accessibility[:, :5].copy()))
    assert len(few.encode((expression, accessibility))) == CELLS
    assert len(ours.encode((expression, accessibility[:, :5].copy()))) == CELLS
    assert not caplog.records


def test_genes_that_are_not_in_the_vocabulary_are_counted_or_refused():
    expression, accessibility = pair()
    ours = processor()
    strange = expression.copy()
    strange.var_names = [*GENE_NAMES[:7], *(f"X{i}" for i in range(6))]
    report = PairingReport()
    ours.encode((strange, accessibility), report=report)
    assert (report.n_matched_genes, report.n_genes) == (7, 13)
    assert "7 of 13 genes, 17 of 17 peaks" in str(report)
    strange.var_names = [f"X{i}" for i in range(13)]
    with pytest.raises(ValueError, match=r"0 of 13 genes.*'X0'.*'G0'"):
        ours.encode((strange, accessibility))


def test_cells_without_an_open_peak_name_the_file_of_peaks(tmp_path):
    expression, accessibility = pair()
    accessibility.X = sp.csr_matrix(accessibility.shape, dtype=np.float32)
    accessibility.write_h5ad(tmp_path / "atac.h5ad")
    with pytest.raises(ValueError, match=r"atac.h5ad: no peak of the vocabulary is open in any of 11 cells.*layer="):
        processor().encode((expression, tmp_path / "atac.h5ad"))


def test_threshold_that_empties_every_cell_is_an_error_with_the_highest_value():
    ours = processor(threshold=9.5)
    highest = np.log1p(max(row.max() / row.sum() for row in pair()[0].X.toarray()[:-1]) * 10_000)
    with pytest.raises(ValueError, match=f"highest log-normalized value is {highest:.3g}"):
        ours.encode(pair())


@pytest.mark.parametrize(
    ("genes", "peaks", "message"),
    [
        (["A", "A"], ["chr1-1-2"], "more than once, e.g. 'A'"),
        (["A B"], ["chr1-1-2"], "hold blanks, e.g. 'A B'"),
        (["A"], ["CAMTA1"], "malformed, e.g. 'CAMTA1'"),
        (
            ["A"],
            ["chr1-1-2", "chr1-5-7", "1:1-2"],
            "2 peaks are of the same place as another, e.g. 'chr1-1-2', '1:1-2'",
        ),
    ],
)
def test_bad_names_of_features(genes, peaks, message):
    with pytest.raises(ValueError, match=message):
        BinarizedStringProcessor.from_features(genes, peaks)


def test_bad_settings_and_missing_parts():
    with pytest.raises(ValueError, match="encoding to be one of set, rank, binned"):
        BinarizedFeatureExtractor(encoding="sorted")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold above zero"):
        BinarizedFeatureExtractor(threshold=0.0)
    ours, (expression, accessibility) = processor(), pair()
    with pytest.raises(ValueError, match="boolean mask of its 11 cells, found bool of shape"):
        ours.encode(pair(), cells_mask=np.ones(5, dtype=bool))
    with pytest.raises(ValueError, match="boolean mask of its 11 cells, found int64"):
        ours.encode(pair(), cells_mask=np.arange(5))
    with pytest.raises(ValueError, match="a task among gex2atac, atac2gex"):
        ours.encode(pair(), "gex2gex")
    with pytest.raises(ValueError, match="no accessibility to make labels"):
        ours.encode((expression, None), with_labels=True)
    with pytest.raises(ValueError, match="reads accessibility, but there is only expression"):
        ours.encode((expression, None), "atac2gex")
    with pytest.raises(ValueError, match=r"1 of 2 words or tokens are no feature of expression.*'XYZ'"):
        ours.decode_matrix(["G0 XYZ"], EXPRESSION)
    peak = ours.tokenizer.convert_tokens_to_ids(PEAK_NAMES[2])
    with pytest.raises(
        ValueError, match=f"1 of 1 words or tokens are no feature of expression, e.g. '{PEAK_NAMES[2]}'"
    ):
        ours.decode_matrix([[peak, 1]], EXPRESSION)
    with pytest.raises(ValueError, match="Expected modality 'expression' or 'accessibility', found 'atac'"):
        ours.decode_matrix([[peak, 1]], "atac")
    with pytest.raises(ValueError, match="one of which may be None; found neither"):
        ours.encode((None, None))
    assert ours.decode_matrix(["G1 XYZ G1"], EXPRESSION, unknown="ignore").toarray()[0].tolist() == [0, 1] + [0] * 11
    swapped = r"AnnData: 13 of 13 peaks are malformed, e.g. 'G0', .*The order is \(expression, accessibility\)"
    for ask, cells in ((processor, (accessibility, expression)), (ours.encode, (expression, expression))):
        with pytest.raises(ValueError, match=swapped):
            ask(cells)
    accessibility.var["feature_types"] = "ATAC"
    with pytest.raises(ValueError, match=r"The order is \(expression, accessibility\)"):
        ours.encode((accessibility, expression))


# ---- real cells


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["scicar2018_a549", "bmmc_multiome_neurips2021_v1"])
def test_real_cells_round_trip(real_data, name):
    files = sorted((real_data / "multiome").glob(f"{name}_*.h5ad"))
    cells = (next(f for f in files if "rna" in f.name), next(f for f in files if "atac" in f.name))
    ours = BinarizedStringProcessor.from_cells(cells)
    expected: Any = [ad.read_h5ad(file).X for file in cells]
    totals = np.asarray(expected[0].sum(axis=1)).ravel()
    # The paper's rule as scanpy would apply it, in float64
    logs: Any = sp.csr_matrix(expected[0].multiply(10_000 / np.maximum(totals, 1)[:, None])).log1p()
    binary = {EXPRESSION: logs >= 2.0, ACCESSIBILITY: expected[1] > 0}
    encoded = ours.encode(cells)
    for modality, column in ((EXPRESSION, "input_ids"), (ACCESSIBILITY, "labels")):
        assert (ours.decode_matrix(encoded[column], modality).astype(bool) != binary[modality]).nnz == 0
    mask = np.arange(len(totals)) < 50
    for k, modality in enumerate(binary):
        told = [strings[k] for strings in ours.cell_strings(cells, cells_mask=mask)]
        assert (ours.decode_matrix(told, modality).astype(bool) != binary[modality][:50]).nnz == 0
