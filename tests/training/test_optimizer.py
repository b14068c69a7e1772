"""Muon against PyTorch's own, and what its orthogonalisation promises."""

from __future__ import annotations

import pytest
import torch

from prefmw.training.optimizer import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_singular_values_are_drawn_to_about_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    result = orthogonalize(matrices)
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4
    assert values.max() < 1.3


def test_matrices_do_not_touch_each_other():
    matrices = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(2))
    together, alone = orthogonalize(matrices), torch.cat([orthogonalize(one[None]) for one in matrices])
    torch.testing.assert_close(together, alone)


def test_steps_are_those_of_pytorch_in_bfloat16():
    def after(make) -> list[torch.Tensor]:
        torch.manual_seed(3)
        weights = [torch.nn.Parameter(torch.randn(6, 10)), torch.nn.Parameter(torch.randn(10, 6))]
        optimizer = make(weights)
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        return weights

    theirs = after(lambda weights: torch.optim.Muon(weights, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    ours = after(lambda weights: Muon(weights, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-3, rtol=0)
    exact = after(lambda weights: Muon(weights, lr=0.02, weight_decay=0.1))
    assert max((mine - reference).abs().max() for mine, reference in zip(exact, theirs, strict=True)) < 0.01
