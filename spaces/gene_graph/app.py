"""Cell types by a gene-graph classifier, with the genes and edges that decided, in the browser.

    python spaces/gene_graph/prepare.py && python spaces/gene_graph/app.py

Expression is smoothed along a gene network and classified; importance is expression times the gradient of a type's
logit (genes), and weight times gradient (edges).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import gradio as gr
import pandas as pd

import cellglot
from cellglot.gene_graph import GeneNames
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
from cellglot.serving.figures import finished, new_axes, plot_bars

MAX_CELLS = 2000
SHOWN_GENES, SHOWN_EDGES = 15, 30
SECONDS = 120


@dataclass(frozen=True)
class Decision:
    """What a session keeps: cells of each predicted type, and the tables of `gene_importance`."""

    counts: pd.Series
    genes: pd.DataFrame
    edges: pd.DataFrame


class Space:
    """The model and what it does for one request. Holds nothing of any session."""

    def __init__(self, folder: Path) -> None:
        self.model = cellglot.GeneGraphForSequenceClassification.from_pretrained(folder).eval()
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self._examples = ad.read_h5ad(folder / "examples.h5ad")
        self.genes = GeneNames.of_config(self.model.config).resolver()

    def examples(self, progress: Any) -> Decision:
        """The built-in cells, those held out from training."""
        return self.decide(self._examples[self._examples.obs["held_out"]].copy(), progress)

    def decide(self, adata: ad.AnnData, progress: Any) -> Decision:
        """Types of the cells, or of a sample of MAX_CELLS, and what decided."""
        deadline = Deadline(SECONDS)
        adata = sampled(adata, MAX_CELLS)
        progress(0.1, desc="naming the cells")
        named = cellglot.classify_expression(adata, self.model, progress=False)
        counts = named.iloc[:, 0].astype(str).value_counts()
        deadline.check()
        progress(0.4, desc="asking which genes and edges decided")
        genes, edges = cellglot.gene_importance(adata, self.model, top_edges=200, progress=False)
        return Decision(counts, genes, edges)

    def figures(self, decision: Decision, label: str) -> tuple[str, Any, Any]:
        """In words, the genes that speak most for a type, and the network of its edges."""
        if label not in decision.counts.index:
            raise ValueError(
                f"Expected a type of the list, found {str(label)[:40]!r}. Choose one that cells were given."
            )
        genes = decision.genes.query("label == @label")
        top = genes.nlargest(SHOWN_GENES, "importance")
        first = ", ".join(top["gene_symbol"].head(3).astype(str))
        bars = plot_bars(
            top["gene_symbol"].tolist(),
            top["importance"],
            title=f"Genes that speak for {label}",
            axis="importance (logit)",
        )
        ax = new_axes(5.0, "")
        cellglot.plot_importance_network(decision.genes, decision.edges, label, n_edges=SHOWN_EDGES, ax=ax)
        said = f"**{label}**, {decision.counts[label]} cells: {first} speak for it the most."
        return said, bars, finished(ax)


def build(space: Space) -> gr.Blocks:
    """The page."""
    held_out = space.about["held_out"]

    def shown(decision: Decision, n_given: int, whose: str) -> tuple[Any, ...]:
        labels = decision.counts.index.tolist()
        said, genes, network = space.figures(decision, labels[0])
        types = plot_bars(labels, decision.counts, title="Predicted types", axis="cells")
        read = f"{counted(int(decision.counts.sum()), n_given)}, {whose}."
        choice = gr.Dropdown(choices=labels, value=labels[0])
        return decision, read, types, choice, said, genes, network, gr.Column(visible=True)

    @in_words
    def analyse_examples(progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008 (how Gradio asks for it)
        decision = space.examples(progress)
        yield shown(decision, int(decision.counts.sum()), "built in, none of which the model was trained on")

    @in_words
    def analyse(path: str | None, progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008
        progress(0, desc="reading the file")
        adata, known = name_genes(uploaded_cells(path, read_upload), space.genes)
        yield shown(space.decide(adata, progress), adata.n_obs, f"yours; {known}")

    @in_words
    def explain(decision: Decision | None, label: str) -> Iterator[Any]:
        if decision is None:
            raise ValueError("Expected cells, found none: analyse a file or the built-in cells first.")
        yield space.figures(decision, label)

    with blocks("Gene graph: cell types and why") as demo:
        gr.Markdown(
            "# Gene graph: a cell's type, and the genes and edges that decided\n"
            "Give raw counts of single cells: a network that smooths expression along a graph of genes names each "
            f"cell's type. Then choose a type to see what spoke for it; the graph: {space.about['network']}."
        )
        session = gr.State(time_to_live=1800)
        from_examples, file, from_file = choose_cells(space.about["examples"])
        read = gr.Markdown(min_height=STATUS_HEIGHT)
        with gr.Column(visible=False) as results:
            with gr.Row():
                types = gr.Plot(show_label=False, min_width=300)
                with gr.Column(min_width=300):
                    label = gr.Dropdown(label="Type to explain", choices=[], allow_custom_value=True)
                    said = gr.Markdown(min_height=STATUS_HEIGHT)
            with gr.Row():
                genes = gr.Plot(show_label=False, min_width=300)
                network = gr.Plot(show_label=False, min_width=300)
        gr.Markdown(
            f"A small model of few cells: of {held_out['n']} cells it was not trained on it names "
            f"{held_out['model']:.0%} rightly, logistic regression on their counts "
            f"{held_out['logistic regression']:.0%}. Red speaks for the type, blue against it. What a model uses is "
            "not what biology does: on real data a shuffled graph names cells as well. Files are removed as soon as "
            "they are read."
        )
        outputs = [session, read, types, label, said, genes, network, results]
        from_examples.click(analyse_examples, None, outputs, api_name="analyse_examples", **model_queue(read))
        own = from_file.click(analyse, file, outputs, api_name="analyse", **model_queue(read))
        forget(file, after=own)
        label.input(explain, [session, label], [said, genes, network], api_name="explain", **model_queue(said))
    return demo


if __name__ == "__main__":
    chosen = Space(bundle(Path(__file__).parent / "model"))
    launch(build(chosen), warm_up=lambda: chosen.examples(lambda *_, **__: None))
