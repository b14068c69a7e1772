"""The steps of an engine's worker: whose rows are read next, and what becomes of those whose turn goes wrong.

Each step reads one chunk of the prompts that are not read yet, then decodes one token of every reply whose prompts are:
all their views that share a backbone are rows of one forward. So a long prompt stalls nobody, and replies come and go
between any two tokens.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from prefmw.decoding.active import Active, next_tokens
from prefmw.decoding.backbone import Row
from prefmw.decoding.parking import Parking
from prefmw.decoding.table import Table
from prefmw.errors import EngineError

CHUNK = {"cpu": 256, "cuda": 2048}
"""Prompt tokens read between two steps of the replies that are under way."""

CHUNK_ALONE = {"cpu": 512, "cuda": 2048}
"""Likewise while there are none; who comes meanwhile waits for the end of one."""

PATIENCE = 256
"""Steps without trouble after an out-of-memory, before twice as many rows are tried again."""


class Scheduler:
    """The requests that have rows. It is the worker's: no other thread calls it while that one lives.

    Args:
        tables: by name, the backbones' rows; it may be replaced by one that holds more.
        parking: what conversations keep between two turns.
        max_rows: views decoded at once.
        park_on_cpu: whether to keep that in the computer's memory rather than the device's.
    """

    def __init__(self, tables: Mapping[str, Table], parking: Parking, *, max_rows: int, park_on_cpu: bool) -> None:
        self.tables = tables
        self._parking = parking
        self._park_on_cpu = park_on_cpu
        self._max_rows = max_rows
        self._room = max_rows  # fewer after an out-of-memory, for a while
        self._steps = 0  # since then
        self._reading: deque[Active] = deque()  # with a prompt not yet read
        self._replying: list[Active] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to decode."""
        return not (self._replying or self._reading)

    def has_room(self, views: int) -> bool:
        """Whether a request of so many views may have rows now; with nobody else there, any may."""
        if self._steps >= PATIENCE and self._room < self._max_rows:
            self._room, self._steps = min(self._max_rows, 2 * self._room), 0
        taken = sum(len(other.request.views) for other in (*self._replying, *self._reading))
        return not taken or taken + views <= self._room

    def add(self, active: Active) -> None:
        """Count a request among those under way, whatever comes."""
        self._reading.append(active)

    def open(self, active: Active) -> None:
        """Give its views their rows, with what is parked for its owner laid into them."""
        if not active.begin():
            return
        for view, context in zip(active.request.views, active.contexts, strict=True):
            table = self.tables[view.backbone]
            row = table.open(view, len(context), active.rows)
            if active.request.owner is not None:
                key = (active.request.owner, view.backbone, view.adapter)
                kept, length = self._parking.longest_prefix(key, context)
                if kept is not None:
                    table.backbone.restore(row, context[:length], kept)
            row.pending = context[len(row.cached) :]

    def step(self) -> None:
        """A chunk of the prompts, and a token of every reply."""
        self._read_prompts()
        self._reply()
        self._sweep()
        self._steps += 1

    def make_room(self, error: torch.OutOfMemoryError) -> list[Active]:
        """Give up all rows and what is parked; those who are to try again, half as many at once. Who ran out of memory
        alone, and with nothing else to give up, fails.
        """
        active = [one for one in (*self._replying, *self._reading) if not one.done]
        if len(active) == 1 and active[0].alone:
            sizes = ", ".join(str(len(row.cached) + len(row.pending)) for row in active[0].rows)
            failure = EngineError(
                f"out of memory with one request of {len(active[0].rows)} views ({sizes} tokens); shorten the prompt, "
                "load the model in a narrower dtype or quantised, or use a smaller one"
            )
            failure.__cause__ = error
            active[0].fail(failure)
        self.give_up_rows()
        self._parking.forget()
        free(error)
        if len(active) == 1:
            active[0].alone = True
        rows = sum(len(one.request.views) for one in active)
        self._room, self._steps = max(1, rows // 2), 0
        return [one for one in active if not one.done]

    def start_over(self, error: BaseException) -> None:
        """Fail everything under way with ``error``, and begin again with no rows."""
        for active in (*self._replying, *self._reading):
            active.fail(error)
        self.give_up_rows()

    def give_up_rows(self) -> None:
        """No request has rows any more; who is done is told. Nothing in here may fail."""
        for active in (*self._replying, *self._reading):
            active.rows = []
            active.end()
        self._replying, self._reading = [], deque()
        for table in self.tables.values():
            with suppress(Exception):  # a device that is lost
                table.drop()

    def _read_prompts(self) -> None:
        """One chunk of the prompts, the one that has waited longest first; who is done joins the replies."""
        alive = [active for active in self._reading if active.begin()]
        for name, table in self.tables.items():
            chunk = CHUNK if self._replying else CHUNK_ALONE
            room = chunk.get(table.backbone.device.type, chunk["cpu"])
            rows: list[Row] = []
            take: list[int] = []
            for active in alive:
                for view, row in zip(active.request.views, active.rows, strict=True):
                    count = min(len(row.pending), room)
                    if view.backbone == name and count and _fits(count, take, room):
                        rows.append(row)
                        take.append(count)
            if rows:
                table.backbone.forward(rows, take)
        first = self._reading[0] if self._reading else None
        for active in alive:
            if not any(row.pending for row in active.rows):
                for view, row in zip(active.request.views, active.rows, strict=True):
                    self.tables[view.backbone].make_ready(row)
                self._reading.remove(active)
                self._replying.append(active)
        if self._reading and self._reading[0] is first:
            self._reading.rotate(-1)

    def _reply(self) -> None:
        """One token more of every reply."""
        for table in self.tables.values():
            rows = table.ready()
            if any(row.pending for row in rows):
                table.backbone.forward(rows, [len(row.pending) for row in rows])
        kinds: dict[object, list[Active]] = {}
        for active in self._replying:
            kinds.setdefault(active.kind, []).append(active)
        for group in kinds.values():
            self._draw(group)

    def _draw(self, group: Sequence[Active]) -> None:
        """The next token of requests of one kind; what fails together is tried one by one, so that an exception of a
        combiner or an advance rule, of whatever kind, reaches its owner and nobody else.
        """
        try:
            tokens = next_tokens(group)
        except torch.OutOfMemoryError:
            raise
        except BaseException as error:
            if len(group) == 1:
                group[0].fail(error)
                return
            for active in group:
                self._draw([active])
            return
        for active, token in zip(group, tokens, strict=True):
            if not active.say(token):
                continue
            try:
                for index, view in enumerate(active.request.views):
                    own = self.tables[view.backbone].own_tokens(view, token, len(active.contexts[index]))
                    active.read(index, own)
            except BaseException as error:
                active.fail(error)

    def _sweep(self) -> None:
        """Tell the callers of what is done, and free its rows, parking those of conversations."""
        for requests in (self._replying, self._reading):
            for active in [active for active in requests if active.done]:
                if active.reason is not None and active.request.owner is not None:
                    self._park(active, active.request.owner)
                active.end()
                requests.remove(active)
                self._close_rows(active)

    def _park(self, active: Active, owner: str) -> None:
        for view, row in zip(active.request.views, active.rows, strict=False):
            if not row.cached:
                continue
            try:
                states = self.tables[view.backbone].backbone.copy_of(row, on_cpu=self._park_on_cpu)
            except torch.OutOfMemoryError:  # what is not parked is read again
                return
            self._parking.park((owner, view.backbone, view.adapter), row.cached, states, active.epoch)

    def _close_rows(self, active: Active) -> None:
        for view, row in zip(active.request.views, active.rows, strict=False):  # fewer rows if it got none so far
            self.tables[view.backbone].close(row, wipe=active.failed)
        active.rows = []


def free(error: BaseException) -> None:
    """Let go of what a forward that ran out of memory holds, and give it back to the device."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fits(count: int, take: Sequence[int], room: int) -> bool:
    """Whether a row that takes ``count`` tokens goes into a chunk beside those that take ``take``: all are padded to
    the longest, at most a third of the chunk may be padding, and its real tokens stay within ``room``.
    """
    real = sum(take) + count
    return not take or (real <= room and 2 * max(*take, count) * (len(take) + 1) <= 3 * real)
