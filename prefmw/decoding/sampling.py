"""The next tokens of many requests at once: bound by the candidate rule, tempered, each drawn with its own number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefmw.alignment import Combined, ranked_nucleus
from prefmw.decoding.request import Sampling
from prefmw.errors import EngineError

LIKELY = 256
"""Tokens by rank that are looked at first: few a nucleus holds more."""


class Bounds(NamedTuple):
    """The sampling of B requests, (B,) each; a ``top_k`` of 0 stands for no bound."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> Bounds:
        """As tensors."""
        return cls(
            torch.tensor([sampling.temperature for sampling in samplings], dtype=torch.float32),
            torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64),
            torch.tensor([sampling.top_k or 0 for sampling in samplings]),
        )


def draw(combined: Combined, bounds: Bounds, uniforms: Tensor) -> list[int]:
    """The next token of each of B requests.

    The candidates are ranked by the rule, and from there on the work is the CPU's, whatever the logits' device: the
    same seed gives the same reply everywhere. The token is the first whose running probability under the aligned logits
    exceeds the request's number, or the likeliest where the temperature is 0. Nothing depends on the other rows.

    Args:
        combined: aligned and rule logits, each (B, V).
        bounds: temperature and bounds, (B,) each.
        uniforms: one number in [0, 1) a request, (B,), float64.

    Raises:
        EngineError: a combiner gave NaN or +inf, or excluded everything.
    """
    tokens, whole = _among(LIKELY, combined, bounds, uniforms)
    if not bool(whole.all()):
        rest = (~whole).nonzero().squeeze(1)
        on = rest.to(combined.rule.device)
        part = Combined(combined.logits[on], combined.rule[on])
        those = Bounds(*(bound[rest] for bound in bounds))
        tokens[rest] = _among(combined.rule.shape[1], part, those, uniforms[rest])[0]
    drawn: list[int] = tokens.tolist()
    return drawn


def _among(count: int, combined: Combined, bounds: Bounds, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens drawn from the rule's first ``count`` by rank, (B,), and whether those hold all candidates of a row."""
    temperature, top_p, top_k = bounds
    device = combined.rule.device
    order, keep, alone = ranked_nucleus(combined.rule, top_p.to(device), temperature.to(device), among=count)  # (B, C)
    rule, aligned = combined.rule.gather(1, order).cpu(), combined.logits.gather(1, order).cpu()
    order, keep, alone = order.cpu(), keep.cpu(), alone.cpu()
    ranks = torch.arange(order.shape[1])
    keep &= (top_k == 0).unsqueeze(1) | (ranks < top_k.unsqueeze(1))
    bounded = aligned.masked_fill(~keep, -torch.inf)
    fallen = bounded.isneginf().all(dim=1, keepdim=True)  # underflow: the rule's own distribution
    bounded = torch.where(fallen, rule.masked_fill(~keep, -torch.inf), bounded)
    heat = torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    running = (bounded / heat).softmax(dim=1, dtype=torch.float64).cumsum(dim=1)
    drawn = (running <= uniforms.unsqueeze(1) * running[:, -1:]).sum(dim=1)
    last = (keep & ~bounded.isneginf()).int().mul(ranks + 1).amax(dim=1) - 1
    place = torch.where(temperature == 0, bounded.argmax(dim=1), torch.minimum(drawn, last))
    broken = (bounded.isnan() | bounded.isposinf() | rule.isnan() | rule.isposinf()).any(dim=1)
    if bool((broken | bounded.isneginf().all(dim=1)).any()):
        raise EngineError("the combined logits hold NaN or infinity, or exclude every token")
    return order.gather(1, place.unsqueeze(1)).squeeze(1), keep.sum(dim=1) <= alone
