"""Splits of responses that hold out what a model is to be judged on: whole drugs, or whole cell types and donors."""

from dataclasses import dataclass

import numpy as np

from cellglot.drug_response.data import ResponseData
from cellglot.tokenization.gene_ids import examples


@dataclass(frozen=True)
class ResponseSplit:
    """train, test: (n,) bool. All controls are in `train`, and none in `test`; some treated profiles may be in neither.

    held_out  what the test profiles have in common, for tables
    """

    train: np.ndarray
    test: np.ndarray
    held_out: list[str]


def hold_out_drugs(data: ResponseData, n_drugs: int, *, seed: int = 0) -> ResponseSplit:
    """All profiles of `n_drugs` drugs as the test part: the first of the sorted names, permuted by NumPy's default_rng.

    Raises  ValueError unless there are more drugs than that
    """
    drugs = data.drugs
    if not 0 < n_drugs < len(drugs):
        raise ValueError(
            f"{data.name} has {len(drugs):,} drugs: expected to hold out 1 to {len(drugs) - 1:,}, found {n_drugs:,}."
        )
    held_out = np.random.default_rng(seed).permutation(np.array(drugs))[:n_drugs]
    test = ~data.is_control & np.isin(data.drug, held_out)
    return ResponseSplit(~test, test, sorted(map(str, held_out)))


def hold_out_type_and_donor(data: ResponseData, cell_line: str, donor: str, *, column: str = "donor") -> ResponseSplit:
    """The treated cells of one type from one donor as the test part.

    Neither other treated cells of that type nor other treated cells of that donor are trained on, so that both are
    unseen under treatment; their controls are.
    Raises  ValueError for a type or donor that is not there, or if nothing treated is left to train on
    """
    donors = data.obs[column].astype(str).to_numpy(dtype=str)
    for value, values, what in ((cell_line, data.cell_line, "cell type"), (donor, donors, column)):
        if value not in set(values):
            raise ValueError(f"{data.name} has no {what} {value!r}; it has {examples(sorted(set(values)), 8)}.")
    of_type, of_donor = data.cell_line == cell_line, donors == donor
    test = ~data.is_control & of_type & of_donor
    train = data.is_control | ~(of_type | of_donor)
    if not test.any() or not (train & ~data.is_control).any():
        raise ValueError(
            f"{data.name}: {int(test.sum()):,} treated cells of {cell_line} from {donor} to test on, "
            f"{int((train & ~data.is_control).sum()):,} others to train on: there must be some of both."
        )
    return ResponseSplit(train, test, [f"{cell_line}, {column} {donor}"])
