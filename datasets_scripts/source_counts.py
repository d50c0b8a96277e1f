"""Published count files, opened by `cellglot.tokenization.count_matrix`; what is wrong with them is a CorpusError."""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path

from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.tokenization.count_matrix import CountMatrix, open_counts


@contextlib.contextmanager
def source_counts(path: Path, layer: str | None = None) -> Iterator[CountMatrix]:
    """The matrix of a count file (`.h5ad`, `.loom`, 10x `.h5`), open while the context lasts.

    layer   None for X, "raw" for `raw`, else a name in `layers`
    Raises  CorpusError for a file that lacks the layer or turns out not to hold counts, or truncated text;
            OSError for a damaged file, which `CorpusBuilder.prepare` explains: it knows where downloads are
    """
    try:
        with open_counts(path, layer=layer) as matrix:
            yield matrix
    except CorpusError:
        raise
    except ValueError as error:
        raise CorpusError(str(error)) from error
    except (EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read: truncated or corrupt ({error}). Fetch it again.") from error
