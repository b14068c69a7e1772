"""A PersRM's training: Eq. 9 in both stages, features within a budget, runs that resume or stop at NaN."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefmw.errors import TrainingError, UsageError
from prefmw.models.persrm import Prefix, load_persrm
from prefmw.preferences import Message
from prefmw.training.pair_reading import encode_pairs, head_logits, log_probabilities, pair_log_probabilities
from prefmw.training.pairs import Pair
from prefmw.training.persrm import Head, Lora, PersRMRecipe, load_persrm_recipe, train_persrm
from prefmw.training.preference_head import PreferenceHead, States
from tests.toymodels import spoiled

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SHORT, LONG = "Keep the answer short.", "Give a long answer."


def toy_pairs(count: int) -> list[Pair]:
    """Whoever wants it short prefers the short reply."""
    found = []
    for index in range(count):
        replies = ["Keep the room dark.", "Put the phone away an hour before bed, and keep the room dark and cool."]
        wants_short = index % 2 == 0
        chosen, rejected = replies if wants_short else replies[::-1]
        question = Message("user", f"How do I fall asleep faster? {index}")
        found.append(Pair((question,), chosen, rejected, SHORT if wants_short else LONG))
    return found


def data(folder: Path, count: int = 40) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": pair.messages[0].content,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "preference": pair.preference,
        }
        for pair in toy_pairs(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(toy: Path, **changes) -> PersRMRecipe:
    lora = Lora(rank=4, alpha=8, learning_rate=5e-3, batch=8, per_device=4, epochs=3)
    head = Head(learning_rate=0.02, batch=8, epochs=2, cache_mb=64)
    return PersRMRecipe("toy", str(toy), lora=lora, head=head, **changes)


@pytest.fixture(scope="module")
def encoded(chat_model):
    numbers: dict[str, int] = {}
    pairs, left_out = encode_pairs(toy_pairs(6), chat_model, Prefix(), 512, numbers)
    assert (len(pairs), dict(left_out), list(numbers)) == (6, {}, [SHORT, LONG])
    return pairs


def test_prompts_are_the_prefixed_conversation_and_replies_end_their_turn(chat_model, encoded):
    text = chat_model.tokenizer.decode(encoded[0].prompt)
    assert f"{SHORT}\n\nHow do I fall asleep faster? 0<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert chat_model.tokenizer.decode(encoded[0].chosen) == "Keep the room dark.<|im_end|>"


def test_pairs_beyond_the_limit_are_counted(chat_model):
    long = replace(toy_pairs(1)[0], messages=(Message("user", "word " * 600),))
    pairs, left_out = encode_pairs([long, *toy_pairs(1)], chat_model, Prefix(), 512, {})
    assert (len(pairs), dict(left_out)) == (1, {"beyond 512 tokens": 1})


def test_log_probabilities_are_those_of_whole_forwards(chat_model, encoded):
    found = pair_log_probabilities(chat_model.module, encoded)
    for row, pair in enumerate(encoded):
        for column, reply in enumerate((pair.chosen, pair.rejected)):
            with torch.no_grad():
                logits = chat_model.module(torch.tensor([[*pair.prompt, *reply]])).logits[0, len(pair.prompt) - 1 : -1]
            expected = logits.log_softmax(1).gather(1, torch.tensor(reply)[:, None]).sum()
            assert float(found[row, column]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["logit_scale", "final_logit_softcapping", "logits_scaling"])
def test_the_head_has_the_scale_and_soft_cap_of_its_architecture(chat_model, monkeypatch, name):
    hidden = torch.randn(3, 32)
    plain = chat_model.module.lm_head(hidden).detach()
    monkeypatch.setattr(chat_model.module.config, name, 4.0, raising=False)
    expected = {"logit_scale": 4 * plain, "logits_scaling": plain / 4}.get(name, 4 * torch.tanh(plain / 4))
    assert torch.allclose(head_logits(chat_model.module, hidden), expected, atol=1e-5)
    targets = torch.tensor([1, 2, 3])
    each = log_probabilities(chat_model.module, hidden, targets)
    assert torch.allclose(each, expected.log_softmax(1).gather(1, targets[:, None]).squeeze(1), atol=1e-5)


def head_inputs(module, encoded, states):
    lengths = [len(reply) for pair in encoded for reply in (pair.chosen, pair.rejected)]
    return {
        "hidden": torch.cat(states),
        "targets": torch.tensor([token for pair in encoded for token in (*pair.chosen, *pair.rejected)]),
        "owner": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        "preference": torch.tensor([pair.preference for pair in encoded]),
        "reference": pair_log_probabilities(module, encoded),
    }


def test_the_loss_is_equation_9(chat_model, encoded):
    """-log sigma(beta [sum log pi_theta/pi_ref of the chosen - the same of the rejected]) with w_p on the features."""
    torch.manual_seed(0)
    meanings = torch.randn(2, 32)
    head = PreferenceHead(chat_model.module, meanings, beta=0.3, penalty=0.01)
    weight = torch.randn(32, 32) * 0.05
    head.weight.data = weight
    states = States(chat_model.module, encoded, 1 << 20).of(range(len(encoded)))
    inputs = head_inputs(chat_model.module, encoded, states)
    policy = pair_log_probabilities(chat_model.module, encoded, 1 + meanings @ weight.T)
    ratios = policy - inputs["reference"]
    losses = [-math.log(1 / (1 + math.exp(-0.3 * float(chosen - rejected)))) for chosen, rejected in ratios]
    expected = sum(losses) / len(losses) + 0.01 * float(weight.square().sum())
    output = head(**inputs)
    assert output["loss"].item() == pytest.approx(expected, rel=1e-3)
    assert torch.allclose(output["margins"], 0.3 * (ratios[:, 0] - ratios[:, 1]), atol=1e-3)


def test_no_weights_and_no_lora_is_a_coin_flip(chat_model, encoded):
    head = PreferenceHead(chat_model.module, torch.randn(2, 32), beta=0.1, penalty=1.0)
    states = States(chat_model.module, encoded, 0).of(range(len(encoded)))
    output = head(**head_inputs(chat_model.module, encoded, states))
    assert output["loss"].item() == pytest.approx(math.log(2), abs=1e-4)
    output["loss"].backward()
    assert head.weight.grad.abs().max() > 0


def test_states_are_kept_within_their_budget_and_computed_beyond_it(chat_model, encoded):
    whole = States(chat_model.module, encoded, 1 << 20)
    first = whole.of([0, 1, 2])
    assert len(whole.kept) == 3
    assert whole.bytes == sum(state.numel() * 2 for state in first)
    tight = States(chat_model.module, encoded, first[0].numel() * 2)
    tight.of([0, 1, 2])
    assert list(tight.kept) == [0]
    for ours, theirs in zip(tight.of([0, 1, 2]), whole.of([0, 1, 2]), strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=0.05, rtol=0.02)  # kept in bfloat16


# The whole run


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("persrm")
    path, metrics = train_persrm(recipe(toy), folder / "run", data=[data(folder)], progress=False)
    return folder, path, metrics


def test_both_stages_learn_the_pairs(finished, chat_model):
    _, path, metrics = finished
    assert metrics["stage1"]["accuracy"] >= 0.9
    assert metrics["stage2"]["accuracy"] >= metrics["stage1"]["accuracy"]
    assert metrics["stage1"]["loss"] < 0.6
    persrm = load_persrm(path)
    persrm.check_backbone(chat_model)
    assert {pair[0].shape[0] for pair in persrm.lora.values()} == {4}
    assert not any("lm_head" in layer for layer in persrm.lora)
    assert len(persrm.lora) == 14  # seven linear layers in two blocks
    assert persrm.card.training["lora"]["rank"] == 4


def test_the_run_leaves_metrics_and_curves(finished):
    folder, _, metrics = finished
    assert json.loads((folder / "run" / "metrics.json").read_text())["stage2"] == metrics["stage2"]
    assert (folder / "run" / "curves.png").stat().st_size > 1000
    assert metrics["pairs"]["train"] + metrics["pairs"]["dev"] + metrics["pairs"]["held_out"] == 40
    assert set(metrics["untrained"]) == {"likelihood", "likelihood_per_token", "longer", "shorter"}
    assert metrics["untrained"]["longer"] == pytest.approx(1 - metrics["untrained"]["shorter"], abs=1e-3)
    assert metrics["stage2"]["epochs"][0]["epoch"] == 0


def test_the_loaded_checkpoint_is_the_policy_that_was_trained(finished, chat_model, toy):
    """LoRA and W out of the file, by the engine's own gated LoRA, prefer what the metrics say they do."""
    from prefmw.decoding import Engine
    from prefmw.guidance import put_on

    _, path, _ = finished
    engine = Engine(chat_model.module, capacity=chat_model.capacity, vocabulary=chat_model.vocabulary)
    guidance = put_on(load_persrm(path), chat_model, engine, lambda name: chat_model)
    hits = 0
    for pair in toy_pairs(6):
        replies = [(chat_model.template.encode_reply(text), True) for text in (pair.chosen, pair.rejected)]
        chosen, rejected = guidance.rewards(
            pair.messages, pair.preference, guidance.scale(pair.preference), replies, engine
        )
        hits += chosen > rejected
    engine.close()
    assert hits >= 5


def test_the_same_again_is_done_already_and_other_data_is_refused(finished, toy, tmp_path):
    folder, _, _ = finished
    with pytest.raises(UsageError, match="of another recipe or of other data"):
        train_persrm(recipe(toy), folder / "run", data=[data(tmp_path, 30)], progress=False)
    with pytest.raises(UsageError, match="of another recipe or of other data"):
        train_persrm(recipe(toy, seed=1), folder / "run", data=[data(folder)], progress=False)


class KilledError(Exception):
    """Stands for a kill."""


def dies_at(monkeypatch, stage: str, step: int) -> None:
    """A kill in the loss of that step."""
    import prefmw.training.dpo
    import prefmw.training.preference_head
    from prefmw.training.runs import check_finite

    def checked(numbers, where, out):
        check_finite(numbers, where, out)
        if where == f"{stage}, step {step}":
            raise KilledError

    for module in (prefmw.training.dpo, prefmw.training.preference_head):
        monkeypatch.setattr(module, "check_finite", checked)


@pytest.mark.parametrize(("stage", "step"), [("stage 1", 8), ("stage 2", 6)])
def test_a_killed_run_goes_on_to_the_same_end(finished, toy, tmp_path, monkeypatch, stage, step):
    folder, _, expected = finished
    dies_at(monkeypatch, stage, step)
    with pytest.raises(KilledError):
        train_persrm(recipe(toy), tmp_path / "run", data=[data(folder)], progress=False)
    monkeypatch.undo()
    _, metrics = train_persrm(recipe(toy), tmp_path / "run", data=[data(folder)], progress=False)
    for name in ("stage1", "stage2"):
        assert metrics[name]["loss"] == pytest.approx(expected[name]["loss"], rel=2e-2)
        assert metrics[name]["accuracy"] == expected[name]["accuracy"]


def test_a_loss_that_is_not_a_number_stops_and_says_where(toy, tmp_path):
    backbone = spoiled(toy, tmp_path / "spoiled")
    with pytest.raises(
        TrainingError,
        match=r"stage 1, .*step \d+: .*not finite and stopped; (the last good checkpoint is|there was no)",
    ):
        train_persrm(recipe(backbone), tmp_path / "run", data=[data(tmp_path)], progress=False)
    assert not (tmp_path / "run" / "persrm").exists()


def test_too_few_prompts_are_refused(toy, tmp_path):
    with pytest.raises(UsageError, match="too few to hold some out"):
        train_persrm(recipe(toy), tmp_path / "run", data=[data(tmp_path, 2)], progress=False)


def test_prompts_beyond_the_context_leave_nothing(toy, tmp_path):
    with pytest.raises(UsageError, match=r"no pair is left in the part 'train': \d+ beyond 8 tokens"):
        train_persrm(recipe(toy, max_tokens=8), tmp_path / "run", data=[data(tmp_path)], progress=False)


@pytest.mark.parametrize(
    "changes", [{"held_out": 0.0}, {"held_out": 0.9}, {"lora": Lora(rank=0)}, {"head": Head(penalty=-1)}]
)
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(UsageError):
        PersRMRecipe("x", "y", **changes)


def test_the_paper_s_numbers_are_the_defaults():
    paper = PersRMRecipe("x", "y")
    assert (paper.lora.rank, paper.lora.learning_rate, paper.lora.batch, paper.lora.epochs) == (8, 5e-6, 128, 3)
    assert (paper.lora.beta, paper.max_tokens, paper.prefix) == (0.1, 2048, Prefix())


def test_the_embedded_recipe_is_read_and_unknown_ones_are_told():
    tiny = load_persrm_recipe("tiny")
    assert (tiny.backbone, tiny.prefix) == ("tiny", Prefix("{preference}", "{prompt}"))
    with pytest.raises(UsageError, match="no recipe 'nobody'; there is tiny"):
        load_persrm_recipe("nobody")
