"""The package as a user meets it: imports, names outsiders rely on, README."""

import importlib
import pkgutil
import re
import subprocess
import sys

import pytest

import cellglot

from .conftest import ROOT


def modules():
    return sorted(m.name for m in pkgutil.walk_packages(cellglot.__path__, "cellglot."))


def test_every_module_imports():
    names = modules()
    assert {"cellglot.train.pretrain", "cellglot.modeling.geneformer.modeling_geneformer"} <= set(names)
    for name in names:
        importlib.import_module(name)


def test_public_names_exist():
    for name in cellglot.__all__:
        assert getattr(cellglot, name) is not None
    assert set(cellglot.__all__) <= set(dir(cellglot))
    with pytest.raises(AttributeError, match="no attribute 'Geneformr'"):
        cellglot.Geneformr  # noqa: B018


def test_the_import_itself_imports_no_heavy_library():
    code = "import sys, cellglot; print(*{'torch', 'transformers', 'anndata', 'pandas', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr


def test_model_and_tokenizer_code_never_reaches_out():
    """modeling/ and tokenization/ know nothing of train/, spaces/, datasets_scripts/; models nothing of AnnData."""
    for folder in ("modeling", "tokenization"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"(train|spaces|datasets_scripts)\b.* import|import .*(train|spaces)\b", text), path
            assert "cellglot" not in "".join(line for line in text.splitlines() if "import" in line), path
            if folder == "modeling":
                assert "anndata" not in text, path
                # What save_pretrained copies are flat sibling files.
                assert not re.search(r"from \.\.|from \.\w+\.\w+ import", text), path


def test_scripts_explain_themselves():
    for script in ("train/pretrain.py", "datasets_scripts/pbmc.py"):
        result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "usage:" in result.stdout


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_set_up_is_two_commands():
    commands = "".join(readme_blocks("bash"))
    assert 'pip install -c constraints.txt -e ".[train]" && accelerate launch train/pretrain.py\n' in commands
    assert 'pip install -c constraints.txt -e ".[test]" && pytest\n' in commands


def test_no_path_of_somebody_s_machine_is_in_the_tree():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json"} and path.is_file():
            assert not re.search(r"/(root|home/\w+|work|tmp/\w+)/", path.read_text()), name
