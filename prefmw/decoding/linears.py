"""A model's linear layers, with what the engine adds to them: LoRA by row, and quick products of few rows on a CPU.

Both are put on ``nn.Linear`` instances by their ``forward`` attribute and act in the engine's own forwards alone, so
whoever else uses the model gets what its own code and weights give. :meth:`GatedLinears.release` takes them off again.

On a CPU a token's products have a row a view, and the libraries behind ``nn.Linear`` are made for many rows: they read
weights at a quarter of the speed of memory. There are two ways round it, and which is the quickest for which number of
rows is measured when a model comes, in its own type and size:

- *turned*: W x^T in place of x W^T; costs nothing.
- *packed*: oneDNN's product with a copy of the weights in the order that its kernels read them; costs that copy, so it
  is made where memory is plentiful.

Shapes: R rows of one forward, N tokens a row, r LoRA rank.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prefmw.errors import ModelError

FEW = (1, 2, 3, 4, 8, 16, 64)
"""Numbers of rows for which ways are compared; one in between goes like the next."""

MEASURED = 1 << 24
"""Weights that are timed to find out, at most: 64 MB of float32."""

PACKED_SHARE = 0.25
"""Of the memory that is free, what packed copies of a model's weights may take at most."""

PACKED_FOR = 16
"""Rows for which oneDNN chooses its order of weights: for one row it takes another, which is slow for more."""

Way = Literal["plain", "turned", "packed"]
Forward = Callable[[Tensor], Tensor]


class _Matrices(NamedTuple):
    """A LoRA of one layer: its A^T (in, r) stands in ``place`` among the columns of ``down``, of ``ranks`` each, which
    layers that may read the same input share, since a handful of small products is what a LoRA costs; ``up`` is B^T
    (r, out).
    """

    down: Tensor
    ranks: list[int]
    place: int
    up: Tensor


class _Inner(NamedTuple):
    """x ``down`` of the rows that are read with an adapter, split by layer, for the input that was read last."""

    x: Tensor
    down: Tensor
    parts: tuple[Tensor, ...]


class _InUse(NamedTuple):
    """An adapter in a forward: of ``among`` rows R those that are read with it. On a device where shapes are recorded
    ``rows`` are all of them, and ``gate`` (R, 1, 1) is 0 for those that are not.
    """

    adapter: str
    among: int
    rows: slice | Tensor
    gate: Tensor | None


class _UnderWay(threading.local):
    def __init__(self) -> None:
        self.on = False
        self.adapters: Sequence[_InUse] = ()
        self.inner: dict[str, _Inner] = {}


@dataclass(frozen=True)
class Adapter:
    """A LoRA: for linear layers by their module name, A (r, in) and B (out, r), B already scaled by alpha / r."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]


class GatedLinears:
    """The linear layers of one model; ``under_way`` says whether this thread's forward is the engine's, and with which
    adapters.

    Where ``pack`` allows copies, weights are taken as they are when this is built: they do not follow a training.

    ``y = W x + gate[row] * B (A x)`` with a gate of 1 for rows that are read with the adapter and 0 for the others, so
    rows with different adapters, or none, share one forward and one product with W.
    """

    def __init__(self, model: nn.Module, *, pack: bool = True) -> None:
        self._layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self._adapters: dict[str, dict[str, _Matrices]] = {}  # by name and layer
        self._put_on: dict[str, tuple[Forward, Forward | None]] = {}  # our forwards, and those that they stand before
        self._foreign: dict[str, Forward | None] = {}  # of the latter, the first that is no other engine's
        self._device = next(model.parameters()).device
        self._released = False
        self.under_way = _UnderWay()
        quick = {name: layer for name, layer in self._layers.items() if _is_plain(name, layer)}
        self._ways = _quickest_ways(list(quick.values()), pack)
        self._packed = {name: _take_packed(layer) for name, layer in quick.items()} if "packed" in self._ways else {}
        self._quick = quick if set(self._ways) != {"plain"} else {}
        self._put(self._quick)

    def add(self, name: str, adapter: Adapter) -> None:
        """Make an adapter known under a name.

        Raises:
            ModelError: there is one by that name, it names a layer that the model lacks, or shapes do not fit.
        """
        if name in self._adapters:  # what was read with it could not be told from what is read with another
            raise ModelError(f"there is an adapter '{name}' on this model already; give this one another name")
        for layer, (down, up) in adapter.matrices.items():
            linear = self._layers.get(layer)
            if linear is None:
                raise ModelError(f"the adapter '{name}' changes '{layer}', which this model does not have")
            fits = down.shape[1] == linear.in_features and up.shape[0] == linear.out_features
            if not fits or down.shape[0] != up.shape[1]:
                raise ModelError(
                    f"the adapter '{name}' does not fit '{layer}' ({linear.out_features} x {linear.in_features}): "
                    f"{tuple(up.shape)} x {tuple(down.shape)}"
                )
        self._adapters[name] = _side_by_side(adapter, self._layers)
        self._put({layer: self._layers[layer] for layer in adapter.matrices})

    def check(self, adapter: str | None) -> None:
        """Raise ModelError for an adapter that is not known."""
        if adapter is not None and adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise ModelError(f"no adapter '{adapter}' on this model; there is {known}")

    def gates(self, rows: Sequence[str | None]) -> list[tuple[str, Tensor]]:
        """For rows read with these adapters: each adapter in use with its gates, (R,), on the model's device.

        Raises:
            ModelError: an unknown adapter.
        """
        names = sorted({name for name in rows if name is not None})
        for name in names:
            self.check(name)
        return [(name, torch.tensor([float(row == name) for row in rows], device=self._device)) for name in names]

    def begin(self, gates: Sequence[tuple[str, Tensor]]) -> None:
        """From here on to :meth:`end` this thread's forward is the engine's, with these adapters."""
        self.under_way.adapters = [_in_use(name, gate) for name, gate in gates]
        self.under_way.on = True

    def end(self) -> None:
        """Undo :meth:`begin`."""
        self.under_way.on, self.under_way.adapters = False, ()
        self.under_way.inner.clear()

    def packed_bytes(self) -> int:
        """Bytes of packed copies, of which all engines on a model share one."""
        weights = [self._layers[name].weight for name in self._packed]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def release(self) -> None:
        """Give the layers the ``forward`` that they had."""
        for name, (ours, before) in self._put_on.items():
            instance = self._layers[name].__dict__
            if instance.get("forward") is ours:  # else somebody stands before ours, which goes on without adapters
                del instance["forward"]
                if (kept := _behind(name, before, lambda owner: owner._released)) is not None:
                    instance["forward"] = kept
        for name in self._packed:
            _drop_packed(self._layers[name])
        self._packed, self._ways = {}, ("plain",)
        self._released = True

    def _put(self, layers: Mapping[str, nn.Linear]) -> None:
        for name, layer in layers.items():
            if name not in self._put_on:
                ours = functools.partial(self._forward, name, layer)
                self._put_on[name] = ours, layer.__dict__.get("forward")
                self._foreign[name] = _behind(name, self._put_on[name][1], lambda owner: True)
                layer.forward = ours  # type: ignore[method-assign]

    def _forward(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        if not self.under_way.on:  # another engine's forward, or somebody's own
            before = self._put_on[name][1]
            return nn.functional.linear(x, layer.weight, layer.bias) if before is None else before(x)
        foreign = self._foreign[name]
        rows = x.numel() // x.shape[-1]
        way = self._ways[rows] if rows < len(self._ways) and name in self._quick else "plain"
        if foreign is not None:  # one that moves weights between devices, say
            y = foreign(x).clone() if self.under_way.adapters else foreign(x)
        elif way == "packed":
            y = packed_product(x, self._packed[name], layer.bias)
        elif way == "turned":
            y = turned_product(x, layer.weight, layer.bias)
        else:
            y = nn.functional.linear(x, layer.weight, layer.bias)
        for used in self.under_way.adapters:
            matrices = self._adapters[used.adapter].get(name)
            if matrices is not None:
                self._add_lora(y, x, used, matrices)
        return y

    def _add_lora(self, y: Tensor, x: Tensor, used: _InUse, matrices: _Matrices) -> None:
        """y += B (A x) in the rows that are read with it, for x (R, N, in)."""
        inner = self.under_way.inner.get(used.adapter)
        if inner is None or inner.x is not x or inner.down is not matrices.down:
            read = x.reshape(used.among, -1, x.shape[-1])[used.rows].to(matrices.down.dtype)
            parts = torch.split(torch.matmul(read, matrices.down), matrices.ranks, dim=-1)
            inner = self.under_way.inner[used.adapter] = _Inner(x, matrices.down, parts)
        added = torch.matmul(inner.parts[matrices.place], matrices.up)
        if used.gate is not None:
            added.mul_(used.gate.to(added.device))
        rows = y.view(used.among, -1, y.shape[-1])
        if isinstance(used.rows, slice):
            rows[used.rows].add_(added)
        else:
            rows.index_add_(0, used.rows.to(y.device), added.to(y.dtype))


def _in_use(name: str, gate: Tensor) -> _InUse:
    if gate.device.type != "cpu":
        return _InUse(name, len(gate), slice(None), gate.view(-1, 1, 1))
    rows = gate.nonzero().flatten().tolist()
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    follow = slice(rows[0], rows[-1] + 1, step)  # a view of evenly spaced rows costs no copy
    even = list(range(len(gate))[follow]) == rows
    return _InUse(name, len(gate), follow if even else torch.tensor(rows), None)


def _side_by_side(adapter: Adapter, layers: Mapping[str, nn.Linear]) -> dict[str, _Matrices]:
    """An adapter's matrices by layer, the A of layers in one module with inputs of one size as columns of one.

    On a CPU in float32 at least, since small products of a narrow type take longer there.
    """
    modules: dict[tuple[str, int], list[str]] = {}
    for layer, (down, _) in adapter.matrices.items():
        modules.setdefault((layer.rpartition(".")[0], down.shape[1]), []).append(layer)
    found = {}
    for names in modules.values():
        weight = layers[names[0]].weight
        narrow = weight.device.type == "cpu" and weight.dtype.itemsize < 4
        dtype = torch.float32 if narrow else weight.dtype
        downs = [adapter.matrices[layer][0] for layer in names]
        shared, ranks = torch.cat(downs).t().to(dtype).contiguous(), [len(down) for down in downs]
        for place, layer in enumerate(names):
            up = adapter.matrices[layer][1].t().to(dtype).contiguous()
            found[layer] = _Matrices(shared, ranks, place, up)
    return found


def _is_plain(name: str, layer: nn.Linear) -> bool:
    """Whether a layer's product may be computed in another way: its weights are a plain tensor, its forward its own."""
    own = _behind(name, layer.__dict__.get("forward"), lambda owner: True) is None
    return own and type(layer.weight) is nn.Parameter


def _behind(name: str, forward: Forward | None, passed: Callable[[GatedLinears], bool]) -> Forward | None:
    """``forward``, or where an engine put it on the layer and is to be ``passed`` over, what it stands before."""
    owner = getattr(getattr(forward, "func", None), "__self__", None)
    if isinstance(owner, GatedLinears) and passed(owner):
        return _behind(name, owner._put_on[name][1], passed)
    return forward


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


def _take_packed(layer: nn.Linear) -> Tensor:
    with _packing:
        packed, readers = _packs[layer] if layer in _packs else (pack(layer.weight.detach()), 0)
        _packs[layer] = packed, readers + 1
    return packed


def _drop_packed(layer: nn.Linear) -> None:
    with _packing:
        packed, readers = _packs.pop(layer)
        if readers > 1:
            _packs[layer] = packed, readers - 1


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with weights from :func:`pack`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _quickest_ways(layers: Sequence[nn.Linear], pack: bool) -> tuple[Way, ...]:
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
    if pack and alike and _can_pack(largest.dtype) and new <= PACKED_SHARE * _free_memory():
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
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have packed products of a type."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with torch.inference_mode():
            packed_product(torch.ones(1, 1, 64, dtype=dtype), pack(torch.ones(64, 64, dtype=dtype)), None)
    except (AttributeError, RuntimeError):
        return False
    return True


def _free_memory() -> int:
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
