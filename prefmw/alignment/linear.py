"""Linear Alignment: amplify what a principle changes in the next-token logits.

The model reads the conversation twice, once without the principle (z0) and once with it (z1). The difference d = z1 -
z0 estimates the gradient of the preference's value function (Eq. 17-18); the aligned logits are one step along it.

Shapes: B rows, V vocabulary. All combination is in float32. Source: Gao et al., "Linear Alignment: A Closed-form
Solution for Aligning Human Preferences without Tuning and Feedback", Eq. 16-18 and Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefmw.alignment.checks import check_logits, difference, per_row


def scaled(without: Tensor, with_principle: Tensor, ratio: Tensor | float) -> Tensor:
    """Aligned logits as the authors' released code computes them.

    ::

        z = z1 + ratio * (z1 - z0)

    ratio = 0 gives z1: inference *with* the principle, that is preference prompting. (The paper's Appendix A calls step
    0 of :func:`normalized` normal inference, which is z0: the two forms start from different ends.) ratio -> infinity
    gives the argmax of the difference. A column that is -inf in z1 stays -inf.

    Args:
        without: z0, logits without the principle, (B, V).
        with_principle: z1, logits with it, (B, V).
        ratio: step size, one per row (B,) or one for all; finite, >= 0. The released scripts use 2, 3 and 5.

    Returns:
        Aligned logits, (B, V), float32.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, or a ratio is negative or not finite.

    Source: Eq. 16 without its norm and from z1 rather than z0, as in the released code (departures 1 and 2 in
    docs/architecture.md).
    """
    z0, z1 = check_logits(without, with_principle)
    step = per_row(ratio, z1, "ratio")
    return torch.addcmul(z1, step, difference(z0, z1))


def normalized(without: Tensor, with_principle: Tensor, step: Tensor | float, vocabulary: int | None = None) -> Tensor:
    """Aligned logits as Eq. 16 prints them: a step of fixed length along the normalised difference.

    ::

        z = z0 + step * d / ||d||_2,    d = z1 - z0

    step = 0 gives z0, the plain model; step = ||d||_2 gives z1. Where d = 0 there is no direction, and z = z0.

    Args:
        without: z0, logits without the principle, (B, V).
        with_principle: z1, logits with it, (B, V).
        step: length of the step in logits (L2 over the vocabulary), per row (B,) or one for all; finite, >= 0.
        vocabulary: columns that are real tokens; the padded ones behind them stay out of the norm. All by default.

    Returns:
        Aligned logits, (B, V), float32.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, a step is negative or not finite, or ``vocabulary`` is not in
            1..V.

    Source: Eq. 16, Algorithm 1 steps 5-7.
    """
    z0, z1 = check_logits(without, with_principle)
    length = per_row(step, z1, "step")
    columns = z0.shape[1] if vocabulary is None else vocabulary
    if not 1 <= columns <= z0.shape[1]:
        raise ValueError(f"vocabulary lies in 1..{z0.shape[1]}, the logits' columns, got {columns}")
    d = difference(z0, z1)
    largest = d[:, :columns].abs().amax(dim=1, keepdim=True)
    d = d / torch.where(largest > 0, largest, 1.0)  # first, since squares of small numbers are 0
    norm = d[:, :columns].norm(dim=1, keepdim=True)
    unit = torch.where(norm > 0, d / norm, torch.zeros_like(d))
    return torch.where(z1.isneginf(), z1, z0 + length * unit)
