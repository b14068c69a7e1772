"""DPA on an engine: what a turn reads and records, notices, robust selection, checkpoints by path and by name."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from prefmw.arithmetic import put_dpa_on
from prefmw.bootstrap import build_personalizer, close_engines, load_arithmetic, load_backend, open_store
from prefmw.checkpoints import dpa_source, has_dpa, reward_source
from prefmw.decoding import Sampling
from prefmw.errors import ModelError, ModelNotFoundError, UsageError
from prefmw.explanation import explain_turn, find_turn
from prefmw.models.dpa import DPA, load_dpa, save_dpa
from prefmw.models.persrm import BackboneCard
from prefmw.models.reward import RELEASED as RELEASED_REWARD
from prefmw.models.reward import RewardCard, RewardModel, save_reward
from prefmw.personalizer import Personalizer
from prefmw.plans import Defaults, Options
from prefmw.preferences import DPACard, Message, Stated, default_dimensions
from prefmw.preferences.directions import RELEASED, from_angles
from prefmw.rewards import Scorer
from prefmw.settings import load_settings
from tests.toymodels import random_persrm

QUESTION = [Message("user", "How do I fall asleep faster?")]


@pytest.fixture(scope="module")
def checkpoint(chat_model, tmp_path_factory) -> Path:
    """A DPA checkpoint on the toy, with a reward model beside it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    backbone = asdict(BackboneCard.of(chat_model))
    torch.manual_seed(0)
    reward = RewardCard("toy-reward", ("helpfulness", "verbosity"), backbone=backbone)
    save_reward(folder / "reward", RewardModel(reward, "", {}, torch.randn(2, 32)))
    card = DPACard("toy-dpa", cone={"verbosity": (-45, 30)}, backbone=backbone, reward=str(folder / "reward"))
    save_dpa(folder / "dpa", card, random_persrm(chat_model).lora)
    return folder / "dpa"


def scorer_of(values: dict[str, tuple[float, float]]) -> Scorer:
    """A reward model that knows some replies."""

    class Known(Scorer):
        def rewards(self, replies, attributes):
            return torch.tensor([values[text] for _, text in replies])

    return Known(RewardCard("known", ("helpfulness", "verbosity")), "1", None, None)  # type: ignore[arg-type]


@pytest.fixture
def arithmetic(checkpoint, backend):
    return put_dpa_on(load_dpa(checkpoint), backend.chat, backend.engine)


@pytest.fixture
def make(store, backend, arithmetic):
    store.add_user("alice", actor="test")

    def build(**values) -> Personalizer:
        ours = backend._replace(load_arithmetic=lambda: arithmetic)
        defaults = Defaults(**{"max_tokens": 16, "seed": 1, "dpa": lambda: arithmetic.card, **values})
        return Personalizer(store, lambda: ours, default_dimensions(), defaults)

    return build


def prefer(store, **weights: float) -> None:
    from prefmw.preferences import Source

    values = {key: Stated(value) for key, value in weights.items()}
    store.write_weights("alice", values, source=Source.user, actor="test", reason="")


# A turn


def test_a_reply_reads_the_direction_as_its_system_prompt(make, store, backend, arithmetic):
    prefer(store, verbosity=-0.6)
    reply = make().reply("alice", QUESTION, Options(method="dpa"))
    assert reply.plan.principle.endswith("helpfulness*80 + verbosity*-60")
    context = backend.chat.template.encode([Message("system", reply.plan.principle), *QUESTION])
    assert arithmetic.request(QUESTION, reply.plan.principle, reply.plan.sampling).views[0].context == context
    shown = reply.as_json()
    assert shown["preferences"]["direction"]["applied"] == {"helpfulness": 0.8, "verbosity": -0.6}
    assert (shown["dpa"], shown["strength"], shown["notices"]) == (f"toy-dpa@{arithmetic.revision}", None, [])
    (turn,) = store.turns("alice", reply.conversation_id)
    assert turn.plan["direction"]["prompt"] == reply.plan.principle
    assert turn.plan["dpa"] == shown["dpa"]


def test_another_direction_is_another_reply_and_the_lora_has_a_say(make, store, backend, arithmetic):
    options = Options(method="dpa", temperature=0.0)
    prefer(store, verbosity=-0.6)
    short = make().reply("alice", QUESTION, options).text
    prefer(store, verbosity=0.4)
    assert make().reply("alice", QUESTION, options).text != short
    bare = put_dpa_on(DPA(arithmetic.card, "bare", {}), backend.chat, backend.engine)
    ours, theirs = (one.request(QUESTION, "x", Sampling(0.0, 1.0, None, 12, 0)) for one in (arithmetic, bare))
    assert list(backend.engine.submit(ours)) != list(backend.engine.submit(theirs))


@pytest.mark.parametrize(
    ("weights", "notice"),
    [
        ({}, "alice has no weight on helpfulness or verbosity, so the direction is helpfulness alone"),
        (
            {"verbosity": -1.0},
            "the direction helpfulness +0.00, verbosity -1.00 lies outside what 'toy-dpa' was trained on; the nearest "
            "is helpfulness +0.71, verbosity -0.71",
        ),
        ({"verbosity": -0.2, "humor": 0.5}, "'toy-dpa' knows no humor; under dpa that has no effect"),
    ],
)
def test_what_a_direction_cannot_do_is_told(make, store, weights, notice):
    if weights:
        prefer(store, **weights)
    assert make().reply("alice", QUESTION, Options(method="dpa")).notices == (notice,)


def test_a_persona_has_no_say_and_that_is_told(make, store):
    store.edit_user("alice", persona="a nurse", actor="test")
    prefer(store, verbosity=-0.2)
    reply = make().reply("alice", QUESTION, Options(method="dpa"))
    assert reply.notices == ("under dpa a persona has no effect: directions are numbers alone",)
    assert "nurse" not in reply.plan.principle


def test_zeros_are_refused_before_a_model_is_loaded(make, store):
    prefer(store, verbosity=0.0, helpfulness=0.0)
    with pytest.raises(UsageError, match="a direction of zeros"):
        make().plan(store.profile("alice"), Options(method="dpa"))


def test_a_model_without_a_card_is_refused_with_what_is_needed(make, store):
    with pytest.raises(UsageError, match="trained to read directions.*--dpa.*any model takes --method prompt"):
        make(dpa=None).plan(store.profile("alice"), Options(method="dpa"))


def test_dpa_takes_no_strength_and_auto_never_is_dpa(make, store):
    with pytest.raises(UsageError, match="takes no strength"):
        make().plan(store.profile("alice"), Options(method="dpa", strength=1.0))
    prefer(store, verbosity=-0.6)
    assert make().plan(store.profile("alice"), Options()).method == "linear"


# Robust selection


def test_robust_keeps_the_best_by_the_direction_asked_for_unprojected(make, store, arithmetic, backend, monkeypatch):
    """v = (0, -1) lies outside the cone: the shortest of the replies wins, though the nearest direction inside would
    have another.
    """
    prefer(store, verbosity=-1.0)
    texts: list[str] = []

    def rewards(self, replies, attributes):
        texts[:] = [text for _, text in replies]
        return torch.tensor([[90.0, 50.0]] + [[10.0, 5.0 + place] for place in range(1, len(texts))])

    monkeypatch.setattr(Scorer, "rewards", rewards)
    monkeypatch.setattr(
        "prefmw.arithmetic.Arithmetic.scorer",
        lambda self: Scorer(RewardCard("known", ("helpfulness", "verbosity")), "1", backend.chat, None),  # type: ignore[arg-type]
    )
    reply = make().reply("alice", QUESTION, Options(method="dpa", robust=5))
    assert len(texts) == 5
    assert len(set(texts)) > 1
    assert reply.text == texts[1]
    assert reply.plan.robust == 5


def test_neighbours_are_near_and_each_has_a_seed_of_its_own(make, store, arithmetic, chat_model):
    prefer(store, verbosity=-0.6)
    plan = make().plan(store.profile("alice"), Options(method="dpa", robust=6))
    around = arithmetic.around(QUESTION, plan.direction, plan.sampling, 6)
    assert len({request.sampling.seed for request in around}) == 6
    prompts = {chat_model.tokenizer.decode(list(request.views[0].context)) for request in around}
    assert len(prompts) == 6
    assert (
        around[0].views[0].context == arithmetic.around(QUESTION, plan.direction, plan.sampling, 6)[0].views[0].context
    )


def test_robust_without_a_reward_model_is_refused(make, store):
    prefer(store, verbosity=-0.6)
    with pytest.raises(UsageError, match="choosing among replies needs a reward model"):
        make().reply("alice", QUESTION, Options(method="dpa", robust=3))


@pytest.mark.parametrize("robust", [0, 65, "3"])
def test_robust_out_of_range_is_refused(make, store, robust):
    with pytest.raises(UsageError, match="robust is a whole number from 1 to 64"):
        make().plan(store.profile("alice"), Options(method="dpa", robust=robust))


def test_robust_for_another_method_has_no_effect_and_says_so(make, store):
    prefer(store, verbosity=-0.6)
    reply = make().reply("alice", QUESTION, Options(method="prompt", robust=3))
    assert reply.notices == ("--robust has no effect: it is DPA's, and the method is 'prompt'",)


# Checkpoints by path and by name


def test_a_path_feeds_a_turn_through_the_settings(checkpoint, toy, tmp_path):
    settings = load_settings(
        {"model": str(toy), "dpa": str(checkpoint), "max_tokens": 12, "database": str(tmp_path / "a.db")}
    )
    store = open_store(settings)
    store.add_user("alice", actor="test")
    prefer(store, verbosity=-0.6)
    personalizer = build_personalizer(settings, store)
    reply = personalizer.reply("alice", QUESTION, Options(method="dpa", seed=1, robust=2))
    store.close()
    close_engines()
    assert reply.plan.dpa.startswith("toy-dpa@")
    assert reply.text


def test_a_whole_checkpoint_answers_in_place_of_the_chat_model(toy, tmp_path):
    from tests.toymodels import save_chat_model

    other = save_chat_model(tmp_path / "whole", seed=3)
    (other / "dpa.json").write_text(DPACard("whole", weights="whole").to_json())
    settings = load_settings({"model": str(toy), "dpa": str(other), "max_tokens": 8})
    arithmetic = load_arithmetic(settings, load_backend(settings))
    assert (arithmetic.chat.name, arithmetic.adapter) == (str(other), None)
    own = load_settings({"model": str(other)})
    assert has_dpa(own)
    assert dpa_source(own) == (DPACard("whole", weights="whole"), str(other))
    close_engines()


def test_the_released_checkpoints_are_known_by_name():
    policy, reward = "Haoxiang-Wang/DPA-v1-Mistral-7B", "Haoxiang-Wang/RewardModel-Mistral-7B-for-DPA-v1"
    for settings in (load_settings({"dpa": policy}), load_settings({"model": policy})):
        assert has_dpa(settings)
        assert dpa_source(settings) == (RELEASED, policy)
    assert RELEASED.reward == reward
    assert reward_source(reward) == (RELEASED_REWARD, reward)


def test_a_released_prompt_in_a_system_free_template_is_folded_into_the_first_turn():
    """Mistral's own template takes no system prompt; the released checkpoint's does. Both hold the whole prompt."""
    from prefmw.models import ChatTemplate
    from prefmw.preferences.directions import with_system
    from tests.toymodels import make_tokenizer

    for family in ("chatml", "mistral"):
        tokenizer = make_tokenizer(family)
        prompt = RELEASED.prompt(from_angles([-15]))
        text = tokenizer.decode(ChatTemplate(tokenizer, name="x").encode(with_system(QUESTION, prompt)))
        assert "maximize weighted rating = helpfulness*97 + verbosity*-26" in text


def test_a_checkpoint_on_rewards_is_refused_in_a_turn(checkpoint, toy, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "steerlm")
    card = replace(load_dpa(checkpoint).card, condition="rewards")
    (folder / "dpa.json").write_text(card.to_json())
    settings = load_settings({"model": str(toy), "dpa": str(folder)})
    with pytest.raises(UsageError, match="is conditioned on rewards, not on directions"):
        load_arithmetic(settings, load_backend(settings))
    close_engines()


def test_what_is_no_checkpoint_is_told(toy, tmp_path, checkpoint):
    for name, error, message in [
        (str(tmp_path / "nowhere"), ModelNotFoundError, "no DPA checkpoint .* name a folder"),
        (str(toy), ModelNotFoundError, "it holds no dpa.json, which says what its directions are over"),
        ("nobody/nothing", ModelNotFoundError, "no such folder here, nor on the hub"),
    ]:
        with pytest.raises(error, match=message):
            dpa_source(load_settings({"model": str(toy), "dpa": name}))
    folder = shutil.copytree(checkpoint, tmp_path / "cut")
    (folder / "dpa.safetensors").write_bytes((folder / "dpa.safetensors").read_bytes()[:99])
    with pytest.raises(ModelError, match="may be cut short"):
        load_dpa(folder)


def test_a_lora_for_another_model_is_refused(checkpoint, tmp_path):
    from tests.toymodels import save_chat_model

    other = save_chat_model(tmp_path / "other", seed=5)
    settings = load_settings({"model": str(other), "dpa": str(checkpoint)})
    with pytest.raises(ModelError, match="the DPA checkpoint 'toy-dpa' was trained on .* has other weights"):
        load_arithmetic(settings, load_backend(settings))
    close_engines()


# The command line


def test_prefs_show_prints_the_direction_and_the_prompt(checkpoint, monkeypatch, capsys):
    from prefmw.cli.main import run

    monkeypatch.setenv("PREFMW_DPA", str(checkpoint))
    run(["users", "add", "alice"])
    run(["prefs", "set", "alice", "verbosity=-0.6"])
    out = capsys.readouterr().out
    assert "direction  helpfulness +0.80, verbosity -0.60\n" in out
    assert "helpfulness*80 + verbosity*-60" in out
    run(["prefs", "set", "alice", "verbosity=-1"])
    assert "beyond what 'toy-dpa' was trained on: helpfulness +0.71, verbosity -0.71" in capsys.readouterr().out
    run(["prefs", "show", "alice", "--json"])
    direction = json.loads(capsys.readouterr().out)["direction"]
    assert (direction["checkpoint"], direction["angles"]) == ("toy-dpa", {"verbosity": -45.0})
    run(["prefs", "set", "alice", "verbosity=0", "helpfulness=0"])
    assert "direction  – (a direction of zeros points nowhere" in capsys.readouterr().out


def test_chat_takes_a_checkpoint_by_flag(checkpoint, toy, capsys, monkeypatch):
    from prefmw.cli.main import run

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    run(["users", "add", "alice"])
    run(["prefs", "set", "alice", "verbosity=-0.6"])
    capsys.readouterr()
    arguments = ["chat", "Hello?", "-u", "alice", "-m", str(toy), "--dpa", str(checkpoint), "--max-tokens", "8"]
    assert run([*arguments, "--method", "dpa", "--robust", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["method"], shown["robust"]) == ("dpa", 2)
    assert shown["preferences"]["direction"]["projected"] is False


def test_langchain_takes_a_checkpoint_as_a_field(checkpoint, toy, home):
    from prefmw.adapters.langchain import ChatPrefMW

    chat = ChatPrefMW(model=str(toy), dpa=str(checkpoint), method="dpa", max_tokens=8, seed=1, user_id="alice")
    reply = chat.invoke("Hello?")
    assert reply.response_metadata["prefmw"]["method"] == "dpa"
    close_engines()


def test_why_compares_a_direction_s_reply_with_the_plain_model(make, store, backend, arithmetic):
    prefer(store, verbosity=-0.6)
    make().reply("alice", QUESTION, Options(method="dpa"))
    turn, messages = find_turn(store, "alice", None)
    ours = backend._replace(load_arithmetic=lambda: arithmetic)
    found = explain_turn(turn, messages, ours)
    assert found.text == turn.text
    asked = backend.chat.template.encode([Message("system", found.plan.principle), *QUESTION])
    plain = backend.chat.template.encode(QUESTION)
    for context, adapter, name in ((asked, arithmetic.adapter, "aligned"), (plain, None, "plain")):
        (read,) = backend.engine.log_probabilities([(context, list(turn.token_ids))], adapter=adapter)
        said = [getattr(step.said, name) for step in found.steps][: len(read)]
        assert said == pytest.approx([float(one) for one in read], abs=0.01)
    another = replace(arithmetic, revision="another")
    with pytest.raises(UsageError, match="--dpa"):
        explain_turn(turn, messages, backend._replace(load_arithmetic=lambda: another))
