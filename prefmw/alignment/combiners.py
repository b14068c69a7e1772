"""Combiners: how a method turns its views' logits into the logits to sample from.

A combiner takes, view by view, the logits of B requests that share it, and each request's own parameters (its strength,
say), so that many users with different ones are combined by one call. It returns what to sample from and the rule's
distribution, whose nucleus bounds the sampling (:mod:`prefmw.alignment.candidates`).

Shapes: B requests, K views, V vocabulary, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefmw.alignment.drift import dials_and_rule
from prefmw.alignment.linear import scaled
from prefmw.alignment.pad import guided, guided_across, guided_by


class Combined(NamedTuple):
    """Aligned logits (B, V), and the logits of the trusted distribution whose nucleus bounds them (B, V)."""

    logits: Tensor
    rule: Tensor


Combiner = Callable[[Sequence[Tensor], Tensor], Combined]
"""(K views' logits, (B, V) each, parameters (B, P)) -> Combined. A view of another vocabulary has its own V."""


def combine_plain(views: Sequence[Tensor], parameters: Tensor) -> Combined:
    """One view and no parameter, sampled as it is: methods ``none`` and ``prompt``."""
    (logits,) = _views(views, 1)
    return Combined(logits, logits)


def combine_linear(views: Sequence[Tensor], parameters: Tensor) -> Combined:
    """Linear Alignment's released form over the views (without, with), its one parameter the ratio.

    The rule is the view with the principle.
    """
    without, with_principle = _views(views, 2)
    return Combined(scaled(without, with_principle, ratio=parameters[:, 0]), with_principle)


def combine_drift(views: Sequence[Tensor], parameters: Tensor) -> Combined:
    """Dials over the views (base, pole 1 .. pole K); parameters are the gain of all, the K weights' sizes, and how
    far half a weight goes towards each of their poles.

    The rule is the base moved by every weight as far as it goes alone, but not beyond its pole's reading, the unit ball
    undone: what several large weights ask for would fall out of the nucleus of the step that they share.
    """
    base, *poles = _views(views, 1 + (parameters.shape[1] - 1) // 2)
    gain, weights, midpoints = parameters[:, :1], parameters[:, 1 : 1 + len(poles)], parameters[:, 1 + len(poles) :]
    moved, trusted = dials_and_rule(base, poles, weights, midpoints, gain)
    return Combined(torch.addcmul(base, gain, moved), base + trusted)


def combine_pad(views: Sequence[Tensor], parameters: Tensor) -> Combined:
    """PAD over the views (base, policy) of one backbone, its one parameter beta. The rule is the base."""
    base, policy = _views(views, 2)
    return Combined(guided(base, policy, beta=parameters[:, 0]), base)


def combine_pad_by(views: Sequence[Tensor], parameters: Tensor) -> Combined:
    """PAD over the views (base, policy, reference) of one vocabulary, its one parameter beta. The rule is the base."""
    base, policy, reference = _views(views, 3)
    return Combined(guided_by(base, policy, reference, beta=parameters[:, 0]), base)


class CombinePadAcross:
    """PAD over the views (base, policy, reference), the latter two of another vocabulary; ``columns`` are its tokens by
    the base's, (V,), -1 for none. One object serves all requests, which are grouped by it.
    """

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns

    def __call__(self, views: Sequence[Tensor], parameters: Tensor) -> Combined:
        """The parameter is beta. The rule is the base."""
        base, policy, reference = _views(views, 3)
        self._columns = self._columns.to(base.device)
        return Combined(guided_across(base, policy, reference, parameters[:, 0], self._columns), base)


def _views(views: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    if len(views) != count:
        raise ValueError(f"expected the logits of {count} views, got {len(views)}")
    return views
