"""Calibration: the words that ask a model best for each pole, and how far half a weight must go towards their reading
to mean on it what it means on every other: half of what asking in words does.

Replies are judged by the model's own attribute scores (:mod:`prefmw.scoring`) beside those of its plain replies, so no
reward model and no word list is needed and a deployment's own dimensions are measured like the shipped ones. A
sentence is judged by the dimension's other sentences alone: its own would praise itself.

The measure is Cliff's delta: how much more often than not a reply scores further towards the pole than a plain reply,
in [-1, 1]. Scores have long tails (a model asked to be brief says what it never says plainly), which would drown all
else in a mean.

What is tried on all poles is asked together, as many replies at a time as the engine has rows for; every question has
one seed in all settings. A reply that the model gave plainly as well is as far towards a pole as that one, to the bit.

Source: prefmw's own; the scores are Drift's zero-shot rewarding between opposite poles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefmw.decoding import Request
from prefmw.evaluation.content import repeats
from prefmw.evaluation.held_out import profile_of
from prefmw.evaluation.steer import MAX_TOKENS, Condition, request_of, said_to
from prefmw.preferences import Dimension, Dimensions, Message
from prefmw.preferences.calibration import Calibration, Tuned
from prefmw.scoring import Exchange, attribute_scores, scored_dimensions
from prefmw.steering import Backend
from prefmw.training.unfinished import Unfinished

HALF = 0.5
"""How far half a weight moves a model's replies, of how far the pole's sentence moves them in a prompt."""

MIDPOINTS = (0.2, 0.4, 0.6, 0.8, 0.9)
"""How far half a weight is tried to go, from the least until one suffices; in between is interpolated."""

Progress = Callable[[str, float], None]
"""Told what is under way and the share of it that is done."""

Person = tuple[Dimension | None, float]
"""Somebody with a weight on one dimension, or with none."""


@dataclass(frozen=True)
class Trials:
    """What a model is asked and how its replies are read.

    Attributes:
        questions: Q of them, asked of every setting.
        temperature: of the sampling, whose nucleus is prefmw's default.
        seed: of the sampling, the same in every setting.
    """

    backend: Backend
    questions: Sequence[str]
    temperature: float = 0.7
    seed: int = 0

    def replies(self, people: Sequence[Person]) -> Iterator[list[str]]:
        """The Q replies to each of these people, in their order; those of many are decoded together."""
        tokenizer = self.backend.chat.tokenizer
        requests = (request for person in people for request in self._requests(*person))
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in said_to(requests, self.backend))
        while part := list(islice(texts, len(self.questions))):
            yield part

    def _requests(self, dimension: Dimension | None, weight: float) -> Iterator[Request]:
        person = profile_of({dimension.key: weight} if dimension else {})
        known = Dimensions([dimension] if dimension else [])
        condition = Condition("drift" if dimension else "none", 1.0 if dimension else None, self.temperature)
        for index, question in enumerate(self.questions):
            request = request_of([Message("user", question)], person, condition, self.backend, known)
            yield replace(request, sampling=replace(request.sampling, seed=self.seed + index))

    def scores(
        self, replies: Sequence[str | None], dimension: Dimension, columns: Iterable[int]
    ) -> NDArray[np.float64]:
        """Every reply to its question read under some pairs of the poles' sentences, (Q, C), nats a token; of an empty
        reply, or of none, 0.
        """
        said = [index for index, reply in enumerate(replies) if reply and reply.strip()]
        exchanges = [Exchange([Message("user", self.questions[index])], replies[index] or "") for index in said]
        chosen = [pairs(dimension)[column] for column in columns]
        found = np.zeros((len(replies), len(chosen)))
        for place, pair in enumerate(chosen):
            read = attribute_scores(exchanges, self.backend, Dimensions([_worded(dimension, *pair)]))
            found[said, place] = read[:, 0]
        return found

    def about(self, dimensions: Dimensions) -> dict[str, Any]:
        """All that a calibration depends on, for :class:`~prefmw.training.unfinished.Unfinished`."""
        chat = self.backend.chat
        asked = (list(self.questions), [asdict(dimension) for dimension in dimensions.values()], MAX_TOKENS)
        return {
            "model": chat.name,
            "revision": chat.revision,
            "dtype": chat.dtype,
            "temperature": self.temperature,
            "seed": self.seed,
            "asked": hashlib.sha256(repr(asked).encode()).hexdigest()[:12],
            "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
        }


def pairs(dimension: Dimension) -> list[tuple[int, int]]:
    """Pairs of sentences, one of each pole, in which every sentence occurs: their numbers, the principle being 0."""
    negative, positive = len(sentences(dimension, -1)), len(sentences(dimension, 1))
    return [(index % negative, index % positive) for index in range(max(negative, positive))]


def sentences(dimension: Dimension, side: int) -> tuple[str, ...]:
    """The sentences of the pole on a side, its principle first."""
    pole = dimension.pole(side)
    return (pole.principle, *pole.wordings)


class Setting(NamedTuple):
    """One way of leaning to a pole: by which of its sentences, with which weight, half a weight going how far."""

    dimension: str
    side: int
    wording: int
    midpoint: float
    weight: float


class Moved(NamedTuple):
    """How far each reply of a setting moved towards the pole, (Q,), and the share of them that loop."""

    each: NDArray[np.float64]
    loops: float

    @property
    def mean(self) -> float:
        """Cliff's delta."""
        return float(self.each.mean())


@dataclass
class _Pole:
    """A pole's way to its words and midpoint."""

    dimension: Dimension
    side: int
    wording: int = 0
    midpoint: float = 0.5

    def at(self, midpoint: float, weight: float, wording: int | None = None) -> Setting:
        wording = self.wording if wording is None else wording
        return Setting(self.dimension.key, self.side, wording, midpoint, weight)

    @property
    def wordings(self) -> list[Setting]:
        """Every sentence in a prompt, which is a full weight."""
        return [self.at(0.5, 1.0, wording) for wording in range(len(sentences(self.dimension, self.side)))]

    @property
    def in_words(self) -> Setting:
        """The sentence that was taken, in a prompt."""
        return self.wordings[self.wording]

    @property
    def name(self) -> str:
        return self.dimension.pole(self.side).name


def calibrate(
    trials: Trials, dimensions: Dimensions, progress: Progress, unfinished: Unfinished | None = None
) -> tuple[Calibration, list[dict[str, Any]]]:
    """A model's calibration, and a row a pole that says what it rests on.

    Of a pole's sentences the first stays, unless another moves the replies further by more than two standard errors.
    The midpoint is the least way to go for half a weight to move them :data:`HALF` as far as the sentence itself does;
    0.5 where that moves them by less than two standard errors. What was measured before a kill is taken from
    ``unfinished``.

    Row keys: ``dimension pole principle wording moves loops midpoint moved reached``: ``moves`` what each sentence does
    in a prompt, which is a full weight, and ``moved`` what half a weight does, as Cliff's delta, ``None`` where the
    sentence does nothing; ``loops`` the share of replies to the sentence that loop; ``reached`` whether ``moved`` comes
    to nine tenths of what it should be.
    """
    poles = [_Pole(dimensions[key], side) for key in scored_dimensions(dimensions) for side in (-1, 1)]
    seen = _Measurements(trials, dimensions, progress, unfinished)
    seen.expected = sum(len(pole.wordings) + len(MIDPOINTS) for pole in poles)
    seen.measure([setting for pole in poles for setting in pole.wordings])
    for pole in poles:
        pole.wording = _further([seen[setting].each for setting in pole.wordings])
    moving = searching = [pole for pole in poles if _sure(seen[pole.in_words].each)]
    for midpoint in MIDPOINTS:
        seen.expected -= len(poles) - len(searching)
        seen.measure([pole.at(midpoint, 0.5) for pole in searching])
        searching = [pole for pole in searching if seen[pole.at(midpoint, 0.5)].mean < _wanted(seen, pole)]
    for pole in moving:
        pole.midpoint = _least_reaching(_moved(seen, pole), _wanted(seen, pole))
    progress("calibrated", 1.0)
    rows = [_row(seen, pole) for pole in poles]
    chat = trials.backend.chat
    tuned: dict[str, dict[str, Tuned]] = {}
    for row in rows:
        tuned.setdefault(row["dimension"], {})[row["pole"]] = Tuned(row["principle"], row["midpoint"])
    return Calibration(chat.name, chat.revision, tuned), rows


class _Measurements:
    """What was measured so far, kept as it comes."""

    def __init__(
        self, trials: Trials, dimensions: Dimensions, progress: Progress, unfinished: Unfinished | None
    ) -> None:
        self._trials, self._dimensions, self._progress, self._unfinished = trials, dimensions, progress, unfinished
        kept = unfinished.state() if unfinished else None
        self._known: dict[str, Any] = kept or {"plain": None, "read": {}, "moved": {}}
        self.expected = 0
        if self._known["plain"] is None:
            (self._known["plain"],) = trials.replies([(None, 0.0)])

    def __getitem__(self, setting: Setting) -> Moved:
        each, loops = self._known["moved"][repr(tuple(setting))]
        return Moved(np.array(each), loops)

    def __contains__(self, setting: Setting) -> bool:
        return repr(tuple(setting)) in self._known["moved"]

    def measure(self, settings: Sequence[Setting]) -> None:
        """Measure those that are not known yet."""
        new = [setting for setting in dict.fromkeys(settings) if setting not in self]
        tuned = [_tuned(self._dimensions[one.dimension], one.side, one.wording, one.midpoint) for one in new]
        people = [(dimension, one.side * one.weight) for dimension, one in zip(tuned, new, strict=True)]
        for setting, replies in zip(new, self._trials.replies(people), strict=True):
            moved = self._read(setting, replies)
            self._known["moved"][repr(tuple(setting))] = (moved.each.tolist(), moved.loops)
            name = self._dimensions[setting.dimension].pole(setting.side).name
            what = f"{setting.dimension}, {name}: "
            what += "in words" if setting.weight == 1 else f"half a weight, going {setting.midpoint:g} of the way"
            self._progress(what, min(0.99, len(self._known["moved"]) / max(1, self.expected)))
            if self._unfinished:
                self._unfinished.keep(lambda: self._known)

    def _read(self, setting: Setting, replies: list[str]) -> Moved:
        dimension, side = self._dimensions[setting.dimension], setting.side
        plain = self._plain(dimension)
        place = 0 if side < 0 else 1
        judges = [at for at, pair in enumerate(pairs(dimension)) if pair[place] != setting.wording] or [0]
        said = zip(replies, self._known["plain"], strict=True)
        others = [None if reply == before else reply for reply, before in said]
        scores = self._trials.scores(others, dimension, judges)  # (Q, J)
        for index, other in enumerate(others):
            if other is None:
                scores[index] = plain[index, judges]
        beyond = np.sign(side * (scores[:, None] - plain[None, :, judges]))  # (Q, Q, J)
        return Moved(beyond.mean(axis=(1, 2)), float(np.mean([repeats(reply) for reply in replies])))

    def _plain(self, dimension: Dimension) -> NDArray[np.float64]:
        """The plain replies' scores under every pair, (Q, J)."""
        if dimension.key not in self._known["read"]:
            columns = range(len(pairs(dimension)))
            scores = self._trials.scores(self._known["plain"], dimension, columns)
            self._known["read"][dimension.key] = scores.tolist()
        return np.array(self._known["read"][dimension.key])


def _further(tried: Sequence[NDArray[np.float64]]) -> int:
    """The sentence that moves the replies furthest, the first where none does so by more than two standard errors."""
    best = 0
    for index in range(1, len(tried)):
        if _sure(tried[index] - tried[best]):
            best = index
    return best


def _sure(each: NDArray[np.float64]) -> bool:
    """Whether the mean of what questions give is above 0 by more than two standard errors."""
    return bool(each.mean() > 2 * each.std(ddof=1) / len(each) ** 0.5)


def _wanted(seen: _Measurements, pole: _Pole) -> float:
    """How far half a weight is to move the replies."""
    return HALF * seen[pole.in_words].mean


def _moved(seen: _Measurements, pole: _Pole) -> list[float]:
    """How far half a weight moves them at the midpoints that were tried, from the least on."""
    return [seen[pole.at(midpoint, 0.5)].mean for midpoint in MIDPOINTS if pole.at(midpoint, 0.5) in seen]


def _least_reaching(tried: Sequence[float], wanted: float) -> float:
    """The least midpoint at which half a weight moves replies as far as wanted, or the farthest tried."""
    shorter, before = 0.0, 0.0
    for midpoint, moved in zip(MIDPOINTS, tried, strict=False):
        if moved >= wanted:
            share = (wanted - before) / (moved - before)
            return max(MIDPOINTS[0], round(shorter + share * (midpoint - shorter), 2))
        shorter, before = midpoint, moved
    return MIDPOINTS[-1]


def _row(seen: _Measurements, pole: _Pole) -> dict[str, Any]:
    tried = _moved(seen, pole)
    moved = float(np.interp(pole.midpoint, MIDPOINTS[: len(tried)], tried)) if tried else None
    return {
        "dimension": pole.dimension.key,
        "pole": pole.name,
        "principle": sentences(pole.dimension, pole.side)[pole.wording],
        "wording": pole.wording,
        "moves": [round(seen[setting].mean, 3) for setting in pole.wordings],
        "loops": round(seen[pole.in_words].loops, 3),
        "midpoint": pole.midpoint,
        "moved": None if moved is None else round(moved, 3),
        "reached": moved is not None and moved >= 0.9 * _wanted(seen, pole),
    }


def _tuned(dimension: Dimension, side: int, wording: int, midpoint: float) -> Dimension:
    pole = replace(dimension.pole(side), principle=sentences(dimension, side)[wording], midpoint=midpoint)
    return replace(dimension, negative=pole) if side < 0 else replace(dimension, positive=pole)


def _worded(dimension: Dimension, negative: int, positive: int) -> Dimension:
    return _tuned(_tuned(dimension, -1, negative, 0.5), 1, positive, 0.5)
