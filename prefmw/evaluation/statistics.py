"""Intervals for shares of replies. Many replies ask for the same preference, so preferences are what is resampled."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000


def cluster_interval(
    values: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """A 95% percentile interval of the mean of ``values`` by the cluster bootstrap.

    Whole clusters are drawn with replacement, as many as there are, and the mean of all their values taken. Where no
    two values share a cluster this is the ordinary bootstrap; where they do, the interval is as wide as the number of
    clusters, not of values, warrants.

    Args:
        values: one a reply: 0 or 1 for a share, a difference for a paired comparison.
        clusters: what each value belongs to, its preference's wording say.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: there are no values, or not one cluster for each.

    Source: Field & Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007), the cluster bootstrap.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"expected values and as many clusters, got {len(values)} and {len(clusters)}")
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    owner = np.array([names[name] for name in clusters])
    sums = np.bincount(owner, weights=np.asarray(values, dtype=float))
    counts = np.bincount(owner).astype(float)
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
