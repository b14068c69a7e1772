"""The decode engine: token ids in, token ids out.

It knows views, not methods: a request names the contexts in which one reply is read and the combiner that joins their
next-token logits. It knows no text, no chat template and no user. One worker thread owns the model; callers hand it
requests through a bounded queue and read tokens from a :class:`~prefmw.decoding.generation.Generation`.

Inside, for now, one request at a time: all its views are rows of one forward per step, left-padded to one length, over
transformers' own key-value cache.

Shapes: K views, T time, V vocabulary.
"""

from __future__ import annotations

import inspect
import queue
import threading
from typing import Any

import torch
from torch import Tensor

from prefmw.decoding.generation import FinishReason, Generation
from prefmw.decoding.request import Request
from prefmw.decoding.sampling import draw
from prefmw.errors import ContextLengthError, EngineClosedError, EngineError, EngineOverloadedError, UsageError


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
        self._waiting: queue.Queue[tuple[Request, Generation] | None] = queue.Queue(maxsize=queue_size)
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
            job = self._waiting.get()
            if job is None:
                continue
            request, generation = job
            try:
                generation._start()
                reason = self._decode(request, generation)
            except BaseException as error:
                generation._fail(error)
            else:
                if reason is None:
                    generation._close()
                else:
                    generation._finish(reason)
        while not self._waiting.empty():
            job = self._waiting.get()
            if job is not None:
                job[1]._close()

    @torch.inference_mode()
    def _decode(self, request: Request, generation: Generation) -> FinishReason | None:
        """Decode one request to its end; ``None`` if the engine was closed under it."""
        sampling = request.sampling
        generator = torch.Generator(device=self._device).manual_seed(sampling.seed)
        parameters = torch.tensor([request.parameters], dtype=torch.float32, device=self._device)  # (1, P)
        tokens, mask = _left_padded([view.context for view in request.views], self._device)  # (K, T) each
        cache: Any = None
        for count in range(1, sampling.max_tokens + 1):
            if self._closed.is_set():
                return None
            if generation.cancelled:
                return "cancelled"
            logits, cache = self._forward(tokens, mask, cache)  # (K, V)
            combined = request.combiner(logits.unsqueeze(0), parameters)  # (1, V)
            token = draw(combined, sampling, generator)
            generation._drew()
            if token in request.stop_ids:
                return "stop"
            generation._emit(token)
            if count < sampling.max_tokens:
                tokens = torch.full((len(request.views), 1), token, device=self._device)
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        return "length"

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last of ``tokens`` (K, new), ``mask`` being over all so far (K, T): (K, V), float32."""
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


def _left_padded(contexts: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Contexts as one tensor of tokens and its attention mask, (K, T) each, padded on the left with token 0."""
    length = max(len(context) for context in contexts)
    tokens = torch.zeros((len(contexts), length), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, context in enumerate(contexts):
        tokens[row, length - len(context) :] = torch.as_tensor(list(context))
        mask[row, length - len(context) :] = 1
    return tokens.to(device), mask.to(device)
