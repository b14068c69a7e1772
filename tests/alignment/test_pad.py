"""PAD's equations: worked by hand, against a slow reference, as properties, and at their extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmw.alignment import CombinePadAcross, combine_pad, combine_pad_by, guided, guided_across, guided_by

NUMBERS = st.floats(-20, 20, width=32)


def rows(count: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, width, generator=generator) for _ in range(count)]


def test_two_rows_by_hand():
    base, policy = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    assert guided(base, policy, 0.25).tolist() == [[0.5, 1.0, 1.5]]


def test_three_rows_by_hand():
    base, policy, reference = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    assert guided_by(base, policy, reference, 0.5).tolist() == [[1.0, 0.5]]


def test_with_the_base_as_reference_three_rows_are_two():
    base, policy = rows(2, 7)
    assert torch.allclose(guided_by(base, policy, base, 0.7), guided(base, policy, 0.7), atol=1e-6)


@given(st.lists(NUMBERS, min_size=3, max_size=3), st.floats(0, 3))
def test_constants_of_a_step_change_no_choice(shifts, beta):
    views = rows(3, 9)
    moved = [view + shift for view, shift in zip(views, shifts, strict=True)]
    before, after = (guided_by(*some, beta).log_softmax(1) for some in (views, moved))
    assert torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_scores_are_equation_13_with_its_normalisers_but_for_a_constant(beta):
    base, policy, reference = rows(3, 6)
    printed = base.log_softmax(1) + beta * (policy.log_softmax(1) - reference.log_softmax(1))
    ours = guided_by(base, policy, reference, beta)
    assert torch.allclose(ours - ours[:, :1], printed - printed[:, :1], atol=1e-5)


def slow_across(base, policy, reference, beta, columns):
    found = base.clone()
    for row in range(base.shape[0]):
        for token in range(base.shape[1]):
            column = int(columns[token])
            if column >= 0:
                p = policy[row, column] - math.log(sum(math.exp(z) for z in policy[row].tolist()))
                r = reference[row, column] - math.log(sum(math.exp(z) for z in reference[row].tolist()))
                found[row, token] += beta * (p - r)
    return found


def test_across_vocabularies_by_a_slow_reference():
    base, (policy, reference) = rows(1, 5)[0], rows(2, 4, seed=1)
    columns = torch.tensor([3, -1, 0, 0, 2])
    expected = slow_across(base, policy, reference, 1.5, columns)
    assert torch.allclose(guided_across(base, policy, reference, 1.5, columns), expected, atol=1e-5)
    combined = CombinePadAcross(columns)([base, policy, reference], torch.full((2, 1), 1.5))
    assert torch.allclose(combined.logits, expected, atol=1e-5)
    assert torch.equal(combined.rule, base)


def test_what_cannot_be_mapped_keeps_its_base_score():
    base, (policy, reference) = rows(1, 5)[0], rows(2, 4, seed=1)
    assert torch.equal(guided_across(base, policy, reference, 2.0, torch.full((5,), -1)), base)


def test_the_same_tokens_in_the_same_order_are_no_other_vocabulary():
    base, policy, reference = rows(3, 6)
    ours = guided_across(base, policy, reference, 0.8, torch.arange(6)).log_softmax(1)
    assert torch.allclose(ours, guided_by(base, policy, reference, 0.8).log_softmax(1), atol=1e-5)


def test_excluded_columns_stay_excluded_and_give_no_reward():
    base, policy, reference = rows(3, 4)
    base[:, 0] = policy[:, 1] = reference[:, 2] = -torch.inf
    scores = guided_by(base, policy, reference, 1.0)
    assert scores[:, 0].isneginf().all()
    assert torch.equal(scores[:, 1:3], base[:, 1:3])
    assert guided(base, policy, 1.0)[:, 0].isneginf().all()


def test_each_request_has_its_own_beta():
    views = rows(3, 5)
    betas = torch.tensor([[0.0], [2.0]])
    assert torch.equal(combine_pad_by(views, betas).logits[0], views[0][0])
    assert torch.equal(combine_pad(views[:2], betas).logits[1:], guided(views[0][1:], views[1][1:], 2.0))


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        guided_by(*rows(3, 4), beta)


def test_shapes_and_numbers_are_checked():
    base, policy, reference = rows(3, 4)
    with pytest.raises(ValueError, match="one shape"):
        guided_by(base, policy, reference[:, :3], 1.0)
    with pytest.raises(ValueError, match="a column for each of 4 tokens"):
        guided_across(base, policy, reference, 1.0, torch.arange(3))
    policy[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        guided_by(base, policy, reference, 1.0)
