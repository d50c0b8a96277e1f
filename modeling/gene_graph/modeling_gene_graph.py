"""Gene-graph classifier: gene features smoothed along a gene network, then fully connected layers.

Source: "Single cell RNA Sequence Classification with Neural Networks": fully connected networks, autoencoder
initialization, and smoothing along a graph of genes. With the features z_i of gene i (its expression lifted to d):

    G_ij = softmax over j of theta(z_i)^T phi(z_j) / sqrt(d_k)     individual: a graph for each cell               (1)
    G_ij = score_ij / the largest score; diagonal 0 or 1           global: the network's own                       (2)
    Z    = ReLU(G Z W)                                             one layer; both graphs: the sum of the two      (3)
    x    + v^T Z                                                   residual with the original features             (4)
    fully connected layers with ReLU, then logits                                                                  (5)

Deviations, and what the source leaves open:
- In (1) j runs over the neighbours in the network, not over all genes, whose 20,499 x 20,499 weights are 1.7 GB a cell.
  A gene without neighbours keeps its expression only.
- v in (4) maps the d features back to one, so that the fully connected layers are the same with and without smoothing,
  and an autoencoder without smoothing can initialize a classifier with it. Stacked layers follow each other in (3).
- The lift is linear with a bias, shared by all genes: without the bias (3) would be linear in the expression, which is
  never negative. theta, phi and W act on lifted features, so for the first layer they fold into scalars, and the
  graph multiplies (n, g) instead of (n, g, d): exactly the same values.
- score_scaling="degree" divides (2) by the square roots of both genes' sums as well, as graph convolutions do: the
  source's scaling lets the sums over a hub's hundreds of neighbours grow from layer to layer.
- phi has no bias: it would add the same number to all scores of a gene, which the softmax takes out.

Axes: n cells, g genes, d features.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_gene_graph import GeneGraphConfig
from .smoothing_gene_graph import (
    Edges,
    Pattern,
    at_least_float32,
    attention_of_edges,
    check_pairs,
    edge_attention,
    weighted_sum,
)

KINDS = {"none": (), "individual": ("individual",), "global": ("global",), "both": ("individual", "global")}


@dataclass
class Smoothing:
    """What one graph did in one layer, for interpretation.

    kind      "individual" or "global"
    layer     from 0
    features  (n, g, 1 or d) what the genes send to their neighbours: in the first layer their expression
    query     of the same shape: the softmax is over neighbours of q_i . z_j; None for the global graph
    smoothed  of the same shape: G times features
    """

    kind: str
    layer: int
    features: torch.Tensor
    query: torch.Tensor | None
    smoothed: torch.Tensor


@dataclass
class GeneGraphModelOutput(ModelOutput):
    """last_hidden_state: (n, width of the last hidden layer), a cell's embedding; smoothed: (n, g), what the fully
    connected layers see; smoothings: a `Smoothing` for each graph of each layer, where asked for."""

    last_hidden_state: torch.Tensor | None = None
    smoothed: torch.Tensor | None = None
    smoothings: tuple[Smoothing, ...] | None = None


@dataclass
class GeneGraphReconstructionOutput(ModelOutput):
    """loss: mean squared error; reconstructions: (n, g); last_hidden_state: (n, width), a cell's embedding."""

    loss: torch.Tensor | None = None
    reconstructions: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


# A copy of modeling/geneformer's: each folder is saved with its checkpoints and stands alone.
def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Cross-entropy, each item weighed by its class, over the number of labelled items.

    logits         (..., classes)
    labels         (...) class of each item, -100 where none is
    class_weights  (classes,), of mean 1 over the items of the whole training set. The sum of weights in a batch is not
                   divided by, so that a batch weighs the same however it is cut up
    """
    weights = None if class_weights is None else class_weights.to(logits.device, torch.float32)
    loss = nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), weight=weights, reduction="sum", ignore_index=-100
    )
    return loss / ((labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class GeneGraphNetwork(nn.Module):
    """The gene network, saved with the weights: pairs (edges, 2) int32, scores (edges,) over the largest."""

    pairs: torch.Tensor
    scores: torch.Tensor

    def __init__(self, config: GeneGraphConfig):
        super().__init__()
        self.n_genes, self.diagonal = config.n_genes, bool(config.diagonal)
        self.register_buffer("pairs", torch.zeros(config.n_edges, 2, dtype=torch.int32))
        self.register_buffer("scores", torch.zeros(config.n_edges))
        self._edges: Edges | None = None
        # The tensor that the edges were last compared with, and its version
        self._seen: tuple[torch.Tensor | None, int | None] = None, None

    def edges(self) -> Edges:
        """The edges by gene, made once for the pairs that are here now.

        Raises  ValueError where no graph was set
        """
        version = None if self.pairs.is_inference() else self.pairs._version
        if self._edges is None or self._seen[0] is not self.pairs or self._seen[1] != version:
            # Data parallel training writes buffers anew in every step, the same values each time.
            if self._edges is None or not self._edges.are_of(self.pairs):
                # Made while evaluating, they have to serve training as well.
                with torch.inference_mode(False):
                    self._edges = Edges(self.pairs, self.n_genes, self.diagonal)
            self._seen = self.pairs, version
        return self._edges


class GeneGraphSmoothing(GradientCheckpointingLayer):
    """One layer of equation 3: Z = ReLU(G Z W), each kind of graph with its own W."""

    def __init__(self, config: GeneGraphConfig):
        super().__init__()
        self.kinds = KINDS[config.smoothing]
        if "individual" in self.kinds:
            self.theta = nn.Linear(config.feature_size, config.attention_size)
            self.phi = nn.Linear(config.feature_size, config.attention_size, bias=False)
        self.dense = nn.ModuleDict(
            {kind: nn.Linear(config.feature_size, config.feature_size, bias=False) for kind in self.kinds}
        )

    def forward(
        self, features: torch.Tensor, lift: nn.Linear | None, edges: Edges, weights: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, list[Smoothing]]:
        """(n, g, d) features of the next layer, and what each graph did.

        features  (n, g, d), or (n, g, 1) of which the features are the lift
        weights   (e,) of the global graph
        """
        out, smoothings = None, []
        for kind in self.kinds:
            if kind == "individual":
                query = self.query(features, lift)
                smoothed = edge_attention(query, features, edges)
                # Sums of the rows of G: what becomes of the lift's bias
                sums = edges.has_neighbors.to(smoothed.dtype)
            else:
                query, smoothed = None, weighted_sum(features, weights, edges)
                sums = edges.one_cell.row_sums(weights)
            matrix, bias = _of_lifted(self.dense[kind].weight, lift)  # type: ignore[arg-type]
            z = _times(smoothed.to(matrix.dtype), matrix)
            if bias is not None:
                z = z + sums.view(-1, 1).to(z.dtype) * bias
            z = z.relu()
            out = z if out is None else out + z
            smoothings.append(Smoothing(kind, layer, features, query, smoothed))
        assert out is not None
        return out, smoothings

    def query(self, features: torch.Tensor, lift: nn.Linear | None) -> torch.Tensor:
        """q with q_i . z_j = theta_i . phi_j / sqrt(d_k) up to terms without j (equation 1), of the features' shape."""
        theta, bias = _of_lifted(self.theta.weight, lift)
        phi, _ = _of_lifted(self.phi.weight, lift)
        bias = self.theta.bias if bias is None else self.theta.bias + bias
        scale = len(phi) ** -0.5
        return _times(features.to(phi.dtype), phi.t() @ theta * scale) + phi.t() @ bias * scale


def _times(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x (..., in) times the transpose of a matrix (out, in). A product of inner size 1 is slow as a matrix product."""
    return x * matrix[:, 0] if matrix.shape[1] == 1 else x @ matrix.t()


def _of_lifted(weight: torch.Tensor, lift: nn.Linear | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(matrix, bias) of a linear map after the lift."""
    return (weight, None) if lift is None else (weight @ lift.weight, weight @ lift.bias)


class GeneGraphPreTrainedModel(PreTrainedModel):
    """Initialization, the graph and loading shared by all gene-graph models."""

    config: GeneGraphConfig  # type: ignore[assignment]
    config_class = GeneGraphConfig
    base_model_prefix = "gene_graph"
    main_input_name = "expression"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GeneGraphSmoothing"]
    # What other heads add
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\."]

    def set_graph(self, pairs: Any, scores: Any = None) -> None:
        """Gives the model its network, which is saved with it.

        pairs   (edges, 2) integers, array or tensor: genes by position, each undirected edge once
        scores  (edges,) not negative, in any unit: they are divided by their largest. None: 1 for all
        Raises  ValueError for a model without smoothing, pairs out of range, of a gene with itself or given twice, and
                scores that are NaN, infinite, negative or all 0
        """
        encoder = self.base_model
        assert isinstance(encoder, GeneGraphModel)
        if encoder.network is None:
            raise ValueError(
                "smoothing='none' uses no graph. Make the model with smoothing='individual', 'global' or 'both'."
            )
        network, device = encoder.network, encoder.network.pairs.device
        pairs = check_pairs(torch.as_tensor(pairs, device=device), self.config.n_genes).int()
        scores = torch.ones(len(pairs)) if scores is None else torch.as_tensor(scores).float()
        if scores.shape != (len(pairs),):
            raise ValueError(f"Expected a score for each of {len(pairs):,} edges, found {tuple(scores.shape)}.")
        bad = ~(scores.isfinite() & (scores >= 0))
        if bad.any() or scores.max() == 0:
            first = f"{int(bad.sum()):,} of them are not, e.g. {scores[bad][0]:g}" if bad.any() else "all are 0"
            raise ValueError(
                f"Expected scores that are finite and not negative, one of them above 0; {first}. Leave those edges "
                "out, or pass scores=None, which weighs all alike."
            )
        network.pairs = pairs.clone()
        network.scores = (scores / scores.max()).to(device, network.scores.dtype)
        self.config.n_edges = encoder.config.n_edges = len(pairs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # The paper's: U[-sqrt(1 / d_in), sqrt(1 / d_in)]; it does not say what of biases
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, GeneGraphNetwork):
            # A checkpoint without a graph: no valid one, so that `Edges` says so.
            init.zeros_(module.pairs)
            init.zeros_(module.scores)


class GeneGraphModel(GeneGraphPreTrainedModel):
    """Embeddings of cells: smoothing (equations 1 to 4), then the hidden layers."""

    _auto_class = "AutoModel"

    def __init__(self, config: GeneGraphConfig):
        super().__init__(config)
        self.network = self.lift = self.readout = None
        if config.smoothing != "none":
            self.network = GeneGraphNetwork(config)
            self.lift = nn.Linear(1, config.feature_size)
            self.readout = nn.Linear(config.feature_size, 1, bias=False)
        n_layers = config.num_smoothing_layers if config.smoothing != "none" else 0
        self.smoothing = nn.ModuleList([GeneGraphSmoothing(config) for _ in range(n_layers)])
        sizes = [config.n_genes, *config.hidden_sizes]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])
        self.post_init()

    @can_return_tuple
    def forward(self, expression: torch.Tensor, output_smoothings: bool = False, **kwargs: Any) -> GeneGraphModelOutput:
        """Embeddings of cells.

        expression         (n, g) log-normalized expression, genes as in config.gene_ids (`cellglot.gene_graph`)
        output_smoothings  also gives what every graph did, for interpretation
        Raises             ValueError for another number of genes, or a model that smooths without a graph
        """
        if expression.dim() != 2 or expression.shape[1] != self.config.n_genes:
            raise ValueError(
                f"Expected expression (cells, {self.config.n_genes:,} genes), found {tuple(expression.shape)}. "
                "cellglot.gene_graph.read_expression aligns the genes of any cells with those of a model."
            )
        expression = expression.to(self.dtype)
        smoothed, smoothings = self.smooth(expression)
        x = smoothed
        for layer in self.layers:
            x = layer(x).relu()
        return GeneGraphModelOutput(
            last_hidden_state=x, smoothed=smoothed, smoothings=smoothings if output_smoothings else None
        )

    def global_weights(self) -> torch.Tensor:
        """(e,) entries of the global G on the edges of a cell (equation 2)."""
        assert self.network is not None
        edges = self.network.edges()
        weights = edges.weights(at_least_float32(self.network.scores))
        if self.config.score_scaling == "degree":
            scale = edges.one_cell.row_sums(weights).clamp(min=torch.finfo(weights.dtype).tiny).rsqrt()
            weights = weights * scale[edges.one_cell.rows] * scale[edges.one_cell.columns]
        return weights

    def smooth(self, expression: torch.Tensor) -> tuple[torch.Tensor, tuple[Smoothing, ...]]:
        """(n, g) what the fully connected layers see (equation 4), and what every graph did."""
        if self.network is None:
            return expression, ()
        edges = self.network.edges()
        weights = self.global_weights()
        features, smoothings = expression.unsqueeze(-1), []
        for i, layer in enumerate(self.smoothing):
            features, of_layer = layer(features, self.lift if i == 0 else None, edges, weights, i)
            smoothings += of_layer
        assert self.readout is not None
        smoothed = features @ self.readout.weight[0]
        return (expression + smoothed if self.config.residual else smoothed), tuple(smoothings)

    def edge_weights(self, smoothing: Smoothing, cells: slice, pattern: Pattern) -> torch.Tensor:
        """(e,) entries of G on the edges of some cells, as `Edges.blocks` gives them with their pattern."""
        if smoothing.query is None:
            return self.global_weights().repeat(cells.stop - cells.start)
        query, features = (at_least_float32(x[cells].flatten(0, 1)) for x in (smoothing.query, smoothing.features))
        weights, _ = attention_of_edges(query, features, pattern)
        return weights / pattern.of_rows(pattern.row_sums(weights))


class GeneGraphForReconstruction(GeneGraphPreTrainedModel):
    """Autoencoder: the classifier's smoothing and hidden layers, and a decoder that mirrors the hidden layers.

    A classifier starts from its encoder by `GeneGraphForSequenceClassification.from_pretrained(autoencoder_folder,
    num_labels=...)`. With another `smoothing`, weights that the autoencoder lacks are new, and a graph is to be set.
    """

    _auto_class = "AutoModelForPreTraining"
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: GeneGraphConfig):
        super().__init__(config)
        self.gene_graph = GeneGraphModel(config)
        sizes = [*reversed(config.hidden_sizes), config.n_genes]
        self.decoder = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])
        self.post_init()

    @can_return_tuple
    def forward(self, expression: torch.Tensor, **kwargs: Any) -> GeneGraphReconstructionOutput:
        """Reconstructions of the expression, and their mean squared error over all cells and genes.

        expression  (n, g) as of `GeneGraphModel`
        """
        hidden = self.gene_graph(expression).last_hidden_state
        x = hidden
        for i, layer in enumerate(self.decoder):
            x = layer(x if i == 0 else x.relu())
        loss = nn.functional.mse_loss(x.float(), expression.float())
        return GeneGraphReconstructionOutput(loss=loss, reconstructions=x, last_hidden_state=hidden)


class GeneGraphForSequenceClassification(GeneGraphPreTrainedModel):
    """Predicts the state of a cell.

    Raises  ValueError for a configuration with one label, which tells no cells apart
    """

    _auto_class = "AutoModelForSequenceClassification"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: GeneGraphConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        if self.num_labels < 2:
            raise ValueError(
                f"A classifier needs two labels at least, found {self.num_labels} ({config.id2label}): cells of one "
                "kind teach it nothing."
            )
        self.gene_graph = GeneGraphModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        expression: torch.Tensor,
        labels: torch.Tensor | None = None,
        class_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Loss and logits.

        expression          (n, g) as of `GeneGraphModel`
        labels              (n,) class of each cell, -100 where unknown
        class_weights       (classes,) weight of each class in the loss, of mean 1 over the training cells
        num_items_in_batch  divides the summed loss in place of the number of labelled cells (gradient accumulation)
        Returns             logits (n, classes); hidden_states: (n, width) of the last hidden layer
        """
        hidden = self.gene_graph(expression).last_hidden_state
        logits = self.classifier(hidden)
        loss = None if labels is None else classification_loss(logits, labels, class_weights, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=(hidden,))


__all__ = [
    "GeneGraphForReconstruction",
    "GeneGraphForSequenceClassification",
    "GeneGraphModel",
    "GeneGraphPreTrainedModel",
    "Smoothing",
]
