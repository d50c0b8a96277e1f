"""The dataset card of a corpus: what it is and whence, in numbers and a picture, and how to load it.

The front matter maps configs and splits to files, so that `load_dataset` finds them in the folder as on the Hub.
"""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.config import DATASET_INFO_FILENAME
from datasets.utils import tqdm
from huggingface_hub import DatasetCard, DatasetCardData
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cellglot.datasets_scripts.corpus import CorpusBuilder
from cellglot.datasets_scripts.corpus_errors import disk_full
from cellglot.publication import PLACEHOLDER

PICTURE = "statistics.png"
LABELS_SHOWN = 20
# Stands for a null among the values of a label
NO_VALUE = "(none)"
ROWS_PER_BATCH = 4096


@dataclass
class SplitStatistics:
    """Figures of one split.

    n_rows    rows
    measures  column -> (n_rows,) values of a number, lengths of a list; not of `count`, which is as long as gene_index
    totals    (n_rows,) sums of `count`, empty where there is no such column
    labels    column -> how often each value stands there
    """

    n_rows: int
    measures: dict[str, np.ndarray]
    totals: np.ndarray
    labels: dict[str, collections.Counter[str]] = field(default_factory=dict)


# Config -> split -> its figures; the config that is loaded if none is named comes first
Statistics = Mapping[str, Mapping[str, SplitStatistics]]


def split_statistics(files: list[Path], builder: CorpusBuilder) -> SplitStatistics:
    """Figures of the rows of Parquet files, read in batches."""
    schema = pq.read_schema(files[0])
    lists = [name for name in schema.names if pa.types.is_list(schema.field(name).type)]
    summed = [name for name in lists if name == "count"]
    measured = [name for name in schema.names if name in {*lists, builder.MEASURE} - {*summed}]
    labels = {name: collections.Counter() for name in builder.LABELS if name in schema.names}
    values: dict[str, list[np.ndarray]] = {name: [] for name in measured}
    totals = []
    n_rows = 0
    for file in tqdm(files, desc="Statistics", unit=" files"):
        # Column by column in batches: the lists of a whole file need not fit in memory.
        for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_BATCH, columns=[*measured, *summed, *labels]):
            n_rows += len(batch)
            for name in measured:
                column = batch[name].value_lengths() if name in lists else batch[name]
                values[name].append(column.to_numpy(zero_copy_only=False).astype(np.float32))
            for name in summed:
                # Not reduceat, which gives the next cell's first value for a cell without any.
                ends = np.concatenate([[0.0], np.cumsum(batch[name].flatten().to_numpy(), dtype=np.float64)])
                sums = np.diff(ends[np.append(0, np.cumsum(batch[name].value_lengths().to_numpy()))])
                totals.append(sums.astype(np.float32))
            for name, counter in labels.items():
                for item in batch[name].value_counts().to_pylist():
                    counter[NO_VALUE if item["values"] is None else str(item["values"])] += item["counts"]
    return SplitStatistics(
        n_rows,
        {name: np.concatenate(parts) for name, parts in values.items()},
        np.concatenate([np.empty(0, np.float32), *totals]),
        labels,
    )


def draw_statistics(statistics: Statistics, builder: CorpusBuilder) -> Figure:
    """The distribution of the corpus' measure in each split, and how many rows have each value of a label.

    The label is the first of the builder's that there is, in the first config that has it: other configs may hold the
    same cells again.
    """
    splits = _by_name(statistics)
    measured = {
        name: split.measures[builder.MEASURE] for name, split in splits.items() if builder.MEASURE in split.measures
    }
    labelled = ((label, config) for label in builder.LABELS for config in statistics if _has(statistics[config], label))
    label, labelled_config = next(labelled, (None, None))
    n_panels = bool(measured) + (label is not None)
    figure = Figure(figsize=(5 * n_panels + 1, 4), layout="constrained")
    axes = [figure.add_subplot(1, n_panels, 1 + k) for k in range(n_panels)]
    if measured:
        ax = axes[0]
        edges = np.histogram_bin_edges(
            np.concatenate([values[np.isfinite(values)] for values in measured.values()]), 50
        )
        for name, values in measured.items():
            ax.hist(values, bins=list(edges), histtype="step", label=name)
        ax.set(xlabel=_measure_name(builder), ylabel=builder.ROWS)
        ax.xaxis.set_major_locator(MaxNLocator(6))
        if len(measured) > 1:
            ax.legend(frameon=False)
    if label is not None and labelled_config is not None:
        ax = axes[-1]
        counts = sum((split.labels[label] for split in statistics[labelled_config].values()), collections.Counter())
        names, heights = zip(*reversed(counts.most_common(LABELS_SHOWN)), strict=True)
        ax.barh([name if len(name) <= 32 else name[:31] + "…" for name in names], heights)
        title = f"{labelled_config}, " * (len(statistics) > 1) + label.replace("_", " ")
        ax.set(xlabel=builder.ROWS, title=title)
        if len(names) < len(counts):
            ax.set_title(f"{title}: {len(names)} of {len(counts):,}")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def write_card(builder: CorpusBuilder, output: str | Path) -> Path:
    """README.md and its picture for all configs of a corpus that are in a folder; returns the path of README.md."""
    output = Path(output).absolute()
    configs = {}
    for path in sorted(output.glob(f"*/{DATASET_INFO_FILENAME}")):
        info = datasets.DatasetInfo.from_directory(str(path.parent))
        if info.builder_name == builder.name and info.splits:
            configs[path.parent.name] = info
    if not configs:
        raise FileNotFoundError(f"{output} holds no built config of {builder.name}.")
    # The one that is loaded if none is named comes first.
    order = dict.fromkeys([*builder.configs(), *configs])
    configs = {name: configs[name] for name in order if name in configs}
    statistics = {
        config: {
            str(split): split_statistics(sorted(output.glob(f"{config}/{info.dataset_name}-{split}*.parquet")), builder)
            for split in info.splits or {}
        }
        for config, info in configs.items()
    }
    card = DatasetCard(
        f"---\n{_front_matter(builder, configs, statistics)}\n---\n\n" + _text(builder, configs, statistics)
    )
    try:
        partial = output / f".{PICTURE}"
        draw_statistics(statistics, builder).savefig(partial, dpi=120, format="png")
        partial.replace(output / PICTURE)
        partial = output / ".README.md"
        partial.write_text(str(card), encoding="utf-8")
        return partial.replace(output / "README.md")
    except OSError as error:
        raise disk_full(error, output) or error from error


def _front_matter(builder: CorpusBuilder, configs: Mapping[str, datasets.DatasetInfo], statistics: Statistics) -> str:
    metadata: list[dict[str, Any]] = [
        {
            "config_name": config,
            "data_files": [
                {"split": split, "path": f"{config}/{configs[config].dataset_name}-{split}*.parquet"}
                for split in splits
            ],
        }
        for config, splits in statistics.items()
    ]
    # The library's key for the config that is loaded if none is named
    metadata[0]["default"] = True
    n_rows = sum(split.n_rows for split in _by_name(statistics).values())
    return DatasetCardData(
        **{"license": "other", "pretty_name": builder.name, **builder.CARD},
        size_categories=[_size_category(n_rows)],
        configs=metadata,
    ).to_yaml()


def _size_category(n_rows: int) -> str:
    """The Hub's name for a number of rows."""
    bounds = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10]
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B"]
    k = int(np.searchsorted(bounds, n_rows, side="right"))
    if k == 0:
        return "n<1K"
    return f"{names[k - 1]}<n<{names[k]}" if k < len(names) else "n>10B"


def _text(
    builder: CorpusBuilder,
    configs: Mapping[str, datasets.DatasetInfo],
    statistics: Statistics,
) -> str:
    config, config_splits = next(iter(statistics.items()))
    loading = f'load_dataset("{PLACEHOLDER}", "{config}", split="{next(iter(config_splits))}"'
    splits = _by_name(statistics)
    parts = [
        f"# {builder.CARD.get('pretty_name', builder.name)}",
        _of_configs({name: info.description for name, info in configs.items()}),
        f"![Distribution and labels]({PICTURE})",
        "## Statistics",
        _statistics_table(splits, builder),
        *(_label_table(splits, label) for label in builder.LABELS if _has(splits, label)),
        "## Columns",
        _column_table(configs),
        "## Loading",
        f"```python\nfrom datasets import load_dataset\n\nrows = {loading})\nstream = {loading}, streaming=True)\n```",
        "## Sources",
        _source_table(builder, configs),
        f"Version {builder.info.version} of `datasets_scripts/{builder.name}.py`. "
        + _of_configs({name: f"Homepage: {info.homepage}" if info.homepage else "" for name, info in configs.items()}),
        "## Licence",
        _of_configs({name: info.license for name, info in configs.items()}),
        "## Citation",
        _of_configs({name: info.citation for name, info in configs.items()}),
    ]
    return "\n\n".join(parts) + "\n"


def _of_configs(texts: Mapping[str, str]) -> str:
    """One text if all configs have the same, else a list of them."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values())).strip()
    return "\n" + "\n".join(f"- `{config}`: {text.strip()}" for config, text in texts.items())


def _column_table(configs: Mapping[str, datasets.DatasetInfo]) -> str:
    """Name and type of the columns, and the configs that have them where not all do."""
    owners: dict[tuple[str, str], list[str]] = {}
    for config, info in configs.items():
        for name, kind in (info.features or {}).items():
            owners.setdefault((name, _type_name(kind)), []).append(config)
    rows = [
        (name, f"`{kind}`" + (f" ({', '.join(having)})" if len(having) < len(configs) else ""))
        for (name, kind), having in owners.items()
    ]
    return _table(("column", "type"), rows)


def _measure_name(builder: CorpusBuilder) -> str:
    return "detected genes" if builder.MEASURE == "gene_index" else builder.MEASURE.replace("_", " ")


def _by_name(statistics: Statistics) -> dict[str, SplitStatistics]:
    """Each split by its name, after that of its config if there are several."""
    return {
        f"{config}/{split}" if len(statistics) > 1 else split: figures
        for config, splits in statistics.items()
        for split, figures in splits.items()
    }


def _statistics_table(splits: Mapping[str, SplitStatistics], builder: CorpusBuilder) -> str:
    """Rows of each split, and median with 5th and 95th percentile of what is measured."""
    names = list(dict.fromkeys(name for split in splits.values() for name in split.measures))
    headers = ["split", builder.ROWS]
    headers += [f"{_measure_name(builder) if name == builder.MEASURE else f'length of {name}'}" for name in names]
    with_totals = any(len(split.totals) for split in splits.values())
    rows = []
    for name, split in splits.items():
        columns = [split.measures.get(measure, np.empty(0)) for measure in names]
        columns += [split.totals] if with_totals else []
        rows.append((name, f"{split.n_rows:,}", *map(_spread, columns)))
    return (
        _table([*headers, *(["counts"] if with_totals else [])], rows) + "\n\nMedian (5th to 95th percentile) of a row."
    )


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    low, middle, high = (f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in np.nanpercentile(values, [5, 50, 95]))
    return f"{middle} ({low} to {high})"


def _has(splits: Mapping[str, SplitStatistics], label: str) -> bool:
    return any(split.labels.get(label, {}).keys() - {NO_VALUE} for split in splits.values())


def _label_table(splits: Mapping[str, SplitStatistics], label: str) -> str:
    """The most frequent values of a label in each split that has it."""
    counters = {name: split.labels[label] for name, split in splits.items() if label in split.labels}
    total = sum(counters.values(), collections.Counter())
    rows = [
        (value, *(f"{counter[value]:,}" for counter in counters.values()))
        for value, _ in total.most_common(LABELS_SHOWN)
    ]
    if len(total) > len(rows):
        rows.append((f"{len(total) - len(rows):,} more", *("" for _ in counters)))
    return _table([f"`{label}`", *counters], rows)


def _source_table(builder: CorpusBuilder, configs: Mapping[str, datasets.DatasetInfo]) -> str:
    addresses = {source.file_name: source.url for sources in builder.SOURCES.values() for source in sources}
    found = {name: size for info in configs.values() for name, size in (info.download_checksums or {}).items()}
    rows = [
        (name, f"{size['num_bytes']:,}", size["checksum"] or "none published", addresses.get(name) or "local")
        for name, size in found.items()
    ]
    return _table(("file", "bytes", "checksum", "address"), rows) if rows else "None to download."


def _type_name(kind: Any) -> str:
    return (
        f"list of {_type_name(kind.feature)}" if isinstance(kind, datasets.List) else getattr(kind, "dtype", str(kind))
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
