"""The read-out: from a clause's embedding to the side of each dimension that its writer is on.

N clauses, D numbers in an embedding, F features, K dimensions, H hidden units. Similarity says what a clause is about,
not which side it takes. So the read-out sees the clause's embedding, that of its subject without the cues of rejection
(``cues.py``), whether the subject is wanted, and some hundred words. One hidden layer; fitted by
``prefmw prefs fit-readout``, kept as safetensors. Knows numpy alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefmw.errors import UsageError
from prefmw.preferences.cues import subject

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to unit vectors, (N, D)."""

SCALE = 8.0
"""Embeddings are multiplied by this, so that their numbers are about as large as the other features'."""


def features(clauses: Sequence[str], embed: Embed, words: Sequence[str]) -> NDArray[np.float32]:
    """What the read-out sees, (N, F) with F = 3 D + 3 + len(words).

    In order: the clause's embedding, its subject's, its subject's where that is not wanted (else zeros), the subject's
    sign, whether a cue and whether more than one was found, and which of ``words`` occur.
    """
    subjects = [subject(clause) for clause in clauses]
    texts = list(dict.fromkeys([*clauses, *(one.text for one in subjects)]))
    place = {text: index for index, text in enumerate(texts)}
    vectors = SCALE * embed(texts)
    whole = vectors[[place[clause] for clause in clauses]]
    about = vectors[[place[one.text] for one in subjects]]
    wanted = np.array([[one.wanted] for one in subjects], dtype=np.float32)
    counted = np.array([[one.cues > 0, one.cues > 1] for one in subjects], dtype=np.float32)
    index = {word: position for position, word in enumerate(words)}
    present = np.zeros((len(clauses), len(words)), dtype=np.float32)
    for row, clause in enumerate(clauses):
        for word in words_of(clause):
            if word in index:
                present[row, index[word]] = 1
    return np.concatenate([whole, about, np.where(wanted < 0, about, 0), wanted, counted, present], axis=1)


def words_of(text: str) -> list[str]:
    """A text's words in lower case, its apostrophes straight."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))


@dataclass(frozen=True)
class ReadOut:
    """A fitted read-out.

    Attributes:
        embedder: whose embeddings it was fitted on.
        dimensions: K keys, in the order of its outputs.
        words: the words that it looks for.
        threshold: the least size of a value that is a statement; what is smaller is abstained from.
        weights: name -> array: ``hidden`` (F, H), ``hidden_bias`` (H,), ``output`` (H, 3 K), ``output_bias`` (3 K,).
        anchors: the anchor bank's embeddings, (A, D), which explain a value.
    """

    embedder: str
    dimensions: tuple[str, ...]
    words: tuple[str, ...]
    threshold: float
    weights: dict[str, NDArray[np.float32]]
    anchors: NDArray[np.float32]

    def version(self) -> str:
        """A hash of all that its values depend on."""
        parts = [self.embedder, repr(self.dimensions), repr(self.words), repr(self.threshold)]
        numbers = [array.astype(np.float16).tobytes() for _, array in sorted(self.weights.items())]
        return hashlib.sha256("\n".join(parts).encode() + b"".join(numbers)).hexdigest()

    def values(self, clauses: Sequence[str], embed: Embed) -> NDArray[np.float64]:
        """Per clause and dimension, (N, K), the probability of the positive pole less the negative's, in [-1, 1]."""
        if not clauses:
            return np.zeros((0, len(self.dimensions)))
        return self.read(features(clauses, embed, self.words))

    def read(self, seen: NDArray[np.float32]) -> NDArray[np.float64]:
        """:meth:`values` of features, (N, F)."""
        hidden = np.maximum(seen @ self.weights["hidden"] + self.weights["hidden_bias"], 0)
        logits = (hidden @ self.weights["output"] + self.weights["output_bias"]).reshape(len(seen), -1, 3)
        odds = np.exp(logits - logits.max(axis=2, keepdims=True))
        sides = odds / odds.sum(axis=2, keepdims=True)  # negative pole, neither, positive pole
        return np.asarray(sides[..., 2] - sides[..., 0], dtype=np.float64)

    def save(self, path: Path) -> None:
        """Write it as float16 safetensors, with what it was fitted on beside the numbers."""
        from safetensors.numpy import save_file

        about = {
            "embedder": self.embedder,
            "dimensions": json.dumps(self.dimensions),
            "words": json.dumps(self.words),
            "threshold": repr(self.threshold),
        }
        arrays = {**self.weights, "anchors": self.anchors}
        save_file({name: array.astype(np.float16) for name, array in arrays.items()}, path, metadata=about)


def load_readout(path: Path) -> ReadOut:
    """Read what :meth:`ReadOut.save` wrote.

    Raises:
        UsageError: the file is not there or is no read-out.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
        return ReadOut(
            about["embedder"],
            tuple(json.loads(about["dimensions"])),
            tuple(json.loads(about["words"])),
            float(about["threshold"]),
            weights,
            anchors=weights.pop("anchors"),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"'{path}' is no read-out; make one with 'prefmw prefs fit-readout'") from error
