"""Pre-trains a drug response model on L1000 profiles or cells (Tan, Wang, Zhang; section 3.2).

Stage 1 hides genes and regresses them; stage 2 goes on with that model, and also tells cell line, drug and dose:

    accelerate launch train/pretrain.py --recipe train/recipes/drug_response_small.yaml --data l1000.h5ad
    accelerate launch train/pretrain.py --recipe train/recipes/drug_response_base.yaml --data data/lincs_l1000
    accelerate launch train/pretrain.py --recipe train/recipes/drug_response_base.yaml --data data/lincs_l1000 \\
        --model runs/drug-response-base/model --tasks mask cell_line drug dose --output runs/drug-response-four-tasks

Leaves in the output folder: `model/` (a complete model directory: weights, config, feature extractor, code, card with
figures), `metrics.jsonl`, `run.json`, `report.json`, `checkpoints/`, `data/` (the profiles, aligned, memory-mapped).
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from cellglot.modeling.drug_response import DrugResponseConfig, DrugResponseForPreTraining
from cellglot.train.config import option, parse_config
from cellglot.train.drug_response_options import DrugResponseOptions, tokens_of_profile
from cellglot.train.drug_response_profiles import PretrainingProfiles, prepare_profiles
from cellglot.train.drug_response_report import write_pretraining_report
from cellglot.train.loop import LoopConfig, RunError, close, make_accelerator, mean_loss, train
from cellglot.train.output_folder import abandon_output, keep_output, prepare_output
from cellglot.train.publishing import publish_run

# Masks drawn of every validation profile
VALIDATION_SEEDS = (1_000_003, 1_000_004)


@dataclass
class DrugResponsePretrainConfig(DrugResponseOptions, LoopConfig):
    """Options of pre-training."""

    method: Literal["drug_response"] = option("drug_response", "what is trained")
    data: list[str] = option(
        [], ".h5ad, .gctx or .gct files, or folders of lincs_l1000.py or sciplex3.py; the genes that all have are used"
    )
    layout: str | None = option(None, "which columns hold drug, line and dose (see cellglot.drug_response.reading)")
    layer: str | None = option(None, "layer of .h5ad files; absent: X")
    counts: bool | None = option(None, "values are raw counts; absent: as the layout has it")
    split_by: str | None = option(None, "column of obs whose groups are held out whole; absent: by profile")
    validation_fraction: float = option(0.1, "share of the profiles (or groups) held out")
    max_validation_profiles: int = option(5_000, "held-out profiles that figures are measured on, at the most")

    model: str | None = option(None, "model to go on with: of stage 1, for stage 2; absent: random weights")
    tasks: list[str] = option(["mask"], "what is learnt: mask, and in stage 2 also cell_line, drug, dose")
    mask_ratio: float = option(0.15, "share of the genes to hide (paper: 0.15 and 0.8)")
    mask_loss: Literal["masked", "all"] | None = option(
        None, "error of the hidden genes, or of all (the authors' code); absent: the preset's"
    )
    report: bool = option(True, "figures beside baselines at the end")

    output: str = option("runs/drug-response", "folder of the run: checkpoints, log, model")
    epochs: float = option(100, "passes over the training profiles")
    batch_size: int = option(2048, "profiles of an optimizer step, over all processes")
    learning_rate: float = option(1e-4, "maximum learning rate")
    warmup_steps: float = option(0.05, "steps of linear warm-up; below 1, a share of all steps")
    eval_every: int = option(200, "steps between validations; 0: only at the end")
    save_every: int = option(1000, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_fraction < 1:
            raise ValueError("validation_fraction must lie between 0 and 1.")
        if self.max_validation_profiles < 1:
            raise ValueError(f"max_validation_profiles must be positive, found {self.max_validation_profiles}.")
        try:
            new_config(self, n_genes=1, n_drugs=1, n_cell_lines=1)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def free_options(self) -> set[str]:
        """Where profiles attend to each other, `max_tokens` decides which do."""
        return super().free_options() - ({"max_tokens"} if self.attends_across_profiles else set())


def new_config(config: DrugResponsePretrainConfig, **sizes: int) -> DrugResponseConfig:
    """Configuration of a model that starts from random weights."""
    options: dict[str, Any] = config.model_options() | sizes
    options |= {"tasks": list(config.tasks), "mask_ratio": config.mask_ratio}
    if config.mask_loss is not None:
        options["mask_loss"] = config.mask_loss
    return DrugResponseConfig(**options)


def make_model(config: DrugResponsePretrainConfig, data: PretrainingProfiles) -> DrugResponseForPreTraining:
    """The model of `--model` with the tasks of this stage, or a new one.

    Raises  OSError for no model there, ValueError for one of other genes
    """
    sizes = {
        "n_genes": data.extractor.n_genes,
        "n_drugs": len(data.extractor.drugs),
        "n_cell_lines": len(data.extractor.cell_lines),
    }
    torch.manual_seed(config.seed)
    if config.model is None:
        return DrugResponseForPreTraining(new_config(config, **sizes))
    changed: dict[str, Any] = {"tasks": list(config.tasks), "mask_ratio": config.mask_ratio}
    if config.mask_loss is not None:
        changed["mask_loss"] = config.mask_loss
    # Heads for other numbers of drugs or lines start anew.
    return DrugResponseForPreTraining.from_pretrained(
        config.model, **sizes, **changed, ignore_mismatched_sizes=True
    ).train()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DrugResponsePretrainConfig, argv, description=__doc__)
    try:
        accelerator = make_accelerator(config)
        if not config.data:
            raise ValueError(
                "no profiles were given, and none ship with cellglot. Build those of LINCS, python "
                "datasets_scripts/lincs_l1000.py --config phase2_level3 --output data/lincs_l1000, and pass --data "
                "data/lincs_l1000; or pass files of your own."
            )
        output = prepare_output(config, accelerator)
        try:
            data = prepare_profiles(config, output / "data", is_main_process=accelerator.is_main_process)
            model = make_model(config, data)
        except BaseException:
            abandon_output(output, accelerator)
            raise
        keep_output(output, accelerator)
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: {error}")
    n_tokens = tokens_of_profile(model.config)
    examples = data.examples(data.train, config.tasks, config.mask_ratio)
    measured = np.random.default_rng(0).permutation(np.flatnonzero(~data.train))[: config.max_validation_profiles]
    validation = data.examples(np.isin(np.arange(len(data.obs)), measured), config.tasks, config.mask_ratio)
    accelerator.print(
        f"Drug response model, {model.num_parameters() / 1e6:.1f}M parameters, token_axis {model.config.token_axis}, "
        f"on {data.description}: {len(examples):,} training and {len(validation):,} validation profiles of "
        f"{model.config.n_genes:,} genes; tasks: {', '.join(config.tasks)}"
    )

    def validate(model: torch.nn.Module) -> dict[str, float]:
        loss = mean_loss(
            model,
            validation,
            np.full(len(validation), n_tokens),
            validation.collate,
            accelerator,
            max_tokens=config.max_tokens,
            batch_size=min(config.batch_size, 256),
            seeds=VALIDATION_SEEDS,
            count_items=count_profiles,
        )
        return {"validation_loss": loss}

    facts = {
        "data": {"source": data.description, "fingerprint": data.fingerprint},
        "n_processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "device": str(accelerator.device),
        "torch_threads": torch.get_num_threads(),
    }
    try:
        result = train(
            model,
            examples,
            np.full(len(examples), n_tokens),
            examples.collate,
            config,
            accelerator,
            validate=validate,
            count_items=count_profiles,
            facts=facts,
        )
    except (RunError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    if accelerator.is_main_process:
        write_pretraining_report(model, data, validation, config, result, output)
    close(accelerator, model)
    publish_run(config, accelerator)


def count_profiles(batch: dict[str, Any]) -> int:
    """Profiles of a batch, over which its loss is a mean."""
    return len(batch["expression"])


if __name__ == "__main__":
    main()
