"""Drug response models of `drug_response.py` under the baselines' interface, and their pre-training."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from drug_response_data import Task

from cellglot.drug_response.baselines import Baseline, paired_changes
from cellglot.drug_response.data import ResponseData
from cellglot.drug_response.evaluation import predicted_responses
from cellglot.drug_response.predict import ResponsePredictor
from cellglot.modeling.drug_response import (
    DrugResponseConfig,
    DrugResponseForConditionalGeneration,
    DrugResponseForPreTraining,
)
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor
from cellglot.train.drug_response_data import MaskedProfiles, ResponsePairs
from cellglot.train.drug_response_options import tokens_of_profile
from cellglot.train.loop import LoopConfig, close, make_accelerator, train

# Sizes that hundreds of profiles can fill and a CPU can train
PROFILE = {"token_axis": "profile", "hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 256}
PROFILE |= {"num_attention_heads": 4, "decoder_size": 64, "decoder_layers": 1}
GENES = {
    "token_axis": "genes",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
GENES |= {"decoder_size": 16, "decoder_layers": 1}
# The authors' code, a quarter as wide. Fingerprints in place of its ids, which know no unseen drug; centred expression,
# and so no ReLU: raw log2 values around 8 are not reached in the hundreds of steps that there are data for.
LITERAL = {"hidden_size": 256, "intermediate_size": 1024, "decoder_size": 128, "nonnegative": False}
# One thread: workers run side by side.
LOOP = {"schedule": "cosine", "warmup_steps": 0.05, "learning_rate": 1e-3, "batch_size": 32, "cpu_threads": 1}


class TransformerResponse:
    """Trains a DrugResponseForConditionalGeneration on responses; predicts by it.

    preset    of DrugResponseConfig, overridden by `settings`
    encoder   weights of a pre-trained encoder, and the extractor it was trained with
    transfer  responses to train on first (BERT_transfer)
    additive  whether a model that predicts changes starts at the mean change of the training profiles, for all inputs
    """

    def __init__(
        self,
        name: str,
        epochs: float,
        *,
        preset: str = "small",
        settings: dict[str, Any] | None = None,
        drug_encoder: str = "fingerprint",
        scaling: str = "center",
        encoder: tuple[dict[str, torch.Tensor], ExpressionFeatureExtractor] | None = None,
        transfer: Sequence[ResponseData] = (),
        additive: bool = False,
        loop: dict[str, Any] | None = None,
        seed: int = 0,
    ):
        self.name, self.epochs, self.preset, self.settings = name, epochs, preset, dict(settings or {})
        self.drug_encoder, self.scaling, self.encoder, self.transfer = drug_encoder, scaling, encoder, list(transfer)
        self.additive, self.loop, self.seed = additive, dict(loop or {}), seed

    def fit(self, train: ResponseData) -> Self:
        parts = [*self.transfer, train]
        extractor = ExpressionFeatureExtractor.fit(train, scaling=self.scaling, drug_encoder=self.drug_encoder)
        if self.encoder is not None:
            extractor.mean, extractor.spread = self.encoder[1].mean, self.encoder[1].spread
        # Lines without treated profiles are predicted from their controls alone.
        extractor.cell_lines = sorted({str(line) for part in parts for line in part.cell_line[~part.is_control]})
        extractor.smiles = {drug: smiles for part in parts for drug, smiles in part.smiles.items()}
        config = DrugResponseConfig.from_preset(
            self.preset,
            n_genes=extractor.n_genes,
            n_drugs=len(extractor.drugs),
            n_cell_lines=len(extractor.cell_lines),
            drug_encoder=self.drug_encoder,
            fingerprint_size=extractor.fingerprint_size,
            **self.settings,
        )
        torch.manual_seed(self.seed)
        model = DrugResponseForConditionalGeneration(config)
        if self.encoder is not None:
            model.model.load_state_dict(self.encoder[0])
        if self.additive:
            change = paired_changes(train)[1].mean(axis=0) / np.array(extractor.spread)
            with torch.no_grad():
                model.decoder.output.weight.zero_()
                model.decoder.output.bias.copy_(torch.from_numpy(change).reshape(model.decoder.output.bias.shape))
        for part in parts:
            examples = ResponsePairs(part, extractor, config.training_input)
            self.seconds_per_epoch = run_loop(model, examples, config, self.epochs, self.seed, **self.loop)
        self.predictor = ResponsePredictor(model, extractor)
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        return self.predictor.predict(controls_ng, conditions)


def run_loop(model: Any, examples: Any, config: Any, epochs: float, seed: int, **loop: Any) -> float:
    """Trains by the loop of every method; seconds of an epoch."""
    with TemporaryDirectory() as folder:
        options = {**LOOP, **loop, "epochs": epochs, "seed": seed, "save_every": 10**9}
        settings = LoopConfig(**options, output=str(Path(folder) / "run"))
        accelerator = make_accelerator(settings)
        lengths = np.full(len(examples), tokens_of_profile(config))
        result = train(model, examples, lengths, examples.collate, settings, accelerator)
        close(accelerator)
    return result.seconds / (result.step * settings.batch_size / len(examples))


def chosen(make: Callable[[float], Baseline], task: Task, grid: Sequence[float]) -> tuple[Baseline, float]:
    """(the predictor trained on the whole training part, its epochs): those with the least squared error of the mean
    profiles of conditions that are held out within the training part. With one choice there is nothing to choose."""
    errors = []
    inner = task.train.select(task.inner.train)
    for epochs in grid if len(grid) > 1 else []:
        responses = predicted_responses(make(epochs).fit(inner), task.train, task.inner, by=task.by)
        squares = [np.square(r.true.mean(axis=0) - r.predicted.mean(axis=0)).mean() for r in responses.values()]
        errors.append(float(np.mean(squares)))
    best = grid[int(np.argmin(errors))] if errors else grid[0]
    return make(best).fit(task.train), best


# ---- pre-training


def pretrained(
    parts: Sequence[ResponseData],
    held_out: Sequence[np.ndarray],
    extractor: ExpressionFeatureExtractor,
    *,
    mask_ratio: float,
    tasks: Sequence[str] = ("mask",),
    start: dict[str, torch.Tensor] | None = None,
    epochs: float,
    seed: int,
) -> tuple[DrugResponseForPreTraining, float]:
    """(a model trained on the profiles of all parts that are not held out, seconds of an epoch).

    extractor  knows the drugs and lines that are told apart
    start      weights of an encoder to go on with (stage 2)
    """
    config = DrugResponseConfig.from_preset(
        "small",
        n_genes=extractor.n_genes,
        n_drugs=len(extractor.drugs),
        n_cell_lines=len(extractor.cell_lines),
        drug_encoder="fingerprint",
        fingerprint_size=extractor.fingerprint_size,
        tasks=list(tasks),
        mask_ratio=mask_ratio,
        **PROFILE,
    )
    torch.manual_seed(seed)
    model = DrugResponseForPreTraining(config)
    if start is not None:
        model.model.load_state_dict(start)
    kept = [part.select(~out) for part, out in zip(parts, held_out, strict=True)]
    examples = masked_profiles(kept, extractor, mask_ratio, tasks)
    return model, run_loop(model, examples, config, epochs, seed)


def masked_profiles(
    parts: Sequence[ResponseData], extractor: ExpressionFeatureExtractor, mask_ratio: float, tasks: Sequence[str]
) -> MaskedProfiles:
    """Profiles of all parts as examples, with the labels of the tasks."""
    expression = np.concatenate([extractor(part)["expression"] for part in parts])
    labels = [condition_labels(part, extractor) for part in parts]
    wanted = {name: np.concatenate([one[name] for one in labels]) for name in tasks if name != "mask"}
    return MaskedProfiles(expression, wanted, mask_ratio)


def condition_labels(data: ResponseData, extractor: ExpressionFeatureExtractor) -> dict[str, np.ndarray]:
    """cell_line and drug (n,) numbers, -100 where there is none; dose (n,) log10 of micromolar, NaN for controls."""
    lines, drugs = ({name: i for i, name in enumerate(names)} for names in (extractor.cell_lines, extractor.drugs))
    drug = [-100 if control else drugs.get(d, -100) for d, control in zip(data.drug, data.is_control, strict=True)]
    with np.errstate(divide="ignore"):
        dose = np.where(data.is_control, np.nan, np.log10(data.dose))
    return {
        "cell_line": np.array([lines.get(str(line), -100) for line in data.cell_line], dtype=np.int64),
        "drug": np.array(drug, dtype=np.int64),
        "dose": dose.astype(np.float32),
    }


def quiet() -> None:
    """Silences what is said of each small run: lines that are not known, genes that are missing."""
    logging.getLogger("cellglot").setLevel(logging.ERROR)
