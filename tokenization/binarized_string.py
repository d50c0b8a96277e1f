"""`BinarizedStringProcessor`: cells of two modalities in, binarized strings or their token ids out.

A cell is two strings: the genes whose log-normalized expression is 2.0 or above, and its open peaks, in the order of
the matrix. A model translates one into the other; a task token before the string says which way. Source: Lee et al.,
"Translating the Code of Life", Methods. Beyond it: `encoding="rank"` orders genes by falling expression, and "binned"
has a token for the level follow each gene, since binarization forgets levels.

Nothing is ever made dense: the ids of a block of cells come from its CSR arrays, without a Python string in between.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from tqdm.auto import tqdm
from transformers import BatchFeature, ProcessorMixin

from .binarized_features import LEVELS, MIN_MATCHED_FEATURES, BinarizedFeatureExtractor, PairingReport, peak_keys_of
from .count_matrix import CELLS_PER_BLOCK
from .feature_sets import FeatureSets, ragged_gather, ranked
from .gene_ids import GENE_ID_COLUMNS, GENE_SYMBOL_COLUMNS, examples, is_named
from .obs_columns import obs_column
from .paired_batches import PairedCellCollator
from .paired_cells import ACCESSIBILITY, EXPRESSION, Modality, PairedCells, open_pairs
from .peaks import peak_keys
from .string_tokenizers import feature_tokenizer, spelling_constraint, subword_tokenizer

logger = logging.getLogger(__name__)

# Task -> (modality that is read, modality that is written)
TASKS = {"gex2atac": (EXPRESSION, ACCESSIBILITY), "atac2gex": (ACCESSIBILITY, EXPRESSION)}


class BinarizedStringProcessor(ProcessorMixin):
    """Cells into the token ids of binarized strings, and back.

    Build one with `from_features` or `from_cells`, load one with `from_pretrained`.

    feature_extractor  knows the features and when one is there
    tokenizer          any transformers tokenizer that spells every feature, word by word, and has the task tokens
    """

    _auto_class = "AutoProcessor"

    def __init__(self, feature_extractor: BinarizedFeatureExtractor, tokenizer: Any):
        super().__init__(feature_extractor, tokenizer)

    # ---- building

    @classmethod
    def from_features(
        cls,
        genes: Sequence[str],
        peaks: Sequence[str],
        *,
        vocabulary: Literal["features", "subword"] = "features",
        strings: Iterable[str] = (),
        subword_model: Literal["unigram", "bpe"] = "unigram",
        subword_size: int = 32_000,
        **settings: Any,
    ) -> "BinarizedStringProcessor":
        """Processor of these genes and peaks, in this order.

        vocabulary     "features": a token each; "subword": pieces learned from `strings` of training cells
        subword_model  SentencePiece's Unigram, which stock T5 has, or BPE
        subword_size   tokens of that vocabulary at the most
        settings       as of `BinarizedFeatureExtractor`
        Raises         ValueError for malformed peaks, and names that are there twice or hold blanks
        """
        extractor = BinarizedFeatureExtractor([str(g) for g in genes], [str(p) for p in peaks], **settings)
        keys = peak_keys(extractor.peaks)
        if len(set(keys)) < len(keys):
            counts = Counter(keys)
            twice = [peak for peak, key in zip(extractor.peaks, keys, strict=True) if counts[key] > 1]
            raise ValueError(f"{len(twice):,} peaks are of the same place as another, e.g. {examples(twice)}.")
        words = [*extractor.genes, *extractor.peaks]
        blank = [word for word in words if not word or word.split() != [word]]
        if blank:
            raise ValueError(f"{len(blank):,} feature names are empty or hold blanks, e.g. {examples(blank)}.")
        special = [task_token(task) for task in TASKS] + _bin_tokens(extractor)
        if vocabulary == "features":
            return cls(extractor, feature_tokenizer(special, words))
        if vocabulary != "subword":
            raise ValueError(f"Expected vocabulary 'features' or 'subword', found {vocabulary!r}.")
        return cls(extractor, subword_tokenizer(special, words, strings, model=subword_model, vocab_size=subword_size))

    @classmethod
    def from_cells(
        cls,
        cells: Any,
        *,
        train: np.ndarray | None = None,
        min_cells: int = 0,
        gene_names: str | None = None,
        layer: str | Mapping[str, str] | None = None,
        split: str | None = None,
        vocabulary: Literal["features", "subword"] = "features",
        subword_cells: int = 2_000,
        **options: Any,
    ) -> "BinarizedStringProcessor":
        """Processor of the features of paired cells.

        cells, layer, split  as of `open_pairs`; both modalities
        train                (cells,) boolean mask: what is counted or learned is of these cells only
        min_cells            leaves out features that fewer training cells express or have open
        gene_names           column of `var` whose names the strings hold; the index of `var` by default. Names of other
                             columns are aliases
        subword_cells        training cells, drawn at random, whose strings the subwords are learned from
        options              as of `from_features`
        """
        with open_pairs(cells, layer=layer, split=split) as pairs:
            if pairs.expression is None or pairs.accessibility is None:
                raise ValueError(
                    f"{pairs.first.name}: expected genes and peaks, found {', '.join(pairs.present)} only."
                )
            genes = np.array(pairs.expression.names(gene_names), dtype=object)
            peak_keys_of(pairs.accessibility)
            peaks = np.array(pairs.accessibility.names(), dtype=object)
            options["gene_aliases"] = _aliases(pairs.expression, genes) | dict(options.get("gene_aliases") or {})
            settings = {name: options[name] for name in options if not name.startswith("subword_")}
            if min_cells > 0:
                everything = BinarizedFeatureExtractor(list(genes), list(peaks), **settings)
                counts = {EXPRESSION: np.zeros(len(genes), int), ACCESSIBILITY: np.zeros(len(peaks), int)}
                for _, sets in everything.iter_sets(pairs, train):
                    for name, count in counts.items():
                        count += np.bincount(sets[name].features, minlength=len(count))
                for what, of_features in (("genes", counts[EXPRESSION]), ("peaks", counts[ACCESSIBILITY])):
                    if of_features.max(initial=0) < min_cells:
                        raise ValueError(
                            f"min_cells={min_cells:,} leaves no {what}; the commonest is of "
                            f"{of_features.max(initial=0):,} training cells."
                        )
                genes, peaks = genes[counts[EXPRESSION] >= min_cells], peaks[counts[ACCESSIBILITY] >= min_cells]
            strings: Iterable[str] = ()
            if vocabulary == "subword":
                by_feature = cls.from_features(list(genes), list(peaks), **settings)
                drawn = np.flatnonzero(np.ones(pairs.n_cells, bool) if train is None else train)
                drawn = np.random.default_rng(0).permutation(drawn)[:subword_cells]
                mask = np.isin(np.arange(pairs.n_cells), drawn)
                strings = (text for texts in by_feature.cell_strings(pairs, cells_mask=mask) for text in texts)
                strings = tqdm(strings, desc="subwords", unit="string", total=2 * len(drawn))
            return cls.from_features(list(genes), list(peaks), vocabulary=vocabulary, strings=strings, **options)

    # ---- what it knows

    @property
    def encoding(self) -> str:
        """ "set", "rank" or "binned"."""
        return self.feature_extractor.encoding

    def task_token_id(self, task: str) -> int:
        """Id of the token that a cell's string begins with.

        Raises  ValueError for an unknown task or a tokenizer without its token
        """
        if task not in TASKS:
            raise ValueError(f"Expected a task among {', '.join(TASKS)}; found {task!r}.")
        token = self.tokenizer.convert_tokens_to_ids(task_token(task))
        if token is None or token == self.tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {task_token(task)}: add those of "
                f"{', '.join(map(task_token, TASKS))} with tokenizer.add_tokens([...], special_tokens=True)."
            )
        return token

    def model_fields(self) -> dict[str, Any]:
        """Fields of a `MultiomeT5Config` that this vocabulary decides."""
        fields: dict[str, Any] = {
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            **{f"{task}_token_id": self.task_token_id(task) for task in TASKS},
        }
        bins = self.tokenizer.convert_tokens_to_ids(_bin_tokens(self.feature_extractor))
        if bins and bins == list(range(bins[0], bins[0] + len(bins))):
            fields |= {"first_bin_token_id": bins[0], "num_bins": len(bins)}
        if not self.has_feature_tokens:
            return fields
        genes, peaks = self._spelling[EXPRESSION][0], self._spelling[ACCESSIBILITY][0]
        n_genes, n_peaks = len(self.feature_extractor.genes), len(self.feature_extractor.peaks)
        in_order = np.concatenate([genes[:n_genes], peaks])
        if not np.array_equal(in_order, in_order[0] + np.arange(len(in_order))):
            return fields
        return fields | {"first_gene_token_id": int(in_order[0]), "num_genes": n_genes, "num_peaks": n_peaks}

    @property
    def has_feature_tokens(self) -> bool:
        """Whether every feature is one token."""
        return all(len(tokens) == len(offsets) - 1 for tokens, offsets in self._spelling.values())

    @cached_property
    def _spelling(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each modality the ids of its features end to end (of bins after them), and where each begins."""
        return {modality: self._spelled(self._words(modality)) for modality in (EXPRESSION, ACCESSIBILITY)}

    def _words(self, modality: str) -> list[str]:
        """What strings of a modality are made of: its features, and behind them the bins of genes."""
        bins = _bin_tokens(self.feature_extractor) if modality == EXPRESSION else []
        return [*self.feature_extractor.features(modality), *bins]

    def _spelled(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = self.tokenizer(list(words), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        offsets = np.concatenate([[0], np.cumsum([len(pieces) for pieces in ids], dtype=np.int64)])
        tokens = np.fromiter((piece for pieces in ids for piece in pieces), dtype=np.int32, count=offsets[-1])
        unknown = np.flatnonzero(tokens == self.tokenizer.unk_token_id)
        if len(unknown):
            word = words[int(np.searchsorted(offsets, unknown[0], side="right")) - 1]
            raise ValueError(
                f"The tokenizer cannot spell {word!r}: its training must have seen the characters of all names."
            )
        few = list(words[:3])
        together = self.tokenizer(" ".join(few), add_special_tokens=False)["input_ids"]
        if together != [piece for pieces in ids[: len(few)] for piece in pieces]:
            raise ValueError(f"The tokenizer spells {' '.join(few)!r} otherwise than word by word.")
        return tokens, offsets

    # ---- encoding

    def __call__(self, cells: Any, task: str = "gex2atac", **options: Any) -> BatchFeature:
        """A padded batch of all cells as PyTorch tensors: input_ids, attention_mask, and labels of paired cells.

        cells, task, options  as of `iter_encoded`. For many cells: `encode`
        """
        rows = [row for batch in self.iter_encoded(cells, task, **options) for row in batch.to_pylist()]
        return BatchFeature(self.collator()(rows))

    def collator(
        self, max_source_length: int | None = None, max_target_length: int | None = None
    ) -> PairedCellCollator:
        """What makes batches of encoded cells; longer ones are sampled feature by feature (`PairedCellCollator`)."""
        begins_feature = np.zeros(len(self.tokenizer), dtype=bool)
        for modality, (tokens, offsets) in self._spelling.items():
            begins_feature[tokens[offsets[: len(self.feature_extractor.features(modality))]]] = True
        return PairedCellCollator(self.tokenizer.pad_token_id, begins_feature, max_source_length, max_target_length)

    def encode(self, cells: Any, task: str = "gex2atac", **options: Any) -> Any:
        """`iter_encoded` as a datasets.Dataset in memory."""
        import datasets
        import pyarrow as pa
        from datasets.table import InMemoryTable

        report = options.setdefault("report", PairingReport())
        batches = list(self.iter_encoded(cells, task, **options))
        if not batches:
            raise ValueError("There are no cells to encode.")
        logger.info("%s", report)
        return datasets.Dataset(InMemoryTable(pa.Table.from_batches(batches)))

    def iter_encoded(
        self,
        cells: Any,
        task: str = "gex2atac",
        *,
        layer: str | Mapping[str, str] | None = None,
        split: str | None = None,
        cells_mask: np.ndarray | None = None,
        obs_columns: Sequence[str] = (),
        with_labels: bool | None = None,
        with_values: bool = False,
        min_matched_features: float = MIN_MATCHED_FEATURES,
        cells_per_block: int = CELLS_PER_BLOCK,
        report: PairingReport | None = None,
    ) -> Iterator[Any]:
        """Arrow record batches of encoded cells, a block of cells at a time.

        cells         as of `open_pairs`; a matrix without var["feature_types"] is of the modality that the task reads
        task          "gex2atac" or "atac2gex"
        cells_mask    (cells,) boolean mask of the cells to encode
        with_labels   what is to be written, too; by default where the cells have it
        with_values   measured values of what is to be written, too: log-normalized expression of every gene with a
                      count, or 1 for open peaks
        Returns       batches with input_ids (task token, the string, end), length, labels (the string, end),
                      value_features (positions among the genes or peaks), values (float32) and obs_columns
        Raises        ValueError as of `open_pairs` and `BinarizedFeatureExtractor.iter_sets`
        """
        import pyarrow as pa

        task_token_id = self.task_token_id(task)
        source, target = TASKS[task]
        report = report if report is not None else PairingReport()
        with open_pairs(cells, alone=source, layer=layer, split=split) as pairs:
            if source not in pairs.present:
                raise ValueError(f"{pairs.first.name}: task {task!r} reads {source}, but there is only {target}.")
            labelled = target in pairs.present if with_labels is None else with_labels
            if (labelled or with_values) and target not in pairs.present:
                raise ValueError(f"{pairs.first.name}: there is no {target} to make labels or values of.")
            if not (labelled or with_values):
                pairs = PairedCells(**{EXPRESSION: None, ACCESSIBILITY: None, source: pairs.present[source]})
            obs = {name: obs_column(pairs.obs[name]) for name in obs_columns}
            for rows, sets in self.feature_extractor.iter_sets(
                pairs,
                cells_mask,
                with_levels=with_values and target == EXPRESSION,
                min_matched_features=min_matched_features,
                cells_per_block=cells_per_block,
                report=report,
            ):
                report.n_empty_sources += int((sets[source].lengths == 0).sum())
                tokens, offsets = self._framed(*self.tokens(sets[source], source), before=task_token_id)
                columns = {"input_ids": _lists(tokens, offsets), "length": pa.array(np.diff(offsets).astype(np.int32))}
                if labelled:
                    columns["labels"] = _lists(*self._framed(*self.tokens(sets[target], target)))
                if with_values:
                    values = sets[LEVELS if target == EXPRESSION else target]
                    levels = np.ones(len(values.features), np.float32) if values.levels is None else values.levels
                    columns["value_features"] = _lists(values.features, values.offsets)
                    columns["values"] = _lists(levels, values.offsets)
                columns |= {name: column.take(pa.array(rows)) for name, column in obs.items()}
                yield pa.RecordBatch.from_pydict(columns)

    def tokens(self, sets: FeatureSets, modality: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the strings of some cells end to end (int32), and where each begins."""
        units, offsets = self._units(sets, modality)
        spelling, spelling_offsets = self._spelling[modality]
        if len(spelling) == len(spelling_offsets) - 1:
            return spelling[units], offsets
        tokens, ends = ragged_gather(spelling, spelling_offsets, units)
        return tokens, ends[offsets]

    def _units(self, sets: FeatureSets, modality: str) -> tuple[np.ndarray, np.ndarray]:
        """Words of the strings as the encoding orders them: positions of features, and of bins after all of these."""
        if modality == ACCESSIBILITY or self.encoding == "set":
            return sets.features, sets.offsets
        if self.encoding == "rank":
            return ranked(sets).features, sets.offsets
        assert sets.levels is not None
        bins = len(self.feature_extractor.genes) + self.feature_extractor.bins(sets.levels)
        return np.stack([sets.features, bins], axis=1).ravel(), 2 * sets.offsets

    def _framed(
        self, tokens: np.ndarray, offsets: np.ndarray, before: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The strings with the end token behind each, and maybe a token before."""
        extra = 1 if before is None else 2
        framed_offsets = offsets + extra * np.arange(len(offsets))
        framed = np.empty(framed_offsets[-1], dtype=np.int32)
        inside = np.ones(len(framed), dtype=bool)
        framed[framed_offsets[1:] - 1] = self.tokenizer.eos_token_id
        inside[framed_offsets[1:] - 1] = False
        if before is not None:
            framed[framed_offsets[:-1]] = before
            inside[framed_offsets[:-1]] = False
        framed[inside] = tokens
        return framed, framed_offsets

    def cell_strings(
        self, cells: Any, *, cells_mask: np.ndarray | None = None, **options: Any
    ) -> Iterator[tuple[str, ...]]:
        """The strings of each cell, without task or end tokens: of expression, of accessibility, of those at hand.

        cells, options  as of `open_pairs`
        """
        with open_pairs(cells, **options) as pairs:
            words = {
                EXPRESSION: np.array(self._words(EXPRESSION), dtype=object),
                ACCESSIBILITY: np.array(self._words(ACCESSIBILITY), dtype=object),
            }
            for rows, sets in self.feature_extractor.iter_sets(pairs, cells_mask):
                told = {name: self._units(of_modality, name) for name, of_modality in sets.items()}
                for n in range(len(rows)):
                    yield tuple(
                        " ".join(words[name][units[offsets[n] : offsets[n + 1]]])
                        for name, (units, offsets) in told.items()
                    )

    # ---- decoding

    def decode_matrix(
        self, sequences: Any, modality: str, *, levels: bool = False, unknown: Literal["error", "ignore"] = "error"
    ) -> sp.csr_matrix:
        """The binary matrix of strings or token ids, as encoded or generated.

        sequences  strings, or (cells, tokens) ids: tensor, array or lists; -100 and special tokens are passed over
        modality   "expression" or "accessibility"
        levels     with encoding="binned": the middle of each gene's bin in place of 1
        unknown    what to do with words and tokens that are no feature of the modality
        Returns    (cells, features) CSR float32
        Raises     ValueError naming what is no feature of this modality
        """
        if levels and (self.encoding != "binned" or modality != EXPRESSION):
            raise ValueError("Levels are in the strings of expression with encoding='binned' only.")
        if modality not in (EXPRESSION, ACCESSIBILITY):
            raise ValueError(f"Expected modality {EXPRESSION!r} or {ACCESSIBILITY!r}, found {modality!r}.")
        units, offsets, told = self._units_of(sequences, modality)
        n_features = len(self.feature_extractor.features(modality))
        if (units < 0).any():
            if unknown == "error":
                strangers = [told[i] for i in np.flatnonzero(units < 0)[:3]]
                names = [s if isinstance(s, str) else self.tokenizer.convert_ids_to_tokens(int(s)) for s in strangers]
                raise ValueError(
                    f"{int((units < 0).sum()):,} of {len(units):,} words or tokens are no feature of {modality}, e.g. "
                    f"{examples(names)}; unknown='ignore' leaves them out."
                )
            kept = units >= 0
            offsets = np.concatenate([[0], np.cumsum(kept)])[offsets]
            units = units[kept]
        is_feature = units < n_features
        data = np.ones(len(units), dtype=np.float32)
        if levels:
            bins = np.append(units[1:], 0) - n_features
            extractor = self.feature_extractor
            data = np.where(bins >= 0, extractor.threshold + (bins + 0.5) * extractor.bin_width, extractor.threshold)
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[is_feature]
        matrix = sp.coo_matrix(
            (data[is_feature].astype(np.float32), (rows, units[is_feature])), shape=(len(offsets) - 1, n_features)
        )
        # Of a feature that is told twice, the highest.
        found = sp.csr_matrix(matrix)
        if found.nnz < matrix.nnz:
            found = _without_repeats(matrix)
        found.sort_indices()
        return found

    def _units_of(self, sequences: Any, modality: str) -> tuple[np.ndarray, np.ndarray, Any]:
        """Positions of features (bins after them) in sequences end to end, -1 for strangers; where each sequence
        begins; the words, or ids of tokens, that were read."""
        sequences = sequences.tolist() if hasattr(sequences, "tolist") else list(sequences)
        bins = _bin_tokens(self.feature_extractor) if modality == EXPRESSION else []
        special = set(self.tokenizer.all_special_ids) - set(self.tokenizer.convert_tokens_to_ids(bins))
        if not any(isinstance(s, str) for s in sequences):
            if self.has_feature_tokens:
                position = np.full(len(self.tokenizer), -1)
                position[self._spelling[modality][0]] = np.arange(len(self._spelling[modality][0]))
                ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(s, np.int64) for s in sequences)])
                kept = (ids >= 0) & ~np.isin(ids, list(special))
                ends = np.cumsum([0, *map(len, sequences)])
                return position[ids[kept]], np.concatenate([[0], np.cumsum(kept)])[ends], ids[kept]
            ids = [[i for i in s if i >= 0 and i not in special] for s in sequences]
            sequences = self.tokenizer.batch_decode(ids, skip_special_tokens=False)
            # Special tokens are decoded without blanks around them.
            for token in bins:
                sequences = [text.replace(token, f" {token} ") for text in sequences]
        passed_over = set(self.tokenizer.convert_ids_to_tokens(sorted(special)))
        words = [[word for word in str(s).split() if word not in passed_over] for s in sequences]
        where = self._position_of_word[modality]
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in words], dtype=np.int64)])
        told = [word for s in words for word in s]
        return np.array([where.get(word, -1) for word in told], dtype=np.int64), offsets, told

    @cached_property
    def _position_of_word(self) -> dict[str, dict[str, int]]:
        modalities = (EXPRESSION, ACCESSIBILITY)
        return {modality: {word: i for i, word in enumerate(self._words(modality))} for modality in modalities}

    def allowed_tokens(self, task: str) -> Callable[[int, Any], list[int]]:
        """`prefix_allowed_tokens_fn` for a `generate` with subwords: whole names of the task's target, none twice.

        One token a feature needs none: the model masks by itself.

        Raises  ValueError for expression with bins, which no list of words can place
        """
        modality = TASKS[task][1]
        if modality == EXPRESSION and self.encoding == "binned":
            raise ValueError("Expression bins stand between the names: use vocabulary='features' to constrain them.")
        tokens, offsets = self._spelling[modality]
        n_features = len(self.feature_extractor.features(modality))
        return spelling_constraint(tokens, offsets[: n_features + 1], self.tokenizer.eos_token_id)


def task_token(task: str) -> str:
    """The token of a task: <gex2atac>."""
    return f"<{task}>"


def _bin_tokens(extractor: BinarizedFeatureExtractor) -> list[str]:
    return [f"<bin_{k}>" for k in range(extractor.n_bins)] if extractor.encoding == "binned" else []


def _aliases(expression: Modality, names: np.ndarray) -> dict[str, str]:
    """Other names of genes in `var`, without those that several genes bear."""
    found: dict[str, set[str]] = {}
    columns = [c for c in (*GENE_ID_COLUMNS, *GENE_SYMBOL_COLUMNS) if c in expression.matrix.var]
    for others in [expression.names(), *(expression.names(column) for column in columns)]:
        for other, name in zip(others, names, strict=True):
            if other != name and is_named(other):
                found.setdefault(other, set()).add(name)
    known = set(names)
    return {other: min(of) for other, of in found.items() if len(of) == 1 and other not in known}


def _lists(values: np.ndarray, offsets: np.ndarray) -> Any:
    """An Arrow list column that shares memory with the values.

    Raises  ValueError for more values than its 32-bit offsets can tell apart
    """
    import pyarrow as pa

    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"A block has {offsets[-1]:,} tokens, too many for one Arrow list. Lower cells_per_block.")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _without_repeats(matrix: sp.coo_matrix) -> sp.csr_matrix:
    """The highest of the values at each place, not their sum."""
    order = np.lexsort((matrix.data, matrix.col, matrix.row))
    row, column, data = matrix.row[order], matrix.col[order], matrix.data[order]
    last = np.append((np.diff(row) != 0) | (np.diff(column) != 0), True)
    return sp.csr_matrix((data[last], (row[last], column[last])), shape=matrix.shape)
