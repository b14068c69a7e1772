"""The embedded PersRM: its budget, that it tells held-out pairs apart, and that it steers `tiny` beyond prompting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefmw.bootstrap import close_engines, has_persrm, load_backend
from prefmw.embedded import embedded_path
from prefmw.evaluation.steer import conditions, steer_rows
from prefmw.models.persrm import load_persrm
from prefmw.preferences import default_dimensions
from prefmw.settings import load_settings
from prefmw.training.composed_pairs import composed_pairs
from prefmw.training.persrm import load_persrm_recipe

FOLDER = embedded_path("tiny-persrm")


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """`tiny` as the settings load it, with its PersRM."""
    settings = load_settings({"model": "tiny"})
    assert has_persrm(settings)
    yield load_backend(settings)
    close_engines()


def test_it_keeps_its_budget():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 1_500_000


def test_it_is_its_recipe_s_and_tiny_s(backend):
    persrm, recipe = load_persrm(FOLDER), load_persrm_recipe("tiny")
    persrm.check_backbone(backend.chat)
    assert persrm.card.prefix == recipe.prefix
    assert persrm.card.training["lora"]["rank"] == recipe.lora.rank
    assert backend.guidance().reference is None  # two rows


def test_it_tells_held_out_pairs_apart(backend):
    """Of 120 pairs in held-out wordings, at an expected accuracy of 0.9: fewer than 0.78 come about once in 10,000."""
    guidance = backend.guidance()
    hits = 0
    pairs = list(composed_pairs("test", 120, seed=9, unseen=0.4))
    for pair in pairs:
        replies = [(backend.chat.template.encode_reply(text), True) for text in (pair.chosen, pair.rejected)]
        scale = guidance.scale(pair.preference)
        chosen, rejected = guidance.rewards(pair.messages, pair.preference, scale, replies, backend.engine)
        hits += chosen > rejected
    assert hits >= 0.78 * len(pairs)


def test_it_steers_beyond_prompting(backend):
    rows = conditions(["prompt", "pad"], [], 0.7, controls=False)
    table = steer_rows("dev", rows, 16, backend, default_dimensions())
    rate = {row["method"]: row for row in table if row["axis"] == "all"}
    assert rate["pad"]["followed"] > rate["prompt"]["followed"]
    assert rate["pad"]["relevance"] >= 0.75


@pytest.mark.parametrize("name", ["pad-prefix", "pad-weights", "persrm", "pad-best-of-10"])
def test_its_controls_answer(backend, name):
    from prefmw.evaluation.held_out import held_out_items
    from prefmw.evaluation.steer import Condition, answer_items

    items = list(held_out_items("dev", 1))
    answered, _ = answer_items(items, Condition(name, 1.0), backend, default_dimensions())
    assert all(answer.text for answer in answered)


def test_w_p_leans_with_the_preference(backend):
    guidance = backend.guidance()
    one, same, other = (guidance.scale(text) for text in ("Be funny.", "Be funny.", "Answer like an expert."))
    assert torch.equal(one, same)
    assert guidance.persrm.weight.abs().max() == 0 or not torch.equal(one, other)
    assert torch.equal(guidance.persrm.scale(None), torch.ones(160))


def test_a_person_is_answered_by_pad_where_nobody_chose_a_method(tmp_path: Path):
    from prefmw.bootstrap import build_personalizer, open_store
    from prefmw.preferences import Message

    settings = load_settings({"model": "tiny", "max_tokens": 40, "seed": 1})
    store = open_store(settings)
    store.add_user("alice", persona="someone who loves a good joke", actor="test")
    reply = build_personalizer(settings, store).reply("alice", [Message("user", "How do I fall asleep faster?")])
    store.close()
    close_engines()
    assert (reply.plan.method, reply.plan.persrm.split("@")[0]) == ("pad", "tiny-persrm")
    assert reply.text
