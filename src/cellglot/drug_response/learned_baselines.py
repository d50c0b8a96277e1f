"""CPA, CPA_transfer and cVAE as baselines: `fit` trains them by the loop of every method, `predict` asks of controls.

They are trained to reconstruct each profile, controls too, under its own condition, and predict a control under
another's.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from cellglot.cell_stream import evaluating
from cellglot.drug_response.data import ResponseData
from cellglot.modeling.baselines import CpaConfig, CpaModel, CvaeConfig, CvaeModel
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor
from cellglot.train.loop import LoopConfig, close, make_accelerator, train

logger = logging.getLogger(__name__)

MODELS: dict[str, tuple[type, type]] = {"cpa": (CpaConfig, CpaModel), "cvae": (CvaeConfig, CvaeModel)}


class AutoencoderBaseline:
    """A CPA or cVAE, trained on responses.

    model_type    "cpa" or "cvae"
    name          what tables call it; the model type in capitals by default
    drug_encoder  "id" learns an embedding for each training drug and cannot predict others; "fingerprint" can
    transfer      responses to train on first, aligned by gene identifiers (CPA_transfer). A model that knows drugs by
                  number knows theirs as well
    settings      fields of the configuration
    loop          options of the training loop; its output is a temporary folder
    After `fit`: model, extractor; seconds_per_epoch of the training on `train`
    """

    def __init__(
        self,
        model_type: str,
        *,
        name: str | None = None,
        drug_encoder: str = "fingerprint",
        transfer: Sequence[ResponseData] = (),
        settings: dict[str, Any] | None = None,
        loop: dict[str, Any] | None = None,
    ):
        if model_type not in MODELS:
            raise ValueError(f"Expected a model among {', '.join(MODELS)}, found {model_type!r}.")
        self.model_type, self.drug_encoder = model_type, drug_encoder
        self.name = name or {"cpa": "CPA", "cvae": "cVAE"}[model_type]
        self.transfer = list(transfer)
        self.settings, self.loop = dict(settings or {}), dict(loop or {})

    def fit(self, train: ResponseData) -> Self:
        parts = [*self.transfer, train]
        self.extractor = ExpressionFeatureExtractor.fit(train, scaling="standardize", drug_encoder=self.drug_encoder)
        self.extractor.drugs = sorted({drug for part in parts for drug in part.drugs})
        self.extractor.cell_lines = sorted({str(line) for part in parts for line in part.cell_line})
        self.extractor.smiles = {drug: smiles for part in parts for drug, smiles in part.smiles.items()}
        config_class, model_class = MODELS[self.model_type]
        config = config_class(
            n_genes=self.extractor.n_genes,
            n_drugs=len(self.extractor.drugs),
            n_cell_lines=len(self.extractor.cell_lines),
            drug_encoder=self.drug_encoder,
            fingerprint_size=self.extractor.fingerprint_size,
            **self.settings,
        )
        torch.manual_seed(self.loop.get("seed", 0))
        self.model = model_class(config)
        for part in parts:
            self.seconds_per_epoch = self._train(part)
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        asked = self._conditions(conditions)
        inputs = {"expression": self.extractor.scale(controls_ng), **asked}
        if self.model_type == "cvae":
            inputs["is_control"] = np.ones(len(controls_ng), dtype=bool)
        with evaluating(self.model) as device, torch.no_grad():
            tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in inputs.items()}
            return self.extractor.inverse(self.model(**tensors).predictions)

    def _conditions(self, conditions: pd.DataFrame) -> dict[str, np.ndarray]:
        names = conditions["drug"].tolist(), conditions["cell_line"].tolist()
        return self.extractor.conditions(*names, conditions["dose"].to_numpy(), "uM")

    def _train(self, data: ResponseData) -> float:
        """Seconds of an epoch of training on a part."""
        examples = Examples(self._inputs(data))
        with TemporaryDirectory() as folder:
            options = {"warmup_steps": 0.05, "schedule": "cosine", "weight_decay": 0.0, **self.loop}
            config = LoopConfig(**options, output=str(Path(folder) / "run"), save_every=10**9)
            accelerator = make_accelerator(config)
            lengths = np.ones(len(examples), dtype=np.int64)
            result = train(self.model, examples, lengths, stacked, config, accelerator)
            close(accelerator)
        return result.seconds / (result.step * config.batch_size / len(examples))

    def _inputs(self, data: ResponseData) -> dict[str, torch.Tensor]:
        """(n, ...) tensors of all profiles; controls have no dose and no drug."""
        treated = ~data.is_control
        known = data.conditions(treated)
        found = self._conditions(known)
        if self.model_type == "cpa" and self.drug_encoder == "fingerprint":
            number = {drug: i for i, drug in enumerate(self.extractor.drugs)}
            found["drug"] = np.array([number[drug] for drug in known["drug"]], dtype=np.int64)
        lines = {line: i for i, line in enumerate(self.extractor.cell_lines)}
        inputs: dict[str, np.ndarray] = {}
        for name, values in found.items():
            inputs[name] = np.zeros((len(data), *values.shape[1:]), dtype=values.dtype)
            inputs[name][treated] = values
        inputs["dose"][~treated] = -np.inf
        inputs["cell_line"] = np.array([lines[str(line)] for line in data.cell_line], dtype=np.int64)
        inputs["expression"] = inputs["labels"] = np.asarray(self.extractor(data)["expression"], dtype=np.float32)
        return {name: torch.from_numpy(values) for name, values in inputs.items()}


class Examples:
    """Profiles as examples of the training loop."""

    def __init__(self, inputs: dict[str, torch.Tensor]):
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs["expression"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self.inputs.items()}


def stacked(rows: Sequence[dict[str, torch.Tensor]], keys: Any) -> dict[str, torch.Tensor]:
    """A batch of examples."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
