"""What the engine is asked: views, how to combine them, how to sample, when to stop. Token ids and numbers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prefmw.alignment import Combiner
from prefmw.errors import UsageError

MAX_SEED = 2**63 - 1


BASE = "base"
"""The backbone that every engine has."""


@dataclass(frozen=True)
class View:
    """One reading of the reply.

    Attributes:
        context: what stands in front of the reply, as token ids (at least one).
        backbone: which of the engine's models reads it.
        adapter: the LoRA that it is read with, one that the backbone knows; ``None`` for the model as it is.
        head_scale: (D,), multiplied into the last hidden state before the head; ``None`` for none.
        advance: what this view reads when a token was sampled, any number of its own tokens; ``None`` for that token.
    """

    context: Sequence[int]
    backbone: str = BASE
    adapter: str | None = None
    head_scale: Tensor | None = None
    advance: Callable[[int], Sequence[int]] | None = None


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn and when to stop.

    ``temperature`` 0 is greedy. ``top_p`` up to 1 and ``top_k`` (``None`` for no bound) bound the rule's distribution,
    not the aligned one (:mod:`prefmw.alignment.candidates`). The same ``seed`` gives the same reply.
    """

    temperature: float
    top_p: float
    top_k: int | None
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seed", "top_k"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole and not (name == "top_k" and value is None):
                raise UsageError(f"{name.replace('_', '-')} is a whole number, got {type(value).__name__}")
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), int | float):
                got = type(getattr(self, name)).__name__
                raise UsageError(f"{name.replace('_', '-')} is a number, got {got}")
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise UsageError(f"temperature is 0 (greedy) or lies in [0.01, 100], got {self.temperature:g}")
        if not 1e-6 <= self.top_p <= 1:
            raise UsageError(f"top-p lies in [0.000001, 1], got {self.top_p:g}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k is at least 1, got {self.top_k}; leave it out for no bound")
        if self.max_tokens < 1:
            raise UsageError(f"max-tokens is at least 1, got {self.max_tokens}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"seed lies in [0, {MAX_SEED}], got {self.seed}")


@dataclass(frozen=True)
class Request:
    """One reply to decode: its views, the combiner that joins them, and that combiner's parameters for this request.

    What its views have read is kept for the next request of the same ``owner``, and for nobody else; of a request
    without an owner nothing is kept.
    """

    views: tuple[View, ...]
    combiner: Combiner
    sampling: Sampling
    parameters: tuple[float, ...] = ()
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    owner: str | None = None
