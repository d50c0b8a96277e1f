"""Fine-tunes a drug response model: control cells and a condition in, treated cells out (Tan, Wang, Zhang; 3.2).

    accelerate launch train/finetune.py --recipe train/recipes/finetune_drug_response_small.yaml --data l1000.h5ad
    accelerate launch train/finetune.py --recipe train/recipes/finetune_drug_response_base.yaml \\
        --data data/sciplex3 --model runs/drug-response-base/model

With `--hold_out_drugs N`, N drugs are never trained on; with `--hold_out_cell_line` and `--hold_out_donor`, no treated
cells of that type or donor. On these the model is compared with the simplest predictions. Leaves in the output folder:
`model/` (a complete model directory with a card), `report.json`, `metrics.jsonl`, `run.json`, `checkpoints/`.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

from cellglot.drug_response.baselines import Additive, ControlMean, TreatedMean
from cellglot.drug_response.data import ResponseData
from cellglot.drug_response.evaluation import predicted_responses
from cellglot.drug_response.predict import ResponsePredictor
from cellglot.drug_response.reading import read_responses
from cellglot.drug_response.splits import ResponseSplit, hold_out_drugs, hold_out_type_and_donor
from cellglot.hub import reading
from cellglot.metrics.response import change_correlation, correlation
from cellglot.modeling.drug_response import DrugResponseConfig, DrugResponseForConditionalGeneration
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor, ExpressionReport
from cellglot.train.config import option, parse_config
from cellglot.train.drug_response_data import ResponsePairs
from cellglot.train.drug_response_options import DrugResponseOptions, tokens_of_profile
from cellglot.train.drug_response_report import write_finetuning_report
from cellglot.train.loop import LoopConfig, RunError, close, make_accelerator, mean_loss, train
from cellglot.train.output_folder import abandon_output, keep_output, prepare_output
from cellglot.train.publishing import publish_run


@dataclass
class DrugResponseFinetuneConfig(DrugResponseOptions, LoopConfig):
    """Options of fine-tuning."""

    method: Literal["drug_response"] = option("drug_response", "what is trained")
    data: str | None = option(None, ".h5ad, .gctx or .gct file, or folder of lincs_l1000.py or sciplex3.py")
    layout: str | None = option(None, "which columns hold drug, line and dose (see cellglot.drug_response.reading)")
    layer: str | None = option(None, "layer of an .h5ad file; absent: X")
    counts: bool | None = option(None, "values are raw counts; absent: as the layout has it")
    genes: str | None = option(None, "text file with identifiers of the genes to model, one a line; absent: all")
    model: str | None = option(None, "pre-trained model to start from; absent: random weights")
    hold_out_drugs: int = option(0, "drugs to test on, drawn by the seed; 0: none")
    hold_out_cell_line: str | None = option(None, "cell line or type to test on, of hold_out_donor; neither is treated")
    hold_out_donor: str | None = option(None, "donor to test on, with hold_out_cell_line")
    validation_drugs: int = option(0, "drugs of the rest to validate on, for patience and eval_every")

    training_input: Literal["control", "self"] | None = option(
        None, "what enters in training: a control of the same line, or the treated profile itself; absent: the preset's"
    )
    decoder: Literal["lstm", "mlp"] | None = option(None, "decoder over the tokens; absent: the preset's")
    drug_encoder: Literal["id", "fingerprint"] = option(
        "fingerprint", "an embedding for each drug, or its structure: only that can do drugs that were not trained on"
    )
    fingerprint_size: int = option(1024, "bits of the Morgan fingerprints")
    predicts: Literal["expression", "change"] | None = option(
        None, "expression, or its change from what enters; absent: the preset's"
    )

    cell_line_dropout: float | None = option(
        None, "share of the profiles whose line is withheld, for lines that were not trained on; absent: the preset's"
    )
    response_loss: Literal["squared", "robust"] | None = option(
        None, "squared error, or one that the profiles that change most weigh less in; absent: the preset's"
    )

    output: str = option("runs/drug-response-finetuned", "folder of the run: checkpoints, log, model")
    epochs: float = option(20, "passes over the treated profiles")
    batch_size: int = option(512, "profiles of an optimizer step, over all processes")
    learning_rate: float = option(5e-4, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: float = option(0.05, "steps of linear warm-up; below 1, a share of all steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold_out_drugs < 0 or self.validation_drugs < 0:
            raise ValueError("hold_out_drugs and validation_drugs cannot be negative.")
        if (self.hold_out_cell_line is None) != (self.hold_out_donor is None):
            raise ValueError("hold_out_cell_line and hold_out_donor go together.")
        if self.hold_out_drugs and self.hold_out_donor is not None:
            raise ValueError("hold_out_drugs and hold_out_donor exclude each other.")
        if bool(self.validation_drugs) != bool(self.patience or self.eval_every):
            raise ValueError("validation_drugs are what patience and eval_every measure: give both or neither.")
        if self.drug_encoder == "id" and (self.hold_out_drugs or self.validation_drugs):
            raise ValueError('drugs that were held out have no id embedding: pass --drug_encoder "fingerprint".')
        try:
            DrugResponseConfig(**self.generation_options(), n_drugs=1)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def generation_options(self) -> dict[str, Any]:
        """Fields of the model's configuration: those of the preset, and what was chosen in their place."""
        names = ("training_input", "decoder", "predicts", "cell_line_dropout", "response_loss")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        fixed = {"drug_encoder": self.drug_encoder, "fingerprint_size": self.fingerprint_size}
        return self.model_options() | chosen | fixed


def read_data(config: DrugResponseFinetuneConfig) -> ResponseData:
    """The responses of `--data`.

    Raises  ValueError or OSError for data that cannot be used
    """
    if config.data is None:
        raise ValueError("no responses were given, and none ship with cellglot: pass --data FILE.")
    names = None if config.genes is None else Path(config.genes).read_text(encoding="utf-8").split()
    data = read_responses(config.data, layout=config.layout, layer=config.layer, counts=config.counts, genes=names)
    if config.drug_encoder == "fingerprint":
        absent = [drug for drug in data.drugs if drug not in data.smiles]
        if absent:
            raise ValueError(
                f"{data.name} has no structure of {len(absent):,} of {len(data.drugs):,} drugs (e.g. {absent[0]!r}): "
                "leave their profiles out, or pass --drug_encoder id."
            )
    return data


def make_extractor(config: DrugResponseFinetuneConfig, train: ResponseData) -> ExpressionFeatureExtractor:
    """Genes of the pre-trained model, or of the data; scaling, drugs and lines of the training profiles.

    Scaled anew, so that 0 is the mean of these treated profiles and not of those of pre-training, which may be of
    another kind: L1000 before cells.
    """
    settings: dict[str, Any] = {"drug_encoder": config.drug_encoder, "fingerprint_size": config.fingerprint_size}
    if config.model is None:
        return ExpressionFeatureExtractor.fit(train, scaling=config.scaling, **settings)
    with reading(config.model):
        start = ExpressionFeatureExtractor.from_pretrained(config.model)
    aligned, _ = aligned_to(start, train)
    fitted = ExpressionFeatureExtractor.fit(aligned, scaling=start.scaling, **settings)
    fitted.genes = start.genes
    return fitted


def aligned_to(extractor: ExpressionFeatureExtractor, data: ResponseData) -> tuple[ResponseData, np.ndarray]:
    """(the data, on their own scale, over the genes of an extractor; (g,) bool, which of these they have).

    Genes that they lack are 0, and so is their mean, so that scaling leaves them at 0.
    """
    report = ExpressionReport()
    plain = ExpressionFeatureExtractor.from_genes(extractor.genes, target_sum=data.target_sum)
    expression = plain(data, report=report)["expression"]
    genes = pd.DataFrame(extractor.genes, index=pd.Index(extractor.gene_ids))
    measured = ~np.isin(extractor.gene_ids, report.missing)
    return dataclasses.replace(data, expression=expression, genes=genes), measured


def make_model(
    config: DrugResponseFinetuneConfig, extractor: ExpressionFeatureExtractor
) -> DrugResponseForConditionalGeneration:
    """The pre-trained encoder with new condition encoders and decoder, or all of it new."""
    torch.manual_seed(config.seed)
    sizes = {
        "n_genes": extractor.n_genes,
        "n_drugs": len(extractor.drugs),
        "n_cell_lines": len(extractor.cell_lines),
    }
    options: dict[str, Any] = config.generation_options() | sizes
    if config.model is None:
        return DrugResponseForConditionalGeneration(DrugResponseConfig(**options))
    # The encoder's own sizes are the checkpoint's.
    encoder = ("token_axis", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    options = {name: value for name, value in options.items() if name not in encoder}
    model = DrugResponseForConditionalGeneration.from_pretrained(config.model, **options, ignore_mismatched_sizes=True)
    return model.train()


def held_out_figures(model: Any, extractor: Any, data: ResponseData, split: ResponseSplit) -> list[dict[str, Any]]:
    """Rows of predictor, mean Pearson of means, of changes from the mean control, and squared error, over conditions.

    Baselines are fitted on the training part. Genes of the model that the data lack do not count.
    """
    aligned, measured = aligned_to(extractor, data)
    train = aligned.select(split.train)
    baselines = (ControlMean(), TreatedMean(), Additive())
    predictors: list[Any] = [*(baseline.fit(train) for baseline in baselines), ResponsePredictor(model, extractor)]
    # Changes are from the controls that the condition is paired with, where these are of another donor.
    control_by = ("cell_line", "donor") if "donor" in aligned.pair_by else ("cell_line",)
    rows = []
    for predictor in predictors:
        figures = []
        for response in predicted_responses(predictor, aligned, split, control_by=control_by).values():
            true, predicted, control = (
                values[:, measured].mean(axis=0, dtype=np.float64)
                for values in (response.true, response.predicted, response.control)
            )
            mse = float(np.mean((true - predicted) ** 2))
            figures.append((correlation(true, predicted), change_correlation(true, predicted, control), mse))
        name = "this model" if isinstance(predictor, ResponsePredictor) else predictor.name
        rows.append({"predictor": name, **dict(zip(("mean", "delta", "mse"), np.mean(figures, axis=0), strict=True))})
    return rows


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DrugResponseFinetuneConfig, argv, description=__doc__)
    # Its report of newly initialized decoders is what fine-tuning is about.
    transformers_logging.set_verbosity_error()
    try:
        accelerator = make_accelerator(config)
        output = prepare_output(config, accelerator)
        try:
            data = read_data(config)
            split = make_split(config, data)
            rest = data.select(split.train)
            inner = hold_out_drugs(rest, config.validation_drugs, seed=config.seed) if config.validation_drugs else None
            training = rest if inner is None else rest.select(inner.train)
            extractor = make_extractor(config, training)
            model = make_model(config, extractor)
            examples = ResponsePairs(training, extractor, model.config.training_input)
            validation = None
            if inner is not None:
                validation = ResponsePairs(rest.select(inner.test | rest.is_control), extractor)
        except BaseException:
            abandon_output(output, accelerator)
            raise
        keep_output(output, accelerator)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"finetune.py: {error}")
    n_tokens = tokens_of_profile(model.config)
    accelerator.print(
        f"Drug response model, {model.num_parameters() / 1e6:.1f}M parameters, on {len(examples):,} treated profiles "
        f"of {data.name}, {len(training.drugs):,} drugs, {len(extractor.cell_lines):,} cell lines"
    )

    def validate(model: torch.nn.Module) -> dict[str, float]:
        assert validation is not None
        options: dict[str, Any] = {"max_tokens": config.max_tokens, "batch_size": min(config.batch_size, 256)}
        lengths = np.full(len(validation), n_tokens)
        loss = mean_loss(model, validation, lengths, validation.collate, accelerator, **options)
        return {"validation_loss": loss}

    try:
        result = train(
            model,
            examples,
            np.full(len(examples), n_tokens),
            examples.collate,
            config,
            accelerator,
            validate=None if validation is None else validate,
            facts={"data": data.name, "held_out": split.held_out, "device": str(accelerator.device)},
        )
    except (RunError, FloatingPointError) as error:
        sys.exit(f"finetune.py: {error}")
    if accelerator.is_main_process:
        tested = bool(split.test.any())
        report = {
            "n_parameters": model.num_parameters(),
            "steps": result.step,
            "seconds": round(result.seconds, 1),
            "n_train": len(examples),
            "n_conditions": len(data.conditions(split.test)[["drug", "cell_line"]].drop_duplicates()) if tested else 0,
            "held_out": held_out_name(split),
            "example": {"drug": training.drugs[0], "line": extractor.cell_lines[0]},
            "figures": held_out_figures(model, extractor, data, split) if tested else [],
        }
        write_finetuning_report(model, extractor, report, config, output, description=data.name)
    close(accelerator, model)
    publish_run(config, accelerator)


def make_split(config: DrugResponseFinetuneConfig, data: ResponseData) -> ResponseSplit:
    """What is held out as asked; all profiles to train on where nothing is.

    Raises  ValueError for what is not there, or if a line that is tested on has no controls to predict from
    """
    everything = np.ones(len(data), dtype=bool)
    split = ResponseSplit(everything, ~everything, [])
    if config.hold_out_drugs:
        split = hold_out_drugs(data, config.hold_out_drugs, seed=config.seed)
    elif config.hold_out_cell_line is not None and config.hold_out_donor is not None:
        split = hold_out_type_and_donor(data, config.hold_out_cell_line, config.hold_out_donor)
    for row in np.flatnonzero(split.test):
        data.pairs.candidates(int(row))
    return split


def held_out_name(split: ResponseSplit) -> str:
    """What was held out, in a few words."""
    if not split.test.any():
        return "nothing"
    return split.held_out[0] if len(split.held_out) == 1 else f"{len(split.held_out)} drugs"
