"""A reply in the making and when it is whole: the text, the plan that steered it, what it cost."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from prefmw.decoding import Generation
from prefmw.errors import EngineError, PrefmwError
from prefmw.models import Detokenizer
from prefmw.plans import Plan


@dataclass(frozen=True)
class Timing:
    """Seconds: ``load_s`` for weights and tokenizer (0 but for a personalizer's first reply), prefill, decoding."""

    load_s: float
    prefill_s: float
    decode_s: float
    ms_per_token: float | None


@dataclass(frozen=True)
class Reply:
    """A finished reply and all that was applied to it. ``user_id`` is ``None`` where it is for nobody in particular."""

    text: str
    user_id: str | None
    model: str
    plan: Plan
    finish_reason: str
    input_tokens: int
    output_tokens: int
    timing: Timing
    notices: tuple[str, ...] = ()
    conversation_id: str | None = None
    turn_id: int | None = None
    token_ids: tuple[int, ...] = ()
    not_recorded: str | None = None
    """Why the store did not take the turn, where it was to be recorded and was not."""

    def as_json(self) -> dict[str, Any]:
        """The reply as ``prefmw chat --json`` prints it."""
        return {
            "text": self.text,
            "user": self.user_id,
            "model": self.model,
            "method": self.plan.method,
            "strength": self.plan.strength,
            "candidate": self.plan.candidate,
            "persrm": self.plan.persrm,
            "dpa": self.plan.dpa,
            "robust": self.plan.robust,
            "seed": self.plan.sampling.seed,
            "finish_reason": self.finish_reason,
            "usage": {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens},
            "preferences": {
                "revision": self.plan.revision,
                "weights": {key: weight.as_json() for key, weight in self.plan.weights.items()},
                "principle": self.plan.principle,
                "dials": {dial.dimension: dial.as_json() for dial in self.plan.dials},
                "left_out": list(self.plan.left_out),
                "direction": None if self.plan.direction is None else self.plan.direction.as_json(),
            },
            "timing": {name: value if value is None else round(value, 4) for name, value in vars(self.timing).items()},
            "conversation": self.conversation_id,
            "turn": self.turn_id,
            "not_recorded": self.not_recorded,
            "notices": list(self.notices),
        }


_open: weakref.WeakSet[ReplyStream] = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    """Record what a program leaves in the making when it ends: later, generators are closed among ruins."""
    for stream in list(_open):
        stream.close()


class ReplyStream:
    """A reply in the making: iterate it for pieces of text, then read ``reply``.

    Use it as a context manager. However its block is left, at the end, by ``break``, by Ctrl-C, by an exception of
    the reader or by the end of the program, the engine is freed and the reply, perhaps partial and then marked
    ``interrupted`` (``error`` where the engine failed), is recorded.
    """

    def __init__(
        self,
        generation: Generation,
        detokenizer: Detokenizer,
        draft: Reply,
        record: Callable[[Reply, Sequence[int]], Reply],
    ) -> None:
        self._generation = generation
        self._detokenizer = detokenizer
        self._record = record
        self._ids: list[int] = []
        self._ended = False
        self._ending = threading.Lock()
        self.reply = draft
        """What is known so far; whole once the stream has ended."""

    def __iter__(self) -> Iterator[str]:
        if self._ended:
            return
        for token in self._generation:
            self._ids.append(token)
            if piece := self._detokenizer.push(token):
                yield piece
            if self._detokenizer.stopped:
                self._end("stop")
                return
        if piece := self._detokenizer.finish():
            yield piece
        self._end("stop" if self._detokenizer.stopped else self._generation.finish_reason or "interrupted")

    def cancel(self) -> None:
        """Ask for no more of it: the iteration ends at the next token. Safe from any thread."""
        self._generation.cancel()

    def close(self, finish_reason: str = "interrupted") -> None:
        """End it here, unless it has ended: free the engine and record what there is."""
        if not self._ended:
            self._detokenizer.finish()
            self._end(finish_reason)

    def __enter__(self) -> ReplyStream:
        _open.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("error" if isinstance(error, EngineError) else "interrupted")

    def _end(self, finish_reason: str) -> None:
        """Free the engine and record the turn, once. A store that fails costs the record, never the reply."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
        _open.discard(self)
        self._generation.cancel()
        steps = len(self._ids) - 1
        decode_s = self._generation.decode_s
        self.reply = replace(
            self.reply,
            text=self._detokenizer.text,
            finish_reason="interrupted" if finish_reason == "cancelled" else finish_reason,
            output_tokens=len(self._ids),
            token_ids=tuple(self._ids),
            timing=Timing(
                load_s=self.reply.timing.load_s,
                prefill_s=self._generation.prefill_s,
                decode_s=decode_s,
                ms_per_token=1000 * decode_s / steps if steps > 0 else None,
            ),
        )
        try:
            self.reply = self._record(self.reply, self._ids)
        except PrefmwError as error:
            self.reply = replace(self.reply, not_recorded=str(error))
