"""The decode engine: token ids in, token ids out.

It knows views, not methods: a request names the contexts in which one reply is read and the combiner that joins their
next-token logits. It knows no text, no chat template and no user. One worker thread owns the model; callers hand it
requests through a bounded queue and read tokens from a :class:`~prefmw.decoding.generation.Generation`.

Inside, for now: requests that wait together are decoded together, and nobody joins before they are done. All views of
all of them are rows of one forward per step, left-padded to one length, over transformers' own key-value cache.

Shapes: R requests, K views each, T time, V vocabulary, P parameters.
"""

from __future__ import annotations

import inspect
import queue
import threading
from typing import Any

import torch
from torch import Tensor

from prefmw.alignment import Combined
from prefmw.decoding.generation import FinishReason, Generation
from prefmw.decoding.request import Request
from prefmw.decoding.sampling import draw
from prefmw.errors import ContextLengthError, EngineClosedError, EngineError, EngineOverloadedError, UsageError

TOGETHER = 32
"""The most requests that are decoded at once."""

_Job = tuple[Request, Generation]


class Engine:
    """Decodes requests on one causal language model.

    Args:
        model: a transformers causal language model, in evaluation mode, on its device.
        capacity: tokens that one view may hold, context and reply together.
        vocabulary: columns of the logits that are real tokens; padded ones behind them are cut off.
        queue_size: requests that may wait.
    """

    def __init__(self, model: Any, *, capacity: int, vocabulary: int, queue_size: int = 256) -> None:
        self._model = model
        self._capacity = capacity
        self._vocabulary = vocabulary
        self._device = model.get_input_embeddings().weight.device
        self._accepts = inspect.signature(model.forward).parameters
        self._waiting: queue.Queue[_Job | None] = queue.Queue(maxsize=queue_size)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def submit(self, request: Request) -> Generation:
        """Queue a request and return at once.

        Raises:
            UsageError: no view, or an empty context.
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
                self._waiting.put_nowait((request, generation))
            except queue.Full as error:
                size = self._waiting.maxsize
                raise EngineOverloadedError(f"the engine's queue is full ({size} requests); try again later") from error
            if self._worker is None or not self._worker.is_alive():  # the first request, or the first after a fork
                self._worker = threading.Thread(target=self._work, name="prefmw-engine", daemon=True)
                self._worker.start()
        return generation

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

    def _check(self, request: Request) -> None:
        if not request.views or any(len(view.context) == 0 for view in request.views):
            raise UsageError("a request needs at least one view, and every view at least one token of context")
        longest = max(len(view.context) for view in request.views)
        if longest + request.sampling.max_tokens > self._capacity:
            raise ContextLengthError(
                f"a prompt of {longest} tokens and a reply of up to {request.sampling.max_tokens} exceed the model's "
                f"context of {self._capacity}; shorten the conversation or lower max-tokens"
            )

    def _work(self) -> None:
        while not self._closed.is_set():
            waiting = self._gather()
            while waiting and not self._closed.is_set():
                rows, waiting = self._together(waiting)
                self._run(rows)
            for row in waiting:
                row.close()
        while not self._waiting.empty():
            job = self._waiting.get()
            if job is not None:
                job[1]._close()

    def _gather(self) -> list[_Row]:
        """What waits and was not cancelled, up to the number decoded at once; waits for the first."""
        jobs = [self._waiting.get()]
        while len(jobs) < TOGETHER:
            try:
                jobs.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return [_Row(*job, self._device) for job in jobs if job is not None]

    def _together(self, waiting: list[_Row]) -> tuple[list[_Row], list[_Row]]:
        """The first of ``waiting`` with all that can be decoded with it, and the rest: requests of one combiner and one
        number of views, whose longest context and longest reply together stay within the capacity.
        """
        chosen: list[_Row] = []
        rest: list[_Row] = []
        for row in waiting:
            width = max(one.width for one in (*chosen, row)) + max(one.room for one in (*chosen, row))
            alike = not chosen or row.kind == chosen[0].kind
            (chosen if alike and (not chosen or width <= self._capacity) else rest).append(row)
        return chosen, rest

    def _run(self, rows: list[_Row]) -> None:
        """Decode ``rows`` together. Where that fails, each goes on alone from where it was, so that an exception
        reaches its owner and nobody else.
        """
        error = self._attempt(rows)
        left = [row for row in rows if not row.done]
        if error is not None and len(left) == 1:
            left[0].fail(error)
        elif error is not None:
            del error  # and with it what its traceback keeps in memory
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            for row in left:
                self._run([row])

    def _attempt(self, rows: list[_Row]) -> BaseException | None:
        """Decode ``rows`` together to their ends; what stopped that, if anything did."""
        try:
            self._decode([row for row in rows if row.begin()])
        except BaseException as error:
            return error
        return None

    @torch.inference_mode()
    def _decode(self, rows: list[_Row]) -> None:
        """All views of all requests in one forward per step; ``rows`` are of one kind."""
        tokens, mask = _left_padded([context for row in rows for context in row.contexts()], self._device)
        cache: Any = None
        while rows:
            count = len(rows[0].request.views)
            logits, cache = self._forward(tokens, mask, cache)  # (R * K, V)
            parameters = torch.tensor([row.request.parameters for row in rows], dtype=torch.float32)  # (R, P)
            combined = rows[0].request.combiner(
                logits.view(len(rows), count, -1), parameters.to(self._device)
            )  # (R, V) twice
            for index, row in enumerate(rows):
                if self._closed.is_set():
                    row.close()
                else:
                    row.step(Combined(combined.logits[index : index + 1], combined.rule[index : index + 1]))
            kept = [index for index, row in enumerate(rows) if not row.done]
            if len(kept) < len(rows):
                rows = [rows[index] for index in kept]
                views = torch.tensor(
                    [index * count + view for index in kept for view in range(count)], dtype=torch.long
                )
                mask = mask[views.to(self._device)]
                cache.reorder_cache(views.to(self._device))
            tokens = torch.tensor([row.said[-1] for row in rows], dtype=torch.long, device=self._device)
            tokens = tokens.repeat_interleave(count).unsqueeze(1)  # (R * K, 1)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last of ``tokens`` (R * K, new), ``mask`` being over all so far (R * K, T): (R * K, V)."""
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in self._accepts:
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            inputs["position_ids"] = positions[:, -tokens.shape[1] :]
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1
        try:
            output = self._model(**inputs)
        except torch.OutOfMemoryError as error:
            rows, length = mask.shape
            raise EngineError(
                f"out of memory with {rows} views of {length} tokens; shorten the prompt, load the model in a narrower "
                f"dtype or quantised, or use a smaller one"
            ) from error
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            kind = type(self._model).__name__
            raise EngineError(f"{kind} keeps no key-value cache, which decoding needs; choose an attention-based model")
        return output.logits[:, -1, : self._vocabulary].float(), cache


class _Row:
    """One request in the making: what it has said, and the generator that goes on from there."""

    def __init__(self, request: Request, generation: Generation, device: torch.device) -> None:
        self.request = request
        self.generation = generation
        self.said: list[int] = []
        self.done = False
        self.kind = (request.combiner, len(request.views), len(request.parameters))
        self.width = max(len(view.context) for view in request.views)
        self.room = request.sampling.max_tokens
        self._generator = torch.Generator(device=device).manual_seed(request.sampling.seed)

    def contexts(self) -> list[list[int]]:
        """What stands in front of the next token, a view each."""
        return [[*view.context, *self.said] for view in self.request.views]

    def begin(self) -> bool:
        """Whether there is anything to do."""
        if self.generation.started_at is None:
            self.generation._start()
        if self.generation.cancelled and not self.done:
            self._finish("cancelled")
        return not self.done

    def step(self, combined: Combined) -> None:
        """Draw the next token from logits (1, V)."""
        try:
            if self.generation.cancelled:
                return self._finish("cancelled")
            token = draw(combined, self.request.sampling, self._generator)
            self.generation._drew()
            if token in self.request.stop_ids:
                return self._finish("stop")
            self.said.append(token)
            self.generation._emit(token)
            if len(self.said) == self.room:
                self._finish("length")
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` to the caller."""
        self.done = True
        self.generation._fail(error)

    def close(self) -> None:
        """Tell the caller that the engine was shut down."""
        self.done = True
        self.generation._close()

    def _finish(self, reason: FinishReason) -> None:
        self.done = True
        self.generation._finish(reason)


def _left_padded(contexts: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Contexts as one tensor of tokens and its attention mask, (K, T) each, padded on the left with token 0."""
    length = max(len(context) for context in contexts)
    tokens = torch.zeros((len(contexts), length), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, context in enumerate(contexts):
        tokens[row, length - len(context) :] = torch.as_tensor(list(context))
        mask[row, length - len(context) :] = 1
    return tokens.to(device), mask.to(device)
