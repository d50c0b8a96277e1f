"""Picture of `drug_response.py`: the correlation of true and predicted change from control, a dot a row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Colour by what a row is: simple, a published baseline, or the drug response model (Okabe and Ito's palette)
SIMPLE, PUBLISHED, OURS = "#0072B2", "#E69F00", "#009E73"
PUBLISHED_ROWS = ("CPA", "CPA_transfer", "cVAE")
TITLES = {"l1000": "L1000, 70 unseen drugs", "interferon": "interferon-beta, unseen cell type and donor"}
LEGEND = {"simple": SIMPLE, "CPA and cVAE": PUBLISHED, "drug response model": OURS}


def colour(row: str) -> str:
    if row.startswith("BERT"):
        return OURS
    return PUBLISHED if row in PUBLISHED_ROWS else SIMPLE


def draw_changes(tables: Mapping[str, Mapping[str, Any]], path: Path, figure: str = "delta") -> None:
    """Writes a PNG with a panel for each data set: rows by their mean over seeds, best on top, 95% intervals.

    tables  job -> row -> figure -> mean and ci
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows_at_most = max(len(table) for table in tables.values())
    picture, axes = plt.subplots(1, len(tables), figsize=(6 * len(tables), 0.26 * rows_at_most + 1.2), squeeze=False)
    for ax, (job, table) in zip(axes[0], tables.items(), strict=True):
        rows = sorted(table, key=lambda row: table[row][figure]["mean"])
        for y, row in enumerate(rows):
            found = table[row][figure]
            ax.errorbar(found["mean"], y, xerr=found["ci"], fmt="o", color=colour(row), markersize=5, capsize=2)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        ax.set_xlabel("Pearson's correlation of the change from control")
        ax.set_title(TITLES.get(job, job), fontsize=10)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
    for name, shade in LEGEND.items():
        axes[0][0].plot([], [], "o", color=shade, label=name)
    axes[0][0].legend(fontsize=8, loc="lower right")
    picture.tight_layout()
    picture.savefig(path, dpi=110)
    plt.close(picture)
