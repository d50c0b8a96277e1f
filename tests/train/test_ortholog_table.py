import gzip

import numpy as np
import pandas as pd
import pytest

from cellglot.train.ortholog_table import read_orthologs, shared_genes

HUMAN, MOUSE = ["ENSG00000000011", "ENSG00000000012", "ENSG00000000013"], ["ENSMUSG00000000021", "ENSMUSG00000000022"]


def found(path, genes_a, genes_b):
    shared = shared_genes(read_orthologs(path), genes_a, genes_b, name=str(path))
    return [(genes_a[i], genes_b[j]) for i, j in zip(shared.index_a, shared.index_b, strict=True)], shared.columns


def test_two_columns_without_header_in_either_order(tmp_path):
    path = tmp_path / "pairs.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("TP53,Trp53\nA,a1\nA,a2\nB,b\nC,b\n")
    pairs, _ = found(path, ["C", "A", "TP53", "B"], ["b", "a1", "Trp53"])
    assert pairs == [("TP53", "Trp53")]  # A has two orthologs, b is one of two genes
    assert found(path, ["b", "Trp53"], ["TP53", "X"])[0] == [("Trp53", "TP53")]


def test_header_and_columns_are_found_by_what_the_genes_are(tmp_path):
    path = tmp_path / "homologs.tsv"
    table = pd.DataFrame(
        {"MGI.symbol": ["Aa", "Bb"], "mouse id": MOUSE, "HGNC.symbol": ["AA", "BB"], "human id": HUMAN[:2]}
    )
    table.to_csv(path, sep="\t", index=False)
    pairs, columns = found(path, HUMAN, ["Bb", "Zz"])
    assert pairs == [(HUMAN[1], "Bb")]
    assert columns == ("human id", "MGI.symbol")
    # Ensembl ids with versions are the same genes; a mouse symbol is not its human one in capitals.
    assert found(path, [HUMAN[0] + ".3"], MOUSE)[0] == [(HUMAN[0] + ".3", MOUSE[0])]
    assert found(path, ["AA", "BB"], ["Aa", "BB"])[1] == ("HGNC.symbol", "MGI.symbol")


def test_biomart_export_knows_what_is_one_to_one(tmp_path):
    path = tmp_path / "mart_export.txt"
    pd.DataFrame(
        {
            "Gene stable ID": HUMAN[:2],
            "Gene name": ["AA", "BB"],
            "Mouse gene stable ID": MOUSE,
            "Mouse gene name": ["Aa", "Bb"],
            "Mouse homology type": ["ortholog_one2one", "ortholog_one2many"],
        }
    ).to_csv(path, sep="\t", index=False)
    assert found(path, HUMAN, MOUSE)[0] == [(HUMAN[0], MOUSE[0])]


def test_mgi_report(tmp_path):
    path = tmp_path / "HOM_MouseHumanSequence.rpt"
    pd.DataFrame(
        {
            "DB Class Key": [1, 1, 2, 2, 2],
            "NCBI Taxon ID": [10090, 9606, 10090, 10090, 9606],
            "Symbol": ["Aa", "AA", "Bb", "Bb2", "BB"],
            "EntrezGene ID": [1, 2, 3, 4, 5],
            "Mouse MGI ID": ["MGI:1", "", "MGI:2", "MGI:3", ""],
            "HGNC ID": ["", "HGNC:1", "", "", "HGNC:2"],
        }
    ).to_csv(path, sep="\t", index=False)
    assert found(path, ["BB", "AA"], ["Aa", "Bb"])[0] == [("AA", "Aa")]


def test_parquet_of_gene_networks(tmp_path):
    table = pd.DataFrame({"human_symbol": ["AA", "BB"], "mouse_symbol": ["Aa", "Bb"], "one_to_one": [False, True]})
    table.to_parquet(tmp_path / "part.parquet")
    assert found(tmp_path, ["AA", "BB"], ["Aa", "Bb"])[0] == [("BB", "Bb")]


def test_symbols_join_genes_that_the_table_has_no_ids_of(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("AA,Aa\nBB,Bb\nCC,Cc\n")
    # Two human genes are called BB, so that it names neither; the mouse's ids are symbols already.
    symbols = (["AA", "BB", "BB"], ["Cc", "Bb", "Aa"])
    shared = shared_genes(read_orthologs(path), HUMAN, ["Cc", "Bb", "Aa"], name="pairs", symbols=symbols)
    assert (shared.index_a.tolist(), shared.index_b.tolist()) == ([0], [2])
    # What is a gene's id means that gene, whatever others are called.
    shared = shared_genes(read_orthologs(path), ["AA", "X"], ["Aa", "Y"], name="pairs", symbols=(["Z", "AA"], ["", ""]))
    assert (shared.index_a.tolist(), shared.index_b.tolist()) == ([0], [0])


def test_tables_that_join_nothing_are_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("human,mouse\nTP53,Trp53\nBRCA1,Brca1\n")
    with pytest.raises(ValueError, match=r"joins no gene of the one source.*ENSG00000000011.*TP53, Trp53"):
        found(path, HUMAN, ["Trp53"])
    path.write_text("")
    with pytest.raises(ValueError, match=r"pairs\.csv is empty"):
        read_orthologs(path)
    with pytest.raises(ValueError, match=r"found '\.xlsx'"):
        read_orthologs(tmp_path / "pairs.xlsx")


@pytest.mark.realdata
def test_real_tables(real_data):
    table = read_orthologs(real_data / "graph/orthologs_ensembl105_human2mouse.csv.gz")
    human, mouse = (list(dict.fromkeys(table.iloc[:, i].dropna())) for i in (0, 1))
    shared = shared_genes(table, human, mouse, name="Ensembl 105")
    assert len(shared.index_a) == 16_757  # as the catalogue of the data says
    assert len(np.unique(shared.index_b)) == 16_757
