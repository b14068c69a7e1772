"""PAD: a token-level personalised reward added to a base model's log-probabilities.

Shapes: B rows, V vocabulary. Source: Chen et al., "PAD: Personalized Alignment of LLMs at Decoding-Time", Eq. 9-13 and
Algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefmw.alignment.checks import check_logits, per_row


def guided(base: Tensor, policy: Tensor, beta: Tensor | float) -> Tensor:
    """Scores of the next token where the base model is also the reward's reference.

    ::

        score(a) = log p_LM(a) + beta (log p_theta(a; w_p) - log p_ref(a)),    p_ref = p_LM
                 = (1 - beta) z_LM(a) + beta z_theta(a) + constant of the step

    beta = 0 gives the base model, beta = 1 the personalised policy within the base's candidates. The step's constant
    (the normalisers) changes no choice among candidates and is left out. A column that is -inf in the base stays -inf.

    Args:
        base: the base model's logits, (B, V).
        policy: the PersRM policy's, its hidden state weighted by w_p, (B, V).
        beta: weight of the reward, per row (B,) or one for all; finite, >= 0.

    Returns:
        Scores, (B, V), float32.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, or a beta is negative or not finite.
    """
    z0, z1 = check_logits(base, policy)
    weight = per_row(beta, z0, "beta")
    known = z0.isneginf() | z1.isneginf()
    return torch.where(known, z0, z0 + weight * torch.where(known, torch.zeros_like(z0), z1 - z0))
