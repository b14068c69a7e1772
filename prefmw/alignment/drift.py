"""Drift-style dials: every stored weight moves the next-token logits by itself.

The model reads the conversation once plainly (z0) and once more for each weight, with the sentence of the pole that the
weight leans to (z_k). Each difference z_k - z0 is a direction, the weights say how far to go along each.

Shapes: B rows, K dials, V vocabulary. All combination is in float32. Source: "Drift: Decoding-time
Personalized Alignments with Implicit User Preferences", its composition of attribute differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefmw.alignment.checks import check_logits, difference


def dials(base: Tensor, poles: Sequence[Tensor], weights: Tensor, midpoints: Tensor | None = None) -> Tensor:
    """How far the weights move the logits, before any gain of all together.

    ::

        d = sum_k s(|w_k| / max(1, ||w||_2); m_k) (z_k - z0),    s as in :func:`shares`

    One weight of size 1 gives z1 - z0 of preference prompting with that pole alone, half a weight m_k of it; a weight
    of 0 has no effect, and the effect is continuous through 0, where the pole read changes sides. Several large weights
    are first scaled into the unit ball, and each then goes as far as one of that size does alone; with m_k above 1/2
    the shares together may leave the ball.

    Args:
        base: z0, logits without any pole, (B, V).
        poles: z_k, logits with each pole, K of (B, V).
        weights: their sizes |w_k|, (B, K), >= 0.
        midpoints: m_k, how far half a weight goes towards a pole on this model, (B, K), in (0, 1); 0.5 by default, at
            which s(w) = w.

    Returns:
        d, (B, V), float32; 0 in columns that are -inf in either reading.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, a weight is negative or not finite, or a midpoint is not
            between 0 and 1.

    Source: Drift's (1/beta) sum_k p_k (h_k - h_base), with these departures (docs/architecture.md, 5-7): the model is
    its own guide, h_k reads the pole's sentence instead of naming an attribute of the assistant, and p is the stored
    weights bounded by the unit ball instead of a unit vector, on a scale of each pole's own.
    """
    z0, directions = _directions(base, poles)
    midpoints = _given(midpoints, weights, z0, directions)
    return _moved(z0, directions, shares(_bounded(weights), midpoints))


def dials_and_rule(
    base: Tensor, poles: Sequence[Tensor], weights: Tensor, midpoints: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`dials`, and how far the trusted distribution moves: sum_k min(1, gain s(min(1, |w_k|); m_k))
    (z_k - z0), every weight as far as it goes alone, but none beyond its pole's reading. ``gain``, (B, 1), is that of
    all weights.
    """
    z0, directions = _directions(base, poles)
    midpoints = _given(midpoints, weights, z0, directions)
    moved = _moved(z0, directions, shares(_bounded(weights), midpoints))
    alone = gain.float() * shares(weights.float().clamp(max=1.0), midpoints)
    return moved, _moved(z0, directions, alone.clamp(max=1.0))


def shares(weights: Tensor, midpoints: Tensor) -> Tensor:
    """How far weights w go towards their poles' readings::

        s(w; m) = m w / (m w + (1 - m) (1 - w))

    The odds of w times the odds of m: 0 at 0, m at 1/2, 1 at 1, and rising strictly in between; m = 1/2 gives w itself.
    Models differ in how much of a sentence's effect is there half way to its reading; with m as measured, half a weight
    does half of it.

    Args:
        weights: in [0, 1], any shape.
        midpoints: m, in (0, 1), of the same shape.

    Returns:
        In [0, 1], of the same shape.

    Source: prefmw's own; m by :mod:`prefmw.evaluation.calibrate`.
    """
    towards = midpoints * weights
    return towards / (towards + (1 - midpoints) * (1 - weights))


def _directions(base: Tensor, poles: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    z0, *z = check_logits(base, *poles)
    return z0, [difference(z0, pole) for pole in z]


def _given(midpoints: Tensor | None, weights: Tensor, z0: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """The midpoints, (B, K), after a look at them and the weights."""
    midpoints = torch.full_like(weights, 0.5) if midpoints is None else midpoints
    shape = (len(z0), len(directions))
    for name, sizes in (("weights", weights), ("midpoints", midpoints)):
        if sizes.shape != shape:
            raise ValueError(f"{name} are (rows, dials) = {shape}, got shape {tuple(sizes.shape)}")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"the sizes of weights are finite and at least 0, got {weights.tolist()}")
    if not bool(((midpoints > 0) & (midpoints < 1)).all()):
        raise ValueError(f"midpoints lie between 0 and 1, got {midpoints.tolist()}")
    return midpoints.float()


def _bounded(weights: Tensor) -> Tensor:
    """|w_k| / max(1, ||w||_2), (B, K)."""
    bound: Tensor = weights.float().norm(dim=1, keepdim=True).clamp(min=1.0)
    return weights.float() / bound


def _moved(z0: Tensor, directions: Sequence[Tensor], sizes: Tensor) -> Tensor:
    moved = torch.zeros_like(z0)
    for size, direction in zip(sizes.unbind(1), directions, strict=True):
        moved.addcmul_(size.unsqueeze(1), direction)
    return moved
