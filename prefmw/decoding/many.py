"""Many requests, decoded together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from prefmw.decoding.engine import Engine
from prefmw.decoding.generation import Generation
from prefmw.decoding.request import Request

WAITING = 128
"""Requests that an engine is given at a time."""


def decode_all(requests: Iterable[Request], engine: Engine) -> Iterator[tuple[list[int], bool]]:
    """The replies' tokens, in the order of the requests, and whether each came to its end.

    The engine has :data:`WAITING` of them at a time and is never short of rows; who stops reading cancels those.
    """
    waiting: deque[Generation] = deque()
    try:
        for request in requests:
            waiting.append(engine.submit(request))
            if len(waiting) == WAITING:
                yield _whole(waiting.popleft())
        while waiting:
            yield _whole(waiting.popleft())
    finally:
        for generation in waiting:
            generation.cancel()


def _whole(generation: Generation) -> tuple[list[int], bool]:
    with generation:
        return list(generation), generation.finish_reason == "stop"
