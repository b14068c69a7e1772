"""Weights learned from choices: a penalised Bradley-Terry model of the replies' attribute scores.

N comparisons, K attributes. Who chooses reply a over b says something of how much they care for each attribute in which
the two differ. Knows no store and no model: scores go in, weights with intervals come out.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefmw.errors import UsageError

PENALTY = 1.0
"""Weight of the penalty, the precision of a normal prior around no preference. At 1 a few dozen answers suffice and a
fifth of wrong ones does little harm (``tests/preferences/test_learning.py`` measures both)."""

LEVEL = 0.9
"""Probability that an interval holds."""


class Learned(NamedTuple):
    """Weights (K,) in [-1, 1], the ends of their intervals (K,), and the probability (K,) that a sign is right; before
    they were scaled, the weights' ``mean`` (K,) and ``covariance`` (K, K).
    """

    weights: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    confidence: NDArray[np.float64]
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def bradley_terry(differences: ArrayLike, *, penalty: float = PENALTY) -> Learned:
    """The weights that make the choices likely.

    P(a chosen over b) = sigmoid(w . x), x the chosen reply's scores less the other's::

        w = argmin  sum_n log(1 + exp(-w . x_n)) + penalty / 2 ||w||^2

    by Newton's method from zero; the objective is strictly convex, so there is one answer and no seed. Stored weights
    lie in [-1, 1]: w / max(1, max_k |w_k|), which keeps the direction. Intervals are Laplace's,
    w_k +- z sqrt((H^-1)_kk), on the same scale and cut at -1 and 1.

    No comparison gives zeros with the widest intervals; an attribute in which replies never differ stays at zero.

    Args:
        differences: (N, K), none beyond 1e6 in size, in units in which a typical difference is about 1 (divide scores
            by their standard deviation over replies).
        penalty: above 0.

    Raises:
        UsageError: another shape, a number beyond 1e6 or NaN, or a penalty of 0 or less.

    Source: Bradley and Terry, Rank Analysis of Incomplete Block Designs (1952); the published closed form for weights
    from choices is Drift's, p = (W - L) / ||W - L||_2.
    """
    try:
        x = np.asarray(differences, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError("expected comparisons of shape (N, K), got rows of several lengths or no numbers") from error
    if x.ndim != 2 or not x.shape[1] or not (np.abs(x) <= 1e6).all():
        raise UsageError(f"expected comparisons of shape (N, K), K from 1, none beyond 1e6, got shape {x.shape}")
    if not penalty > 0:
        raise UsageError(f"a penalty is above 0, got {penalty:g}")
    attributes = x.shape[1]
    w = np.zeros(attributes)
    hessian = penalty * np.eye(attributes)
    for _ in range(100):
        wrong = _sigmoid(-x @ w)  # (N,), the probability of the opposite choice
        gradient = penalty * w - x.T @ wrong
        hessian = penalty * np.eye(attributes) + (x * (wrong * (1 - wrong))[:, None]).T @ x
        step = np.linalg.solve(hessian, gradient)
        w -= step * min(1.0, 2.0 / (np.abs(step).max() + 1e-12))  # a full step may overshoot where nothing is curved
        if np.abs(step).max() < 1e-10:
            break
    covariance = np.asarray(np.linalg.inv(hessian), dtype=np.float64)
    deviation = np.asarray(np.sqrt(np.diag(covariance)), dtype=np.float64)
    scale = max(1.0, float(np.abs(w).max(initial=0.0)))
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * deviation
    low, high = (np.clip((w + sign * half) / scale, -1, 1) for sign in (-1, 1))
    confidence = np.array([NormalDist().cdf(abs(z)) for z in w / deviation])
    return Learned(w / scale, low, high, confidence, w, covariance)


def closed_form(differences: ArrayLike) -> NDArray[np.float64]:
    """Drift's published weights: the unit vector p = (W - L) / ||W - L||_2, where W sums the scores of what was chosen
    and L those of what was not, so that large differences count for more. Zeros where the sums are equal.
    """
    total = np.asarray(differences, dtype=np.float64).sum(axis=0)
    norm = float(np.linalg.norm(total))
    return np.asarray(total / norm if norm else total)


def left_out_accuracy(differences: ArrayLike, *, penalty: float = PENALTY) -> float:
    """The share of choices that weights learned from all the others predict; undecided ones count half."""
    x = np.asarray(differences, dtype=np.float64)
    margins = [bradley_terry(np.delete(x, one, axis=0), penalty=penalty).mean @ x[one] for one in range(len(x))]
    return float(np.mean([0.5 * (1 + np.sign(margin)) for margin in margins]))


def information(candidates: ArrayLike, learned: Learned) -> NDArray[np.float64]:
    """How much each comparison would teach, (N,), in nats: what its answer and the weights tell of each other.

    The answer's entropy, less the entropy that would be left if the weights were known::

        I(x) = h(E p) - E h(p),    p = sigmoid(w . x),    w ~ N(mean, covariance)

    so a comparison is worth asking where the weights leave its answer open and the replies would settle it; the
    integrals over w . x by Gauss-Hermite quadrature.

    Args:
        candidates: (N, K) differences, in the units of :func:`bradley_terry`.
        learned: what is known so far.

    Source: Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning" (2011), Eq. 2.
    """
    x = np.asarray(candidates, dtype=np.float64)
    points, shares = np.polynomial.hermite_e.hermegauss(21)
    shares = shares / shares.sum()
    spread = np.sqrt(np.einsum("nk,kl,nl->n", x, learned.covariance, x))
    p = _sigmoid((x @ learned.mean)[:, None] + spread[:, None] * points)  # (N, 21)
    return np.asarray(_entropy(p @ shares) - _entropy(p) @ shares)


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return np.asarray(-p * np.log(p) - (1 - p) * np.log(1 - p))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
