"""The one-token step as CUDA graphs: recorded once per shape, replayed without Python in between.

Shapes are rounded up, rows to powers of two and positions in use likewise, so that few graphs serve all steps. Rows
that only round up read token 0 and write to the position that every row has to spare.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prefmw.decoding.backbone import Backbone

LEAST_POSITIONS = 256
"""Positions in use are rounded up to this times a power of two."""

WARM_UPS = 2
"""Runs before a recording, in which libraries allocate what they need."""

_recording = threading.Lock()
"""CUDA records one graph at a time in a process."""

_log = logging.getLogger(__name__)


def bucket(count: int, least: int = 1) -> int:
    """``least`` times the smallest power of two that reaches ``count``."""
    size = least
    while size < count:
        size *= 2
    return size


class StaticStep:
    """One token of up to ``rows`` rows over ``used`` positions, on tensors that stay where they are."""

    def __init__(self, backbone: Backbone, rows: int, used: int, adapters: Sequence[str], width: int | None) -> None:
        device = backbone.device
        self._backbone = backbone
        self._used = used
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._at = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._last = torch.zeros(rows, dtype=torch.long, device=device)
        self._gates = [(name, torch.zeros(rows, device=device)) for name in adapters]
        self._scale = None if width is None else torch.ones(rows, width, device=device)

    def load(self, tokens: Tensor, at: Tensor, gates: Sequence[tuple[str, Tensor]], scale: Tensor | None) -> None:
        """Set this step's rows; the others are spare."""
        count = len(tokens)
        self._tokens.zero_()
        self._tokens[:count] = tokens
        self._at.fill_(self._backbone.cache.positions)
        self._at[:count] = at
        for (_, ours), (_, theirs) in zip(self._gates, gates, strict=True):
            ours.zero_()
            ours[:count] = theirs
        if self._scale is not None and scale is not None:
            self._scale.fill_(1.0)
            self._scale[:count] = scale

    def run(self) -> Tensor:
        """Logits of all rows, (rows, V)."""
        self._backbone.cache.aim(range(len(self._tokens)), self._at, self._used)
        return self._backbone.call(self._tokens, self._at, self._used, self._used, self._last, self._gates, self._scale)


class StepGraphs:
    """The graphs of one backbone. Where a model cannot be recorded, a warning says so once and its steps run as they
    are.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._recorded: dict[tuple[object, ...], tuple[StaticStep, torch.cuda.CUDAGraph | None, Tensor]] = {}
        self._pool: Any = None  # one for all graphs: they are replayed one after another, and what they give is copied
        self._works = True

    def clear(self) -> None:
        """Forget all graphs: the cache is about to be allocated anew, and they point at the old one."""
        self._recorded.clear()
        self._pool = None

    def step(
        self, tokens: Tensor, at: Tensor, gates: Sequence[tuple[str, Tensor]], scale: Tensor | None, used: int
    ) -> Tensor:
        """Logits (R, V) after ``tokens`` (R, 1) at positions ``at`` (R, 1) of the first R slots."""
        rows, positions = bucket(len(tokens)), bucket(used, LEAST_POSITIONS)
        self._backbone.reserve(rows, positions)
        names = tuple(name for name, _ in gates)
        key = (rows, positions, names, scale is not None)
        if key not in self._recorded:
            step = StaticStep(self._backbone, rows, positions, names, None if scale is None else scale.shape[1])
            step.load(tokens, at, gates, scale)
            self._recorded[key] = (step, *self._record(step))
        step, graph, logits = self._recorded[key]
        step.load(tokens, at, gates, scale)
        if graph is None:
            logits = step.run()
        else:
            graph.replay()
        return logits[: len(tokens)].clone()

    def _record(self, step: StaticStep) -> tuple[torch.cuda.CUDAGraph | None, Tensor]:
        if not self._works or not torch.cuda.is_available():
            return None, step.run()
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step.run()
            torch.cuda.current_stream().wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile, to load another model say.
            with _recording, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = step.run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._works = False
            _log.warning(
                "%s cannot be recorded as a CUDA graph (%s); its steps run without, more slowly",
                type(self._backbone.model).__name__,
                " ".join(str(error).split())[:200],
            )
            return None, step.run()
        return graph, logits
