"""The dataset card of a corpus: what it is and whence, in numbers and a picture, and how to load it.

The front matter maps configs and splits to files, so that `load_dataset` finds them in the folder as on the Hub.
"""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import matplotlib

matplotlib.use("Agg")
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.config import DATASET_INFO_FILENAME
from datasets.utils import tqdm
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from matplotlib.figure import Figure

from cellglot.datasets_scripts.corpus import CorpusBuilder

PICTURE = "statistics.png"
LABELS_SHOWN = 20
ROWS_PER_BATCH = 4096
# What a build in progress leaves beside the corpus
NOT_UPLOADED = ["*.lock", "*.parts/**", "*.incomplete/**", "*.tmp"]


@dataclass
class SplitStatistics:
    """Figures of one split.

    n_rows    rows
    measures  column -> (n_rows,) values of a number, lengths of a list
    totals    (n_rows,) sums of `count`, empty where there is no such column
    labels    column -> how often each value stands there
    """

    n_rows: int
    measures: dict[str, np.ndarray]
    totals: np.ndarray
    labels: dict[str, collections.Counter[str]] = field(default_factory=dict)


def split_statistics(files: list[Path], builder: CorpusBuilder) -> SplitStatistics:
    """Figures of the rows of Parquet files, read in batches."""
    schema = pq.read_schema(files[0])
    lists = [name for name in schema.names if pa.types.is_list(schema.field(name).type)]
    measured = [name for name in schema.names if name in lists or name == builder.MEASURE]
    labels = {name: collections.Counter() for name in builder.LABELS if name in schema.names}
    values: dict[str, list[np.ndarray]] = {name: [] for name in measured}
    totals = []
    n_rows = 0
    for file in tqdm(files, desc="Statistics", unit=" files"):
        # Column by column in batches: the lists of a whole file need not fit in memory.
        for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_BATCH, columns=[*measured, *labels]):
            n_rows += len(batch)
            for name in measured:
                column = batch[name].value_lengths() if name in lists else batch[name]
                values[name].append(column.to_numpy(zero_copy_only=False).astype(np.float32))
            if "count" in lists:
                # Not reduceat, which gives the next cell's first value for a cell without any.
                ends = np.concatenate([[0.0], np.cumsum(batch["count"].flatten().to_numpy(), dtype=np.float64)])
                totals.append(np.diff(ends[np.append(0, np.cumsum(batch["count"].value_lengths().to_numpy()))]))
            for name, counter in labels.items():
                for item in batch[name].value_counts().to_pylist():
                    counter[str(item["values"])] += item["counts"]
    return SplitStatistics(
        n_rows,
        {name: np.concatenate(parts) for name, parts in values.items()},
        np.concatenate([np.empty(0), *totals]),
        labels,
    )


def draw_statistics(splits: Mapping[str, SplitStatistics], builder: CorpusBuilder) -> Figure:
    """The distribution of the corpus' measure in each split, and how many rows have each value of a label.

    The label is the first of the builder's that there is.
    """
    measured = {
        name: split.measures[builder.MEASURE] for name, split in splits.items() if builder.MEASURE in split.measures
    }
    label = next((name for name in builder.LABELS if _has(splits, name)), None)
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
        if len(measured) > 1:
            ax.legend(frameon=False)
    if label is not None:
        ax = axes[-1]
        counts = sum((split.labels[label] for split in splits.values() if label in split.labels), collections.Counter())
        names, heights = zip(*reversed(counts.most_common(LABELS_SHOWN)), strict=True)
        ax.barh([name if len(name) <= 32 else name[:31] + "…" for name in names], heights)
        ax.set(xlabel=builder.ROWS, title=label.replace("_", " "))
        if len(names) < len(counts):
            ax.set_title(f"{label.replace('_', ' ')}: {len(names)} of {len(counts):,}")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def write_card(builder: CorpusBuilder, output: str | Path, repository: str | None = None) -> Path:
    """README.md and its picture for all configs of a corpus that are in a folder; returns the path of README.md.

    repository  its name on the Hub, for the card's lines on loading
    """
    output = Path(output).absolute()
    configs = {}
    for path in sorted(output.glob(f"*/{DATASET_INFO_FILENAME}")):
        info = datasets.DatasetInfo.from_directory(str(path.parent))
        if info.builder_name == builder.name and info.splits:
            configs[path.parent.name] = info
    if not configs:
        raise FileNotFoundError(f"{output} holds no built config of {builder.name}.")
    files = {
        (config, str(split)): sorted(output.glob(f"{config}/{info.dataset_name}-{split}*.parquet"))
        for config, info in configs.items()
        for split in info.splits or {}
    }
    statistics = {
        f"{config}/{split}" if len(configs) > 1 else split: split_statistics(paths, builder)
        for (config, split), paths in files.items()
    }
    picture = output / PICTURE
    partial = picture.with_name(f".{PICTURE}")
    draw_statistics(statistics, builder).savefig(partial, dpi=120, format="png")
    partial.replace(picture)
    card = DatasetCard(
        f"---\n{_front_matter(builder, configs, files, statistics)}\n---\n\n"
        + _text(builder, configs, statistics, repository or "PATH/OF/THIS/FOLDER")
    )
    partial = output / ".README.md"
    partial.write_text(str(card), encoding="utf-8")
    return partial.replace(output / "README.md")


def _front_matter(
    builder: CorpusBuilder,
    configs: Mapping[str, datasets.DatasetInfo],
    files: Mapping[tuple[str, str], list[Path]],
    statistics: Mapping[str, SplitStatistics],
) -> str:
    data_files = {
        config: [
            {"split": split, "path": f"{config}/{configs[config].dataset_name}-{split}*.parquet"}
            for named, split in files
            if named == config
        ]
        for config in configs
    }
    first = next(name for name in [*builder.configs(), *configs] if name in configs)
    metadata = [
        # The key `default` is the library's for the config that is loaded if none is named.
        {"config_name": config, "data_files": paths, **({"default": True} if config == first else {})}
        for config, paths in data_files.items()
    ]
    n_rows = sum(split.n_rows for split in statistics.values())
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
    statistics: Mapping[str, SplitStatistics],
    place: str,
) -> str:
    config = next(name for name in [*builder.configs(), *configs] if name in configs)
    split = next(iter(configs[config].splits or {}))
    loading = f'load_dataset("{place}", "{config}", split="{split}"'
    parts = [
        f"# {builder.CARD.get('pretty_name', builder.name)}",
        _of_configs({name: info.description for name, info in configs.items()}),
        f"![Distribution and labels]({PICTURE})",
        "## Statistics",
        _statistics_table(statistics, builder),
        *(_label_table(statistics, label) for label in builder.LABELS if _has(statistics, label)),
        "## Columns",
        _column_table(configs),
        "## Loading",
        f"```python\nfrom datasets import load_dataset\n\nrows = {loading})\nstream = {loading}, streaming=True)\n```",
        "## Sources",
        _source_table(builder, configs),
        f"Version {builder.info.version} of `datasets_scripts/{builder.name}.py`. Homepage: "
        + _of_configs({name: info.homepage for name, info in configs.items()}),
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


def _statistics_table(statistics: Mapping[str, SplitStatistics], builder: CorpusBuilder) -> str:
    """Rows of each split, and median with 5th and 95th percentile of what is measured."""
    names = list(dict.fromkeys(name for split in statistics.values() for name in split.measures if name != "count"))
    headers = ["split", builder.ROWS]
    headers += [f"{_measure_name(builder) if name == builder.MEASURE else f'length of {name}'}" for name in names]
    with_totals = any(len(split.totals) for split in statistics.values())
    rows = []
    for name, split in statistics.items():
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


def _has(statistics: Mapping[str, SplitStatistics], label: str) -> bool:
    return any(split.labels.get(label) for split in statistics.values())


def _label_table(statistics: Mapping[str, SplitStatistics], label: str) -> str:
    """The most frequent values of a label in each split."""
    counters = {name: split.labels.get(label, collections.Counter()) for name, split in statistics.items()}
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


def push_to_hub(output: str | Path, repository: str, *, private: bool = False) -> str:
    """Uploads a built corpus with its card; returns its address."""
    hub = HfApi()
    url = hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
    hub.upload_folder(folder_path=output, repo_id=repository, repo_type="dataset", ignore_patterns=NOT_UPLOADED)
    return str(url)
