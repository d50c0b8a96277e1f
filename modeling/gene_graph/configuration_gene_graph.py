"""`GeneGraphConfig`: genes, sizes and kind of smoothing of a gene-graph classifier."""

import dataclasses
import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Written into every saved configuration, so that each Auto class finds its model with trust_remote_code=True and
# without cellglot. transformers itself would name only the class that was saved, and a classifier could not load an
# autoencoder's encoder.
AUTO_MAP = {
    "AutoConfig": "configuration_gene_graph.GeneGraphConfig",
    "AutoModel": "modeling_gene_graph.GeneGraphModel",
    "AutoModelForPreTraining": "modeling_gene_graph.GeneGraphForReconstruction",
    "AutoModelForSequenceClassification": "modeling_gene_graph.GeneGraphForSequenceClassification",
}


@strict
class GeneGraphConfig(PreTrainedConfig):
    """Configuration of a gene-graph model. Without smoothing it is the paper's fully connected network.

    Raises  on construction: a value of the wrong type, sizes below 1, gene names that are not one a gene, or a
            misspelt key
    """

    model_type = "gene_graph"
    _auto_class = "AutoConfig"

    # Genes of an input, in the order of gene_ids. 20,499 and 1,817 (those in the network) in the paper
    n_genes: int = 20499
    # Ensembl ids (no version) or whatever else names the genes, and their symbols; what `cellglot.gene_graph` aligns
    # cells by. None: the caller aligns them
    gene_ids: list[str] | None = None
    gene_symbols: list[str] | None = None
    # An input is log(1 + counts per target_sum). None: the caller's own units
    target_sum: float | int | None = 10_000
    # Widths of the two hidden layers (the paper does not give them); the last is that of a cell's embedding
    hidden_sizes: list[int] = dataclasses.field(default_factory=lambda: [512, 128])
    # Graph that features are smoothed along: none, one a cell by attention, the network's scores, or both
    smoothing: Literal["none", "individual", "global", "both"] = "none"
    # d: features of a gene, lifted from its expression
    feature_size: int = 8
    # d_k: width of theta and phi
    attention_size: int = 8
    # 1 makes each gene its own neighbour, with the largest score there is
    diagonal: int = 0
    # Scores of the global graph: over the largest, as in the paper, where a gene of 500 neighbours adds up all of them;
    # or also over the square roots of both genes' sums of scores (Kipf & Welling 2017), which suits stacked layers
    score_scaling: Literal["maximum", "degree"] = "maximum"
    num_smoothing_layers: int = 1
    # Whether smoothed features are added to the expression or replace it
    residual: bool = True
    # Undirected edges of the network, each once. Set by `set_graph`; a model loads as many as it was saved with
    n_edges: int = 0
    # What a classifier's labels are of, e.g. the column "cell_type"
    label_name: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        names = [field.name for field in dataclasses.fields(self)]
        for key in kwargs:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"GeneGraphConfig has no {key!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_sizes(self) -> None:
        """Every size is 1 or more, diagonal is 0 or 1, and there is a hidden layer."""
        sizes = {
            name: getattr(self, name)
            for name in ("n_genes", "feature_size", "attention_size", "num_smoothing_layers", "target_sum")
        }
        sizes |= {f"hidden_sizes[{i}]": size for i, size in enumerate(self.hidden_sizes)}
        for name, size in sizes.items():
            if size is not None and not size > 0:
                raise ValueError(f"Expected {name} above 0, found {size}.")
        if not self.hidden_sizes:
            raise ValueError("Expected one hidden layer at least, e.g. hidden_sizes=[512, 128].")
        if self.diagonal not in (0, 1) or self.n_edges < 0:
            raise ValueError(
                f"Expected diagonal 0 or 1 and no negative n_edges, found {self.diagonal} and {self.n_edges}."
            )

    def validate_genes(self) -> None:
        """Names are one a gene, and ids are of different genes."""
        for name in ("gene_ids", "gene_symbols"):
            found = getattr(self, name)
            if found is not None and len(found) != self.n_genes:
                raise ValueError(f"Expected {name} of {self.n_genes:,} genes (n_genes), found {len(found):,}.")
        if self.gene_ids is not None and len(set(self.gene_ids)) != self.n_genes:
            repeated = self.n_genes - len(set(self.gene_ids))
            raise ValueError(f"Expected gene_ids of different genes; {repeated:,} of them name one a second time.")


__all__ = ["AUTO_MAP", "GeneGraphConfig"]
