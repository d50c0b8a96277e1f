"""The simplest classifiers that a network has to beat, on features fixed beforehand: scikit-learn's, little tuned."""

from collections.abc import Sequence

import numpy as np

BASELINES = ("majority", "logistic regression", "linear SVM", "random forest")


def baseline_scores(
    name: str,
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    classes: Sequence[str],
    *,
    seed: int = 0,
    n_jobs: int | None = None,
) -> np.ndarray:
    """Scores of the test items by a baseline fitted on the training items.

    name            of BASELINES. Logistic regression (C = 0.1, the figure that reference values were measured with) and
                    linear SVM (C = 0.01) on standardized features; 500 trees
    train_features  (items, features), dense
    classes         all class names; one without a training item scores lowest
    n_jobs          processors for the forest; all if absent
    Returns         (test items, classes) the higher, the likelier
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC
    from threadpoolctl import threadpool_limits

    out = np.full((len(test_features), len(classes)), -np.inf)
    order = {name: i for i, name in enumerate(classes)}
    if name == "majority":
        names, counts = np.unique(train_labels, return_counts=True)
        out[:, [order[n] for n in names]] = counts / counts.sum()
        return out
    if name == "logistic regression":
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    elif name == "linear SVM":
        model = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=seed, max_iter=5000))
    elif name == "random forest":
        model = RandomForestClassifier(500, random_state=seed, n_jobs=n_jobs or -1)
    else:
        raise ValueError(f"Expected a baseline among {', '.join(BASELINES)}, found {name!r}.")
    # BLAS threads slow the regression's small products down, at 8,000 x 1,287 still by two; the forest has its own
    with threadpool_limits(1, user_api="blas"):
        model.fit(train_features, train_labels)
    score = getattr(model, "decision_function" if name == "linear SVM" else "predict_proba")
    scores = np.asarray(score(test_features))
    if scores.ndim == 1:
        # Of two classes, scikit-learn scores the second only.
        scores = np.stack([-scores, scores], axis=1)
    out[:, [order[n] for n in model.classes_]] = scores
    return out
