"""Weights inferred from a person's own words: clauses, read out, explained by the anchors nearest.

Nothing is guessed: a dimension on which no clause takes a side clearly enough is left unset, and where two clauses take
opposite sides both are shown and neither wins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from prefmw.preferences.anchors import Anchor
from prefmw.preferences.dimensions import Dimensions
from prefmw.preferences.profile import Stated, check_persona

STRICT = 0.8
"""The least size of a value that is heard as a preference where nobody asked for one: in conversation."""

SHOWN = 3
"""Anchors shown for a weight."""

_ENDS = re.compile(r"(?<=[.!?;])\s+|\s*\n+\s*|\s+[–—-]\s+")

_JOINTS = re.compile(
    r",?\s+(?:but|yet|although|though|however|while|whereas)\s+|,\s+(?:and|so|or)\s+"
    r"|(?:,|\s+and)\s+(?=(?:no|not|don['’]?t|do|please|keep|just|never|without|with|be|use|give|make|write|skip|avoid)\b)",
    re.IGNORECASE,
)


class Read(NamedTuple):
    """What N clauses say: ``values`` (N, K) in [-1, 1], and the unit ``vectors`` (N, D) that these were read from."""

    values: NDArray[np.float64]
    vectors: NDArray[np.float32]


class ReadOut(Protocol):
    """What takes a clause's side: :class:`prefmw.models.readout.ReadOut`, of K dimensions.

    ``poles`` are the names of each dimension's negative and positive pole (``None`` where it has none). What is smaller
    than ``threshold`` is no statement. ``anchors`` are the labelled statements that explain a weight, and ``vectors``
    what it reads in them, (A, D).
    """

    dimensions: tuple[str, ...]
    poles: tuple[tuple[str | None, str], ...]
    threshold: float
    anchors: tuple[Anchor, ...]
    vectors: NDArray[np.float32]

    def version(self) -> str:
        """A hash of all that its values depend on."""
        ...

    def read(self, clauses: Sequence[str]) -> Read:
        """What clauses say."""
        ...


class Unit(NamedTuple):
    """A piece of a text that is read by itself: a sentence, or one of its clauses. A sentence without clauses of its
    own is an atom, as every clause is.
    """

    text: str
    is_atom: bool


def units(text: str) -> list[Unit]:
    """A text's sentences, each followed by its clauses where it has more than one of at least two words."""
    found = []
    for sentence in _ENDS.split(text.strip()):
        if not (sentence := sentence.strip(" ,;")):
            continue
        clauses = [clause.strip(" ,;") for clause in _JOINTS.split(sentence)]
        whole = len(clauses) < 2 or any(len(clause.split()) < 2 for clause in clauses)
        found.append(Unit(sentence, whole))
        if not whole:
            found += [Unit(clause, True) for clause in clauses]
    return found


@dataclass(frozen=True)
class Evidence:
    """An anchor that a clause resembles: its text, the cosine of what the read-out makes of both, and the pole it asks
    for.
    """

    anchor: str
    similarity: float
    pole: str
    clause: str


@dataclass(frozen=True)
class Inferred:
    """A weight in [-1, 1], the clause that states it, and the anchors of that pole nearest to the clause."""

    value: float
    clause: str
    because: tuple[Evidence, ...]

    @property
    def stated(self) -> Stated:
        """As a store takes it; the value's size is its confidence."""
        return Stated(self.value, abs(self.value), [vars(one) for one in self.because])


@dataclass(frozen=True)
class Inference:
    """What a text states: a weight for each dimension it takes a side on, and where it takes both, both."""

    weights: dict[str, Inferred] = field(default_factory=dict)
    conflicts: dict[str, tuple[Inferred, Inferred]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As ``prefs infer --json`` prints it."""
        return {
            "weights": {key: one.value for key, one in self.weights.items()},
            "because": {key: [vars(proof) for proof in one.because] for key, one in self.weights.items()},
            "conflicts": {
                key: [{"value": one.value, "clause": one.clause} for one in pair]
                for key, pair in self.conflicts.items()
            },
        }


class Inferer:
    """Reads preferences out of texts.

    Args:
        readout: the fitted read-out.
        dimensions: the registry; a dimension of the read-out's that it lacks, or has with other poles, is not read.
    """

    def __init__(self, readout: ReadOut, dimensions: Dimensions) -> None:
        self._readout = readout
        self._dimensions = dimensions
        self.dimensions = frozenset(
            key
            for key, poles in zip(readout.dimensions, readout.poles, strict=True)
            if key in dimensions and dimensions[key].kind == "style" and dimensions[key].poles == poles
        )
        self._version = f"{readout.version()} {sorted(self.dimensions)}"
        self._anchors: dict[tuple[str | None, int], list[int]] = {}  # by dimension and side
        for row, anchor in enumerate(readout.anchors):
            self._anchors.setdefault((anchor.dimension, anchor.side), []).append(row)

    def key(self, persona: str) -> str:
        """What an inference of this persona rests on, as a hash: its words, the read-out and the dimensions read."""
        return hashlib.sha256(f"{self._version}\n{persona}".encode()).hexdigest()[:32]

    def infer(self, text: str, *, threshold: float = 0.0) -> Inference:
        """What ``text`` states.

        Args:
            text: a persona or a message, at most 4,000 characters.
            threshold: the least size of a value that is a statement, where it is more than the read-out's own.

        Raises:
            UsageError: the text is too long, or holds what no text may.
        """
        said = units(check_persona(text))
        values, vectors = self._readout.read([unit.text for unit in said])
        least = max(self._readout.threshold, threshold)
        weights: dict[str, Inferred] = {}
        conflicts: dict[str, tuple[Inferred, Inferred]] = {}
        for dimension, sides in zip(self._readout.dimensions, values.T, strict=True):
            if dimension not in self.dimensions or not len(sides) or np.abs(sides).max() < least:
                continue
            atoms = [row for row, unit in enumerate(said) if unit.is_atom and abs(sides[row]) >= least]
            for_, against = (max(atoms, key=lambda row: sign * sides[row], default=None) for sign in (1, -1))
            if for_ is not None and against is not None and sides[for_] > 0 > sides[against]:
                rows = [for_, against]
            else:
                # A clause is clearer than the sentence it stands in, where it says something by itself.
                rows = [max(atoms or range(len(said)), key=lambda row: abs(sides[row]))]
            found = [self._inferred(dimension, said[row].text, float(sides[row]), vectors[row]) for row in rows]
            if len(found) == 2:
                conflicts[dimension] = (found[0], found[1])
            else:
                weights[dimension] = found[0]
        return Inference(weights, conflicts)

    def _inferred(self, dimension: str, clause: str, value: float, vector: NDArray[np.float32]) -> Inferred:
        side = 1 if value > 0 else -1
        anchors = self._readout.anchors
        rows = self._anchors.get((dimension, side), [])
        similarities: NDArray[np.float32] = self._readout.vectors[rows] @ vector
        nearest = sorted(zip(similarities.tolist(), rows, strict=True), reverse=True)[:SHOWN]
        because = tuple(
            Evidence(anchors[row].text, round(likeness, 3), anchors[row].pole(self._dimensions), clause)
            for likeness, row in nearest
        )
        return Inferred(round(value, 3), clause, because)
