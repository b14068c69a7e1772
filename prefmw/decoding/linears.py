"""A model's linear layers, with what the engine adds to them: LoRA by row, and quick products of few rows on a CPU.

Both are put on ``nn.Linear`` instances by their ``forward`` attribute, so the model's own code and weights stay as they
are, and :meth:`GatedLinears.release` takes them off again.

Shapes: R rows of one forward, N tokens a row, r LoRA rank.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefmw.errors import ModelError

FEW = range(2, 9)
"""Numbers of rows that may be quicker as W x^T than as x W^T."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA: for linear layers by their module name, A (r, in) and B (out, r), B already scaled by alpha / r."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]


class GatedLinears:
    """The linear layers of one model; ``active`` are the adapters and gates of the forward under way.

    ``y = W x + gate[row] * B (A x)`` with a gate of 1 for rows that are read with the adapter and 0 for the others, so
    rows with different adapters, or none, share one forward and one product with W.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self._adapters: dict[str, Adapter] = {}
        self._device = next(model.parameters()).device
        self.active: Sequence[tuple[str, Tensor]] = ()
        self._few = _few_rows(self._layers.values())
        self._put(self._layers if self._few else {})

    def add(self, name: str, adapter: Adapter) -> None:
        """Make an adapter known under a name.

        Raises:
            ModelError: it names a layer that the model lacks, or shapes that do not fit.
        """
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

    def gates(self, rows: Sequence[str | None]) -> list[tuple[str, Tensor]]:
        """For rows read with these adapters: each adapter in use with its gates, (R,), on the model's device.

        Raises:
            ModelError: an unknown adapter.
        """
        names = sorted({name for name in rows if name is not None})
        if unknown := set(names) - set(self._adapters):
            known = ", ".join(self._adapters) or "none"
            raise ModelError(f"no adapter '{min(unknown)}' on this model; there is {known}")
        return [(name, torch.tensor([float(row == name) for row in rows], device=self._device)) for name in names]

    def release(self) -> None:
        """Give the layers their own ``forward`` back."""
        for layer in self._layers.values():
            layer.__dict__.pop("forward", None)

    def _put(self, layers: Mapping[str, nn.Linear]) -> None:
        for name, layer in layers.items():
            layer.forward = functools.partial(self._forward, name, layer)  # type: ignore[method-assign]

    def _forward(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        y = few_rows_product(x, layer.weight, layer.bias) if x[..., 0].numel() in self._few else _own(layer, x)
        for adapter, gate in self.active:
            matrices = self._adapters[adapter].matrices.get(name)
            if matrices is not None:
                down, up = matrices
                added = nn.functional.linear(nn.functional.linear(x, down), up)
                y = y + added * gate.to(y.device, y.dtype).view(-1, *[1] * (y.ndim - 1))
        return y


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b computed as (W x^T)^T: for 2 to 8 rows some CPU libraries are several times quicker this way round."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.mm(weight, flat.t()).t().reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _own(layer: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


def _few_rows(layers: Iterable[nn.Linear]) -> frozenset[int]:
    """The numbers of rows for which the turned product is the quicker one here, by measurement on the largest layer."""
    largest = max(layers, key=lambda layer: layer.weight.numel(), default=None)
    if largest is None or largest.weight.device.type != "cpu" or not largest.weight.is_floating_point():
        return frozenset()
    weight, better = largest.weight, set()
    with torch.inference_mode():
        for rows in FEW:
            x = torch.ones(rows, largest.in_features, dtype=weight.dtype)
            plain = _seconds(functools.partial(nn.functional.linear, x, weight))
            if _seconds(functools.partial(few_rows_product, x, weight, None)) < 0.9 * plain:
                better.add(rows)
    return frozenset(better)


def _seconds(work: Callable[[], Tensor], times: int = 5) -> float:
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
