"""Conversations between two turns: what their views have read is kept, so that the next turn reads only what is new."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from prefmw.decoding.slots import States

Key = tuple[str, str, str | None]
"""Owner, backbone and adapter: whose readings they are, and what keys and values depend on beside the tokens."""

READINGS = 64
"""Readings kept of one owner, backbone and adapter: several conversations of a few views."""


@dataclass
class _Parked:
    key: Key
    tokens: list[int]
    states: States
    size: int


class Parking:
    """Keeps readings within ``budget`` bytes; those that were not needed for longest go first. Safe from any thread.

    A view finds what it kept by its tokens: the longest common prefix of what it reads now and what was parked. So a
    changed preference costs the views that carry it their past, and no other.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[int, _Parked] = OrderedDict()  # by number, the next to go first
        self._numbers: dict[Key, list[int]] = {}
        self._count = count()
        self._lock = threading.Lock()
        self.bytes = 0
        """What is kept at the moment."""
        self.epoch = 0
        """How often something was forgotten. What began before that is not parked after it."""

    def park(self, key: Key, tokens: Sequence[int], states: States, epoch: int) -> None:
        """Keep a view's states; what it extends is replaced. ``epoch`` is the one that its request began in."""
        size = sum(states_.numel() * states_.element_size() for pair in states for states_ in pair)
        if size > self._budget or not tokens:
            return
        with self._lock:
            if epoch != self.epoch:
                return
            for number in list(self._numbers.get(key, ())):
                other = self._kept[number].tokens
                if common_prefix(other, tokens) == len(other):
                    self._drop(number)
            number = next(self._count)
            self._kept[number] = _Parked(key, list(tokens), states, size)
            self._numbers.setdefault(key, []).append(number)
            self.bytes += size
            while len(self._numbers[key]) > READINGS:
                self._drop(self._numbers[key][0])
            while self.bytes > self._budget:
                self._drop(next(iter(self._kept)))

    def longest_prefix(self, key: Key, context: Sequence[int]) -> tuple[States | None, int]:
        """The states that share most of ``context``'s beginning, and how many tokens they share; the last token of the
        context is never among them, since somebody has to read it.
        """
        with self._lock:
            best, length = None, 0
            for number in self._numbers.get(key, ()):
                shared = min(common_prefix(self._kept[number].tokens, context), len(context) - 1)
                if shared > length:
                    best, length = number, shared
            if best is None:
                return None, 0
            self._kept.move_to_end(best)
            return self._kept[best].states, length

    def forget(self, owner: str | None = None) -> None:
        """Drop an owner's readings; everybody's where nobody is named."""
        with self._lock:
            self.epoch += 1
            for key in [key for key in self._numbers if owner is None or key[0] == owner]:
                for number in list(self._numbers[key]):
                    self._drop(number)

    def _drop(self, number: int) -> None:
        parked = self._kept.pop(number)
        self.bytes -= parked.size
        left = [other for other in self._numbers[parked.key] if other != number]
        if left:
            self._numbers[parked.key] = left
        else:
            del self._numbers[parked.key]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    for index, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return index
    return min(len(one), len(other))
