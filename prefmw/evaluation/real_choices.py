"""How soon choices between a chat model's real replies tell which of two others a person would choose.

Replies that lean anywhere at random answer held-out questions; simulated people, whose weights on the oracles' axes are
uniform on the sphere, choose by what the oracles read in them (each axis in its deviations), while the learner sees the
chat model's own attribute scores alone. What is learned of them is judged by the share of their choices that it
predicts between replies to questions that they were not asked about.

Shapes: P pairs, A axes, K scored dimensions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefmw.choices import leaning
from prefmw.decoding import Sampling
from prefmw.evaluation.held_out import profile_of
from prefmw.evaluation.oracles import measure
from prefmw.evaluation.statistics import cluster_interval
from prefmw.preferences import Dimensions, Message
from prefmw.preferences.learning import bradley_terry, information
from prefmw.scoring import Exchange, Scale, attribute_scores, spoken
from prefmw.steering import Backend
from prefmw.training.styles import AXES, Split
from prefmw.training.topics import load_topics

CHOICES = (10, 30, 50)
"""After so many choices the rest are predicted."""

REPLIES = 6
"""Replies to a question, as many as ``/compare`` draws its pair from."""

AT_ONCE = 60
"""Replies that the engine is asked for together."""

ASKED = 2 / 3
"""Share of the questions that people choose about; the others' replies judge what was learned."""


class Pairs(NamedTuple):
    """Differences between two replies to one question: the oracles' measures (P, A), and the scores (P, K)."""

    measures: NDArray[np.float64]
    scores: NDArray[np.float64]


def real_pairs(
    split: Split,
    questions: int,
    backend: Backend,
    dimensions: Dimensions,
    scale: Scale,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[Pairs, Pairs]:
    """Pairs to choose between, and pairs to judge by, of other questions.

    Args:
        split: whose wordings are asked.
        questions: how many, each of another topic or wording.
        scale: of the chat model's scores.
    """
    rng = random.Random(f"{split}:{seed}:real choices")
    asked = [[Message("user", rng.choice(topic.held_out(split)))] for topic in rng.choices(load_topics(), k=questions)]
    nobody = profile_of({})
    requests = [
        request
        for index, messages in enumerate(asked)
        for request in leaning(
            messages,
            nobody,
            backend,
            dimensions,
            scale.dimensions,
            Sampling(0.7, 0.8, None, 160, seed + index),
            REPLIES,
        )
    ]
    said: list[tuple[str, bool]] = []
    for begin in range(0, len(requests), AT_ONCE):
        said += spoken(requests[begin : begin + AT_ONCE], backend)
        progress("replies", len(said) / len(requests))
    whole = [index for index in range(questions) if all(text.strip() for text, _ in _of(said, index))]
    exchanges = [Exchange(asked[index], text, ended) for index in whole for text, ended in _of(said, index)]
    scores = scale.standardise(
        attribute_scores(exchanges, backend, dimensions, lambda share: progress("scores", share))
    )
    measures = np.array([[measure(exchange.reply)[axis] for axis in AXES] for exchange in exchanges])
    deviations = measures.std(axis=0)
    measures = measures / np.where(deviations > 0, deviations, 1.0)
    last = round(ASKED * len(whole))
    return _differences(measures, scores, 0, last), _differences(measures, scores, last, len(whole))


def _of(said: Sequence[tuple[str, bool]], index: int) -> Sequence[tuple[str, bool]]:
    return said[REPLIES * index : REPLIES * (index + 1)]


def _differences(measures: NDArray[np.float64], scores: NDArray[np.float64], begin: int, end: int) -> Pairs:
    pairs = [
        (REPLIES * index + one, REPLIES * index + other)
        for index in range(begin, end)
        for one, other in combinations(range(REPLIES), 2)
    ]
    first, second = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    return Pairs(measures[first] - measures[second], scores[first] - scores[second])


def accuracy_rows(asked: Pairs, judged: Pairs, people: int, seed: int = 0) -> list[dict[str, Any]]:
    """Per way of picking pairs and number of choices one row: the mean share of a person's choices among ``judged``
    that what they chose before predicts, with a 95% interval over people. ``own measures`` learns from what the oracles
    read in place of the scores, which nothing learns more from.
    """
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(people, len(AXES)))
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    shares: dict[tuple[str, int], list[float]] = {}
    for person in hidden:
        order = rng.permutation(len(asked.scores))
        prefers, wanted = asked.measures @ person, judged.measures @ person
        decided = np.abs(wanted) > 1e-9
        for way, told, judging in (
            ("random pairs", asked.scores, judged.scores),
            ("chosen pairs", asked.scores, judged.scores),
            ("own measures", asked.measures, judged.measures),
        ):
            picked = _picked(told, prefers, order, way == "chosen pairs")
            for count in CHOICES:
                learned = bradley_terry(picked[:count]).mean
                right = np.sign(judging[decided] @ learned) == np.sign(wanted[decided])
                shares.setdefault((way, count), []).append(float(right.mean()))
    return [
        {
            "learner": way,
            "choices": count,
            "people": people,
            "accuracy": float(np.mean(found)),
            "ci95": cluster_interval(found, range(people), seed=seed),
        }
        for (way, count), found in shares.items()
    ]


def _picked(
    told: NDArray[np.float64], prefers: NDArray[np.float64], order: NDArray[np.int64], by_information: bool
) -> NDArray[np.float64]:
    """As many comparisons as are needed, (N, K), what was chosen less what was not; pairs of equals are not asked."""
    left = [row for row in order.tolist() if abs(prefers[row]) > 1e-9]
    signed = told * np.sign(prefers)[:, None]
    most: int = max(CHOICES)
    if not by_information:
        return np.asarray(signed[left[:most]])
    rows: list[int] = []
    for _ in range(min(most, len(left))):
        known = bradley_terry(signed[rows] if rows else np.zeros((1, told.shape[1])))
        best = left[int(information(told[left], known).argmax())]
        left.remove(best)
        rows.append(best)
    return np.asarray(signed[rows])
