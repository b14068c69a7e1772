"""What callers hand in, told from what it may be taken for. The same checks hold wherever a number, token ids or a
matrix come from: a request, an advance rule, an engine's own options.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from prefmw.errors import UsageError

MOST = 2**63 - 1
"""The largest whole number that tensors and databases hold."""


def whole(name: str, value: object, *, least: int = 0, hint: str = "") -> int:
    """``value``, if it is a whole number from ``least`` to :data:`MOST`; a ``hint`` ends the message if not.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} is a whole number, got {type(value).__name__}")
    value = int(value)
    if not least <= value <= MOST:
        got = value if abs(value) <= MOST else f"one of {value.bit_length()} bits"
        bound = f"at least {least}" if value < least else f"at most {MOST}"
        raise UsageError(f"{name} is {bound}, got {got}{hint}")
    return value


def number(name: str, value: Any) -> float:
    """``value`` as a float, an infinite one where it is too large for that.

    Raises:
        UsageError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # an int, then


def token_ids(what: str, ids: object) -> list[int]:
    """A copy of ``ids``, if they are a sequence of whole numbers.

    Raises:
        UsageError: they are not.
    """
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray):
        raise UsageError(f"{what} is a list of token ids, got {_kind(ids)}")
    try:
        return list(map(operator.index, ids))
    except TypeError as error:
        wrong = next(type(token).__name__ for token in ids if not hasattr(token, "__index__"))
        raise UsageError(f"{what} is a list of token ids, whole numbers; got one of type {wrong}") from error


def wrong_matrix(value: object, shape: tuple[int | None, ...]) -> str | None:
    """What ``value`` is instead of a dense, finite tensor of floats of that shape, ``None`` standing for any size;
    ``None`` if it is one.
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        return "a tensor on no device" if value.is_meta else "a tensor that is not dense"
    if not value.is_floating_point():
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    if len(shape) != value.ndim or any(size not in (None, got) for size, got in zip(shape, value.shape, strict=True)):
        return str(tuple(value.shape))
    return None if bool(value.float().isfinite().all()) else "NaN or infinity in it"


def _kind(value: object) -> str:
    hint = "; its tolist() gives one" if hasattr(value, "tolist") else ""
    return f"{type(value).__name__}{hint}"
