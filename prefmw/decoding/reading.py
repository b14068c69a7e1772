"""Finished replies read for their probabilities: which of them share a forward."""

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
    room = READ_AT_ONCE.get(backbone.device.type, READ_AT_ONCE["cuda"])
    sizes = [len(context) + len(reply) for context, reply in pairs]
    waiting = deque(sorted(range(len(pairs)), key=sizes.__getitem__))
    found: dict[int, Tensor] = {}
    most = len(pairs)
    while waiting:
        batch: list[int] = []
        longest = 0
        while waiting and len(batch) < most:
            longest, count = max(longest, len(pairs[waiting[0]][1])), len(batch) + 1
            too_wide = count * sizes[waiting[0]] > room
            if batch and (too_wide or count * longest * backbone.vocabulary > LOGITS_AT_ONCE):
                break
            batch.append(waiting.popleft())
        try:
            some = [pairs[index] for index in batch]
            read = run(partial(backbone.log_probabilities, some, adapter, head_scale))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise EngineError(f"out of memory with one reply to be read, of {sizes[batch[0]]} tokens") from error
            waiting.extendleft(reversed(batch))
            most = len(batch) // 2
            continue
        found.update(zip(batch, read, strict=True))
        progress(len(found) / len(pairs))
    return [found[index] for index in range(len(pairs))]
