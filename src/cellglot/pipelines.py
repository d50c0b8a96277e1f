"""transformers pipelines over cells: `pipeline("cell-embedding")` and `pipeline("cell-classification")`.

AnnData or a path in; what `embed_cells` and `classify_cells` return out, whose options are the pipelines' own, given
when the pipeline is made or when it is called. Cells are batched by `max_tokens`, since they differ in length, and not
by `batch_size`.
"""

from pathlib import Path
from typing import Any

from transformers.pipelines.base import Pipeline

from .cell_stream import check_model
from .classification import classify_cells, task_labels
from .embedding import embed_cells
from .loading import find_tokenizer


class _CellPipeline(Pipeline):
    """What both pipelines share: finding the tokenizer, and handing on the options."""

    # Read by transformers, which would find another kind of tokenizer, or fail without saying what is missing.
    _load_tokenizer = False
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False

    def __init__(self, model: Any, tokenizer: Any = None, **kwargs: Any):
        _refuse_batch_size(kwargs)
        if tokenizer is None:
            # At the commit that the model was loaded from
            tokenizer = find_tokenizer(model.name_or_path, getattr(model.config, "_commit_hash", None) or "main")
        elif isinstance(tokenizer, str | Path):
            tokenizer = find_tokenizer(str(tokenizer))
        self.check(model, tokenizer)
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)

    def check(self, model: Any, tokenizer: Any) -> None:
        """Raises ValueError for a model that this pipeline cannot use."""
        check_model(model, tokenizer)

    def run(self, cells: Any, **options: Any) -> Any:
        """The result for one AnnData or path."""
        raise NotImplementedError

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The result for an AnnData or a path, or a list of results for a list."""
        _refuse_batch_size(options)
        options = {**self._forward_params, **options}
        if isinstance(inputs, list | tuple):
            return [self.run_single(item, {}, options, {}) for item in inputs]
        return self.run_single(inputs, {}, options, {})

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        return {}, options, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        return {"cells": input_}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"result": self.run(input_tensors["cells"], **options)}

    def postprocess(self, model_outputs: Any, **_: Any) -> Any:
        return model_outputs["result"]


class CellEmbeddingPipeline(_CellPipeline):
    """`pipeline("cell-embedding", model=DIR)(adata)`: `embed_cells` with the model and tokenizer of a directory."""

    def run(self, cells: Any, **options: Any) -> Any:
        return embed_cells(cells, self.model, self.tokenizer, **options)


class CellClassificationPipeline(_CellPipeline):
    """`pipeline("cell-classification", model=DIR)(adata)`: `classify_cells` with the classifier of a directory."""

    def check(self, model: Any, tokenizer: Any) -> None:
        super().check(model, tokenizer)
        task_labels(model)

    def run(self, cells: Any, **options: Any) -> Any:
        return classify_cells(cells, self.model, self.tokenizer, **options)


def _refuse_batch_size(options: dict[str, Any]) -> None:
    for name in ("batch_size", "num_workers"):
        if options.get(name) is not None:
            raise ValueError(
                f"Cells are batched by their length: pass max_tokens= (padded tokens a batch), not {name}=."
            )
