import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cellglot.train import pretrain
from cellglot.train.config import chosen_option, option, parse_config, write_run_record
from cellglot.train.finetune import FinetuneConfig
from cellglot.train.finetune_drug_response import DrugResponseFinetuneConfig
from cellglot.train.finetune_gene_graph import GeneGraphFinetuneConfig
from cellglot.train.loop import LoopConfig
from cellglot.train.pretrain_cross_species import CrossSpeciesPretrainConfig
from cellglot.train.pretrain_drug_response import DrugResponsePretrainConfig
from cellglot.train.pretrain_gene_graph import GeneGraphPretrainConfig
from cellglot.train.pretrain_geneformer import PretrainConfig
from cellglot.train.pretrain_multiome import MultiomePretrainConfig


@dataclass
class Tiny:
    rate: float = option(1e-3, "rate")
    steps: int | None = option(None, "steps")
    kind: Literal["a", "b"] = option("a", "kind")
    flag: bool = option(True, "flag")
    names: list[str] = option(["x"], "names")


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--recipe", str(path)]


def test_defaults_recipe_and_command_line_in_that_order(tmp_path):
    assert parse_config(Tiny, []) == Tiny()
    words = recipe(tmp_path, "rate: 1e-2\nsteps: 7\nflag: false\nnames: [p, q]\nkind: null\n")
    assert parse_config(Tiny, words) == Tiny(0.01, 7, None, False, ["p", "q"])  # type: ignore[arg-type]
    assert parse_config(Tiny, recipe(tmp_path, "names: []\nsteps: null")) == Tiny(names=[])
    assert parse_config(LoopConfig, recipe(tmp_path, "mixed_precision: no")).mixed_precision == "no"
    words = recipe(tmp_path, "names: {a: x, b: [y, z], c: null}")
    assert parse_config(Tiny, words).names == ["a=x", "b=y", "b=z"]
    words = recipe(tmp_path, "rate: 1e-2\nsteps: 7\nflag: false\nnames: [p, q]\n")
    assert parse_config(Tiny, ["--rate", "3", *words, "--kind=b", "--flag", "true"]) == Tiny(
        3.0, 7, "b", True, ["p", "q"]
    )
    assert parse_config(Tiny, [f"--recipe={words[1]}"]).steps == 7


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("step: 3", [], "unknown option 'step' (did you mean 'steps'?)"),
        ("", ["--stepz", "3"], "unknown option 'stepz' (did you mean 'steps'?)"),
        ("", ["--rat", "3"], "unknown option 'rat' (did you mean 'rate'?)"),
        ("steps: many", [], "argument --steps: invalid int value: 'many'"),
        ("kind: c", [], "argument --kind: invalid choice: 'c'"),
        ("- a\n- b", [], "expected `option: value` lines, found a list"),
        ("a: [", [], "is not valid YAML"),
    ],
)
def test_unknown_keys_and_wrong_types_are_errors(text, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_config(Tiny, [*recipe(tmp_path, text), *words])
    assert message in capsys.readouterr().err


def test_two_recipes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_config(Tiny, [*recipe(tmp_path, "steps: 3"), "--recipe", "other.yaml"])
    assert "--recipe can be given once" in capsys.readouterr().err


def test_missing_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_config(Tiny, ["--recipe", "nowhere.yaml"])
    assert "nowhere.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--batch_size", "0"],
        ["--learning_rate", "-1"],
        ["--resume", "true", "--overwrite", "true"],
        ["--model", "v9"],
        ["--num_attention_heads", "3"],
        ["--warmup_steps", "-1"],
        ["--validation_fraction", "1.5"],
    ],
)
def test_impossible_values_are_errors(words, capsys):
    with pytest.raises(SystemExit):
        parse_config(PretrainConfig, words)
    assert "error:" in capsys.readouterr().err


def test_recipes_in_the_tree_parse():
    recipes = sorted((Path(__file__).parents[2] / "train" / "recipes").glob("*.yaml"))
    # Those of align.py: test_align.py
    recipes = [path for path in recipes if not path.name.startswith("align_")]
    assert recipes
    kinds = {
        "finetune_gene_graph": GeneGraphFinetuneConfig,
        "finetune_drug_response": DrugResponseFinetuneConfig,
        "finetune": FinetuneConfig,
        "gene_graph": GeneGraphPretrainConfig,
        "drug_response": DrugResponsePretrainConfig,
        "cross": CrossSpeciesPretrainConfig,
        "multiome": MultiomePretrainConfig,
    }
    for path in recipes:
        kind = next((kind for start, kind in kinds.items() if path.name.startswith(start)), PretrainConfig)
        config = parse_config(kind, ["--recipe", str(path)])
        assert config != kind()
        # A recipe finds its own script's part.
        assert (chosen_option("method", ["--recipe", str(path)]) or "geneformer") == getattr(
            config, "method", "geneformer"
        )


def test_the_method_is_that_of_the_command_line_else_of_the_recipe(tmp_path, capsys):
    words = recipe(tmp_path, "method: cross_species\nn_components: 7")
    assert chosen_option("method", []) is None
    assert chosen_option("method", ["--n_components", "7", *words]) == "cross_species"
    assert chosen_option("method", [*words, "--method=geneformer"]) == "geneformer"
    # What is wrong with a recipe is the method's to say.
    assert chosen_option("method", ["--recipe", "nowhere.yaml"]) is None
    with pytest.raises(SystemExit, match="unknown method 'crossspecies'; expected one of geneformer, cross_species"):
        pretrain.main(["--method", "crossspecies"])
    with pytest.raises(SystemExit):
        pretrain.main([*words, "--method=geneformer"])
    assert "unknown option 'n_components'" in capsys.readouterr().err


def test_run_record_says_what_the_run_depends_on(tmp_path):
    write_run_record(tmp_path / "run.json", LoopConfig(), data="abc")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["batch_size"] == LoopConfig().batch_size
    assert record["versions"]["torch"]
    assert record["data"] == "abc"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
