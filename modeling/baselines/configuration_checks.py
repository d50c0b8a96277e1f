"""What the configurations of the baselines check alike: misspelt keys, sizes, and how drugs are known."""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def check_keys(config: Any, keys: Iterable[str]) -> None:
    """Raises ValueError if a key that the configuration lacks is nearly one that it has."""
    names = [field.name for field in dataclasses.fields(config)]
    for key in keys:
        close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"{type(config).__name__} has no {key!r}; did you mean {close[0]!r}?")


def check_perturbation_model(config: Any, sizes: Sequence[str], weights: Sequence[str]) -> None:
    """Raises ValueError unless sizes are positive, weights not negative, and a drug known by number has a number."""
    for name in ("n_genes", "fingerprint_size", "latent_size", "hidden_size", "num_hidden_layers", *sizes):
        if getattr(config, name) < 1:
            raise ValueError(f"Expected {name} of 1 or more, found {getattr(config, name)}.")
    for name in ("n_drugs", "n_cell_lines", *weights):
        if getattr(config, name) < 0:
            raise ValueError(f"Expected {name} of 0 or more, found {getattr(config, name)}.")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"Expected dropout from 0 to below 1, found {config.dropout}.")
    if config.drug_encoder == "id" and config.n_drugs < 1:
        raise ValueError('drug_encoder="id" needs n_drugs, the number of drugs known by id; found 0.')


__all__ = ["check_keys", "check_perturbation_model"]
