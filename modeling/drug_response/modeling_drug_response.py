"""Drug response model: a transformer over expression, pre-trained by masking; condition encoders; a decoder.

Pre-training hides a share of a profile's genes and regresses them, alone or beside cell line, drug and dose of the
profile. Fine-tuning adds encodings of drug, cell line and dose to the tokens of a cell, and decodes the treated cell.
Source: Tan, Wang, Zhang, "A pre-trained model for cellular responses to drug perturbations", sections 3.1 and 3.2, and
where it is silent the authors' code (github.com/ddiobrando/pretrain_BERT).

Text and code differ, and both are options:
- The code makes one token of a profile (token_axis="profile"), which leaves attention nothing to do, or lets the
  profiles of a minibatch attend to each other (attends_across_profiles). "genes" is a token a gene, so that the LSTM
  decoder has a sequence to run over.
- The code's loss is over all genes, of which most were visible (mask_loss="all"); the text's over the hidden ones.
- The code learns to reconstruct the treated cell from itself (training_input="self") and is given controls only when
  tested; "control" gives it a control of the same cell line in training too.
Blocks are pre-layer-norm transformer layers. A profile's token is a linear map and a layer norm in both stages, where
the code has an MLP in fine-tuning. Every gene has output weights of its own.

Axes: n profiles, g genes, t tokens, d width, h heads, b fingerprint bits.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_drug_response import DrugResponseConfig


def masked_genes(n: int, n_genes: int, ratio: float, device: torch.device | None = None) -> torch.Tensor:
    """(n, g) bool: the same number of genes of every profile, at least one, drawn at random."""
    n_masked = max(round(ratio * n_genes), 1)
    return torch.rand(n, n_genes, device=device).argsort(dim=1) < n_masked


def masked_squared_error(predictions: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error of the masked entries, or of all without a mask; 0 where there are none. All (n, g)."""
    squared = (predictions.float() - labels.float()).square()
    if masked is None:
        return squared.sum() / max(squared.numel(), 1)
    return (squared * masked).sum() / masked.sum().clamp(min=1)


def robust_error(predictions: torch.Tensor, labels: torch.Tensor, width: float) -> torch.Tensor:
    """Mean over profiles of the pseudo-Huber error 2 w (sqrt(w^2 + mean squared error) - w), w = width; 0 for none.

    Of one prediction for all, the minimum lies between the profiles' geometric median (w = 0) and their mean (w
    without bound, where the error becomes the squared one). Both (n, g).
    """
    squared = (predictions.float() - labels.float()).square().mean(dim=1)
    return 2 * width * ((squared + width**2).sqrt() - width).sum() / max(len(squared), 1)


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
    """Attention written out: (sequences, t, h, d) and its weights (sequences, h, t, t). There is never a mask."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DrugResponseEmbeddings(nn.Module):
    """Tokens of profiles.

    "genes": a token of the condition, then gene + value for each gene, or gene + "hidden". "profile": one token, a
    linear map of the whole profile with its hidden genes at 0.
    """

    def __init__(self, config: DrugResponseConfig):
        super().__init__()
        self.by_gene = config.token_axis == "genes"
        if self.by_gene:
            self.condition = nn.Parameter(torch.empty(config.hidden_size))
            self.genes = nn.Embedding(config.n_genes, config.hidden_size)
            self.value = nn.Linear(1, config.hidden_size)
            self.hidden = nn.Parameter(torch.empty(config.hidden_size))
        else:
            self.profile = nn.Linear(config.n_genes, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, expression: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
        """(n, 1 + g, d) or (n, 1, d)"""
        shown = expression if masked is None else expression.masked_fill(masked, 0.0)
        if not self.by_gene:
            return self.dropout(self.norm(self.profile(shown.to(self.profile.weight.dtype))[:, None]))
        is_hidden = torch.zeros_like(expression) if masked is None else masked
        is_hidden = is_hidden.to(self.value.weight.dtype)[..., None]
        value = self.value(shown.to(self.value.weight.dtype)[..., None])
        tokens = self.genes.weight + value * (1 - is_hidden) + self.hidden * is_hidden
        tokens = torch.cat([self.condition.expand(len(tokens), 1, -1), tokens], dim=1)
        return self.dropout(self.norm(tokens))


class DrugResponseAttention(nn.Module):
    """Multi-head self-attention."""

    is_causal = False

    def __init__(self, config: DrugResponseConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if 0 in x.shape:
            return x, None  # kernels differ in whether they take a sequence of no tokens
        q, k, v = (y(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in (self.query, self.key, self.value))
        implementation: Any = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        out, weights = attend(self, q, k, v, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.output(out.flatten(2)), weights


class DrugResponseLayer(GradientCheckpointingLayer):
    """Self-attention and feed-forward, each with layer norm before and residual."""

    def __init__(self, config: DrugResponseConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DrugResponseAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), **kwargs)[0])
        return x + self.dropout(self.output(self.act(self.widen(self.feed_forward_norm(x)))))


class GeneOutput(nn.Module):
    """Values of the genes from their tokens (n, g, width), or from the one token of a profile (n, 1, width)."""

    def __init__(self, n_genes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_genes, width))
        self.bias = nn.Parameter(torch.empty(n_genes))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, g)"""
        if tokens.shape[1] == 1:
            return nn.functional.linear(tokens[:, 0], self.weight, self.bias)
        return (tokens * self.weight).sum(-1) + self.bias


def mlp(n_in: int, width: int, act: str, dropout: float) -> nn.Sequential:
    """Two linear maps with an activation between them."""
    return nn.Sequential(nn.Linear(n_in, width), ACT2FN[act], nn.Dropout(dropout), nn.Linear(width, width))


class ConditionEncoder(nn.Module):
    """Drug, cell line and dose, each through an MLP, summed (section 3.2): (n, d)."""

    def __init__(self, config: DrugResponseConfig):
        super().__init__()
        self.config = config
        width, act, dropout = config.hidden_size, config.hidden_act, config.condition_dropout
        by_id = config.drug_encoder == "id"
        if by_id:
            self.drugs = nn.Embedding(config.n_drugs, width)
        self.drug = mlp(width if by_id else config.fingerprint_size, width, act, dropout)
        # The last one stands for lines that are not known.
        self.cell_lines = nn.Embedding(config.n_cell_lines + 1, width)
        self.cell_line = mlp(width, width, act, dropout)
        if config.dose_encoder == "mlp":
            self.dose = mlp(1, width, act, dropout)

    def forward(self, drug: torch.Tensor, cell_line: torch.Tensor, dose: torch.Tensor) -> torch.Tensor:
        config = self.config
        if self.training and config.cell_line_dropout:
            withheld = torch.rand(cell_line.shape, device=cell_line.device) < config.cell_line_dropout
            cell_line = cell_line.masked_fill(withheld, config.n_cell_lines)
        dtype = self.cell_lines.weight.dtype
        drugs = self.drug(self.drugs(drug) if config.drug_encoder == "id" else drug.to(dtype))
        lines = self.cell_line(self.cell_lines(cell_line))
        doses = dose.to(dtype)[:, None]
        return drugs * doses + lines if config.dose_encoder == "weight" else drugs + lines + self.dose(doses)


class DrugResponseDecoder(nn.Module):
    """Values of the genes (n, g) from tokens with their condition (n, t, d): an LSTM over the tokens, or an MLP."""

    def __init__(self, config: DrugResponseConfig):
        super().__init__()
        self.config = config
        width = 2 * config.decoder_size
        if config.decoder == "lstm":
            self.lstm = nn.LSTM(
                config.hidden_size,
                config.decoder_size,
                config.decoder_layers,
                batch_first=True,
                bidirectional=True,
                dropout=float(config.hidden_dropout_prob) if config.decoder_layers > 1 else 0.0,
            )
        else:
            widths = [config.hidden_size, *[width] * config.decoder_layers]
            layers = (
                (nn.Linear(a, b), ACT2FN[config.hidden_act], nn.Dropout(config.hidden_dropout_prob))
                for a, b in pairwise(widths)
            )
            self.mlp = nn.Sequential(*(module for layer in layers for module in layer))
        self.output = GeneOutput(config.n_genes, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.lstm(tokens)[0] if self.config.decoder == "lstm" else self.mlp(tokens))


@dataclass
class DrugResponseModelOutput(ModelOutput):
    """What the encoder makes of profiles.

    last_hidden_state  (n, 1 + g, d) with token_axis="genes", the condition's token first; (n, 1, d) with "profile"
    embeddings         (n, d) of profiles: the condition's token, or the only one
    """

    last_hidden_state: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DrugResponsePreTrainingOutput(ModelOutput):
    """loss: the sum of the tasks'. reconstructions (n, g); logits of cell lines and drugs (n, ...); doses (n,).

    Each task's own loss is None unless the model has the task and its labels are given.
    """

    loss: torch.Tensor | None = None
    mask_loss: torch.Tensor | None = None
    cell_line_loss: torch.Tensor | None = None
    drug_loss: torch.Tensor | None = None
    dose_loss: torch.Tensor | None = None
    reconstructions: torch.Tensor | None = None
    cell_line_logits: torch.Tensor | None = None
    drug_logits: torch.Tensor | None = None
    doses: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DrugResponseGenerationOutput(ModelOutput):
    """loss: as `config.response_loss` has it, over all genes. predictions: (n, g) float32, scaled as what enters."""

    loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class DrugResponsePreTrainedModel(PreTrainedModel):
    """Initialization and loading shared by all drug response models."""

    config: DrugResponseConfig  # type: ignore[assignment]
    config_class = DrugResponseConfig
    base_model_prefix = "model"
    main_input_name = "expression"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["DrugResponseEmbeddings", "DrugResponseLayer", "DrugResponseDecoder"]
    _can_record_outputs = {"hidden_states": DrugResponseLayer, "attentions": DrugResponseAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DrugResponseEmbeddings) and module.by_gene:
            init.normal_(module.condition, std=std)
            init.normal_(module.hidden, std=std)
            # A gene's value and its identity weigh alike.
            init.normal_(module.value.weight, std=std)
        elif isinstance(module, GeneOutput):
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if "weight" in name:
                    init.xavier_uniform_(parameter)
                else:
                    init.zeros_(parameter)


class DrugResponseModel(DrugResponsePreTrainedModel):
    """Embeddings of profiles and of their genes."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^(heads|conditions|decoder)\."]  # what the others add

    def __init__(self, config: DrugResponseConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = DrugResponseEmbeddings(config)
        self.layers = nn.ModuleList([DrugResponseLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.genes if self.embeddings.by_gene else self.embeddings.profile

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.embeddings.by_gene:
            self.embeddings.genes = value  # type: ignore[assignment]
        else:
            self.embeddings.profile = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, expression: torch.Tensor, masked: torch.Tensor | None = None, **kwargs: Any
    ) -> DrugResponseModelOutput:
        """Embeddings of profiles.

        expression  (n, g) as the ExpressionFeatureExtractor saved beside the model scales it
        masked      (n, g) bool, genes to hide
        Raises      ValueError for shapes that do not fit
        """
        check_genes(self.config, expression, masked=masked)
        x = self.embeddings(expression, masked)
        across = self.config.attends_across_profiles
        if across:
            x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x, **kwargs)
        x = self.norm(x.transpose(0, 1) if across else x)
        return DrugResponseModelOutput(last_hidden_state=x, embeddings=x[:, 0])


def check_genes(config: DrugResponseConfig, expression: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises ValueError unless expression is (n, g), and the others are shaped as it."""
    if expression.ndim != 2 or expression.shape[1] != config.n_genes:
        raise ValueError(
            f"Expected expression (profiles, {config.n_genes:,} genes), found {tuple(expression.shape)}. Align it with "
            "the ExpressionFeatureExtractor saved beside the model."
        )
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != expression.shape:
            raise ValueError(
                f"Expected {name} shaped as expression, {tuple(expression.shape)}; found {tuple(tensor.shape)}."
            )


class DrugResponseForPreTraining(DrugResponsePreTrainedModel):
    """Regresses hidden genes; tells cell line, drug and dose of a profile, if `config.tasks` say so."""

    _auto_class = "AutoModelForPreTraining"
    _keys_to_ignore_on_load_unexpected = [r"^(conditions|decoder)\."]

    def __init__(self, config: DrugResponseConfig):
        super().__init__(config)
        self.model = DrugResponseModel(config)
        sizes = {"cell_line": config.n_cell_lines, "drug": config.n_drugs, "dose": 1}
        self.heads = nn.ModuleDict(
            {
                task: GeneOutput(config.n_genes, config.hidden_size)
                if task == "mask"
                else nn.Linear(config.hidden_size, sizes[task])
                for task in config.tasks
            }
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        expression: torch.Tensor,
        masked: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cell_line: torch.Tensor | None = None,
        drug: torch.Tensor | None = None,
        dose: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DrugResponsePreTrainingOutput:
        """Losses and predictions of the tasks.

        expression  (n, g) scaled expression
        masked      (n, g) bool, genes to hide. By default a random share of `config.mask_ratio` while training, and
                    none in evaluation
        labels      (n, g) expression to compare with, as a rule `expression`
        cell_line   (n,) int64 numbers of cell lines, -100 where unknown; drug likewise
        dose        (n,) log10 of the dose in uM, not a number where unknown (controls)
        Raises      ValueError for shapes that do not fit
        """
        config = self.config
        check_genes(config, expression, masked=masked, labels=labels)
        if masked is None and self.training and "mask" in config.tasks:
            masked = masked_genes(len(expression), config.n_genes, config.mask_ratio, expression.device)
        outputs = self.model(expression, masked, **kwargs)
        tokens = outputs.last_hidden_state
        found: dict[str, torch.Tensor] = {}
        for task, head in self.heads.items():
            if task == "mask":
                found["mask"] = head(tokens[:, 1:] if config.token_axis == "genes" else tokens).float()
            else:
                found[task] = head(outputs.embeddings).float()
        losses: dict[str, torch.Tensor] = {}
        if "mask" in found and labels is not None:
            counted = masked if config.mask_loss == "masked" else None
            losses["mask"] = masked_squared_error(found["mask"], labels, counted)
        for task, numbers in (("cell_line", cell_line), ("drug", drug)):
            if task in found and numbers is not None:
                total = nn.functional.cross_entropy(found[task], numbers, reduction="sum")
                losses[task] = total / (numbers != -100).sum().clamp(min=1)
        if "dose" in found and dose is not None:
            known = dose.isfinite()
            losses["dose"] = masked_squared_error(found["dose"][:, 0], dose.masked_fill(~known, 0.0), known)
        return DrugResponsePreTrainingOutput(
            loss=torch.stack([*losses.values()]).sum() if losses else None,
            mask_loss=losses.get("mask"),
            cell_line_loss=losses.get("cell_line"),
            drug_loss=losses.get("drug"),
            dose_loss=losses.get("dose"),
            reconstructions=found.get("mask"),
            cell_line_logits=found.get("cell_line"),
            drug_logits=found.get("drug"),
            doses=found["dose"][:, 0] if "dose" in found else None,
            embeddings=outputs.embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DrugResponseForConditionalGeneration(DrugResponsePreTrainedModel):
    """Expression of cells after a drug, from control cells and the condition.

    `from_pretrained` also loads the encoder of a `DrugResponseForPreTraining`; the rest is then new.
    """

    # No Auto class is for cells to cells; this one loads whichever of the two was saved.
    _auto_class = "AutoModelForPreTraining"
    _keys_to_ignore_on_load_unexpected = [r"^heads\."]

    def __init__(self, config: DrugResponseConfig):
        super().__init__(config)
        if config.drug_encoder == "id" and config.n_drugs < 1:
            raise ValueError(
                'drug_encoder="id" needs n_drugs, the number of drugs known by id; found 0. Pass it, or '
                'drug_encoder="fingerprint".'
            )
        self.model = DrugResponseModel(config)
        self.conditions = ConditionEncoder(config)
        self.decoder = DrugResponseDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        expression: torch.Tensor,
        cell_line: torch.Tensor,
        dose: torch.Tensor,
        drug: torch.Tensor | None = None,
        fingerprint: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DrugResponseGenerationOutput:
        """Predicted expression, and its loss where labels are given.

        expression   (n, g) scaled expression of control cells
        cell_line    (n,) int64 number of the line, `config.n_cell_lines` for a line that is not known
        dose         (n,) log10 of the dose in uM
        drug         (n,) int64 number of the drug, with drug_encoder="id"
        fingerprint  (n, b) 0 or 1, with drug_encoder="fingerprint"
        labels       (n, g) scaled expression of treated cells
        Raises       ValueError for shapes that do not fit, or the drug in the other form
        """
        check_genes(self.config, expression, labels=labels)
        outputs = self.model(expression, **kwargs)
        tokens = outputs.last_hidden_state
        tokens = tokens[:, 1:] if self.config.token_axis == "genes" else tokens
        condition = self.conditions(self._drug(drug, fingerprint), cell_line, dose)
        predictions = self.decoder(tokens + condition[:, None]).float()
        if self.config.nonnegative:
            predictions = predictions.relu()
        if self.config.predicts == "change":
            predictions = predictions + expression
        loss = None
        if labels is not None and self.config.response_loss == "robust":
            loss = robust_error(predictions, labels, self.config.robust_width)
        elif labels is not None:
            loss = masked_squared_error(predictions, labels, None)
        return DrugResponseGenerationOutput(
            loss=loss,
            predictions=predictions,
            embeddings=outputs.embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _drug(self, drug: torch.Tensor | None, fingerprint: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        given, wanted = (drug, "drug") if config.drug_encoder == "id" else (fingerprint, "fingerprint")
        if given is None:
            raise ValueError(
                f'The model has drug_encoder="{config.drug_encoder}" and needs {wanted}=; the conditions(...) of the '
                "ExpressionFeatureExtractor saved beside it make it."
            )
        if wanted == "fingerprint" and given.shape[-1] != config.fingerprint_size:
            raise ValueError(f"Expected fingerprints of {config.fingerprint_size:,} bits, found {given.shape[-1]:,}.")
        return given


__all__ = [
    "DrugResponseForConditionalGeneration",
    "DrugResponseForPreTraining",
    "DrugResponseModel",
    "DrugResponsePreTrainedModel",
]
