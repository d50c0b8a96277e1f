"""Test conditions as a predictor has them to predict: from controls, and from nothing else of the test part."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellglot.drug_response.baselines import Baseline
from cellglot.drug_response.data import ResponseData
from cellglot.drug_response.splits import ResponseSplit
from cellglot.metrics.differential_genes import mean_scores
from cellglot.metrics.response import Response


def predicted_responses(
    predictor: Baseline,
    data: ResponseData,
    split: ResponseSplit,
    *,
    by: Sequence[str] = ("drug", "cell_line"),
    control_by: Sequence[str] = ("cell_line",),
    max_controls: int | None = None,
    seed: int = 0,
) -> dict[Any, Response]:
    """Predicted and true profiles of each test condition.

    predictor     fitted on the training part
    by            columns of obs that make a condition
    control_by    columns in which the controls that changes are measured from agree with the condition. All of them
                  count: one control alone would carry its noise into both changes
    max_controls  of a pairing group, drawn at random, to predict from: a screen has thousands of controls, and all
                  predictions are held at once. None: all of them
    Returns       condition -> Response. Of each condition, every control of its profiles' pairing groups (plate,
                  donor) is given each of the condition's treatments once
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(split.test)
    obs = data.obs.iloc[rows]
    groups = obs.reset_index(drop=True).groupby(list(by), observed=True).indices
    inputs, conditions, owners = [], [], []
    for name, places in groups.items():
        asked: set[tuple] = set()
        for row in rows[places]:
            controls = data.pairs.candidates(int(row))
            key = (data.drug[row], data.cell_line[row], data.dose[row], controls.tobytes())
            if key in asked:
                continue
            asked.add(key)
            if max_controls is not None and len(controls) > max_controls:
                controls = rng.choice(controls, max_controls, replace=False)
            inputs.append(controls)
            conditions += [row] * len(controls)
            owners += [name] * len(controls)
    predicted = predictor.predict(data.expression[np.concatenate(inputs)], data.conditions(np.array(conditions)))
    owner = pd.Series(range(len(owners))).groupby(pd.Index(owners, tupleize_cols=False)).indices
    responses: dict[Any, Response] = {}
    for name, places in groups.items():
        first = data.obs.iloc[rows[places[0]]]
        alike = data.is_control & np.all([data.obs[c].to_numpy() == first[c] for c in control_by], axis=0)
        label = name[0] if isinstance(name, tuple) and len(name) == 1 else name
        responses[label] = Response(data.expression[rows[places]], predicted[owner[name]], data.expression[alike])
    return responses


def training_scores(train: ResponseData) -> np.ndarray:
    """(g,) how much treatment changes each gene in training conditions (Welch's t, mean over cell lines).

    Raises  ValueError if no line has both treated profiles and controls
    """
    pairs = []
    for line in np.unique(train.cell_line):
        of_line = train.cell_line == line
        treated, control = of_line & ~train.is_control, of_line & train.is_control
        if treated.any() and control.any() and (treated.sum() + control.sum()) > 2:
            pairs.append((train.expression[treated], train.expression[control]))
    return mean_scores(pairs)


def treated_centroid(train: ResponseData) -> np.ndarray:
    """(g,) float64 mean of all treated training profiles."""
    return train.expression[~train.is_control].mean(axis=0, dtype=np.float64)
