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

import queue
import threading
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
from prefmw.errors import ContextLengthError, EngineClosedError, EngineError, EngineOverloadedError, UsageError

MAX_ROWS = 64
"""Views decoded at once; requests beyond them wait."""

READ_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Tokens, padding included, of finished replies that are read between two steps; one pair at least."""

LOGITS_AT_ONCE = 1 << 27
"""Logits that such a reading may hold, 0.5 GB of them."""

CHUNK = {"cpu": 256, "cuda": 2048}
"""Prompt tokens read between two steps of the replies that are under way."""


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
    ) -> None:
        self._tables = {BASE: _Table(Backbone(model, vocabulary=vocabulary))}
        self._capacity = capacity
        self._max_rows = max_rows
        self._room = max_rows  # fewer after an out-of-memory, until those that fit are done
        self._parking = Parking(parked_bytes)
        self._park_on_cpu = park_on_cpu
        self._waiting: queue.Queue[_Reply | None] = queue.Queue(maxsize=queue_size)
        self._next: deque[_Reply] = deque()  # taken from the queue, without rows so far
        self._reading: deque[_Reply] = deque()  # with a prompt not yet read
        self._replying: list[_Reply] = []
        self._errands: deque[tuple[Callable[[], list[Tensor]], Future[list[Tensor]]]] = deque()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def add_backbone(self, name: str, model: Any, *, vocabulary: int) -> None:
        """Let views name a further model; one by that name that is there already stays.

        Raises:
            ModelError: a model whose past cannot be kept in rows.
        """
        if name not in self._tables:
            self._tables[name] = _Table(Backbone(model, vocabulary=vocabulary))

    def add_adapter(self, name: str, adapter: Adapter, *, backbone: str = BASE) -> None:
        """Let views of a backbone be read with a LoRA of that name; one that is there already is replaced.

        Raises:
            ModelError: it does not fit the backbone.
        """
        self._tables[backbone].backbone.linears.add(name, adapter)

    def submit(self, request: Request) -> Generation:
        """Queue a request and return at once.

        Raises:
            UsageError: no view, an empty context, an unknown backbone, or more views than fit.
            ContextLengthError: context and ``max_tokens`` together exceed the capacity.
            EngineOverloadedError: the queue is full; worth a retry.
            EngineClosedError: the engine was shut down.
        """
        self._check(request)
        generation = Generation()
        with self._lock:
            if self._closed.is_set():
                raise EngineClosedError("the engine is shut down; build a new one")
            try:
                self._waiting.put_nowait(_Reply(request, generation))
            except queue.Full as error:
                size = self._waiting.maxsize
                raise EngineOverloadedError(f"the engine's queue is full ({size} requests); try again later") from error
            self._begin()
        return generation

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
        if longest > self._capacity:
            raise ContextLengthError(f"{longest} tokens exceed the model's context of {self._capacity}")
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
        self_check(self._tables[BASE].backbone, capacity=self._capacity)

    def forget(self, owner: str | None = None) -> None:
        """Drop what is kept for an owner's next request; everybody's where nobody is named."""
        self._parking.forget(owner)

    def cache_bytes(self) -> int:
        """Bytes allocated for the rows' keys and values at the moment."""
        return sum(table.backbone.cache.bytes() for table in self._tables.values())

    def close(self) -> None:
        """Shut down: requests in flight fail with EngineClosedError, the worker ends."""
        with self._lock:
            self._closed.set()
            worker = self._worker
        if worker is not None:
            while worker.is_alive():
                try:
                    self._waiting.put(None, timeout=0.05)  # wakes a worker that waits
                except queue.Full:
                    continue
                worker.join(timeout=0.05)
        for table in self._tables.values():
            table.backbone.release()

    def _begin(self) -> None:
        """Start the worker, at the first request or at the first after a fork; under the lock."""
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(target=self._work, name="prefmw-engine", daemon=True)
            self._worker.start()

    def _between_steps(self, errand: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What ``errand`` returns, done by the worker."""
        future: Future[list[Tensor]] = Future()
        with self._lock:
            if self._closed.is_set():
                raise EngineClosedError("the engine is shut down; build a new one")
            self._errands.append((errand, future))
            self._begin()
        if self._waiting.empty():
            with suppress(queue.Full):
                self._waiting.put_nowait(None)  # wakes a worker that waits
        return future.result()

    def _check(self, request: Request) -> None:
        if not request.views or any(len(view.context) == 0 for view in request.views):
            raise UsageError("a request needs at least one view, and every view at least one token of context")
        if len(request.views) > self._max_rows:
            raise UsageError(f"a request may have up to {self._max_rows} views, got {len(request.views)}")
        if unknown := {view.backbone for view in request.views} - set(self._tables):
            raise UsageError(f"no backbone '{min(unknown)}' in this engine; there is {', '.join(self._tables)}")
        sizes = {self._tables[view.backbone].backbone.vocabulary for view in request.views if view.advance is None}
        if len(sizes) > 1:
            raise UsageError(
                f"views of vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens share no tokens; give the "
                "views that read another vocabulary an advance rule"
            )
        longest = max(len(view.context) for view in request.views)
        if longest + request.sampling.max_tokens > self._capacity:
            raise ContextLengthError(
                f"a prompt of {longest} tokens and a reply of up to {request.sampling.max_tokens} exceed the model's "
                f"context of {self._capacity}; shorten the conversation or lower max-tokens"
            )

    # The worker.

    def _work(self) -> None:
        while not self._closed.is_set():
            self._take_in()
            try:
                self._admit()
                self._read_prompts()
                self._reply()
                self._run_errand()
            except torch.OutOfMemoryError as error:
                self._make_room(error)
            except BaseException as error:  # whatever it was, its cause goes to those it hit, and the worker goes on
                for reply in [*self._replying, *self._reading]:
                    reply.fail(error)
            self._sweep()
        while not self._waiting.empty():
            left = self._waiting.get()
            if left is not None:
                self._next.append(left)
        for reply in [*self._replying, *self._reading, *self._next]:
            reply.close()
        for _, future in self._errands:
            future.set_exception(EngineClosedError("the engine was shut down"))
        self._sweep()

    def _run_errand(self) -> None:
        """The first of what else there is to read; its failure is its caller's."""
        if self._errands:
            errand, future = self._errands.popleft()
            try:
                future.set_result(errand())
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                self._parking.forget()
                future.set_exception(error)
            except BaseException as error:
                failure = EngineError(f"the model could not read the replies: {error}")
                failure.__cause__ = error
                future.set_exception(failure)

    def _take_in(self) -> None:
        """What waits in the queue; sleeps until something does where there is nothing else to do."""
        idle = not (self._replying or self._reading or self._next or self._errands)
        while len(self._next) < self._max_rows:
            try:
                reply = self._waiting.get(block=idle)
            except queue.Empty:
                return
            if reply is None:
                return
            self._next.append(reply)
            idle = False

    def _admit(self) -> None:
        """Give rows to those who wait, in their order, as far as there is room."""
        if not (self._replying or self._reading):
            self._room = min(self._max_rows, 2 * self._room)
        while self._next:
            taken = sum(len(other.rows) for other in (*self._replying, *self._reading))
            if taken and taken + len(self._next[0].request.views) > self._room:
                return
            reply = self._next.popleft()
            self._reading.append(reply)
            for index in range(len(reply.request.views) if reply.begin() else 0):
                self._open(reply, index)

    def _open(self, reply: _Reply, index: int) -> None:
        """Give a view its row, with what is parked for its owner laid into it."""
        view = reply.request.views[index]
        row = self._tables[view.backbone].open(view.adapter, view.head_scale)
        reply.rows.append(row)
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
        read = [reply for reply in alive if not any(row.pending for row in reply.rows)]
        for reply in read:
            self._reading.remove(reply)
            for view, row in zip(reply.request.views, reply.rows, strict=True):
                self._tables[view.backbone].make_ready(row)
        self._replying += read
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
            reply.advance(token)

    def _make_room(self, error: torch.OutOfMemoryError) -> None:
        """Send the younger half back to wait; what cannot be halved fails."""
        active = [reply for reply in (*self._replying, *self._reading) if not reply.done]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._parking.forget()
        if len(active) == 1:
            sizes = ", ".join(str(len(row.cached) + len(row.pending)) for row in active[0].rows)
            failure = EngineError(
                f"out of memory with one request of {len(active[0].rows)} views ({sizes} tokens); shorten the prompt, "
                "load the model in a narrower dtype or quantised, or use a smaller one"
            )
            failure.__cause__ = error
            active[0].fail(failure)
            return
        for reply in reversed(active[len(active) // 2 :]):
            self._close_rows(reply)
            self._next.appendleft(reply)
            if reply in self._reading:
                self._reading.remove(reply)
            else:
                self._replying.remove(reply)
        self._room = sum(len(reply.rows) for reply in (*self._replying, *self._reading))

    def _sweep(self) -> None:
        """Free the rows of what is done, parking those of conversations, and tell the callers."""
        for replies in (self._replying, self._reading):
            for reply in [reply for reply in replies if reply.done]:
                replies.remove(reply)
                if reply.reason is not None and reply.request.owner is not None:
                    self._park(reply, reply.request.owner)
                self._close_rows(reply)
                reply.end()

    def _park(self, reply: _Reply, owner: str) -> None:
        for view, row in zip(reply.request.views, reply.rows, strict=False):
            try:
                states = self._tables[view.backbone].backbone.copy_of(row)
            except torch.OutOfMemoryError:  # what is not parked is read again
                self._parking.forget()
                return
            if self._park_on_cpu:
                states = [(keys.cpu(), values.cpu()) for keys, values in states]
            self._parking.park((owner, view.backbone, view.adapter), row.cached, states)

    def _close_rows(self, reply: _Reply) -> None:
        for view, row in zip(reply.request.views, reply.rows, strict=False):  # fewer rows if it got none so far
            self._tables[view.backbone].close(row)
        reply.rows = []


class _Table:
    """A backbone's rows in the order of its slots: first those that reply, then those that read their prompts, so that
    a step's forward reads neighbouring slots in place.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._rows: list[Row] = []
        self._ready = 0

    def open(self, adapter: str | None, head_scale: Tensor | None) -> Row:
        """A new row behind all others."""
        row = Row(len(self._rows), [], adapter=adapter, head_scale=head_scale)
        self._rows.append(row)
        self.backbone.reserve(len(self._rows), 1)
        return row

    def make_ready(self, row: Row) -> None:
        """Count a row among those that reply."""
        self._swap(row.slot, self._ready)
        self._ready += 1

    def ready(self) -> list[Row]:
        """The rows that reply, in the order of their slots."""
        return self._rows[: self._ready]

    def close(self, row: Row) -> None:
        """Take a row out; its slot is free again."""
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

    def __init__(self, request: Request, generation: Generation) -> None:
        self.request = request
        self.generation = generation
        self.rows: list[Row] = []
        self.said: list[int] = []
        self.reason: FinishReason | None = None
        self.failed = False
        self.kind = (request.combiner, len(request.views), len(request.parameters))
        self._generator = torch.Generator().manual_seed(request.sampling.seed)
        self._uniform: float | None = None

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
        """Tell the caller that no more tokens come."""
        if self.reason is not None:
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

    def close(self) -> None:
        """Tell the caller that the engine was shut down."""
        if not self.done:
            self.failed = True
            self.generation._close()


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
