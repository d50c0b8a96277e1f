"""Doses in one unit, and drugs as fingerprints of their structure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .gene_ids import examples

# Unit, in lower case -> micromolar
MICROMOLAR = {"pm": 1e-6, "nm": 1e-3, "um": 1.0, "\N{MICRO SIGN}m": 1.0, "\N{GREEK SMALL LETTER MU}m": 1.0}
MICROMOLAR |= {"mm": 1e3, "m": 1e6}
# Neighbourhood and length of the Morgan fingerprints (radius 2 is ECFP4)
FINGERPRINT_RADIUS = 2


def micromolar(dose: Any, unit: str | None) -> np.ndarray:
    """(n,) float64 doses in micromolar.

    unit    "nM", "uM", "mM", ...
    Raises  ValueError for no unit or an unknown one, and for doses that are negative or no numbers
    """
    factor = None if unit is None else MICROMOLAR.get(str(unit).strip().lower())
    if factor is None:
        found = "no unit" if unit is None else f"unit {unit!r}"
        raise ValueError(f'Expected doses with a unit, one of pM, nM, uM, mM, M; found {found}. Pass dose_unit="uM".')
    doses = np.atleast_1d(np.asarray(dose, dtype=np.float64))
    wrong = ~(doses >= 0) | ~np.isfinite(doses)
    if wrong.any():
        raise ValueError(
            f"Expected doses of 0 {unit} or more, found {int(wrong.sum()):,} that are negative or no numbers (e.g. "
            f"{', '.join(f'{value:g}' for value in doses[wrong][:3])}). Correct them, or leave their profiles out"
            + (": -666 is how LINCS writes a missing dose." if (doses == -666).any() else ".")
        )
    return doses * factor


def morgan_fingerprints(smiles: Sequence[str], n_bits: int, radius: int = FINGERPRINT_RADIUS) -> np.ndarray:
    """(drugs, n_bits) float32, 0 or 1: which circular substructures each molecule has.

    Neighbourhoods of the atoms up to `radius` bonds, hashed to bits (Rogers & Hahn 2010, doi:10.1021/ci100050t).
    Raises  ImportError without RDKit, ValueError for a SMILES that it cannot read
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError as error:
        raise ImportError(
            'Fingerprints of drugs need RDKit: pip install "cellglot[drug]", or use drug_encoder="id".'
        ) from error
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
    fingerprints = np.zeros((len(smiles), n_bits), dtype=np.float32)
    # RDKit writes to stderr what the error says once.
    with rdBase.BlockLogs():
        for row, text in enumerate(smiles):
            molecule = Chem.MolFromSmiles(text) if isinstance(text, str) and text.strip() else None
            if molecule is None:
                raise ValueError(
                    f"{text!r} is no SMILES that RDKit can read. Expected the structure of a molecule, e.g. "
                    f"{examples(['CS(=O)C'])}; correct it, or leave its profiles out."
                )
            fingerprints[row] = generator.GetFingerprintAsNumPy(molecule)
    return fingerprints
