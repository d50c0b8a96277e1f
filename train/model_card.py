"""What all model cards share: metadata that the Hub reads, with the run's own figures as `model-index`."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from cellglot.hub import is_name


def measured(
    task: tuple[str, str], data: str, split: str, metrics: Iterable[tuple[str, str, float | None]]
) -> list[EvalResult]:
    """Figures of one task on one part of the data, for `front_matter`; those that are undefined are left out.

    task     (the Hub's name of the kind of task, what is predicted)
    metrics  (type, name, value) of each
    """
    return [
        EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_type="single-cell",
            dataset_name=data,
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            # A NumPy number would be written as a Python object.
            metric_value=float(value),
        )
        for kind, name, value in metrics
        if value is not None and math.isfinite(value)
    ]


def front_matter(
    name: str,
    results: Sequence[EvalResult],
    *,
    tags: Sequence[str] = ("single-cell", "genomics"),
    pipeline_tag: str | None = None,
    start: str | None = None,
) -> str:
    """The metadata between two lines of dashes that a card begins with.

    name   of the method
    start  path or repository of the model that training went on from
    """
    data = ModelCardData(
        library_name="transformers",
        # Of the weights. Which terms these are only the publisher can know, so the card claims none.
        license="other",
        license_name="terms-of-the-training-data",
        tags=["cellglot", name, *tags, "biology"],
        pipeline_tag=pipeline_tag,
        base_model=start if start is not None and is_name(start) and not Path(start).exists() else None,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    return f"---\n{data.to_yaml()}\n---"
