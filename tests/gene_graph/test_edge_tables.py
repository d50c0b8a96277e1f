"""Edges of every published layout come out with their genes and scores; what cannot be used is refused by name."""

import gzip
import zipfile

import numpy as np
import pandas as pd
import pytest

from cellglot.gene_graph import align_edges, gene_names, read_edges

from ..datasets_scripts.test_gene_networks import BIOGRID_HEADER, EDGES, NAMES, built, lines, publish_string


def edges_of(table) -> list[tuple]:
    names = [(table.genes[a], table.genes[b]) for a, b in zip(table.a, table.b, strict=True)]
    return names if table.scores is None else [(*pair, s) for pair, s in zip(names, table.scores.tolist(), strict=True)]


STRING_EDGES = [("ARF5", "RALGPS2", 173), ("RALGPS2", "ARF5", 173), ("ARF5", "NA", 0), ("NA", "ARF5", 1000)]


def test_string_links_take_their_names_from_info(tmp_path):
    publish_string(tmp_path, EDGES, NAMES)
    links, info = sorted(tmp_path.glob("*links*"))[0], sorted(tmp_path.glob("*info*"))[0]
    assert edges_of(read_edges(links, info=info)) == STRING_EDGES
    with pytest.raises(ValueError, match="info="):
        read_edges(links)


def biogrid_row(a: str, b: str, taxa: tuple[int, int] = (9606, 9606)) -> list:
    row = dict.fromkeys(BIOGRID_HEADER, "-")
    row |= {"#BioGRID Interaction ID": "1", "Entrez Gene Interactor A": "1", "Entrez Gene Interactor B": "2"}
    row |= {"Official Symbol Interactor A": a, "Official Symbol Interactor B": b, "Score": "-3.5"}
    row |= {"Organism ID Interactor A": str(taxa[0]), "Organism ID Interactor B": str(taxa[1])}
    return list(row.values())


@pytest.mark.parametrize("packed", [False, True])
def test_biogrid_keeps_interactions_within_the_species_and_no_scores(tmp_path, packed):
    rows = [biogrid_row("TP53", "MDM2"), biogrid_row("TP53", "Mdm2", (9606, 10090)), biogrid_row("MDM2", "TP53")]
    rows.append(biogrid_row("TP53", "-"))
    content = lines([BIOGRID_HEADER, *rows])
    path = tmp_path / "BIOGRID-ORGANISM-Homo_sapiens-4.4.241.tab3.txt"
    if packed:
        with zipfile.ZipFile(tmp_path / "BIOGRID-ORGANISM-4.4.241.tab3.zip", "w") as archive:
            archive.writestr(path.name, content)
        path = tmp_path / "BIOGRID-ORGANISM-4.4.241.tab3.zip"
    else:
        path.write_bytes(content)
    table = read_edges(path)
    assert edges_of(table) == [("TP53", "MDM2"), ("MDM2", "TP53")]
    assert table.left_out == {"not of taxon 9606": 1, "without a gene's name": 1}


def test_parquet_folders_of_the_corpus_builder_are_read(tmp_path):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    publish_string(downloads, EDGES, NAMES)
    built(tmp_path, "string", downloads)
    table = read_edges(tmp_path / "out")
    assert edges_of(table) == STRING_EDGES
    with pytest.raises(ValueError, match="no column 'tf'"):
        read_edges(tmp_path / "out", columns=("tf", "target"))


@pytest.mark.parametrize("separator", ["\t", ",", " ", ";"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("scored", [True, False])
def test_tables_of_two_or_three_columns_with_and_without_header(tmp_path, separator, header, scored):
    rows = [["A1BG", "NA", "0.5"], ["TP53", "A1BG", "2"]]
    names = [["gene1", "gene2", "weight"]] if header else []
    text = "".join(separator.join(row[: 3 if scored else 2]) + "\n" for row in [*names, *rows])
    (tmp_path / "e.tsv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "e.tsv").write_text(text)
    expected = [("A1BG", "NA", 0.5), ("TP53", "A1BG", 2.0)] if scored else [("A1BG", "NA"), ("TP53", "A1BG")]
    assert edges_of(read_edges(tmp_path / "e.tsv")) == edges_of(read_edges(tmp_path / "e.tsv.gz")) == expected


def test_columns_are_named_where_there_are_more(tmp_path):
    table = pd.DataFrame({"tf": ["TP53"], "confidence": ["A"], "target": ["MDM2"], "mor": [0.7]})
    table.to_csv(tmp_path / "dorothea.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match="4 columns"):
        read_edges(tmp_path / "dorothea.tsv")
    assert edges_of(read_edges(tmp_path / "dorothea.tsv", columns=("tf", "target"))) == [("TP53", "MDM2")]
    scored = read_edges(tmp_path / "dorothea.tsv", columns=("tf", "target"), score="mor")
    assert edges_of(scored) == [("TP53", "MDM2", np.float32(0.7))]
    with pytest.raises(ValueError, match="no column 'gene'"):
        read_edges(tmp_path / "dorothea.tsv", columns=("tf", "gene"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\tscore\nA\tB\t1\nA\tC\tnan\n", "1 of 2 edges .*nan for 'A' and 'C'"),
        ("A\tB\t1\nA\tC\t-0.5\n", "-0.5 for 'A' and 'C'"),
        ("A\tB\t1\nA\tC\tinf\n", "inf for"),
        ("A\tB\t1\nA\tC\thigh\n", "no numbers, e.g. 'high'"),
        ("A\tB\t1\nA\tC\t\n", "no numbers, e.g. ''"),
        ("gene1\tgene2\n", "no edges"),
        ("gene1\n", "expected a table of edges"),
        ("", "expected a table of edges"),
    ],
)
def test_bad_tables_are_refused_with_the_edge_or_the_layout(tmp_path, text, message):
    (tmp_path / "edges.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_edges(tmp_path / "edges.tsv")


def test_arguments_that_a_layout_has_no_use_for_are_refused(tmp_path):
    publish_string(tmp_path, EDGES, NAMES)
    links, info = sorted(tmp_path.glob("*links*"))[0], sorted(tmp_path.glob("*info*"))[0]
    biogrid = tmp_path / "BIOGRID-ORGANISM-Homo_sapiens-4.4.241.tab3.txt"
    biogrid.write_bytes(lines([BIOGRID_HEADER, biogrid_row("TP53", "MDM2")]))
    (tmp_path / "edges.tsv").write_text("a\tb\tscore\nA\tB\t1\n")
    pd.DataFrame({"gene_a": ["A"], "gene_b": ["B"]}).to_parquet(tmp_path / "edges.parquet")
    for path, options, message in [
        (links, {"info": info, "columns": ("protein1", "protein2")}, "STRING's, .* no use for columns: leave it out"),
        (biogrid, {"info": info, "score": "Score"}, "BioGRID's, .* no use for info, score"),
        (tmp_path / "edges.tsv", {"info": info}, "a table of edges, .* no use for info"),
        (tmp_path / "edges.parquet", {"info": info}, "a Parquet table, .* no use for info"),
        (tmp_path / "edges.tsv", {"score": "score"}, "score='score' needs columns="),
        (tmp_path / "edges.tsv", {"columns": ("a",)}, r"the two columns of genes, found columns=\('a',\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_edges(path, **options)


def test_absent_files_and_folders_without_tables_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_edges(tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="without Parquet"):
        read_edges(tmp_path)


@pytest.mark.realdata
def test_the_real_string_and_biogrid_match_the_kang_cells(real_data):
    genes = gene_names(real_data / "cells" / "kang2018_pbmc_12261x1287.h5ad")
    graph = align_edges(read_edges(real_data / "graph" / "pin_string.tsv.gz"), genes)
    # Counted apart, by symbol, when the readers were written: 1,171 of the 1,287 genes and 12,469 edges
    assert (graph.report.n_matched_names, len(graph.pairs)) == (1171, 12469)
    assert graph.report.n_rows == 156_186
    biogrid = align_edges(read_edges(real_data / "graph" / "pin_biogrid.tsv.gz"), genes)
    assert biogrid.report.n_rows == 908_467
    assert len(biogrid.pairs) > len(graph.pairs)
