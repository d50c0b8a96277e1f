"""Linear probe: how well a logistic regression tells cell types apart from frozen features."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

# Inverse regularization strengths tried by cross-validation on the training cells
STRENGTHS = (0.003, 0.01, 0.1, 1.0)


def linear_probe(
    train_features: np.ndarray,
    train_labels: Sequence[str] | np.ndarray,
    test_features: np.ndarray,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> np.ndarray:
    """Predicted labels of the test cells, from a logistic regression on standardized features.

    train_features  (cells, features), dense
    strengths       inverse regularization strengths; the one with the best 5-fold accuracy on training cells is used,
                    or the only one
    """
    import warnings

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    search = GridSearchCV(model, {"logisticregression__C": list(strengths)}, cv=folds if len(strengths) > 1 else 2)
    # The solver's products are so small that BLAS threads cost 14 times what they do (two cores, 595 x 765)
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        # Types with fewer than five cells are in fewer than five folds; that is all this says.
        warnings.filterwarnings("ignore", message="The least populated class")
        search.fit(train_features, np.asarray(train_labels))
    return search.predict(test_features)


def majority_prediction(train_labels: Sequence[str] | np.ndarray, n_test: int) -> np.ndarray:
    """The most frequent training label, for every test cell."""
    return np.repeat(pd.Series(list(train_labels)).mode()[0], n_test)


def accuracy_with_interval(
    labels: Sequence[str] | np.ndarray,
    predictions: Sequence[str] | np.ndarray,
    *,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy with its 95% bootstrap interval over cells, and macro F1 over the types among the labels.

    Returns  {"accuracy", "low", "high", "macro_f1"}
    """
    from sklearn.metrics import f1_score

    truth, predicted = np.asarray(labels), np.asarray(predictions)
    hits = truth == predicted
    draws = np.random.default_rng(seed).integers(len(hits), size=(n_bootstrap, len(hits)))
    low, high = np.quantile(hits[draws].mean(axis=1), [0.025, 0.975])
    types = np.unique(truth)
    f1 = f1_score(truth, predicted, average="macro", labels=types, zero_division=0)  # type: ignore[arg-type]
    return {"accuracy": float(hits.mean()), "low": float(low), "high": float(high), "macro_f1": float(f1)}
