"""Multiome T5: gene expression <-> chromatin accessibility of single cells, as translation of binarized strings.

`MultiomeT5ForConditionalGeneration` is a stock T5 trained from scratch, which writes the other modality's string token
by token; a task token before the string says which way. Source: Lee et al., "Translating the Code of Life", Methods;
T5: Raffel et al. 2020. `MultiomeT5ForFeaturePrediction` puts a set head on the same encoder, which scores all features
of the other modality in one pass: a cell has some thousand open peaks, and decoding them one by one is hopeless.

Deviations: the encoder may read a set, without T5's position bias (`encoder_position_bias`); generation is masked to
features of the target modality and to no repeats; while training, logits over genes and peaks are never held at once.

Axes: n cells, t tokens, f target features, d width, v vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LogitsProcessorList, T5ForConditionalGeneration
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention, T5PreTrainedModel, T5Stack, eager_attention_forward
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_multiome import MultiomeT5Config
from .generation_multiome import TargetFeatures
from .set_head_multiome import SetHead, SparseFeatures, TargetTable, best_features, dense_rows, summed_losses

# Logits over the vocabulary that are held at once while training: 256 MiB of float32
LOGITS_AT_ONCE = 2**26


def token_loss(x: torch.Tensor, weight_vd: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of x @ weight_vd.T with the labels, some rows of logits at a time.

    x       (tokens, d)
    labels  (tokens,) -100 where nothing is to be predicted
    """
    labelled = labels != -100
    x, labels = x[labelled], labels[labelled]

    def summed(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy((x @ weight_vd.T).float(), labels, reduction="sum")

    rows = max(LOGITS_AT_ONCE // len(weight_vd), 1)
    if len(labels) <= rows:
        total = summed(x, labels)
    else:
        parts = zip(x.split(rows), labels.split(rows), strict=True)
        total = torch.stack([checkpoint(summed, *part, use_reentrant=False) for part in parts]).sum()  # type: ignore
    return total / max(len(labels), 1)


class SetAttention(T5Attention):
    """T5's self-attention without its position bias: a set's members have no places."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        """As T5's, which would make a bias of zeros, (h, t, t), and add it to every score."""
        shape = (*hidden_states.shape[:-1], -1, self.key_value_proj_dim)
        q, k, v = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        implementation: Any = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o(out.flatten(2)), None, weights


def forget_positions(encoder: T5Stack) -> None:
    """Replaces the self-attention of all layers by that of sets, with the same projections."""
    for i, block in enumerate(encoder.block):
        layer: Any = block.layer[0]  # type: ignore[index, union-attr]
        attention, replaced = SetAttention(encoder.config, layer_idx=i), layer.SelfAttention
        # Not new ones: transformers initializes T5's attention only as part of a class of its own.
        attention.q, attention.k, attention.v, attention.o = replaced.q, replaced.k, replaced.v, replaced.o
        layer.SelfAttention = attention


class MultiomeT5ForConditionalGeneration(T5ForConditionalGeneration):
    """Writes the string of the other modality."""

    config: MultiomeT5Config
    config_class = MultiomeT5Config
    _auto_class = "AutoModelForSeq2SeqLM"

    def __init__(self, config: MultiomeT5Config):
        super().__init__(config)
        if not config.encoder_position_bias:
            forget_positions(self.encoder)
            self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loss and logits.

        input_ids, attention_mask, ...  as of T5
        labels                          (n, t) tokens to write, -100 where none is
        return_logits                   False, with labels: the loss only, and never all logits at once. That is the
                                        default while training
        Returns                         loss where there are labels, and logits (n, t, v)
        """
        if labels is None or (not self.training if return_logits is None else return_logits):
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)  # type: ignore[arg-type]
        kwargs.pop("return_dict", None)
        encoded = kwargs.pop("encoder_outputs", None)
        attention_mask, inputs_embeds = kwargs.pop("attention_mask", None), kwargs.pop("inputs_embeds", None)
        decoder = {
            name: kwargs.pop(f"decoder_{name}", None) for name in ("input_ids", "attention_mask", "inputs_embeds")
        }
        if encoded is None:
            encoded = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        if decoder["input_ids"] is None and decoder["inputs_embeds"] is None:
            decoder["input_ids"] = self._shift_right(labels)
        kwargs.pop("use_cache", None)
        decoded = self.decoder(
            **decoder,
            encoder_hidden_states=encoded[0],
            encoder_attention_mask=attention_mask,
            use_cache=False,
            **kwargs,
        )
        x = decoded[0]
        if self.config.scale_decoder_outputs:
            x = x * self.model_dim**-0.5
        weight = self.lm_head.weight
        loss = token_loss(x.flatten(0, 1).to(weight.dtype), weight, labels.flatten())
        return Seq2SeqLMOutput(loss=loss, encoder_last_hidden_state=encoded[0])

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        constrained: bool = True,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `generate`, greedy or with beams, up to `config.max_target_length` tokens unless told.

        constrained  only features of the cell's target modality, none twice (with expression bins, one after each
                     gene). For a vocabulary of subwords pass prefix_allowed_tokens_fn=processor.allowed_tokens(task)
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if constrained and self.config.has_feature_tokens:
            if input_ids is None:
                raise ValueError("Constrained generation reads the task from input_ids: pass them.")
            logits_processor = LogitsProcessorList(logits_processor or [])
            logits_processor.append(TargetFeatures(self.config, input_ids[:, 0]))
        told = ("max_new_tokens", "max_length", "generation_config", "stopping_criteria")
        if not args and not any(kwargs.get(name) is not None for name in told):
            kwargs["max_new_tokens"] = self.config.max_target_length
        return super().generate(inputs, *args, logits_processor=logits_processor, **kwargs)  # type: ignore[misc]


class MultiomeT5EncoderModel(T5PreTrainedModel):
    """The encoder: features of a cell in each other's context."""

    config: MultiomeT5Config  # type: ignore[assignment]
    config_class = MultiomeT5Config
    _auto_class = "AutoModel"
    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}
    # What the decoder and the heads add
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\.", r"^head\."]

    def __init__(self, config: MultiomeT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        encoder_config = copy.deepcopy(config)
        encoder_config.is_decoder, encoder_config.use_cache = False, False
        self.encoder = T5Stack(encoder_config)
        if not config.encoder_position_bias:
            forget_positions(self.encoder)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        factor, d = self.config.initializer_factor, self.config.d_model
        if module is self.shared:
            # T5's is 1, and logits are divided by sqrt(d). The product is the same, but Adam's steps are of one size
            # for all weights, and small embeddings turn faster: a planted rule is learned in fewer steps.
            init.normal_(module.get_parameter("weight"), std=factor * d**-0.5)
        elif isinstance(module, SetHead):
            init.normal_(module.cell.weight, std=factor * (3 * d) ** -0.5)
            init.zeros_(module.cell.bias)
            # Small: predictions begin with the biases, which `set_frequencies` sets.
            for projection in (module.score, module.value):
                init.normal_(projection.weight, std=0.1 * factor * d**-0.5)
            init.zeros_(module.score_bias)
            init.zeros_(module.value_bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = value  # type: ignore[assignment]
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """last_hidden_state (n, t, d) of input_ids (n, t), task token first."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@dataclass
class FeaturePredictionOutput(ModelOutput):
    """loss; logits (n, f) of the target features being there; values (n, f): expression, or accessibility of peaks."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    values: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MultiomeT5ForFeaturePrediction(MultiomeT5EncoderModel):
    """Predicts all features of the other modality at once.

    Raises  ValueError on construction for a vocabulary of subwords
    """

    _auto_class = "AutoModelForSequenceClassification"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\."]

    def __init__(self, config: MultiomeT5Config):
        config.target_of(config.gex2atac_token_id)
        super().__init__(config)
        self.head = SetHead(config, config.num_genes + config.num_peaks)
        self.post_init()

    def set_frequencies(self, frequencies: torch.Tensor, mean_values: torch.Tensor | None = None) -> None:
        """Lets predictions begin with what is true of all cells alike.

        frequencies  (genes + peaks,) share of the training cells that have each feature
        mean_values  (genes + peaks,) mean measured value of each; frequencies if absent
        """
        bias = self.head.score_bias
        p = frequencies.to(bias.device, torch.float64).clamp(1e-4, 1 - 1e-4)
        with torch.no_grad():
            bias.copy_(torch.logit(p))
            self.head.value_bias.copy_(frequencies if mean_values is None else mean_values)

    def _target(self, task_token_id: int) -> tuple[int, TargetTable]:
        """First token of a task's target features, and their table."""
        first, n = self.config.target_of(task_token_id)
        assert self.config.first_gene_token_id is not None
        start = first - self.config.first_gene_token_id
        table = TargetTable(
            self.get_parameter("shared.weight")[first : first + n],
            self.head.score_bias[start : start + n],
            self.head.value_bias[start : start + n],
        )
        return first, table

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        value_features: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> FeaturePredictionOutput:
        """Loss, logits and values.

        input_ids       (n, t), the task token first; both tasks may stand in one batch where the loss is all there is
        labels          (n, l) tokens of the features that are there, padded with -100; special tokens among them are
                        passed over, so that they can be those of `MultiomeT5ForConditionalGeneration`
        value_features  (n, l) positions among the task's target features that have a value other than zero, -100 else
        values          (n, l) these values: log-normalized expression, or 1
        return_logits   False, with labels or values: the loss only. That is the default while training
        Returns         loss, logits and values (n, f). The loss is summed over cells and target features and divided by
                        the number of labels, without labels by that of values: a mean over some 100,000 features,
                        nearly all absent, would be lost in Adam's epsilon
        """
        embeddings = self.shared(input_ids)
        encoded = self.encoder(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
        z, z_value = self.head(embeddings, encoded.last_hidden_state, attention_mask)
        config, losses = self.config, []
        tasks = input_ids[:, 0].unique().tolist()
        predicts = not self.training if return_logits is None else return_logits
        predicts = predicts or (labels is None and values is None)
        if predicts and len(tasks) > 1:
            raise ValueError("The batch has cells of both tasks, whose targets differ: predict one task at a time.")
        output = FeaturePredictionOutput(hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        for task in tasks:
            rows = (input_ids[:, 0] == task).nonzero().squeeze(1)
            first, table = self._target(task)
            n_features = len(table.score_bias)
            if predicts:
                output.logits, output.values = table.scores(z), table.values(z_value)
            if labels is not None or values is not None:
                present = None if labels is None else dense_rows(labels[rows] - first, None, n_features)
                measured = None
                if values is not None and value_features is not None:
                    measured = dense_rows(value_features[rows], values[rows], n_features)
                gammas = (config.gamma_positive, config.gamma_negative, config.probability_margin)
                weight = config.value_loss_weight
                summed = summed_losses(table, z[rows], z_value[rows], present, measured, gammas, weight)
                losses.append(summed)
        if losses:
            labelled = labels if labels is not None else value_features
            assert labelled is not None
            output.loss = torch.stack(losses).sum() / (labelled != -100).sum().clamp(min=1)
        return output

    @torch.no_grad()
    def predict(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        values: bool = False,
    ) -> SparseFeatures:
        """The predicted features of cells of one task, without a (n, f) matrix of all.

        threshold  least probability; the configuration's for this task by default
        top_k      features a cell instead
        values     gives their predicted values in place of their probabilities
        """
        if threshold is not None and top_k is not None:
            raise ValueError("Expected threshold or top_k, found both.")
        tasks = input_ids[:, 0].unique().tolist()
        if len(tasks) > 1:
            raise ValueError("The batch has cells of both tasks, whose targets differ: predict one task at a time.")
        embeddings = self.shared(input_ids)
        encoded = self.encoder(inputs_embeds=embeddings, attention_mask=attention_mask)
        z, z_value = self.head(embeddings, encoded.last_hidden_state, attention_mask)
        if threshold is None:
            of_peaks = tasks[0] == self.config.gex2atac_token_id
            threshold = self.config.gex2atac_threshold if of_peaks else self.config.atac2gex_threshold
        _, table = self._target(tasks[0])
        return best_features(table, z, z_value, threshold=threshold, top_k=top_k, values=values)


__all__ = [
    "FeaturePredictionOutput",
    "MultiomeT5EncoderModel",
    "MultiomeT5ForConditionalGeneration",
    "MultiomeT5ForFeaturePrediction",
]
