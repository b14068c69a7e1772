"""Intervals: by hand, against the plain bootstrap's known width, and wider where values hang together."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefmw.evaluation.statistics import cluster_interval


def test_values_of_their_own_give_the_interval_of_a_share():
    values = [1.0] * 60 + [0.0] * 40
    low, high = cluster_interval(values, list(range(100)))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.015)


def test_copies_add_nothing():
    values, clusters = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 1, list("abcdef")
    once = cluster_interval(values, clusters)
    assert cluster_interval(values * 50, clusters * 50) == pytest.approx(once)


def test_all_alike_has_no_width():
    assert cluster_interval([1.0] * 5, list("aabbc")) == (1.0, 1.0)


def test_it_covers_the_truth_as_often_as_it_says():
    """200 samples of 40 clusters of 5 that share their outcome: 95% +- 1.5% would be seen; below 88% has p < 1e-4."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        outcomes = (rng.random(40) < 0.5).astype(float)
        low, high = cluster_interval(list(outcomes.repeat(5)), list(np.arange(40).repeat(5)), seed=trial, resamples=400)
        covered += low <= 0.5 <= high
    assert covered >= 176


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], [])])
def test_nothing_to_resample_is_refused(values, clusters):
    with pytest.raises(ValueError, match="clusters"):
        cluster_interval(values, clusters)
