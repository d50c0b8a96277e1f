"""What a drug does to which genes, by a drug response model, in the browser.

    python spaces/drug_response/prepare.py && python spaces/drug_response/app.py

The model turns each control cell into the cell after a drug; a change is the difference of mean profiles. It stands
beside the change that was measured, and beside what the simplest predictions get right of it.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import gradio as gr
import numpy as np
import pandas as pd

import cellglot
from cellglot.drug_response.baselines import Additive, TreatedMean
from cellglot.metrics.response import correlation
from cellglot.serving import (
    STATUS_HEIGHT,
    Deadline,
    blocks,
    bundle,
    forget,
    in_words,
    launch,
    model_queue,
    read_upload,
    sampled,
    uploaded_cells,
)
from cellglot.serving.figures import ACCENT, GREY, REST, finished, new_axes, plot_bars
from cellglot.tokenization.drug_conditions import micromolar

# Of a request; the means of fewer than the second are mostly noise
MAX_CELLS, FEW_CELLS = 1000, 50
SHOWN_GENES, NAMED_GENES = 8, 6
MAX_STRUCTURE = 200
NEW_DRUG = "your structure"
# An example of no particular meaning
NEW_STRUCTURE = "CCCCCc1ccccc1C(=O)NCC"
SECONDS = 120


class Space:
    """The model and what it does for one request. Holds nothing of any session."""

    def __init__(self, folder: Path) -> None:
        self.model = cellglot.DrugResponseForConditionalGeneration.from_pretrained(folder).eval()
        self.extractor = cellglot.ExpressionFeatureExtractor.from_pretrained(folder)
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        stored = cellglot.read_responses(folder / "responses.h5ad", counts=False)
        pair_by = tuple(self.about["pair_by"])
        self.data = dataclasses.replace(stored, target_sum=self.extractor.target_sum, pair_by=pair_by)
        self.part = self.data.obs["part"].to_numpy(dtype=str)
        train = self.data.select(self.part == "train")
        self.baselines = [Additive().fit(train), TreatedMean().fit(train)]
        self.lines = sorted(set(self.data.cell_line[self.data.is_control]))

    @property
    def doses(self) -> list[float]:
        """Those that were given, in micromolar."""
        return sorted(set(self.data.dose[~self.data.is_control]))

    def tries(self) -> dict[str, list[str]]:
        """Drug, dose, line, structure of a condition that was held out, of one that was not, and of a new structure."""
        treated = ~self.data.is_control
        tries = {}
        for name, part, place in (("held out", "test", -1), ("trained on", "train", 0)):
            rows = np.flatnonzero(treated & (self.part == part))
            if len(rows):
                strongest = rows[self.data.dose[rows] == self.data.dose[rows].max()]
                i = strongest[place]
                tries[name] = [self.data.drug[i], f"{self.data.dose[i]:g} uM", self.data.cell_line[i], ""]
        if self.extractor.drug_encoder == "fingerprint":
            tries["a new structure"] = [*next(iter(tries.values()))[:3], NEW_STRUCTURE]
        return tries

    def measured(self, drug: str, line: str, dose: float) -> tuple[np.ndarray, np.ndarray]:
        """Profiles of the condition, those held out before others, and their controls; else the line's controls."""
        data = self.data
        rows = np.flatnonzero(
            ~data.is_control & (data.drug == drug) & (data.cell_line == line) & np.isclose(data.dose, dose)
        )
        best = next((part for part in ("test", "train", "neither") if part in self.part[rows]), None)
        rows = rows[self.part[rows] == best]
        if best is None:
            return rows, np.flatnonzero(data.is_control & (data.cell_line == line))
        return rows, np.unique(np.concatenate([data.pairs.candidates(int(row)) for row in rows]))

    def kept(self, own: ad.AnnData) -> ad.AnnData:
        """What a session keeps of cells: those that may be asked for."""
        chosen = np.unique(np.concatenate([cells_of(own, line) for line in self.lines]))
        return sampled(own[chosen].copy(), len(chosen))

    def predict(
        self, drug: str, dose: str, line: str, structure: str, own: ad.AnnData | None, progress: Any
    ) -> tuple[str, Any, Any, Any]:
        """In words, and figures of the genes that change most, of all genes against the truth, and of the baselines."""
        deadline = Deadline(SECONDS)
        amount, unit = parsed_dose(dose)
        extractor, smiles = self.extractor, {}
        if structure := (structure or "").strip():
            if len(structure) > MAX_STRUCTURE:
                raise ValueError(f"Expected a SMILES of at most {MAX_STRUCTURE} characters, found {len(structure)}.")
            # A copy, since an extractor keeps the fingerprint of every structure it was ever asked for
            drug, smiles, extractor = NEW_DRUG, {NEW_DRUG: structure}, copy.deepcopy(extractor)
        elif drug not in self.data.drugs:
            raise ValueError(f"Expected a drug of the list, found {str(drug)[:40]!r}. Choose one, or give a structure.")
        if line not in self.lines:
            raise ValueError(f"Expected a cell type of the list, found {str(line)[:40]!r}. Choose one of it.")
        in_micromolar = float(micromolar(amount, unit)[0])
        rows, controls = self.measured(drug, line, in_micromolar)
        start: Any = self.data.select(controls) if own is None else own[cells_of(own, line)].copy()
        progress(0.2, desc=f"{drug} in {line}")
        options: dict[str, Any] = {"drug": drug, "dose": amount, "dose_unit": unit, "cell_line": line, "smiles": smiles}
        predicted = cellglot.predict_response(start, self.model, extractor, **options)
        before = extractor.inverse(extractor(start)["expression"]).mean(axis=0)
        change = predicted.X.mean(axis=0) - before
        deadline.check()
        progress(0.6, desc="drawing")
        genes = np.array(extractor.gene_ids)
        truth, scores = None, {}
        if len(rows):
            mean = self.data.expression[controls].mean(axis=0)
            truth = self.data.expression[rows].mean(axis=0) - mean
            asked = pd.DataFrame({"drug": drug, "cell_line": line, "dose": in_micromolar}, index=range(len(controls)))
            scores = {"this model": correlation(truth, change)}
            for baseline in self.baselines:
                others = baseline.predict(self.data.expression[controls], asked).mean(axis=0) - mean
                scores[baseline.name] = correlation(truth, others)
        title = f"{drug}, {dose.strip()}" if self.about["dose_known"] else drug
        said = self.words(title, line, genes, change, scores, rows, in_micromolar)
        if own is not None:
            said += f" Predicted from {start.n_obs} of your cells."
            said += " So few cells are noisy." if start.n_obs < FEW_CELLS else ""
        bars = plot_changes(genes, change, truth, title=f"{title}: genes that change most")
        scatter = None if truth is None else plot_agreement(genes, change, truth, scores["this model"])
        return said, bars, scatter, self.plot_scores(scores)

    def words(
        self, title: str, line: str, genes: Any, change: Any, scores: dict[str, float], rows: Any, dose: float
    ) -> str:
        """What the figures show."""
        order = np.argsort(change)
        up, down = (", ".join(genes[some]) for some in (order[::-1][:3], order[:3]))
        said = f"**{title}** in *{line}*: {up} go up the most, {down} down."
        if not self.doses[0] <= dose <= self.doses[-1]:
            said += f" The dose lies beyond those that were given ({self.doses[0]:g} to {self.doses[-1]:g} uM)."
        if not scores:
            return said + " This was not measured, so that nothing tells whether it is right."
        ours, *others = scores.values()
        rest = " and ".join(f"{name} {value:.2f}" for name, value in list(scores.items())[1:])
        place = "more than both baselines" if ours > max(others) else "no more than the better baseline"
        said += f" Predicted and measured change correlate at **{ours:.2f}**, {place} ({rest})."
        if self.part[rows[0]] == "train":
            return said + " All were fitted to this response, among others, which flatters them."
        return said + " **Held out**: none of them has seen this response."

    def plot_scores(self, scores: dict[str, float]) -> Any:
        """The correlations of one condition, or, where it was not measured, of all that were held out."""
        title = "Correlation with the measured change"
        if not scores:
            held_out = self.about["held_out"]
            scores, title = held_out["correlation of change"], f"Not measured; on {held_out['n']} held-out responses"
        return plot_bars(list(scores), list(scores.values()), title=title, axis="Pearson's r", marked=["this model"])


def parsed_dose(text: str) -> tuple[float, str]:
    """Number and unit of a dose that someone wrote.

    Raises  ValueError, among others where there is no unit: 10 nM and 10 uM are different things
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([pnum\u00b5\u03bc]?M)\s*", str(text), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(
            f'Expected a dose above 0 with its unit (pM, nM, uM, mM), such as "250 nM", found {str(text)[:40]!r}.'
        )
    return float(found[1]), found[2]


def cells_of(own: ad.AnnData, line: str) -> np.ndarray:
    """Positions of the cells that a column of obs calls by the line, of all where none does; MAX_CELLS at most."""
    named = [(own.obs[column].astype(str) == line).to_numpy() for column in own.obs]
    chosen = np.flatnonzero(next((of_line for of_line in named if of_line.any()), np.ones(own.n_obs, bool)))
    return np.sort(np.random.default_rng(0).permutation(chosen)[:MAX_CELLS])


def plot_changes(genes: np.ndarray, change: np.ndarray, truth: np.ndarray | None, *, title: str) -> Any:
    """Figure of the genes that go up and down the most, with what was measured as diamonds."""
    order = np.argsort(change)
    shown = [*order[::-1][:SHOWN_GENES], *order[:SHOWN_GENES][::-1]]
    up = list(genes[shown[:SHOWN_GENES]])
    figure = plot_bars(list(genes[shown]), change[shown], title=title, axis="change of log expression", marked=up)
    ax = figure.axes[0]
    ax.axvline(0, color=GREY, linewidth=0.8)
    if truth is not None:
        diamonds = ax.scatter(truth[shown], np.arange(len(shown)), marker="D", s=18, color=GREY, zorder=3)
        ax.legend([diamonds], ["measured"], frameon=False, fontsize=9, labelcolor=GREY, loc="lower right")
    return figure


def plot_agreement(genes: np.ndarray, change: np.ndarray, truth: np.ndarray, r: float) -> Any:
    """Figure of every gene's predicted change against the measured one; those that change most are named."""
    ax = new_axes(4.6, f"Every gene: predicted against measured (r = {r:.2f})")
    named = np.argsort(-np.abs(truth))[:NAMED_GENES]
    ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    ax.scatter(truth, change, s=9, linewidths=0, color=REST)
    ax.scatter(truth[named], change[named], s=16, linewidths=0, color=ACCENT)
    # Names of neighbours lie above and below their points in turn
    for place, i in enumerate(sorted(named, key=lambda gene: truth[gene])):
        side, above = "right" if truth[i] > 0 else "left", 5 if place % 2 else -11
        ax.annotate(genes[i], (truth[i], change[i]), xytext=(0, above), textcoords="offset points", fontsize=8, ha=side)
    ax.set_xlabel("measured change", fontsize=9)
    ax.set_ylabel("predicted change", fontsize=9)
    return finished(ax)


def build(space: Space) -> gr.Blocks:
    """The page."""
    held_out, tries = space.about["held_out"], space.tries()
    first = next(iter(tries.values()))
    by_structure = space.extractor.drug_encoder == "fingerprint"
    figures = held_out["correlation of change"]

    @in_words
    def read_cells(path: str | None, progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008 (how Gradio asks for it)
        progress(0, desc="reading the file")
        own = uploaded_cells(path, read_upload)
        yield (
            space.kept(own),
            f"**{own.n_obs:,} cells**, yours, are the controls now, those named as the type chosen if any is.",
        )

    @in_words
    def predict(
        drug: str,
        dose: str,
        line: str,
        structure: str,
        own: ad.AnnData | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:
        said, changes, scatter, scores = space.predict(drug, dose, line, structure, own, progress)
        yield said, changes, gr.Plot(scatter, visible=scatter is not None), scores, gr.Row(visible=True)

    with blocks("Drug response: what a drug does to which genes") as demo:
        gr.Markdown(
            "# Drug response: what a drug does to which genes\n"
            "Choose a drug, a dose and a cell type: a transformer that reads control cells predicts how each gene "
            f"changes, beside what was measured. {space.about['data']}"
        )
        session = gr.State(time_to_live=1800)
        with gr.Row():
            # Of custom values this page says what is expected, in its own words
            drug = gr.Dropdown(space.data.drugs, value=first[0], label="Drug", allow_custom_value=True, min_width=220)
            doses = [f"{dose:g} uM" for dose in space.doses]
            dose = gr.Dropdown(
                doses,
                value=first[1],
                label="Dose (or type one)",
                allow_custom_value=True,
                min_width=160,
                visible=space.about["dose_known"],
            )
            line = gr.Dropdown(space.lines, value=first[2], label="Cell type", allow_custom_value=True, min_width=160)
        structure = gr.Textbox(
            label="Another structure (SMILES) in place of the drug", max_length=400, visible=by_structure
        )
        go = gr.Button("Predict", variant="primary")
        with gr.Row():
            examples = [(gr.Button(f"Try: {name}", size="sm", min_width=120), values) for name, values in tries.items()]
        # Others than counts come in scales that cannot be told apart
        with gr.Accordion("Control cells of your own", open=False, visible=space.extractor.target_sum is not None):
            file = gr.File(label="Untreated cells (.h5ad, raw counts)", file_types=[".h5ad"], height=165)
            from_file = gr.Button("Use my cells")
            read = gr.Markdown(min_height=STATUS_HEIGHT)
        said = gr.Markdown(min_height=STATUS_HEIGHT)
        with gr.Row(visible=False) as results:
            changes = gr.Plot(show_label=False, min_width=300)
            with gr.Column(min_width=300):
                scores = gr.Plot(show_label=False)
                scatter = gr.Plot(show_label=False)
        rest = ", ".join(f"{name} {value:.2f}" for name, value in figures.items() if name != "this model")
        gr.Markdown(
            f"A small model of few cells: on responses it was not trained on ({held_out['n']}), predicted and measured "
            f"change correlate at {figures['this model']:.2f} (Pearson, mean over responses), those of the simplest "
            f"predictions at: {rest}. *Additive* is the drug's mean effect in other types, *treated mean* the mean of "
            "all treated cells of the type. On real data models like this one do not tell unseen drugs apart. Files "
            "are removed as soon as they are read."
        )
        own = from_file.click(read_cells, file, [session, read], api_name="read_cells", **model_queue(read))
        forget(file, after=own)
        asked, outputs = [drug, dose, line, structure, session], [said, changes, scatter, scores, results]
        go.click(predict, asked, outputs, api_name="predict", **model_queue(said))
        for button, values in examples:
            filled = button.click(lambda values=values: values, None, asked[:4], api_visibility="private")
            filled.then(predict, asked, outputs, api_visibility="private", **model_queue(said))
    return demo


if __name__ == "__main__":
    chosen = Space(bundle(Path(__file__).parent / "model"))
    drug, dose, line, structure = list(chosen.tries().values())[-1]
    launch(build(chosen), warm_up=lambda: chosen.predict(drug, dose, line, structure, None, lambda *_, **__: None))
