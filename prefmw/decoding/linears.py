"""A model's linear layers, with what the engine adds to them: LoRA by row, and quick products of few rows on a CPU
(products.py).

Both are put on ``nn.Linear`` instances by their ``forward`` attribute and act in the engine's own forwards alone, so
whoever else uses the model gets what its own code and weights give. :meth:`GatedLinears.release` takes them off again.

Where weights are packed, a LoRA is packed with them: y = [W | B] [x; A x], with zeros in place of A x in the rows that
are read without it. So it costs a few small operations for all layers that read one input, and none for each layer. It
takes another packed copy of the weights, and is done where there is memory for that; else B (A x) is added.

Shapes: R rows of one forward, N tokens a row, r LoRA rank.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefmw.decoding import products
from prefmw.errors import ModelError

Forward = Callable[[Tensor], Tensor]


class _Matrices(NamedTuple):
    """A LoRA of one layer: its A^T (in, r) are the columns in ``place`` of ``down``, which layers that may read the
    same input share, since a handful of small products is what a LoRA costs; ``up`` is B^T (r, out).
    """

    down: Tensor
    place: slice
    up: Tensor


class _Seen(NamedTuple):
    """What the input that was read last gave: x ``down``, or x with that beside it."""

    x: Tensor
    down: Tensor
    gave: Tensor


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
        self.inner: dict[str, _Seen] = {}
        self.beside: dict[str, _Seen] = {}


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
        self._ways = products.quickest_ways(list(quick.values()), pack)
        self._packed = (
            {name: products.take_packed(layer) for name, layer in quick.items()} if "packed" in self._ways else {}
        )
        self._wide: dict[str, dict[str, Tensor]] = {}  # [W | B] packed, by adapter and layer
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
        self._wide[name] = self._packed_with(self._adapters[name])
        self._put({layer: self._layers[layer] for layer in adapter.matrices})

    @property
    def names(self) -> frozenset[str]:
        """The adapters that are known."""
        return frozenset(self._adapters)

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
        self.under_way.beside.clear()

    def packed_bytes(self) -> int:
        """Bytes of packed copies: that of the weights, which all engines on a model share, and those with adapters."""
        wide = [name for layers in self._wide.values() for name in layers]
        weights = [self._layers[name].weight for name in (*self._packed, *wide)]
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
            products.drop_packed(self._layers[name])
        self._packed, self._wide, self._ways = {}, {}, ("plain",)
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
        foreign, adapters = self._foreign[name], self.under_way.adapters
        rows = x.numel() // x.shape[-1]
        way = self._ways[rows] if rows < len(self._ways) and name in self._quick else "plain"
        if foreign is not None:  # one that moves weights between devices, say
            y = foreign(x).clone() if adapters else foreign(x)
        elif way == "packed":
            if len(adapters) == 1 and (wide := self._wide[adapters[0].adapter].get(name)) is not None:
                beside = self._beside(x, adapters[0], self._adapters[adapters[0].adapter][name])
                return products.packed_product(beside, wide, layer.bias)
            y = products.packed_product(x, self._packed[name], layer.bias)
        elif way == "turned":
            y = products.turned_product(x, layer.weight, layer.bias)
        else:
            y = nn.functional.linear(x, layer.weight, layer.bias)
        for used in adapters:
            matrices = self._adapters[used.adapter].get(name)
            if matrices is not None:
                self._add_lora(y, x, used, matrices)
        return y

    def _beside(self, x: Tensor, used: _InUse, matrices: _Matrices) -> Tensor:
        """[x; A x], with zeros in place of A x in the rows that are read without it."""
        seen = self.under_way.beside.get(used.adapter)
        if seen is None or seen.x is not x or seen.down is not matrices.down:
            beside = nn.functional.pad(x, (0, matrices.down.shape[1]))
            rows = beside.view(used.among, -1, beside.shape[-1])
            rows[used.rows, :, x.shape[-1] :] = _read(x, used, matrices).to(x.dtype)
            seen = self.under_way.beside[used.adapter] = _Seen(x, matrices.down, beside)
        return seen.gave

    def _add_lora(self, y: Tensor, x: Tensor, used: _InUse, matrices: _Matrices) -> None:
        """y += B (A x) in the rows that are read with it, for x (R, N, in)."""
        seen = self.under_way.inner.get(used.adapter)
        if seen is None or seen.x is not x or seen.down is not matrices.down:
            seen = self.under_way.inner[used.adapter] = _Seen(x, matrices.down, _read(x, used, matrices))
        added = torch.matmul(seen.gave[..., matrices.place], matrices.up)
        if used.gate is not None:
            added.mul_(used.gate.to(added.device))
        rows = y.view(used.among, -1, y.shape[-1])
        if isinstance(used.rows, slice):
            rows[used.rows].add_(added)
        else:
            rows.index_add_(0, used.rows.to(y.device), added.to(y.dtype))

    def _packed_with(self, matrices: Mapping[str, _Matrices]) -> dict[str, Tensor]:
        """[W | B] packed, for the layers of an adapter whose weights are, where there is memory for it."""
        layers = {name: self._layers[name].weight for name in matrices if name in self._packed}
        size = sum(weight.numel() * weight.element_size() for weight in layers.values())
        if size > products.PACKED_SHARE * products.free_memory():
            return {}
        found = {}
        for name, weight in layers.items():
            up = weight.new_zeros(len(weight), matrices[name].down.shape[1])
            up[:, matrices[name].place] = matrices[name].up.t().to(weight.dtype)
            found[name] = products.pack(torch.cat([weight.detach(), up], dim=1))
        return found


def _read(x: Tensor, used: _InUse, matrices: _Matrices) -> Tensor:
    """x ``down`` of the rows that are read with an adapter."""
    read = x.reshape(used.among, -1, x.shape[-1])[used.rows]
    return torch.matmul(read.to(matrices.down.dtype), matrices.down)


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
        down = torch.cat([adapter.matrices[layer][0] for layer in names]).t().to(dtype).contiguous()
        begin = 0
        for layer in names:
            end = begin + len(adapter.matrices[layer][0])
            found[layer] = _Matrices(down, slice(begin, end), adapter.matrices[layer][1].t().to(dtype).contiguous())
            begin = end
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
