"""Many calls at once, replies in pieces, and readers who leave."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage

from prefmw import steering
from prefmw.adapters import awaiting
from prefmw.adapters.langchain import ChatPrefMW, _begun
from prefmw.alignment import combine_plain
from prefmw.bootstrap import load_backend
from prefmw.decoding import Request, Sampling, View
from prefmw.errors import EngineError
from prefmw.settings import load_settings
from tests.adapters.conftest import QUESTION

USERS = [f"user{index}" for index in range(8)]
QUESTIONS = [f"{QUESTION} {index}" for index in range(4)]


class Watched:
    """An engine of which it is seen how many requests are drawn for at once, and which can be held, so that what comes
    has to wait.
    """

    def __init__(self, engine, monkeypatch) -> None:
        self.engine = engine
        self.most = 0
        self.breaks = False
        for name in ("combine_linear", "combine_plain"):
            monkeypatch.setattr(steering, name, partial(self._combine, getattr(steering, name)))

    def _combine(self, combiner, views, parameters):
        if self.breaks:
            raise RuntimeError("it broke")
        self.most = max(self.most, len(views[0]))
        return combiner(views, parameters)

    def hold(self) -> threading.Event:
        """Keep the worker busy until the event is set."""
        release = threading.Event()

        def wait(views, parameters):
            release.wait(60)
            return combine_plain(views, parameters)

        sampling = Sampling(temperature=0, top_p=1.0, top_k=None, max_tokens=1, seed=0)
        self.engine.submit(Request((View([5]),), wait, sampling))
        eventually(lambda: not self.engine._waiting)
        return release

    @property
    def rows(self) -> int:
        scheduler = self.engine._scheduler
        return sum(len(active.rows) for active in (*scheduler._replying, *scheduler._reading))


def eventually(true, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@pytest.fixture
def watched(chat, monkeypatch):
    return Watched(load_backend(load_settings({"model": chat.model})).engine, monkeypatch)


@pytest.fixture
def crowd(people):
    for index, user in enumerate(USERS):
        people.add_user(user, persona=f"a person who likes the number {index}", actor="test")


def calls() -> tuple[list[str], list[dict]]:
    asked = [(user, question) for user in USERS for question in QUESTIONS]
    return [question for _, question in asked], [{"configurable": {"user_id": user}} for user, _ in asked]


@pytest.mark.parametrize("entry", ["batch", "abatch", "gather"])
async def test_32_calls_of_8_users_are_one_batch_of_the_engine_and_the_replies_are_those_made_alone(
    chat, crowd, people, watched, entry
):
    inputs, configs = calls()
    release = watched.hold()
    waiting = asyncio.ensure_future(
        asyncio.to_thread(chat.batch, inputs, configs)
        if entry == "batch"
        else chat.abatch(inputs, configs)
        if entry == "abatch"
        else asyncio.gather(*(chat.ainvoke(*call) for call in zip(inputs, configs, strict=True)))
    )
    await asyncio.to_thread(eventually, lambda: len(watched.engine._waiting) == 32)  # nobody waits for anybody's reply
    watched.most = 0
    release.set()
    together = await waiting
    assert watched.most == 32
    alone = [chat.invoke(*call) for call in zip(inputs, configs, strict=True)]
    assert [reply.content for reply in together] == [reply.content for reply in alone]
    assert len({reply.content for reply in together}) > 16
    ids = {
        reply.response_metadata["prefmw"]["turn"]: index
        for replies in (together, alone)
        for index, reply in enumerate(replies)
    }
    tokens: dict[int, set] = {}
    for user in USERS:
        for conversation in people.conversations(user):
            (turn,) = people.turns(user, conversation.id)
            tokens.setdefault(ids[turn.id], set()).add(turn.token_ids)
    assert [len(found) for found in tokens.values()] == [1] * 32


@pytest.mark.parametrize("most", [1, 3])
async def test_a_config_s_own_concurrency_is_kept_to(chat, watched, most):
    chat = chat.model_copy(update={"user_id": "alice"})
    await chat.abatch([QUESTION] * 8, {"max_concurrency": most})
    assert watched.most <= most
    chat.batch([QUESTION] * 8, {"max_concurrency": most})
    assert watched.most <= most


async def test_more_calls_than_the_engine_lets_wait_are_all_answered(chat, watched):
    chat = chat.model_copy(update={"user_id": "alice", "max_tokens": 2, "method": "none", "log": False})
    assert len(await chat.abatch([QUESTION] * 400)) == 400
    assert len(await asyncio.gather(*(chat.ainvoke(QUESTION) for _ in range(400)))) == 400
    assert len(chat.batch([QUESTION] * 400)) == 400


async def test_an_error_in_a_batch_is_its_own(chat):
    inputs, configs = (
        [QUESTION, "", QUESTION],
        [{"configurable": {"user_id": user}} for user in ("alice", "bob", "bob")],
    )
    for replies in (
        chat.batch(inputs, configs, return_exceptions=True),
        await chat.abatch(inputs, configs, return_exceptions=True),
    ):
        assert [type(reply).__name__ for reply in replies] == ["AIMessage", "UsageError", "AIMessage"]


# Pieces


def test_the_first_piece_comes_before_the_reply_is_made(chat, watched, people):
    stream = chat.stream(QUESTION, user_id="alice", max_tokens=400)
    assert next(stream).content
    assert watched.rows == 2  # the two views of linear alignment, still decoding
    assert list(people.conversations("alice")) == []
    assert sum(len(chunk.content) for chunk in stream) > 100


async def test_the_first_piece_comes_before_the_reply_is_made_awaited(chat, watched):
    stream = chat.astream(QUESTION, user_id="alice", max_tokens=400)
    assert (await anext(stream)).content
    assert watched.rows == 2
    assert len([chunk async for chunk in stream]) > 50


def test_leaving_a_stream_frees_the_engine_and_records_what_came(chat, watched, people):
    for chunk in chat.stream(QUESTION, user_id="alice", max_tokens=400):
        if chunk.content:
            break
    eventually(lambda: watched.rows == 0)
    (conversation,) = people.conversations("alice")
    (turn,) = people.turns("alice", conversation.id)
    assert (turn.finish_reason, turn.output_tokens < 400) == ("interrupted", True)


async def test_closing_an_awaited_stream_frees_the_engine_and_records_what_came(chat, watched, people):
    stream = chat.astream(QUESTION, user_id="alice", max_tokens=400)
    await anext(stream)
    await stream.aclose()
    await asyncio.to_thread(eventually, lambda: watched.rows == 0)
    await asyncio.to_thread(eventually, lambda: len(people.conversations("alice")) == 1)
    (turn,) = people.turns("alice", people.conversations("alice")[0].id)
    assert turn.finish_reason == "interrupted"


@pytest.mark.parametrize("where", ["waiting", "decoding"])
async def test_a_cancelled_task_frees_the_engine(chat, watched, where):
    release = watched.hold() if where == "waiting" else None
    task = asyncio.create_task(chat.ainvoke(QUESTION, user_id="alice", max_tokens=400))
    while not (watched.engine._waiting if release else watched.rows):
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.sleep(0.01)
    if release:
        release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(eventually, lambda: watched.rows == 0 and not watched.engine._waiting)


async def test_a_timeout_frees_the_engine(chat, watched):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            while True:
                await chat.ainvoke(QUESTION, user_id="alice", max_tokens=400)
    await asyncio.to_thread(eventually, lambda: watched.rows == 0)


async def test_the_event_loop_goes_on_while_replies_are_made(chat):
    beats = 0

    async def beat():
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1

    heart = asyncio.create_task(beat())
    await chat.ainvoke(QUESTION, user_id="alice", max_tokens=200)
    heart.cancel()
    assert beats > 5


async def test_an_engine_that_fails_tells_whoever_awaits(chat, watched):
    watched.breaks = True
    for ask in (chat.ainvoke, lambda *args, **kwargs: anext(chat.astream(*args, **kwargs))):
        with pytest.raises(EngineError, match="it broke"):
            await ask(QUESTION, user_id="alice")


def test_a_loop_that_is_gone_stops_its_replies(chat, watched):
    """An iterator that nobody closes, in a loop that is closed without closing iterators."""
    asked = chat._call([HumanMessage(QUESTION)], None, {"user_id": "alice", "max_tokens": 400})

    async def begun():
        pieces = awaiting.AwaitedReply(lambda: _begun(asked))
        return await anext(pieces)

    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(begun())
    loop.close()
    eventually(lambda: watched.rows == 0)


def test_a_loop_that_ends_closes_its_replies_without_a_word(chat, watched, people):
    said = []

    async def first():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context["message"]))
        return await anext(kept[0])

    kept = [chat.astream(QUESTION, user_id="alice", max_tokens=400)]
    assert asyncio.run(first()).content
    assert said == []
    eventually(lambda: watched.rows == 0)
    (turn,) = people.turns("alice", people.conversations("alice")[0].id)
    assert turn.finish_reason == "interrupted"


def test_a_child_process_has_threads_of_its_own():
    asyncio.run(awaiting.in_thread(lambda: None))
    assert awaiting._threads is not None
    awaiting._forget_threads()  # what runs in a child after a fork
    assert asyncio.run(awaiting.in_thread(lambda: 3)) == 3


async def test_callbacks_hear_every_piece(chat):
    heard = []

    class Handler(BaseCallbackHandler):
        def on_llm_new_token(self, token, **kwargs):
            heard.append(token)

    streamed = ChatPrefMW(**chat.model_dump(exclude_unset=True), streaming=True)
    reply = streamed.invoke(QUESTION, {"callbacks": [Handler()]}, user_id="alice")
    assert "".join(heard) == reply.content
    heard.clear()
    reply = await streamed.ainvoke(QUESTION, {"callbacks": [Handler()]}, user_id="alice")
    assert "".join(heard) == reply.content
