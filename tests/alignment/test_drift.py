"""Dials on the logits, against a worked case, a slow reference and what weights promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmw.alignment import combine_drift, dials, scaled
from prefmw.alignment.drift import shares

NEG = -math.inf


def drawn(seed, rows=3, count=2, columns=7):
    generator = torch.Generator().manual_seed(seed)
    base, *poles = torch.randn(1 + count, rows, columns, generator=generator) * 4
    return base, poles, torch.rand(rows, count, generator=generator)


def slow(base, poles, weights, midpoints):
    """Token by token, user by user, in Python's own floats."""
    out = []
    for row, z0 in enumerate(base.tolist()):
        w, m = weights[row].tolist(), midpoints[row].tolist()
        bound = max(1.0, math.sqrt(sum(x * x for x in w)))
        gone = []
        for x, half in zip(w, m, strict=True):
            odds = (x / bound) / max(1 - x / bound, 1e-12) * half / (1 - half)
            gone.append(odds / (1 + odds))
        out.append([sum(s * (z[row][v].item() - z0[v]) for s, z in zip(gone, poles, strict=True)) for v in range(7)])
    return torch.tensor(out)


def test_worked_by_hand():
    # w = (3, 4) has norm 5, so shares 0.6 and 0.8 of the differences (1, 0) and (0, 5)
    base, one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 7.0]])
    weights = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(dials(base, [one, other], weights), torch.tensor([[0.6, 4.0]]))
    # midpoints of 0.75 and 0.2 take these to odds of 1.5 * 3 and 4 / 4, so to 9/11 and 1/2
    moved = dials(base, [one, other], weights, torch.tensor([[0.75, 0.2]]))
    torch.testing.assert_close(moved, torch.tensor([[9 / 11, 2.5]]))


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_agrees_with_a_slow_reference(seed, count):
    base, poles, weights = drawn(seed, count=count)
    midpoints = 0.05 + 0.9 * torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed))
    weights = weights * 2
    expected = slow(base, poles, weights, midpoints)
    torch.testing.assert_close(dials(base, poles, weights, midpoints), expected, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 10_000))
def test_a_weight_of_zero_is_as_good_as_none(seed):
    base, (one, other), weights = drawn(seed)
    weights[:, 1] = 0
    torch.testing.assert_close(dials(base, [one, other], weights), dials(base, [one], weights[:, :1]), atol=0, rtol=0)


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_below_the_bound_a_weight_keeps_its_size(seed, size):
    base, (one, _), _ = drawn(seed)
    torch.testing.assert_close(dials(base, [one], torch.full((3, 1), size)), size * (one - base), atol=1e-5, rtol=1e-5)


@given(st.integers(0, 10_000))
def test_many_large_weights_go_no_further_than_the_unit_ball(seed):
    base, poles, weights = drawn(seed, count=5)
    twice = dials(base, poles, (weights + 1) * 2)
    torch.testing.assert_close(dials(base, poles, weights + 1), twice, atol=1e-4, rtol=1e-4)


def test_one_full_dial_at_a_gain_is_the_linear_step_from_the_plain_model():
    base, (pole, _), _ = drawn(5)
    combined = combine_drift([base, pole], torch.tensor([[3.0, 1.0, 0.7]] * 3))
    torch.testing.assert_close(combined.logits, scaled(base, pole, 2.0))  # z0 + 3 d = z1 + 2 d
    torch.testing.assert_close(combined.rule, pole)


@pytest.mark.parametrize(("gain", "midpoint"), [(0.0, 0.5), (1.0, 0.25), (1.0, 0.5), (2.0, 0.4), (5.0, 0.9)])
def test_the_rule_takes_every_weight_as_far_as_it_goes_alone_but_not_beyond_its_reading(gain, midpoint):
    base, (one, other), weights = drawn(6)  # some lie beyond the unit ball together
    midpoints = torch.full_like(weights, midpoint)
    combined = combine_drift([base, one, other], torch.cat([torch.full((3, 1), gain), weights, midpoints], dim=1))
    sizes = (gain * shares(weights, midpoints)).clamp(max=1)
    moved = base + sizes[:, :1] * (one - base) + sizes[:, 1:] * (other - base)
    torch.testing.assert_close(combined.rule, moved)
    torch.testing.assert_close(combined.logits, base + gain * dials(base, [one, other], weights, midpoints))


def test_half_a_weight_goes_as_far_as_its_pole_says_and_a_whole_one_all_the_way():
    base, (one, other), _ = drawn(8)
    weights, midpoints = torch.tensor([[0.5, 0.0], [0.0, 0.5], [1.0, 0.0]]), torch.tensor([[0.7, 0.2]] * 3)
    moved = torch.stack([0.7 * (one - base)[0], 0.2 * (other - base)[1], (one - base)[2]])
    torch.testing.assert_close(dials(base, [one, other], weights, midpoints), moved, atol=1e-5, rtol=1e-5)


@given(st.floats(1e-6, 1 - 1e-6), st.floats(0, 1), st.floats(0, 1))
def test_shares_rise_with_the_weight_and_never_pass_the_whole(midpoint, weight, other):
    low, high = sorted((weight, other))
    found = shares(torch.tensor([0.0, low, high, 1.0], dtype=torch.float64), torch.full((4,), midpoint).double())
    assert (found.diff() >= -1e-12).all()
    torch.testing.assert_close(found[[0, 3]], torch.tensor([0.0, 1.0]).double(), atol=0, rtol=0)


@given(st.floats(0, 1))
def test_at_one_half_a_share_is_the_weight_itself(weight):
    torch.testing.assert_close(shares(torch.tensor([weight]), torch.tensor([0.5])), torch.tensor([weight]))


def test_what_one_of_many_full_dials_asks_for_stays_in_the_rule():
    base = torch.tensor([[10.0, 0.0, 0.0, 0.0]])
    poles = [base + torch.eye(4)[[column]] * 12 for column in (1, 2, 3)]
    combined = combine_drift([base, *poles], torch.tensor([[1.0] * 4 + [0.5] * 3]))
    assert (combined.rule.softmax(1)[:, 1:] > 0.3).all()
    assert (combined.logits.softmax(1)[:, 1:] < 0.1).all()


def test_a_weight_beyond_one_is_a_whole_one_in_the_rule():
    base, (pole, _), _ = drawn(6)
    torch.testing.assert_close(combine_drift([base, pole], torch.tensor([[1.0, 3.0, 0.4]] * 3)).rule, pole)


def test_each_row_has_its_own_weights():
    base, poles, weights = drawn(7)
    together = dials(base, poles, weights)
    for row in range(3):
        alone = dials(base[row : row + 1], [pole[row : row + 1] for pole in poles], weights[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_excluded_columns_stay_excluded():
    base, pole = torch.tensor([[NEG, 1.0, 2.0]]), torch.tensor([[0.0, NEG, 4.0]])
    moved = dials(base, [pole], torch.ones(1, 1))
    assert moved.tolist() == [[0.0, 0.0, 2.0]]
    assert (base + moved).tolist() == [[NEG, 1.0, 4.0]]


@pytest.mark.parametrize("weights", [[[-0.1]], [[math.nan]], [[math.inf]], [[0.5, 0.5]], [0.5]])
def test_weights_that_are_no_sizes_are_refused(weights):
    base, (pole, _), _ = drawn(8, rows=1)
    with pytest.raises(ValueError, match="weights"):
        dials(base, [pole], torch.tensor(weights))


@pytest.mark.parametrize("midpoint", [0.0, 1.0, -0.5, math.nan])
def test_midpoints_that_are_none_are_refused(midpoint):
    base, (pole, _), _ = drawn(8, rows=1)
    with pytest.raises(ValueError, match="midpoints"):
        dials(base, [pole], torch.ones(1, 1), torch.tensor([[midpoint]]))


def test_logits_that_overflowed_are_refused():
    base, (pole, _), _ = drawn(9, rows=1)
    pole[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        dials(base, [pole], torch.ones(1, 1))
