"""A reply that is known, decoded once more so that somebody can look at every step of it.

Its tokens are drawn where the method would draw others; what the views give in front of each is what they gave, or
would have given, when the reply was made. So whatever a request can be asked, with views of any model, LoRA and
vocabulary, can be looked into, and a step costs what a step of a reply costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from prefmw.alignment import Combined, Combiner
from prefmw.decoding.engine import Engine
from prefmw.decoding.generation import Generation
from prefmw.decoding.request import Request, View
from prefmw.errors import EngineError

Seen = TypeVar("Seen")

Look = Callable[[Combined, Sequence[Tensor], Tensor], Sequence[Seen]]
"""(what the requests' combiner makes, the views' logits with the onlookers' last, the tokens said (B,)) -> what is kept
of each of B replies.
"""

AT_A_TIME = 128
"""Replies that the engine has at a time."""


class _Forced(Generic[Seen]):
    """A combiner that lets another be seen and says the next of known tokens; one for all replies of that other. The
    last of a request's parameters is the reply's number.
    """

    def __init__(self, combiner: Combiner, views: int, look: Look[Seen]) -> None:
        self.tokens: dict[int, Sequence[int]] = {}
        self.seen: dict[int, list[Seen]] = {}
        self._combiner = combiner
        self._views = views
        self._look = look

    def __call__(self, views: Sequence[Tensor], parameters: Tensor) -> Combined:
        numbers = [int(number) for number in parameters[:, -1].tolist()]
        tokens = torch.tensor([self.tokens[number][len(self.seen[number])] for number in numbers])
        tokens = tokens.to(views[0].device)
        combined = self._combiner(views[: self._views], parameters[:, :-1])
        for number, seen in zip(numbers, self._look(combined, views, tokens), strict=True):
            self.seen[number].append(seen)
        said = torch.full_like(combined.logits, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)
        return Combined(said, said)


def look_into(
    replies: Sequence[tuple[Request, Sequence[int]]],
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
        look: called in the engine's worker: it must not wait for the engine, and keeps numbers rather than logits.
        onlookers: views that read the replies too and have no say.
        progress: told how many replies are done.

    Raises:
        UsageError, ContextLengthError, EngineError: as :meth:`Engine.submit` and the generations raise them.
    """
    forced: dict[tuple[int, int], _Forced[Seen]] = {}
    waiting: deque[tuple[Generation, list[Seen], int]] = deque()
    found: list[list[Seen]] = []

    def collect() -> None:
        generation, seen, length = waiting.popleft()
        with generation:
            for _ in generation:
                pass
        if len(seen) != length:
            raise EngineError(f"a reply of {length} tokens was seen in {len(seen)} steps: it holds an end token")
        found.append(seen)
        progress(len(found))

    try:
        for number, (request, tokens) in enumerate(replies):
            key = (id(request.combiner), len(request.views))
            one = forced.setdefault(key, _Forced(request.combiner, len(request.views), look))
            one.tokens[number], one.seen[number] = tokens, []
            asked = replace(
                request,
                views=(*request.views, *onlookers),
                combiner=one,
                parameters=(*request.parameters, float(number)),
                sampling=replace(request.sampling, max_tokens=len(tokens), temperature=1.0, top_p=1.0, top_k=None),
                owner=None,
            )
            waiting.append((engine.submit(asked), one.seen[number], len(tokens)))
            if len(waiting) == AT_A_TIME:
                collect()
        while waiting:
            collect()
    finally:
        for generation, _, _ in waiting:
            generation.cancel()
    return found
