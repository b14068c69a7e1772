"""Conversations between two turns: what their views have read is kept, so that the next turn reads only what is new."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from prefmw.decoding.slots import States

Key = tuple[str, str, str | None]
"""Owner, backbone and adapter: whose readings they are, and what keys and values depend on beside the tokens."""

READINGS = 8
"""Readings kept of one owner, backbone and adapter: several conversations of a few views."""


@dataclass
class _Parked:
    tokens: list[int]
    states: States
    size: int


class Parking:
    """Keeps readings within ``budget`` bytes; those of the owner who was away longest go first. Safe from any thread.

    A view finds what it kept by its tokens: the longest common prefix of what it reads now and what was parked. So a
    changed preference costs the views that carry it their past, and no other.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[Key, list[_Parked]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0
        """What is kept at the moment."""

    def park(self, key: Key, tokens: Sequence[int], states: States) -> None:
        """Keep a view's states; what it extends is replaced."""
        size = sum(states_.numel() * states_.element_size() for pair in states for states_ in pair)
        if size > self._budget or not tokens:
            return
        with self._lock:
            others = self._kept.pop(key, [])
            kept = [other for other in others if common_prefix(other.tokens, tokens) < len(other.tokens)]
            self._kept[key] = [*kept, _Parked(list(tokens), states, size)][-READINGS:]
            self.bytes += size - sum(other.size for other in others) + sum(o.size for o in self._kept[key][:-1])
            while self.bytes > self._budget:
                _, dropped = self._kept.popitem(last=False)
                self.bytes -= sum(one.size for one in dropped)

    def longest_prefix(self, key: Key, context: Sequence[int]) -> tuple[States | None, int]:
        """The states that share most of ``context``'s beginning, and how many tokens they share; the last token of the
        context is never among them, since somebody has to read it.
        """
        with self._lock:
            best, length = None, 0
            for parked in self._kept.get(key, ()):
                shared = min(common_prefix(parked.tokens, context), len(context) - 1)
                if shared > length:
                    best, length = parked.states, shared
            if best is not None:
                self._kept.move_to_end(key)
            return best, length

    def forget(self, owner: str | None = None) -> None:
        """Drop an owner's readings; everybody's where nobody is named."""
        with self._lock:
            for key in [key for key in self._kept if owner is None or key[0] == owner]:
                self.bytes -= sum(parked.size for parked in self._kept.pop(key))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    for index, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return index
    return min(len(one), len(other))
