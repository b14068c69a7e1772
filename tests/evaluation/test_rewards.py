"""PAD's table: the diversity score by hand, prompts and preferences, reward models and judges behind their seams."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from prefmw.errors import ModelNotFoundError, UsageError
from prefmw.evaluation.held_out import held_out_items
from prefmw.evaluation.judges import Case, model_judge, oracle_judge
from prefmw.evaluation.reward_models import Said, reward_model, zero_shot
from prefmw.evaluation.rewards import PREDEFINED, diversity, held_out, read_prompts, reward_rows
from prefmw.evaluation.runs import Run
from prefmw.evaluation.steer import Condition
from prefmw.preferences import default_dimensions
from tests.toymodels import make_tokenizer


def test_diversity_by_hand():
    # 2-grams: ab ba ab bc (3 of 4), 3-grams: aba bab abc (3 of 3), 4-grams: abab babc (2 of 2)
    assert diversity("a b a b c") == pytest.approx(3 / 4)
    # "x" five times: 1 of 4, 1 of 3, 1 of 2
    assert diversity("x x x x x") == pytest.approx(1 / 24)
    assert diversity("every word is another one here") == 1.0
    assert diversity("one") == diversity("") == 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sequence classification model whose first output grows with how often the token of "a" is last, say."""
    path = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = make_tokenizer("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=tokenizer.eos_token_id,
        max_position_embeddings=512,
    )
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_reward_model_scores_as_it_does_alone(folder):
    said = [Said("How?", f"Reply {'again ' * index}.", None) for index in range(20)]
    together = reward_model(str(folder), 2)(said)
    alone = [reward_model(str(folder), 2)([one])[0] for one in said[:3]]
    assert together[:3] == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) > 10
    assert together != reward_model(str(folder), 0)(said)
    alike = [Said("How?", "Reply.", None), Said("Why?", "Reply.", None)]
    one, other = reward_model(str(folder), 2, "{response}")(alike)
    assert one == pytest.approx(other)
    one, other = reward_model(str(folder), 2, "{prompt} {response}")(alike)
    assert one != pytest.approx(other)
    with pytest.raises(UsageError, match="template holds {response}"):
        reward_model(str(folder), 2, "{prompt}")


def test_a_model_of_several_outputs_needs_one_chosen(folder):
    for output in (None, 3):
        with pytest.raises(UsageError, match="has 3 outputs; choose one"):
            reward_model(str(folder), output)
    with pytest.raises(ModelNotFoundError, match="no reward model"):
        reward_model("/nowhere", None)


def items(count=2):
    return list(held_out_items("dev", count))


def test_the_oracle_judges_by_what_was_asked_for():
    item = next(item for item in items(8) if item.wanted == {"verbosity": -1})
    short, long = "Sleep early.", "Sleep early, and keep the room dark, because light keeps you awake. " * 6
    cases = [Case("?", "", short, long, item), Case("?", "", long, short, item), Case("?", "", short, short, item)]
    assert oracle_judge(cases) == [1.0, 0.0, 0.5]
    with pytest.raises(UsageError, match="held-out questions alone"):
        oracle_judge([Case("?", "", short, long, None)])


def test_a_model_judge_does_not_care_for_the_order(backend):
    judge = model_judge(backend)
    cases = [Case("How?", "short", f"one {index}", f"two {index}", None) for index in range(12)]
    turned = [case._replace(reply=case.rival, rival=case.reply) for case in cases]
    verdicts = judge(cases)
    assert set(verdicts) <= {0.0, 0.5, 1.0}
    assert [1 - verdict for verdict in verdicts] == judge(turned)
    assert judge([case._replace(rival=case.reply) for case in cases]) == [0.5] * 12


def test_prompts_are_asked_under_their_own_preference_or_under_each(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"id": "0", "prompt": "How?"}, {"prompt": "Why?", "preference": "short"}]))
    asked = read_prompts(path, PREDEFINED)
    assert [one.principle for one in asked if one.question == "How?"] == list(PREDEFINED)
    assert [one.principle for one in asked if one.question == "Why?"] == ["short"]
    path.write_text(json.dumps([{"question": "How?"}]))
    with pytest.raises(UsageError, match="the column prompt is missing or empty; found question"):
        read_prompts(path, PREDEFINED)
    path.write_text("[]")
    with pytest.raises(UsageError, match="holds no prompt"):
        read_prompts(path, PREDEFINED)


def test_the_table_has_rewards_diversity_win_rate_and_cost(tiny, tmp_path):
    dimensions = default_dimensions()
    asked = held_out("dev", 2, 0, dimensions)
    rewards = {"zero-shot": zero_shot(tiny, dimensions), "words": lambda said: [float(len(one.reply)) for one in said]}
    rows = [Condition("none"), Condition("prompt"), Condition("linear", 1.0)]
    table = reward_rows(asked, rows, rewards, oracle_judge, tiny, dimensions, Run("rewards", {}, tmp_path / "run"))
    assert [(row["method"], row["reward"]) for row in table] == [
        (method, reward) for method in ("none", "prompt", "linear") for reward in ("zero-shot", "words", "all")
    ]
    whole = {row["method"]: row for row in table if row["reward"] == "all"}
    assert "win_rate" not in whole["none"]
    assert whole["linear"]["win_rate"] > 0.5
    assert 0.5 < whole["linear"]["diversity"] <= 1
    assert whole["none"]["cost_ratio"] == 1.0
    asked_for = {row["method"]: row["mean"] for row in table if row["reward"] == "zero-shot"}
    assert asked_for["none"] < asked_for["linear"]
    again = reward_rows(asked, rows, rewards, oracle_judge, tiny, dimensions, Run("rewards", {}, tmp_path / "run"))
    assert again == table


def test_a_preference_in_words_is_the_whole_principle(tiny, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "How do I fall asleep faster?"}\n')
    asked = read_prompts(path, ["Be funny and add a joke or two.", "Keep the answer short and to the point."])
    lengths = {"length": lambda said: [float(len(one.reply)) for one in said]}
    (prompt, whole) = reward_rows(
        asked, [Condition("prompt", None, 0.0)], lengths, None, tiny, default_dimensions(), Run("rewards", {})
    )
    assert (prompt["n"], whole["cost_ratio"]) == (2, None)
