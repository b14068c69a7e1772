"""Combiners: how a method turns its views' logits into the logits to sample from.

A combiner takes the logits of all views of B requests that share it, and a strength for each request, so that many
users with different strengths are combined by one call. It returns what to sample from and the rule's distribution,
whose nucleus bounds the sampling (:mod:`prefmw.alignment.candidates`).

Shapes: B requests, K views, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from prefmw.alignment.linear import scaled


class Combined(NamedTuple):
    """Aligned logits (B, V), and the logits of the trusted distribution whose nucleus bounds them (B, V)."""

    logits: Tensor
    rule: Tensor


Combiner = Callable[[Tensor, Tensor], Combined]
"""(views' logits (B, K, V), strengths (B,)) -> Combined."""


def combine_plain(views: Tensor, strength: Tensor) -> Combined:
    """One view, sampled as it is: methods ``none`` (without the principle) and ``prompt`` (with it)."""
    (logits,) = _views(views, 1)
    return Combined(logits, logits)


def combine_linear(views: Tensor, strength: Tensor) -> Combined:
    """Linear Alignment's released form over the views (without, with); the rule is the view with the principle."""
    without, with_principle = _views(views, 2)
    return Combined(scaled(without, with_principle, ratio=strength), with_principle)


def _views(views: Tensor, count: int) -> list[Tensor]:
    """The views' logits apart, each (B, V)."""
    if views.ndim != 3 or views.shape[1] != count:
        raise ValueError(f"expected logits (requests, {count} views, vocabulary), got shape {tuple(views.shape)}")
    return list(views.unbind(dim=1))
