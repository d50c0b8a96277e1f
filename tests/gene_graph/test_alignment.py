"""A network over the genes of a model: every edge once, whatever the names, repetitions and directions."""

import numpy as np
import pytest

from cellglot.gene_graph import GeneNames, align_edges, gene_names

from ..conftest import ensembl
from .conftest import some_cells, some_graph, table_of

GENES = GeneNames(tuple(ensembl(5)), ("A", "B", "C", "", "B2"))


def named(graph) -> dict[tuple[str, str], float]:
    ids = [gene[-1] for gene in graph.genes.ids]
    return {(ids[i], ids[j]): s for (i, j), s in zip(graph.pairs, graph.scores.tolist(), strict=True)}


def test_genes_match_by_id_version_symbol_and_alias():
    one, _, _, four, five = ensembl(5)
    table = table_of([(f"{one}.7", "B"), ("b2", four.lower()), ("C", "OLD")])
    graph = align_edges(table, GENES, aliases={"OLD": five, "unused": one})
    assert named(graph) == {("1", "2"): 1.0, ("4", "5"): 1.0, ("3", "5"): 1.0}
    assert graph.report.n_matched_names == graph.report.n_names == 6
    # Two names are of one gene.
    again = align_edges(table_of([(one, "B"), ("A", "C")]), GENES).report
    assert (again.n_matched_names, again.n_matched_genes) == (4, 3)


def test_a_symbol_of_two_genes_names_neither():
    genes = GeneNames(tuple(ensembl(3)), ("A", "A", "C"))
    graph = align_edges(table_of([("A", "C"), (ensembl(3)[0], "C")]), genes)
    assert named(graph) == {("1", "3"): 1.0}


def test_self_loops_repetitions_and_directions_leave_each_edge_once_and_are_counted():
    edges = [("A", "B", 1.0), ("A", "B", 3.0), ("B", "A", 2.0), ("C", "C", 9.0), ("B", "C", 4.0), ("A", "unknown", 5.0)]
    graph = align_edges(table_of(edges), GENES)
    assert named(graph) == {("1", "2"): 3.0, ("2", "3"): 4.0}
    report = graph.report
    # A-B has other scores the other way round, B-C no other way round where A-B has one.
    assert (report.n_self_loops, report.n_repeated, report.n_asymmetric) == (1, 1, 2)
    assert (report.n_rows, report.n_matched_rows, report.n_names, report.n_matched_names) == (6, 5, 4, 3)
    assert (report.n_genes, report.n_matched_genes) == (5, 3)
    text = str(report)
    for said in (
        "it has 3 of the 5 genes given (60.0%)",
        "3 of 4 genes (75.0%)",
        "5 of 6 edges (83.3%)",
        "1 self-loops",
        "1 repeated",
        "2 asymmetric",
    ):
        assert said in text


def test_a_table_that_lists_each_edge_once_is_not_called_asymmetric():
    graph = align_edges(table_of([("B", "A"), ("C", "A")]), GENES)
    assert graph.report.n_asymmetric == 0
    assert "asymmetric" not in str(graph.report)
    assert named(graph) == {("1", "2"): 1.0, ("1", "3"): 1.0}


def test_min_score_leaves_out_what_is_below():
    edges = [("A", "B", 700.0), ("B", "C", 699.0)]
    graph = align_edges(table_of(edges), GENES, min_score=700)
    assert named(graph) == {("1", "2"): 700.0}
    assert graph.report.n_below_score == 1
    with pytest.raises(ValueError, match=r"no edge joins .* 1000"):
        align_edges(table_of(edges), GENES, min_score=1000)
    with pytest.raises(ValueError, match="no scores to compare"):
        align_edges(table_of([("A", "B")]), GENES, min_score=1)


def test_a_graph_that_matches_no_gene_is_refused_with_examples_of_both():
    with pytest.raises(ValueError, match=r"None of the 2 genes of mouse .*'Trp53'.*'ENSG00000000001'.*'A'.*orthologs"):
        align_edges(table_of([("Mdm2", "Trp53")], name="mouse"), GENES)
    with pytest.raises(ValueError, match="no edge joins two different genes"):
        align_edges(table_of([("A", "Trp53"), ("B", "B")]), GENES)


def test_connected_genes_are_a_model_of_their_own():
    graph = align_edges(table_of([("C", "A", 2.0), ("B2", "A", 3.0)]), GENES)
    small = graph.connected()
    assert small.genes.ids == (ensembl(5)[0], ensembl(5)[2], ensembl(5)[4])
    assert small.genes.symbols == ("A", "C", "B2")
    assert named(small) == named(graph)
    assert small.config_options()["n_genes"] == 3


def test_a_shuffled_graph_keeps_degrees_and_scores_but_not_edges():
    graph = some_graph(gene_names(some_cells()))
    shuffled = graph.shuffled(seed=1)
    assert sorted(shuffled.degrees()) == sorted(graph.degrees())
    assert (shuffled.degrees()[graph.degrees() == 0] == 0).all()
    assert sorted(shuffled.scores) == sorted(graph.scores)
    assert (shuffled.pairs[:, 0] < shuffled.pairs[:, 1]).all()
    assert set(map(tuple, shuffled.pairs)) != set(map(tuple, graph.pairs))
    assert np.array_equal(shuffled.pairs, graph.shuffled(seed=1).pairs)


def test_a_rewired_graph_keeps_every_gene_s_degree_but_not_the_edges():
    rng = np.random.default_rng(0)
    genes = GeneNames(tuple(ensembl(97)))
    drawn = {tuple(sorted(pair)) for pair in rng.integers(97, size=(400, 2)).tolist() if pair[0] != pair[1]}
    graph = align_edges(table_of([(genes.ids[a], genes.ids[b], 1.0 + a) for a, b in sorted(drawn)]), genes)
    rewired = graph.rewired(seed=1)
    assert np.array_equal(rewired.degrees(), graph.degrees())
    before, after = set(map(tuple, graph.pairs.tolist())), set(map(tuple, rewired.pairs.tolist()))
    assert len(after) == len(rewired.pairs) == len(before)
    assert (rewired.pairs[:, 0] < rewired.pairs[:, 1]).all()
    # By chance, a pair of 97 genes is among some 380 edges once in twelve.
    assert len(before & after) < len(before) / 4
    assert sorted(rewired.scores) == sorted(graph.scores)
    assert np.array_equal(rewired.pairs, graph.rewired(seed=1).pairs)


def test_gene_names_come_once_with_their_symbols():
    cells = some_cells()
    cells.var["ensembl_id"] = [f"{gene}.3" for gene in [*ensembl(12), ensembl(12)[0]]]
    genes = gene_names(cells)
    assert genes.ids == tuple(ensembl(12))
    assert genes.symbols == tuple(f"G{i}" for i in range(1, 13))
    cells.var_names = list(cells.var["ensembl_id"])
    assert gene_names(cells).symbols is None
