"""The candidate rule: which tokens may be sampled at all.

A method that adds to logits can lift a token that no sane reading of the context allows. So every method names one
distribution it trusts, the rule's (none z0, prompt and linear z1, drift every weight at its own size), and only that
distribution's nucleus may be sampled.

Shapes: B rows, V vocabulary. Source: the nucleus mask of Linear Alignment's released code (0.8, from the
with-principle distribution); nucleus sampling is Holtzman et al., "The Curious Case of Neural Text Degeneration".
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefmw.alignment.checks import check_logits, per_row


def nucleus(rule: Tensor, top_p: Tensor | float, temperature: Tensor | float = 1.0) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches ``top_p``.

    With p = softmax(rule / temperature) sorted downwards, token i stays while p_1 + ... + p_(i-1) < top_p: the token
    that crosses the bound stays, so at least one does. top_p = 1 keeps every token of non-zero probability.
    Temperature 0 means greedy decoding and counts as 1 here, since the limit would leave one token and undo the
    method.

    Args:
        rule: logits of the trusted distribution, (B, V).
        top_p: mass to keep, in (0, 1], per row (B,) or one for all.
        temperature: of the sampling, >= 0, per row (B,) or one for all.

    Returns:
        True where a token may be sampled, (B, V), bool.

    Raises:
        ValueError: a logit is NaN or +inf, top_p outside (0, 1], or a temperature negative or not finite.
    """
    (rule,) = check_logits(rule)
    mass = per_row(top_p, rule, "top_p").squeeze(1)
    if not bool(((mass > 0) & (mass <= 1)).all()):
        raise ValueError(f"top_p lies in (0, 1], got {mass.tolist()}")
    heat = per_row(temperature, rule, "temperature").squeeze(1)
    order, keep, _ = ranked_nucleus(rule, mass, heat, among=rule.shape[1])
    return torch.zeros_like(rule, dtype=torch.bool).scatter(1, order, keep)


def ranked_nucleus(rule: Tensor, top_p: Tensor, temperature: Tensor, *, among: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nucleus as far as the first ``among`` tokens by rank hold it: what a decoder needs, at a fraction of the
    price of sorting a whole vocabulary. Ties go to the lower token id.

    Args:
        rule: logits of the trusted distribution, (B, V), float32; NaN is not looked for.
        top_p: mass to keep, (B,), in (0, 1].
        temperature: of the sampling, (B,), >= 0; 0 counts as 1.
        among: C, tokens by rank to look at, cut to V.

    Returns:
        Token ids by rank (B, C); True where the nucleus holds them (B, C), some first ones of each row; and how many of
        each row's first tokens no token that was left out ties with, (B,). A nucleus of at most that many is whole.
    """
    heated = rule / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    total = heated.logsumexp(dim=1, keepdim=True)
    if among < rule.shape[1]:
        order = heated.topk(among, dim=1).indices.sort(dim=1).values
        ranked, places = heated.gather(1, order).sort(dim=1, descending=True, stable=True)
        order = order.gather(1, places)
    else:
        ranked, order = heated.sort(dim=1, descending=True, stable=True)
    # A running sum in float64, where the device has it: float32 rounds away the small terms of a large vocabulary.
    wide = torch.float32 if rule.device.type == "mps" else torch.float64
    mass = (ranked - total).exp().to(wide)
    before = mass.cumsum(dim=1) - mass
    keep = ((before < top_p.unsqueeze(1)) | (top_p == 1).unsqueeze(1)) & (mass > 0)
    keep[:, 0] = True
    alone = ranked > ranked[:, -1:] if among < rule.shape[1] else torch.ones_like(keep)
    return order, keep, alone.sum(dim=1)


def top_k(rule: Tensor, k: int) -> Tensor:
    """The ``k`` most likely tokens, True where a token may be sampled, (B, V); ties go to the lower token id.

    Raises:
        ValueError: a logit is NaN or +inf, or k < 1.
    """
    (rule,) = check_logits(rule)
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}")
    order = rule.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(rule, dtype=torch.bool).scatter(1, order, True)


def restrict(logits: Tensor, rule: Tensor, keep: Tensor) -> Tensor:
    """``logits`` where ``keep`` holds, -inf elsewhere; a row left with no finite logit falls back to the rule's own.

    Args:
        logits: aligned logits, (B, V).
        rule: logits of the trusted distribution, (B, V).
        keep: what may be sampled, (B, V), bool, at least one a row.

    Returns:
        Logits with at least one finite entry a row, (B, V), float32.

    Raises:
        ValueError: shapes differ, or a logit is NaN or +inf.
    """
    logits, rule = check_logits(logits, rule)
    outside = torch.full_like(logits, -torch.inf)
    bounded = torch.where(keep, logits, outside)
    underflow = bounded.isneginf().all(dim=1, keepdim=True)
    return torch.where(underflow, torch.where(keep, rule, outside), bounded)


def redistributed(logits: Tensor, rule: Tensor, keep: Tensor) -> Tensor:
    """What a method makes of its rule's distribution, before anything is cut off: candidates share among them the mass
    that the rule gives them together, as the method has it, and every other token keeps what the rule gives it.

    ::

        p(a) = P_rule(C) softmax(z)_C(a)    for a in the candidates C
        p(a) = P_rule(a)                    elsewhere

    It is a distribution, finite in log wherever the rule is, and the rule's own where the method changes nothing: so it
    tells what a method does apart from what any cutting off does.

    Args:
        logits: z, aligned logits, (B, V).
        rule: logits of the trusted distribution, (B, V).
        keep: C, the candidates, (B, V), bool, at least one a row.

    Returns:
        Log-probabilities, nats, (B, V), float32.

    Raises:
        ValueError: shapes differ, or a logit is NaN or +inf.
    """
    among = restrict(logits, rule, keep).log_softmax(dim=1)
    trusted = rule.float().log_softmax(dim=1)
    mass = torch.where(keep, trusted, torch.full_like(trusted, -torch.inf)).logsumexp(dim=1, keepdim=True)
    return torch.where(keep, mass + among, trusted)
