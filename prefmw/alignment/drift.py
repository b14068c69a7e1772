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


def dials(base: Tensor, poles: Sequence[Tensor], weights: Tensor) -> Tensor:
    """How far the weights move the logits, before any gain.

    ::

        d = sum_k |w_k| (z_k - z0) / max(1, ||w||_2)

    One weight of size 1 gives z1 - z0 of preference prompting with that pole alone; a weight of 0 has no effect, and
    the effect is continuous through 0, where the pole read changes sides. Several large weights share one step: their
    bound is the unit ball, in which stored weights below it keep their size.

    Args:
        base: z0, logits without any pole, (B, V).
        poles: z_k, logits with each pole, K of (B, V).
        weights: their sizes |w_k|, (B, K), >= 0.

    Returns:
        d, (B, V), float32; 0 in columns that are -inf in either reading.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, or a weight is negative or not finite.

    Source: Drift's (1/beta) sum_k p_k (h_k - h_base), with these departures (docs/architecture.md, 5-7): the model is
    its own guide, h_k reads the pole's sentence instead of naming an attribute of the assistant, and p is the stored
    weights bounded by the unit ball instead of a unit vector.
    """
    z0, *z = check_logits(base, *poles)
    if weights.shape != (z0.shape[0], len(z)):
        raise ValueError(f"weights are (rows, dials) = {(z0.shape[0], len(z))}, got shape {tuple(weights.shape)}")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"the sizes of weights are finite and at least 0, got {weights.tolist()}")
    shares = weights.float() / weights.float().norm(dim=1, keepdim=True).clamp(min=1.0)  # (B, K)
    moved = torch.zeros_like(z0)
    for share, pole in zip(shares.unbind(1), z, strict=True):
        moved += share.unsqueeze(1) * difference(z0, pole)
    return moved
