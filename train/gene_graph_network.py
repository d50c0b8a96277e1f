"""Options that describe a gene-graph network, and the configuration and the graph that come of them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from cellglot.gene_graph import GeneGraph, GeneNames, align_edges, read_edges
from cellglot.hub import reading
from cellglot.modeling.gene_graph import GeneGraphConfig

from .config import option
from .loop_config import LoopConfig

# Options of the same name in `GeneGraphConfig`
FIELDS = ("smoothing", "diagonal", "score_scaling", "num_smoothing_layers", "residual", "feature_size")
FIELDS += ("attention_size", "hidden_sizes")
# Of which these matter to some kinds of smoothing only
SMOOTHED = ("individual", "global", "both")
OF_KINDS = dict.fromkeys(("diagonal", "num_smoothing_layers", "residual", "feature_size"), SMOOTHED)
OF_KINDS |= {"score_scaling": ("global", "both"), "attention_size": ("individual", "both")}


@dataclass
class NetworkOptions(LoopConfig):
    """Sizes, smoothing and graph. Absent: those of the model that is started from, else `GeneGraphConfig`'s own."""

    smoothing: Literal["none", "individual", "global", "both"] | None = option(
        None, "graph that expression is smoothed along: none, each cell's own by attention, the network's scores, both"
    )
    diagonal: int | None = option(None, "1: each gene is its own neighbour")
    score_scaling: Literal["maximum", "degree"] | None = option(
        None, "global graph: scores over the largest (the paper), or over both genes' sums of scores as well"
    )
    num_smoothing_layers: int | None = option(None, "smoothing layers, one after the other")
    residual: bool | None = option(None, "adds what is smoothed to the expression in place of replacing it")
    feature_size: int | None = option(None, "features of a gene while it is smoothed")
    attention_size: int | None = option(None, "width of the attention's keys")
    hidden_sizes: list[int] = option([], "widths of the fully connected layers")
    edges: str | None = option(
        None, "gene network: STRING links, BioGRID tab3, Parquet, or a table of gene, gene, score"
    )
    edges_info: str | None = option(None, "STRING's protein.info of the same version")
    edge_columns: list[str] = option([], "the two columns of genes, for a table that has more")
    edge_score: str | None = option(None, "the column of scores, for such a table")
    min_score: float | None = option(None, "leaves out edges with lower scores, in the table's unit")
    aliases: str | None = option(None, "table of alias, ensembl_id: further names of genes")
    connected_genes: bool = option(False, "the model reads the genes that have a neighbour in the network only")

    def check_network(self, start: str | None = None) -> None:
        """Raises ValueError for options that make no network, or that would do nothing."""
        together = [
            (self.connected_genes and self.edges is None, "connected_genes needs edges, the network"),
            (self.connected_genes and start is not None, "the genes are those of --model: leave out connected_genes"),
            (bool(self.edge_columns) and len(self.edge_columns) != 2, "edge_columns takes the two columns of genes"),
        ]
        names = ("edges_info", "edge_columns", "edge_score", "min_score")
        together += [(bool(getattr(self, name)) and self.edges is None, f"{name} needs edges") for name in names]
        for wrong, message in together:
            if wrong:
                raise ValueError(f"{message}.")
        try:
            GeneGraphConfig(**self.given())
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def given(self) -> dict[str, Any]:
        """Fields of the configuration that were asked for."""
        return {name: value for name in FIELDS if (value := getattr(self, name)) not in (None, [])}


def make_network(
    options: NetworkOptions, genes: GeneNames | None, start: GeneGraphConfig | None = None
) -> tuple[GeneGraphConfig, GeneGraph | None]:
    """The configuration of a model and the graph that it has to be given; None where it uses none, or has its own.

    genes   of the cells, for a model that starts from nothing
    start   of the model that is started from, whose genes stay
    Raises  ValueError for a graph that is missing, or that nothing would use; FileNotFoundError
    """
    given = options.given()
    if start is not None:
        wanted = given.get("hidden_sizes", start.hidden_sizes)
        if wanted != start.hidden_sizes:
            raise ValueError(
                f"Hidden layers of widths {wanted} cannot start from those of --model, {start.hidden_sizes}: leave out "
                "hidden_sizes."
            )
        genes = GeneNames.of_config(start)
        given = {**{name: getattr(start, name) for name in FIELDS}, **given}
    assert genes is not None
    smoothing = given.get("smoothing", "none")
    _check_kind(options, smoothing)
    graph = None
    if options.edges is not None:
        table = read_edges(
            options.edges,
            info=options.edges_info,
            columns=options.edge_columns or None,
            score=options.edge_score,
        )
        graph = align_edges(table, genes, aliases=options.aliases, min_score=options.min_score)
        if options.connected_genes:
            graph = graph.connected()
            genes = graph.genes
    elif smoothing != "none" and (start is None or start.smoothing == "none" or not start.n_edges):
        raise ValueError(f"smoothing={smoothing!r} needs a gene network: pass --edges FILE.")
    scale = {} if start is None else {"target_sum": start.target_sum}
    fields: dict[str, Any] = {**given, **genes.config_options(), **scale}
    return GeneGraphConfig(**fields), graph if smoothing != "none" else None


def _check_kind(options: NetworkOptions, smoothing: str) -> None:
    """Raises ValueError for options that would do nothing, or could not work, with this kind of smoothing."""
    if smoothing == "none" and options.edges is not None and not options.connected_genes:
        raise ValueError(
            "smoothing='none' uses no network: pass --smoothing individual, global or both, or leave out --edges."
        )
    for name, kinds in OF_KINDS.items():
        if name in options.given() and smoothing not in kinds:
            raise ValueError(
                f"{name} does nothing with smoothing={smoothing!r}: pass --smoothing {' or '.join(kinds)}, or leave it "
                "out."
            )
    if smoothing == "none" and options.gradient_checkpointing:
        raise ValueError("gradient_checkpointing is of smoothing layers, and smoothing='none' has none: leave it out.")
    if smoothing != "none" and options.compile:
        raise ValueError("compile knows no sparse products, of which smoothing is made: leave it out.")


def make_model(
    model_class: Any, options: NetworkOptions, config: GeneGraphConfig, graph: GeneGraph | None, start: str | None
) -> Any:
    """A model of new weights, or on those of the model in the folder or repository `start`, with its graph.

    config  of `make_network`, with labels where the class needs them
    """
    if start is None:
        model = model_class(config)
    else:
        labels = {"id2label": config.id2label, "label2id": config.label2id, "label_name": config.label_name}
        without_graph = {"n_edges": 0} if config.smoothing == "none" else {}
        # What is trained is float32, whatever the checkpoint is; a classifier of other labels does not fit and is new.
        model = model_class.from_pretrained(
            start, **options.given(), **labels, **without_graph, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    if graph is not None:
        model.set_graph(graph.pairs, graph.scores)
    return model


def read_start(model: str) -> GeneGraphConfig:
    """The configuration of the model in a folder or repository.

    Raises  ValueError for a model of another method, OSError for none
    """
    with reading(model):
        found, _ = PreTrainedConfig.get_config_dict(model)
    if found.get("model_type") != GeneGraphConfig.model_type:
        raise ValueError(
            f"--model {model} is of type {found.get('model_type')!r}, expected {GeneGraphConfig.model_type!r}: train "
            "one with train/pretrain.py --method gene_graph, or leave out --model."
        )
    return GeneGraphConfig.from_pretrained(model)
