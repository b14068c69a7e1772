"""Combiners: how a method turns its views' logits into the logits to sample from.

A combiner takes the logits of all views of B requests that share it, and each request's own parameters (its strength,
say), so that many users with different ones are combined by one call. It returns what to sample from and the rule's
distribution, whose nucleus bounds the sampling (:mod:`prefmw.alignment.candidates`).

Shapes: B requests, K views, V vocabulary, P parameters.
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
"""(views' logits (B, K, V), parameters (B, P)) -> Combined."""


def combine_plain(views: Tensor, parameters: Tensor) -> Combined:
    """One view and no parameter, sampled as it is: methods ``none`` and ``prompt``."""
    (logits,) = _views(views, 1)
    return Combined(logits, logits)


def combine_linear(views: Tensor, parameters: Tensor) -> Combined:
    """Linear Alignment's released form over the views (without, with), its one parameter the ratio.

    The rule is the view with the principle.
    """
    without, with_principle = _views(views, 2)
    return Combined(scaled(without, with_principle, ratio=parameters[:, 0]), with_principle)


def _views(views: Tensor, count: int) -> list[Tensor]:
    """The views' logits apart, each (B, V)."""
    if views.ndim != 3 or views.shape[1] != count:
        raise ValueError(f"expected logits (requests, {count} views, vocabulary), got shape {tuple(views.shape)}")
    return list(views.unbind(dim=1))
