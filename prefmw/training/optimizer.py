"""Muon for the matrices inside the model, AdamW for embeddings and norms, as one optimizer.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; torch.optim.Muon) reaches a given
loss in about half of AdamW's steps on the embedded model, which is what makes it trainable on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps two optimizers as one, so that a trainer and its learning-rate schedule see a single one.

    Args:
        model: its two-dimensional weights outside the embeddings go to Muon, all others to AdamW.
        learning_rate: of both; Muon's updates are scaled to the size of AdamW's (``match_rms_adamw``).
        weight_decay: Muon's; embeddings and norms have none.
        beta2: AdamW's.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, weight_decay: float, beta2: float) -> None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        inner = [weight for weight in weights if weight.ndim == 2 and id(weight) not in embeddings]
        rest = [weight for weight in weights if weight.ndim != 2 or id(weight) in embeddings]
        self._muon = torch.optim.Muon(
            inner, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0)
        super().__init__([{"params": weights}], {"lr": learning_rate})
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states, for a checkpoint."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Both states, from a checkpoint."""
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]
