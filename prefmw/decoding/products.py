"""Quick products of few rows on a CPU, where a token's have a row a view.

The libraries behind ``nn.Linear`` are made for many rows: of few they read weights at a quarter of the speed of memory.
There are two ways round it, and which is the quickest for which number of rows is measured when a model comes, in its
own type and size:

- *turned*: W x^T in place of x W^T; costs nothing.
- *packed*: oneDNN's product with a copy of the weights in the order that its kernels read them; costs that copy, so it
  is made where memory is plentiful.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

FEW = (1, 2, 3, 4, 8, 16, 64)
"""Numbers of rows for which ways are compared; one in between goes like the next."""

MEASURED = 1 << 24
"""Weights that are timed to find out, at most: 64 MB of float32."""

PACKED_SHARE = 0.25
"""Of the memory that is free, what packed copies of a model's weights may take at most."""

PACKED_FOR = 16
"""Rows for which oneDNN chooses its order of weights: for one row it takes another, which is slow for more."""

Way = Literal["plain", "turned", "packed"]


def turned_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b computed as (W x^T)^T. One row is read twice, since products with a single vector may run on one core
    alone.

    The result is laid out as the plain product's; what reads it, fused attention say, is slow or falls back otherwise.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    columns = (torch.cat([flat, flat]) if rows == 1 else flat).t()
    y = torch.mm(weight, columns).t()[:rows].contiguous().reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def pack(weight: Tensor) -> Tensor:
    """A copy of weights (out, in) in oneDNN's own order, for :func:`packed_product` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
    return packed


_packing = threading.Lock()
_packs: weakref.WeakKeyDictionary[nn.Linear, tuple[Tensor, int]] = weakref.WeakKeyDictionary()
"""Packed weights of layers, and how many engines read them."""


def take_packed(layer: nn.Linear) -> Tensor:
    """A layer's packed weights, which all who take them share until as many have dropped them."""
    with _packing:
        packed, readers = _packs[layer] if layer in _packs else (pack(layer.weight.detach()), 0)
        _packs[layer] = packed, readers + 1
    return packed


def drop_packed(layer: nn.Linear) -> None:
    """Undo :func:`take_packed`."""
    with _packing:
        packed, readers = _packs.pop(layer)
        if readers > 1:
            _packs[layer] = packed, readers - 1


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with weights from :func:`pack`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def quickest_ways(layers: Sequence[nn.Linear], pack: bool) -> tuple[Way, ...]:
    """The quickest way for each number of rows, from 0, by measurement on as many weights as the model has of its
    largest shape, so that they lie in the caches or not as they will.
    """
    weights = [layer.weight for layer in layers]
    largest = max((w for w in weights if w.numel() <= MEASURED), key=Tensor.numel, default=None)
    if largest is None or largest.device.type != "cpu" or not largest.is_floating_point():
        return ("plain",)
    count = min(sum(weight.shape == largest.shape for weight in weights), MEASURED // largest.numel())
    ways: list[Way] = ["plain", "turned"]
    alike = all(weight.dtype == largest.dtype and weight.device == largest.device for weight in weights)
    new = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers if layer not in _packs)
    if pack and alike and can_pack(largest.dtype) and new <= PACKED_SHARE * free_memory():
        ways.append("packed")
    quickest = _quickest(tuple(ways), count, *largest.shape, largest.dtype, torch.get_num_threads())
    return tuple(
        next(way for most, way in zip(FEW, quickest, strict=True) if rows <= most) for rows in range(FEW[-1] + 1)
    )


@functools.cache
def _quickest(
    ways: tuple[Way, ...], count: int, rows_out: int, rows_in: int, dtype: torch.dtype, threads: int
) -> tuple[Way, ...]:
    """For each number of rows among :data:`FEW`; what costs less is kept unless another takes a tenth less time."""
    quickest: list[Way] = []
    with torch.inference_mode():
        weights = [torch.ones(rows_out, rows_in, dtype=dtype) for _ in range(count)]
        packed = [pack(weight) for weight in weights] if "packed" in ways else []
        works: dict[Way, Callable[[Tensor], object]] = {
            "plain": lambda x: [nn.functional.linear(x, weight) for weight in weights],
            "turned": lambda x: [turned_product(x, weight, None) for weight in weights],
            "packed": lambda x: [packed_product(x, weight, None) for weight in packed],
        }
        for rows in FEW:
            seconds = _seconds([works[way] for way in ways], torch.ones(1, rows, rows_in, dtype=dtype))
            best = 0
            for index in range(1, len(ways)):
                if seconds[index] < 0.9 * seconds[best]:
                    best = index
            quickest.append(ways[best])
    return tuple(quickest)


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have packed products of a type."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with torch.inference_mode():
            packed_product(torch.ones(1, 1, 64, dtype=dtype), pack(torch.ones(64, 64, dtype=dtype)), None)
    except (AttributeError, RuntimeError):
        return False
    return True


def free_memory() -> int:
    """Bytes that this process may still take, as far as the system tells; 0 where it does not."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0
    try:  # a container's own bound
        group = Path("/sys/fs/cgroup")
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        bound = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        bound += int(told["inactive_file"])  # pages of files, which make room
    except (OSError, KeyError, ValueError):
        return free
    return min(free, bound)


def _seconds(works: Sequence[Callable[[Tensor], object]], x: Tensor, rounds: int = 5) -> list[float]:
    """The least time that each took, in turn, so that a busy moment of the machine hits all alike; who took twice the
    time of another in the second round is asked no more.
    """
    least = [float("inf")] * len(works)
    for number in range(rounds):
        for index, work in enumerate(works):
            if number < 2 or least[index] < 2 * min(least):
                started = time.perf_counter()
                work(x)
                least[index] = min(least[index], time.perf_counter() - started)
    return least
