"""Importance of genes and edges is what differentiation of the dense model says, and finds the genes that decide."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellglot.gene_graph import (
    align_edges,
    classify_expression,
    gene_importance,
    gene_names,
    plot_importance_network,
    read_edges,
    read_expression,
)
from cellglot.modeling.gene_graph import GeneGraphConfig, GeneGraphForSequenceClassification, smoothing_gene_graph

from ..modeling.dense_gene_graph import dense_mask
from .conftest import LABELS, N_GENES, make_model, some_cells


def relative_logit(model, hidden_input: torch.Tensor, label: int) -> torch.Tensor:
    x = hidden_input
    for layer in model.gene_graph.layers:
        x = layer(x).relu()
    logits = model.classifier(x)
    return (logits[:, label] - logits.mean(dim=-1)).sum()


def dense_edges(model, x: torch.Tensor, label: int) -> dict[str, torch.Tensor]:
    """(g, g) of each graph: weight times the gradient with respect to it of the messages, one layer, one cell."""
    encoder, layer = model.gene_graph, model.gene_graph.smoothing[0]
    mask = dense_mask(encoder.network.pairs, N_GENES, model.config.diagonal)
    features = encoder.lift(x.unsqueeze(-1))
    scores = (layer.theta(features) @ layer.phi(features).transpose(1, 2)) / model.config.attention_size**0.5
    individual = torch.nan_to_num(scores.masked_fill(~mask, -torch.inf).softmax(dim=-1))[0].detach()
    graphs = {"individual": individual, "global": torch.zeros(N_GENES, N_GENES)}
    i, j = encoder.network.pairs.long().unbind(1)
    graphs["global"][i, j] = graphs["global"][j, i] = encoder.network.scores
    out = 0
    for kind, graph in graphs.items():
        graph.requires_grad_()
        # What the lift's bias sends does not depend on the neighbour: only the neighbour's expression is a message.
        constant = graph.detach().sum(dim=1)
        sent = (graph @ x[0]).unsqueeze(-1) * encoder.lift.weight[:, 0] + constant.unsqueeze(-1) * encoder.lift.bias
        out = out + layer.dense[kind](sent).relu()
    smoothed = x + encoder.readout(out).squeeze(-1)
    gradients = torch.autograd.grad(relative_logit(model, smoothed, label), list(graphs.values()))
    return {kind: graph.detach() * g for (kind, graph), g in zip(graphs.items(), gradients, strict=True)}


@pytest.mark.parametrize("edges_at_once", [1, 10**6])
def test_importance_is_the_mean_over_a_class_of_weight_times_gradient(cells, model, monkeypatch, edges_at_once):
    monkeypatch.setitem(smoothing_gene_graph.EDGES_AT_ONCE, "cpu", edges_at_once)
    genes, edges = gene_importance(cells, model, labels="cell_type", cells_per_batch=4, progress=False)
    expression, obs, _ = read_expression(cells, model)
    place = {gene: i for i, gene in enumerate(model.config.gene_ids)}
    for label, name in enumerate(LABELS):
        of_class = np.flatnonzero(obs["cell_type"] == name)
        totals: dict[str, torch.Tensor] = {}
        gene_total = torch.zeros(N_GENES)
        for k in of_class:
            x = torch.from_numpy(expression[[k]].toarray()).requires_grad_()
            for kind, values in dense_edges(model, x.detach(), label).items():
                totals[kind] = totals.get(kind, 0) + values / len(of_class)
            logit = relative_logit(model, model.gene_graph.smooth(x)[0], label)
            gene_total += (x * torch.autograd.grad(logit, x)[0])[0].detach() / len(of_class)
        of_genes = genes[genes["label"] == name]
        assert (of_genes["n_cells"] == len(of_class)).all()
        ours = of_genes["importance"].to_numpy()
        assert (np.diff(ours) <= 0).all()
        order = [place[gene] for gene in of_genes["gene_id"]]
        np.testing.assert_allclose(ours, gene_total[order], atol=1e-6)
        np.testing.assert_allclose(
            of_genes["expression"], np.asarray(expression[of_class].mean(axis=0)).ravel()[order], rtol=1e-5
        )
        for kind, expected in totals.items():
            rows = edges[(edges["label"] == name) & (edges["graph"] == kind)]
            assert len(rows) == 2 * model.config.n_edges
            found = [expected[place[a], place[b]].item() for a, b in zip(rows["gene"], rows["neighbor"], strict=True)]
            np.testing.assert_allclose(rows["importance"], found, atol=1e-6)
            assert (np.diff(rows["importance"].abs()) <= 1e-12).all()


def test_weights_of_the_individual_graph_sum_to_one_a_gene(cells, model):
    _, edges = gene_importance(cells, model, labels="cell_type", progress=False)
    rows = edges[(edges["graph"] == "individual") & (edges["label"] == "B")]
    np.testing.assert_allclose(rows.groupby("gene")["weight"].sum(), 1, rtol=1e-5)
    assert rows["gene"].nunique() == 12


def test_predicted_labels_serve_where_none_are_given_and_others_are_left_out(cells, model):
    expression, _, _ = read_expression(cells, model)
    with torch.no_grad():
        predicted = model(torch.from_numpy(expression.toarray())).logits.argmax(dim=-1).numpy()
    genes, _ = gene_importance(cells, model, progress=False)
    found = genes.groupby("label")["n_cells"].first().to_dict()
    assert found == {LABELS[k]: int(n) for k, n in enumerate(np.bincount(predicted, minlength=3)) if n}
    cells.obs["cell_type"] = ["B", "unknown", *cells.obs["cell_type"][2:]]
    genes, edges = gene_importance(cells, model, labels="cell_type", top_edges=3, progress=False)
    assert genes.drop_duplicates("label")["n_cells"].sum() == len(cells.obs) - 1
    assert (edges.groupby(["label", "graph", "layer"]).size() == 3).all()
    alone = np.arange(len(cells.obs)) == 1
    with pytest.raises(ValueError, match=r"no label in obs\['cell_type'\] \(e.g. 'unknown'\)"):
        gene_importance(cells, model, labels="cell_type", cells=alone, progress=False)
    cells.obs["cell_type"] = "unknown"
    with pytest.raises(ValueError, match=r"no label in obs\['cell_type'\] .*'unknown'"):
        gene_importance(cells, model, labels="cell_type", progress=False)
    with pytest.raises(ValueError, match="no column 'type'"):
        gene_importance(cells, model, labels="type", progress=False)


def test_stacked_layers_have_edges_each_and_a_model_without_smoothing_has_none(cells):
    stacked = make_model(gene_names(cells), num_smoothing_layers=2, diagonal=1)
    _, edges = gene_importance(cells, stacked, labels="cell_type", progress=False)
    assert set(zip(edges["graph"], edges["layer"], strict=True)) == {
        (graph, layer) for graph in ("individual", "global") for layer in (0, 1)
    }
    plain = make_model(gene_names(cells), smoothing="none")
    genes, edges = gene_importance(cells, plain, labels="cell_type", progress=False)
    assert len(genes) == 3 * N_GENES
    assert len(edges) == 0
    with pytest.raises(ValueError, match="no edges for 'B'"):
        plot_importance_network(genes, edges, "B")


def marked_cells(n_cells: int = 240) -> ad.AnnData:
    """Cells whose type is that of the one marker they have: G1 of B, G5 of NK, G9 of T; all else is noise."""
    rng = np.random.default_rng(4)
    kind = np.arange(n_cells) % 3
    counts = rng.poisson(3, (n_cells, N_GENES)).astype(np.float32)
    counts[:, [0, 4, 8]] = 0
    counts[np.arange(n_cells), 4 * kind] = rng.poisson(4, n_cells) + 3
    obs = pd.DataFrame({"cell_type": np.array(LABELS)[kind]}, index=pd.Index([f"c{i}" for i in range(n_cells)]))
    cells = some_cells(n_cells)
    cells.X, cells.obs = sp.csr_matrix(counts), obs
    return cells


def test_a_trained_model_names_the_marker_of_each_class_first():
    cells = marked_cells()
    model = make_model(gene_names(cells), hidden_sizes=[32, 16])
    x = torch.from_numpy(read_expression(cells, model)[0].toarray())
    labels = torch.arange(len(x)) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(x, labels=labels).loss
        loss.backward()
        optimizer.step()
    genes, _ = gene_importance(cells, model, progress=False)
    first = genes.groupby("label", sort=False)["gene_symbol"].first()
    assert first.to_dict() == {"B": "G1", "NK": "G5", "T": "G9"}


def test_the_figure_shows_the_strongest_edges_and_the_symbols_of_their_genes(cells, model):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    genes, edges = gene_importance(cells, model, labels="cell_type", progress=False)
    ax = plot_importance_network(genes, edges, "B", n_edges=5)
    shown = {text.get_text() for text in ax.texts}
    of_class = edges[edges["label"] == "B"]
    pairs = [frozenset(pair) for pair in zip(of_class["gene_symbol"], of_class["neighbor_symbol"], strict=True)]
    total = of_class.groupby(pd.Series(pairs, index=of_class.index))["importance"].sum().abs()
    total = total.sort_values(ascending=False)
    assert shown == set().union(*total.index[:5])
    assert "B: the 5 most important edges" in ax.get_title("left")
    plt.close(ax.figure)


@pytest.mark.realdata
@pytest.mark.slow
def test_markers_of_the_kang_cell_types_are_found(real_data):
    source = real_data / "cells" / "kang2018_pbmc_12261x1287.h5ad"
    graph = align_edges(read_edges(real_data / "graph" / "pin_string.tsv.gz"), gene_names(source))
    obs = ad.read_h5ad(source, backed="r").obs
    labels = sorted(obs["cell_type"].unique())
    torch.manual_seed(0)
    config = GeneGraphConfig(
        smoothing="both",
        hidden_sizes=[256, 64],
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **graph.config_options(),
    )
    model: Any = GeneGraphForSequenceClassification(config)
    model.set_graph(graph.pairs, graph.scores)
    test = obs["donor"].astype(str).isin(["1256", "1488"]).to_numpy()
    expression, train_obs, _ = read_expression(source, model, cells=~test)
    target = torch.tensor([labels.index(label) for label in train_obs["cell_type"]])
    optimizer = torch.optim.Adam(model.parameters())
    for rows in torch.randperm(len(target)).split(64):
        optimizer.zero_grad()
        model(torch.from_numpy(expression[rows.numpy()].toarray()), labels=target[rows]).loss.backward()
        optimizer.step()
    predicted = classify_expression(source, model, cells=test, progress=False)["label_predicted"].astype(str)
    # One epoch: logistic regression has 0.952 here.
    assert (predicted.to_numpy() == obs["cell_type"][test].astype(str).to_numpy()).mean() > 0.92
    genes, _ = gene_importance(source, model, cells=test, progress=False)
    markers = {"B cells": "CD79A", "CD14+ Monocytes": "CD14", "NK cells": "GNLY", "FCGR3A+ Monocytes": "FCGR3A"}
    for label, marker in markers.items():
        assert marker in genes.loc[genes["label"] == label, "gene_symbol"].head(10).tolist(), label
