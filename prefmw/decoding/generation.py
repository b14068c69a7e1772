"""The caller's end of one request: an iterator of token ids that can be cancelled, fed by the engine's worker."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Literal

from prefmw.errors import EngineError, PrefmwError, UsageError

FinishReason = Literal["stop", "length", "cancelled"]


class Generation:
    """A reply in the making. Iterate it for token ids; leaving its ``with`` block cancels what is left.

    It is read once, from any thread: a later iteration goes on where the last one stopped. Who reads while another
    thread waits for the next token gets a UsageError; each token goes to one reader.

    ``finish_reason`` is set once the iteration ends: ``stop`` (an end token, which is not among the ids), ``length``
    (max_tokens reached) or ``cancelled``. An exception of the engine is raised to whoever iterates.
    """

    def __init__(self) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_id: int | None = None  # the end token that came, if one did
        self.started_at: float | None = None  # seconds on time.perf_counter(), likewise below
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self._events: queue.SimpleQueue[int | FinishReason | PrefmwError] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._read = threading.Lock()  # by one at a time
        self._process = os.getpid()

    def cancel(self) -> None:
        """Ask the engine to stop; the iteration ends at the next token. Safe from any thread, more than once."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled.is_set()

    @property
    def prefill_s(self) -> float:
        """Seconds from the first work on the request to its first token, queueing apart; 0 if it never came."""
        return _span(self.started_at, self.first_token_at)

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the end, or until now."""
        return _span(self.first_token_at, self.ended_at or time.perf_counter())

    def __iter__(self) -> Iterator[int]:
        while (token := self._next()) is not None:
            yield token

    def _next(self) -> int | None:
        """The next token; ``None`` where the reply has ended."""
        if os.getpid() != self._process:
            raise EngineError("this reply is made in the process that this one was forked from; ask for one of its own")
        if not self._read.acquire(blocking=False):
            raise UsageError(
                "this reply is being read by another thread; read it in one place, and hand its tokens on from there"
            )
        try:
            event = self._events.get() if self.finish_reason is None else None
            if event is None or isinstance(event, int):
                return event
            self.finish_reason = "cancelled" if isinstance(event, PrefmwError) else event
        finally:
            self._read.release()
        if isinstance(event, PrefmwError):
            raise event
        return None

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    # The worker's side.

    def _start(self) -> None:
        self.started_at = time.perf_counter()

    def _drew(self) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()

    def _emit(self, token: int) -> None:
        self._events.put(token)

    def _finish(self, reason: FinishReason) -> None:
        self.ended_at = time.perf_counter()
        self._events.put(reason)

    def _fail(self, error: BaseException) -> None:
        self.ended_at = time.perf_counter()
        if not isinstance(error, PrefmwError):
            wrapped = EngineError(f"decoding failed: {type(error).__name__}: {_one_line(error)}")
            wrapped.__cause__ = error
            error = wrapped
        self._events.put(error)


def _span(start: float | None, end: float | None) -> float:
    return end - start if start is not None and end is not None else 0.0


def _one_line(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:300]
    except BaseException:  # its own text fails
        return "without a message that can be read"
