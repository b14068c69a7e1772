"""A reply that is known, decoded once more so that somebody can look at every step of it.

Its tokens are drawn where the method would draw others; what the views give in front of each is what they gave, or
would have given, when the reply was made. So whatever a request can be asked, with views of any model, LoRA and
vocabulary, can be looked into, and a step costs what a step of a reply costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from prefmw.alignment import Combined
from prefmw.decoding.engine import Engine
from prefmw.decoding.request import Request, View
from prefmw.errors import EngineError

Seen = TypeVar("Seen")

Look = Callable[[Combined, Sequence[Tensor], int], Seen]
"""(what the request's combiner makes, the views' logits with the onlookers' last, the token said) -> what is kept."""

AT_A_TIME = 64
"""Replies that the engine has at a time."""


class _Forced(Generic[Seen]):
    """A combiner that lets one be seen and says the next of ``tokens``; for one request."""

    def __init__(self, request: Request, tokens: Sequence[int], look: Look[Seen]) -> None:
        self.seen: list[Seen] = []
        self._request = request
        self._tokens = tokens
        self._look = look

    def __call__(self, views: Sequence[Tensor], parameters: Tensor) -> Combined:
        token = self._tokens[len(self.seen)]
        combined = self._request.combiner(views[: len(self._request.views)], parameters)
        seen = self._look(combined, views, token)
        said = torch.full_like(combined.logits, -torch.inf)
        said[:, token] = 0.0
        self.seen.append(seen)
        return Combined(said, said)


def look_into(
    replies: Iterable[tuple[Request, Sequence[int]]],
    engine: Engine,
    look: Look[Seen],
    *,
    onlookers: Sequence[View] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> list[list[Seen]]:
    """What ``look`` keeps of every step of known replies, reply by reply, many decoded at a time.

    Args:
        replies: what was asked for, and the token ids of the answer, at least one; an end token, last, is a step too.
        engine: of the models that the views name.
        look: called with one row, in the engine's worker: it must not wait for the engine, and keeps numbers rather
            than logits.
        onlookers: views that read the replies too and have no say.
        progress: told how many replies are done.

    Raises:
        UsageError, ContextLengthError, EngineError: as :meth:`Engine.submit` and the generations raise them.
    """
    found: list[list[Seen]] = []
    waiting = []
    for request, tokens in replies:
        forced = _Forced(request, tokens, look)
        sampling = replace(request.sampling, max_tokens=len(tokens), temperature=1.0, top_p=1.0, top_k=None)
        views = (*request.views, *onlookers)
        waiting.append((forced, replace(request, views=views, combiner=forced, sampling=sampling, owner=None), tokens))
    for start in range(0, len(waiting), AT_A_TIME):
        batch = waiting[start : start + AT_A_TIME]
        generations = [engine.submit(request) for _, request, _ in batch]
        try:
            for (forced, _, tokens), generation in zip(batch, generations, strict=True):
                for _ in generation:
                    pass
                if len(forced.seen) != len(tokens):
                    raise EngineError(
                        f"a reply of {len(tokens)} tokens was seen in {len(forced.seen)} steps; try again"
                    )
                found.append(forced.seen)
                progress(len(found))
        finally:
            for generation in generations:
                generation.cancel()
    return found
