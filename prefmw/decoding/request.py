"""What the engine is asked: views, how to combine them, how to sample, when to stop. Token ids and numbers only.

What can be told without a model is checked when one of these is made; that a request fits the engine's models, when it
is submitted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prefmw.alignment import Combiner
from prefmw.decoding.values import number, token_ids, whole, wrong_matrix
from prefmw.errors import UsageError

BASE = "base"
"""The backbone that every engine has."""


@dataclass(frozen=True)
class View:
    """One reading of the reply.

    Attributes:
        context: what stands in front of the reply, as token ids (at least one). A copy is kept.
        backbone: which of the engine's models reads it.
        adapter: the LoRA that it is read with, one that the backbone knows; ``None`` for the model as it is.
        head_scale: (D,), finite floats multiplied into the last hidden state before the head; ``None`` for none.
        advance: what this view reads when a token was sampled, any number of its own tokens; ``None`` for that token.
            The engine's worker calls it once a token, and waits for it.

    Raises:
        UsageError: one of them is of another kind.
    """

    context: Sequence[int]
    backbone: str = BASE
    adapter: str | None = None
    head_scale: Tensor | None = None
    advance: Callable[[int], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", token_ids("a view's context", self.context))
        _require("a view's backbone", self.backbone, str, "a name")
        _require("a view's adapter", self.adapter, str | None, "a name or None")
        if self.advance is not None and not callable(self.advance):
            raise UsageError(f"an advance rule is a function, got {type(self.advance).__name__}")
        if self.head_scale is not None and (got := wrong_matrix(self.head_scale, (None,))) is not None:
            raise UsageError(f"a head scale is a tensor of finite floats of the shape (D,), got {got}")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn and when to stop.

    ``temperature`` 0 is greedy. ``top_p`` up to 1 and ``top_k`` (``None`` for no bound) bound the rule's distribution,
    not the aligned one (:mod:`prefmw.alignment.candidates`). The same ``seed``, up to 2**63 - 1, gives the same reply.

    Raises:
        UsageError: a number out of its range.
    """

    temperature: float
    top_p: float
    top_k: int | None
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        temperature, top_p = number("temperature", self.temperature), number("top-p", self.top_p)
        if temperature != 0 and not 0.01 <= temperature <= 100:
            raise UsageError(f"temperature is 0 (greedy) or lies in [0.01, 100], got {temperature:g}")
        if not 1e-6 <= top_p <= 1:
            raise UsageError(f"top-p lies in [0.000001, 1], got {top_p:g}")
        kept: dict[str, int | float] = {"temperature": temperature, "top_p": top_p}
        if self.top_k is not None:
            kept["top_k"] = whole("top-k", self.top_k, least=1, hint="; leave it out for no bound")
        kept["max_tokens"] = whole("max-tokens", self.max_tokens, least=1)
        kept["seed"] = whole("seed", self.seed)
        for name, value in kept.items():  # Python's own, whatever library they came from
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Request:
    """One reply to decode: its views, the combiner that joins them, and that combiner's parameters for this request.

    Requests of the very same combiner are combined by one call of it, in the engine's worker; so it must not wait for
    the engine. What its views have read is kept for the next request of the same ``owner``, and for nobody else; of a
    request without an owner nothing is kept.

    Raises:
        UsageError: one of them is of another kind.
    """

    views: tuple[View, ...]
    combiner: Combiner
    sampling: Sampling
    parameters: tuple[float, ...] = ()
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    owner: str | None = None

    def __post_init__(self) -> None:
        views = _several("a request's views", self.views)
        for view in views:
            _require("each view of a request", view, View, "a View")
        if not callable(self.combiner):
            raise UsageError(f"a combiner is a function, got {type(self.combiner).__name__}")
        _require("a request's sampling", self.sampling, Sampling, "a Sampling")
        _require("a request's owner", self.owner, str | None, "a name or None")
        parameters = [
            number("a combiner's parameter", one) for one in _several("a request's parameters", self.parameters)
        ]
        object.__setattr__(self, "views", views)
        object.__setattr__(self, "parameters", tuple(parameters))
        object.__setattr__(self, "stop_ids", _stop_ids(self.stop_ids))


def _require(what: str, value: object, kind: type | object, expected: str) -> None:
    if not isinstance(value, kind):  # type: ignore[arg-type]
        raise UsageError(f"{what} is {expected}, got {type(value).__name__}")


def _several(what: str, values: object) -> tuple[object, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray):
        raise UsageError(f"{what} are a tuple, got {type(values).__name__}")
    return tuple(values)


def _stop_ids(ids: object) -> frozenset[int]:
    try:
        if isinstance(ids, Collection):
            return frozenset(map(operator.index, ids))
    except TypeError:
        pass
    raise UsageError(f"stop ids are a set of token ids, got {type(ids).__name__}")
