"""A reward model's training: formats read, masked losses by hand, runs that resume, merged models that plain
transformers load.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefmw.decoding import Engine
from prefmw.errors import ModelError, TrainingError, UsageError
from prefmw.models import ModelSpec, load_chat_model
from prefmw.models.persrm import BackboneCard
from prefmw.models.reward import OBJECTIVES, RELEASED, RewardCard, load_reward
from prefmw.preferences import Message
from prefmw.rewards import load_whole_reward, put_reward_on
from prefmw.training.composed_scores import composed_scores
from prefmw.training.regression import EncodedReply, Regression, encode, last_states, ridge
from prefmw.training.reward import Fit, RewardRecipe, load_reward_recipe, train_reward
from prefmw.training.scored import Scored, read_scored
from tests.toymodels import spoiled

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SHORT, LONG = "Keep the room dark.", "Put the phone away an hour before bed, and keep the room dark and cool."
QUESTION = Message("user", "How do I fall asleep faster?")


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(folder: Path, count: int = 60) -> Path:
    """Long replies are verbose, and helpful where the question is even; some helpfulness is missing."""
    rows = []
    for index in range(count):
        scores = {"verbosity": 90 if index % 2 else 10, "helpfulness": 80 if index % 2 else 30}
        if index % 5 == 0:
            scores["helpfulness"] = None
        response = LONG if index % 2 else SHORT
        rows.append({"prompt": f"How do I fall asleep faster? {index // 2}", "response": response, "scores": scores})
    return write(folder / "scored.jsonl", rows)


def recipe(toy: Path, **changes) -> RewardRecipe:
    fit = Fit(rank=4, alpha=8, learning_rate=5e-3, batch=8, per_device=4, epochs=3)
    return RewardRecipe("toy", str(toy), fit=fit, **changes)


# Formats


def test_plain_helpsteer_and_ultrafeedback_rows_are_read(tmp_path):
    rows = [
        {"prompt": "a?", "response": "b", "scores": {"humor": 55}},
        {"prompt": "a?", "response": "c", "helpfulness": 4, "verbosity": 0, "correctness": None},
        {
            "instruction": "d?",
            "completions": [
                {"response": "e", "overall_score": 7.5, "annotations": {"honesty": {"Rating": "5"}}},
                {"response": "f", "annotations": {"honesty": {"Rating": "N/A"}, "helpfulness": {"Rating": 1}}},
            ],
        },
    ]
    found, left_out = read_scored([write(tmp_path / "rows.jsonl", rows)])
    assert [dict(one.scores) for one in found] == [
        {"humor": 55},
        {"helpsteer-helpfulness": 90, "helpsteer-verbosity": 10},
        {"ultrafeedback-honesty": 90, "ultrafeedback-overall_score": 75},
        {"ultrafeedback-helpfulness": 10},
    ]
    assert not left_out
    assert set(found[1].scores) < set(RELEASED.outputs)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "response": "b", "scores": {"humor": 101}},
            r"row 1 of 'rows.jsonl': the score 'humor' lies in \[0, 100\], got 101",
        ),
        ({"prompt": "a", "response": "b", "helpfulness": 5}, r"the score 'helpfulness' lies in \[0, 4\], got 5"),
        (
            {"prompt": "a", "response": "b", "scores": {"humor": None}},
            "no reply is left to learn from: 1 without any score",
        ),
        ({"prompt": "a", "response": "b"}, "1 without any score"),
        ({"prompt": "a", "response": " ", "scores": {"humor": 1}}, "1 with an empty reply"),
        ({"response": "b", "scores": {"humor": 1}}, "1 without a prompt"),
        ({"prompt": "a", "response": "b", "scores": 4}, "1 whose scores are no table"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_told(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        read_scored([write(tmp_path / "rows.jsonl", [row])])


def test_composed_replies_are_scored_by_the_oracles():
    rows = list(composed_scores("dev", 60, seed=3))
    assert rows == list(composed_scores("dev", 60, seed=3))
    assert all(0 <= value <= 100 for row in rows for value in row.scores.values())
    long = [row for row in rows if len(row.response.split()) > 80]
    short = [row for row in rows if len(row.response.split()) < 25]
    assert min(row.scores["verbosity"] for row in long) > max(row.scores["verbosity"] for row in short)


# Cards


def test_the_released_reward_model_reads_and_mixes_as_its_card_says(chat_model):
    ids = RELEASED.read([QUESTION], "b", chat_model, 512)
    text = chat_model.tokenizer.decode(ids)
    assert "rate the assistant's response from score 0-100 in these aspects: helpfulness, correctness" in text
    assert text.endswith("User: How do I fall asleep faster?\n\nAssistant: b [/INST]")
    mixture = RELEASED.mixture(["helpfulness", "verbosity"])
    assert mixture.tolist() == [[0] * 6 + [0.25] * 4, [0, 0, 0, 0, 1] + [0] * 5]
    assert "ultrafeedback-overall_score" not in OBJECTIVES["helpfulness"]


def test_an_attribute_that_is_not_scored_is_refused():
    with pytest.raises(UsageError, match="does not score 'verbosty': did you mean 'verbosity'"):
        RELEASED.mixture(["verbosty"])


def test_what_is_asked_behind_a_reply_is_read(chat_model):
    card = RewardCard("x", ("a",), ask="About what? {prompt}")
    text = chat_model.tokenizer.decode(card.read([QUESTION], "b", chat_model, 512))
    assert "b<|im_end|>\n<|im_start|>user\nAbout what? How do I fall asleep faster?<|im_end|>" in text
    one = encode(Scored((QUESTION,), "b", {}), card, chat_model)
    assert chat_model.tokenizer.decode(one.ids[one.begins : one.ends]) == "b<|im_end|>"


# The losses


class Still(torch.nn.Module):
    """A policy that is the chat model as it is."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def get_base_model(self):
        return self.module


def test_the_loss_is_the_masked_squared_error_plus_the_replies_cross_entropy(chat_model):
    card = RewardCard("x", ("a", "b"))
    rows = [Scored((QUESTION,), SHORT, {"a": 100.0}), Scored((QUESTION,), LONG, {"a": 0.0, "b": 50.0})]
    encoded = [encode(row, card, chat_model) for row in rows]
    head = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    width = max(len(one.ids) for one in encoded)
    said = torch.zeros(2, width, dtype=torch.bool)
    for place, one in enumerate(encoded):
        said[place, one.begins : one.ends] = True
    inputs = {
        "input_ids": torch.tensor([[*one.ids, *[0] * (width - len(one.ids))] for one in encoded]),
        "last": torch.tensor([len(one.ids) - 1 for one in encoded]),
        "said": said,
        "scores": torch.tensor([one.scores for one in encoded]),
    }
    states = last_states(chat_model.module, encoded)
    predicted = states @ head.T
    squares = [(predicted[0, 0] - 1) ** 2, predicted[1, 0] ** 2, (predicted[1, 1] - 0.5) ** 2]  # (0, b) is missing
    losses = []
    for one in encoded:
        with torch.no_grad():
            logits = chat_model.module(torch.tensor([one.ids])).logits[0, one.begins - 1 : one.ends - 1]
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(one.ids[one.begins : one.ends]), reduction="none"
        ).tolist()
    expected = float(sum(squares)) / 3 + 0.5 * sum(losses) / len(losses)
    found = Regression(Still(chat_model.module), head, 0.5)(**inputs)["loss"].item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_ridge_fits_each_output_by_the_rows_that_have_it(chat_model):
    card = RewardCard("x", ("a", "b"))
    rows = [
        encode(
            Scored(
                (Message("user", f"{n}"),), SHORT if n % 2 else LONG, {"a": 100.0 * (n % 2)} if n < 30 else {"b": 20.0}
            ),
            card,
            chat_model,
        )
        for n in range(40)
    ]
    head = ridge(chat_model.module, rows, lambda done, total: None)
    predicted = last_states(chat_model.module, rows) @ head.T
    assert [round(value) for value in predicted[:4, 0].tolist()] == [0, 1, 0, 1]
    assert predicted[30:, 1].tolist() == pytest.approx([0.2] * 10, abs=0.05)


# The whole run


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    path, metrics = train_reward(recipe(toy), folder / "run", data=[data(folder)], merge=True, progress=False)
    return folder, path, metrics


def test_it_learns_both_attributes_and_writes_what_it_is(finished, chat_model):
    folder, path, metrics = finished
    assert metrics["held_out"]["verbosity"]["pearson"] >= 0.9
    assert metrics["held_out"]["helpfulness"]["pearson"] >= 0.9
    model = load_reward(path)
    assert model.card.outputs == ("helpfulness", "verbosity")
    assert BackboneCard(**model.card.backbone) == BackboneCard.of(chat_model)
    assert json.loads((folder / "run" / "metrics.json").read_text())["held_out"] == metrics["held_out"]


@pytest.fixture
def said():
    return [([QUESTION], SHORT), ([QUESTION], LONG)]


def test_the_engine_s_rows_and_the_merged_model_score_alike(finished, chat_model, said):
    folder, path, _ = finished
    with Engine(chat_model.module, capacity=chat_model.capacity, vocabulary=chat_model.vocabulary) as engine:
        scorer = put_reward_on(load_reward(path), chat_model, engine)
        ours = scorer.rewards(said, ["verbosity", "helpfulness"])
    short, long = ours[:, 0].tolist()
    assert short + 30 < long
    merged = folder / "run" / "merged"
    whole = load_whole_reward(load_card(merged), str(merged), "x", ModelSpec("x"), remote_code=False)
    assert torch.allclose(whole.rewards(said, ["verbosity", "helpfulness"]), ours, atol=0.5)


def load_card(folder: Path) -> RewardCard:
    from prefmw.models.reward import read_reward_card

    return read_reward_card(folder)


def test_plain_transformers_loads_the_merged_model(finished, chat_model):
    from transformers import AutoModelForSequenceClassification

    merged = AutoModelForSequenceClassification.from_pretrained(finished[0] / "run" / "merged")
    assert merged.config.id2label == {0: "helpfulness", 1: "verbosity"}
    ids = load_card(finished[0] / "run" / "merged").read([QUESTION], LONG, chat_model, 512)
    with torch.no_grad():
        assert float(merged(torch.tensor([ids])).logits[0, 1]) > 50


class KilledError(Exception):
    """Stands for a kill."""


def test_a_killed_run_goes_on_to_the_same_end(finished, toy, tmp_path, monkeypatch):
    import prefmw.training.regression as regression

    folder, path, metrics = finished

    def dies(numbers, where, out):
        if where == "step 11":
            raise KilledError

    monkeypatch.setattr(regression, "check_finite", dies)
    with pytest.raises(KilledError):
        train_reward(recipe(toy), tmp_path / "run", data=[data(folder)], progress=False)
    monkeypatch.undo()
    again, _ = train_reward(recipe(toy), tmp_path / "run", data=[data(folder)], progress=False)
    ours, theirs = load_reward(again), load_reward(path)
    assert torch.allclose(ours.head, theirs.head, rtol=0.02, atol=0.02)


def test_other_data_is_refused(finished, toy, tmp_path):
    with pytest.raises(UsageError, match="of another recipe or of other data"):
        train_reward(recipe(toy), finished[0] / "run", data=[data(tmp_path, 20)], progress=False)


def test_a_loss_that_is_not_a_number_stops(toy, tmp_path):
    backbone = spoiled(toy, tmp_path / "spoiled")
    with pytest.raises(TrainingError, match="not finite and stopped"):
        train_reward(recipe(backbone), tmp_path / "run", data=[data(tmp_path)], progress=False)


def test_a_cut_checkpoint_and_another_backbone_are_told(finished, tmp_path, toy):
    import shutil

    folder = shutil.copytree(finished[1], tmp_path / "cut")
    card = load_card(folder)
    (folder / "reward.safetensors").write_bytes((folder / "reward.safetensors").read_bytes()[:200])
    with pytest.raises(ModelError, match="may be cut short"):
        load_reward(folder)
    from tests.toymodels import save_chat_model

    other = load_chat_model(ModelSpec(str(save_chat_model(tmp_path / "other", seed=5))))
    with (
        Engine(other.module, capacity=other.capacity, vocabulary=other.vocabulary) as engine,
        pytest.raises(ModelError, match="was trained on .* has other weights"),
    ):
        put_reward_on(replace(load_reward(finished[1]), card=card), other, engine)


def test_one_prompt_is_too_few_to_hold_some_out(toy, tmp_path):
    row = {"prompt": "a?", "response": "b", "scores": {"humor": 55}}
    with pytest.raises(UsageError, match="too few to hold some out"):
        train_reward(recipe(toy), tmp_path / "run", data=[write(tmp_path / "one.jsonl", [row])], progress=False)


@pytest.mark.parametrize("changes", [{"held_out": 0.0}, {"fit": Fit(rank=0)}, {"fit": Fit(lm=-1)}, {"max_tokens": 0}])
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(UsageError):
        RewardRecipe("x", "y", **changes)


def test_the_paper_s_numbers_are_the_defaults_and_the_embedded_recipe_is_read():
    paper = RewardRecipe("x", "y")
    assert (paper.fit.learning_rate, paper.fit.batch, paper.fit.epochs) == (1e-5, 64, 2)
    assert load_reward_recipe("tiny").backbone == "tiny"
    with pytest.raises(UsageError, match="no recipe 'nobody'; there is tiny"):
        load_reward_recipe("nobody")


def test_missing_scores_are_no_labels(chat_model):
    one = encode(Scored((QUESTION,), "b", {"a": 40.0}), RewardCard("x", ("a", "b")), chat_model)
    assert isinstance(one, EncodedReply)
    assert one.scores[0] == pytest.approx(0.4)
    assert math.isnan(one.scores[1])
