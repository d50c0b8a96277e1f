"""Search for learning rate, warm-up, weight decay and frozen layers by the validation loss (extra `search`)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from .config import write_json
from .finetuning_run import train_classifier
from .loop import check_same_options
from .splits import Split

# Factor around the given learning rate that is searched in both directions
LEARNING_RATE_RANGE = 10


def search(config: Any, task: Any, tokenizer: Any, split: Split, accelerator: Any) -> Any:
    """The configuration of the best of `config.search_trials` trials, each trained in `trials/` of the output folder.

    Finished trials are kept in `trials/study.log`: a resumed run goes on after them.
    Raises  RunError if those were made with other options, FloatingPointError if no trial came to an end
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from transformers import AutoConfig

    n_layers = AutoConfig.from_pretrained(config.model).num_hidden_layers
    folder = Path(config.output) / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name="finetune",
        load_if_exists=True,
    )
    before = study.user_attrs.get("config")
    if before is None:
        study.set_user_attr("config", json.loads(json.dumps(dataclasses.asdict(config))))
    else:
        check_same_options(folder / "study.log", {**before, "search_trials": config.search_trials}, config)
    # Else a resumed search would draw again what it has tried.
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))

    def options(trial: Any) -> dict[str, Any]:
        rate = config.learning_rate
        found = {
            "learning_rate": trial.suggest_float(
                "learning_rate", rate / LEARNING_RATE_RANGE, rate * LEARNING_RATE_RANGE, log=True
            ),
            "warmup_steps": trial.suggest_float("warmup_steps", 0.0, 0.3),
            "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
        }
        if not config.lora_rank and not config.untrained:
            found["freeze"] = trial.suggest_int("freeze", 0, n_layers)
        return found

    def objective(trial: Any) -> float:
        chosen = options(trial)
        output = folder / str(trial.number)
        run = dataclasses.replace(config, **chosen, search_trials=0, output=str(output), resume=False, overwrite=False)
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        try:
            _, result = train_classifier(run, task, tokenizer, split, accelerator)
        finally:
            accelerator.free_memory()
            # The loss is what a trial is for; `metrics.jsonl` stays.
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
        loss = result.metrics["validation_loss"]
        shown = ", ".join(f"{k} {v:.3g}" for k, v in chosen.items())
        print(f"trial {trial.number + 1} of {config.search_trials}: {shown}: validation loss {loss:.4f}")
        return loss

    finished = sum(trial.state.is_finished() for trial in study.trials)
    study.optimize(objective, n_trials=max(config.search_trials - finished, 0), catch=(FloatingPointError,))
    if not any(trial.state.name == "COMPLETE" for trial in study.trials):
        raise FloatingPointError(f"The loss of all {len(study.trials)} trials diverged: lower learning_rate.")
    best = study.best_trial
    print("best: " + ", ".join(f"{k} {v:.3g}" for k, v in best.params.items()) + f" (loss {best.value:.4f})")
    write_json(folder / "best.json", {"params": best.params, "validation_loss": best.value})
    # Zero trials from here on: what is trained is one run with these options.
    return dataclasses.replace(config, **best.params, search_trials=0)
