"""Gene-graph models: the sparse smoothing equals the dense definition, the graph is saved, the encoder is shared."""

import inspect
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from cellglot.modeling.gene_graph import (
    GeneGraphConfig,
    GeneGraphForReconstruction,
    GeneGraphForSequenceClassification,
    GeneGraphModel,
    modeling_gene_graph,
    smoothing_gene_graph,
)
from cellglot.modeling.gene_graph.smoothing_gene_graph import Edges, edge_attention
from cellglot.modeling.geneformer import modeling_geneformer

from .dense_gene_graph import dense_mask, dense_smoothed

N_CELLS, N_GENES, N_EDGES, LONELY = 11, 23, 47, 5


def some_pairs(n_edges: int = N_EDGES, seed: int = 0) -> torch.Tensor:
    """(n_edges, 2) of N_GENES genes, of which LONELY has no neighbour and gene 0 has many."""
    pairs = torch.combinations(torch.arange(N_GENES))
    pairs = pairs[(pairs != LONELY).all(dim=1)]
    hub = (pairs == 0).any(dim=1)
    others = pairs[~hub]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    pairs = torch.cat([pairs[hub], others[order]])[:n_edges]
    # In any order and direction: nothing may depend on it.
    return pairs[torch.randperm(n_edges, generator=torch.Generator().manual_seed(seed + 1))].flip(1)


def some_expression(n: int = N_CELLS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.rand(n, N_GENES, generator=torch.Generator().manual_seed(3), dtype=dtype) * 5
    return torch.where(x < 2, 0, x)


def tiny_config(**options: Any) -> GeneGraphConfig:
    sizes: dict[str, Any] = {"n_genes": N_GENES, "hidden_sizes": [7, 5], "feature_size": 6, "attention_size": 3}
    return GeneGraphConfig(**{**sizes, "num_labels": 4, **options})


def make(model_class: Any, *, scores: torch.Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(tiny_config(**options))
    if model.config.smoothing != "none":
        model.set_graph(some_pairs(), torch.rand(N_EDGES) * 700 if scores is None else scores)
    return model


@pytest.mark.parametrize("smoothing", ["individual", "global", "both"])
@pytest.mark.parametrize("diagonal", [0, 1])
@pytest.mark.parametrize(("n_layers", "residual"), [(1, True), (2, False), (3, True)])
def test_smoothing_and_its_gradients_equal_the_dense_definition(smoothing, diagonal, n_layers, residual):
    model = make(
        GeneGraphModel, smoothing=smoothing, diagonal=diagonal, num_smoothing_layers=n_layers, residual=residual
    )
    x = some_expression().requires_grad_()
    weights = [p for name, p in model.named_parameters() if not name.startswith("layers")]
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found, expected = model.smooth(x)[0], dense_smoothed(model, x)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - x * residual).abs().max() > 1e-3  # smoothing does something
    gradients = [torch.autograd.grad((y * towards).sum(), [x, *weights]) for y in (found, expected)]
    for ours, dense in zip(*gradients, strict=True):
        # 1e-5 of the largest: sums over cells and genes in another order
        assert_close(ours, dense, atol=1e-5 * max(float(dense.abs().max()), 1), rtol=1e-4)


@pytest.mark.parametrize("diagonal", [0, 1])
def test_scaling_by_degree_equals_the_dense_definition(diagonal):
    model = make(GeneGraphModel, smoothing="global", diagonal=diagonal, score_scaling="degree", num_smoothing_layers=2)
    x = some_expression().requires_grad_()
    found, expected = model.smooth(x)[0], dense_smoothed(model, x)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, make(GeneGraphModel, smoothing="global", diagonal=diagonal).smooth(x)[0])
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)), atol=1e-4, rtol=1e-4)


def test_attention_of_any_width_passes_a_numerical_gradient_check(monkeypatch):
    monkeypatch.setitem(smoothing_gene_graph.EDGES_AT_ONCE, "cpu", 200)
    edges = Edges(some_pairs(), N_GENES, diagonal=False)
    query, features = (torch.randn(3, N_GENES, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, z: edge_attention(q, z, edges), (query, features))


@pytest.mark.parametrize("edges_at_once", [1, 200, 10**6])
def test_cells_are_independent_of_each_other_and_of_how_they_are_blocked(monkeypatch, edges_at_once):
    monkeypatch.setitem(smoothing_gene_graph.EDGES_AT_ONCE, "cpu", edges_at_once)
    model = make(GeneGraphModel, smoothing="both", num_smoothing_layers=2).eval()
    x = some_expression()
    with torch.no_grad():
        together = model(x).last_hidden_state
        alone = torch.cat([model(x[i : i + 1]).last_hidden_state for i in range(N_CELLS)])
    assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert model(x[:0]).last_hidden_state.shape == (0, 5)


def test_large_attention_scores_do_not_overflow():
    edges = Edges(some_pairs(), N_GENES, diagonal=False)
    z = some_expression().unsqueeze(-1)
    query = torch.full_like(z, 1e4).requires_grad_()
    smoothed = edge_attention(query, z, edges)
    largest = torch.where(dense_mask(some_pairs(), N_GENES, 0), z.transpose(1, 2), -torch.inf).amax(dim=2)
    largest[:, LONELY] = 0
    assert_close(smoothed.squeeze(-1), largest)
    smoothed.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_gene_without_neighbours_keeps_its_expression_only():
    x = some_expression()
    for smoothing in ("individual", "global", "both"):
        for diagonal in (0, 1):
            smoothed, _ = make(GeneGraphModel, smoothing=smoothing, diagonal=diagonal).smooth(x)
            same = torch.equal(smoothed[:, LONELY], x[:, LONELY])
            assert same is (diagonal == 0), (smoothing, diagonal)


def test_scores_count_relative_to_the_largest_and_only_in_the_global_graph():
    scores = torch.rand(N_EDGES, generator=torch.Generator().manual_seed(2)) + 0.1
    x = some_expression()
    with torch.no_grad():
        for smoothing in ("individual", "global"):
            one, same, other = (
                make(GeneGraphModel, smoothing=smoothing, scores=s).smooth(x)[0]
                for s in (scores, scores * 1000, scores.flip(0))
            )
            assert_close(one, same)
            assert torch.allclose(one, other) is (smoothing == "individual")


def test_order_and_direction_of_the_pairs_do_not_matter():
    one, other = make(GeneGraphModel, smoothing="both"), make(GeneGraphModel, smoothing="both")
    scores, order = torch.rand(N_EDGES), torch.randperm(N_EDGES)
    one.set_graph(some_pairs(), scores)
    other.set_graph(some_pairs()[order].flip(1).numpy(), scores[order].numpy())
    with torch.no_grad():
        assert_close(one.smooth(some_expression())[0], other.smooth(some_expression())[0])


def test_a_new_graph_replaces_the_old_one_even_in_place():
    model, x = make(GeneGraphModel, smoothing="individual"), some_expression()
    with torch.no_grad():
        before = model.smooth(x)[0]
        other = some_pairs(seed=9)
        model.load_state_dict({**model.state_dict(), "network.pairs": other.int()})
        assert_close(model.smooth(x)[0], dense_smoothed(model, x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model.smooth(x)[0], before)
        edges = model.network.edges()
        model.network.pairs.copy_(other)
        assert model.network.edges() is edges  # the same values need no new ones
        model.set_graph(other[:7])
        assert model.config.n_edges == 7
        assert_close(model.smooth(x)[0], dense_smoothed(model, x), atol=1e-5, rtol=1e-5)


def test_training_works_after_a_first_use_in_inference_mode():
    model = make(GeneGraphForSequenceClassification, smoothing="both")
    with torch.inference_mode():
        model(some_expression())
    model(some_expression(), labels=torch.arange(N_CELLS) % 4).loss.backward()


@pytest.mark.parametrize("model_class", [GeneGraphForSequenceClassification, GeneGraphForReconstruction])
@pytest.mark.parametrize("smoothing", ["none", "individual", "global", "both"])
def test_every_parameter_gets_a_gradient_and_runs_repeat(model_class, smoothing):
    losses = []
    for _ in range(2):
        model = make(model_class, smoothing=smoothing, num_smoothing_layers=2)
        labels = {"labels": torch.arange(N_CELLS) % 4} if model_class is GeneGraphForSequenceClassification else {}
        loss = model(some_expression(), **labels).loss
        loss.backward()
        losses.append(loss.item())
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without
    assert losses[0] == losses[1]


@pytest.mark.parametrize("smoothing", ["individual", "both"])
def test_recomputing_activations_gives_the_same_gradients(smoothing):
    model = make(GeneGraphForSequenceClassification, smoothing=smoothing, num_smoothing_layers=2).train()
    gradients = []
    for recomputed in (False, True):
        if recomputed:
            model.activation_checkpointing_enable()
        assert model.gene_graph.smoothing[1].gradient_checkpointing is recomputed
        loss = model(some_expression(), labels=torch.arange(N_CELLS) % 4).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_initial_weights_are_uniform_within_the_root_of_the_inverse_inputs():
    model = make(GeneGraphForSequenceClassification, smoothing="both", hidden_sizes=[400, 300])
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features**-0.5
            assert module.weight.abs().max() <= bound
    weight = model.gene_graph.layers[1].weight
    bound = 400**-0.5
    assert weight.abs().max() > 0.99 * bound
    # Standard deviation of U[-b, b] is b / sqrt(3); 120,000 draws: 1% is many standard errors.
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_without_smoothing_it_is_two_hidden_layers():
    model = make(GeneGraphForSequenceClassification, smoothing="none")
    x, labels = some_expression(), torch.tensor([0, 1, 2, 3, -100, 0, 1, 2, 3, 0, 1])
    first, second = model.gene_graph.layers
    logits = model.classifier(second(first(x).relu()).relu())
    output = model(x, labels=labels)
    assert_close(output.logits, logits)
    assert_close(output.loss, cross_entropy(logits, labels))


def test_class_weights_and_accumulated_batches_weigh_as_one():
    model, x = make(GeneGraphForSequenceClassification, smoothing="individual"), some_expression()
    labels, weights = torch.arange(N_CELLS) % 4, torch.tensor([0.5, 1.0, 2.0, 3.0])
    whole = model(x, labels=labels, class_weights=weights).loss
    parts = sum(
        model(x[part], labels=labels[part], class_weights=weights, num_items_in_batch=N_CELLS).loss
        for part in (slice(0, 4), slice(4, N_CELLS))
    )
    assert_close(whole, parts)
    each = cross_entropy(model(x).logits, labels, reduction="none")
    assert_close(whole, (each * weights[labels]).mean())


def test_reconstruction_mirrors_the_encoder_and_its_loss_is_the_mean_squared_error():
    model, x = make(GeneGraphForReconstruction, smoothing="both"), some_expression()
    output = model(x)
    encoder = [tuple(layer.weight.shape) for layer in model.gene_graph.layers]
    assert [tuple(layer.weight.shape)[::-1] for layer in model.decoder] == encoder[::-1]
    assert_close(output.loss, ((output.reconstructions - x) ** 2).mean())


def test_half_precision_weights_stay_close_and_float64_is_float64():
    model, x = make(GeneGraphForSequenceClassification, smoothing="both", num_smoothing_layers=2), some_expression()
    with torch.no_grad():
        exact = model.double()(x.double()).logits
        assert exact.dtype == torch.float64
        half = model.bfloat16()(x)
        # bfloat16 keeps three digits.
        assert_close(half.logits.double(), exact, atol=0.1, rtol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.float()(x).logits
        assert_close(mixed.double(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("smoothing", ["none", "individual", "both"])
def test_autoencoder_starts_the_classifier_and_the_graph_comes_along(tmp_path, smoothing):
    autoencoder = make(GeneGraphForReconstruction, smoothing=smoothing)
    autoencoder.save_pretrained(tmp_path)
    classifier = GeneGraphForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    expected = autoencoder.gene_graph.state_dict()
    assert classifier.gene_graph.state_dict().keys() == expected.keys()
    for name, value in classifier.gene_graph.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert classifier(some_expression()).logits.shape == (N_CELLS, 3)


def test_fully_connected_autoencoder_starts_a_classifier_with_smoothing(tmp_path):
    autoencoder = make(GeneGraphForReconstruction, smoothing="none")
    autoencoder.save_pretrained(tmp_path)
    classifier: Any = GeneGraphForSequenceClassification.from_pretrained(tmp_path, num_labels=3, smoothing="both")
    with pytest.raises(ValueError, match="no edges"):
        classifier(some_expression())
    classifier.set_graph(some_pairs())
    for ours, theirs in zip(classifier.gene_graph.layers, autoencoder.gene_graph.layers, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    assert classifier(some_expression()).logits.isfinite().all()
    assert classifier.gene_graph.lift.weight.abs().sum() > 0


def test_a_checkpoint_without_its_graph_says_so(tmp_path):
    from safetensors.torch import load_file, save_file

    make(GeneGraphForSequenceClassification, smoothing="global").save_pretrained(tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "network" not in k}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model: Any = GeneGraphForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set_graph"):
        model(some_expression())


@pytest.mark.parametrize(
    ("pairs", "scores", "message"),
    [
        ([[0, 1], [1, 0]], None, "1 repeated"),
        ([[0, 1], [2, 2]], None, "1 self-loops"),
        ([[0, 1], [1, 23]], None, "0 to 22"),
        ([[0.0, 1.0]], None, "integers"),
        ([[0, 1], [1, 2]], [1.0], "each of 2 edges"),
        ([[0, 1], [1, 2]], [1.0, float("nan")], "nan"),
        ([[0, 1], [1, 2]], [1.0, -1.0], "-1"),
        ([[0, 1], [1, 2]], [0.0, 0.0], "all are 0"),
    ],
)
def test_bad_graphs_are_refused_by_the_model(pairs, scores, message):
    model = GeneGraphModel(tiny_config(smoothing="both"))
    with pytest.raises(ValueError, match=message):
        model.set_graph(pairs, scores)
    assert model.config.n_edges == 0


def test_what_does_not_fit_a_model_is_refused():
    with pytest.raises(ValueError, match="uses no graph"):
        GeneGraphModel(tiny_config(smoothing="none")).set_graph([[0, 1]])
    with pytest.raises(ValueError, match="23 genes"):
        make(GeneGraphModel)(torch.zeros(3, N_GENES + 1))
    with pytest.raises(ValueError, match="two labels"):
        GeneGraphForSequenceClassification(tiny_config(num_labels=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": "gcn"}, "smoothing"),
        ({"feature_size": 0}, "feature_size"),
        ({"hidden_sizes": []}, "hidden layer"),
        ({"hidden_sizes": [7, 0]}, "hidden_sizes"),
        ({"diagonal": 2}, "diagonal"),
        ({"gene_ids": ["A", "B"]}, "23 genes"),
        ({"gene_ids": ["A"] * N_GENES}, "name one a second time"),
        ({"gene_symbols": ["A"]}, "gene_symbols"),
        ({"hidden_size": [7]}, "did you mean 'hidden_sizes'"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**options)


def test_what_is_copied_from_geneformer_is_the_same():
    assert inspect.getsource(modeling_gene_graph.classification_loss) == inspect.getsource(
        modeling_geneformer.classification_loss
    )


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", ["individual", "global", "both"])
def test_a_gpu_gives_the_same_values_and_gradients(smoothing):
    x, labels = some_expression(), torch.arange(N_CELLS) % 4
    found = []
    for device in ("cpu", "cuda"):
        model = make(GeneGraphForSequenceClassification, smoothing=smoothing, num_smoothing_layers=2).to(device)
        output = model(x.to(device), labels=labels.to(device))
        output.loss.backward()
        found.append([output.logits.cpu(), *(p.grad.cpu() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-3)
