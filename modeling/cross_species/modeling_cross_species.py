"""Cross-species model: an encoder and a decoder over PCA projections, shared by the sources, and linear aligners.

A cell enters as the first principal components of its own data set (its "intense representation"), a tenth of them
hidden, plus a trainable embedding of that data set; the decoder gives all of them back. A linear map between the
intense representations of two species translates. Source: Pang & Tegnér, "Representation Learning and Translation
between the Mouse and Human Brain using a Deep Transformer Architecture", ICML 2020 Workshop on Computational Biology,
sections 2.1 and 2.2; equations by its numbers.

Deviations, and what the paper leaves open:
- The paper's matrices are (cells x features), so its attention runs across the cells of a batch: token_axis="cells".
  A cell's embedding then depends on the others. token_axis="components" cuts each cell into patches of components and
  one token of its source, and attends within the cell.
- The intense representation has 1,200 components, the embedding 1,024: W of equation 1 maps one to the other, and since
  every source has components of its own, W is one matrix a source, as is its way back behind equation 5.
- Blocks are pre-layer-norm transformer layers, with feed-forward. There is no layer norm behind the last block: how far
  a cell lies from the mean is part of what is reconstructed.
- Aligners act on the intense representation, before equation 1: the decoder reads I (equation 4), through which a
  cell's own species would reach the output.

Axes: n cells, c components, p patches of a cell, t tokens of a sequence, d width, h heads, s sources.
"""

from dataclasses import dataclass
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

from .configuration_cross_species import CrossSpeciesConfig


def reconstruction_loss(reconstructions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all entries, in the units of the intense representation (equation 6); 0 for no cells.

    reconstructions, labels  (n, c)
    """
    squared = (reconstructions.float() - labels.float()).square()
    return squared.sum() / max(squared.numel(), 1)


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


class SourceLinear(nn.Module):
    """Each cell's patches through the matrices of the cell's own source.

    Sources are told apart by multiplication, not by indexing: nothing is read back from a GPU, and each matrix has a
    gradient in every batch, as DDP wants.
    """

    def __init__(self, n_sources: int, n_patches: int, in_features: int, out_features: int, initial_std: float):
        super().__init__()
        self.initial_std = initial_std
        self.weight = nn.Parameter(torch.empty(n_sources, n_patches, in_features, out_features))

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """(n, p, in), (n,) -> (n, p, out)"""
        products = (
            torch.einsum("npi,pio->npo", x * (source == s)[:, None, None], weight)
            for s, weight in enumerate(self.weight)
        )
        return torch.stack(tuple(products)).sum(dim=0)


class CrossSpeciesEmbeddings(nn.Module):
    """Tokens of the cells: projections through W of their source, plus the source's embedding. No positional code."""

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__()
        self.config = config
        n_patches, patch_size = config.patches
        # Projections of root mean square 1 make tokens of root mean square 1, however many components there are.
        self.projection = SourceLinear(
            len(config.sources), n_patches, patch_size, config.hidden_size, initial_std=patch_size**-0.5
        )
        self.source = nn.Embedding(len(config.sources), config.hidden_size)
        if config.token_axis == "components":
            # What tells a patch whose entries are all hidden from the others
            self.patch = nn.Parameter(torch.empty(n_patches, config.hidden_size))

    def forward(self, projections: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """I of the cells, (1, n, d), or of the patches, (n, 1 + p, d)."""
        scaled = projections / source_rms(self.config, source)[:, None]
        n_patches, patch_size = self.config.patches
        padded = nn.functional.pad(scaled, (0, n_patches * patch_size - scaled.shape[1]))
        patches = padded.unflatten(1, (n_patches, patch_size)).to(self.projection.weight.dtype)
        x = self.projection(patches, source)  # (1) X* = W X
        if self.config.token_axis == "components":
            # The token of the source stands first: C alone, of which all patches can read.
            x = nn.functional.pad(x + self.patch, (0, 0, 1, 0))
        i = x + self.source(source)[:, None]  # (2) I = X* + C, C = S W_s with one-hot S
        return i.transpose(0, 1) if self.config.token_axis == "cells" else i


class CrossSpeciesAttention(nn.Module):
    """Multi-head attention of every token of `x` to every token of `memory`."""

    is_causal = False  # read by transformers' SDPA and flash interfaces

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if 0 in x.shape:
            return x, None  # kernels differ in whether they take a sequence of no tokens
        q, k, v = (
            y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for y in (self.query(x), self.key(memory), self.value(memory))
        )
        implementation: Any = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        out, weights = attend(self, q, k, v, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.output(out.flatten(2)), weights


class CrossSpeciesFeedForward(nn.Module):
    """Widening, activation, projection back."""

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__()
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.act(self.widen(x)))


class CrossSpeciesEncoderLayer(GradientCheckpointingLayer):
    """Self-attention and feed-forward, each with layer norm before and residual."""

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CrossSpeciesAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = CrossSpeciesFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, **kwargs)[0])
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class CrossSpeciesDecoderLayer(GradientCheckpointingLayer):
    """Attention to the encoder's output, self-attention and feed-forward, each with layer norm before and residual."""

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__()
        self.cross_attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attention = CrossSpeciesAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CrossSpeciesAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = CrossSpeciesFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, i: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        # (4) I' = Attention(I, E, E)
        i = i + self.dropout(self.cross_attention(self.cross_attention_norm(i), e)[0])
        # (5) X' = MultiHead(I', I', I')
        normed = self.attention_norm(i)
        x = i + self.dropout(self.attention(normed, normed)[0])
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class CrossSpeciesDecoder(nn.Module):
    """From I and the encoder's output back to the intense representation of each cell's source."""

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([CrossSpeciesDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        n_patches, patch_size = config.patches
        self.projection = SourceLinear(
            len(config.sources), n_patches, config.hidden_size, patch_size, initial_std=config.initializer_range
        )

    def forward(self, i: torch.Tensor, e: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """X' (n, c) float32 from I and E, both (1, n, d) or (n, 1 + p, d)."""
        for layer in self.layers:
            i = layer(i, e)
        x = i.transpose(0, 1) if self.config.token_axis == "cells" else i[:, 1:]
        reconstructions = self.projection(x, source).flatten(1)[:, : self.config.n_components]
        return reconstructions * source_rms(self.config, source)[:, None]  # float32, whatever the weights are


def source_rms(config: CrossSpeciesConfig, source: torch.Tensor) -> torch.Tensor:
    """(n,) float32: what a cell's projections are divided by, of its source."""
    return torch.tensor(config.projection_rms or [1.0] * len(config.sources)).to(source.device)[source]


class Aligner(nn.Linear):
    """W of equation 7, without bias or activation: intense representations of one source in another's. At first 1."""

    def __init__(self, n_components: int):
        super().__init__(n_components, n_components, bias=False)


@dataclass
class CrossSpeciesModelOutput(ModelOutput):
    """What the encoder makes of cells.

    last_hidden_state  E of equation 3: (1, n, d) with token_axis="cells", (n, 1 + p, d) with "components"
    embeddings         (n, d) a cell's E; with "components" the mean of its tokens
    inputs_embeds      I of equation 2, shaped as E
    """

    last_hidden_state: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CrossSpeciesReconstructionOutput(ModelOutput):
    """loss: equation 6. reconstructions: X' (n, c) float32. embeddings: (n, d)."""

    loss: torch.Tensor | None = None
    reconstructions: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CrossSpeciesTranslationOutput(ModelOutput):
    """translations: X' (n, c) float32, intense representations of the targets. embeddings: (n, d), as target cells."""

    translations: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class CrossSpeciesPreTrainedModel(PreTrainedModel):
    """Initialization and loading shared by all cross-species models."""

    config: CrossSpeciesConfig  # type: ignore[assignment]
    config_class = CrossSpeciesConfig
    base_model_prefix = "model"
    main_input_name = "projections"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CrossSpeciesEmbeddings", "CrossSpeciesEncoderLayer", "CrossSpeciesDecoderLayer"]
    _can_record_outputs = {"hidden_states": CrossSpeciesEncoderLayer, "attentions": CrossSpeciesAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)  # C weighs as much as X*, or nothing but W would tell the sources apart
        else:
            super()._init_weights(module)
        if isinstance(module, Aligner):
            init.eye_(module.weight)
        elif isinstance(module, SourceLinear):
            init.normal_(module.weight, std=module.initial_std)
        elif isinstance(module, CrossSpeciesEmbeddings) and module.config.token_axis == "components":
            init.normal_(module.patch, std=self.config.initializer_range)


class CrossSpeciesModel(CrossSpeciesPreTrainedModel):
    """Cell embeddings, shared by all sources."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^aligners\."]  # what the others add

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = CrossSpeciesEmbeddings(config)
        self.layers = nn.ModuleList([CrossSpeciesEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.source

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.source = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, projections: torch.Tensor, source: torch.Tensor, **kwargs: Any) -> CrossSpeciesModelOutput:
        """Embeddings of cells.

        projections  (n, c) intense representation of each cell, in the units of its source's PCA
        source       (n,) int64 position of each cell's source in `config.sources`
        Raises       ValueError for shapes or sources that do not fit
        """
        check_cells(self.config, projections, source)
        i = self.embeddings(projections, source)
        e = i
        for layer in self.layers:
            e = layer(e, **kwargs)  # (3) E = MultiHead(I, I, I)
        e = self.norm(e)
        embeddings = e[0] if self.config.token_axis == "cells" else e.mean(dim=1)
        return CrossSpeciesModelOutput(last_hidden_state=e, embeddings=embeddings, inputs_embeds=i)


def check_cells(config: CrossSpeciesConfig, projections: torch.Tensor, source: torch.Tensor) -> None:
    """Raises ValueError unless projections are (n, c) and sources (n,) of the model's."""
    if projections.ndim != 2 or projections.shape[1] != config.n_components:
        raise ValueError(
            f"Expected projections (cells, {config.n_components:,}), found {tuple(projections.shape)}. Project cells "
            "with the PCAProjectionFeatureExtractor saved beside the model."
        )
    if source.shape != projections.shape[:1]:
        raise ValueError(f"Expected one source a cell, ({len(projections):,},), found {tuple(source.shape)}.")
    # On a GPU the look-up of the source's embedding refuses it, without a wait.
    if source.device.type == "cpu" and len(source) and not 0 <= source.min() <= source.max() < len(config.sources):
        raise ValueError(
            f"Expected sources 0 to {len(config.sources) - 1} ({', '.join(config.sources)}), found "
            f"{int(source.min())} to {int(source.max())}."
        )


class CrossSpeciesAutoencoder(CrossSpeciesPreTrainedModel):
    """What the models with a decoder share."""

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__(config)
        self.model = CrossSpeciesModel(config)
        self.decoder = CrossSpeciesDecoder(config)

    def reconstruct(
        self, projections: torch.Tensor, source: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, CrossSpeciesModelOutput]:
        """X' (n, c) of projections (n, c) and their sources (n,), and the encoder's output."""
        outputs = self.model(projections, source, **kwargs)
        return self.decoder(outputs.inputs_embeds, outputs.last_hidden_state, source), outputs


class CrossSpeciesForMaskedReconstruction(CrossSpeciesAutoencoder):
    """Gives back the intense representation of cells, some of whose entries are hidden (pre-training)."""

    _auto_class = "AutoModelForPreTraining"
    _keys_to_ignore_on_load_unexpected = [r"^aligners\."]

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        projections: torch.Tensor,
        source: torch.Tensor,
        masked: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CrossSpeciesReconstructionOutput:
        """Loss and reconstructions.

        projections  (n, c) intense representation of each cell
        source       (n,) int64 position of each cell's source in `config.sources`
        masked       (n, c) bool, the entries to hide: they enter as 0, the mean. By default a random share of
                     `config.mask_probability` while training, and none in evaluation
        labels       (n, c) intense representation to compare with, as a rule `projections`; without it there is no loss
        Raises       ValueError for shapes or sources that do not fit
        """
        for name, tensor in (("masked", masked), ("labels", labels)):
            if tensor is not None and tensor.shape != projections.shape:
                raise ValueError(
                    f"Expected {name} shaped as projections, {tuple(projections.shape)}; found {tuple(tensor.shape)}."
                )
        if masked is None and self.training:
            masked = torch.rand(projections.shape, device=projections.device) < self.config.mask_probability
        shown = projections if masked is None else projections.masked_fill(masked, 0.0)
        reconstructions, outputs = self.reconstruct(shown, source, **kwargs)
        return CrossSpeciesReconstructionOutput(
            loss=None if labels is None else reconstruction_loss(reconstructions, labels),  # (6)
            reconstructions=reconstructions,
            embeddings=outputs.embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CrossSpeciesForTranslation(CrossSpeciesAutoencoder):
    """Translates cells of one source into another: a linear aligner, then encoder and decoder as of the target.

    `from_pretrained` also loads a `CrossSpeciesForMaskedReconstruction`, which has no aligners: see `set_aligner`.
    """

    # The Auto class loads whichever of the two models with a decoder was saved.
    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: CrossSpeciesConfig):
        super().__init__(config)
        # In the order of config.aligners
        self.aligners = nn.ModuleList(Aligner(config.n_components) for _ in config.aligners)
        self.post_init()

    def set_aligner(self, source: str, target: str, w: Any) -> None:
        """Takes W of equation 7 from `source` to `target`, in place of the one there is.

        w       (c, c) array or tensor: `w @ x` is the target's intense representation of x (c,), one of the source's
        Raises  ValueError for sources the model does not know or that are the same, or a W of another shape or not
                finite
        """
        self._check_names(source, target)
        c = self.config.n_components
        weight = torch.as_tensor(w)
        if weight.shape != (c, c):
            raise ValueError(
                f"Expected W as ({c:,}, {c:,}), target's components x source's; found {tuple(weight.shape)}."
            )
        if not weight.isfinite().all():
            raise ValueError(f"W from {source} to {target} holds values that are not finite.")
        if [source, target] not in self.config.aligners:
            self.aligners.append(Aligner(c).to(self.device, self.dtype))
            self.config.aligners = [*self.config.aligners, [source, target]]
        aligner: Any = self.aligners[self.config.aligners.index([source, target])]
        with torch.no_grad():
            aligner.weight.copy_(weight)

    def align(self, projections: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Intense representations (n, c) of cells in those of their targets; unchanged where that is their source.

        Raises  ValueError for a pair of source and target that the model has no aligner for
        """
        names = self.config.sources
        aligned, known = projections, source == target
        for pair, aligner in zip(self.config.aligners, self.aligners, strict=True):
            chosen = (source == names.index(pair[0])) & (target == names.index(pair[1]))
            wx = aligner(projections.to(self.dtype))  # (7) W X
            aligned = torch.where(chosen[:, None], wx.to(aligned.dtype), aligned)
            known = known | chosen
        if not known.all():
            cell = int((~known).nonzero()[0])
            raise ValueError(self._no_aligner(names[int(source[cell])], names[int(target[cell])]))
        return aligned

    @can_return_tuple
    def forward(
        self, projections: torch.Tensor, source: torch.Tensor, target: torch.Tensor, **kwargs: Any
    ) -> CrossSpeciesTranslationOutput:
        """Cells as cells of another source.

        projections     (n, c) intense representation of each cell
        source, target  (n,) int64 positions in `config.sources` of where a cell comes from, and what it is to become
        Raises          ValueError for shapes or sources that do not fit, or a pair without aligner
        """
        check_cells(self.config, projections, source)
        check_cells(self.config, projections, target)
        translations, outputs = self.reconstruct(self.align(projections, source, target), target, **kwargs)
        return CrossSpeciesTranslationOutput(
            translations=translations,
            embeddings=outputs.embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def translate(self, projections: torch.Tensor, *, source: str, target: str) -> torch.Tensor:
        """(n, c) float32 intense representation in `target` of cells (n, c) that all come from `source`.

        Raises  ValueError for a name the model does not know, or a pair without aligner
        """
        self.check_pair(source, target)
        first, second = (
            torch.full((len(projections),), self.config.source_index(name), device=projections.device)
            for name in (source, target)
        )
        return self(projections, first, second).translations

    def check_pair(self, source: str, target: str) -> None:
        """Raises ValueError unless the model can translate from source to target."""
        self._check_names(source, target)
        if [source, target] not in self.config.aligners:
            raise ValueError(self._no_aligner(source, target))

    def _check_names(self, source: str, target: str) -> None:
        if self.config.source_index(source) == self.config.source_index(target):
            raise ValueError(f"Expected two different sources, found {source!r} twice.")

    def _no_aligner(self, source: str, target: str) -> str:
        pairs = ", ".join(f"{a} to {b}" for a, b in self.config.aligners) or "none"
        return (
            f"The model has no aligner from {source} to {target}; it has {pairs}. Fit one with train/align.py, or pass "
            f"a matrix to set_aligner({source!r}, {target!r}, w)."
        )


__all__ = [
    "CrossSpeciesForMaskedReconstruction",
    "CrossSpeciesForTranslation",
    "CrossSpeciesModel",
    "CrossSpeciesPreTrainedModel",
]
