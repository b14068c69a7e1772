"""PAD by a PersRM: token for token what the equations say, in two rows or three, by the base's tokens or by others'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from prefmw.alignment import Combined, combine_pad, combine_pad_by, top_k
from prefmw.decoding import Engine, Request, Sampling, View
from prefmw.decoding.linears import Adapter
from prefmw.errors import ModelError, UsageError
from prefmw.guidance import Guidance, put_on
from prefmw.models import ChatModel, ModelSpec, load_chat_model
from prefmw.models.persrm import PersRM, Prefix
from prefmw.models.token_bytes import TokenMap, token_bytes
from prefmw.personalizer import Personalizer
from prefmw.plans import Defaults, Options
from prefmw.preferences import Message, default_dimensions
from prefmw.steering import Backend
from tests.toymodels import random_persrm, save_chat_model

QUESTION = [Message("user", "How do I fall asleep faster?")]
PREFERENCE = "Be funny and add a joke or two."
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=10, max_tokens=24, seed=1)
DRAWN = replace(GREEDY, temperature=0.7)


def with_prefix(persrm: PersRM, prefix: Prefix) -> PersRM:
    return replace(persrm, card=replace(persrm.card, prefix=prefix))


@pytest.fixture(scope="module")
def persrm(chat_model) -> PersRM:
    return random_persrm(chat_model)


def nobody(name: str) -> ChatModel:
    raise AssertionError(f"{name} is not to be loaded")


@pytest.fixture(scope="module")
def guided(chat_model, persrm):
    """The toy model, an engine, and the PersRM on it."""
    engine = Engine(chat_model.module, capacity=chat_model.capacity, vocabulary=chat_model.vocabulary)
    guidance = put_on(persrm, chat_model, engine, nobody)
    yield engine, guidance
    engine.close()


def tokens(engine: Engine, request: Request) -> list[int]:
    return list(engine.submit(request))


def asked(guidance: Guidance, beta: float, sampling: Sampling = GREEDY) -> Request:
    return guidance.request(QUESTION, PREFERENCE, guidance.scale(PREFERENCE), beta, sampling)


@pytest.fixture
def fresh(toy: Path):
    """The toy model's weights once more, on which no engine runs."""
    return load_chat_model(ModelSpec(str(toy))).module


def with_lora(module, persrm: PersRM):
    """The same module with the LoRA in its weights."""
    with torch.no_grad():
        for name, (down, up) in persrm.lora.items():
            module.get_submodule(name).weight += up @ down
    return module


@torch.no_grad()
def naive(chat: ChatModel, policy, guidance: Guidance, beta: float, count: int) -> list[int]:
    """Eq. 13, greedily, with whole forwards and full log-softmaxes of the model and of one that has the LoRA in its
    weights.
    """
    scale = guidance.scale(PREFERENCE)
    ids, _ = guidance.contexts(QUESTION, PREFERENCE)
    said: list[int] = []
    while len(said) < count:
        read = torch.tensor([[*ids, *said]])
        base = chat.module(read).logits[:, -1].log_softmax(1)
        hidden = policy.model(read).last_hidden_state[:, -1]
        guide = policy.lm_head(hidden * scale).log_softmax(1)
        scores = base + beta * (guide - base)
        said.append(int(scores.masked_fill(~top_k(base, 10), -torch.inf).argmax()))
        if said[-1] in chat.stop_ids:
            return said[:-1]
    return said


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_two_rows_are_equation_13_worked_naively(guided, chat_model, persrm, fresh, beta):
    engine, guidance = guided
    expected = naive(chat_model, with_lora(fresh, persrm), guidance, beta, 24)
    assert tokens(engine, asked(guidance, beta)) == expected


def test_it_steers_and_w_p_and_lora_both_matter(guided):
    engine, guidance = guided
    request = asked(guidance, 1.0)
    base, policy = request.views
    without = [
        replace(request, views=(base, replace(policy, **change)))
        for change in ({"head_scale": None}, {"adapter": None})
    ]
    replies = [tokens(engine, one) for one in (request, *without, asked(guidance, 0.0))]
    assert len({tuple(reply) for reply in replies}) == 4


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_beta_0_in_two_rows_is_the_base_alone(guided, sampling):
    engine, guidance = guided
    full = asked(guidance, 1.0, sampling)
    zero = replace(full, parameters=(0.0,))
    assert tokens(engine, zero) == tokens(engine, asked(guidance, 0.0, sampling))
    assert len(asked(guidance, 0.0).views) == 1


def combine_by_the_full_head(views, parameters):
    """Log-probabilities with their normalisers, as printed."""
    base, policy = (view.log_softmax(1) for view in views)
    return Combined(base + parameters[:, :1] * (policy - base), base)


def combine_candidates_alone(views, parameters):
    """The candidates' columns, and nothing of any other token."""
    base, policy = views
    keep = top_k(base, 10)
    nothing = torch.full_like(base, -torch.inf)
    return combine_pad([torch.where(keep, base, nothing), torch.where(keep, policy, nothing)], parameters)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("beta", [0.7, 1.0, 1.5])
def test_scoring_the_candidates_alone_gives_the_same_tokens_as_the_full_head(guided, sampling, beta):
    engine, guidance = guided
    request = asked(guidance, beta, sampling)
    replies = [
        tokens(engine, replace(request, combiner=combiner))
        for combiner in (combine_pad, combine_by_the_full_head, combine_candidates_alone)
    ]
    assert replies[0] == replies[1] == replies[2]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_two_rows_give_the_same_tokens_as_three(guided, toy, persrm, sampling):
    engine, guidance = guided
    other = load_chat_model(ModelSpec(str(toy)))
    engine.add_backbone("apart", other.module, capacity=other.capacity, vocabulary=other.vocabulary)
    adapter = f"apart for {sampling.temperature}"
    engine.add_adapter(adapter, Adapter(persrm.lora), backbone="apart")
    three = replace(guidance, combiner=combine_pad_by, policy="apart", adapter=adapter, reference="apart")
    request = asked(three, 1.3, sampling)
    assert len(request.views) == 3
    assert tokens(engine, request) == tokens(engine, asked(guidance, 1.3, sampling))


def test_another_base_of_the_same_tokens_is_read_beside_policy_and_reference(chat_model, persrm, fresh):
    other = fresh
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.9)
    base = replace(chat_model, module=other)
    engine = Engine(other, capacity=base.capacity, vocabulary=base.vocabulary)
    loaded = []
    guidance = put_on(persrm, base, engine, lambda name: loaded.append(name) or chat_model)
    assert loaded == [chat_model.name]
    assert (guidance.tokens, guidance.combiner) == (None, combine_pad_by)
    steered, plain = tokens(engine, asked(guidance, 1.0)), tokens(engine, asked(guidance, 0.0))
    engine.close()
    assert steered != plain


def test_a_persrm_whose_backbone_is_not_what_it_was_is_refused(chat_model, persrm, fresh):
    changed = fresh
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.1)
    base = replace(chat_model, module=changed)
    engine = Engine(changed, capacity=base.capacity, vocabulary=base.vocabulary)
    with pytest.raises(ModelError, match="has other weights"):
        put_on(persrm, base, engine, lambda name: base)
    engine.close()


# The released linear head


def test_a_linear_head_maps_the_policy_s_hidden_states(chat_model, persrm):
    torch.manual_seed(0)
    head = nn.Linear(32, 32).requires_grad_(False)
    card = replace(persrm.card, head="linear")
    released = replace(persrm, card=card, lora={}, weight=None, mean=None, deviation=None, linear=head)
    engine = Engine(chat_model.module, capacity=chat_model.capacity, vocabulary=chat_model.vocabulary)
    guidance = put_on(released, chat_model, engine, nobody)
    assert guidance.scale(PREFERENCE) is None
    ids, _ = guidance.contexts(QUESTION, PREFERENCE)
    said: list[int] = []
    with torch.no_grad():
        while len(said) < 12:
            read = torch.tensor([[*ids, *said]])
            base = chat_model.module(read).logits[:, -1]
            guide = chat_model.module.lm_head(head(chat_model.module.model(read).last_hidden_state[:, -1]))
            scores = base + 0.8 * (guide - base)
            said.append(int(scores.masked_fill(~top_k(base, 10), -torch.inf).argmax()))
    reply = tokens(engine, guidance.request(QUESTION, PREFERENCE, None, 0.8, replace(GREEDY, max_tokens=12)))
    engine.close()
    assert reply == said[: len(reply)]
    assert len(reply) == 12 or said[len(reply)] in chat_model.stop_ids


# Other tokenizers


@pytest.fixture(scope="module", params=["llama3", "mistral", "gemma"])
def stranger(request, tmp_path_factory) -> ChatModel:
    """A chat model of another tokenizer."""
    return load_chat_model(ModelSpec(str(save_chat_model(tmp_path_factory.mktemp("models") / "other", request.param))))


def test_the_bytes_of_a_text_s_tokens_are_the_text_s(chat_model, stranger):
    text = "Put the phone away, café at 7:30!\n"
    for chat in (chat_model, stranger):
        spelled = token_bytes(chat.tokenizer, chat.vocabulary)
        ids = chat.template.encode_reply(text)
        assert b"".join(spelled[index] or b"" for index in ids).lstrip(b" ") == text.encode()


def test_a_map_pairs_tokens_of_the_same_bytes_alone(chat_model, stranger):
    paired = TokenMap(stranger, chat_model)
    ours, theirs = (token_bytes(chat.tokenizer, chat.vocabulary) for chat in (chat_model, stranger))
    ends = {index for index in stranger.stop_ids if index < len(theirs)}
    for index, column in enumerate(paired.columns.tolist()):
        if index in ends:
            assert column in chat_model.stop_ids
        elif column >= 0:
            assert ours[column] == theirs[index]
        else:
            assert theirs[index] is None or theirs[index] not in ours
    assert (paired.columns >= 0).sum() > 100


def test_what_the_other_model_reads_has_the_same_bytes(chat_model, stranger):
    paired = TokenMap(stranger, chat_model)
    ours, theirs = (token_bytes(chat.tokenizer, chat.vocabulary) for chat in (chat_model, stranger))
    for index, text in enumerate(theirs):
        assert b"".join(ours[read] for read in paired.advance(index)) == (text or b"")


def test_a_base_of_another_tokenizer_is_steered(stranger, chat_model, persrm):
    engine = Engine(stranger.module, capacity=stranger.capacity, vocabulary=stranger.vocabulary)
    guidance = put_on(persrm, stranger, engine, lambda name: chat_model)
    assert guidance.tokens is not None
    plain = tokens(engine, asked(guidance, 0.0))
    full = asked(guidance, 2.0)
    assert tokens(engine, replace(full, parameters=(0.0,))) == plain
    steered = tokens(engine, full)
    again = tokens(engine, full)
    rewards = guidance.rewards(
        QUESTION, PREFERENCE, guidance.scale(PREFERENCE), [(plain, False), (steered, False)], engine
    )
    engine.close()
    assert steered == again != plain
    assert len(set(rewards)) == 2


# A user's turn


@pytest.fixture
def people(store):
    store.add_user("alice", persona="I'm a nurse on night shifts; keep it short", actor="test")
    store.add_user("bob", actor="test")
    return store


@pytest.fixture
def plain_prefix(chat_model, persrm):
    """As the principle stands in a prompt: so that prompting has the same prefix."""
    engine = Engine(chat_model.module, capacity=chat_model.capacity, vocabulary=chat_model.vocabulary)
    guidance = put_on(with_prefix(persrm, Prefix("{preference}", "{prompt}")), chat_model, engine, nobody)
    yield Backend(chat_model, engine, lambda: guidance)
    engine.close()


@pytest.fixture
def personalizer(people, plain_prefix) -> Personalizer:
    defaults = Defaults(max_tokens=24, has_persrm=True)
    return Personalizer(people, lambda: plain_prefix, default_dimensions(), defaults)


@pytest.mark.parametrize("candidate", ["greedy", "stochastic", "best-of-k"])
def test_strength_0_is_prompting_under_the_same_prefix_and_candidate_rule(personalizer, candidate):
    temperature = 0.0 if candidate == "greedy" else 0.7
    zero = personalizer.reply("alice", QUESTION, Options("pad", 0.0, seed=3, candidate=candidate))
    prompt = personalizer.reply("alice", QUESTION, Options("prompt", None, temperature, 1.0, 10, seed=3))
    other = personalizer.reply("alice", QUESTION, Options("pad", 1.0, seed=3, candidate=candidate))
    assert zero.text == prompt.text
    assert candidate == "best-of-k" or other.text != zero.text


def test_auto_is_pad_where_there_is_a_persrm_and_a_preference(personalizer, people, plain_prefix):
    reply = personalizer.reply("alice", QUESTION, Options(seed=1))
    assert (reply.plan.method, reply.plan.strength, reply.plan.candidate) == ("pad", 1.0, "stochastic")
    assert personalizer.reply("bob", QUESTION).plan.method == "none"
    without = Personalizer(people, lambda: plain_prefix, default_dimensions(), Defaults(max_tokens=4))
    assert without.reply("alice", QUESTION).plan.method == "linear"


def test_the_turn_records_persrm_and_candidate_rule(personalizer, people):
    reply = personalizer.reply("alice", QUESTION, Options("pad", top_k=5, candidate="greedy"))
    (turn,) = people.turns("alice", reply.conversation_id)
    assert turn.plan["persrm"] == reply.plan.persrm == "toy-persrm@seed0"
    assert turn.plan["candidate"] == reply.as_json()["candidate"] == "greedy"
    assert turn.plan["candidates"] == {"temperature": 0.0, "top_p": 1.0, "top_k": 5}


def test_w_p_is_computed_once_and_kept_in_the_store(personalizer, people, monkeypatch):
    import prefmw.guidance

    texts = []
    real = prefmw.guidance.meaning_of
    monkeypatch.setattr(prefmw.guidance, "meaning_of", lambda text, chat: texts.append(text) or real(text, chat))
    first = personalizer.reply("alice", QUESTION, Options("pad", seed=1))
    again = personalizer.reply("alice", QUESTION, Options("pad", seed=1))
    assert texts == [first.plan.principle]
    assert again.text == first.text
    people.edit_user("alice", persona="Be funny", actor="test")
    personalizer.reply("alice", QUESTION, Options("pad", seed=1))
    assert len(texts) == 2


def test_nothing_is_kept_where_nothing_is_to_be_recorded(personalizer, people):
    personalizer.reply("alice", QUESTION, Options("pad"), log=False)
    assert people.export("alice")["vectors"] == []


def test_best_of_k_has_the_highest_reward_of_its_k_replies(personalizer, plain_prefix):
    guidance = plain_prefix.guidance()
    plan = personalizer.plan(
        personalizer._store.profile("alice"), Options("pad", seed=5, top_k=4, candidate="best-of-k")
    )
    scale = guidance.scale(plan.principle)
    replies = [
        list(
            plain_prefix.engine.submit(
                guidance.request(QUESTION, plan.principle, scale, 0.0, replace(plan.sampling, seed=5 + copy))
            )
        )
        for copy in range(4)
    ]
    ended = [(ids, len(ids) < 24) for ids in replies]
    rewards = guidance.rewards(QUESTION, plan.principle, scale, ended, plain_prefix.engine)
    texts = [plain_prefix.chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
    reply = personalizer.reply("alice", QUESTION, Options("pad", seed=5, top_k=4, candidate="best-of-k"))
    assert reply.text == texts[rewards.index(max(rewards))]
    assert reply.output_tokens == len(replies[rewards.index(max(rewards))])


def test_rewards_are_differences_of_log_probabilities(guided, chat_model, persrm, fresh):
    engine, guidance = guided
    scale = guidance.scale(PREFERENCE)
    ids, _ = guidance.contexts(QUESTION, PREFERENCE)
    reply = chat_model.template.encode_reply("Keep the room dark.")
    policy = with_lora(fresh, persrm)
    with torch.no_grad():
        read = torch.tensor([[*ids, *reply]])
        hidden = policy.model(read).last_hidden_state * scale
        both = [policy.lm_head(hidden), chat_model.module(read).logits]
        said = torch.tensor(reply)
        sums = [z[0, len(ids) - 1 : -1].log_softmax(1).gather(1, said[:, None]).sum() for z in both]
    (found,) = guidance.rewards(QUESTION, PREFERENCE, scale, [(reply, False)], engine)
    assert found == pytest.approx(float(sums[0] - sums[1]), abs=1e-3)


def test_a_best_of_k_reply_can_be_left(personalizer):
    with personalizer.stream("alice", QUESTION, Options("pad", candidate="best-of-k")) as stream:
        pass
    assert stream.reply.finish_reason == "interrupted"


def test_without_a_persrm_pad_is_refused_with_what_to_do(people, backend):
    personalizer = Personalizer(people, lambda: backend, default_dimensions(), Defaults())
    with pytest.raises(UsageError, match="needs a PersRM, and none is known for this model: name one with --persrm"):
        personalizer.reply("alice", QUESTION, Options("pad"))


def test_another_candidate_rule_is_refused(personalizer):
    with pytest.raises(UsageError, match="no candidate rule 'gready': did you mean 'greedy'"):
        personalizer.reply("alice", QUESTION, Options("pad", candidate="gready"))


def test_a_candidate_rule_without_pad_is_noted(personalizer):
    reply = personalizer.reply("alice", QUESTION, Options("prompt", candidate="greedy"))
    assert any("--candidate has no effect" in notice for notice in reply.notices)


def test_pad_users_and_others_share_an_engine(personalizer, people, plain_prefix):
    alone = personalizer.reply("alice", QUESTION, Options("pad", seed=1)).text
    with personalizer.stream("bob", QUESTION, Options("none", seed=1)) as other:
        crowded = personalizer.reply("alice", QUESTION, Options("pad", seed=1)).text
        for _ in other:
            pass
    assert crowded == alone


def test_a_view_s_head_scale_is_the_person_s(personalizer, people, plain_prefix):
    guidance = plain_prefix.guidance()
    one, other = (
        guidance.request(QUESTION, text, guidance.scale(text), 1.0, GREEDY) for text in (PREFERENCE, "Be brief.")
    )
    assert isinstance(one.views[1], View)
    assert not torch.equal(one.views[1].head_scale, other.views[1].head_scale)
