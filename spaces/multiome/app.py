"""Open peaks of a cell from its genes, and the other way round, by a multiome T5 in the browser.

    python spaces/multiome/prepare.py && python spaces/multiome/app.py

A cell is the set of genes that it expresses; every peak is scored at once (`MultiomeT5ForFeaturePrediction`). What is
open in most cells is easily predicted, so predictions stand beside the frequency of each peak.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import gradio as gr
import numpy as np
import scipy.sparse as sp
import torch

import cellglot
from cellglot.serving import (
    STATUS_HEIGHT,
    Deadline,
    blocks,
    bundle,
    choose_cells,
    counted,
    forget,
    in_words,
    launch,
    model_queue,
    name_genes,
    read_upload,
    sampled,
    uploaded_cells,
)
from cellglot.serving.figures import ACCENT, GREY, REST, finished, new_axes, plot_bars
from cellglot.tokenization.binarized_string import TASKS
from cellglot.tokenization.gene_ids import GeneResolver

MAX_CELLS = 2000
SHOWN, RISING = 25, 10
SECONDS = 60
TASK = {"peaks from genes": "gex2atac", "genes from peaks": "atac2gex"}
# What is predicted, and what it is if it is there
WORDS = {"gex2atac": ("peaks", "open"), "atac2gex": ("genes", "expressed")}


@dataclass(frozen=True)
class Cells:
    """What a session keeps.

    types   name that a cell is chosen by -> its type, "" where nobody told
    inputs  task -> token ids of each cell
    truth   task -> (cells, features) what is there; none of uploads
    """

    types: dict[str, str]
    inputs: dict[str, list[np.ndarray]]
    truth: dict[str, sp.csr_matrix]


def plot_hits(hits: dict[str, np.ndarray], *, title: str, thing: str) -> Any:
    """Figure of the share of the k likeliest features that are there, by k, a line for each way to rank them.

    hits  way -> (k,) bool, the likeliest first; the first way stands out
    """
    ax = new_axes(3.6, title)
    looks: Any = {"color": ACCENT, "lw": 2.4}, {"color": GREY, "ls": ":"}, {"color": REST, "ls": "--"}
    for (name, hit), look in zip(hits.items(), looks, strict=False):
        places = np.arange(1, len(hit) + 1)
        ax.plot(places, np.cumsum(hit) / places, label=name, **look)
    ax.set(ylim=(-0.02, 1.02))
    ax.set_xlabel(f"k likeliest {thing}", fontsize=9)
    ax.set_ylabel("share of them truly there", fontsize=9)
    ax.figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return finished(ax)


class Space:
    """The model and what it does for one request. Holds nothing of any session."""

    def __init__(self, folder: Path) -> None:
        self.processor: Any = cellglot.BinarizedStringProcessor.from_pretrained(folder)
        self.model: Any = cellglot.MultiomeT5ForFeaturePrediction.from_pretrained(folder).eval()
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        with np.load(folder / "frequencies.npz", allow_pickle=False) as stored:
            tables = dict(stored)
        # Type -> row of `usual[task]`: how often training cells have each feature; "" of all cells
        self.rows = {name: i for i, name in enumerate(tables["types"].tolist())}
        self.usual = {task: tables[task] for task in TASKS}
        self._pair = ad.read_h5ad(folder / "examples_rna.h5ad"), ad.read_h5ad(folder / "examples_atac.h5ad")
        features = self.processor.feature_extractor
        self._genes = GeneResolver(features.genes, features.gene_aliases)
        var: Any = self._pair[1].var
        # Simulated peak -> the genes that open it
        self._rule: dict[str, str] = var["rule"].to_dict() if "rule" in var else {}
        self._examples: Cells | None = None

    def examples(self, progress: Any) -> Cells:
        """The built-in cells, read for whoever asks first."""
        if self._examples is None:
            progress(0.2, desc="reading the cells")
            rna, atac = self._pair
            read = {task: self.processor.encode((rna, atac), task)[:] for task in TASKS}
            truth = {task: self.processor.decode_matrix(read[task]["labels"], TASKS[task][1]) for task in TASKS}
            types = [str(kind) for kind in rna.obs["cell_type"]] if "cell_type" in rna.obs else [""] * rna.n_obs
            names = [f"{kind}, {cell}".removeprefix(", ") for kind, cell in zip(types, rna.obs_names, strict=True)]
            inputs = {task: [np.asarray(ids) for ids in read[task]["input_ids"]] for task in TASKS}
            self._examples = Cells(dict(zip(names, types, strict=True)), inputs, truth)
        return self._examples

    def read(self, adata: ad.AnnData, progress: Any) -> tuple[Cells, str]:
        """The cells, or a sample of MAX_CELLS, as the model reads them, and in words what was found."""
        deadline, n_given = Deadline(SECONDS), adata.n_obs
        adata, said = name_genes(sampled(adata, MAX_CELLS), self._genes)
        progress(0.3, desc="reading the cells")
        # Few known genes are no reason to refuse twice
        read = self.processor.encode(adata, "gex2atac", min_matched_features=0)[:]
        deadline.check()
        given = adata.obs["cell_type"].astype(str) if "cell_type" in adata.obs else [""] * adata.n_obs
        types = [kind if kind in self.rows else "" for kind in given]
        ids_n = [np.asarray(ids, np.int32) for ids in read["input_ids"]]
        # Each has a task token and an end token
        known = [i for i, ids in enumerate(ids_n) if len(ids) > 2]
        cells = Cells({str(adata.obs_names[i]): types[i] for i in known}, {"gex2atac": [ids_n[i] for i in known]}, {})
        return cells, f"{counted(len(known), n_given)}, yours; {said}. Which of their peaks are open is not known."

    def figures(self, cells: Cells, cell: str, task: str) -> tuple[str, Any, Any, Any]:
        """In words, and figures of the likeliest features, of the hits, and of what rises above its frequency."""
        if cell not in cells.types:
            raise ValueError(f"Expected a cell of the list, found {str(cell)[:40]!r}. Choose one of it.")
        if task not in cells.inputs:
            raise ValueError("Expected peaks to predict genes from, found none: only the built-in cells have them.")
        number, kind = list(cells.types).index(cell), cells.types[cell]
        # A type that the training cells lack has the frequencies of all
        kind = kind if kind in self.rows else ""
        ids = torch.from_numpy(cells.inputs[task][number].astype(np.int64))[None]
        with torch.no_grad():
            likely = self.model(ids).logits[0].sigmoid().numpy()
        names: Any = np.array(self.processor.feature_extractor.features(TASKS[task][1]))
        (things, there), usual = WORDS[task], self.usual[task][self.rows[kind]]
        top, rising = np.argsort(-likely)[:SHOWN], np.argsort(usual - likely)[:RISING]
        whose = f"in {kind or 'all cells'}"
        said, hits_figure, title = f"**{cell}**: ", None, f"Likeliest {there} {things}"
        marked: list[str] = []
        if task in cells.truth:
            present = cells.truth[task][[number]].toarray()[0] > 0
            ways = {"this model": likely, "frequency in all cells": self.usual[task][0]}
            ways |= {f"frequency {whose}": usual} if kind else {}
            n_shown = min(max(2 * int(present.sum()), 50), len(names))
            hits = {way: present[np.argsort(-scores, kind="stable")[:n_shown]] for way, scores in ways.items()}
            hits_figure = plot_hits(hits, title=f"Truly {there} among the likeliest", thing=things)
            # The empty name, as bars are all bright where nothing is marked
            marked = [*names[present], ""]
            title += f" (bright: truly {there})"
            found = ", ".join(f"{hit[:SHOWN].sum()} by {way}" for way, hit in hits.items())
            said += f"{present.sum():,} {things} are {there}. Among the {SHOWN} likeliest: {found}. "
        said += f"*{names[rising[0]]}* rises most above its frequency {whose}"
        if names[rising[0]] in self._rule:
            said += f"; the planted rule opens it with {self._rule[names[rising[0]]]}"
        top_figure = plot_bars(
            names[top].tolist(), likely[top], title=title, axis="predicted probability", marked=marked
        )
        rising_figure = plot_bars(
            names[rising].tolist(),
            (likely - usual)[rising],
            title=f"Above their frequency {whose}",
            axis="probability above frequency",
            marked=marked,
        )
        return said + ".", top_figure, hits_figure, rising_figure


def build(space: Space) -> gr.Blocks:
    """The page."""
    held_out = space.about["held_out"]

    def shown(cells: Cells, said: str) -> tuple[Any, ...]:
        names, ways = list(cells.types), [way for way, task in TASK.items() if task in cells.inputs]
        if not names:
            raise ValueError("Expected cells that express a gene that the model knows, found none.")
        words, top, hits, rising = space.figures(cells, names[0], "gex2atac")
        choices = gr.Dropdown(choices=names, value=names[0]), gr.Radio(choices=ways, value=ways[0])
        hits = gr.Plot(hits, visible=bool(cells.truth))
        return cells, said, *choices, words, top, hits, rising, gr.Column(visible=True)

    @in_words
    def analyse_examples(progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008 (how Gradio asks for it)
        cells = space.examples(progress)
        yield shown(cells, f"**{len(cells.types)} cells**, built in, none of which the model was trained on.")

    @in_words
    def analyse(path: str | None, progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008
        progress(0, desc="reading the file")
        yield shown(*space.read(uploaded_cells(path, read_upload), progress))

    @in_words
    def predict(cells: Cells | None, cell: str, direction: str) -> Iterator[Any]:
        if cells is None:
            raise ValueError("Expected cells, found none: analyse a file or the built-in cells first.")
        words, top, hits, rising = space.figures(cells, cell, TASK.get(direction, ""))
        yield words, top, gr.Plot(hits, visible=hits is not None), rising

    with blocks("Multiome: open peaks from genes") as demo:
        gr.Markdown(
            "# Multiome: which chromatin is open in a cell, told from its genes\n"
            "Give raw counts of single cells and pick one: a transformer reads which genes it expresses and predicts "
            "which places of its chromatin (peaks) are open. Of the built-in cells both are known: see what is true, "
            "or turn it round, genes from peaks."
        )
        session = gr.State(time_to_live=1800)
        from_examples, file, from_file = choose_cells(space.about["examples"])
        read = gr.Markdown(min_height=STATUS_HEIGHT)
        with gr.Column(visible=False) as results:
            with gr.Row():
                cell = gr.Dropdown(label="Cell", choices=[], allow_custom_value=True, min_width=240)
                direction = gr.Radio(list(TASK), value="peaks from genes", label="Predict", min_width=240)
            said = gr.Markdown(min_height=STATUS_HEIGHT)
            with gr.Row():
                top = gr.Plot(show_label=False, min_width=300)
                with gr.Column(min_width=300):
                    hits = gr.Plot(show_label=False)
                    rising = gr.Plot(show_label=False)
        peaks, genes = held_out["gex2atac"], held_out["atac2gex"]
        gr.Markdown(
            f"Average precision in {held_out['n']} cells held out from training, of {space.about['accessibility']} "
            f"accessibility: peaks from genes, this model {peaks['model']:.3f}, the frequency of each peak "
            f"{peaks['frequency']:.3f}, its frequency in the cell's type, which the model is not told, "
            f"{peaks['frequency in its type']:.3f}; genes from peaks, {genes['model']:.3f}, {genes['frequency']:.3f}, "
            f"{genes['frequency in its type']:.3f}. Files are removed as soon as they are read."
        )
        drawn = [said, top, hits, rising]
        outputs = [session, read, cell, direction, *drawn, results]
        from_examples.click(analyse_examples, None, outputs, api_name="analyse_examples", **model_queue(read))
        own = from_file.click(analyse, file, outputs, api_name="analyse", **model_queue(read))
        forget(file, after=own)
        picked: Any = [cell.input, direction.input]
        # The last choice counts, also one that is made while another is drawn
        options: Any = {"api_name": "predict", "trigger_mode": "always_last", **model_queue(said)}
        gr.on(picked, predict, [session, cell, direction], drawn, **options)
    return demo


if __name__ == "__main__":
    chosen = Space(bundle(Path(__file__).parent / "model"))
    launch(build(chosen), warm_up=lambda: chosen.examples(lambda *_, **__: None))
