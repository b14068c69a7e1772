"""Muon for the matrices inside the model, AdamW for embeddings and norms, as one optimizer.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) reaches a given loss in about half
of AdamW's steps on the embedded model, which is what makes it trainable on two cores. PyTorch's own always computes in
bfloat16, which a CPU without bf16 products emulates so slowly that it takes most of a step; here the caller names the
precision, and matrices of one shape are computed together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, from the article."""


def orthogonalize(matrices: Tensor, *, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """Matrices (N, rows, columns) with their singular values drawn to about 1, in [0.5, 1.5], by Newton-Schulz steps.

    Source: the article's "newtonschulz5".
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum steps orthogonalised, matrices of one shape at a time.

    Args:
        weights: two-dimensional.
        lr: the learning rate; updates are scaled by 0.2 sqrt(max(rows, columns)), to the size of AdamW's (Liu et al.,
            "Muon is scalable for LLM training", 2025, equation 4).
        weight_decay: decoupled.
        momentum: Nesterov's, in [0, 1).
        dtype: in which the products are computed.
    """

    def __init__(
        self,
        weights: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape].append(weight)
            for shape, weights in shapes.items():
                directions = [self._direction(weight, group["momentum"]) for weight in weights]
                updates = orthogonalize(torch.stack(directions), dtype=self._dtype)
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _direction(self, weight: nn.Parameter, momentum: float) -> Tensor:
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        average: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps two optimizers as one, so that a trainer and its learning-rate schedule see a single one.

    Args:
        model: its two-dimensional weights outside the embeddings go to Muon, all others to AdamW.
        heads: a part of it whose weights all go to AdamW.
        learning_rate: of both; Muon's updates are scaled to the size of AdamW's.
        weight_decay: Muon's; embeddings and norms have none.
        beta2: AdamW's.
        dtype: of Muon's products.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: nn.Module | None = None,
        *,
        learning_rate: float,
        weight_decay: float,
        beta2: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        apart = embeddings | {id(weight) for weight in (heads.parameters() if heads else ())}
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        inner = [weight for weight in weights if weight.ndim == 2 and id(weight) not in apart]
        rest = [weight for weight in weights if weight.ndim != 2 or id(weight) in apart]
        self._muon = Muon(inner, lr=learning_rate, weight_decay=weight_decay, dtype=dtype)
        self._adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0)
        super().__init__([{"params": weights}], {"lr": learning_rate})
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states, for a checkpoint."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Both states, from a checkpoint."""
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]
