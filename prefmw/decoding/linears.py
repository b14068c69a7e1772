"""A model's linear layers, with what the engine adds to them: LoRA by row, and quick products of few rows on a CPU.

Both are put on ``nn.Linear`` instances by their ``forward`` attribute, so the model's own code and weights stay as they
are, and :meth:`GatedLinears.release` takes them off again.

Shapes: R rows of one forward, N tokens a row, r LoRA rank.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefmw.errors import ModelError

FEW = range(1, 9)
"""Numbers of rows that may be quicker as W x^T than as x W^T."""

MEASURED = 1 << 24
"""Weights that are timed to find out, at most: 64 MB of float32."""


Forward = Callable[[Tensor], Tensor]


class _UnderWay(threading.local):
    gates: Sequence[tuple[str, Tensor]] = ()


@dataclass(frozen=True)
class Adapter:
    """A LoRA: for linear layers by their module name, A (r, in) and B (out, r), B already scaled by alpha / r."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]


class GatedLinears:
    """The linear layers of one model; ``under_way`` holds the adapters and gates of this thread's forward.

    ``y = W x + gate[row] * B (A x)`` with a gate of 1 for rows that are read with the adapter and 0 for the others, so
    rows with different adapters, or none, share one forward and one product with W.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self._adapters: dict[str, Adapter] = {}
        self._put_on: dict[str, tuple[Forward, Forward | None]] = {}  # our forwards, and those that they stand before
        self._device = next(model.parameters()).device
        self._released = False
        self.under_way = _UnderWay()
        self._few = _few_rows(self._layers.values())
        self._put(self._layers if self._few else {})

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
        self._adapters[name] = adapter
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

    def release(self) -> None:
        """Give the layers the ``forward`` that they had."""
        for name, (ours, before) in self._put_on.items():
            instance = self._layers[name].__dict__
            if instance.get("forward") is ours:  # else somebody stands before ours, which goes on without adapters
                del instance["forward"]
                if (kept := _unreleased(name, before)) is not None:
                    instance["forward"] = kept
        self._released = True

    def _put(self, layers: Mapping[str, nn.Linear]) -> None:
        for name, layer in layers.items():
            if name not in self._put_on:
                ours = functools.partial(self._forward, name, layer)
                self._put_on[name] = ours, layer.__dict__.get("forward")
                layer.forward = ours  # type: ignore[method-assign]

    def _forward(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        _, before = self._put_on[name]
        if before is not None:  # one that moves weights between devices, say
            y = before(x)
        elif x[..., 0].numel() in self._few:
            y = few_rows_product(x, layer.weight, layer.bias)
        else:
            y = nn.functional.linear(x, layer.weight, layer.bias)
        for adapter, gate in self.under_way.gates:
            matrices = self._adapters[adapter].matrices.get(name)
            if matrices is not None:
                down, up = matrices
                added = nn.functional.linear(nn.functional.linear(x, down), up)
                y = y + added * gate.to(y.device, y.dtype).view(-1, *[1] * (y.ndim - 1))
        return y


def _unreleased(name: str, forward: Forward | None) -> Forward | None:
    """``forward``, or what it stands before, where another engine put it on the layer and has let go of it since."""
    owner = getattr(getattr(forward, "func", None), "__self__", None)
    if isinstance(owner, GatedLinears) and owner._released:
        return _unreleased(name, owner._put_on[name][1])
    return forward


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b computed as (W x^T)^T: for few rows some CPU libraries are several times quicker this way round. One
    row is read twice, since products with a single vector may run on one core alone.

    The result is laid out as the plain product's; what reads it, fused attention say, is slow or falls back otherwise.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    columns = (torch.cat([flat, flat]) if rows == 1 else flat).t()
    y = torch.mm(weight, columns).t()[:rows].contiguous().reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _few_rows(layers: Iterable[nn.Linear]) -> frozenset[int]:
    """The numbers of rows for which the turned product is the quicker one here, by measurement on as many weights as
    the model has of its largest shape, so that they lie in the caches or not as they will.
    """
    weights = [layer.weight for layer in layers if layer.weight.numel() <= MEASURED]
    largest = max(weights, key=Tensor.numel, default=None)
    if largest is None or largest.device.type != "cpu" or not largest.is_floating_point():
        return frozenset()
    alike = sum(weight.shape == largest.shape for weight in weights)
    count = min(alike, MEASURED // largest.numel())
    return _quicker(count, *largest.shape, largest.dtype, torch.get_num_threads())


@functools.cache
def _quicker(count: int, rows_out: int, rows_in: int, dtype: torch.dtype, threads: int) -> frozenset[int]:
    better = set()
    with torch.inference_mode():
        weights = [torch.ones(rows_out, rows_in, dtype=dtype) for _ in range(count)]
        for rows in FEW:
            x = torch.ones(rows, rows_in, dtype=dtype)
            plain = _seconds(lambda x=x: [nn.functional.linear(x, weight) for weight in weights])  # type: ignore[misc]
            turned = _seconds(lambda x=x: [few_rows_product(x, weight, None) for weight in weights])  # type: ignore[misc]
            if turned < 0.9 * plain:
                better.add(rows)
    return frozenset(better)


def _seconds(work: Callable[[], object], times: int = 3) -> float:
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
