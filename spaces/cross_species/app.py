"""Mouse cells in human space by a cross-species model, in the browser.

    python spaces/cross_species/prepare.py && python spaces/cross_species/app.py

A cell is its principal components. Those of mouse cells are turned into those of human cells by an aligner, encoder and
decoder, and compared there with human cells: beside what renaming the genes would do, which needs no model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import gradio as gr
import numpy as np
import pandas as pd

import cellglot
from cellglot.metrics.label_transfer import label_transfer
from cellglot.metrics.wasserstein import wasserstein_matrix
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
from cellglot.serving.figures import ACCENT, REST, plot_bars, plot_cells, plot_matrix
from cellglot.tokenization.gene_ids import GeneResolver

MAX_CELLS = 2000
# A type is compared when it has this many cells, and at most so many types of a species are
MIN_CELLS, MAX_TYPES = 5, 16
TYPE_COLUMNS = ("cell_type", "celltype", "cell type", "type", "class", "cluster", "leiden", "louvain")
N_CLUSTERS, SHOWN_GENES = 6, 15
# Of a set at the most: distances of unlike numbers of cells do not compare
WASSERSTEIN: dict[str, Any] = {"n_cells": 40, "n_resamples": 5, "progress": False}
SECONDS = 120


@dataclass(frozen=True)
class Translated:
    """What a session keeps.

    n_cells    of each mouse type that is compared
    distances  mouse types x human types: Wasserstein, in human space
    means      mouse types x human principal components
    """

    n_cells: pd.Series
    distances: pd.DataFrame
    means: pd.DataFrame


class Space:
    """The model and what it does for one request. Holds nothing of any session."""

    def __init__(self, folder: Path) -> None:
        self.extractor: Any = cellglot.PCAProjectionFeatureExtractor.from_pretrained(folder)
        self.model = cellglot.CrossSpeciesForTranslation.from_pretrained(folder).eval()
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        mouse = ad.read_h5ad(folder / "mouse.h5ad")
        self.examples = mouse[mouse.obs["held_out"]].copy()
        human = ad.read_h5ad(folder / "human.h5ad")
        self.human_types = human.obs["cell_type"].astype(str).to_numpy(dtype=str)
        self.human = self.extractor(human, "human")["projections"]
        # In units of how far human cells lie from their mean
        self.length = float(np.sqrt(np.square(self.human).sum(axis=1).mean()))
        self.orthologs = pd.read_csv(folder / "orthologs.csv")
        self.renamed = self._renaming()
        ids = self.extractor.gene_ids("mouse")
        self._mouse_genes = GeneResolver(ids, dict(zip(self.extractor.gene_symbols("mouse"), ids, strict=True)))

    def _renaming(self) -> Any:
        """Projects mouse cells to the human components, each ortholog as if it were the human gene, means removed."""
        human, mouse = (self.extractor.projection(name) for name in ("human", "mouse"))
        index_h, index_m = self.orthologs["human"].to_numpy(), self.orthologs["mouse"].to_numpy()
        as_human = replace(
            mouse,
            gene_ids=[mouse.gene_ids[i] for i in index_m],
            gene_symbols=[mouse.gene_symbols[i] for i in index_m],
            mean_g=mouse.mean_g[index_m],
            scale=human.scale,
            components_kg=np.ascontiguousarray(human.components_kg[:, index_h]),
        )
        return cellglot.PCAProjectionFeatureExtractor({"mouse": as_human}, target_sum=self.extractor.target_sum)

    def translate(self, adata: ad.AnnData, whose: str, progress: Any) -> tuple[Translated, str, tuple[Any, ...]]:
        """Mouse cells, or a sample of MAX_CELLS of them, in human space; in words; maps and heat maps."""
        deadline, n_given = Deadline(SECONDS), adata.n_obs
        matrix: Any = adata.X
        adata = sampled(adata[np.asarray(matrix.sum(axis=1)).ravel() > 0].copy(), MAX_CELLS)
        if adata.n_obs < MIN_CELLS:
            raise ValueError(f"Expected {MIN_CELLS} cells or more with counts, found {adata.n_obs}.")
        adata, known = name_genes(adata, self._mouse_genes)
        progress(0.1, desc="mouse cells to human space")
        components = self.extractor(adata, "mouse", return_tensors="pt")["projections"]
        translated = self.model.translate(components, source="mouse", target="human").numpy() / self.length
        renamed, human = self.renamed(adata, "mouse")["projections"] / self.length, self.human / self.length
        types = types_of(adata, translated)
        deadline.check()
        progress(0.4, desc="distances between types")
        rows, columns = compared(types), compared(self.human_types)
        if not len(rows):
            raise ValueError(f"No type has {MIN_CELLS} cells. Upload more cells, or a column cell_type of fewer types.")
        in_rows, in_columns = np.isin(types, rows.index), np.isin(self.human_types, columns.index)
        distances = [
            wasserstein_matrix(
                cells[in_rows], types[in_rows], human[in_columns], self.human_types[in_columns], **WASSERSTEIN
            )[0].loc[rows.index, columns.index]  # type: ignore[index]
            for cells in (translated, renamed)
        ]
        deadline.check()
        progress(0.8, desc="drawing")
        xy = np.concatenate([human, translated])[:, :2]
        species = ["human"] * len(human) + ["mouse"] * len(translated)
        heat = {"rows": list(rows.index), "columns": list(columns.index), "bar": "Wasserstein distance"}
        figures = (
            plot_cells(xy, species, title="Human space, by species", colours={"human": REST, "mouse": ACCENT}),
            plot_cells(xy, [*self.human_types, *types], title="Human space, by type"),
            plot_matrix(distances[0], title="Mouse (rows) to human: translated", **heat),
            plot_matrix(distances[1], title="Mouse (rows) to human: genes renamed", **heat),
        )
        means = pd.DataFrame({name: translated[types == name].mean(axis=0) for name in rows.index}).T * self.length
        said = (
            f"{counted(adata.n_obs, n_given)}, {whose}; {known}. {self._agreement(human, types, translated, renamed)}"
        )
        return Translated(rows, distances[0], means), said, figures

    def _agreement(self, human: Any, types: Any, translated: Any, renamed: Any) -> str:
        """How many cells lie among human cells of their own type, where both species have types of one name."""
        if not len(np.intersect1d(types, self.human_types)):
            return "No type is called as one of the human cells."
        ours, simple = (label_transfer(human, self.human_types, cells, types) for cells in (translated, renamed))
        return (
            f"Of {ours['n']:,} cells of types that both species have, the nearest human cells are of the same type for "
            f"**{ours['accuracy']:.0%}** when translated, for {simple['accuracy']:.0%} when genes are only renamed."
        )

    def figures(self, translated: Translated, label: str) -> tuple[str, Any, Any]:
        """In words, human types by their distance, and the human genes that the translation raises the most."""
        if label not in translated.n_cells.index:
            raise ValueError(f"Expected a type of the list, found {str(label)[:40]!r}. Choose one of your cells'.")
        near = translated.distances.loc[label].sort_values()  # type: ignore[union-attr]
        mean_k = translated.means.loc[[label]].to_numpy(dtype=np.float32)
        raised = self.extractor.inverse(mean_k, "human")[0] - self.extractor.projection("human").mean_g
        top = np.argsort(-raised)[:SHOWN_GENES]
        symbols = np.array(self.extractor.gene_symbols("human"))[top].tolist()
        unmeasured = [name for name, i in zip(symbols, top, strict=True) if i not in set(self.orthologs["human"])]
        said = (
            f"**{label}**, {translated.n_cells[label]:,} mouse cells: nearest to human **{near.index[0]}** "
            f"({near.iloc[0]:.2f}). Translated, they express {', '.join(symbols[:3])} more than human cells do on "
            f"average; {len(unmeasured)} of the {len(top)} genes shown were not measured in the mouse"
            + (" (bright)." if unmeasured else ".")
        )
        return (
            said,
            plot_bars(list(near.index), near, title=f"{label} to human types", axis="distance", marked=[near.index[0]]),
            plot_bars(
                symbols,
                raised[top],
                title=f"Human genes of {label}",
                axis="log expression above the human mean",
                marked=unmeasured,
            ),
        )


def types_of(adata: ad.AnnData, cells: np.ndarray) -> np.ndarray:
    """(cells,) what a column of obs calls them; without one, clusters."""
    named = {str(name).lower().replace("_", " "): name for name in adata.obs}
    for name in TYPE_COLUMNS:
        if (column := named.get(name.replace("_", " "))) is not None:
            return adata.obs[column].astype(str).replace("", "unnamed").to_numpy(dtype=str)
    from sklearn.cluster import KMeans

    found = KMeans(min(N_CLUSTERS, len(cells) // MIN_CELLS), random_state=0).fit_predict(cells)
    # Number 1 is the largest
    return np.array([f"cluster {i + 1}" for i in pd.Series(found).value_counts().index.get_indexer(found)])


def compared(types: np.ndarray) -> pd.Series:
    """Cells of the most frequent types that have enough."""
    counts = pd.Series(types).value_counts()
    return counts[counts >= MIN_CELLS].head(MAX_TYPES)


def build(space: Space) -> gr.Blocks:
    """The page."""

    def shown(adata: ad.AnnData, whose: str, progress: Any) -> tuple[Any, ...]:
        translated, read, figures = space.translate(adata, whose, progress)
        names = list(translated.n_cells.index)
        choice = gr.Dropdown(choices=names, value=names[0])
        return translated, read, *figures, choice, *space.figures(translated, names[0]), gr.Column(visible=True)

    @in_words
    def analyse_examples(progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008 (how Gradio asks for it)
        yield shown(space.examples, "built in, none of which the model was trained on", progress)

    @in_words
    def analyse(path: str | None, progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008
        progress(0, desc="reading the file")
        yield shown(uploaded_cells(path, read_upload), "yours", progress)

    @in_words
    def look_at(translated: Translated | None, label: str) -> Iterator[Any]:
        if translated is None:
            raise ValueError("Expected cells, found none: analyse a file or the built-in cells first.")
        yield space.figures(translated, label)

    with blocks("Cross-species: mouse cells in human space") as demo:
        gr.Markdown(
            "# Cross-species: mouse cells in human space\n"
            "Give raw counts of mouse cells: a model turns each into the human cell it would be, also in genes that "
            "were never measured in the mouse. See which human types each mouse type comes near to, and by which genes."
        )
        session = gr.State(time_to_live=1800)
        examples = f"Human: {space.about['human']}. Mouse: {space.about['mouse']}."
        from_examples, file, from_file = choose_cells(examples, "Mouse cells (.h5ad, raw counts)")
        read = gr.Markdown(min_height=STATUS_HEIGHT)
        with gr.Column(visible=False) as results:
            with gr.Row():
                by_species = gr.Plot(show_label=False, min_width=300)
                by_type = gr.Plot(show_label=False, min_width=300)
            with gr.Row():
                translated = gr.Plot(show_label=False, min_width=300)
                renamed = gr.Plot(show_label=False, min_width=300)
            label = gr.Dropdown(label="Mouse type to look at", choices=[], allow_custom_value=True)
            said = gr.Markdown(min_height=STATUS_HEIGHT)
            with gr.Row():
                near = gr.Plot(show_label=False, min_width=300)
                genes = gr.Plot(show_label=False, min_width=300)
        gr.Markdown(
            "Dark means near: Wasserstein distances between types, in units of how far human cells lie from their "
            "mean. *Genes renamed* is the simplest way, without a model: each mouse gene taken for its human ortholog; "
            "it says nothing of genes that the mouse lacks. A small model of few cells; a type that human lacks here "
            "is still near to something. Files are removed as soon as they are read."
        )
        figures = [by_species, by_type, translated, renamed]
        outputs = [session, read, *figures, label, said, near, genes, results]
        from_examples.click(analyse_examples, None, outputs, api_name="analyse_examples", **model_queue(read))
        own = from_file.click(analyse, file, outputs, api_name="analyse", **model_queue(read))
        forget(file, after=own)
        label.input(look_at, [session, label], [said, near, genes], api_name="look_at", **model_queue(said))
    return demo


if __name__ == "__main__":
    chosen = Space(bundle(Path(__file__).parent / "model"))
    launch(build(chosen), warm_up=lambda: chosen.translate(chosen.examples, "", lambda *_, **__: None))
