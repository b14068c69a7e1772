"""PAD: a token-level personalised reward added to a base model's log-probabilities.

Shapes: B rows, V vocabulary of the base, U vocabulary of the PersRM. Source: Chen et al., "PAD: Personalized Alignment
of LLMs at Decoding-Time", Eq. 9-13 and Algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefmw.alignment.checks import check_logits, difference, per_row


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
    return torch.addcmul(z0, per_row(beta, z0, "beta"), difference(z0, z1))


def guided_by(base: Tensor, policy: Tensor, reference: Tensor, beta: Tensor | float) -> Tensor:
    """Scores of the next token where the reward's reference is a model of its own, of the base's vocabulary.

    ::

        score(a) = log p_LM(a) + beta (log p_theta(a; w_p) - log p_ref(a))
                 = z_LM(a) + beta (z_theta(a) - z_ref(a)) + constant of the step

    beta = 0 gives the base model; with the base as reference it is :func:`guided`. The step's constant is left out. A
    column that is -inf in the base stays -inf, one that is -inf in another has no reward.

    Args:
        base: the base model's logits, (B, V).
        policy: the PersRM policy's, (B, V).
        reference: its backbone's, (B, V).
        beta: weight of the reward, per row (B,) or one for all; finite, >= 0.

    Returns:
        Scores, (B, V), float32.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, or a beta is negative or not finite.
    """
    z, z_theta, z_ref = check_logits(base, policy, reference)
    return torch.addcmul(z, per_row(beta, z, "beta"), difference(z_ref, z_theta))


def guided_across(base: Tensor, policy: Tensor, reference: Tensor, beta: Tensor | float, columns: Tensor) -> Tensor:
    """The same where the PersRM reads another vocabulary: each token of the base has the reward of the PersRM's token
    ``columns`` of the same bytes, and none (0) where there is no such token.

    ::

        score(a) = z_LM(a) + beta (log p_theta(c(a); w_p) - log p_ref(c(a))),    or z_LM(a) where there is no c(a)

    Rewards are differences of log-probabilities, not of logits: against 0 the normalisers count.

    Args:
        base: the base model's logits, (B, V).
        policy: the PersRM policy's, (B, U).
        reference: its backbone's, (B, U).
        beta: weight of the reward, per row (B,) or one for all; finite, >= 0.
        columns: c, (V,), int64 in [-1, U), -1 where there is none.

    Returns:
        Scores, (B, V), float32.

    Raises:
        ValueError: shapes differ, a logit is NaN or +inf, or a beta is negative or not finite.
    """
    (z,) = check_logits(base)
    z_theta, z_ref = check_logits(policy, reference)
    if columns.shape != (z.shape[1],):
        raise ValueError(f"expected a column for each of {z.shape[1]} tokens, got {tuple(columns.shape)}")
    rewards = difference(z_ref.log_softmax(1), z_theta.log_softmax(1))  # (B, U)
    found = torch.where(columns >= 0, rewards[:, columns.clamp(min=0)], torch.zeros_like(z))
    return z + per_row(beta, z, "beta") * found
