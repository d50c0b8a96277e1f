"""Predicted responses: what control cells would look like after a drug."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from cellglot.cell_stream import evaluating
from cellglot.drug_response.data import ResponseData
from cellglot.tokenization.drug_conditions import micromolar
from cellglot.tokenization.log_expression import open_cells

# Profiles that are predicted together
PROFILES_PER_BATCH = 64


class ResponsePredictor:
    """A trained model as a predictor of the benchmark: `predict(controls, conditions)`, both on the data's scale.

    model      DrugResponseForConditionalGeneration
    extractor  the ExpressionFeatureExtractor saved beside it
    """

    name = "drug response model"

    def __init__(self, model: Any, extractor: Any, *, profiles_per_batch: int = PROFILES_PER_BATCH):
        _check_belong_together(model, extractor)
        self.model, self.extractor, self.size = model, extractor, profiles_per_batch

    def predict(
        self,
        controls_ng: np.ndarray,
        conditions: pd.DataFrame,
        *,
        gene_ids: Sequence[str] | None = None,
        smiles: Mapping[str, str] | None = None,
    ) -> np.ndarray:
        """(n, genes of the model) float32 expression of each control after its condition.

        controls_ng  (n, g) unscaled expression of controls
        conditions   (n,) drug, cell_line and dose in micromolar
        gene_ids     (g,) identifiers of its columns; None: the model's genes in their order
        smiles       structures of drugs that the model was not trained with
        """
        return self.predict_scaled(self.extractor.scale(controls_ng, gene_ids), conditions, smiles=smiles)

    def predict_scaled(
        self, scaled: np.ndarray, conditions: pd.DataFrame, *, smiles: Mapping[str, str] | None = None
    ) -> np.ndarray:
        """As `predict`, from (n, genes of the model) expression as the extractor scales it."""
        asked = self.extractor.conditions(
            conditions["drug"], conditions["cell_line"], conditions["dose"], "uM", smiles=smiles
        )
        parts = []
        with evaluating(self.model) as device:
            for start in range(0, len(scaled), self.size):
                part = slice(start, start + self.size)
                inputs = {name: torch.from_numpy(values[part]).to(device) for name, values in asked.items()}
                expression = torch.from_numpy(scaled[part]).to(device)
                parts.append(self.extractor.inverse(self.model(expression=expression, **inputs).predictions))
        return np.concatenate(parts) if parts else np.empty((0, self.extractor.n_genes), dtype=np.float32)


def predict_response(
    controls: Any,
    model: Any,
    feature_extractor: Any,
    *,
    drug: str | Sequence[str],
    dose: float | Sequence[float],
    dose_unit: str | None = None,
    cell_line: str | None = None,
    smiles: Mapping[str, str] | None = None,
    layer: str | None = None,
    gene_ids: Sequence[str] | None = None,
) -> Any:
    """Control cells as they would be after each drug at each dose.

    controls           untreated cells: AnnData, path of an `.h5ad` or another count file, or a ResponseData. Where obs
                       or the ResponseData says which profiles are controls (is_control), the others are left out
    model              a DrugResponseForConditionalGeneration; runs where its weights are
    feature_extractor  the ExpressionFeatureExtractor saved beside it
    drug, dose         one or several of each; all pairs are predicted
    dose_unit          "nM", "uM", "mM"; there is no default
    cell_line          name of the cells' line or type; None: column cell_line, cell_id or cell_type of obs
    smiles             drug -> structure, for drugs that the model was not trained with (drug_encoder="fingerprint")
    layer, gene_ids    of an AnnData or file, in place of X and of the identifiers in `var`
    Returns            AnnData. X: (controls x drugs x doses, genes of the model) float32 on the scale of the training
                       data (log2 for L1000, log(1 + x) for counts); obs: drug, cell_line, dose_um, is_control (False)
                       and the `control` each came from; uns["response"] says how
    Raises             ValueError for an unknown drug or structure, a dose without unit, negative or 0, no controls,
                       genes that do not match, and a model and an extractor that do not belong together
    """
    import anndata as ad

    predictor = ResponsePredictor(model, feature_extractor)
    scaled, obs = _controls(controls, feature_extractor, layer, gene_ids)
    lines = _cell_lines(obs, cell_line)
    drugs = [drug] if isinstance(drug, str) else list(drug)
    doses = micromolar(dose, dose_unit)
    if not len(drugs) or not len(doses):
        raise ValueError(f"Expected a drug and a dose at least, found {len(drugs)} drugs and {len(doses)} doses.")
    parts, annotations = [], []
    for name in drugs:
        for amount in doses:
            conditions = pd.DataFrame({"drug": name, "cell_line": lines, "dose": amount})
            parts.append(predictor.predict_scaled(scaled, conditions, smiles=smiles))
            annotations.append(conditions.rename(columns={"dose": "dose_um"}).assign(control=obs.index.astype(str)))
    table = pd.concat(annotations, ignore_index=True).assign(is_control=False)
    table.index = table["control"] + " + " + table["drug"] + " " + table["dose_um"].map("{:g}".format) + " uM"
    genes = pd.DataFrame(feature_extractor.genes, index=feature_extractor.gene_ids)
    found = ad.AnnData(np.concatenate(parts), obs=table, var=genes)
    found.uns["response"] = {
        "expression": "predicted by a drug response model",
        "model": str(model.config._name_or_path),
        "scale": "as measured (log2 for L1000)"
        if feature_extractor.target_sum is None
        else "log(1 + counts per 10,000)",
    }
    return found


def _controls(
    controls: Any, extractor: Any, layer: str | None, gene_ids: Sequence[str] | None
) -> tuple[np.ndarray, pd.DataFrame]:
    """(scaled expression of the controls, their obs)."""
    if isinstance(controls, ResponseData):
        wanted = controls.select(controls.is_control)
        scaled, obs = extractor(wanted)["expression"], wanted.obs
    else:
        with open_cells(controls, layer=layer) as matrix:
            scaled, obs = extractor(matrix, gene_ids=gene_ids)["expression"], matrix.obs
            if "is_control" in obs:
                kept = obs["is_control"].astype(str).str.lower().isin(("true", "1")).to_numpy()
                scaled, obs = scaled[kept], obs[kept]
    if not len(obs):
        raise ValueError("Expected control cells to start from, found none (obs['is_control'] is false of all).")
    return scaled, obs


def _cell_lines(obs: pd.DataFrame, cell_line: str | None) -> np.ndarray:
    if cell_line is not None:
        return np.full(len(obs), cell_line)
    column = next((name for name in ("cell_line", "cell_id", "cell_type") if name in obs), None)
    if column is None:
        raise ValueError(
            f"obs has no cell_line, cell_id or cell_type; it has {', '.join(map(str, obs)) or 'no columns'}. Name the "
            'line of the cells: cell_line="A549".'
        )
    return obs[column].astype(str).to_numpy()


def _check_belong_together(model: Any, extractor: Any) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "drug_response" or not hasattr(model, "conditions"):
        raise ValueError(
            f"Expected a DrugResponseForConditionalGeneration, found {type(model).__name__}. "
            "DrugResponseForConditionalGeneration.from_pretrained(path) loads one; train/finetune.py makes one."
        )
    if not hasattr(extractor, "conditions"):
        raise ValueError(
            f"Expected an ExpressionFeatureExtractor, found {type(extractor).__name__}. Load the one beside the model "
            "with ExpressionFeatureExtractor.from_pretrained(path)."
        )
    names = ("n_genes", "drug_encoder", "n_cell_lines") + (("n_drugs",) if config.drug_encoder == "id" else ())
    ours = {
        "n_genes": extractor.n_genes,
        "n_drugs": len(extractor.drugs),
        "n_cell_lines": len(extractor.cell_lines),
        "drug_encoder": extractor.drug_encoder,
    }
    different = [
        f"{name} {getattr(config, name)!r} and {ours[name]!r}" for name in names if getattr(config, name) != ours[name]
    ]
    if different:
        raise ValueError(
            f"Model and feature extractor do not belong together: {'; '.join(different)}. Load both from one directory."
        )
