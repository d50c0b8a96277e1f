"""Geneformer: a BERT encoder that reads a cell as its genes in order of rank value.

Post-layer-norm transformer, learned absolute positions (the rank), ReLU, and a masked-gene head tied to the gene
embeddings. Source: Theodoris et al., "Transfer learning enables predictions in network biology", Nature 2023, Methods,
"Geneformer architecture and pretraining".

Modules bear BERT's names, so the original's checkpoints load as they are and ours load into `BertForMaskedLM`.
Deviations from it: the masked-gene head computes logits only where labels ask for them; cells can be packed end to end
with `cu_seqlens` instead of padded; only a classifier of cells has BERT's pooler.

Axes: n cells, t tokens, d width, h heads, v vocabulary.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_geneformer import (
    PackedCells,
    blocked_attention,
    eager_attention_forward,
    packed_attention,
    suits_blocks,
)
from .configuration_geneformer import GeneformerConfig

# Logits that a GPU holds at once: 1 GiB of float32
LOGITS_AT_ONCE = 2**28


def cell_vectors(
    x: torch.Tensor, pooling: str, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """One vector a cell: that of its first token, or the mean over its tokens, padding left out.

    x        (n, t, d) hidden states; packed (1, tokens of all cells, d) with cu_seqlens
    pooling  "first" or "mean"
    Returns  (cells, d)
    """
    if cu_seqlens is not None:
        if pooling == "first":
            return x[0, cu_seqlens[:-1]]
        lengths = cu_seqlens.diff()
        cell = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
        return x.new_zeros(len(lengths), x.shape[-1]).index_add(0, cell, x[0]) / lengths.unsqueeze(-1)
    if pooling == "first":
        return x[:, 0]
    if attention_mask is None:
        return x.mean(dim=1)
    mask = attention_mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def every_token_shown(config: GeneformerConfig, kwargs: dict[str, Any]) -> bool:
    """Whether a caller wants hidden states of all tokens, so that the last layer cannot leave any out."""
    wanted = kwargs.get("output_hidden_states")
    return bool(config.output_hidden_states if wanted is None else wanted)


def masked_gene_loss(x: torch.Tensor, decoder: nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of decoder(x) with the labels, a few rows of logits at a time.

    x       (labelled tokens, d)
    labels  (labelled tokens,) genes
    """
    if type(decoder) is not nn.Linear:
        # Wrapped (an adapter, say) or quantized: only the module itself knows what it computes.
        return nn.functional.cross_entropy(decoder(x).float(), labels, reduction="sum")
    weight, bias = decoder.weight, decoder.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    elif x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    rows = 256 if x.device.type == "cpu" else max(LOGITS_AT_ONCE // len(weight), 1)
    if x.dtype == torch.float32:
        options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
        return nn.functional.linear_cross_entropy(x, weight, labels, linear_bias=bias, reduction="sum", options=options)

    # torch's operator would add the losses up in half precision, three digits of which are right.
    def loss_of_rows(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(x, weight, bias)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    if len(labels) <= rows:
        return loss_of_rows(x, labels)
    parts = zip(x.split(rows), labels.split(rows), strict=True)
    return torch.stack([checkpoint(loss_of_rows, *part, use_reentrant=False) for part in parts]).sum()  # type: ignore


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


class GeneformerEmbeddings(nn.Module):
    """Gene + rank (+ BERT's constant segment), layer norm, dropout."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, genes: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        # The order of the sums is BERT's: float addition is not associative.
        x = genes + self.token_type_embeddings.weight[0] + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))


class GeneformerSelfAttention(nn.Module):
    """Multi-head attention of every token to every token of its cell."""

    is_causal = False  # read by transformers' SDPA and flash interfaces

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        queries: torch.Tensor,
        x: torch.Tensor,
        attention_mask: Any,
        cells: PackedCells | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = (
            y.view(*y.shape[:2], -1, self.head_size).transpose(1, 2)
            for y in (self.query(queries), self.key(x), self.value(x))
        )
        implementation: Any = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        options = {
            "scaling": self.scaling,
            "dropout": self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        }
        weights = None
        if cells is not None:
            out = packed_attention(attend, self, q, k, v, cells, implementation=implementation, **options)
        elif suits_blocks(implementation, q, k, attention_mask, options["dropout"]):
            out = blocked_attention(q, k, v, self.scaling, options["dropout"])
        else:
            out, weights = attend(self, q, k, v, attention_mask, **options)
        return out.flatten(2), weights


class GeneformerResidual(nn.Module):
    """Projection, dropout, residual, layer norm (post-norm)."""

    def __init__(self, config: GeneformerConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class GeneformerAttention(nn.Module):
    """Self-attention and its residual."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.self = GeneformerSelfAttention(config)
        self.output = GeneformerResidual(config, config.hidden_size)

    def forward(
        self, x: torch.Tensor, *args: Any, output_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        queries = x if output_positions is None else x[:, output_positions]
        return self.output(self.self(queries, x, *args, **kwargs)[0], queries)


class GeneformerIntermediate(nn.Module):
    """Widening half of the feed-forward block."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.dense(x))


class GeneformerLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each with residual and post-norm."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.attention = GeneformerAttention(config)
        self.intermediate = GeneformerIntermediate(config)
        self.output = GeneformerResidual(config, config.intermediate_size)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = self.attention(x, *args, **kwargs)
        return self.output(self.intermediate(x), x)


class GeneformerEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.layer = nn.ModuleList([GeneformerLayer(config) for _ in range(config.num_hidden_layers)])


class GeneformerPredictionTransform(nn.Module):
    """Projection before the vocabulary, as in BERT."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.act(self.dense(x)))


class GeneformerPredictionHead(nn.Module):
    """Logits over the vocabulary; the matrix is that of the gene embeddings."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.transform = GeneformerPredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        # The released checkpoints name the decoder's bias a second time.
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(x))


class GeneformerMaskedLMHead(nn.Module):
    """Holder that gives the head BERT's name in checkpoints: cls.predictions."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.predictions = GeneformerPredictionHead(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.predictions(x)


class GeneformerPooler(nn.Module):
    """BERT's pooler: tanh of a projection of a cell's vector."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(x))


class GeneformerPreTrainedModel(PreTrainedModel):
    """Initialization, loading and export shared by all Geneformers."""

    config: GeneformerConfig  # type: ignore[assignment]
    config_class = GeneformerConfig
    base_model_prefix = "bert"  # BERT's name in checkpoints
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["GeneformerEmbeddings", "GeneformerLayer"]
    _can_record_outputs = {"hidden_states": GeneformerLayer, "attentions": GeneformerSelfAttention}
    # The head of a masked LM, which no other model has
    _keys_to_ignore_on_load_unexpected = [r"^cls\."]
    # transformers' class that reads what `export_to_bert` writes; None where there is none
    _bert_class: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the original's checkpoints load as they are.

        Raises  ValueError for a checkpoint without the weights of this encoder
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        encoder = ("embeddings.", "encoder.", "bert.embeddings.", "bert.encoder.")
        mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        missing = sorted(key for key in {*info["missing_keys"], *mismatched} if key.startswith(encoder))
        if missing:
            # transformers would go on with random weights in their place.
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing):,} weights of this Geneformer, e.g. "
                f"{missing[0]!r}: it is a checkpoint of another architecture, or its config.json is another's."
            )
        return (model, info) if with_info else model

    def export_to_bert(self, path: str | os.PathLike) -> None:
        """Writes a folder that transformers' BERT classes and the original Geneformer read.

        Raises  TypeError for a model that BERT has no counterpart of, FileExistsError for a folder with files in it
        """
        import transformers

        config: Any = self.config
        pools = self._bert_class == "BertForSequenceClassification"
        if self._bert_class is None or (pools and config.classifier_pooling != "first"):
            raise TypeError(
                f"BERT has no counterpart of {type(self).__name__}"
                f"{'' if self._bert_class is None else ' with classifier_pooling=' + repr(config.classifier_pooling)}."
            )
        path = Path(path)
        if path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path} is not empty: choose another folder.")
        left_out = {
            "auto_map",
            "classifier_pooling",
            "label_name",
            "tasks",
            "task_weights",
            "model_type",
            "transformers_version",
        }
        options = {key: value for key, value in config.to_dict().items() if key not in left_out}
        bert_config = transformers.BertConfig(**options)
        with torch.device("meta"):
            bert_class = getattr(transformers, self._bert_class)
            bert = bert_class(
                bert_config, **({"add_pooling_layer": False} if bert_class.__name__ == "BertModel" else {})
            )
        missing, unexpected = bert.load_state_dict(self.state_dict(), strict=False, assign=True)
        assert not unexpected, unexpected
        assert all(key.endswith(("position_ids", "token_type_ids")) for key in missing), missing
        bert.tie_weights()
        partial = path.with_name(f".partial-{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        bert.save_pretrained(partial)
        if path.exists():
            path.rmdir()
        os.replace(partial, path)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GeneformerPredictionHead):
            init.zeros_(module.bias)


class GeneformerModel(GeneformerPreTrainedModel):
    """Gene embeddings in the context of their cell."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"pooler\.", r"^classifiers?\."]  # what heads add
    _bert_class = "BertModel"

    def __init__(self, config: GeneformerConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = GeneformerEmbeddings(config)
        self.encoder = GeneformerEncoder(config)
        # Applied by the heads that have one; the name is BERT's.
        self.pooler = GeneformerPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        output_positions: torch.Tensor | None = None,
        num_layers: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states of every token.

        input_ids         (n, t) token ids; or (1, tokens of all cells) packed, with cu_seqlens
        attention_mask    (n, t) 1 for tokens, 0 for padding; not with cu_seqlens, which needs no padding
        position_ids      (n, t) or (1, t) ranks from 0; by default each cell's own
        inputs_embeds     (n, t, d) gene embeddings in place of input_ids
        cu_seqlens        (cells + 1,) offsets of the cells of a packed batch, from 0 to the number of tokens
        max_seqlen        tokens of the longest cell of a packed batch. With it and position_ids nothing is read back
                          from a GPU; cu_seqlens is then trusted
        output_positions  (wanted,) ascending positions in a packed batch: the last layer computes these tokens only,
                          and last_hidden_state is (1, wanted, d)
        num_layers        runs only the first layers; all by default
        Raises            ValueError for cells longer than the context, or arguments that exclude each other
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        genes = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if cu_seqlens is None:
            longest = genes.shape[1]
            if output_positions is not None or max_seqlen is not None:
                raise ValueError("output_positions and max_seqlen are for packed batches: pass cu_seqlens.")
        else:
            self._check_packed(genes, attention_mask, kwargs)
            if max_seqlen is None:
                max_seqlen = self._longest(cu_seqlens, genes.shape[1])
            longest = max_seqlen
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"A cell has {longest:,} tokens, but this model reads {self.config.max_position_embeddings:,} at "
                "the most. Encode the cells with max_length=..., which keeps the highest-ranked genes."
            )
        if position_ids is None:
            t = torch.arange(genes.shape[1], device=genes.device)
            starts = 0 if cu_seqlens is None else cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
            position_ids = (t - starts).unsqueeze(0)
        x = self.embeddings(genes, position_ids)
        layers = self.encoder.layer[:num_layers]
        if cu_seqlens is None:
            attention_mask = create_bidirectional_mask(self.config, x, attention_mask)
            for layer in layers:
                x = layer(x, attention_mask, None, **kwargs)
            return BaseModelOutput(last_hidden_state=x)
        keys = cu_seqlens.int()
        cells = PackedCells(keys, keys, longest)
        for layer in layers if output_positions is None else layers[:-1]:
            x = layer(x, None, cells, **kwargs)
        if output_positions is not None:
            if len(layers) == 0:
                return BaseModelOutput(last_hidden_state=x[:, output_positions])
            queries = torch.searchsorted(output_positions, cu_seqlens.to(output_positions.dtype)).int()
            cells = PackedCells(keys, queries, longest)
            x = layers[-1](x, None, cells, output_positions=output_positions, **kwargs)
        return BaseModelOutput(last_hidden_state=x)

    def _check_packed(self, genes: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        if attention_mask is not None or genes.shape[0] != 1:
            raise ValueError(
                f"A packed batch (cu_seqlens) has one row and no attention_mask; found {genes.shape[0]} rows"
                f"{'' if attention_mask is None else ' and a mask'}."
            )
        wanted = kwargs.get("output_attentions")
        if self.config.output_attentions if wanted is None else wanted:
            raise ValueError("Attention weights of packed cells do not form one tensor; pad the cells instead.")

    @staticmethod
    def _longest(cu_seqlens: torch.Tensor, n_tokens: int) -> int:
        offsets = cu_seqlens.cpu()
        lengths = offsets.diff()
        if len(lengths) == 0 or offsets[0] != 0 or offsets[-1] != n_tokens or lengths.min() < 1:
            raise ValueError(
                f"Expected cu_seqlens to rise from 0 to the {n_tokens:,} tokens of the batch, without empty cells; "
                f"found {offsets[:3].tolist()} to {offsets[-3:].tolist()}."
            )
        return int(lengths.max())


class GeneformerForMaskedLM(GeneformerPreTrainedModel):
    """Predicts masked genes (pre-training)."""

    _auto_class = "AutoModelForMaskedLM"
    _keys_to_ignore_on_load_unexpected = []
    _bert_class = "BertForMaskedLM"
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: GeneformerConfig):
        super().__init__(config)
        self.bert = GeneformerModel(config)
        self.cls = GeneformerMaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings  # type: ignore[assignment]
        self.cls.predictions.bias = new_embeddings.bias  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Loss and logits.

        labels              (n, t) gene to predict, -100 where none is
        num_items_in_batch  divides the summed loss in place of the number of labels (gradient accumulation)
        Returns             with labels: loss, and in evaluation mode logits (labelled tokens, v) in order of position;
                            while training they are never held all at once.
                            Without: logits (n, t, v)
        The other arguments are those of `GeneformerModel`.
        """
        if labels is not None and kwargs.get("output_positions") is not None:
            raise ValueError("With labels, output is wanted where they are: leave output_positions out.")
        labelled = None if labels is None else (labels.flatten() != -100).nonzero().squeeze(1)
        # 85% of tokens carry no label. Of a packed batch, not even the last layer is computed for them.
        packed = kwargs.get("cu_seqlens") is not None
        shortened = labelled is not None and len(labelled) > 0 and packed and not every_token_shown(self.config, kwargs)
        if shortened:
            kwargs["output_positions"] = labelled
        outputs = self.bert(input_ids, attention_mask=attention_mask, **kwargs)
        x, logits, loss = outputs.last_hidden_state, None, None
        if labels is None or labelled is None:
            logits = self.cls(x)
        else:
            x, labels = x.flatten(0, 1), labels.flatten()[labelled]
            x = x if shortened else x[labelled]
            if self.training:
                head = self.cls.predictions
                loss = masked_gene_loss(head.transform(x), head.decoder, labels)
            else:
                logits = self.cls(x)
                loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            loss = loss / (max(labels.numel(), 1) if num_items_in_batch is None else num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class GeneformerClassifier(GeneformerPreTrainedModel):
    """What the classifiers share: the encoder, and the vector of a cell."""

    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"pooler\."]

    def __init__(self, config: GeneformerConfig, add_pooling_layer: bool):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.bert = GeneformerModel(config, add_pooling_layer=add_pooling_layer)
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)

    def encode_cells(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, BaseModelOutput]:
        """(cells, d) what a classifier of cells sees, and the encoder's outputs."""
        pooling = self.config.classifier_pooling
        firsts = None
        if cu_seqlens is not None and pooling == "first" and not every_token_shown(self.config, kwargs):
            firsts = kwargs["output_positions"] = cu_seqlens[:-1].long()
        outputs = self.bert(input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens, **kwargs)
        x = outputs.last_hidden_state
        x = cell_vectors(x, pooling, attention_mask, cu_seqlens) if firsts is None else x[0]
        return self.dropout(x if self.bert.pooler is None else self.bert.pooler(x)), outputs


class GeneformerForSequenceClassification(GeneformerClassifier):
    """Predicts the state of a cell."""

    _auto_class = "AutoModelForSequenceClassification"
    _bert_class = "BertForSequenceClassification"

    def __init__(self, config: GeneformerConfig):
        super().__init__(config, add_pooling_layer=config.classifier_pooling == "first")
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        class_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Loss and logits.

        labels              (cells,) class of each cell, -100 where unknown
        class_weights       (classes,) weight of each class in the loss, of mean 1 over the training cells
        num_items_in_batch  divides the summed loss in place of the number of labelled cells (gradient accumulation)
        Returns             logits (cells, classes)
        The other arguments are those of `GeneformerModel`.
        """
        pooled, outputs = self.encode_cells(input_ids, attention_mask, cu_seqlens, **kwargs)
        logits = self.classifier(pooled)
        loss = None if labels is None else classification_loss(logits, labels, class_weights, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class GeneformerForTokenClassification(GeneformerClassifier):
    """Predicts the state of each gene in its cell."""

    _auto_class = "AutoModelForTokenClassification"
    _bert_class = "BertForTokenClassification"

    def __init__(self, config: GeneformerConfig):
        super().__init__(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        class_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Loss and logits.

        labels   (n, t) class of each gene, -100 where unknown
        Returns  logits (n, t, classes)
        The other arguments are those of `GeneformerForSequenceClassification`.
        """
        outputs = self.bert(input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else classification_loss(logits, labels, class_weights, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class MultiTaskSequenceClassifierOutput(ModelOutput):
    """logits: one (cells, labels of the task) for each of `config.tasks`, in their order."""

    loss: torch.Tensor | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class GeneformerForMultiTaskSequenceClassification(GeneformerClassifier):
    """Predicts several states of a cell at once, with one linear classifier for each task of `config.tasks`."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: GeneformerConfig):
        if not config.tasks:
            raise ValueError("Expected config.tasks, e.g. {'cell_type': ['B', 'T'], 'condition': ['ctrl', 'stim']}.")
        # As the configuration sorts them when it is loaded
        config.tasks = dict(sorted(config.tasks.items()))
        super().__init__(config, add_pooling_layer=config.classifier_pooling == "first")
        # Not by name: a module's name cannot hold a dot, a column's can.
        self.classifiers = nn.ModuleList(nn.Linear(config.hidden_size, len(labels)) for labels in config.tasks.values())
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        class_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MultiTaskSequenceClassifierOutput:
        """Loss and logits.

        labels         (cells, tasks) class of each cell in each task, -100 where unknown
        class_weights  (tasks, most labels of a task) weights of the classes of each task; what is beyond is not read
        Returns        loss: the mean over all labelled cells and tasks, each task weighed by `config.task_weights`
        The other arguments are those of `GeneformerForSequenceClassification`.
        """
        pooled, outputs = self.encode_cells(input_ids, attention_mask, cu_seqlens, **kwargs)
        logits = tuple(classifier(pooled) for classifier in self.classifiers)
        loss = None
        if labels is not None:
            if labels.shape[-1] != len(logits):
                raise ValueError(f"Expected labels (cells, {len(logits)}), one column a task; found {labels.shape}.")
            n = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = pooled.new_zeros((), dtype=torch.float32)
            for k, (name, of_task) in enumerate(zip(self.config.tasks or {}, logits, strict=True)):
                weights = None if class_weights is None else class_weights[k, : of_task.shape[-1]]
                of_task_loss = classification_loss(of_task, labels[:, k], weights, n)
                loss = loss + (self.config.task_weights or {}).get(name, 1.0) * of_task_loss
        return MultiTaskSequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "GeneformerForMaskedLM",
    "GeneformerForMultiTaskSequenceClassification",
    "GeneformerForSequenceClassification",
    "GeneformerForTokenClassification",
    "GeneformerModel",
    "GeneformerPreTrainedModel",
]
