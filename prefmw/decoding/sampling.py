"""The next tokens of many requests at once: bound by the candidate rule, tempered, each drawn with its own number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefmw.alignment import Combined, ranked_nucleus
from prefmw.decoding.request import Sampling
from prefmw.errors import EngineError

LIKELY = 256
"""Tokens by rank that are looked at first: few a nucleus holds more."""


STEPS, DEEPEST = 64, 104
"""Steps of a nat in which logits are counted, and the nats below the likeliest at which float32's exp is 0."""


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


def random_numbers(seed: int) -> Iterator[float]:
    """One request's numbers in [0, 1), for ever: others for every seed.

    torch's generator reads the lower 32 bits of a seed. The upper ones, where there are any, seed a second generator,
    whose numbers are added modulo 1; it runs one number ahead, so that the halves of a seed cannot change places.
    """
    generators = [torch.Generator().manual_seed(seed % 2**32)]
    if seed >> 32:
        generators.append(torch.Generator().manual_seed(seed >> 32))
        torch.rand((), generator=generators[1], dtype=torch.float64)
    while True:
        yield sum(float(torch.rand((), generator=one, dtype=torch.float64)) for one in generators) % 1.0


def draw(combined: Combined, bounds: Bounds, uniforms: Tensor) -> list[int]:
    """The next token of each of B requests.

    Where the first :data:`LIKELY` tokens by the rule's rank hold all candidates, they are put in that order; where they
    do not, candidates stay in the order of their ids, since ranking a vocabulary takes longer than a small model's
    forward. From there on the work is the CPU's, whatever the logits' device: the same seed gives the same reply
    everywhere. The token is the first whose running probability under the aligned logits exceeds the request's number,
    or the likeliest where the temperature is 0. Nothing depends on the other rows.

    Args:
        combined: aligned and rule logits, each (B, V).
        bounds: temperature and bounds, (B,) each.
        uniforms: one number in [0, 1) a request, (B,), float64.

    Raises:
        EngineError: a combiner gave NaN or +inf, or excluded everything.
    """
    most = torch.stack([combined.rule.amax(dim=1), combined.logits.amax(dim=1)]).cpu()
    for whose, excludes in zip(("rule", "logits"), most.isneginf().any(dim=1).tolist(), strict=True):
        if excludes:
            raise EngineError(f"the combiner excludes every token: its {whose} are -inf everywhere")
    if bool(((bounds.top_p == 1) & (bounds.top_k == 0)).all()):
        rule, aligned = combined.rule.cpu(), combined.logits.cpu()
        keep = _possible(rule, bounds.temperature)
        if bool((keep.sum(dim=1) > LIKELY).all()):  # no row's first ones can hold them all
            return list(_pick(rule, aligned, keep, bounds.temperature, uniforms).tolist())
    order, rule, aligned, keep, whole = _likely(combined, bounds)
    places = _pick(rule, aligned, keep, bounds.temperature, uniforms)
    tokens = order.gather(1, places.unsqueeze(1)).squeeze(1)
    for row in (~whole).nonzero().flatten().tolist():
        wide = combined.rule[row].cpu()
        keep = _candidates(wide, *(bound[row] for bound in bounds))
        one = slice(row, row + 1)
        logits = combined.logits[one].cpu()
        tokens[one] = _pick(wide[None], logits, keep[None], bounds.temperature[one], uniforms[one])
    drawn: list[int] = tokens.tolist()
    return drawn


def _likely(combined: Combined, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rule's first tokens by rank: their ids, rule and aligned logits, and which are candidates, (B, C) each; and
    whether those are all candidates of a row, (B,).
    """
    temperature, top_p, top_k = bounds
    device = combined.rule.device
    order, keep, alone = ranked_nucleus(combined.rule, top_p.to(device), temperature.to(device), among=LIKELY)
    rule, aligned = combined.rule.gather(1, order).cpu(), combined.logits.gather(1, order).cpu()
    order, keep, alone = order.cpu(), keep.cpu(), alone.cpu()
    keep &= (top_k == 0).unsqueeze(1) | (torch.arange(order.shape[1]) < top_k.unsqueeze(1))
    return order, rule, aligned, keep, keep.sum(dim=1) <= alone


def _possible(rule: Tensor, temperature: Tensor) -> Tensor:
    """Which tokens have any probability, of logits (B, V)."""
    heated = rule / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    return (heated - heated.logsumexp(1, keepdim=True)).exp() > 0


def _candidates(rule: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Which of all V tokens are candidates, as :func:`ranked_nucleus` has it, of logits (V,): ranked are only those in
    the :data:`STEPS`-th of a nat in which the nucleus ends; the mass above it is summed.
    """
    heated = rule if temperature == 0 else rule / temperature
    mass = (heated - heated.logsumexp(0)).exp()
    keep = mass > 0
    if top_p < 1:
        below = ((heated.max() - heated) * STEPS).clamp_(max=DEEPEST * STEPS).int()
        above = torch.bincount(below, mass.double()).cumsum(0)
        end = min(int((above < top_p).sum()), len(above) - 1)
        there = (below == end).nonzero().squeeze(1)
        there = there[heated[there].sort(descending=True, stable=True).indices]
        within = mass[there].double()
        before = within.cumsum(0) - within + (above[end - 1] if end else 0.0)
        keep &= below < end
        keep[there] = (before < top_p) & (within > 0)
    if 0 < top_k < keep.sum():
        first = torch.zeros_like(keep)
        first[heated.sort(descending=True, stable=True).indices[:top_k]] = True
        keep &= first
    return keep


def _pick(rule: Tensor, aligned: Tensor, keep: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    """The place of one candidate of each row, (B,), by the aligned logits in the order in which they stand, (B, C)."""
    bounded = torch.where(keep, aligned, -torch.inf)
    most = bounded.amax(dim=1)  # NaN, where there is one
    if bool(most.isneginf().any()):  # underflow: the rule's own distribution
        bounded = torch.where(most.isneginf().unsqueeze(1) & keep, rule, bounded)
        most = bounded.amax(dim=1)
    if not bool((most.isfinite() & (rule.amax(dim=1) < torch.inf)).all()):
        raise EngineError("the combined logits hold NaN or infinity")
    heat = torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    running = ((bounded - most.unsqueeze(1)) / heat).exp().cumsum(dim=1, dtype=torch.float64)
    places = torch.searchsorted(running, uniforms.unsqueeze(1) * running[:, -1:], right=True).squeeze(1)
    if bool((places == running.shape[1]).any()):  # rounding: the last one that is possible
        last = torch.where(bounded.isneginf(), -1, torch.arange(running.shape[1])).amax(dim=1)
        places = torch.minimum(places, last)
    if bool((temperature == 0).any()):
        places = torch.where(temperature == 0, bounded.argmax(dim=1), places)
    return places
