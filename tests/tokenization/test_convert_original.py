"""The original's dictionaries become our tokenizer, exactly; what does not fit together is told."""

import csv
import gzip
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from cellglot.tokenization.convert_original import (
    ConversionReport,
    convert_original,
    find_original_files,
    main,
    save_tokenizer_folder,
)
from cellglot.tokenization.rank_value import SPECIAL_TOKENS, RankValueTokenizer
from cellglot.tokenization.restricted_pickle import UnsafePickleError

from ..conftest import ensembl, make_tokenizer

GENES = ensembl(5)


def token_ids(layout="v1", genes=GENES):
    return {token: i for i, token in enumerate([*SPECIAL_TOKENS[layout], *genes])}


def medians(genes=GENES):
    return {gene: np.float64(i + 0.5) for i, gene in enumerate(genes)}


def published(folder, generation="_gc30M", layout="v1", aliases=None):
    """A folder like the original's, with number types as it has them."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {t: np.int16(i) if t.startswith("ENSG") else i for t, i in token_ids(layout).items()}
    files = {"token_dictionary": ids, "gene_median_dictionary": medians()}
    if aliases:
        files["ensembl_mapping_dict"] = aliases
    for name, content in files.items():
        (folder / f"{name}{generation}.pkl").write_bytes(pickle.dumps(content))
    return folder


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_tokens_medians_and_layout(layout):
    tokenizer = convert_original(token_ids(layout), medians())
    assert tokenizer.layout == layout
    assert tokenizer.get_vocab() == token_ids(layout)
    assert tokenizer.gene_medians == medians()
    assert tokenizer.model_max_length == {"v1": 2048, "v2": 4096}[layout]
    assert convert_original(token_ids(layout), medians(), max_length=64).model_max_length == 64


def test_the_order_of_a_dictionary_does_not_matter():
    shuffled = dict(reversed(token_ids().items()))
    tokenizer = convert_original(shuffled, dict(reversed(medians().items())))
    assert list(tokenizer.gene_medians) == GENES
    assert tokenizer.get_vocab() == token_ids()


def test_aliases_of_unknown_genes_and_of_tokens_are_left_out_and_counted():
    report = ConversionReport()
    aliases = {
        "TP53": GENES[0],
        "OLD": GENES[1],
        "LOST": "ENSG99999999999",
        GENES[3]: GENES[4],  # has a token of its own
        GENES[2]: GENES[2],  # says only that the id is current
    }
    more_medians = {**medians(), "ENSG00000099999": 1.0}
    tokenizer = convert_original(token_ids(), more_medians, aliases, report=report)
    assert tokenizer.gene_aliases == {"TP53": GENES[0], "OLD": GENES[1]}
    assert tokenizer.resolver.match(["tp53", GENES[3]]).index_g.tolist() == [0, 3]
    assert str(report) == (
        "v1: 5 genes with token and median, 1 medians without a token left out; 2 aliases kept, 1 of genes without a "
        f"token and 1 that have a token of their own (e.g. '{GENES[3]}') left out"
    )


def test_the_first_of_several_alias_files_decides(tmp_path):
    paths = [tmp_path / "a.pkl", tmp_path / "b.pkl"]
    paths[0].write_bytes(pickle.dumps({"X": GENES[0]}))
    paths[1].write_bytes(pickle.dumps({"X": GENES[1], "Y": GENES[2]}))
    assert convert_original(token_ids(), medians(), paths).gene_aliases == {"X": GENES[0], "Y": GENES[2]}


@pytest.mark.parametrize(
    ("tokens", "median_of", "options", "message"),
    [
        ({**token_ids(), "ENSG7": 9}, medians(), {}, "Expected token ids 0 to 7, each once; found 9 .*none has 7"),
        ({**token_ids(), "ENSG7": 6}, medians(), {}, r"found 6 \(of 'ENSG7'\), twice"),
        (token_ids(), medians(), {"layout": "v2"}, "Expected a v2 dictionary, which starts with <pad>.*is v1"),
        ({"<unk>": -1, **token_ids()}, medians(), {}, r"ids 0 to 7, .*found -1 \(of '<unk>'\)"),
        (token_ids(), medians(GENES[:3]), {}, f"2 of 5 genes with a token have no median, e.g. '{GENES[3]}'.*gener"),
        (token_ids(), {**medians(), GENES[1]: 0.0}, {}, "1 genes have no positive finite median"),
        (token_ids(), {**medians(), GENES[1]: float("nan")}, {}, "1 genes have no positive finite median"),
        (dict.fromkeys(GENES, 3), medians(), {}, "found 3"),
        ({g: i for i, g in enumerate(GENES)}, medians(), {}, "Expected a dictionary that starts with <pad>, <mask>"),
        (token_ids("v1", ["<cls>", *GENES]), medians(), {}, "Expected genes after <pad>, <mask>; found '<cls>'"),
        (medians(), token_ids(), {}, "The token dictionary: expected .* to integers, .*another of the original's"),
        (token_ids(), {"TP53": GENES[0]}, {}, "The median dictionary: expected .* names to numbers"),
        (token_ids(), medians(), {"aliases": {"TP53": 3}}, "The alias dictionary: expected .* names to names"),
        ({**token_ids(), 7: 7}, medians(), {}, "found 7: 7"),
        ({**token_ids(), "ENSG7": True}, medians(), {}, "found 'ENSG7': True"),
        ({}, medians(), {}, "expected a dictionary with entries"),
        (token_ids("v2"), medians(), {"max_length": 2}, r"Expected a max_length above 2 \(v2\), found 2"),
        (token_ids(), medians(), {"max_length": 0}, r"Expected a max_length above 0 \(v1\), found 0"),
    ],
)  # fmt: skip
def test_dictionaries_that_do_not_fit(tokens, median_of, options, message):
    with pytest.raises(ValueError, match=message):
        convert_original(tokens, median_of, **options)


# ---- folders


def test_a_folder_with_one_generation_needs_no_layout(tmp_path):
    published(tmp_path / "gene_dictionaries_30m", aliases={"TP53": GENES[0]})
    files = find_original_files(tmp_path)
    assert [path.name for path in (files.tokens, files.medians, *files.aliases)] == [
        "token_dictionary_gc30M.pkl",
        "gene_median_dictionary_gc30M.pkl",
        "ensembl_mapping_dict_gc30M.pkl",
    ]
    assert convert_original(files.tokens, files.medians, files.aliases).gene_aliases == {"TP53": GENES[0]}


def test_layout_chooses_and_generations_are_never_mixed(tmp_path):
    published(tmp_path, "_gc30M", "v1")
    published(tmp_path, "_gc104M", "v2", aliases={"TP53": GENES[0]})
    with pytest.raises(ValueError, match=r"found token_dictionary_gc104M.pkl \(v2\).*Choose by --layout"):
        find_original_files(tmp_path)
    assert find_original_files(tmp_path, "v1").aliases == ()
    assert find_original_files(tmp_path, "v2").aliases[0].name == "ensembl_mapping_dict_gc104M.pkl"


def test_folders_without_a_single_choice(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder"):
        find_original_files(tmp_path / "absent")
    with pytest.raises(ValueError, match="found none"):
        find_original_files(tmp_path)
    published(tmp_path)
    with pytest.raises(ValueError, match=r"expected one v2 .*found token_dictionary_gc30M.pkl \(v1\)"):
        find_original_files(tmp_path, "v2")
    published(tmp_path / "copy")
    with pytest.raises(ValueError, match="Name the files by --tokens"):
        find_original_files(tmp_path)
    for path in (tmp_path / "copy").glob("*median*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no gene_median_dictionary_gc30M.pkl beside it"):
        find_original_files(tmp_path / "copy")


# ---- the command


def test_command_writes_a_tokenizer_that_loads(tmp_path, capsys):
    source = published(tmp_path / "geneformer", aliases={"TP53": GENES[2]})
    assert main([str(source), "--max-length", "3", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "v1: 5 genes with token and median" in said
    assert "ensembl_mapping_dict_gc30M.pkl" in said
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(loaded) is RankValueTokenizer
    # Values 1/1.5, 3/2.5, 1/3.5, 3/4.5 (times one constant); three of them fit.
    encoded = loaded.encode_expression([0, 1, 3, 1, 3], [*GENES[:2], "TP53", *GENES[3:]])
    assert encoded["input_ids"] == [[4, 3, 6]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["geneformer", "out"]


def test_command_with_single_files(tmp_path, capsys):
    source = published(tmp_path / "geneformer", "", "v2", aliases={"TP53": GENES[2]})
    names = {
        k: str(source / f"{k}.pkl") for k in ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict")
    }
    command = ["--tokens", names["token_dictionary"], "--medians", names["gene_median_dictionary"]]
    assert main([*command, "--output", str(tmp_path / "without")]) == 0
    assert "no aliases" in capsys.readouterr().out
    assert main([*command, "--aliases", f"{source}/ensembl_mapping_dict.pkl", "--output", str(tmp_path / "with")]) == 0
    assert RankValueTokenizer.from_pretrained(tmp_path / "without").gene_aliases == {}
    assert RankValueTokenizer.from_pretrained(tmp_path / "with").gene_aliases == {"TP53": GENES[2]}
    for wrong in (command[:2], [str(source), *command], []):
        with pytest.raises(SystemExit):
            main([*wrong, "--output", str(tmp_path / "x")])
        assert "either a folder, or both --tokens and --medians" in capsys.readouterr().err


def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys):
    source = published(tmp_path / "geneformer")
    (source / "gene_median_dictionary_gc30M.pkl").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    assert main([str(source), "--output", str(tmp_path / "deep" / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Refused 'os.system'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["geneformer"]
    with pytest.raises(UnsafePickleError):
        convert_original(token_ids(), source / "gene_median_dictionary_gc30M.pkl")


def test_what_lies_in_the_output_folder_is_kept(tmp_path):
    old, new = make_tokenizer(3), make_tokenizer(4)
    out = tmp_path / "out"
    out.mkdir()
    save_tokenizer_folder(old, out)  # an empty folder will do
    with pytest.raises(FileExistsError, match=r"is not empty; it holds .* --overwrite"):
        save_tokenizer_folder(new, out)
    save_tokenizer_folder(new, out, overwrite=True)
    assert len(RankValueTokenizer.from_pretrained(out).gene_medians) == 4
    (out / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds 'model\.safetensors', which is no tokenizer's"):
        save_tokenizer_folder(old, out, overwrite=True)
    assert (out / "model.safetensors").read_text() == "precious"
    assert len(RankValueTokenizer.from_pretrained(out).gene_medians) == 4
    with pytest.raises(FileExistsError, match="is a file"):
        save_tokenizer_folder(old, out / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_keeps_the_earlier_tokenizer(tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_tokenizer_folder(make_tokenizer(3), out)
    rename = Path.rename

    def fails_at_the_last_step(self, target):
        if self.name.endswith(".tmp"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_last_step)
    with pytest.raises(OSError, match="disk full"):
        save_tokenizer_folder(make_tokenizer(4), out, overwrite=True)
    assert len(RankValueTokenizer.from_pretrained(out).gene_medians) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_loads_by_the_saved_code_alone(tmp_path):
    save_tokenizer_folder(convert_original(token_ids("v2"), medians(), {"TP53": GENES[0]}), tmp_path / "out")
    code = (
        "import sys; sys.modules['cellglot'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        f"print(t.layout, t.encode_expression([2, 0, 9], ['TP53', {GENES[1]!r}, {GENES[2]!r}])['input_ids'])\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    # 2/0.5 = 4 against 9/2.5 = 3.6
    assert result.stdout.strip() == "v2 [[2, 4, 6, 3]]"


# ---- the published files


def published_tables(real_data, layout):
    """Token ids, medians and aliases of the reference tables, to the last bit (pandas' fast parser loses it)."""
    folder = real_data / "geneformer"
    with gzip.open(folder / f"vocabulary_{layout}.tsv.gz", "rt") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with gzip.open(folder / f"gene_aliases_{layout}.tsv.gz", "rt") as file:
        aliases = {row["alias"]: row["ensembl_id"] for row in csv.DictReader(file, delimiter="\t")}
    ids = {row["token"]: int(row["token_id"]) for row in rows}
    return ids, {row["token"]: float(row["nonzero_median"]) for row in rows if row["nonzero_median"]}, aliases


@pytest.mark.realdata
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_published_dictionaries_equal_the_reference_tables(real_data, layout):
    files = find_original_files(real_data / "geneformer", layout)
    tokenizer = convert_original(files.tokens, files.medians, files.aliases, layout=layout)
    ids, median_of, aliases = published_tables(real_data, layout)
    assert tokenizer.get_vocab() == ids
    assert tokenizer.gene_medians == median_of
    if layout == "v1":
        assert files.aliases == ()  # its own alias file is not among these; V2's would rename 502 genes
        assert tokenizer.gene_aliases == {}
    else:
        # The published file spells all names in capitals; the table adds 237 as they are written (C10orf105).
        assert tokenizer.gene_aliases.items() <= aliases.items()
        assert len(aliases) - len(tokenizer.gene_aliases) == 237
        expected = [tokenizer.resolver.vocabulary.index(gene) for gene in list(aliases.values())[::97]]
        assert tokenizer.resolver.match(list(aliases)[::97]).index_g.tolist() == expected
        added = sorted(set(aliases) - set(tokenizer.gene_aliases))
        position = {gene: i for i, gene in enumerate(tokenizer.resolver.vocabulary)}
        assert tokenizer.resolver.match(added).index_g.tolist() == [position[aliases[name]] for name in added]


@pytest.mark.realdata
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_tokens_equal_those_of_the_reference_tables(real_data, layout, tmp_path):
    assert main([str(real_data / "geneformer"), "--layout", layout, "--output", str(tmp_path / "t")]) == 0
    folder = real_data / "geneformer"
    reference = RankValueTokenizer.from_vocabulary(
        folder / f"vocabulary_{layout}.tsv.gz", layout, aliases=folder / f"gene_aliases_{layout}.tsv.gz"
    )
    cells = real_data / "golden" / "scmixology150_input.h5ad"
    found = AutoTokenizer.from_pretrained(tmp_path / "t").encode_anndata(cells)["input_ids"][:]
    assert found == reference.encode_anndata(cells)["input_ids"][:]


@pytest.mark.realdata
def test_aliases_of_another_generation_do_not_rename_tokens(real_data):
    folder = real_data / "geneformer"
    files, report = find_original_files(folder, "v1"), ConversionReport()
    tokenizer = convert_original(files.tokens, files.medians, folder / "ensembl_mapping_dict_gc104M.pkl", report=report)
    assert report.n_aliases_of_tokens == 502
    genes = list(tokenizer.gene_medians)
    assert tokenizer.resolver.match(genes).index_g.tolist() == list(range(len(genes)))
