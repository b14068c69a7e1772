"""The decode engine: token ids in, token ids out.

It knows views, not methods: a request names the contexts in which one reply is read and the combiner that joins their
next-token logits. It knows no text, no chat template and no user. One worker thread owns the models; callers hand it
requests through a bounded queue and read tokens from a :class:`~prefmw.decoding.generation.Generation`.

Each step of the worker: take in what waits, read one chunk of the prompts that are not read yet, then decode one token
of every reply whose prompts are: all their views that share a backbone are rows of one forward; then read a few
finished replies, where somebody wants their probabilities. So a long prompt stalls nobody, and replies come and go
between any two tokens.

Shapes: B requests, K views each, V vocabulary, P parameters.
"""

from __future__ import annotations

import atexit
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefmw.decoding.backbone import Backbone, Read, Row
from prefmw.decoding.generation import FinishReason, Generation
from prefmw.decoding.linears import Adapter
from prefmw.decoding.parking import Parking
from prefmw.decoding.request import BASE, Request
from prefmw.decoding.sampling import Bounds, draw
from prefmw.decoding.selfcheck import self_check
from prefmw.decoding.threads import dismiss_helpers
from prefmw.errors import ContextLengthError, EngineClosedError, EngineError, EngineOverloadedError, UsageError

MAX_ROWS = 64
"""Views decoded at once; requests beyond them wait."""

READ_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Tokens, padding included, of finished replies that are read between two steps; one pair at least."""

LOGITS_AT_ONCE = 1 << 27
"""Logits that such a reading may hold, 0.5 GB of them."""

CHUNK = {"cpu": 256, "cuda": 2048}
"""Prompt tokens read between two steps of the replies that are under way."""

PATIENCE = 256
"""Steps without trouble after an out-of-memory, before twice as many rows are tried again."""

_running: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_running() -> None:
    """Shut down what is left open: a thread that computes while the interpreter goes away aborts the process."""
    for engine in list(_running):
        if engine._worker is not None and engine._worker.is_alive():  # not its parent's, in a fork
            engine.close()


class Engine:
    """Decodes requests on one causal language model, or on several for requests whose views read different ones.

    Args:
        model: a transformers causal language model, in evaluation mode, on its device; the backbone ``base``.
        capacity: tokens that one view may hold, context and reply together.
        vocabulary: columns of the logits that are real tokens; padded ones behind them are cut off.
        queue_size: requests that may wait.
        max_rows: views decoded at once.
        parked_bytes: memory for what conversations have read, between two turns.
        park_on_cpu: keep that in the computer's memory rather than the device's.
        pack: on a CPU, copy weights into an order that is read more quickly, where memory is plentiful.

    Raises:
        ModelError: a model whose past cannot be kept in rows.
    """

    def __init__(
        self,
        model: Any,
        *,
        capacity: int,
        vocabulary: int,
        queue_size: int = 256,
        max_rows: int = MAX_ROWS,
        parked_bytes: int = 1 << 30,
        park_on_cpu: bool = False,
        pack: bool = True,
    ) -> None:
        self._pack = pack
        self._tables = {BASE: _Table(Backbone(model, vocabulary=vocabulary, pack=pack), capacity)}
        self._max_rows = max_rows
        self._room = max_rows  # fewer after an out-of-memory, for a while
        self._steps = 0  # since then
        self._parking = Parking(parked_bytes)
        self._park_on_cpu = park_on_cpu
        self._queue_size = queue_size
        self._changed = threading.Condition()  # guards the next three
        self._waiting: deque[_Reply] = deque()
        self._errands: deque[tuple[Callable[[], list[Tensor]], Future[list[Tensor]]]] = deque()
        self._closed = False
        self._adding = threading.Lock()
        self._reading: deque[_Reply] = deque()  # with a prompt not yet read
        self._replying: list[_Reply] = []
        self._worker: threading.Thread | None = None
        dismiss_helpers()  # of whoever loaded the model, who need not be the one to ask

    def add_backbone(self, name: str, model: Any, *, capacity: int, vocabulary: int) -> None:
        """Let views name a further model; one by that name that is there already stays.

        Raises:
            ModelError: a model whose past cannot be kept in rows.
        """
        with self._adding:
            if name not in self._tables:
                table = _Table(Backbone(model, vocabulary=vocabulary, pack=self._pack), capacity)
                dismiss_helpers()
                self._tables = {**self._tables, name: table}  # the worker may be going through the old one

    def add_adapter(self, name: str, adapter: Adapter, *, backbone: str = BASE) -> None:
        """Let views of a backbone be read with a LoRA of that name.

        Raises:
            ModelError: there is one by that name, or it does not fit the backbone.
        """
        with self._adding:
            self._tables[backbone].backbone.linears.add(name, adapter)

    def submit(self, request: Request) -> Generation:
        """Queue a request and return at once.

        Raises:
            UsageError: no view, an empty context, tokens that the backbone does not have, an unknown backbone, a head
                scale of another size, or more views than fit.
            ModelError: an unknown adapter.
            ContextLengthError: context and ``max_tokens`` together exceed a backbone's capacity.
            EngineOverloadedError: the queue is full; worth a retry.
            EngineClosedError: the engine was shut down.
        """
        self._check(request)
        reply = _Reply(request, Generation(), self._parking.epoch)
        dismiss_helpers()  # of this thread, beside the worker's
        with self._changed:
            self._begin()
            if len(self._waiting) >= self._queue_size:
                self._leave()
            if len(self._waiting) >= self._queue_size:
                raise EngineOverloadedError(
                    f"the engine's queue is full ({self._queue_size} requests); try again later"
                )
            self._waiting.append(reply)
            self._changed.notify_all()
        return reply.generation

    def log_probabilities(
        self, pairs: Sequence[Read], progress: Callable[[float], None] = lambda share: None
    ) -> list[Tensor]:
        """log p of every token of each reply in its context, in nats, (T,) each; waits for it.

        The worker reads some of them at a time, between two steps of the replies under way, so those go on.
        ``progress`` is told the share that is read.

        Raises:
            UsageError: a context or a reply is empty.
            ContextLengthError: they exceed the capacity together.
            EngineError: the model failed, for want of memory say.
            EngineClosedError: the engine was shut down.
        """
        if any(not context or not reply for context, reply in pairs):
            raise UsageError("a reply to be read needs a token of its own and one in front of it")
        longest = max((len(context) + len(reply) for context, reply in pairs), default=0)
        if longest > self._tables[BASE].capacity:
            raise ContextLengthError(f"{longest} tokens exceed the model's context of {self._tables[BASE].capacity}")
        backbone = self._tables[BASE].backbone
        room = READ_AT_ONCE.get(backbone.device.type, READ_AT_ONCE["cuda"])
        waiting = deque(sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1])))
        found: dict[int, Tensor] = {}
        most = len(pairs)
        while waiting:
            batch: list[int] = []
            longest = 0
            while waiting and len(batch) < most:
                context, reply = pairs[waiting[0]]
                longest, count = max(longest, len(reply)), len(batch) + 1
                too_wide = count * (len(context) + len(reply)) > room
                if batch and (too_wide or count * longest * backbone.vocabulary > LOGITS_AT_ONCE):
                    break
                batch.append(waiting.popleft())
            try:
                read = self._between_steps(partial(backbone.log_probabilities, [pairs[index] for index in batch]))
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    size = sum(map(len, pairs[batch[0]]))
                    raise EngineError(f"out of memory with one reply to be read, of {size} tokens") from error
                waiting.extendleft(reversed(batch))
                most = len(batch) // 2
                continue
            found.update(zip(batch, read, strict=True))
            progress(len(found) / len(pairs))
        return [found[index] for index in range(len(pairs))]

    def self_check(self) -> None:
        """Compare rows with whole forwards of the model; before the first request.

        Raises:
            ModelError: they differ.
        """
        self_check(self._tables[BASE].backbone, capacity=self._tables[BASE].capacity)
        dismiss_helpers()

    def forget(self, owner: str | None = None) -> None:
        """Drop what is kept for an owner's next request; everybody's where nobody is named."""
        self._parking.forget(owner)

    def cache_bytes(self) -> int:
        """Bytes allocated for the rows' keys and values at the moment."""
        return sum(table.backbone.cache.bytes() for table in self._tables.values())

    def packed_bytes(self) -> int:
        """Bytes of packed copies of weights, which quick products on a CPU read."""
        return sum(table.backbone.linears.packed_bytes() for table in self._tables.values())

    def close(self) -> None:
        """Shut down: requests in flight fail with EngineClosedError, the worker ends."""
        with self._changed:
            self._closed = True
            worker = self._worker
            self._changed.notify_all()
        if worker is not None:
            worker.join()
        for table in self._tables.values():
            table.backbone.release()

    def _begin(self) -> None:
        """Start the worker, at the first request or at the first after a fork; holding ``_changed``."""
        if self._closed:
            raise EngineClosedError("the engine is shut down; build a new one")
        if self._worker is None or not self._worker.is_alive():
            self._give_up_rows()  # of a process that this one was forked from
            self._worker = threading.Thread(target=self._work, name="prefmw-engine", daemon=True)
            self._worker.start()
            _running.add(self)

    def _leave(self) -> None:
        """Let those go who were cancelled while they waited; holding ``_changed``."""
        for reply in [reply for reply in self._waiting if reply.generation.cancelled]:
            self._waiting.remove(reply)
            reply.begin()
            reply.end()

    def _between_steps(self, errand: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What ``errand`` returns, done by the worker."""
        future: Future[list[Tensor]] = Future()
        dismiss_helpers()
        with self._changed:
            self._begin()
            self._errands.append((errand, future))
            self._changed.notify_all()
        return future.result()

    def _check(self, request: Request) -> None:
        if not request.views or any(len(view.context) == 0 for view in request.views):
            raise UsageError("a request needs at least one view, and every view at least one token of context")
        if len(request.views) > self._max_rows:
            raise UsageError(f"a request may have up to {self._max_rows} views, got {len(request.views)}")
        if unknown := {view.backbone for view in request.views} - set(self._tables):
            raise UsageError(f"no backbone '{min(unknown)}' in this engine; there is {', '.join(self._tables)}")
        try:
            hash(request.combiner)  # requests are grouped by it
        except TypeError as error:
            raise UsageError(f"a combiner is hashable, as functions are: {error}") from error
        sizes = {self._tables[view.backbone].backbone.vocabulary for view in request.views if view.advance is None}
        if len(sizes) > 1:
            raise UsageError(
                f"views of vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens share no tokens; give the "
                "views that read another vocabulary an advance rule"
            )
        for view in request.views:
            table = self._tables[view.backbone]
            table.backbone.linears.check(view.adapter)
            table.check_tokens(view.context)
            if view.head_scale is not None and view.head_scale.shape != (table.backbone.width,):
                got = tuple(view.head_scale.shape)
                raise UsageError(f"a head scale has the shape ({table.backbone.width},) of hidden states, got {got}")
            if len(view.context) + request.sampling.max_tokens > table.capacity:
                raise ContextLengthError(
                    f"a prompt of {len(view.context)} tokens and a reply of up to {request.sampling.max_tokens} exceed "
                    f"the model's context of {table.capacity}; shorten the conversation or lower max-tokens"
                )

    # The worker.

    def _work(self) -> None:
        while self._take_in():
            try:
                self._admit()
                self._read_prompts()
                self._reply()
                self._sweep()
                self._run_errand()
                self._steps += 1
            except torch.OutOfMemoryError as error:
                self._make_room(error)
            except BaseException as error:  # whatever it was, its cause goes to those it hit, and the worker goes on
                self._start_over(error)
        closed = EngineClosedError("the engine was shut down with this request in flight; start it anew and ask again")
        self._start_over(closed)
        with self._changed:
            for reply in self._waiting:
                reply.fail(closed)
            for _, future in self._errands:
                future.set_exception(closed)
            self._waiting.clear()
            self._errands.clear()

    def _take_in(self) -> bool:
        """Sleep until there is something to do; false where the engine is shut down."""
        with self._changed:
            self._leave()
            while not (self._replying or self._reading or self._waiting or self._errands or self._closed):
                dismiss_helpers()
                self._changed.wait()
            return not self._closed

    def _admit(self) -> None:
        """Give rows to those who wait, in their order, as far as there is room."""
        if self._steps >= PATIENCE and self._room < self._max_rows:
            self._room, self._steps = min(self._max_rows, 2 * self._room), 0
        taken = sum(len(other.request.views) for other in (*self._replying, *self._reading))
        while True:
            with self._changed:
                if not self._waiting or (taken and taken + len(self._waiting[0].request.views) > self._room):
                    return
                reply = self._waiting.popleft()
                self._reading.append(reply)
            taken += len(reply.request.views)
            for index in range(len(reply.request.views) if reply.begin() else 0):
                self._open(reply, index)

    def _run_errand(self) -> None:
        """The first of what else there is to read; its failure is its caller's."""
        with self._changed:
            errand, future = self._errands.popleft() if self._errands else (None, None)
        if errand is None or future is None:
            return
        try:
            future.set_result(errand())
        except torch.OutOfMemoryError as error:
            self._parking.forget()
            _free(error)
            future.set_exception(error)
        except BaseException as error:
            failure = EngineError(f"the model could not read the replies: {error}")
            failure.__cause__ = error
            future.set_exception(failure)

    def _open(self, reply: _Reply, index: int) -> None:
        """Give a view its row, with what is parked for its owner laid into it."""
        view = reply.request.views[index]
        row = self._tables[view.backbone].open(view.adapter, view.head_scale, reply.rows)
        context = reply.context(index)
        if reply.request.owner is not None:
            key = (reply.request.owner, view.backbone, view.adapter)
            kept, length = self._parking.longest_prefix(key, context)
            if kept is not None:
                self._tables[view.backbone].backbone.restore(row, context[:length], kept)
        row.pending = context[len(row.cached) :]

    def _read_prompts(self) -> None:
        """One chunk of the prompts, the one that has waited longest first; who is done joins the replies."""
        alive = [reply for reply in self._reading if reply.begin()]
        for name, table in self._tables.items():
            room = CHUNK.get(table.backbone.device.type, CHUNK["cpu"])
            rows: list[Row] = []
            take: list[int] = []
            for reply in alive:
                for view, row in zip(reply.request.views, reply.rows, strict=True):
                    count = min(len(row.pending), room)
                    if view.backbone == name and count and _fits(count, take, room):
                        rows.append(row)
                        take.append(count)
            if rows:
                table.backbone.forward(rows, take)
        first = self._reading[0] if self._reading else None
        for reply in alive:
            if not any(row.pending for row in reply.rows):
                for view, row in zip(reply.request.views, reply.rows, strict=True):
                    self._tables[view.backbone].make_ready(row)
                self._reading.remove(reply)
                self._replying.append(reply)
        if self._reading and self._reading[0] is first:
            self._reading.rotate(-1)

    def _reply(self) -> None:
        """One token more of every reply."""
        for table in self._tables.values():
            rows = table.ready()
            if any(row.pending for row in rows):
                table.backbone.forward(rows, [len(row.pending) for row in rows])
        kinds: dict[Any, list[_Reply]] = {}
        for reply in self._replying:
            kinds.setdefault(reply.kind, []).append(reply)
        for group in kinds.values():
            self._draw(group)

    def _draw(self, group: Sequence[_Reply]) -> None:
        """The next token of replies of one kind; what fails together is tried one by one, so that an exception reaches
        its owner and nobody else.
        """
        try:
            tokens = _drawn(group)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
                return
            for reply in group:
                self._draw([reply])
            return
        for reply, token in zip(group, tokens, strict=True):
            try:
                reply.advance(token)
                for view, row in zip(reply.request.views, reply.rows, strict=True):
                    if view.advance is not None:
                        self._tables[view.backbone].check_row(row)
            except Exception as error:  # of its own advance rule
                reply.fail(error)

    def _make_room(self, error: torch.OutOfMemoryError) -> None:
        """Give up all rows and what is parked, and let half as many try again; who ran out of memory alone, and with
        nothing else to give up, fails.
        """
        active = [reply for reply in (*self._replying, *self._reading) if not reply.done]
        alone = len(active) == 1 and active[0].alone
        if alone:
            sizes = ", ".join(str(len(row.cached) + len(row.pending)) for row in active[0].rows)
            failure = EngineError(
                f"out of memory with one request of {len(active[0].rows)} views ({sizes} tokens); shorten the prompt, "
                "load the model in a narrower dtype or quantised, or use a smaller one"
            )
            failure.__cause__ = error
            active[0].fail(failure)
        self._give_up_rows()
        self._parking.forget()
        _free(error)
        if len(active) == 1:
            active[0].alone = True
        rows = sum(len(reply.request.views) for reply in active)
        self._room, self._steps = max(1, rows // 2), 0
        with self._changed:
            self._waiting.extendleft(reply for reply in reversed(active) if not reply.done)

    def _start_over(self, error: BaseException) -> None:
        """Fail everything under way with ``error``, and begin again with no rows."""
        for reply in (*self._replying, *self._reading):
            reply.fail(error)
        self._give_up_rows()

    def _give_up_rows(self) -> None:
        """No reply has rows any more; who is done is told. Nothing in here may fail."""
        for reply in (*self._replying, *self._reading):
            reply.rows = []
            reply.end()
        self._replying, self._reading = [], deque()
        for table in self._tables.values():
            with suppress(Exception):  # a device that is lost
                table.drop()

    def _sweep(self) -> None:
        """Tell the callers of what is done, and free its rows, parking those of conversations."""
        for replies in (self._replying, self._reading):
            for reply in [reply for reply in replies if reply.done]:
                if reply.reason is not None and reply.request.owner is not None:
                    self._park(reply, reply.request.owner)
                reply.end()
                replies.remove(reply)
                self._close_rows(reply)

    def _park(self, reply: _Reply, owner: str) -> None:
        for view, row in zip(reply.request.views, reply.rows, strict=False):
            if not row.cached:
                continue
            try:
                states = self._tables[view.backbone].backbone.copy_of(row, on_cpu=self._park_on_cpu)
            except torch.OutOfMemoryError:  # what is not parked is read again
                return
            self._parking.park((owner, view.backbone, view.adapter), row.cached, states, reply.epoch)

    def _close_rows(self, reply: _Reply) -> None:
        for view, row in zip(reply.request.views, reply.rows, strict=False):  # fewer rows if it got none so far
            self._tables[view.backbone].close(row, wipe=reply.failed)
        reply.rows = []


class _Table:
    """A backbone's rows in the order of its slots: first those that reply, then those that read their prompts, so that
    a step's forward reads neighbouring slots in place.
    """

    def __init__(self, backbone: Backbone, capacity: int) -> None:
        self.backbone = backbone
        self.capacity = min(capacity, backbone.exact or capacity)
        self._rows: list[Row] = []
        self._ready = 0

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise UsageError for a token id that the model does not have."""
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.backbone.read:
            wrong = next(token for token in tokens if not 0 <= token < self.backbone.read)
            raise UsageError(f"token ids lie in 0..{self.backbone.read - 1} for this model, got {wrong}")

    def check_row(self, row: Row) -> None:
        """Raise for what a view's own advance rule may have given it to read."""
        self.check_tokens(row.pending)
        if len(row.cached) + len(row.pending) > self.capacity:
            raise ContextLengthError(f"a view's own tokens exceed the model's context of {self.capacity}")

    def drop(self) -> None:
        """No rows, and the cache freed."""
        self._rows, self._ready = [], 0
        self.backbone.drop()

    def open(self, adapter: str | None, head_scale: Tensor | None, rows: list[Row]) -> Row:
        """A new row behind all others, added to a reply's ``rows``."""
        self.backbone.reserve(len(self._rows) + 1, 1)
        scale = None if head_scale is None else head_scale.to(self.backbone.device)
        row = Row(len(self._rows), [], adapter=adapter, head_scale=scale)
        self._rows.append(row)
        rows.append(row)
        return row

    def make_ready(self, row: Row) -> None:
        """Count a row among those that reply."""
        self._swap(row.slot, self._ready)
        self._ready += 1

    def ready(self) -> list[Row]:
        """The rows that reply, in the order of their slots."""
        return self._rows[: self._ready]

    def close(self, row: Row, *, wipe: bool) -> None:
        """Take a row out; its slot is free again. ``wipe`` where its states may not be finite."""
        if wipe:
            self.backbone.cache.wipe(row.slot)
        if row.slot < self._ready:
            self._ready -= 1
            self._swap(row.slot, self._ready)
        self._swap(row.slot, len(self._rows) - 1)
        self._rows.pop()

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        rows = self._rows
        self.backbone.cache.swap(one, other, max(len(rows[one].cached), len(rows[other].cached)))
        rows[one].slot, rows[other].slot = other, one
        rows[one], rows[other] = rows[other], rows[one]


class _Reply:
    """One request in the making: what it has said, its rows, and the generator that goes on from there."""

    def __init__(self, request: Request, generation: Generation, epoch: int) -> None:
        self.request = request
        self.generation = generation
        self.epoch = epoch
        self.alone = False  # whether it ran out of memory once, with nobody beside it
        self.rows: list[Row] = []
        self.said: list[int] = []
        self.reason: FinishReason | None = None
        self.failed = False
        self.kind = (request.combiner, len(request.views), len(request.parameters))
        self._generator = torch.Generator().manual_seed(request.sampling.seed)
        self._uniform: float | None = None
        self._ended = False

    def context(self, index: int) -> list[int]:
        """What stands in front of the next token in one view."""
        view = self.request.views[index]
        said: Iterable[int] = self.said
        if view.advance is not None:
            said = (read for token in self.said for read in view.advance(token))
        return [*view.context, *said]

    @property
    def done(self) -> bool:
        """Whether it has come to an end, a good one or a bad one."""
        return self.failed or self.reason is not None

    def begin(self) -> bool:
        """Whether there is anything to do."""
        if self.generation.started_at is None:
            self.generation._start()
        if self.generation.cancelled:
            self.reason = "cancelled"
        return not self.done

    def end(self) -> None:
        """Tell the caller that no more tokens come, where that is so and was not told."""
        if self.reason is not None and not self._ended:
            self._ended = True
            self.generation._finish(self.reason)

    def logits(self, index: int) -> Tensor:
        """After what one view has read, (V,)."""
        logits = self.rows[index].logits
        assert logits is not None
        return logits

    def uniform(self) -> float:
        """This step's random number, in [0, 1)."""
        if self._uniform is None:
            self._uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        return self._uniform

    def advance(self, token: int) -> None:
        """Say ``token``, and have every view read it."""
        self._uniform = None
        if self.generation.cancelled:
            self.reason = "cancelled"
            return
        self.generation._drew()
        if token in self.request.stop_ids:
            self.reason, self.generation.stop_id = "stop", token
            return
        self.said.append(token)
        self.generation._emit(token)
        if len(self.said) == self.request.sampling.max_tokens:
            self.reason = "length"
            return
        for view, row in zip(self.request.views, self.rows, strict=True):
            row.pending.extend([token] if view.advance is None else view.advance(token))

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` to the caller."""
        if not self.done:
            self.failed = True
            self.generation._fail(error)


def _free(error: BaseException) -> None:
    """Let go of what the failed forward holds, and give it back to the device."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fits(count: int, take: Sequence[int], room: int) -> bool:
    """Whether a row that takes ``count`` tokens goes into a chunk beside those that take ``take``: all are padded to
    the longest, at most a third of the chunk may be padding, and its real tokens stay within ``room``.
    """
    real = sum(take) + count
    return not take or (real <= room and 2 * max(*take, count) * (len(take) + 1) <= 3 * real)


@torch.inference_mode()
def _drawn(group: Sequence[_Reply]) -> list[int]:
    """The next token of each of B replies of one kind."""
    requests = [reply.request for reply in group]
    views = [torch.stack([reply.logits(index) for reply in group]) for index in range(len(requests[0].views))]
    parameters = torch.tensor([request.parameters for request in requests], dtype=torch.float32)
    combined = requests[0].combiner(views, parameters.to(views[0].device))
    shape = (len(group), views[0].shape[1])
    if not combined.logits.shape == combined.rule.shape == shape:
        got = f"{tuple(combined.logits.shape)} and {tuple(combined.rule.shape)}"
        raise EngineError(f"the combiner gave logits of shapes {got}; expected {shape} twice")
    bounds = Bounds.of([request.sampling for request in requests])
    return draw(combined, bounds, torch.tensor([reply.uniform() for reply in group], dtype=torch.float64))
