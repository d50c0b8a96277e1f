"""`RankValueTokenizer`: cells in, rank-value token ids out, as a transformers tokenizer.

The vocabulary is a WordLevel `tokenizer.json`, so that padding, collators, `AutoTokenizer` and decoding work as for any
tokenizer; gene medians and aliases lie beside it. V1 has no special tokens around a cell and a context of 2,048; V2
wraps it in `<cls>` ... `<eos>` and has 4,096. Source: Theodoris et al., Nature 2023; Chen et al. 2024 (V2).
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import TokenizersBackend

from .block_encoding import BlockEncoder, EncodedBlock, encoded_blocks
from .count_matrix import CELLS_PER_BLOCK, CountMatrix, open_counts
from .gene_ids import GENE_ID_COLUMNS, GeneMatch, GeneResolver, examples
from .gene_tables import read_aliases, read_table
from .obs_columns import obs_column
from .token_batches import token_batch
from .tokenization_report import TokenizationReport

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = {"v1": ("<pad>", "<mask>"), "v2": ("<pad>", "<mask>", "<cls>", "<eos>")}
MAX_LENGTH = {"v1": 2048, "v2": 4096}
# Under this share of a file's counts in the vocabulary, ranks say more about what is missing than about the cells.
MIN_MATCHED_COUNTS = 0.5


class NoCellsError(ValueError):
    """Nothing is left to encode: no cell selected, or all of them empty and dropped."""


class RankValueTokenizer(TokenizersBackend):
    """Rank-value tokenizer of single cells.

    Build one with `from_vocabulary`, load one with `from_pretrained`. No `__init__` here: transformers reloads a
    subclass that has one as an empty BPE model.
    """

    # One file name a keyword; transformers resolves them from folders and repositories alike.
    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        "gene_medians_file": "gene_medians.json",
        "gene_aliases_file": "gene_aliases.json",
    }
    model_input_names = ["input_ids", "attention_mask"]
    _auto_class = "AutoTokenizer"

    # Content of the two files of a loaded tokenizer
    _gene_medians_json: bytes
    _gene_aliases_json: bytes

    # ---- building, saving, loading

    @classmethod
    def from_vocabulary(
        cls,
        path_or_table: Any,
        layout: Literal["v1", "v2"] = "v1",
        aliases: Any = None,
        *,
        max_length: int | None = None,
    ) -> "RankValueTokenizer":
        """Tokenizer over a vocabulary table.

        path_or_table  pandas DataFrame or TSV/CSV path (.gz too) with columns token, token_id, nonzero_median. Special
                       tokens come first, with no median: <pad>, <mask>, and for v2 <cls>, <eos>
        aliases        mapping, DataFrame or TSV/CSV path (columns alias, ensembl_id) of other names of genes
        Raises         ValueError if columns or special tokens are missing, ids have gaps, or a median is not positive
        """
        if layout not in SPECIAL_TOKENS:
            raise ValueError(f"Expected layout 'v1' or 'v2', found {layout!r}.")
        table = read_table(path_or_table, ("token", "token_id", "nonzero_median")).sort_values("token_id")
        tokens = [str(token) for token in table["token"]]
        special = SPECIAL_TOKENS[layout]
        if tuple(tokens[: len(special)]) != special:
            raise ValueError(
                f"A {layout} vocabulary starts with {', '.join(special)}; this one starts with {examples(tokens, 4)}."
            )
        if list(table["token_id"]) != list(range(len(tokens))) or len(set(tokens)) != len(tokens):
            raise ValueError(f"Expected token ids 0 to {len(tokens) - 1}, each once, with no token twice.")
        medians = table["nonzero_median"].to_numpy(dtype=np.float64)[len(special) :]
        bad = ~(np.isfinite(medians) & (medians > 0))
        if bad.any():
            genes = np.asarray(tokens[len(special) :], dtype=object)[bad]
            raise ValueError(f"{bad.sum():,} genes have no positive finite median, e.g. {examples(genes)}.")

        backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        named = {"pad_token": "<pad>", "mask_token": "<mask>"}
        if layout == "v2":
            named |= {"cls_token": "<cls>", "eos_token": "<eos>"}
            backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
                single="<cls> $A <eos>", special_tokens=[("<cls>", 2), ("<eos>", 3)]
            )
        tokenizer = cls(
            tokenizer_object=backend,
            layout=layout,
            model_max_length=max_length or MAX_LENGTH[layout],
            padding_side="right",
            **named,
        )
        tokenizer._gene_medians = dict(zip(tokens[len(special) :], medians.tolist(), strict=True))
        tokenizer._gene_aliases = read_aliases(aliases)
        return tokenizer

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files: dict[str, str | None], *args: Any, **kwargs: Any) -> Any:
        # Read now, so that the tokenizer survives its folder (a temporary directory, a pruned cache); parsed on first
        # use.
        texts = {}
        for key in ("gene_medians_file", "gene_aliases_file"):
            path = resolved_vocab_files.get(key)
            texts[key] = Path(path).read_bytes() if path else None
        tokenizer = super()._from_pretrained(resolved_vocab_files, *args, **kwargs)
        if texts["gene_medians_file"] is None:
            raise OSError(f"{tokenizer.name_or_path} has no gene_medians.json, which a rank-value tokenizer needs.")
        tokenizer._gene_medians_json = texts["gene_medians_file"]
        tokenizer._gene_aliases_json = texts["gene_aliases_file"] or b"{}"
        return tokenizer

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)  # type: ignore[arg-type]
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        for key, content in (("gene_medians_file", self.gene_medians), ("gene_aliases_file", self.gene_aliases)):
            path = os.path.join(save_directory, prefix + self.vocab_files_names[key])
            with open(path, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=0)
            file_names = (*file_names, path)
        return file_names

    # ---- what it knows of genes

    @property
    def layout(self) -> str:
        """ "v1" or "v2"."""
        return self.init_kwargs["layout"]

    @property
    def gene_medians(self) -> dict[str, float]:
        """Non-zero median of counts per 10,000 of each gene, in order of token id."""
        if "_gene_medians" not in self.__dict__:
            self._gene_medians: dict[str, float] = json.loads(self._gene_medians_json)
        return self._gene_medians

    @property
    def gene_aliases(self) -> dict[str, str]:
        """Other names of genes."""
        if "_gene_aliases" not in self.__dict__:
            self._gene_aliases: dict[str, str] = json.loads(self._gene_aliases_json)
        return self._gene_aliases

    @property
    def gene_token_ids(self) -> np.ndarray:
        """(genes,) int32 token ids of all genes, ascending: what may stand in for a masked gene."""
        return self._arrays()[0]

    @property
    def resolver(self) -> GeneResolver:
        """Resolves names to positions in `gene_token_ids`."""
        if "_resolver" not in self.__dict__:
            self._resolver = GeneResolver(list(self.gene_medians), self.gene_aliases)
        return self._resolver

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if "_token_ids_and_medians" not in self.__dict__:
            ids = np.array(self.convert_tokens_to_ids(list(self.gene_medians)), dtype=np.int32)
            medians = np.fromiter(self.gene_medians.values(), dtype=np.float64)
            assert np.all(np.diff(ids) > 0), "gene_medians.json must list genes in order of token id"
            self._token_ids_and_medians = ids, medians
        return self._token_ids_and_medians

    # ---- encoding

    def encode_expression(
        self,
        counts: Any,
        gene_ids: Iterable[str],
        n_counts: Any = None,
        *,
        max_length: int | None = None,
        **options: Any,
    ) -> dict[str, list]:
        """Tokens of cells given as a matrix.

        counts    (cells, genes) or (genes,) raw counts, NumPy or SciPy sparse
        gene_ids  (genes,) names of the columns
        n_counts  (cells,) or a number: total counts of each cell over all genes; the sums of `counts` if absent
        options   as of `iter_encoded`
        Returns   {"input_ids": one list of token ids a cell, "length": [...]}; for a (genes,) vector, of one cell
        """
        import pandas as pd

        rows: Any = counts if sp.issparse(counts) else np.atleast_2d(np.asarray(counts))
        matrix_ng = sp.csr_matrix(rows)
        names = [str(gene) for gene in gene_ids]
        if matrix_ng.shape[1] != len(names):
            raise ValueError(f"counts has {matrix_ng.shape[1]:,} columns but gene_ids has {len(names):,} names.")
        obs = pd.DataFrame(index=pd.RangeIndex(matrix_ng.shape[0]).astype(str))
        if n_counts is not None:
            obs["n_counts"] = np.broadcast_to(np.asarray(n_counts, dtype=np.float64), matrix_ng.shape[:1])
        var = pd.DataFrame(index=pd.Index(names))
        matrix = CountMatrix("counts", obs, var, lambda start, stop: matrix_ng[start:stop], {})
        input_ids: list[list[int]] = []
        for batch in self.iter_encoded(matrix, max_length=max_length, **options):
            input_ids += batch.column("input_ids").to_pylist()
        return {"input_ids": input_ids, "length": [len(ids) for ids in input_ids]}

    def encode_anndata(
        self,
        adata_or_path: Any,
        *,
        layer: str | None = None,
        max_length: int | None = None,
        obs_columns: Sequence[str] = (),
        cache_file: str | os.PathLike | None = None,
        report: TokenizationReport | None = None,
        **options: Any,
    ) -> Any:
        """Tokens of all cells of an AnnData or file (`.h5ad`, `.loom`, 10x `.h5` or `.mtx` folder), as a Dataset.

        layer        None for X, "raw" for `raw`, else the name of the layer with raw counts
        max_length   tokens a cell at the most, special tokens included; the tokenizer's own limit if absent
        obs_columns  columns of `obs` to carry along
        cache_file   Arrow file to write and memory-map, so that memory stays bounded by the block; in memory if absent
        report       filled with what was seen (matched genes and counts, truncated and empty cells)
        options      as of `iter_encoded`
        Returns      datasets.Dataset with columns input_ids (list of int32), length (int32) and obs_columns
        """
        import datasets
        import pyarrow as pa
        from datasets.table import InMemoryTable

        report = report if report is not None else TokenizationReport()
        batches = self.iter_encoded(
            adata_or_path, layer=layer, max_length=max_length, obs_columns=obs_columns, report=report, **options
        )
        first = next(batches, None)
        if first is None:
            raise NoCellsError(f"{report.name or adata_or_path} has no cells to encode.")
        if cache_file is None:
            table = pa.Table.from_batches([first, *batches])
            dataset = datasets.Dataset(InMemoryTable(table))
        else:
            path = Path(cache_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            try:
                with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
                    writer.write_batch(first)
                    for batch in batches:
                        writer.write_batch(batch)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            dataset = datasets.Dataset.from_file(str(path))
        logger.info("%s", report)
        return dataset

    def iter_encoded(
        self,
        adata_or_path: Any,
        *,
        layer: str | None = None,
        max_length: int | None = None,
        obs_columns: Sequence[str] = (),
        gene_ids: str | None = None,
        cells: np.ndarray | None = None,
        empty_cells: Literal["keep", "drop", "error"] = "keep",
        min_matched_counts: float = MIN_MATCHED_COUNTS,
        allow_normalized: bool = False,
        allow_duplicate_names: bool = False,
        cells_per_block: int = CELLS_PER_BLOCK,
        threads: int | None = None,
        report: TokenizationReport | None = None,
    ) -> Iterator[Any]:
        """Arrow record batches of encoded cells, a block of cells at a time.

        gene_ids            column of `var` with gene identifiers; None picks the known column that matches best
        cells               (cells,) boolean mask of the cells to encode; obs["filter_pass"] == 1 selects within it
        empty_cells         cells without a gene of the vocabulary: kept with length 0, dropped, or an error
        min_matched_counts  least share of the counts that must fall on the vocabulary, over the cells so far
        allow_normalized    goes on with values that are no integers
        threads             that read and encode; None: one a core, up to four
        Raises              ValueError for what cannot be raw counts of these genes (see `check_counts`), OSError for
                            files that cannot be read
        """
        report = report if report is not None else TokenizationReport()
        max_length = self.checked_max_length(max_length)
        with open_counts(adata_or_path, layer=layer) as matrix:
            self._check_annotations(matrix, obs_columns, allow_duplicate_names)
            mask = matrix.passing_cells(cells)
            match = self.match_genes(matrix, gene_ids, min_matched_counts)
            report.name = matrix.name
            report.add_genes(match)
            encoder = self.block_encoder(matrix, match, mask, max_length=max_length, allow_normalized=allow_normalized)
            obs = {name: obs_column(matrix.obs[name]) for name in obs_columns}
            with contextlib.closing(encoded_blocks(matrix, mask, cells_per_block, encoder, threads)) as blocks:
                for block in blocks:
                    self._check_matched_counts(matrix, match, block, min_matched_counts, report)
                    self._check_empty_cells(matrix, block, empty_cells, report)
                    batch = token_batch(block, obs, drop_empty=empty_cells == "drop")
                    report.n_cells += batch.num_rows
                    report.n_truncated_cells += block.n_truncated
                    if batch.num_rows:
                        yield batch

    def block_encoder(
        self,
        matrix: CountMatrix,
        match: GeneMatch,
        cells: np.ndarray | None = None,
        *,
        max_length: int | None = None,
        allow_normalized: bool = False,
    ) -> BlockEncoder:
        """Encoder of blocks of a matrix, in compiled loops where many cells are to come.

        match  from `match_genes`
        cells  mask of the cells to come, None for all
        """
        token_ids, medians = self._arrays()
        special: Any = (self.cls_token_id, self.eos_token_id) if self.layout == "v2" else None
        return BlockEncoder(
            matrix,
            match.index_g,
            medians,
            token_ids,
            max_length=self.checked_max_length(max_length),
            special=special,
            n_cells=matrix.n_cells if cells is None else int(cells.sum()),
            allow_normalized=allow_normalized,
        )

    def checked_max_length(self, max_length: int | None) -> int:
        """The tokens of a cell at the most, the tokenizer's own limit for None.

        Raises  ValueError for more than that, or for none beside the special tokens
        """
        n_special = 2 if self.layout == "v2" else 0
        max_length = self.model_max_length if max_length is None else max_length
        if not n_special < max_length <= self.model_max_length:
            raise ValueError(
                f"Expected max_length between {n_special + 1} and the tokenizer's {self.model_max_length:,}, "
                f"found {max_length:,}."
            )
        return int(max_length)

    @staticmethod
    def _check_annotations(matrix: CountMatrix, obs_columns: Sequence[str], allow_duplicate_names: bool) -> None:
        if isinstance(obs_columns, str) or {"input_ids", "length"} & set(obs_columns):
            raise ValueError(
                f"Expected obs_columns as a list of names other than 'input_ids' and 'length', found {obs_columns!r}."
            )
        missing = [name for name in obs_columns if name not in matrix.obs]
        if missing:
            raise ValueError(
                f"{matrix.name}: obs has no column {examples(missing)}; "
                f"it has {', '.join(map(str, matrix.obs)) or 'none'}."
            )
        if not allow_duplicate_names and not matrix.obs.index.is_unique:
            repeated = matrix.obs.index[matrix.obs.index.duplicated()].unique()
            raise ValueError(
                f"{matrix.name}: {len(repeated):,} cell names occur more than once, e.g. {examples(repeated)}: cells "
                "may be in the file twice. Call adata.obs_names_make_unique(), or pass allow_duplicate_names=True."
            )

    def match_genes(
        self, matrix: CountMatrix, column: str | None = None, min_matched_counts: float = MIN_MATCHED_COUNTS
    ) -> GeneMatch:
        """Which vocabulary gene each column of a file means, by a column of `var` or the known one that matches most.

        Raises  ValueError if no gene matches, unless no share of the counts needs to (`min_matched_counts` of zero)
        """
        known = [name for name in GENE_ID_COLUMNS if name in matrix.var]
        if column is not None or not known:
            match = self.resolver.match(matrix.gene_names(column))
        else:
            candidates = [matrix.gene_names(name) for name in known] + [[str(name) for name in matrix.var.index]]
            match = max((self.resolver.match(names) for names in candidates), key=lambda m: m.n_matched)
        if match.n_matched == 0 and min_matched_counts > 0:
            raise ValueError(f"{matrix.name}: {self.resolver.explain_no_match(match)}")
        return match

    def _check_matched_counts(
        self, matrix: CountMatrix, match: GeneMatch, block: EncodedBlock, least: float, report: TokenizationReport
    ) -> None:
        report.total_counts += block.total_counts
        report.matched_counts += block.matched_counts
        if report.matched_share < least:
            raise ValueError(
                f"{matrix.name}: only {report.matched_share:.1%} of counts fall on genes of the vocabulary (expected "
                f"at least {least:.0%}). {self.resolver.explain_no_match(match)} "
                f"min_matched_counts={report.matched_share * 0.9:.2f} goes on all the same."
            )

    def selector(self, match: GeneMatch) -> sp.csr_matrix:
        """(genes of a file, genes of the vocabulary) one where a column means a gene: counts @ it is by gene."""
        columns = np.flatnonzero(match.index_g >= 0)
        return sp.csr_matrix(
            (np.ones(len(columns)), (columns, match.index_g[columns])),
            shape=(len(match.index_g), len(self.resolver.vocabulary)),
        )

    @staticmethod
    def _check_empty_cells(matrix: CountMatrix, block: EncodedBlock, policy: str, report: TokenizationReport) -> None:
        empty = np.diff(block.offsets) == 0
        report.n_empty_cells += int(empty.sum())
        if empty.any() and policy == "error":
            names = matrix.obs.index[block.rows[empty]]
            raise ValueError(
                f"{matrix.name}: {len(names):,} cells of this block have no gene of the vocabulary, "
                f"e.g. {examples(names)}. Remove them, or pass empty_cells='drop' or 'keep'."
            )
