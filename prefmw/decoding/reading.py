"""Finished replies read for their probabilities, or for what a reward model makes of them: which share a forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from prefmw.decoding.backbone import Backbone, Read
from prefmw.errors import EngineError

READ_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Tokens, padding included, that one forward reads; one pair at least."""

LOGITS_AT_ONCE = 1 << 27
"""Logits that it may hold, 0.5 GB of them."""

Errand = Callable[[], list[Tensor]]


def read_all(
    backbone: Backbone,
    pairs: Sequence[Read],
    run: Callable[[Errand], list[Tensor]],
    progress: Callable[[float], None],
    adapter: str | None = None,
    head_scale: Tensor | None = None,
) -> list[Tensor]:
    """log p of every token of each reply, (T,) each, read by forwards that ``run`` has done; the shortest go first.

    Raises:
        EngineError: out of memory with one reply alone.
    """
    sizes = [len(context) + len(reply) for context, reply in pairs]
    longest = [len(reply) for _, reply in pairs]

    def fits(batch: Sequence[int]) -> bool:
        return len(batch) * max(longest[index] for index in batch) * backbone.vocabulary <= LOGITS_AT_ONCE

    def read(batch: Sequence[int]) -> list[Tensor]:
        return backbone.log_probabilities([pairs[index] for index in batch], adapter, head_scale)

    return _in_batches(backbone, sizes, fits, read, run, progress)


def read_states(
    backbone: Backbone,
    texts: Sequence[Sequence[int]],
    run: Callable[[Errand], list[Tensor]],
    progress: Callable[[float], None],
    adapter: str | None = None,
) -> list[Tensor]:
    """The hidden state at the last token of each text, (D,) each, likewise.

    Raises:
        EngineError: out of memory with one text alone.
    """

    def read(batch: Sequence[int]) -> list[Tensor]:
        return backbone.last_states([texts[index] for index in batch], adapter)

    return _in_batches(backbone, [len(text) for text in texts], lambda batch: True, read, run, progress)


def _in_batches(
    backbone: Backbone,
    sizes: Sequence[int],
    fits: Callable[[Sequence[int]], bool],
    read: Callable[[Sequence[int]], list[Tensor]],
    run: Callable[[Errand], list[Tensor]],
    progress: Callable[[float], None],
) -> list[Tensor]:
    """What ``read`` gives for each of as many texts as there are ``sizes``, in tokens; a batch has one text at least,
    and beyond that no more than ``fits`` and :data:`READ_AT_ONCE` allow.
    """
    room = READ_AT_ONCE.get(backbone.device.type, READ_AT_ONCE["cuda"])
    waiting = deque(sorted(range(len(sizes)), key=sizes.__getitem__))
    found: dict[int, Tensor] = {}
    most = len(sizes)
    while waiting:
        batch: list[int] = []
        while waiting and len(batch) < most:
            wider = [*batch, waiting[0]]
            if batch and (len(wider) * sizes[waiting[0]] > room or not fits(wider)):
                break
            batch.append(waiting.popleft())
        try:
            some = run(partial(read, batch))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise EngineError(f"out of memory with one reply to be read, of {sizes[batch[0]]} tokens") from error
            waiting.extendleft(reversed(batch))
            most = len(batch) // 2
            continue
        found.update(zip(batch, some, strict=True))
        progress(len(found) / len(sizes))
    return [found[index] for index in range(len(sizes))]
