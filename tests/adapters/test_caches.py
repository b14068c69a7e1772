"""LangChain's caches on: no reply of one user or revision reaches another, by any entry point."""

from __future__ import annotations

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from prefmw.adapters.langchain import ChatPrefMW
from prefmw.bootstrap import open_store
from prefmw.preferences import Source, Stated
from prefmw.settings import load_settings
from tests.adapters.conftest import QUESTION
from tests.adapters.entrypoints import ANYWHERE, ON_A_MODEL, WITH_KEYWORDS, chains
from tests.toymodels import save_chat_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]


@pytest.fixture(autouse=True)
def cache():
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


def applied(message) -> tuple:
    found = message.response_metadata["prefmw"]
    return found["user"], found["revision"]


async def ask_everybody(chat, people, ask):
    """Two users ask the same by one entry point, before and after one of them changed."""
    assert applied(await ask(chat, "alice")) == ("alice", 1)
    assert applied(await ask(chat, "bob")) == ("bob", 1)
    assert applied(await ask(chat, "alice")) == ("alice", 1)
    people.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
    assert applied(await ask(chat, "alice")) == ("alice", 2)
    assert applied(await ask(chat, "bob")) == ("bob", 1)


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_keywords(chat, people, entry):
    await ask_everybody(chat, people, lambda chat, user: WITH_KEYWORDS[entry](chat, QUESTION, None, {"user_id": user}))


@pytest.mark.parametrize("entry", ON_A_MODEL)
async def test_configs(chat, people, entry):
    def ask(chat, user):
        return ON_A_MODEL[entry](chat, QUESTION, {"configurable": {"user_id": user}}, {})

    await ask_everybody(chat, people, ask)


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_fields(chat, people, entry):
    def ask(chat, user):
        return WITH_KEYWORDS[entry](chat.model_copy(update={"user_id": user}), QUESTION, None, {})

    await ask_everybody(chat, people, ask)


@pytest.mark.parametrize("entry", ANYWHERE)
@pytest.mark.parametrize("chain", chains(ChatPrefMW()))
async def test_chains(chat, people, chain, entry):
    def ask(chat, user):
        return ANYWHERE[entry](chains(chat)[chain], QUESTION, {"configurable": {"user_id": user}}, {})

    await ask_everybody(chat, people, ask)


@pytest.mark.parametrize("first", WITH_KEYWORDS)
async def test_what_one_entry_point_keeps_another_does_not_give_to_somebody_else(chat, people, first):
    await WITH_KEYWORDS[first](chat, QUESTION, None, {"user_id": "alice"})
    for ask in WITH_KEYWORDS.values():
        assert applied(await ask(chat, QUESTION, None, {"user_id": "bob"})) == ("bob", 1)


@pytest.fixture
def kept():
    """Whether a reply came out of the cache: then it is that of an earlier turn."""
    seen = set()

    def ask(chat, **asked) -> bool:
        turn = chat.invoke(QUESTION, **{"user_id": "alice", **asked}).response_metadata["prefmw"]["turn"]
        assert turn is not None
        known = turn in seen
        seen.add(turn)
        return known

    return ask


def test_the_same_call_is_kept_and_no_turn_recorded(kept, chat, people):
    assert [kept(chat), kept(chat), kept(chat.model_copy())] == [False, True, True]
    assert len(people.conversations("alice")) == 1


def test_a_seed_that_was_drawn_is_no_part_of_the_key(kept, chat):
    chat = chat.model_copy(update={"seed": None})
    assert [kept(chat), kept(chat)] == [False, True]


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "prompt"},
        {"method": "none"},
        {"strength": 1.0},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 3},
        {"max_tokens": 23},
        {"seed": 2},
        {"stop": ["x"]},
        {"user_id": "bob"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_call_is_not_kept_under_the_same_key(kept, chat, changed):
    assert [kept(chat), kept(chat, **changed), kept(chat, **changed), kept(chat)] == [False, False, True, True]
    assert kept(chat.model_copy(update=changed), user_id=changed.get("user_id", "alice"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("PREFMW_MAX_TOKENS", "8"), ("PREFMW_SEED", "9"), ("PREFMW_TOP_P", "0.4"), ("PREFMW_METHOD", "prompt")],
)
def test_settings_of_the_environment_are_part_of_the_key(kept, toy, people, monkeypatch, name, value):
    assert not kept(ChatPrefMW(model=str(toy)))
    monkeypatch.setenv(name, value)
    assert not kept(ChatPrefMW(model=str(toy)))


def test_the_person_s_own_method_and_strength_are_part_of_the_key(kept, toy, people):
    chat = ChatPrefMW(model=str(toy), max_tokens=8)
    before = kept(chat)
    people.edit_user("alice", strengths={"linear": 4.0}, actor="test")
    after = kept(chat)
    people.edit_user("alice", method="prompt", actor="test")
    assert [before, after, kept(chat)] == [False, False, False]


def test_dimensions_are_part_of_the_key(kept, toy, people, monkeypatch, tmp_path):
    people.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
    assert not kept(ChatPrefMW(model=str(toy), max_tokens=8))
    own = tmp_path / "own.toml"
    own.write_text(
        '[humor]\nkind = "style"\nnegative = {name = "serious", principle = "No jokes."}\n'
        'positive = {name = "humorous", principle = "Only jokes."}\n'
    )
    monkeypatch.setenv("PREFMW_DIMENSIONS", str(own))
    assert not kept(ChatPrefMW(model=str(toy), max_tokens=8))


def test_other_weights_under_the_same_name_are_another_checkpoint(kept, people, tmp_path, monkeypatch):
    from prefmw.bootstrap import close_engines

    folder = save_chat_model(tmp_path / "model")
    chat = ChatPrefMW(model=str(folder), max_tokens=8, seed=1)
    assert [kept(chat), kept(chat)] == [False, True]
    save_chat_model(folder, "chatml", context=256)
    close_engines()  # as in another process
    assert not kept(chat)


def test_people_of_one_name_in_two_databases_are_two(chat, people, tmp_path):
    other = open_store(load_settings({"database": str(tmp_path / "other.db")}))
    other.add_user("alice", persona="a nurse on night shifts", actor="test")
    other.close()
    elsewhere = chat.model_copy(update={"database": str(tmp_path / "other.db")})
    chat.invoke(QUESTION, user_id="alice")
    elsewhere.invoke(QUESTION, user_id="alice")
    assert len(open_store(load_settings({"database": str(tmp_path / "other.db")})).conversations("alice")) == 1


def test_a_profile_that_changes_while_the_reply_is_made_is_not_kept_under_its_new_revision(chat, people, monkeypatch):
    from prefmw.personalizer import Personalizer

    begin = Personalizer.begin

    def late(self, *args, **kwargs):
        people.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(Personalizer, "begin", late)
    assert applied(chat.invoke(QUESTION, user_id="alice")) == ("alice", 1)
    monkeypatch.undo()
    assert applied(chat.invoke(QUESTION, user_id="alice")) == ("alice", 2)


def test_nobody_s_reply_tells_of_no_user_who_had_it_before(chat, people):
    chat = chat.model_copy(update={"on_missing_user": "base", "on_unknown_user": "base"})

    def notices(**whose):
        return chat.invoke(QUESTION, **whose).response_metadata["prefmw"]["notices"]

    for _ in range(2):
        (unknown,) = notices(user_id="patient-jane-doe")
        assert "jane" not in unknown
        assert notices(user_id="mallory") == [unknown]
        assert notices() == []


def test_a_cache_of_its_own_and_none_at_all(kept, chat, people, cache):
    own = InMemoryCache()
    chat.model_copy(update={"cache": own}).invoke(QUESTION, user_id="alice")
    assert (len(own._cache), len(cache._cache)) == (1, 0)
    uncached = chat.model_copy(update={"cache": False})
    assert [kept(uncached), kept(uncached)] == [False, False]
    assert len(cache._cache) == 0


def test_no_cache_key_holds_a_persona_or_a_password(toy, people, cache, monkeypatch):
    monkeypatch.setenv("PREFMW_SEED", "1")
    ChatPrefMW(model=str(toy), max_tokens=4).invoke(QUESTION, user_id="alice")
    ((_, key),) = cache._cache
    assert "alice" in key
    assert "nurse" not in key
