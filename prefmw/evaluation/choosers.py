"""How soon choices tell what a person likes: simulated people choose between replies.

Their weights are known, uniform on the sphere of six dimensions; replies' scores differ by standard normals. A person
takes the better reply, but with probability ``wrong`` the other. What is learned is judged by its cosine to the truth,
from random pairs: by :func:`bradley_terry`, by Drift's closed form, and by a Bayes reference that knows how people and
replies are drawn and how often a choice is wrong, so that nothing does better; and by :func:`bradley_terry` from pairs
chosen out of ``pool`` random ones for what they teach. Of these it is told as well how many suffice to know
as much as random pairs tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmw.evaluation.statistics import cluster_interval
from prefmw.preferences.learning import bradley_terry, closed_form, information

DIMENSIONS = 6
SAMPLES = 100_000
"""Directions that the Bayes reference weighs; at fifteen right choices some thirty of them are left."""


def chooser_rows(people: int, choices: int, wrong: float, seed: int, pool: int = 100) -> list[dict[str, Any]]:
    """Mean cosine to the truth with a 95% interval over people, a row for each way of learning; that of chosen pairs
    has ``enough``, the fewest of them whose mean cosine is that of ``choices`` random ones.
    """
    rng = np.random.default_rng(seed)
    (another,) = rng.spawn(1)  # so that random pairs are the same whatever is chosen
    directions = _on_sphere(rng, SAMPLES)
    cosines: dict[str, list[float]] = {"bradley-terry": [], "closed form": [], "bayes": [], "chosen pairs": []}
    on_the_way = np.zeros(choices)  # the chosen pairs' cosines after each choice, summed over people
    for hidden in _on_sphere(rng, people):
        differences = rng.normal(size=(choices, DIMENSIONS))
        slips = np.where(rng.random(choices) < wrong, -1, 1)
        chosen = differences * (np.sign(differences @ hidden) * slips)[:, None]
        course = [_cosine(found, hidden) for found in _from_chosen_pairs(hidden, slips, pool, another)]
        on_the_way += course
        cosines["bradley-terry"].append(_cosine(bradley_terry(chosen).weights, hidden))
        cosines["closed form"].append(_cosine(closed_form(chosen), hidden))
        cosines["bayes"].append(_cosine(_posterior_mean(chosen, directions, wrong), hidden))
        cosines["chosen pairs"].append(course[-1])
    reached = (on_the_way / people >= np.mean(cosines["bradley-terry"])).nonzero()[0]
    enough = {"chosen pairs": int(reached[0]) + 1 if len(reached) else None}
    return [
        {
            "learner": name,
            "people": people,
            "choices": choices,
            "wrong": wrong,
            "cosine": float(np.mean(values)),
            "ci95": cluster_interval(values, range(people), seed=seed),
            "enough": enough.get(name),
        }
        for name, values in cosines.items()
    ]


def _from_chosen_pairs(
    hidden: NDArray[np.float64], slips: NDArray[np.int64], pool: int, rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """Weights learned after each of as many choices as ``slips``, between the most instructive of ``pool`` pairs."""
    asked = np.zeros((1, DIMENSIONS))  # a comparison of two equal replies says nothing
    known = bradley_terry(asked)
    for slip in slips:
        candidates = rng.normal(size=(pool, DIMENSIONS))
        pair = candidates[information(candidates, known).argmax()]
        asked = np.vstack([asked, pair * np.sign(pair @ hidden) * slip])
        known = bradley_terry(asked)
        yield known.weights


def _cosine(found: NDArray[np.float64], hidden: NDArray[np.float64]) -> float:
    return float(found @ hidden / (np.linalg.norm(found) + 1e-12))


def _posterior_mean(chosen: NDArray[np.float64], directions: NDArray[np.float64], wrong: float) -> NDArray[np.float64]:
    """The mean of the directions, each as likely as it makes the choices; where no direction agrees with all and none
    may be wrong, of those that agree most often.
    """
    misses = (directions @ chosen.T < 0).sum(axis=1)
    misses -= misses.min()
    likelihood = np.power(wrong / (1 - wrong), misses)  # 0 ** 0 is 1
    return np.asarray(likelihood @ directions / likelihood.sum())


def _on_sphere(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    points = rng.normal(size=(count, DIMENSIONS))
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True))
