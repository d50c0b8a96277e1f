"""`ResponseData`: expression of cells or wells, what was done to each, and which of them are controls.

Axis letters: n profiles (cells of single-cell data, wells of L1000), g genes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from cellglot.tokenization.gene_ids import examples

# Columns of `ResponseData.obs` that every data set has
TREATMENT = ("drug", "cell_line", "dose", "is_control")
CONDITION = ["drug", "cell_line", "dose"]


@dataclass(frozen=True)
class ResponseData:
    """Profiles with their treatments.

    expression  (n, g) float32 on the scale that models are judged on: log2 for L1000, log(1 + counts per 10,000) for
                counts. Never masked or standardized: that is the feature extractor's part
    obs         (n,) at least drug, cell_line, dose (MICROMOLAR; 0 for controls) and is_control
    genes       (g,) identifiers: any of entrez_id, ensembl_id and gene_symbol as columns; the index as in the file
    smiles      drug -> structure, where it is known
    pair_by     columns of obs: a treated profile's controls are those that agree with it in all of them
    name        what to call the data in messages and tables
    target_sum  counts that each cell was scaled to before log(1 + x); None for values that never were counts
    """

    expression: np.ndarray
    obs: pd.DataFrame
    genes: pd.DataFrame
    smiles: Mapping[str, str] = field(default_factory=dict)
    pair_by: tuple[str, ...] = ("cell_line",)
    name: str = "data"
    target_sum: float | None = None

    def __post_init__(self) -> None:
        absent = [column for column in (*TREATMENT, *self.pair_by) if column not in self.obs]
        if absent:
            raise ValueError(f"{self.name}: obs lacks {', '.join(absent)}; it has {', '.join(map(str, self.obs))}.")
        if self.expression.shape != (len(self.obs), len(self.genes)):
            raise ValueError(
                f"{self.name}: expected expression of {len(self.obs):,} profiles x {len(self.genes):,} genes, found "
                f"{' x '.join(f'{size:,}' for size in self.expression.shape)}."
            )

    def __len__(self) -> int:
        return len(self.obs)

    @cached_property
    def drug(self) -> np.ndarray:
        """(n,) names; of controls, what the vehicle is called."""
        return self.obs["drug"].to_numpy(dtype=str)

    @cached_property
    def cell_line(self) -> np.ndarray:
        """(n,) names of cell lines or types."""
        return self.obs["cell_line"].to_numpy(dtype=str)

    @cached_property
    def dose(self) -> np.ndarray:
        """(n,) float64, micromolar."""
        return self.obs["dose"].to_numpy(dtype=np.float64)

    @cached_property
    def is_control(self) -> np.ndarray:
        """(n,) bool."""
        return self.obs["is_control"].to_numpy(dtype=bool)

    @property
    def gene_ids(self) -> list[str]:
        return [str(gene) for gene in self.genes.index]

    @property
    def drugs(self) -> list[str]:
        """Names of the drugs that were given, sorted."""
        return sorted(map(str, set(self.drug[~self.is_control])))

    def select(self, rows: np.ndarray) -> "ResponseData":
        """The profiles of a boolean mask or of positions."""
        positions = np.arange(len(self))[rows]
        obs = self.obs.iloc[positions]
        return replace(self, expression=self.expression[positions], obs=obs)

    def conditions(self, rows: np.ndarray | None = None) -> pd.DataFrame:
        """(rows,) drug, cell_line and dose of profiles: what a model is asked to predict."""
        return self.obs[CONDITION] if rows is None else self.obs[CONDITION].iloc[np.arange(len(self))[rows]]

    @cached_property
    def pairs(self) -> "ControlPairs":
        """Which controls belong to which profile."""
        return ControlPairs(self)

    def to_anndata(self) -> Any:
        """The data as an AnnData, dose in obs["dose_um"]; `read_responses` reads it back."""
        import anndata as ad

        obs = self.obs.rename(columns={"dose": "dose_um"})
        obs["smiles"] = obs["drug"].astype(str).map(dict(self.smiles))
        return ad.AnnData(self.expression, obs=obs.set_axis(obs.index.astype(str)), var=self.genes.copy())


class ControlPairs:
    """The controls of treated profiles: of the same group (`pair_by`), or of the cell line where a group has none.

    Raises  ValueError when a profile is asked for whose cell line has no controls
    """

    def __init__(self, data: ResponseData):
        self.name = data.name
        keys = list(zip(*(data.obs[column].astype(str) for column in data.pair_by), strict=True))
        self._groups = np.fromiter(keys, dtype=object, count=len(keys)) if keys else np.empty(0, dtype=object)
        self._lines = data.cell_line
        controls = np.flatnonzero(data.is_control)
        self._by_group = _positions(self._groups, controls)
        self._by_line = _positions(self._lines, controls)

    def candidates(self, row: int) -> np.ndarray:
        """Positions of the controls of a profile, ascending.

        Raises  ValueError if its cell line has none
        """
        found = self._by_group.get(self._groups[row])
        found = self._by_line.get(self._lines[row]) if found is None else found
        if found is None:
            others = examples(sorted(self._by_line))
            raise ValueError(
                f"{self.name}: cell line {str(self._lines[row])!r} has no controls; "
                f"{f'there are some of {others}' if others else 'no line has any'}. Add vehicle-treated profiles of "
                'it, leave the line out, or, where nothing is held out, train with training_input="self".'
            )
        return found


def _positions(keys: np.ndarray, rows: np.ndarray) -> dict[Any, np.ndarray]:
    found: dict[Any, list[int]] = {}
    for row in rows:
        found.setdefault(keys[row], []).append(int(row))
    return {key: np.array(positions) for key, positions in found.items()}


def concatenate(parts: list[ResponseData]) -> ResponseData:
    """Profiles of several parts of one data set, in order.

    Raises  ValueError if their genes differ, or there are none
    """
    if not parts:
        raise ValueError("Expected profiles, found none.")
    first = parts[0]
    if any(part.gene_ids != first.gene_ids for part in parts):
        raise ValueError(f"{first.name}: its parts have different genes; read each by itself.")
    if len(parts) == 1:
        return first
    smiles = {drug: structure for part in parts for drug, structure in part.smiles.items()}
    obs = pd.concat([part.obs for part in parts])
    return replace(first, expression=np.concatenate([part.expression for part in parts]), obs=obs, smiles=smiles)
