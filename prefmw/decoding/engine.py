"""The decode engine: token ids in, token ids out.

It knows views, not methods: a request names the contexts in which one reply is read and the combiner that joins their
next-token logits. It knows no text, no chat template and no user. One worker thread owns the models; callers hand it
requests through a bounded queue and read tokens from a :class:`~prefmw.decoding.generation.Generation`. What the worker
does step by step is :mod:`prefmw.decoding.scheduler`'s.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from prefmw.decoding.active import Active
from prefmw.decoding.backbone import Read
from prefmw.decoding.generation import Generation
from prefmw.decoding.linears import Adapter
from prefmw.decoding.parking import Parking
from prefmw.decoding.reading import Errand, read_all, read_states
from prefmw.decoding.request import BASE, Request
from prefmw.decoding.scheduler import Scheduler, free
from prefmw.decoding.selfcheck import self_check
from prefmw.decoding.table import Table
from prefmw.decoding.threads import dismiss_helpers
from prefmw.decoding.values import token_ids, whole
from prefmw.errors import EngineClosedError, EngineError, EngineOverloadedError, UsageError

MAX_ROWS = 64
"""Views decoded at once; requests beyond them wait."""

_running: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_running() -> None:
    """Shut down what is left open: a thread that computes while the interpreter goes away aborts the process."""
    for engine in list(_running):
        if engine._worker is not None and engine._worker.is_alive():  # not its parent's, in a fork
            engine.close()


class Engine:
    """Decodes requests on one causal language model, or on several for requests whose views read different ones.

    Close it when it is done with, or use it as a context manager: until then it holds its rows' memory, a thread, and
    the hooks that it put on the models.

    Args:
        model: a transformers causal language model, in evaluation mode, on its device; the backbone ``base``.
        capacity: tokens that one view may hold, context and reply together; no more than the model has positions for.
        vocabulary: columns of the logits that are real tokens; padded ones behind them are cut off.
        queue_size: requests that may wait.
        max_rows: views decoded at once.
        parked_bytes: memory for what conversations have read, between two turns.
        park_on_cpu: keep that in the computer's memory rather than the device's.
        pack: on a CPU, copy weights into an order that is read more quickly, where memory is plentiful.

    Raises:
        ModelError: a model whose past cannot be kept in rows.
        UsageError: a number out of its range, or more than the model has.
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
        self._queue_size = whole("queue-size", queue_size, least=1)
        self._max_rows = whole("max-rows", max_rows, least=1)
        self._parking = Parking(whole("parked-bytes", parked_bytes))
        self._pack = pack
        tables = {BASE: Table(model, capacity=capacity, vocabulary=vocabulary, pack=pack)}
        self._scheduler = Scheduler(tables, self._parking, max_rows=max_rows, park_on_cpu=park_on_cpu)
        self._changed = threading.Condition()  # guards the next three
        self._waiting: deque[Active] = deque()
        self._errands: deque[tuple[Errand, Future[list[Tensor]]]] = deque()
        self._closed = False
        self._adding = threading.Lock()
        self._worker: threading.Thread | None = None
        dismiss_helpers()  # of whoever loaded the model, who need not be the one to ask

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_backbone(
        self, name: str, model: Any, *, capacity: int, vocabulary: int, head: nn.Module | None = None
    ) -> None:
        """Let views name a further model, or the same with a ``head`` on its last hidden states; one by that name that
        is there already stays.

        Raises:
            ModelError: a model whose past cannot be kept in rows.
            UsageError: a number out of its range, or more than the model has.
            EngineClosedError: the engine was shut down.
        """
        with self._adding:
            self._check_open()
            if name not in self._tables:
                table = Table(model, capacity=capacity, vocabulary=vocabulary, pack=self._pack, head=head)
                dismiss_helpers()
                self._scheduler.tables = {**self._tables, name: table}  # the worker may be going through the old one

    def add_adapter(self, name: str, adapter: Adapter, *, backbone: str = BASE) -> None:
        """Let views of a backbone be read with a LoRA of that name.

        Raises:
            UsageError: an unknown backbone, no name, or no adapter.
            ModelError: there is one by that name, or it does not fit the backbone.
            EngineClosedError: the engine was shut down.
        """
        with self._adding:
            self._check_open()
            self._table(backbone).add_adapter(name, adapter)

    def ensure_adapter(self, name: str, adapter: Adapter, *, backbone: str = BASE) -> None:
        """:meth:`add_adapter`, unless there is one by that name, which stays.

        Raises:
            UsageError, ModelError, EngineClosedError: as there.
        """
        with self._adding:
            self._check_open()
            table = self._table(backbone)
            if name not in table.backbone.linears.names:
                table.add_adapter(name, adapter)

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
        active = Active(request, self._parking.epoch)
        dismiss_helpers()  # of this thread, beside the worker's
        with self._changed:
            self._begin()
            if len(self._waiting) >= self._queue_size:
                self._leave()
            if len(self._waiting) >= self._queue_size:
                raise EngineOverloadedError(
                    f"the engine's queue is full ({self._queue_size} requests); try again later"
                )
            self._waiting.append(active)
            self._changed.notify_all()
        return active.generation

    def log_probabilities(
        self,
        pairs: Sequence[Read],
        progress: Callable[[float], None] = lambda share: None,
        *,
        backbone: str = BASE,
        adapter: str | None = None,
        head_scale: Tensor | None = None,
    ) -> list[Tensor]:
        """log p of every token of each reply in its context, in nats, (T,) each; waits for it. What reads them is the
        ``backbone`` of that name, with an adapter and a head scale as a view has them.

        The worker reads some of them at a time, between two steps of the replies under way, so those go on.
        ``progress`` is told the share that is read.

        Raises:
            UsageError: a context or a reply is empty, or has tokens that the model does not have.
            ContextLengthError: they exceed the capacity together.
            EngineError: the model failed, for want of memory say; or a combiner asks, whom the worker waits for.
            EngineClosedError: the engine was shut down.
        """
        table = self._table(backbone)
        table.backbone.linears.check(adapter)
        pairs = [(token_ids("a context", context), token_ids("a reply", reply)) for context, reply in pairs]
        for context, reply in pairs:
            table.check_pair(context, reply)
        return read_all(table.backbone, pairs, self._between_steps, progress, adapter, head_scale)

    def last_states(
        self,
        texts: Sequence[Sequence[int]],
        progress: Callable[[float], None] = lambda share: None,
        *,
        backbone: str = BASE,
        adapter: str | None = None,
    ) -> list[Tensor]:
        """The hidden state after the final norm at the last token of each text, (D,), float32; waits for it, as
        :meth:`log_probabilities` does.

        Raises:
            UsageError: a text is empty, or has tokens that the model does not have.
            ContextLengthError: it exceeds the capacity.
            EngineError: the model failed, for want of memory say; or a combiner asks, whom the worker waits for.
            EngineClosedError: the engine was shut down.
        """
        table = self._table(backbone)
        table.backbone.linears.check(adapter)
        texts = [token_ids("a text", text) for text in texts]
        for text in texts:
            table.check_pair(text[:-1], text[-1:])
        return read_states(table.backbone, texts, self._between_steps, progress, adapter)

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
        """Shut down: requests in flight fail with EngineClosedError, the worker ends, the models are left as they were.

        Where a combiner or an advance rule calls it, all that happens once that has returned.
        """
        with self._changed:
            self._closed = True
            worker = self._worker
            self._changed.notify_all()
        if worker is threading.current_thread():
            return
        if worker is not None:
            worker.join()
        self._release()

    @property
    def _tables(self) -> Mapping[str, Table]:
        return self._scheduler.tables

    def _table(self, backbone: object) -> Table:
        if not isinstance(backbone, str) or backbone not in self._tables:
            named = f"'{backbone}'" if isinstance(backbone, str) else f"of type {type(backbone).__name__}"
            raise UsageError(f"no backbone {named} in this engine; there is {', '.join(self._tables)}")
        return self._tables[backbone]

    def _check(self, request: Request) -> None:
        """Raise for a request that does not fit this engine's models."""
        if not isinstance(request, Request):
            raise UsageError(f"what is submitted is a Request, got {type(request).__name__}")
        if not request.views or any(len(view.context) == 0 for view in request.views):
            raise UsageError("a request needs at least one view, and every view at least one token of context")
        if len(request.views) > self._max_rows:
            raise UsageError(f"a request may have up to {self._max_rows} views, got {len(request.views)}")
        for view in request.views:
            self._table(view.backbone).check_view(view, request.sampling.max_tokens)
        # Tokens are sampled by the first view's; those without a rule of their own read them as they are.
        sharing = [view for index, view in enumerate(request.views) if index == 0 or view.advance is None]
        sizes = {self._table(view.backbone).backbone.vocabulary for view in sharing}
        if len(sizes) > 1:
            raise UsageError(
                f"views of vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens share no tokens; give the "
                "views that read another vocabulary than the first an advance rule"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is shut down; build a new one")

    # The queue.

    def _begin(self) -> None:
        """Start the worker, at the first request or at the first after a fork; holding ``_changed``."""
        self._check_open()
        if self._worker is None or not self._worker.is_alive():
            self._scheduler.give_up_rows()  # of a process that this one was forked from
            self._worker = threading.Thread(target=self._work, name="prefmw-engine", daemon=True)
            self._worker.start()
            _running.add(self)

    def _leave(self) -> None:
        """Let those go who were cancelled while they waited; holding ``_changed``."""
        for active in [active for active in self._waiting if active.generation.cancelled]:
            self._waiting.remove(active)
            active.begin()
            active.end()

    def _between_steps(self, errand: Errand) -> list[Tensor]:
        """What ``errand`` returns, done by the worker."""
        future: Future[list[Tensor]] = Future()
        dismiss_helpers()
        with self._changed:
            self._begin()
            if self._worker is threading.current_thread():
                raise EngineError("a combiner cannot have replies read: the engine waits for the combiner")
            self._errands.append((errand, future))
            self._changed.notify_all()
        return future.result()

    # The worker.

    def _work(self) -> None:
        while self._take_in():
            try:
                self._admit()
                self._scheduler.step()
                self._run_errand()
            except torch.OutOfMemoryError as error:
                again = self._scheduler.make_room(error)
                with self._changed:
                    self._waiting.extendleft(reversed(again))
            except BaseException as error:  # whatever it was, its cause goes to those it hit, and the worker goes on
                self._scheduler.start_over(error)
        closed = EngineClosedError("the engine was shut down with this request in flight; start it anew and ask again")
        self._scheduler.start_over(closed)
        with self._changed:
            for active in self._waiting:
                active.fail(closed)
            for _, future in self._errands:
                future.set_exception(closed)
            self._waiting.clear()
            self._errands.clear()
        self._release()

    def _take_in(self) -> bool:
        """Sleep until there is something to do; false where the engine is shut down."""
        with self._changed:
            self._leave()
            while self._scheduler.idle and not (self._waiting or self._errands or self._closed):
                dismiss_helpers()
                self._changed.wait()
            return not self._closed

    def _admit(self) -> None:
        """Give rows to those who wait, in their order, as far as there is room."""
        while True:
            with self._changed:
                if not self._waiting or not self._scheduler.has_room(len(self._waiting[0].request.views)):
                    return
                active = self._waiting.popleft()
                self._scheduler.add(active)
            self._scheduler.open(active)

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
            free(error)
            future.set_exception(error)
        except BaseException as error:
            failure = EngineError(f"the model could not read the replies: {error}")
            failure.__cause__ = error
            future.set_exception(failure)

    def _release(self) -> None:
        """Leave the models as they were; more than once does no harm."""
        with self._adding:
            for table in self._tables.values():
                table.backbone.release()
