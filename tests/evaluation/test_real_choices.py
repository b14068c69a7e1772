"""Choices between real replies: what is learned predicts others, as far as the scores know what people choose by."""

from __future__ import annotations

import numpy as np
import pytest

from prefmw.evaluation.real_choices import REPLIES, Pairs, accuracy_rows, real_pairs
from prefmw.preferences import default_dimensions
from prefmw.scoring import Scale, scored_dimensions
from prefmw.training.styles import AXES


def drawn(seed: int, count: int = 240, noise: float | None = 0.0) -> Pairs:
    """Differences whose scores are the measures with noise, or with nothing of them."""
    rng = np.random.default_rng(seed)
    measures = rng.normal(size=(count, len(AXES)))
    other = rng.normal(size=(count, len(AXES)))
    return Pairs(measures, other if noise is None else measures + noise * other)


def accuracies(asked: Pairs, judged: Pairs) -> dict[tuple[str, int], float]:
    return {(row["learner"], row["choices"]): row["accuracy"] for row in accuracy_rows(asked, judged, people=40)}


def test_scores_that_are_the_measures_predict_like_them_and_better_with_more():
    found = accuracies(drawn(0), drawn(1))
    for count in (10, 30, 50):
        assert found["random pairs", count] == found["own measures", count]
    assert found["random pairs", 10] < found["random pairs", 30] < found["random pairs", 50]
    assert found["chosen pairs", 10] > found["random pairs", 10]
    assert found["chosen pairs", 50] > 0.95


def test_scores_that_know_nothing_predict_nothing():
    found = accuracies(drawn(0, noise=None), drawn(1, noise=None))
    assert found["random pairs", 50] == pytest.approx(0.5, abs=0.05)
    assert found["own measures", 50] > 0.9


def test_pairs_to_judge_by_are_of_other_questions(backend):
    keys = scored_dimensions(default_dimensions())
    scale = Scale(keys, (0.0,) * len(keys), (1.0,) * len(keys))
    asked, judged = real_pairs("dev", 3, backend, default_dimensions(), scale)
    pairs = REPLIES * (REPLIES - 1) // 2
    assert asked.measures.shape == (2 * pairs, len(AXES))
    assert judged.scores.shape == (pairs, len(keys))
