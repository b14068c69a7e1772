"""Calibration: the words that ask a model best for each pole, and the gain at which half a weight means on it what it
means on every other: half of what asking in words does.

Replies are judged by the model's own attribute scores (:mod:`prefmw.scoring`) beside those of its plain replies, so no
reward model and no word list is needed and a deployment's own dimensions are measured like the shipped ones. A
sentence is judged by the dimension's other sentences alone: its own would praise itself.

The measure is Cliff's delta: how much more often than not a reply scores further towards the pole than a plain reply,
in [-1, 1]. Scores have long tails (a model asked to be brief says what it never says plainly), which would drown all
else in a mean.

Source: prefmw's own; the scores are Drift's zero-shot rewarding between opposite poles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmw.evaluation.content import repeats
from prefmw.evaluation.held_out import profile_of
from prefmw.evaluation.steer import Condition, replies_to
from prefmw.personalizer import Backend
from prefmw.preferences import Dimension, Dimensions, Message
from prefmw.preferences.calibration import Calibration, Tuned
from prefmw.scoring import Exchange, attribute_scores, scored_dimensions

HALF = 0.5
"""How far half a weight moves a model's replies, of how far the pole's sentence moves them in a prompt."""

GAINS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Gains that are tried; in between is interpolated."""

LOOPS = 0.05
"""Replies more than of plain ones that may loop at a full weight."""

Progress = Callable[[str, float], None]
"""Told what is under way and the share of it that is done."""


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

    def replies(self, dimension: Dimension | None, weight: float) -> list[str]:
        """The replies to people with one weight, or with none."""
        asked = [[Message("user", question)] for question in self.questions]
        people = [profile_of({dimension.key: weight} if dimension else {})] * len(asked)
        known = Dimensions([dimension] if dimension else [])
        condition = Condition("drift" if dimension else "none", 1.0 if dimension else None, self.temperature)
        return replies_to(asked, people, condition, self.backend, known, self.seed, lambda count: None)[0]

    def scores(self, replies: Sequence[str], dimension: Dimension) -> NDArray[np.float64]:
        """Every reply read under every pair of the poles' sentences, (Q, J), nats a token; of an empty reply, 0."""
        said = [index for index, reply in enumerate(replies) if reply.strip()]
        exchanges = [Exchange([Message("user", self.questions[index])], replies[index]) for index in said]
        found = np.zeros((len(replies), len(pairs(dimension))))
        for column, pair in enumerate(pairs(dimension)):
            found[said, column] = attribute_scores(exchanges, self.backend, Dimensions([_worded(dimension, *pair)]))[
                :, 0
            ]
        return found


def pairs(dimension: Dimension) -> list[tuple[int, int]]:
    """Pairs of sentences, one of each pole, in which every sentence occurs: their numbers, the principle being 0."""
    negative, positive = len(sentences(dimension, -1)), len(sentences(dimension, 1))
    return [(index % negative, index % positive) for index in range(max(negative, positive))]


def sentences(dimension: Dimension, side: int) -> tuple[str, ...]:
    """The sentences of the pole on a side, its principle first."""
    pole = dimension.pole(side)
    return (pole.principle, *pole.wordings)


def calibrate(trials: Trials, dimensions: Dimensions, progress: Progress) -> tuple[Calibration, list[dict[str, Any]]]:
    """A model's calibration, and a row a pole that says what it rests on.

    Of a pole's sentences the first stays, unless another moves the replies further by more than two standard errors.
    The gain is the least at which half a weight moves them :data:`HALF` as far as the sentence itself does, but none
    at which a full weight makes more than :data:`LOOPS` of them loop.

    Row keys: ``dimension pole principle wording moves gain half full loops reached``: ``moves`` what each sentence does
    in a prompt, which is a full weight at gain 1; ``half``, ``full`` what such weights do at the gain chosen, all as
    Cliff's delta; ``reached`` whether ``half`` comes to nine tenths of what it should be.
    """
    keys = scored_dimensions(dimensions)
    plain = trials.replies(None, 0.0)
    looping = float(np.mean([repeats(reply) for reply in plain]))
    poles: dict[str, dict[str, Tuned]] = {}
    rows = []
    for number, key in enumerate(keys):
        dimension = dimensions[key]
        scored = trials.scores(plain, dimension)
        for side in (-1, 1):
            at = number + (side + 1) / 4
            progress(f"{key}, {dimension.pole(side).name}", at / len(keys))
            row = _pole_row(trials, dimension, side, scored, looping)
            poles.setdefault(key, {})[row["pole"]] = Tuned(row["principle"], row["gain"])
            rows.append(row)
    progress("calibrated", 1.0)
    chat = trials.backend.chat
    return Calibration(chat.name, chat.revision, poles), rows


def _pole_row(
    trials: Trials, dimension: Dimension, side: int, plain: NDArray[np.float64], looping: float
) -> dict[str, Any]:
    place = 0 if side < 0 else 1

    def moves(gain: float, weight: float, wording: int) -> tuple[NDArray[np.float64], float]:
        """How far each reply moves towards the pole, (Q,), and the share of replies that loop."""
        replies = trials.replies(_tuned(dimension, side, wording, gain), side * weight)
        scores = trials.scores(replies, dimension)
        judges = [column for column, pair in enumerate(pairs(dimension)) if pair[place] != wording] or [0]
        beyond = np.sign(side * (scores[:, None, judges] - plain[None, :, judges]))  # (Q, Q, J)
        return beyond.mean(axis=(1, 2)), float(np.mean([repeats(reply) for reply in replies]))

    tried = [moves(1.0, 1.0, wording)[0] for wording in range(len(sentences(dimension, side)))]
    wording = 0
    for index in range(1, len(tried)):
        further = tried[index] - tried[wording]
        if further.mean() > 2 * further.std(ddof=1) / len(further) ** 0.5:
            wording = index
    wanted = HALF * float(tried[wording].mean())
    halves = [float(moves(gain, 0.5, wording)[0].mean()) for gain in GAINS]
    gain = _least_reaching(halves, wanted)
    full, loops = moves(gain, 1.0, wording)
    while loops > looping + LOOPS and gain > GAINS[0]:
        gain = max(GAINS[0], round(0.8 * gain, 2))
        full, loops = moves(gain, 1.0, wording)
    half = float(np.interp(gain, GAINS, halves))
    return {
        "dimension": dimension.key,
        "pole": dimension.pole(side).name,
        "principle": sentences(dimension, side)[wording],
        "wording": wording,
        "moves": [round(float(one.mean()), 3) for one in tried],
        "gain": gain,
        "half": round(half, 3),
        "full": round(float(full.mean()), 3),
        "loops": round(loops, 3),
        "reached": wanted > 0 and half >= 0.9 * wanted,
    }


def _least_reaching(halves: Sequence[float], wanted: float) -> float:
    """The least gain at which half a weight moves replies as far as wanted, or the largest tried; 1 where the sentence
    itself does not move them.
    """
    if wanted <= 0:
        return 1.0
    before_gain, before = 0.0, 0.0
    for gain, moved in zip(GAINS, halves, strict=True):
        if moved >= wanted:
            share = (wanted - before) / (moved - before)
            return max(GAINS[0], round(before_gain + share * (gain - before_gain), 2))
        before_gain, before = gain, moved
    return GAINS[-1]


def _tuned(dimension: Dimension, side: int, wording: int, gain: float) -> Dimension:
    pole = replace(dimension.pole(side), principle=sentences(dimension, side)[wording], gain=gain)
    return replace(dimension, negative=pole) if side < 0 else replace(dimension, positive=pole)


def _worded(dimension: Dimension, negative: int, positive: int) -> Dimension:
    return _tuned(_tuned(dimension, -1, negative, 1.0), 1, positive, 1.0)
