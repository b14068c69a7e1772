"""One turn: which method and strength are applied, what is refused, and what is recorded."""

from __future__ import annotations

import pytest

from prefmw.alignment import combine_linear
from prefmw.errors import ContextLengthError, EngineError, StoreError, UnknownUserError, UsageError
from prefmw.personalizer import Personalizer
from prefmw.plans import Defaults, Options
from prefmw.preferences import Message, Source, Stated, default_dimensions

QUESTION = [Message("user", "How do I fall asleep faster?")]
SHORT = {"max_tokens": 24, "seed": 1}


@pytest.fixture
def people(store):
    store.add_user("alice", persona="I'm a nurse on night shifts; keep it short", actor="test")
    store.add_user("bob", actor="test")
    return store


@pytest.fixture
def make(people, backend):
    def build(**defaults) -> Personalizer:
        return Personalizer(people, lambda: backend, default_dimensions(), Defaults(**{"max_tokens": 24, **defaults}))

    return build


def the_turn(store, reply):
    (turn,) = store.turns(reply.user_id, reply.conversation_id)
    return turn


def test_the_same_seed_gives_the_same_text_and_another_another(make):
    personalizer = make()
    first = personalizer.reply("alice", QUESTION, Options(method="linear", seed=1))
    again = personalizer.reply("alice", QUESTION, Options(method="linear", seed=1))
    other = personalizer.reply("alice", QUESTION, Options(method="linear", seed=2))
    assert first.text == again.text != other.text
    assert first.text


def test_zero_strength_is_preference_prompting(make):
    personalizer = make()
    zero = personalizer.reply("alice", QUESTION, Options(method="linear", strength=0, **SHORT))
    prompt = personalizer.reply("alice", QUESTION, Options(method="prompt", **SHORT))
    assert zero.text == prompt.text
    assert (zero.plan.strength, prompt.plan.strength) == (0.0, None)


def test_methods_differ_in_their_replies(make):
    personalizer = make()
    texts = [
        personalizer.reply("alice", QUESTION, Options(method=m, **SHORT)).text for m in ("none", "prompt", "linear")
    ]
    assert len(set(texts)) == 3


def test_preferences_change_the_reply_and_none_ignores_them(make, people):
    personalizer = make()
    before = {m: personalizer.reply("alice", QUESTION, Options(method=m, **SHORT)).text for m in ("none", "linear")}
    people.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
    after = {m: personalizer.reply("alice", QUESTION, Options(method=m, **SHORT)).text for m in ("none", "linear")}
    assert before["none"] == after["none"]
    assert before["linear"] != after["linear"]


def test_the_turn_is_recorded_with_all_that_decoding_it_again_takes(make, people):
    reply = make().reply("alice", [Message("system", "Be kind."), *QUESTION], Options(method="linear", seed=5))
    turn = the_turn(people, reply)
    assert (turn.method, turn.strength, turn.revision, turn.seed) == ("linear", 2.0, 1, 5)
    assert (turn.system, turn.prompt, turn.text) == ("Be kind.", QUESTION[0].content, reply.text)
    assert (turn.input_tokens, turn.output_tokens) == (reply.input_tokens, 24)
    assert turn.plan["principle"] == reply.plan.principle
    assert turn.plan["candidates"] == {"temperature": 0.7, "top_p": 0.8, "top_k": None}
    assert turn.plan["model_revision"] == turn.model_revision
    assert len(turn.plan_hash) == 64


def test_a_plan_s_hash_is_the_plan_s(make, people):
    personalizer = make()

    def plan_hash(**options) -> str:
        return the_turn(people, personalizer.reply("alice", QUESTION, Options(**options))).plan_hash

    assert plan_hash(seed=1) == plan_hash(seed=2)
    assert len({plan_hash(), plan_hash(method="prompt"), plan_hash(strength=3.0), plan_hash(top_p=0.5)}) == 4
    before = plan_hash()
    people.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
    assert plan_hash() != before


def test_nothing_is_recorded_where_that_is_asked(make, people):
    reply = make().reply("alice", QUESTION, log=False)
    assert (reply.turn_id, reply.conversation_id) == (None, None)


def test_a_conversation_continues(make, people):
    personalizer = make()
    first = personalizer.reply("alice", QUESTION, Options(seed=1))
    talk = [*QUESTION, Message("assistant", first.text), Message("user", "And then?")]
    second = personalizer.reply("alice", talk, Options(seed=1), conversation_id=first.conversation_id)
    assert [turn.prompt for turn in people.turns("alice", first.conversation_id)] == [QUESTION[0].content, "And then?"]
    assert second.input_tokens > first.input_tokens


# Which method


@pytest.mark.parametrize(
    ("asked", "users", "default", "chosen"),
    [
        (None, None, "auto", "linear"),
        ("none", "prompt", "linear", "none"),
        (None, "prompt", "linear", "prompt"),
        ("auto", "prompt", "linear", "prompt"),
        ("auto", None, "prompt", "prompt"),
    ],
)
def test_the_call_decides_then_the_user_then_the_default(make, people, asked, users, default, chosen):
    people.edit_user("alice", method=users, actor="test")
    plan = make(method=default).plan(people.profile("alice"), Options(method=asked))
    assert plan.method == chosen


def test_automatic_is_linear_with_a_preference_and_none_without(make, people):
    personalizer = make()
    assert personalizer.plan(people.profile("bob"), Options()).method == "none"
    people.write_weights("bob", {"humor": Stated(0.1)}, source=Source.user, actor="test")
    assert personalizer.plan(people.profile("bob"), Options()).method == "none"  # too weak to be put into words
    people.write_weights("bob", {"humor": Stated(0.5)}, source=Source.user, actor="test")
    assert personalizer.plan(people.profile("bob"), Options()).method == "linear"


def test_strength_comes_from_the_call_then_the_user_then_the_default(make, people):
    personalizer = make(strength={"linear": 1.0})
    assert personalizer.plan(people.profile("alice"), Options()).strength == 1.0
    people.edit_user("alice", strengths={"linear": 4.0}, actor="test")
    assert personalizer.plan(people.profile("alice"), Options()).strength == 4.0
    assert personalizer.plan(people.profile("alice"), Options(strength=0.0)).strength == 0.0


def test_steering_without_a_preference_is_plain_and_says_so(make):
    personalizer = make()
    steered = personalizer.reply("bob", QUESTION, Options(method="linear", **SHORT))
    plain = personalizer.reply("bob", QUESTION, Options(method="none", **SHORT))
    assert steered.text == plain.text
    assert "no persona" in steered.notices[0]
    assert plain.notices == ()


@pytest.fixture
def bob_likes(people):
    def likes(**weights):
        people.write_weights("bob", {key: Stated(v) for key, v in weights.items()}, source=Source.user, actor="test")

    return likes


def test_each_style_weight_is_a_dial_the_strongest_first(make, people, bob_likes):
    bob_likes(humor=0.1, verbosity=-0.9, formality=0.0, helpfulness=1.0)
    plan = make().plan(people.profile("bob"), Options(method="drift"))
    assert [(dial.dimension, dial.weight) for dial in plan.dials] == [("verbosity", -0.9), ("humor", 0.1)]
    assert (plan.principle, plan.strength, plan.left_out) == ("", 1.0, ())
    assert plan.dials[0].principle == default_dimensions()["verbosity"].pole(-1).principle


def test_no_gain_no_weight_and_a_weight_of_zero_leave_the_persona_sentence_alone(make, people, bob_likes):
    personalizer = make()
    plain = personalizer.reply("bob", QUESTION, Options(method="none", **SHORT))
    unset = personalizer.reply("bob", QUESTION, Options(method="drift", **SHORT))
    bob_likes(humor=0.0)
    zero = personalizer.reply("bob", QUESTION, Options(method="drift", **SHORT))
    bob_likes(humor=1.0)
    idle = personalizer.reply("bob", QUESTION, Options(method="drift", strength=0, **SHORT))
    assert plain.text == unset.text == zero.text == idle.text
    assert "no style weight" in unset.notices[0]
    alone = personalizer.reply("alice", QUESTION, Options(method="drift", **SHORT))
    prompt = personalizer.reply("alice", QUESTION, Options(method="prompt", **SHORT))
    assert alone.text == prompt.text  # alice has a persona and no weight
    assert "persona alone" in alone.notices[0]


def test_a_full_dial_at_gain_three_is_linear_alignment_at_ratio_two(make, bob_likes):
    bob_likes(humor=1.0)
    greedy = {**SHORT, "temperature": 0.0}
    drift = make().reply("bob", QUESTION, Options(method="drift", strength=3.0, **greedy))
    linear = make().reply("bob", QUESTION, Options(method="linear", strength=2.0, **greedy))
    assert drift.text == linear.text  # z0 + 3 d = z1 + 2 d, and the same rule


def test_a_dial_changes_the_reply_both_ways(make, bob_likes):
    texts = set()
    for weight in (-1.0, 0.0, 1.0):
        bob_likes(humor=weight)
        texts.add(make().reply("bob", QUESTION, Options(method="drift", **SHORT)).text)
    assert len(texts) == 3


def test_more_weights_than_act_at_once_are_named(make, bob_likes):
    bob_likes(humor=0.2, verbosity=-0.9, formality=0.5)
    reply = make(max_dials=2).reply("bob", QUESTION, Options(method="drift", **SHORT))
    assert [dial.dimension for dial in reply.plan.dials] == ["verbosity", "formality"]
    assert reply.plan.left_out == ("humor",)
    assert reply.as_json()["preferences"]["left_out"] == ["humor"]
    assert "left out: humor" in reply.notices[0]


def test_a_template_s_own_system_prompt_is_kept_beside_the_principle(people, tmp_path):
    from prefmw.decoding import Engine
    from prefmw.models import ModelSpec, load_chat_model
    from prefmw.steering import Backend, with_principle
    from tests.toymodels import save_chat_model

    chat = load_chat_model(ModelSpec(str(save_chat_model(tmp_path / "qwen", "qwen"))))
    system, *_ = with_principle(QUESTION, "Be brief.", chat)
    assert system.content == "You are a helpful assistant.\n\nBe brief."
    engine = Engine(chat.module, capacity=chat.capacity, vocabulary=chat.vocabulary)
    personalizer = Personalizer(people, lambda: Backend(chat, engine), default_dimensions(), Defaults(max_tokens=4))
    assert personalizer.reply("alice", QUESTION).output_tokens == 4
    engine.close()


# Refusals


@pytest.mark.parametrize("messages", [[], [Message("user", "  ")], [Message("user", "a"), Message("assistant", "b")]])
def test_a_conversation_without_a_question_is_refused(make, messages):
    with pytest.raises(UsageError, match="nothing to answer"):
        make().reply("alice", messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": float("nan")}, "strength"),
        ({"strength": -1.0}, "strength"),
        ({"strength": 11.0}, "strength"),
        ({"method": "none", "strength": 1.0}, "takes no strength"),
        ({"method": "dpa"}, "needs a chat model trained to read directions.* any model takes --method prompt"),
        ({"method": "pad"}, "needs a PersRM, and none is known"),
        ({"max_tokens": 0}, "max-tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(people, options, message):
    def load():
        raise AssertionError("the model was loaded")

    with pytest.raises(UsageError, match=message):
        Personalizer(people, load, default_dimensions(), Defaults()).reply("alice", QUESTION, Options(**options))


def test_an_unknown_user_is_refused(make):
    with pytest.raises(UnknownUserError, match="carol"):
        make().reply("carol", QUESTION)


def test_a_prompt_beyond_the_context_is_refused_and_nothing_recorded(make, people):
    with pytest.raises(ContextLengthError, match="512"):
        make().reply("alice", [Message("user", "word " * 3000)])
    with pytest.raises(UsageError, match="no conversation yet"):
        people.conversation("alice", "latest")


def test_a_reply_is_cut_to_what_the_context_leaves_and_says_so(make):
    reply = make().reply("alice", QUESTION, Options(max_tokens=10_000, temperature=0))
    assert reply.input_tokens + reply.output_tokens <= 512
    assert "cut to" in reply.notices[0]


@pytest.mark.parametrize("text", ["nul \0", "\udcff"])
def test_what_no_store_holds_is_refused(make, text):
    with pytest.raises(UsageError, match="a message"):
        make().reply("alice", [Message("user", text)])


# In two halves


def test_a_turn_is_prepared_without_a_model(people):
    def no_model():
        raise AssertionError("the model was loaded")

    personalizer = Personalizer(people, no_model, default_dimensions(), Defaults())
    prepared = personalizer.prepare("alice", QUESTION, Options(strength=3.0))
    assert (prepared.user_id, prepared.plan.method, prepared.plan.strength) == ("alice", "linear", 3.0)


def test_a_reply_is_made_by_the_plan_that_was_prepared(make, people):
    personalizer = make()
    prepared = personalizer.prepare("alice", QUESTION, Options(seed=1))
    people.edit_user("alice", persona="a retired teacher who loves a joke", actor="test")
    with personalizer.begin(prepared, QUESTION, Options(seed=1)) as stream:
        "".join(stream)
    assert stream.reply.plan == prepared.plan
    assert the_turn(people, stream.reply).revision == 1


def test_a_reply_to_nobody_is_plain_and_leaves_nothing(make, people, backend):
    personalizer = make(method="linear", strength={"linear": 3.0})
    options = Options(method="linear", strength=2.0, **SHORT)
    with personalizer.begin(personalizer.prepare(None, QUESTION, options), QUESTION, options) as stream:
        "".join(stream)
    reply = stream.reply
    assert (reply.user_id, reply.plan.method, reply.plan.strength, reply.turn_id) == (None, "none", None, None)
    assert reply.text == personalizer.reply("alice", QUESTION, Options(method="none", **SHORT), log=False).text
    assert list(people.conversations("alice")) == []


# Streaming


def test_pieces_joined_are_the_reply(make):
    with make().stream("alice", QUESTION, Options(seed=3, max_tokens=60)) as stream:
        pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == stream.reply.text


def test_a_stop_string_ends_the_reply_and_never_shows(make, people):
    personalizer = make()
    whole = personalizer.reply("alice", QUESTION, Options(seed=3, max_tokens=60)).text
    stop = whole[20:23]
    reply = personalizer.reply("alice", QUESTION, Options(seed=3, max_tokens=60, stop=(stop,)))
    assert reply.text == whole.split(stop)[0]
    assert reply.finish_reason == "stop"
    assert reply.output_tokens < 60
    assert the_turn(people, reply).finish_reason == "stop"


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, GeneratorExit])
def test_a_reader_that_leaves_keeps_the_partial_reply_marked_interrupted(make, people, error):
    personalizer = make()
    stream = personalizer.stream("alice", QUESTION, Options(seed=3, max_tokens=300))
    seen = []
    with pytest.raises(error), stream:
        for piece in stream:
            seen.append(piece)
            if len(seen) == 3:
                raise error
    turn = the_turn(people, stream.reply)
    assert turn.finish_reason == "interrupted"
    assert turn.text.startswith("".join(seen))
    assert turn.output_tokens < 300
    assert personalizer.reply("alice", QUESTION).finish_reason in {"stop", "length"}


def test_an_engine_that_fails_in_mid_reply_leaves_a_turn_that_says_so(make, people, monkeypatch):
    from prefmw import steering as module

    steps = []

    def breaking(views, parameters):
        steps.append(1)
        if len(steps) == 5:
            raise RuntimeError("it broke")
        return combine_linear(views, parameters)

    monkeypatch.setattr(module, "combine_linear", breaking)
    stream = make().stream("alice", QUESTION, Options(seed=3, max_tokens=300))
    with pytest.raises(EngineError, match="it broke"), stream:
        list(stream)
    turn = the_turn(people, stream.reply)
    assert (turn.finish_reason, turn.output_tokens) == ("error", 4)


def test_a_store_that_fails_costs_the_record_and_not_the_reply(make, people, monkeypatch):
    def full(turn):
        raise StoreError("database is full")

    monkeypatch.setattr(people, "record", full)
    reply = make().reply("alice", QUESTION)
    assert reply.text
    assert (reply.not_recorded, reply.turn_id) == ("database is full", None)


def test_a_turn_is_recorded_once_however_often_the_stream_is_read(make, people):
    with make().stream("alice", QUESTION, Options(seed=3, max_tokens=30)) as stream:
        assert list(stream)
        assert list(stream) == []
    broken_off = make().stream("alice", QUESTION, Options(seed=3, max_tokens=300))
    with broken_off:
        next(iter(broken_off))
    assert list(broken_off) == []
    assert broken_off.reply.finish_reason == "interrupted"
    for reply in (stream.reply, broken_off.reply):
        assert len(people.turns("alice", reply.conversation_id)) == 1


def test_a_stored_turn_decodes_to_the_same_tokens_again(make, people, backend):
    """From what the store holds alone: two turns, the second after history that an application kept."""
    talk = [Message("system", "Be kind."), Message("user", "Hi."), Message("assistant", "Hello."), *QUESTION]
    first = make().reply("alice", talk, Options(method="linear", strength=3.0, temperature=1.2))
    for turn in people.turns("alice", first.conversation_id):
        plan = turn.plan
        options = Options(plan["method"], plan["strength"], **plan["candidates"], seed=turn.seed)
        again = [Message("system", turn.system), *turn.history, Message("user", turn.prompt)]
        replay = make().stream("alice", again, options, log=False)
        with replay:
            list(replay)
        assert tuple(replay._ids) == turn.token_ids
        assert replay.reply.plan.principle == plan["principle"]


def test_timing_adds_up(make):
    personalizer = make()
    first, second = personalizer.reply("alice", QUESTION), personalizer.reply("alice", QUESTION)
    assert first.timing.load_s > 0
    assert second.timing.load_s == 0
    assert second.timing.prefill_s > 0
    assert second.timing.ms_per_token == pytest.approx(1000 * second.timing.decode_s / 23)


def test_what_is_kept_in_memory_of_an_erased_user_goes_with_the_next_question(make, people, backend):
    personalizer = make()
    personalizer.reply("alice", QUESTION, Options(**SHORT))
    personalizer.reply("bob", QUESTION, Options(**SHORT))
    kept = backend.engine._parking.bytes
    people.erase("alice")
    with pytest.raises(UnknownUserError):
        personalizer.reply("alice", QUESTION, Options(**SHORT))
    assert 0 < backend.engine._parking.bytes < kept
