"""Cell types and in silico perturbation with a Geneformer, in the browser.

    python spaces/geneformer/prepare.py && python spaces/geneformer/app.py

Every cell becomes the sequence of its genes, ranked by how much more they are expressed than usual; the model names the
cell's type and embeds it. A gene is then taken out of that sequence, or put first, and what moves is measured.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import gradio as gr
import numpy as np
import pandas as pd

import cellglot
from cellglot.figures import umap_coordinates
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
    read_upload,
    sampled,
    uploaded_cells,
)
from cellglot.serving.figures import plot_bars, plot_cells

MAX_CELLS = 2000
# A gene is offered, and a type shown, when this many cells have it
MIN_CELLS = 5
# Cells of a type that a gene is perturbed in, cells in which it is compared with others, and how many others
CELLS_PER_TYPE, COMPARED_CELLS, COMPARED_GENES = 30, 40, 15
SECONDS = 120
# To begin with: markers of B and NK cells; how little the last one matters to the built-in model is worth a look too
EXAMPLES = (("MS4A1", "delete"), ("NKG7", "overexpress"), ("CD79A", "delete"))


@dataclass(frozen=True)
class Cells:
    """What a session keeps.

    adata  raw counts, and obs["type"] as predicted
    genes  those that can be perturbed: what the user calls it -> the name in the file that the model knows
    """

    adata: ad.AnnData
    genes: dict[str, str]


class Space:
    """The model and what it does for one request. Holds nothing of any session."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = cellglot.GeneformerForSequenceClassification.from_pretrained(folder).eval()
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self._examples = ad.read_h5ad(folder / "examples.h5ad")
        self._analysed: tuple[Cells, Any, Any] | None = None

    def examples(self, progress: Any) -> tuple[Cells, Any, Any]:
        """The built-in cells, analysed for whoever asks first."""
        if self._analysed is None:
            self._analysed = self.analyse(self._examples, progress)
        return self._analysed

    def analyse(self, adata: ad.AnnData, progress: Any) -> tuple[Cells, Any, Any]:
        """The cells, or a sample of MAX_CELLS, with their types; figures of their map and of the types."""
        deadline = Deadline(SECONDS)
        adata = sampled(adata, MAX_CELLS)
        parts = []
        for start in range(0, adata.n_obs, 200):
            deadline.check()
            progress(0.8 * start / adata.n_obs, desc="the model reads the cells")
            part = cellglot.embed_cells(adata[start : start + 200], self.model, self.tokenizer, progress=False)
            parts.append(cellglot.classify_cells(part, self.model, self.tokenizer, names="type", progress=False))
        obs = pd.concat([part.obs["type_predicted"].astype(str) for part in parts])
        embeddings = np.concatenate([part.obsm["X_geneformer"] for part in parts])
        known = np.isfinite(embeddings).all(axis=1)
        if known.sum() < 2 * MIN_CELLS:
            raise ValueError(f"Expected {2 * MIN_CELLS} cells or more with genes the model knows, found {known.sum()}.")
        adata = adata[known].copy()
        adata.obs["type"] = obs[known].to_numpy()
        progress(0.85, desc="drawing the map")
        xy = umap_coordinates(embeddings[known])
        counts = adata.obs["type"].value_counts()
        return (
            Cells(adata, self._perturbable(adata)),
            plot_cells(xy, adata.obs["type"].tolist(), title="Cells by their embedding (UMAP)"),
            plot_bars(list(counts.index), counts, title="Predicted types", axis="cells"),
        )

    def _perturbable(self, adata: ad.AnnData) -> dict[str, str]:
        columns = {name: adata.var[name].astype(str) for name in adata.var if adata.var[name].dtype == object}
        columns[""] = adata.var_names.to_series()
        matches = {name: self.tokenizer.resolver.match(list(values)) for name, values in columns.items()}
        best = max(matches, key=lambda name: matches[name].n_matched)
        offered = (matches[best].index_g >= 0) & (self._n_cells(adata) >= MIN_CELLS)
        return dict(sorted(zip(adata.var_names[offered], columns[best][offered], strict=True)))

    @staticmethod
    def _n_cells(adata: ad.AnnData) -> np.ndarray:
        matrix: Any = adata.X
        return np.asarray((matrix > 0).sum(axis=0)).ravel()

    def perturb(self, cells: Cells, gene: str, kind: str, progress: Any) -> tuple[str, Any, Any, Any]:
        """In words, and figures of the shift by type, of the gene among others, and of the cells' other genes.

        Shift is 1 - cosine similarity of embeddings before and after.
        """
        deadline = Deadline(SECONDS)
        if gene not in cells.genes:
            raise ValueError(
                f"Expected a gene of the list, found {str(gene)[:40]!r}. Choose one that the cells express."
            )
        types = cells.adata.obs["type"].to_numpy()
        matrix: Any = cells.adata[:, gene].X
        usable = matrix.toarray().ravel() > 0 if kind == "delete" else np.ones(len(types), bool)
        rng = np.random.default_rng(0)
        by_type: dict[str, tuple[float, int]] = {}
        names, counts = np.unique(types[usable], return_counts=True)
        for i, name in enumerate(names[counts >= MIN_CELLS]):
            deadline.check()
            progress(0.5 * i / len(names), desc=f"{gene} in {name}")
            chosen = rng.permutation(np.flatnonzero(usable & (types == name)))[:CELLS_PER_TYPE]
            shifts = self._shifts(cells, chosen, kind, [cells.genes[gene]])["shift"]
            by_type[name] = float(shifts.mean()), len(shifts)
        if not by_type:
            raise ValueError(f"No type has {MIN_CELLS} cells with {gene}. Choose a gene of more cells.")
        sample = rng.permutation(np.flatnonzero(usable))[:COMPARED_CELLS]
        others = self._of_as_many_cells(cells, gene)
        deadline.check()
        progress(0.55, desc="other genes, to compare with")
        token = {name: label for label, name in zip([gene, *others], self._tokens(cells, [gene, *others]), strict=True)}
        rows = self._shifts(cells, sample, kind, [cells.genes[label] for label in [gene, *others]])
        among = (
            rows.groupby("gene")["shift"].agg(["mean", "size"]).query("size >= 3")["mean"].sort_values(ascending=False)
        )
        among.index = among.index.map(token)
        deadline.check()
        progress(0.8, desc="genes that change with it")
        rows = self._shifts(cells, sample, kind, [cells.genes[gene]], effect="gene").query("affected != 'cell'")
        affected = rows.groupby("affected")["shift"].agg(["mean", "size"]).query("size >= 3")["mean"].nlargest(12)
        labels = dict(zip(self._tokens(cells, list(cells.genes)), cells.genes, strict=True))
        done = {"delete": "deleted", "overexpress": "overexpressed"}[kind]
        ranked = dict(sorted(by_type.items(), key=lambda item: item[1], reverse=True))
        strongest, rank = next(iter(ranked)), list(among.index).index(gene) + 1
        shift, n_cells = ranked[strongest]
        said = (
            f"**{gene}**, {done}: *{strongest}* moves the most (shift {shift:.4f} in {n_cells} cells). "
            f"Of {len(among)} genes that about as many cells express it is number **{rank}** by strength."
        )
        return (
            said,
            plot_bars(
                [f"{name} ({n})" for name, (_, n) in ranked.items()],
                [shift for shift, _ in ranked.values()],
                title=f"Cells that move when {gene} is {done}",
                axis="shift",
            ),
            plot_bars(list(among.index), among, title=f"{gene} among other genes", axis="shift", marked=[gene]),
            plot_bars(
                [labels.get(str(name), str(name)) for name in affected.index],
                affected,
                title="Genes that move with it",
                axis="shift",
            ),
        )

    def _shifts(self, cells: Cells, chosen: np.ndarray, kind: str, genes: list[str], **options: Any) -> pd.DataFrame:
        part = cells.adata[np.sort(chosen)].copy()
        rows = cellglot.perturb_cells(
            part, self.model, self.tokenizer, kind=kind, genes=genes, progress=False, **options
        )
        return rows.assign(shift=1 - rows["cosine_similarity"])

    def _tokens(self, cells: Cells, labels: list[str]) -> list[str]:
        """What the model's tables call these genes."""
        resolver = self.tokenizer.resolver
        return [resolver.vocabulary[i] for i in resolver.match([cells.genes[label] for label in labels]).index_g]

    def _of_as_many_cells(self, cells: Cells, gene: str) -> list[str]:
        """The genes nearest in number of cells: how widely a gene is expressed alone decides much of its effect."""
        labels = list(cells.genes)
        n_cells = self._n_cells(cells.adata[:, labels])
        order = np.argsort(np.abs(n_cells - n_cells[labels.index(gene)]), kind="stable")
        return [labels[i] for i in order if labels[i] != gene][:COMPARED_GENES]


def build(space: Space) -> gr.Blocks:
    """The page."""
    held_out = space.about["held_out"]

    def shown(analysed: tuple[Cells, Any, Any], whose: str, n_given: int | None = None) -> tuple[Any, ...]:
        cells, *figures = analysed
        n, genes = cells.adata.n_obs, list(cells.genes)
        said = f"{counted(n, n_given or n)}, {whose}. {len(genes):,} of their genes can be perturbed."
        first = next((gene for gene, _ in EXAMPLES if gene in cells.genes), next(iter(genes), None))
        return cells, said, *figures, gr.Dropdown(choices=genes, value=first), gr.Column(visible=True)

    @in_words
    def analyse_examples(progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008 (how Gradio asks for it)
        yield shown(space.examples(progress), "built in")

    @in_words
    def analyse(path: str | None, progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008
        progress(0, desc="reading the file")
        adata = uploaded_cells(path, read_upload)
        yield shown(space.analyse(adata, progress), "yours", adata.n_obs)

    @in_words
    def perturb(
        cells: Cells | None,
        gene: str,
        kind: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:
        if cells is None:
            raise ValueError("Expected cells, found none: analyse a file or the built-in cells first.")
        yield space.perturb(cells, gene, kind, progress)

    with blocks("Geneformer: cell types and perturbation") as demo:
        gr.Markdown(
            "# Geneformer: what a cell is, and which genes hold it there\n"
            "Give raw counts of single cells: a transformer that reads each cell as a ranking of its genes names its "
            "type and maps it. Then delete or overexpress a gene, and see which cells and which other genes move."
        )
        session = gr.State(time_to_live=1800)
        from_examples, file, from_file = choose_cells(space.about["examples"])
        said = gr.Markdown(min_height=STATUS_HEIGHT)
        with gr.Column(visible=False) as results:
            with gr.Row():
                cell_map = gr.Plot(show_label=False, min_width=300)
                type_bars = gr.Plot(show_label=False, min_width=300)
            gr.Markdown("## Perturb a gene")
            with gr.Row():
                gene = gr.Dropdown(label="Gene", choices=[], allow_custom_value=True, min_width=160)
                kind = gr.Radio(["delete", "overexpress"], value="delete", label="What to do", min_width=160)
            go = gr.Button("Perturb", variant="primary")
            with gr.Row():
                tries = [
                    (gr.Button(f"Try: {does} {name}", size="sm", min_width=120), (name, does))
                    for name, does in EXAMPLES
                ]
            perturbed = gr.Markdown(min_height=STATUS_HEIGHT)
            with gr.Row():
                by_type = gr.Plot(show_label=False, min_width=300)
                among = gr.Plot(show_label=False, min_width=300)
                affected = gr.Plot(show_label=False, min_width=300)
        gr.Markdown(
            f"A small model of few cells: of {held_out['n']} cells it was not trained on it names "
            f"{held_out['model']:.0%} rightly, logistic regression on their counts "
            f"{held_out['logistic regression']:.0%}. Types that it has not seen get the nearest name that it knows. "
            "Shift is 1 - cosine similarity of embeddings before and after. Files are removed as soon as they are read."
        )
        outputs = [session, said, cell_map, type_bars, gene, results]
        from_examples.click(analyse_examples, None, outputs, api_name="analyse_examples", **model_queue(said))
        own = from_file.click(analyse, file, outputs, api_name="analyse", **model_queue(said))
        forget(file, after=own)
        asked, drawn = [session, gene, kind], [perturbed, by_type, among, affected]
        go.click(perturb, asked, drawn, api_name="perturb", **model_queue(perturbed))
        for button, values in tries:
            filled = button.click(lambda values=values: values, None, asked[1:], api_visibility="private")
            filled.then(perturb, asked, drawn, api_visibility="private", **model_queue(perturbed))
    return demo


if __name__ == "__main__":
    chosen = Space(bundle(Path(__file__).parent / "model"))
    launch(build(chosen), warm_up=lambda: chosen.examples(lambda *_, **__: None))
