"""Oracles: one transparent, deterministic measure of a reply's text per style axis, each in [-1, 1].

They read the text alone, never the model, the preference or the corpus's labels. Each function's docstring says what it
counts. ``followed`` is the right sign and a size of at least :data:`FOLLOWED`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

from prefmw.evaluation.content import FUNCTION_WORDS, LEXICONS, is_joke, sentences, words_of

FOLLOWED = 0.2
"""The least size of a measure that counts as having the style."""

NEUTRAL_WORDS = 38
"""The median length of a neutral answer of the corpus."""

NEUTRAL_LETTERS, LETTERS_PER_UNIT = 5.3, 2.0
"""The mean length of a neutral answer's content words, and how many letters more make it fully expert."""


def verbosity(text: str) -> float:
    """Length: log(words / 38) / log 3, cut to [-1, 1]; 12 words and fewer are -1, 114 and more +1. Sentences that are
    jokes or of the word lists of humour and friendliness are not counted: a joke more is not an answer in more depth.
    """
    kept = [sentence for sentence in sentences(text) if not _is_marked(sentence)]
    count = max(1, sum(len(words_of(sentence)) for sentence in kept))
    return _cut(math.log(count / NEUTRAL_WORDS) / math.log(3))


def complexity(text: str) -> float:
    """Word length and explaining turns: (the mean number of letters of the content words, less 5.3) / 2, to which half
    of the balance of sentences with technical turns and with turns as to a beginner ("Why?", "It is simple.") is
    added; cut to [-1, 1]. Sentences that are jokes or of another axis's word list are left out.
    """
    kept = [sentence for sentence in sentences(text) if not _is_marked(sentence)] or [text]
    formal = _pattern("formality", "positive")
    lengths = [
        len(word) for sentence in kept for word in words_of(formal.sub(" ", sentence)) if word not in FUNCTION_WORDS
    ]
    letters = sum(lengths) / len(lengths) if lengths else NEUTRAL_LETTERS
    turns = sum(_sign("complexity", sentence) for sentence in kept) / len(kept)
    return _cut((letters - NEUTRAL_LETTERS) / LETTERS_PER_UNIT + turns / 2)


def humor(text: str) -> float:
    """Jokes less earnest words: sentences that are jokes of the topics or hold a word of comedy count +1, those that
    stress how serious the matter is -1; their sum over the number of sentences that advise, cut to [-1, 1].
    """
    return _balance(text, "humor", joke_counts=1)


def friendliness(text: str) -> float:
    """Kind sentences less brusque ones, by word list, over the number of sentences that advise, cut to [-1, 1]. A joke
    counts as neither.
    """
    return _balance(text, "friendliness")


def formality(text: str) -> float:
    """Sentences with formal turns less those with contractions and colloquial words, by word list, over the number of
    sentences that advise, cut to [-1, 1]. A joke counts as neither.
    """
    return _balance(text, "formality")


ORACLES: dict[str, Callable[[str], float]] = {
    "verbosity": verbosity,
    "complexity": complexity,
    "humor": humor,
    "friendliness": friendliness,
    "formality": formality,
}
"""The measures by axis."""


def measure(text: str) -> dict[str, float]:
    """Every axis's measure of ``text``."""
    return {axis: oracle(text) for axis, oracle in ORACLES.items()}


def followed(value: float, wanted: int) -> bool:
    """Whether a measure has the sign ``wanted`` and at least the size :data:`FOLLOWED`."""
    return value * wanted >= FOLLOWED


def _balance(text: str, axis: str, *, joke_counts: int = 0) -> float:
    total, advising = 0, 0
    for sentence in sentences(text):
        joke = is_joke(sentence)
        total += joke_counts if joke else _sign(axis, sentence)
        advising += not joke and (axis == "formality" or not _is_marked(sentence))
    return _cut(total / max(1, advising))


def _is_marked(sentence: str) -> bool:
    """Whether the sentence is there for its tone: a joke, or of humour's or friendliness's word list."""
    return is_joke(sentence) or bool(_sign("humor", sentence) or _sign("friendliness", sentence))


def _sign(axis: str, sentence: str) -> int:
    counts = [len(_pattern(axis, side).findall(sentence)) for side in ("negative", "positive")]
    return (counts[1] > counts[0]) - (counts[1] < counts[0])


@cache
def _pattern(axis: str, side: str) -> re.Pattern[str]:
    words = [*LEXICONS[axis][side]["general"], *LEXICONS[axis][side]["corpus"]]
    return re.compile(r"(?<!\w)(?:" + "|".join(words) + r")(?!\w)", re.IGNORECASE)


def _cut(value: float) -> float:
    return max(-1.0, min(1.0, value))
