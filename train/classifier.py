"""The network that is fine-tuned: loaded or untrained, frozen, quantized, with low-rank adapters; and plain again."""

import dataclasses
import warnings
from typing import Any

import torch

# Modules that low-rank adapters are put beside, as in Hu et al. 2021, "LoRA", section 4.2
LORA_TARGETS = ["query", "value"]
# Modules that a pre-trained encoder does not have: trained in full, never quantized
HEADS = ["bert.pooler", "classifier", "classifiers"]


def load_classifier(config: Any, task: Any) -> torch.nn.Module:
    """The task's classifier on the encoder that `config.model` names, ready to be trained.

    config  a FinetuneConfig
    """
    options = dict(task.model_options())
    if config.pooling is not None:
        options["classifier_pooling"] = config.pooling
    model_class = task.model_class()
    torch.manual_seed(config.seed)
    start = model_class.config_class.from_pretrained(config.model)
    if config.untrained:
        layers = {} if config.num_hidden_layers is None else {"num_hidden_layers": config.num_hidden_layers}
        model = model_class(type(start).from_dict({**start.to_dict(), **options, **layers}))
    else:
        # What is trained is float32, whatever the checkpoint is; a classifier of other labels does not fit and is new.
        kind = _quantization(config.quantize) or {"dtype": torch.float32}
        model = model_class.from_pretrained(config.model, **options, **kind, ignore_mismatched_sizes=True)
        if not _same_labels(start, options):
            _renew_heads(model)
    freeze_layers(model, config.freeze)
    if config.lora_rank:
        model = _with_adapters(model, config)
    return model


def _same_labels(start: Any, options: dict[str, Any]) -> bool:
    """Whether a checkpoint's classifier tells what is to be told."""
    if options["tasks"] or start.tasks:
        return start.tasks == options["tasks"]
    return start.id2label == options["id2label"] and start.label_name in (None, options["label_name"])


@torch.no_grad()
def _renew_heads(model: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(("classifier", "classifiers")):
            module.weight.normal_(0.0, model.config.initializer_range)
            module.bias.zero_()


def freeze_layers(model: Any, n_layers: int) -> None:
    """Keeps the embeddings and the first n layers as they are; 0 freezes nothing."""
    encoder = model.bert
    if n_layers:
        for module in (encoder.embeddings, *encoder.encoder.layer[:n_layers]):
            module.requires_grad_(False)


def plain_model(model: Any, config: Any, task: Any) -> Any:
    """The trained model without adapters: they are added into the weights, in full precision."""
    if not config.lora_rank:
        return model
    if config.quantize == "no":
        return model.merge_and_unload()
    # Merged into full-precision weights, since rounding the sum anew would change it.
    trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    full = load_classifier(dataclasses.replace(config, quantize="no"), task)
    unexpected = full.load_state_dict(trained, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return full.merge_and_unload()  # type: ignore[operator]


def _quantization(kind: str) -> dict[str, Any]:
    if kind == "no":
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32 if not torch.cuda.is_available() else torch.bfloat16,
        llm_int8_skip_modules=HEADS,
    )
    return {"quantization_config": four_bit}


def _with_adapters(model: Any, config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    # peft freezes all but what it adds, and takes single layers only.
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(tuple(HEADS))
    ]
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=heads,
    )
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, adapters)
