"""Geneformer: a BERT encoder that reads a cell as its genes in order of rank value.

Post-layer-norm transformer, learned absolute positions (the rank), ReLU, and a masked-gene head tied to the gene
embeddings. Source: Theodoris et al., "Transfer learning enables predictions in network biology", Nature 2023, Methods,
"Geneformer architecture and pretraining".

Modules bear BERT's names, so the original's checkpoints load as they are and ours load into `BertForMaskedLM`.
Deviations from it: the head computes logits only where labels ask for them; cells can be packed end to end with
`cu_seqlens` instead of padded; there is no pooler.

Axes: n cells, t tokens, d width, h heads, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_geneformer import GeneformerConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v, with the weights. query, key, value (n, h, t, d/h); returns (n, t, h, d/h)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def packed_attention_forward(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each cell of a packed batch, one cell after another: nothing is computed across cells.

    query, key, value  (1, h, tokens of all cells, d/h)
    cu_seqlens         (cells + 1,) where cells begin, and the end
    Returns            (1, tokens of all cells, h, d/h)
    """
    lengths = cu_seqlens.diff().tolist()
    cells = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(module, *qkv, attention_mask=None, **kwargs)[0] for qkv in cells], dim=1), None


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
        self, x: torch.Tensor, attention_mask: Any, cu_seqlens: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, -1, self.head_size).transpose(1, 2) for f in (self.query, self.key, self.value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # type: ignore[arg-type]
            eager_attention_forward,
        )
        options = {
            "scaling": self.scaling,
            "dropout": self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        }
        if cu_seqlens is None:
            out, weights = attend(self, q, k, v, attention_mask, **options)
        else:
            out, weights = packed_attention_forward(attend, self, q, k, v, cu_seqlens, **options)
        return out.reshape(n, t, -1), weights


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

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.output(self.self(x, *args, **kwargs)[0], x)


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


class GeneformerPreTrainedModel(PreTrainedModel):
    """Initialization and loading shared by all Geneformers."""

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GeneformerPredictionHead):
            init.zeros_(module.bias)


class GeneformerModel(GeneformerPreTrainedModel):
    """Gene embeddings in the context of their cell."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^cls\."]  # the head of a masked LM

    def __init__(self, config: GeneformerConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = GeneformerEmbeddings(config)
        self.encoder = GeneformerEncoder(config)
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
        num_layers: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states of every token.

        input_ids       (n, t) token ids; or (1, tokens of all cells) packed, with cu_seqlens
        attention_mask  (n, t) 1 for tokens, 0 for padding; not with cu_seqlens, which needs no padding
        position_ids    (n, t) or (1, t) ranks from 0; by default each cell's own
        inputs_embeds   (n, t, d) gene embeddings in place of input_ids
        cu_seqlens      (cells + 1,) offsets of the cells of a packed batch, from 0 to the number of tokens
        num_layers      runs only the first layers; all by default
        Raises          ValueError for cells longer than the context, or arguments that exclude each other
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        genes = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if cu_seqlens is not None:
            self._check_packed(genes, attention_mask, cu_seqlens, kwargs)
        if position_ids is None:
            t = torch.arange(genes.shape[1], device=genes.device)
            starts = 0 if cu_seqlens is None else cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
            position_ids = (t - starts).unsqueeze(0)
            longest = genes.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
            if longest > self.config.max_position_embeddings:
                raise ValueError(
                    f"A cell has {longest:,} tokens, but this model reads {self.config.max_position_embeddings:,} at "
                    "the most. Encode the cells with max_length=..., which keeps the highest-ranked genes."
                )
        x = self.embeddings(genes, position_ids)
        if cu_seqlens is None:
            attention_mask = create_bidirectional_mask(self.config, x, attention_mask)
        for layer in self.encoder.layer[:num_layers]:
            x = layer(x, attention_mask, cu_seqlens, **kwargs)
        return BaseModelOutput(last_hidden_state=x)

    def _check_packed(
        self, genes: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor, kwargs: dict[str, Any]
    ) -> None:
        if attention_mask is not None or genes.shape[0] != 1:
            raise ValueError(
                f"A packed batch (cu_seqlens) has one row and no attention_mask; found {genes.shape[0]} rows"
                f"{'' if attention_mask is None else ' and a mask'}."
            )
        if kwargs.get("output_attentions"):
            raise ValueError("Attention weights of packed cells do not form one tensor; pad the cells instead.")


class GeneformerForMaskedLM(GeneformerPreTrainedModel):
    """Predicts masked genes (pre-training)."""

    _auto_class = "AutoModelForMaskedLM"
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
        Returns             with labels: loss, and logits (labelled tokens, v) in order of position.
                            Without: logits (n, t, v)
        The other arguments are those of `GeneformerModel`.
        """
        outputs = self.bert(input_ids, attention_mask=attention_mask, **kwargs)
        x, loss = outputs.last_hidden_state, None
        if labels is not None:
            # Most of the vocabulary-wide product would be thrown away: 85% of tokens carry no label.
            labelled = labels != -100
            x, labels = x[labelled], labels[labelled]
        logits = self.cls(x)
        if labels is not None:
            n = max(labels.numel(), 1) if num_items_in_batch is None else num_items_in_batch
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / n
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["GeneformerForMaskedLM", "GeneformerModel", "GeneformerPreTrainedModel"]
