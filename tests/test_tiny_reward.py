"""The embedded reward model: its budget, that it is its recipe's and tiny's, that it agrees with the oracles."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prefmw.bootstrap import close_engines, load_backend, load_scorer
from prefmw.embedded import embedded_path
from prefmw.models.reward import load_reward
from prefmw.settings import load_settings
from prefmw.training.composed_scores import ATTRIBUTES, composed_scores
from prefmw.training.reward import load_reward_recipe

FOLDER = embedded_path("tiny-reward")


@pytest.fixture(scope="module")
def scorer():
    settings = load_settings({"model": "tiny"})
    backend = load_backend(settings)
    found = load_scorer(settings, backend, "tiny-reward")
    assert found.chat is backend.chat  # one backbone for all
    yield found
    close_engines()


def test_it_keeps_its_budget():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 1_500_000


def test_it_is_its_recipe_s():
    card = load_reward(FOLDER).card
    assert (card.ask, card.outputs) == (load_reward_recipe("tiny").ask, ATTRIBUTES)


def test_it_agrees_with_the_oracles(scorer):
    """Of 150 held-out answers of the composer's own, at an expected Pearson of 0.9 or more: 0.8 or less comes less than
    once in 10,000 times.
    """
    rows = list(composed_scores("test", 150, seed=9, spoilt=0.0))
    found = scorer.rewards([(row.messages, row.response) for row in rows], ATTRIBUTES).numpy()
    for place, name in enumerate(ATTRIBUTES):
        wanted = np.array([row.scores[name] for row in rows])
        assert np.corrcoef(found[:, place], wanted)[0, 1] >= 0.8, name


def test_eval_score_prints_what_it_says(tmp_path, capsys):
    from prefmw.cli.main import run

    short, long = (
        "Go to bed early.",
        " ".join(["Go to bed at the same time every night, because a steady rhythm helps."] * 8),
    )
    file = tmp_path / "replies.jsonl"
    rows = [{"prompt": "How do I fall asleep faster?", "response": reply} for reply in (short, long)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["eval", "score", str(file), "--reward", "tiny-reward", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores[0].keys() == {"helpfulness", "verbosity"}
    assert scores[0]["verbosity"] + 30 < scores[1]["verbosity"]
    assert run(["eval", "score", str(file)]) == 2
    assert "either by --zero-shot or by --reward" in capsys.readouterr().err
