"""The styles of the embedded chat model: five signed axes, the wordings that ask for either pole, and how an answer
sounds that has it.

The content is data under ``style_files/``: one file an axis with the wordings, split into train, dev and test at
random once; ``markers.toml`` with what an answer in a style says; ``unseen.toml`` with the pairs of poles that the
corpus never asks for together.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

POLES = {
    "verbosity": ("concise", "detailed"),
    "complexity": ("elementary", "expert"),
    "humor": ("serious", "humorous"),
    "friendliness": ("blunt", "warm"),
    "formality": ("casual", "formal"),
}
"""The axes, each with its negative and its positive pole, as the registry of dimensions names them."""

AXES = tuple(POLES)


def pole_name(axis: str, value: float) -> str:
    """The pole on the side of ``value``'s sign; ``value`` is not 0."""
    return POLES[axis][value > 0]


@dataclass(frozen=True)
class Wordings:
    """Ways to ask for one pole.

    ``requests`` are instructions; ``personas`` noun phrases that state the liking; ``indirect`` noun phrases that only
    imply it ("a surgeon between two operations"). ``further_personas`` and ``further_indirect`` came later and are more
    far-fetched. ``statements``, in training alone, are what people say who want it; the read-out of preferences learns
    from the same.
    """

    requests: tuple[str, ...]
    personas: tuple[str, ...]
    indirect: tuple[str, ...]
    further_personas: tuple[str, ...]
    further_indirect: tuple[str, ...]
    statements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Styles:
    """Wordings by split and pole, what a style sounds like, and the pairs of poles kept out of training."""

    wordings: dict[Split, dict[str, Wordings]]
    markers: dict[str, Any]
    unseen_pairs: dict[Split, tuple[frozenset[str], ...]]

    def forms(self, split: Split, *path: str) -> tuple[str, ...]:
        """Markers such as ``openers, warm`` or ``frames, casual, first``: those of training, and for another split its
        own besides.
        """
        table = self.markers
        for key in path:
            table = table[key]
        return (*table["train"], *(table.get(split, ()) if split != "train" else ()))


@cache
def load_styles() -> Styles:
    """All of ``style_files/``, and the statements of ``preference_files/``."""
    wordings: dict[Split, dict[str, Wordings]] = {split: {} for split in SPLITS}
    for axis in AXES:
        table = _read("style_files", f"{axis}.toml")
        for pole in POLES[axis]:
            for split in SPLITS:
                part = table[pole][split]
                wordings[split][pole] = Wordings(**{kind: tuple(texts) for kind, texts in part.items()})
    held_out = {_plain(text) for split in ("dev", "test") for words in wordings[split].values() for text in _all(words)}
    for axis in AXES:
        table = _read("preference_files", f"{axis}.toml")
        for pole in POLES[axis]:
            said = tuple(text for text in table[pole]["statements"] if _plain(text) not in held_out)
            wordings["train"][pole] = replace(wordings["train"][pole], statements=said)
    unseen = _read("style_files", "unseen.toml")["pairs"]
    pairs: dict[Split, tuple[frozenset[str], ...]] = {"train": ()}
    for split in ("dev", "test"):
        pairs[split] = tuple(frozenset(pair) for pair in unseen[split])
    return Styles(wordings, _read("style_files", "markers.toml"), pairs)


@dataclass(frozen=True)
class Talk:
    """What is said beside the topics: small talk, questions that the model cannot answer, ways of asking, and
    sentences of people about themselves that ask for no style.
    """

    small: dict[str, Any]
    unknown: dict[str, Any]
    neutral: tuple[str, ...]


@cache
def load_talk() -> Talk:
    """All of ``talk_files/``, and what people say of themselves in ``preference_files/neutral.toml``."""
    texts = _read("preference_files", "neutral.toml")["texts"]
    neutral = tuple(text for text in texts if re.match(r"(I|I'm|I've|My|We|Our)\b.*\.$", text))
    return Talk(_read("talk_files", "small_talk.toml"), _read("talk_files", "unknown.toml"), neutral)


def _all(words: Wordings) -> tuple[str, ...]:
    further = (*words.further_personas, *words.further_indirect)
    return (*words.requests, *words.personas, *words.indirect, *further)


def _plain(text: str) -> str:
    """Its letters alone, for comparing."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _read(folder: str, name: str) -> dict[str, Any]:
    return tomllib.loads((files("prefmw.training") / folder / name).read_text(encoding="utf-8"))
