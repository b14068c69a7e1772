"""Combiners: many requests in one call, each with its own strength."""

from __future__ import annotations

import pytest
import torch

from prefmw.alignment import combine_linear, combine_plain, scaled


def test_linear_combines_each_request_by_its_own_strength_and_trusts_the_view_with_the_principle():
    views = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.0, 1.0, 5.0])
    combined = combine_linear(views.unbind(1), strength.unsqueeze(1))
    assert torch.equal(combined.rule, views[:, 1])
    assert torch.equal(combined.logits[0], views[0, 1])
    for row in range(3):
        alone = scaled(views[row : row + 1, 0], views[row : row + 1, 1], strength[row])
        assert torch.equal(combined.logits[row], alone[0])


def test_plain_is_the_view_itself():
    view = torch.randn(2, 5)
    combined = combine_plain([view], torch.zeros(2, 0))
    assert torch.equal(combined.logits, view)
    assert torch.equal(combined.rule, view)


@pytest.mark.parametrize(("combiner", "count"), [(combine_plain, 2), (combine_linear, 1), (combine_linear, 3)])
def test_wrong_number_of_views_is_refused(combiner, count):
    with pytest.raises(ValueError, match="views"):
        combiner([torch.zeros(1, 5)] * count, torch.zeros(1, 1))
