"""The candidate rule: nucleus, top-k, and the fallback."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from prefmw.alignment import nucleus, redistributed, restrict, top_k

NEG = -math.inf
logits_arrays = nps.arrays(
    "float32", st.tuples(st.integers(1, 3), st.integers(1, 15)), elements=st.floats(-20, 20, width=32)
)


def logs(*probabilities):
    return torch.tensor([probabilities]).log()


def slow_nucleus(row, top_p, temperature):
    """Straight from the definition, one token at a time."""
    temperature = temperature or 1.0
    heated = torch.tensor(row) / temperature
    p = torch.softmax(heated, 0).tolist()
    keep, mass = set(), 0.0
    for index in sorted(range(len(p)), key=lambda i: (-heated[i].item(), i)):
        if keep and mass >= top_p:
            break
        keep.add(index)
        mass += p[index]
    return keep


def test_the_crossing_token_stays():
    # 0.5 + 0.3 = 0.8 reaches 0.75 only with the second token, and the third is not needed
    assert nucleus(logs(0.5, 0.3, 0.15, 0.05), 0.75).tolist() == [[True, True, False, False]]


def test_one_token_always_stays():
    assert nucleus(logs(0.9, 0.1), 1e-6).tolist() == [[True, False]]


def test_whole_mass_keeps_every_possible_token():
    assert nucleus(torch.tensor([[30.0, 0.0, -60.0, NEG]]), 1.0).tolist() == [[True, True, True, False]]


@given(logits_arrays, st.floats(0.05, 0.999), st.sampled_from([0.0, 0.3, 1.0, 2.0]))
def test_nucleus_agrees_with_a_slow_reference(logits, top_p, temperature):
    z = torch.from_numpy(logits)
    keep = nucleus(z, top_p, temperature)
    for row in range(len(z)):
        kept = {int(i) for i in keep[row].nonzero()}
        slow = slow_nucleus(z[row].tolist(), top_p, temperature)
        # rounding may move the bound by one token, where the mass before it is top_p to the last digit
        assert kept == slow or abs(len(kept) - len(slow)) == 1
        p = torch.softmax(z[row] / (temperature or 1.0), 0)
        assert p[keep[row]].sum() >= top_p - 1e-5
        assert p[keep[row]].min() >= p[~keep[row]].max() if (~keep[row]).any() else True


def test_greedy_takes_the_nucleus_at_temperature_one():
    z = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nucleus(z, 0.8, 0.0), nucleus(z, 0.8, 1.0))


def test_colder_sampling_narrows_the_nucleus():
    z = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    assert nucleus(z, 0.8, 0.3).sum() < nucleus(z, 0.8, 1.0).sum() < nucleus(z, 0.8, 3.0).sum()


def test_rows_take_their_own_bounds():
    z = logs(0.5, 0.3, 0.2).repeat(2, 1)
    keep = nucleus(z, torch.tensor([0.4, 0.99]), torch.tensor([1.0, 1.0]))
    assert keep.sum(dim=1).tolist() == [1, 3]


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1, math.nan])
def test_mass_out_of_range_is_refused(top_p):
    with pytest.raises(ValueError, match="top_p"):
        nucleus(torch.zeros(1, 3), top_p)


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        nucleus(torch.zeros(1, 3), 0.8, temperature)


def test_top_k_breaks_ties_by_token_id():
    assert top_k(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [[True, True, False, False]]


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert top_k(torch.zeros(1, 3), 10).all()


def test_top_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k is at least 1"):
        top_k(torch.zeros(1, 3), 0)


def test_restrict_excludes_what_is_not_kept():
    keep = torch.tensor([[True, False, True]])
    assert restrict(torch.tensor([[1.0, 9.0, 2.0]]), torch.zeros(1, 3), keep).tolist() == [[1.0, NEG, 2.0]]


def test_underflow_falls_back_to_the_rule():
    keep = torch.tensor([[True, True, False], [True, True, False]])
    logits = torch.tensor([[NEG, NEG, 5.0], [1.0, NEG, 5.0]])
    rule = torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, 0.0]])
    assert restrict(logits, rule, keep).tolist() == [[3.0, 4.0, NEG], [1.0, NEG, NEG]]


# What a method makes of the rule before anything is cut off


def test_candidates_share_their_own_mass_anew():
    # of 0.5 + 0.3 the aligned logits, 1 : 3, give 0.2 and 0.6; the others keep what they had
    keep = torch.tensor([[True, True, False, False]])
    aligned = torch.tensor([[0.0, math.log(3), 50.0, -50.0]])
    found = redistributed(aligned, logs(0.5, 0.3, 0.15, 0.05), keep)
    assert torch.allclose(found.exp(), torch.tensor([[0.2, 0.6, 0.15, 0.05]]))


@given(logits_arrays, st.floats(0.05, 1.0))
def test_what_changes_nothing_leaves_the_rule(logits, top_p):
    z = torch.from_numpy(logits)
    assert torch.allclose(redistributed(z, z, nucleus(z, top_p)), z.log_softmax(1), atol=1e-4)


@given(logits_arrays, st.integers(0, 100), st.floats(0.05, 1.0))
def test_redistributed_is_a_distribution_and_agrees_with_a_slow_reference(logits, seed, top_p):
    rule = torch.from_numpy(logits)
    aligned = 5 * torch.randn(rule.shape, generator=torch.Generator().manual_seed(seed))
    keep = nucleus(rule, top_p)
    found = redistributed(aligned, rule, keep).exp()
    assert torch.allclose(found.sum(1), torch.ones(len(found)), atol=1e-4)
    for row in range(len(rule)):
        p, q = rule[row].softmax(0).tolist(), aligned[row].exp().tolist()
        kept = [index for index in range(len(p)) if keep[row, index]]
        mass, total = sum(p[index] for index in kept), sum(q[index] for index in kept)
        slow = [mass * q[index] / total if index in kept else p[index] for index in range(len(p))]
        assert found[row].tolist() == pytest.approx(slow, abs=1e-4)


def test_candidates_that_the_method_excludes_keep_the_rule_s_shares():
    keep = torch.tensor([[True, True, False]])
    found = redistributed(torch.tensor([[NEG, NEG, 0.0]]), logs(0.6, 0.2, 0.2), keep)
    assert torch.allclose(found.exp(), torch.tensor([[0.6, 0.2, 0.2]]))
