"""Gene sets from files, as the vocabulary names their genes."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..tokenization.gene_ids import examples, is_named


def read_gene_sets(path: str | os.PathLike) -> dict[str, list[str]]:
    """Gene names by label, in the order of the file.

    path     one gene a line, all of them one set named after the file; or a TSV/CSV with columns gene_id and label.
             Lines that begin with # are left out
    Raises   ValueError for a file without genes, or a table without those columns; OSError
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: expected one gene a line, or columns gene_id and label.") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{path} holds no genes: expected one gene a line, or columns gene_id and label.")
    separator = next((s for s in ("\t", ",") if s in lines[0]), None)
    if separator is None:
        return {path.stem: list(dict.fromkeys(line.strip() for line in lines))}
    header = [name.strip() for name in lines[0].split(separator)]
    if not {"gene_id", "label"} <= set(header):
        raise ValueError(f"{path}: expected columns gene_id and label, found {', '.join(header)}.")
    gene, label = header.index("gene_id"), header.index("label")
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = [value.strip() for value in line.split(separator)]
        if len(fields) != len(header) or not (is_named(fields[gene]) and fields[label]):
            raise ValueError(
                f"{path}, entry {number}: expected {len(header)} fields with a gene and a label, found {line[:80]!r}."
            )
        genes = sets.setdefault(fields[label], [])
        if fields[gene] not in genes:
            genes.append(fields[gene])
    if not sets:
        raise ValueError(f"{path} has a header, but no genes.")
    return sets


def resolve_genes(names: Iterable[str], tokenizer: Any) -> tuple[list[str], list[str]]:
    """(the vocabulary's names of these genes, each once; the names it does not know).

    names   Ensembl ids, or symbols where the tokenizer has aliases
    Raises  ValueError if the vocabulary knows none
    """
    names = [str(name) for name in names]
    resolver = tokenizer.resolver
    match = resolver.match(names)
    if not match.n_matched:
        hint = "" if tokenizer.gene_aliases else " This tokenizer has no aliases, so it resolves no symbols."
        raise ValueError(
            f"None of {len(names):,} genes (e.g. {examples(names)}) is in the vocabulary, which holds e.g. "
            f"{examples(resolver.vocabulary)}.{hint}"
        )
    positions = dict.fromkeys(match.index_g[match.index_g >= 0].tolist())
    unknown = [name for name, position in zip(names, match.index_g, strict=True) if position < 0]
    return [resolver.vocabulary[position] for position in positions], unknown
