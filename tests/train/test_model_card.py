"""Metadata that all model cards share."""

from typing import Any

from huggingface_hub import ModelCard

from cellglot.train.model_card import front_matter, measured


def test_figures_that_are_undefined_are_left_out_of_the_metadata():
    metrics = [("f1", "defined", 0.25), ("f1", "undefined", None), ("f1", "not a number", float("nan"))]
    data: Any = ModelCard(front_matter("x", measured(("other", "task"), "cells", "test", metrics))).data
    assert [(result.metric_name, result.metric_value) for result in data.eval_results] == [("defined", 0.25)]
    assert "model-index" not in front_matter("x", [])
