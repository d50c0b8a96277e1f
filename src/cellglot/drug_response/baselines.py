"""The simplest predictions of responses, which every model has to beat, under one interface.

    baseline.fit(train)                         a ResponseData: controls and treated profiles
    baseline.predict(controls_ng, conditions)   a profile for each control, as if it had been given its condition

`conditions` is a table with drug, cell_line and dose (micromolar), as of `ResponseData.conditions`. Nothing but `fit`
sees treated profiles.

Axis letters: n profiles, g genes.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd

from cellglot.drug_response.data import CONDITION, ResponseData
from cellglot.metrics.response import correlation
from cellglot.tokenization.drug_conditions import morgan_fingerprints
from cellglot.tokenization.gene_ids import examples

# Bits of the fingerprints of `NearestConditions` and `Ridge`
FINGERPRINT_SIZE = 2048
# Penalties that leave-one-out error chooses from; the largest leaves the mean response
RIDGE_PENALTIES = np.logspace(0, 6, 13)


class Baseline(Protocol):
    """What predicts responses; `name` is what tables call it."""

    name: str

    def fit(self, train: ResponseData) -> Self: ...

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray: ...


class ControlCells:
    """The controls as they are: no response."""

    name = "control cells"

    def fit(self, train: ResponseData) -> Self:
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        return controls_ng.copy()


class ControlMean:
    """Mean of the training controls of the cell line; of all controls where it has none."""

    name = "control mean"

    def fit(self, train: ResponseData) -> Self:
        self.means = _means_by_line(train, train.is_control)
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        return _of_lines(self.means, conditions)


class TreatedMean:
    """Mean of the treated training profiles of the cell line; of all of them where it has none."""

    name = "treated mean"

    def fit(self, train: ResponseData) -> Self:
        self.means = _means_by_line(train, ~train.is_control)
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        return _of_lines(self.means, conditions)


class PairedTreatedMean:
    """Mean of the treated training profiles that a control is a control of: of its plate, or its donor's cells.

    The treated mean of the cell line where there are none, or the control is not of the training part.
    """

    name = "treated mean of the plate"

    def fit(self, train: ResponseData) -> Self:
        self.means = _means_by_line(train, ~train.is_control)
        treated: dict[int, list[int]] = {}
        for row in np.flatnonzero(~train.is_control):
            for control in train.pairs.candidates(int(row)):
                treated.setdefault(int(control), []).append(int(row))
        groups = {tuple(rows) for rows in treated.values()}
        of_group = {rows: self._centre(train.expression[list(rows)].astype(np.float64)) for rows in groups}
        self.by_control = {train.expression[c].tobytes(): of_group[tuple(rows)] for c, rows in treated.items()}
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        of_line = _of_lines(self.means, conditions)
        profiles = np.ascontiguousarray(controls_ng, dtype=np.float32)
        keys = [row.tobytes() for row in profiles]
        found = [self.by_control.get(key) for key in keys]
        return np.array([m if c is None else c for c, m in zip(found, of_line, strict=True)], dtype=np.float32)

    def _centre(self, profiles_ng: np.ndarray) -> np.ndarray:
        return profiles_ng.mean(axis=0)


class PairedTreatedMedian(PairedTreatedMean):
    """The same with the geometric median, which the few drugs that kill cells move less than the mean."""

    name = "treated median of the plate"

    def _centre(self, profiles_ng: np.ndarray) -> np.ndarray:
        return geometric_median(profiles_ng)


class Additive:
    """The control and the drug's mean effect over cell lines; the mean effect of all drugs for one that is new."""

    name = "additive"

    def fit(self, train: ResponseData) -> Self:
        rows, changes = paired_changes(train)
        table = pd.DataFrame(changes)
        by_line = table.groupby([train.drug[rows], train.cell_line[rows]]).mean()
        by_drug = by_line.groupby(level=0).mean()
        self.effects: dict[Any, Any] = dict(zip(by_drug.index, by_drug.to_numpy(), strict=True))
        self.mean_effect = by_drug.to_numpy().mean(axis=0)
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        effects = np.array([self.effects.get(drug, self.mean_effect) for drug in conditions["drug"].astype(str)])
        return (controls_ng + effects).astype(np.float32)


class RandomConditions:
    """Treated profiles of five random training conditions, drawn for each condition that is asked for."""

    name = "random"

    def __init__(self, n_conditions: int = 5, seed: int = 0):
        self.n_conditions, self.seed = n_conditions, seed

    def fit(self, train: ResponseData) -> Self:
        self.profiles = _profiles_by_condition(train, CONDITION)
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        names = list(self.profiles)
        out = np.empty_like(controls_ng, dtype=np.float32)
        for rows in _rows_by_condition(conditions, CONDITION).values():
            chosen = rng.choice(len(names), min(self.n_conditions, len(names)), replace=False)
            out[rows] = _drawn([self.profiles[names[i]] for i in chosen], len(rows), rng)
        return out


class NearestConditions:
    """Treated profiles of the five most similar training conditions (kNN).

    Conditions are drug and cell line, and as similar as their drugs (Tanimoto of Morgan fingerprints; 1 for the same
    drug, 0 where a structure is not known) and their lines (correlation of mean controls) are together.
    """

    name = "kNN"

    def __init__(self, n_neighbours: int = 5, seed: int = 0):
        self.n_neighbours, self.seed = n_neighbours, seed

    def fit(self, train: ResponseData) -> Self:
        self.profiles = _profiles_by_condition(train, ["drug", "cell_line"])
        self.controls = _means_by_line(train, train.is_control)
        self.smiles = dict(train.smiles)
        self.known = _fingerprints(sorted({drug for drug, _ in self.profiles}), self.smiles)
        return self

    def neighbours(self, drug: str, line: str) -> list[tuple[str, str]]:
        """The most similar training conditions (drug, cell line), best first; of equal ones the first by name."""
        own = self.known.get(drug)
        if own is None:
            own = _fingerprints([drug], self.smiles)[drug]
        alike = {line: 1.0} | {
            other: correlation(self.controls[line], self.controls[other])
            for other in self.controls
            if other != line and line in self.controls
        }
        scores = {
            (d, c): (1.0 if d == drug else _tanimoto(own, self.known[d])) + alike.get(c, 0.0)
            for d, c in sorted(self.profiles)
        }
        return sorted(scores, key=lambda condition: -scores[condition])[: self.n_neighbours]

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        out = np.empty_like(controls_ng, dtype=np.float32)
        for (drug, line), rows in _rows_by_condition(conditions, ["drug", "cell_line"]).items():
            near = [self.profiles[condition] for condition in self.neighbours(drug, line)]
            out[rows] = _drawn(near, len(rows), rng)
        return out


class Ridge:
    """The control and a linear function of the drug's fingerprint and log10 dose, penalty by leave-one-out error."""

    name = "ridge"

    def fit(self, train: ResponseData) -> Self:
        from sklearn.linear_model import RidgeCV

        self.smiles = dict(train.smiles)
        rows, changes = paired_changes(train)
        # Replicates of a condition would tell leave-one-out error what it leaves out.
        means = pd.DataFrame(changes).groupby([train.obs[c].to_numpy()[rows] for c in CONDITION]).mean()
        conditions = pd.DataFrame(list(means.index), columns=CONDITION)
        self.model = RidgeCV(RIDGE_PENALTIES).fit(self._features(conditions), means.to_numpy())
        return self

    def predict(self, controls_ng: np.ndarray, conditions: pd.DataFrame) -> np.ndarray:
        return (controls_ng + self.model.predict(self._features(conditions))).astype(np.float32)

    def _features(self, conditions: pd.DataFrame) -> np.ndarray:
        """(n, bits + 1).

        Raises  ValueError for drugs whose structure is not known
        """
        names, of_row = np.unique(conditions["drug"].astype(str), return_inverse=True)
        fingerprints = _fingerprints(list(names), self.smiles)
        absent = [name for name, bits in fingerprints.items() if bits is None]
        if absent:
            raise ValueError(
                f"{len(absent):,} of {len(names):,} drugs have no SMILES (e.g. {examples(absent)}), which ridge on "
                "fingerprints needs: add them to the data's smiles, or leave these drugs out."
            )
        bits = np.stack([fingerprints[name] for name in names])  # type: ignore[misc]
        return np.column_stack([bits[of_row], np.log10(conditions["dose"].to_numpy(dtype=float))])


def baselines(seed: int = 0) -> list[Baseline]:
    """All of them, in the order of tables."""
    return [
        ControlCells(),
        ControlMean(),
        TreatedMean(),
        PairedTreatedMean(),
        PairedTreatedMedian(),
        Additive(),
        RandomConditions(seed=seed),
        NearestConditions(seed=seed),
        Ridge(),
    ]


def geometric_median(points_nd: np.ndarray, *, n_iterations: int = 100) -> np.ndarray:
    """(d,) the point with the least sum of distances to n points, by Weiszfeld's iteration from their mean."""
    centre = points_nd.mean(axis=0)
    for _ in range(n_iterations):
        weights = 1 / np.maximum(np.linalg.norm(points_nd - centre, axis=1), 1e-9)
        centre = weights @ points_nd / weights.sum()
    return centre


def paired_changes(data: ResponseData) -> tuple[np.ndarray, np.ndarray]:
    """Treated profiles, and how each differs from the mean of its controls.

    Returns  (positions (n,), changes (n, g) float64)
    Raises   ValueError for a cell line without controls
    """
    rows = np.flatnonzero(~data.is_control)
    means: dict[bytes, np.ndarray] = {}
    changes = np.empty((len(rows), data.expression.shape[1]))
    for i, row in enumerate(rows):
        controls = data.pairs.candidates(int(row))
        key = controls.tobytes()
        if key not in means:
            means[key] = data.expression[controls].mean(axis=0, dtype=np.float64)
        changes[i] = data.expression[row] - means[key]
    return rows, changes


def _means_by_line(data: ResponseData, wanted: np.ndarray) -> dict[str | None, np.ndarray]:
    """cell line -> mean of its wanted profiles; None -> of all of them.

    Raises  ValueError if there are none
    """
    if not wanted.any():
        raise ValueError(
            f"{data.name}: expected controls and treated profiles to learn from, found {int(data.is_control.sum()):,} "
            f"of {len(data):,} to be controls."
        )
    lines = data.cell_line[wanted]
    profiles = data.expression[wanted]
    means: dict[str | None, np.ndarray] = {
        str(line): profiles[lines == line].mean(axis=0, dtype=np.float64) for line in np.unique(lines)
    }
    return means | {None: profiles.mean(axis=0, dtype=np.float64)}


def _of_lines(means: dict[str | None, np.ndarray], conditions: pd.DataFrame) -> np.ndarray:
    lines = conditions["cell_line"].astype(str)
    return np.stack([means[line if line in means else None] for line in lines]).astype(np.float32)


def _rows_by_condition(conditions: pd.DataFrame, columns: Sequence[str]) -> dict[tuple, np.ndarray]:
    """condition -> positions of its rows."""
    indices: Any = conditions.reset_index(drop=True).groupby(list(columns), observed=True).indices
    return dict(indices)


def _profiles_by_condition(train: ResponseData, columns: Sequence[str]) -> dict[tuple, np.ndarray]:
    treated = train.select(~train.is_control)
    groups = _rows_by_condition(treated.conditions(), columns)
    return {condition: treated.expression[rows] for condition, rows in groups.items()}


def _drawn(groups: list[np.ndarray], n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, g) profiles of the groups, as many of each as can be, none twice before all were taken."""
    shuffled = [rng.permutation(group) for group in groups]
    return np.stack([shuffled[i % len(groups)][i // len(groups) % len(shuffled[i % len(groups)])] for i in range(n)])


def _fingerprints(drugs: list[str], smiles: dict[str, str]) -> dict[str, np.ndarray | None]:
    known = [drug for drug in drugs if drug in smiles]
    bits = morgan_fingerprints([smiles[drug] for drug in known], FINGERPRINT_SIZE) if known else []
    return dict.fromkeys(drugs) | dict(zip(known, bits, strict=True))


def _tanimoto(a: np.ndarray | None, b: np.ndarray | None) -> float:
    if a is None or b is None:
        return 0.0
    both = float(a @ b)
    return both / max(float(a.sum() + b.sum()) - both, 1.0)
