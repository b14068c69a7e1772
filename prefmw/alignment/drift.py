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


def dials(base: Tensor, poles: Sequence[Tensor], weights: Tensor, gains: Tensor | None = None) -> Tensor:
    """How far the weights move the logits, before any gain of all together.

    ::

        d = sum_k g_k |w_k| (z_k - z0) / max(1, ||w||_2)

    One weight of size 1 gives z1 - z0 of preference prompting with that pole alone; a weight of 0 has no effect, and
    the effect is continuous through 0, where the pole read changes sides. Several large weights share one step: their
    bound is the unit ball, in which stored weights below it keep their size.

    Args:
        base: z0, logits without any pole, (B, V).
        poles: z_k, logits with each pole, K of (B, V).
        weights: their sizes |w_k|, (B, K), >= 0.
        gains: g_k, a pole's own on this model, (B, K), >= 0; 1 by default. They are no part of the bound.

    Returns:
        d, (B, V), float32; 0 in columns that are -inf in either reading.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, or a weight or gain is negative or not finite.

    Source: Drift's (1/beta) sum_k p_k (h_k - h_base), with these departures (docs/architecture.md, 5-7): the model is
    its own guide, h_k reads the pole's sentence instead of naming an attribute of the assistant, and p is the stored
    weights bounded by the unit ball instead of a unit vector; a pole's gain stands for what the paper's beta is to all.
    """
    z0, directions = _directions(base, poles)
    return _moved(z0, directions, _shares(weights, gains, (len(z0), len(directions))))


def dials_and_rule(
    base: Tensor, poles: Sequence[Tensor], weights: Tensor, gains: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`dials`, and how far the trusted distribution moves: sum_k min(1, gain g_k |w_k|) (z_k - z0), every weight
    as far as its gains take it, but none beyond its pole's reading. ``gain``, (B, 1), is that of all weights.
    """
    z0, directions = _directions(base, poles)
    moved = _moved(z0, directions, _shares(weights, gains, (len(z0), len(directions))))
    return moved, _moved(z0, directions, (gain * gains * weights).float().clamp(max=1.0))


def _directions(base: Tensor, poles: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    z0, *z = check_logits(base, *poles)
    return z0, [difference(z0, pole) for pole in z]


def _shares(weights: Tensor, gains: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """g_k |w_k| / max(1, ||w||_2), (B, K)."""
    gains = torch.ones_like(weights) if gains is None else gains
    for name, sizes in (("weights", weights), ("gains", gains)):
        if sizes.shape != shape:
            raise ValueError(f"{name} are (rows, dials) = {shape}, got shape {tuple(sizes.shape)}")
        if not bool((sizes.isfinite() & (sizes >= 0)).all()):
            raise ValueError(f"the sizes of {name} are finite and at least 0, got {sizes.tolist()}")
    bound: Tensor = weights.float().norm(dim=1, keepdim=True).clamp(min=1.0)
    return gains.float() * weights.float() / bound


def _moved(z0: Tensor, directions: Sequence[Tensor], shares: Tensor) -> Tensor:
    moved = torch.zeros_like(z0)
    for share, direction in zip(shares.unbind(1), directions, strict=True):
        moved.addcmul_(share.unsqueeze(1), direction)
    return moved
