"""Our tokenizer from the original Geneformer's published dictionaries.

    python -m cellglot.tokenization.convert_original Geneformer/geneformer --layout v2 --output my-tokenizer
    python -m cellglot.tokenization.convert_original --tokens token_dictionary_gc30M.pkl \\
        --medians gene_median_dictionary_gc30M.pkl --output my-tokenizer

The original ships, for each generation of its corpus (gc30M: V1; gc95M, gc104M: V2), pickled dictionaries of token ids,
of gene medians and of other names of genes. They are read by `load_plain_pickle`, which runs nothing in them.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .gene_ids import examples
from .rank_value import SPECIAL_TOKENS, RankValueTokenizer
from .restricted_pickle import load_plain_pickle


@dataclass(frozen=True)
class OriginalFiles:
    """The dictionaries of one generation. `aliases` may be several files: the first that knows a name decides."""

    tokens: Path
    medians: Path
    aliases: tuple[Path, ...] = ()


@dataclass
class ConversionReport:
    """What a conversion kept and left out."""

    layout: str = ""
    n_genes: int = 0
    n_medians_without_token: int = 0
    n_aliases: int = 0
    n_aliases_of_unknown_genes: int = 0
    n_aliases_of_tokens: int = 0
    aliases_of_tokens: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        of_tokens = f" (e.g. {examples(self.aliases_of_tokens)})" if self.aliases_of_tokens else ""
        return (
            f"{self.layout}: {self.n_genes:,} genes with token and median, {self.n_medians_without_token:,} medians "
            f"without a token left out; {self.n_aliases:,} aliases kept, {self.n_aliases_of_unknown_genes:,} of genes "
            f"without a token and {self.n_aliases_of_tokens:,} that have a token of their own{of_tokens} left out"
        )


def convert_original(
    tokens: str | os.PathLike | Mapping[str, int],
    medians: str | os.PathLike | Mapping[str, float],
    aliases: str | os.PathLike | Mapping[str, str] | Sequence[str | os.PathLike] | None = None,
    *,
    layout: Literal["v1", "v2"] | None = None,
    max_length: int | None = None,
    report: ConversionReport | None = None,
) -> RankValueTokenizer:
    """The tokenizer that the original's dictionaries describe.

    tokens      pickle or mapping: token to id, special tokens included
    medians     pickle or mapping: gene to non-zero median of counts per 10,000
    aliases     pickle(s) or mapping: other name to gene. Left out are those of genes without a token, and names that
                are themselves tokens, which keep their own
    layout      found from the special tokens if absent
    max_length  tokens of a cell at the most; that of the layout if absent
    report      filled with what was kept and left out
    Raises      ValueError for ids with gaps or repetitions, a layout that the special tokens contradict, genes without
                a positive median, values of another type; UnsafePickleError for a pickle that holds more than data
    """
    import pandas as pd

    report = report if report is not None else ConversionReport()
    token_ids = _dictionary(tokens, "token dictionary", (int, np.integer))
    median_of = _dictionary(medians, "median dictionary", (int, float, np.integer, np.floating))
    names = _tokens_in_order(token_ids)
    found: Literal["v1", "v2"] = _layout(names)
    if layout not in (None, found):
        raise ValueError(
            f"Expected a {layout} dictionary, which starts with {', '.join(SPECIAL_TOKENS[layout])}; "
            f"this one is {found}."
        )
    special = SPECIAL_TOKENS[found]
    n_around_cell = 2 if found == "v2" else 0
    if max_length is not None and max_length <= n_around_cell:
        raise ValueError(f"Expected a max_length above {n_around_cell} ({found}), found {max_length}.")
    genes = names[len(special) :]
    missing = [gene for gene in genes if gene not in median_of]
    if missing:
        raise ValueError(
            f"{len(missing):,} of {len(genes):,} genes with a token have no median, e.g. {examples(missing)}. "
            "Are the two dictionaries of one generation (gc30M, gc104M)?"
        )
    try:
        medians_g = [float(median_of[gene]) for gene in genes]
    except OverflowError as error:
        raise ValueError(
            "A median is too large to be a number: the file is damaged, or no median dictionary."
        ) from error
    known = set(genes)
    alias_of = _kept_aliases(_alias_dictionaries(aliases), known, report)
    report.layout, report.n_genes = found, len(genes)
    report.n_medians_without_token = sum(gene not in known for gene in median_of)
    table = pd.DataFrame(
        {
            "token": names,
            "token_id": np.arange(len(names)),
            "nonzero_median": [np.nan] * len(special) + medians_g,
        }
    )
    return RankValueTokenizer.from_vocabulary(table, found, alias_of, max_length=max_length)


def find_original_files(folder: str | os.PathLike, layout: Literal["v1", "v2"] | None = None) -> OriginalFiles:
    """The dictionaries in a folder of the original's repository, or in folders inside it.

    layout  which to choose where the folder holds several generations
    Raises  ValueError if there is none, or more than one to choose from; FileNotFoundError for no such folder
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}. Expected the `geneformer` folder of the original's repository.")
    candidates: dict[Path, str] = {}
    for path in sorted(folder.rglob("token_dictionary*.pkl")):
        candidates[path] = _layout(_tokens_in_order(_dictionary(path, "token dictionary", (int, np.integer))))
    chosen = [path for path, found in candidates.items() if layout in (None, found)]
    if len(chosen) != 1:
        listing = ", ".join(f"{path.relative_to(folder)} ({found})" for path, found in candidates.items()) or "none"
        mend = (
            "Name the files by --tokens, --medians and --aliases."
            if layout or len(candidates) < 2 or len(set(candidates.values())) < 2
            else "Choose by --layout."
        )
        raise ValueError(
            f"{folder}: expected one {'' if layout is None else layout + ' '}token_dictionary*.pkl, found {listing}. "
            f"{mend}"
        )
    tokens = chosen[0]
    generation = tokens.stem.removeprefix("token_dictionary")
    medians = tokens.with_name(f"gene_median_dictionary{generation}.pkl")
    if not medians.is_file():
        raise ValueError(f"{tokens} has no {medians.name} beside it. Name both by --tokens and --medians.")
    # Of the same generation only: another's may give a gene's id to another gene.
    kinds = ("ensembl_mapping_dict", "gene_name_id_dict")
    aliases = [tokens.with_name(f"{kind}{generation}.pkl") for kind in kinds]
    return OriginalFiles(tokens, medians, tuple(path for path in aliases if path.is_file()))


def save_tokenizer_folder(tokenizer: RankValueTokenizer, output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a tokenizer's folder whole: under another name first, so that `output` is never half-written.

    overwrite  replaces an earlier tokenizer there
    Raises     FileExistsError if output is not empty, or holds something else than a tokenizer
    """
    output = Path(output).resolve()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; expected the name of a folder.")
    present = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if present and not overwrite:
        raise FileExistsError(
            f"{output} is not empty; it holds {examples(present)}. Choose another folder, or replace a tokenizer that "
            "is there by --overwrite (overwrite=True)."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    replaced = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        tokenizer.save_pretrained(partial)
        foreign = [name for name in present if not (partial / name).exists()]
        if foreign:
            raise FileExistsError(
                f"{output} holds {examples(foreign)}, which is no tokenizer's. Choose another folder; to add a "
                "tokenizer to a model's, load it and call tokenizer.save_pretrained(folder)."
            )
        if present:
            output.rename(replaced)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)


def _dictionary(source: Any, what: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    """A mapping of names to values of some types, from itself or a pickle."""
    is_mapping = isinstance(source, Mapping)
    content = dict(source) if is_mapping else load_plain_pickle(source)
    name = f"The {what}" if is_mapping else f"{source}"
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{name}: expected a dictionary with entries, found {_described(content)}.")
    for key, value in content.items():
        # A bool is an int in Python, and no id.
        if not isinstance(key, str) or not isinstance(value, kinds) or isinstance(value, bool):
            wanted = "names" if str in kinds else "integers" if float not in kinds else "numbers"
            raise ValueError(
                f"{name}: expected a dictionary of names to {wanted}, found {_described(key)}: {_described(value)}. "
                "Is it another of the original's dictionaries?"
            )
    return content


def _described(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | np.generic) else f"a {type(value).__name__}"


def _tokens_in_order(token_ids: Mapping[str, int]) -> list[str]:
    names = sorted(token_ids, key=lambda token: int(token_ids[token]))
    ids = [int(token_ids[name]) for name in names]
    for expected, (name, found) in enumerate(zip(names, ids, strict=True)):
        if found != expected:
            problem = "twice" if expected and ids[expected - 1] == found else f"but none has {expected}"
            raise ValueError(
                f"Expected token ids 0 to {len(names) - 1:,}, each once; found {found} (of {name!r}), {problem}."
            )
    return names


def _layout(names: Sequence[str]) -> Literal["v1", "v2"]:
    for layout in ("v2", "v1"):
        special = SPECIAL_TOKENS[layout]
        if tuple(names[: len(special)]) == special:
            rest = [name for name in names[len(special) :] if name.startswith("<")]
            if rest:
                raise ValueError(f"Expected genes after {', '.join(special)}; found {examples(rest)}.")
            return layout
    raise ValueError(
        f"Expected a dictionary that starts with {', '.join(SPECIAL_TOKENS['v1'])} (v1) or "
        f"{', '.join(SPECIAL_TOKENS['v2'])} (v2); this one starts with {examples(names, 4)}."
    )


def _alias_dictionaries(aliases: Any) -> dict[str, str]:
    if aliases is None:
        return {}
    sources = [aliases] if isinstance(aliases, str | os.PathLike | Mapping) else list(aliases)
    merged: dict[str, str] = {}
    for source in sources:
        for name, gene in _dictionary(source, "alias dictionary", (str,)).items():
            merged.setdefault(name, gene)
    return merged


def _kept_aliases(alias_of: Mapping[str, str], genes: set[str], report: ConversionReport) -> dict[str, str]:
    kept = {}
    for name, gene in alias_of.items():
        if name == gene:
            continue  # the original's way of saying that an id is current
        if gene not in genes:
            report.n_aliases_of_unknown_genes += 1
        elif name in genes:
            report.n_aliases_of_tokens += 1
            report.aliases_of_tokens = [*report.aliases_of_tokens, name][:3]
        else:
            kept[name] = gene
    report.n_aliases = len(kept)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cellglot.tokenization.convert_original",
        description="Converts the original Geneformer's dictionaries to a cellglot tokenizer.",
    )
    parser.add_argument("folder", nargs="?", type=Path, help="the original's `geneformer` folder, with all the files")
    parser.add_argument("--tokens", type=Path, metavar="PKL", help="token_dictionary*.pkl")
    parser.add_argument("--medians", type=Path, metavar="PKL", help="gene_median_dictionary*.pkl")
    parser.add_argument(
        "--aliases",
        type=Path,
        metavar="PKL",
        nargs="+",
        help="ensembl_mapping_dict*.pkl, gene_name_id_dict*.pkl; with a folder, in place of those found in it",
    )
    parser.add_argument("--layout", choices=sorted(SPECIAL_TOKENS), help="expected layout; chooses within a folder")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a cell at the most")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the new tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there already")
    options = parser.parse_args(arguments)
    if (options.folder is None) == (options.tokens is None) or (options.tokens is None) != (options.medians is None):
        parser.error("expected either a folder, or both --tokens and --medians")
    try:
        if options.folder is None:
            files = OriginalFiles(options.tokens, options.medians)
        else:
            files = find_original_files(options.folder, options.layout)
        aliases = tuple(options.aliases or files.aliases)
        report = ConversionReport()
        tokenizer = convert_original(
            files.tokens,
            files.medians,
            aliases,
            layout=options.layout,
            max_length=options.max_length,
            report=report,
        )
        save_tokenizer_folder(tokenizer, options.output, overwrite=options.overwrite)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in (files.tokens, files.medians, *aliases):
        print(f"read {path}")
    if not aliases:
        print("no aliases: cells must name genes by the vocabulary's Ensembl ids (add --aliases to resolve symbols)")
    print(report)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
