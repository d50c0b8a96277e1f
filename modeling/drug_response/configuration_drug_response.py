"""`DrugResponseConfig`: genes, conditions, sizes and tasks of a drug response model, with presets."""

import dataclasses
import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Written into every saved configuration, so that each Auto class finds its model with trust_remote_code=True and
# without cellglot. transformers itself would name only the class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_drug_response.DrugResponseConfig",
    "AutoModel": "modeling_drug_response.DrugResponseModel",
    "AutoModelForPreTraining": "modeling_drug_response.DrugResponseForPreTraining",
}
GENERATION_CLASS = "modeling_drug_response.DrugResponseForConditionalGeneration"
TASKS = ("mask", "cell_line", "drug", "dose")

PRESETS: dict[str, dict[str, Any]] = {
    # BERT-base over the landmark genes, which are its tokens
    "base": {"token_axis": "genes"},
    # What the authors' released code does, see `modeling_drug_response`
    "literal": {
        "training_input": "self",
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 4096,
        "decoder_size": 512,
        "decoder_layers": 4,
        "mask_loss": "all",
        "dose_encoder": "weight",
        "predicts": "expression",
        "nonnegative": True,
    },
    # Hundreds of profiles, minutes on a CPU
    "small": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "decoder_size": 32,
        "decoder_layers": 1,
    },
}


@strict
class DrugResponseConfig(PreTrainedConfig):
    """Configuration of a drug response model. The defaults are the sizes of BERT-base, a token a profile.

    Raises  on construction: a value of the wrong type, a width that the heads do not divide, unknown or no tasks, or a
            misspelt key
    """

    model_type = "drug_response"
    _auto_class = "AutoConfig"

    # Genes of a profile, as of the ExpressionFeatureExtractor beside the model; L1000 has 978 landmark genes
    n_genes: int = 978
    # Drugs and cell lines that the extractor knows by number. 0: none (one-task pre-training, fingerprints)
    n_drugs: int = 0
    n_cell_lines: int = 0
    # "profile": a token a profile (the authors' code). "genes": a token a gene, which costs n_genes times as much and
    # predicts no better where that could be measured (a thousand profiles)
    token_axis: Literal["genes", "profile"] = "profile"
    # With token_axis="profile": whether the profiles of a batch attend to each other (the authors' four-task variant)
    attends_across_profiles: bool = False
    # What enters when the response of a treated cell is learnt: a control of its cell line, or the treated cell itself
    # (the authors' code). When predicting, always a control.
    training_input: Literal["control", "self"] = "control"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    # Pre-training: what is learnt (stage 1: mask; stage 2: all four), the share of the genes that is hidden (paper:
    # 0.15 and 0.8), and whether the loss is over the hidden genes (the text) or over all (the authors' code)
    tasks: list[str] = dataclasses.field(default_factory=lambda: ["mask"])
    mask_ratio: float = 0.15
    mask_loss: Literal["masked", "all"] = "masked"
    # How a drug enters: an embedding learnt for each, or the bits of its Morgan fingerprint (any drug)
    drug_encoder: Literal["id", "fingerprint"] = "id"
    fingerprint_size: int = 1024
    # "mlp": log10(dose in uM) through an MLP, added. "weight": it multiplies the drug's embedding (the authors' code)
    dose_encoder: Literal["mlp", "weight"] = "mlp"
    # Share of the training profiles whose cell line is withheld, so that lines that are not known can be predicted from
    # their controls alone
    cell_line_dropout: float | int = 0.1
    condition_dropout: float | int = 0.1
    # Bidirectional LSTM over the tokens, or an MLP for each token (paper, Table 3)
    decoder: Literal["lstm", "mlp"] = "lstm"
    # Width of the LSTM in each direction, or half that of the MLP
    decoder_size: int = 384
    decoder_layers: int = 2
    # Whether the decoder gives expression itself, or the change from the profile that enters
    predicts: Literal["expression", "change"] = "expression"
    # "squared": mean squared error (the paper). "robust": grows with the root of a profile's mean squared error beyond
    # `robust_width`, so that the few profiles that change most do not decide what is predicted for all. The width is in
    # units of scaled expression, of which a treated profile's root mean square is about 1
    response_loss: Literal["squared", "robust"] = "squared"
    robust_width: float | int = 2.0
    # ReLU behind the decoder (the authors' code): for expression that was not centred
    nonnegative: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        names = [field.name for field in dataclasses.fields(self)]
        for key in kwargs:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"DrugResponseConfig has no {key!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        if "DrugResponseForConditionalGeneration" in (self.architectures or []):
            # No Auto class is for cells to cells; this one loads whichever of the two was saved.
            self.auto_map["AutoModelForPreTraining"] = GENERATION_CLASS

    def validate_architecture(self) -> None:
        """Heads divide the width, sizes are positive, rates are shares."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if not self.robust_width > 0:
            raise ValueError(f"Expected robust_width above 0, found {self.robust_width}.")
        for name in ("n_genes", "fingerprint_size", "decoder_size", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of 1 or more, found {getattr(self, name)}.")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"Expected mask_ratio between 0 and 1, found {self.mask_ratio}.")
        for name in ("cell_line_dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Expected {name} from 0 to below 1, found {getattr(self, name)}.")
        if self.attends_across_profiles and self.token_axis != "profile":
            raise ValueError('attends_across_profiles needs token_axis="profile": gene tokens attend within a profile.')
        if self.nonnegative and self.predicts == "change":
            raise ValueError('nonnegative cuts off what goes down: it needs predicts="expression".')

    def validate_tasks(self) -> None:
        """Tasks are known, named once, and have something to tell apart."""
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"Expected tasks among {', '.join(TASKS)}, each once; found {self.tasks}.")
        for task, n in (("drug", self.n_drugs), ("cell_line", self.n_cell_lines)):
            if task in self.tasks and n < 1:
                raise ValueError(f"Task {task!r} needs n_{task}s, the number there are to tell apart; found {n}.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DrugResponseConfig":
        """Configuration of "base" (BERT-base), "literal" (the authors' released code) or "small", fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"Expected a preset among {', '.join(PRESETS)}, found {name!r}.")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["AUTO_MAP", "PRESETS", "TASKS", "DrugResponseConfig"]
