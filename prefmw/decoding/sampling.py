"""One token from combined logits: bound by the candidate rule, tempered, drawn with the request's own generator."""

from __future__ import annotations

import torch

from prefmw.alignment import Combined, nucleus, restrict, top_k
from prefmw.decoding.request import Sampling


def draw(combined: Combined, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one request.

    Args:
        combined: aligned and rule logits, each (1, V).
        sampling: temperature and bounds.
        generator: the request's own, on the logits' device; advanced once unless greedy.
    """
    keep = nucleus(combined.rule, sampling.top_p, sampling.temperature)
    if sampling.top_k is not None:
        keep &= top_k(combined.rule, sampling.top_k)
    logits = restrict(combined.logits, combined.rule, keep)
    if sampling.temperature == 0:
        return int(logits.argmax(dim=1))
    probabilities = (logits / sampling.temperature).softmax(dim=1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
