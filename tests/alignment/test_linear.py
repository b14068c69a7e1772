"""Linear Alignment's two forms, against worked cases, a slow reference and their stated properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from prefmw.alignment import normalized, scaled

NEG = -math.inf


def pairs(rows=(1, 4), columns=(1, 12)):
    shape = st.tuples(st.integers(*rows), st.integers(*columns))
    logits = st.floats(-50, 50, width=32)
    return shape.flatmap(
        lambda s: st.tuples(nps.arrays("float32", s, elements=logits), nps.arrays("float32", s, elements=logits))
    )


def slow_scaled(z0, z1, ratio):
    return [[b + ratio * (b - a) for a, b in zip(r0, r1, strict=True)] for r0, r1 in zip(z0, z1, strict=True)]


def slow_normalized(z0, z1, step):
    rows = []
    for r0, r1 in zip(z0, z1, strict=True):
        d = [b - a for a, b in zip(r0, r1, strict=True)]
        norm = math.sqrt(sum(x * x for x in d))
        rows.append([a + (step * x / norm if norm else 0.0) for a, x in zip(r0, d, strict=True)])
    return rows


def test_scaled_worked_by_hand():
    # z1 + 2 * (z1 - z0): 3 + 2*2 = 7, 1 + 2*0 = 1, 0 + 2*(-4) = -8
    z = scaled(torch.tensor([[1.0, 1.0, 4.0]]), torch.tensor([[3.0, 1.0, 0.0]]), ratio=2.0)
    assert z.tolist() == [[7.0, 1.0, -8.0]]


def test_normalized_worked_by_hand():
    # d = (3, 4), ||d|| = 5, so a step of 10 along it is (6, 8)
    z = normalized(torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 5.0]]), step=10.0)
    assert z.tolist() == [[7.0, 9.0]]


@given(pairs(), st.floats(0, 10))
def test_scaled_agrees_with_a_slow_reference(logits, ratio):
    z0, z1 = map(torch.from_numpy, logits)
    torch.testing.assert_close(
        scaled(z0, z1, ratio), torch.tensor(slow_scaled(z0.tolist(), z1.tolist(), ratio)), atol=1e-3, rtol=1e-5
    )


@given(pairs(), st.floats(0, 100))
def test_normalized_agrees_with_a_slow_reference(logits, step):
    z0, z1 = map(torch.from_numpy, logits)
    torch.testing.assert_close(
        normalized(z0, z1, step), torch.tensor(slow_normalized(z0.tolist(), z1.tolist(), step)), atol=1e-2, rtol=1e-4
    )


@given(pairs())
def test_zero_ratio_is_preference_prompting(logits):
    z0, z1 = map(torch.from_numpy, logits)
    assert torch.equal(scaled(z0, z1, 0.0), z1)


@given(pairs())
def test_zero_step_is_the_plain_model(logits):
    z0, z1 = map(torch.from_numpy, logits)
    assert torch.equal(normalized(z0, z1, 0.0), z0)


@given(pairs(), st.floats(0, 100))
def test_normalized_step_has_the_length_asked_for(logits, step):
    z0, z1 = map(torch.from_numpy, logits)
    moved = (normalized(z0, z1, step) - z0).norm(dim=1)
    apart = (z1 - z0).norm(dim=1) > 1e-3
    torch.testing.assert_close(moved[apart], torch.full_like(moved[apart], step), atol=1e-2, rtol=1e-3)


@given(pairs(), st.floats(0, 10))
def test_forms_meet_where_the_step_is_the_stretched_difference(logits, ratio):
    z0, z1 = map(torch.from_numpy, logits)
    step = (1 + ratio) * (z1 - z0).norm(dim=1)
    torch.testing.assert_close(normalized(z0, z1, step), scaled(z0, z1, ratio), atol=1e-2, rtol=1e-4)


@given(pairs(rows=(2, 4)), st.lists(st.floats(0, 10), min_size=4, max_size=4))
def test_each_row_takes_its_own_strength(logits, ratios):
    z0, z1 = map(torch.from_numpy, logits)
    ratio = torch.tensor(ratios[: len(z0)])
    together = scaled(z0, z1, ratio)
    for row in range(len(z0)):
        assert torch.equal(together[row], scaled(z0[row : row + 1], z1[row : row + 1], ratio[row])[0])


def test_equal_contexts_have_no_direction():
    z = torch.tensor([[1.0, 2.0]])
    assert torch.equal(normalized(z, z, 5.0), z)
    assert torch.equal(scaled(z, z, 5.0), z)


def test_padded_columns_stay_out_of_the_norm():
    z0 = torch.tensor([[1.0, 1.0, 0.0]])
    z1 = torch.tensor([[4.0, 5.0, 1000.0]])
    assert normalized(z0, z1, 10.0, vocabulary=2)[0, :2].tolist() == [7.0, 9.0]


@pytest.mark.parametrize("form", [scaled, normalized])
def test_excluded_columns_stay_excluded(form):
    z = form(torch.tensor([[1.0, NEG, 2.0]]), torch.tensor([[2.0, NEG, NEG]]), 3.0)
    assert z[0, 1:].tolist() == [NEG, NEG]
    assert z[0, 0].isfinite()


@pytest.mark.parametrize("form", [scaled, normalized])
def test_half_precision_is_combined_in_float32(form):
    z0, z1 = torch.tensor([[1.0, 2.0]]).bfloat16(), torch.tensor([[1.0078125, 2.0]]).bfloat16()
    assert form(z0, z1, 1.0).dtype == torch.float32


@pytest.mark.parametrize("form", [scaled, normalized])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_overflowed_logits_are_refused(form, bad):
    with pytest.raises(ValueError, match="NaN"):
        form(torch.tensor([[1.0, bad]]), torch.tensor([[1.0, 2.0]]), 1.0)


@pytest.mark.parametrize("form", [scaled, normalized])
@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, torch.ones(3)])
def test_strengths_out_of_range_are_refused(form, strength):
    with pytest.raises(ValueError, match="ratio|step"):
        form(torch.zeros(2, 3), torch.ones(2, 3), strength)


@pytest.mark.parametrize("form", [scaled, normalized])
def test_unequal_shapes_are_refused(form):
    with pytest.raises(ValueError, match="one shape"):
        form(torch.zeros(2, 3), torch.ones(2, 4), 1.0)


@pytest.mark.parametrize("columns", [0, 4])
def test_vocabulary_beyond_the_logits_is_refused(columns):
    with pytest.raises(ValueError, match="vocabulary"):
        normalized(torch.zeros(2, 3), torch.ones(2, 3), 1.0, vocabulary=columns)


@pytest.mark.parametrize("form", [scaled, normalized])
def test_inputs_are_left_as_they_were(form):
    z0, z1 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    form(z0, z1, 2.0)
    assert (z0.tolist(), z1.tolist()) == ([[1.0, 2.0]], [[3.0, 5.0]])
