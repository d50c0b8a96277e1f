"""Tokenizers of binarized strings: one token a feature, or subwords learned from the strings."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import TokenizersBackend

from .gene_ids import examples

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # T5's, in T5's order


def feature_tokenizer(special: Sequence[str], words: Sequence[str]) -> TokenizersBackend:
    """One token for each word, after pad, end, unknown and `special`.

    Raises  ValueError for words that are there twice
    """
    tokens = [PAD, EOS, UNKNOWN, *special, *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = [token for token, n in Counter(tokens).items() if n > 1]
        raise ValueError(
            f"{len(twice):,} feature names are there more than once, e.g. {examples(twice)}; make them unique with "
            "adata.var_names_make_unique()."
        )
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return _wrapped(backend, special)


def subword_tokenizer(
    special: Sequence[str],
    words: Sequence[str],
    strings: Iterable[str],
    *,
    model: Literal["unigram", "bpe"] = "unigram",
    vocab_size: int = 32_000,
) -> TokenizersBackend:
    """Subwords as stock T5 would learn them: SentencePiece's Unigram, or BPE, on words that begin with a blank.

    words    every word that must have a spelling, seen in the strings or not
    strings  binarized strings of training cells
    """
    alphabet = sorted({character for word in words for character in word} | {"▁"})
    first = [PAD, EOS, UNKNOWN, *map(_special, special)]
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": first, "initial_alphabet": alphabet}
    if model == "unigram":
        backend = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(unk_token=UNKNOWN, **options)
    else:
        backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
        trainer = trainers.BpeTrainer(**options)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    backend.train_from_iterator(strings, trainer)
    return _wrapped(backend, special)


def _special(token: str) -> AddedToken:
    # The blank before it is no word of its own.
    return AddedToken(token, lstrip=True, normalized=False, special=True)


def _wrapped(backend: Tokenizer, special: Sequence[str]) -> TokenizersBackend:
    end = backend.token_to_id(EOS)
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {EOS}", special_tokens=[(EOS, end)]
    )
    return TokenizersBackend(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[_special(token) for token in special],
        padding_side="right",
        model_max_length=10**9,
    )


class _Node:
    """A place in the trie of spellings: what may follow, the word that may end here, words from here on."""

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.ends_word, self.n_words = False, 0


def spelling_constraint(tokens: np.ndarray, offsets: np.ndarray, eos_token_id: int) -> Callable[[int, Any], list[int]]:
    """`prefix_allowed_tokens_fn` for `generate`: only whole words of a list, none twice, then the end.

    tokens   pieces of all words end to end, none a word's first and another's later piece
    offsets  (words + 1,) where each word begins in them
    Returns  function of (row, (length,) tokens so far, the first of which only starts the decoder) -> allowed tokens
    """
    root = _Node()
    for first, last in itertools.pairwise(offsets):
        path = [root]
        for piece in tokens[first:last].tolist():
            path.append(path[-1].children.setdefault(piece, _Node()))
        path[-1].ends_word = True
        for node in path:
            node.n_words += 1

    def allowed(row: int, so_far: Any) -> list[int]:
        # Words used up below each node, and the path of the word that is being spelled
        used: Counter[_Node] = Counter()
        path = [root]
        for piece in so_far.tolist()[1:]:
            if piece == eos_token_id:
                return [eos_token_id]
            if piece in root.children:
                used.update(path if len(path) > 1 else [])
                path = [root]
            path.append(path[-1].children[piece])
        here = path[-1]

        def follow(node: _Node) -> list[int]:
            return [piece for piece, child in node.children.items() if child.n_words > used[child]]

        if here is root:
            return [*follow(root), eos_token_id]
        longer = follow(here)
        # Whether this very word is still to be had: not all that are used up below it are longer ones.
        if not here.ends_word or used[here] > sum(used[child] for child in here.children.values()):
            return longer
        used.update(path)
        return [*longer, *follow(root), eos_token_id]

    return allowed
