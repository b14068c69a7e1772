"""Every way in which LangChain reaches a chat model: each asks one question of a runnable and returns its reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, message_chunk_to_message
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnablePassthrough

EntryPoint = Callable[[Runnable, str, dict | None, dict], Awaitable[AIMessage]]


def added(chunks: list) -> AIMessage:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return message_chunk_to_message(whole)


def of_events(events: list) -> AIMessage:
    """The last model's output among LangChain's events of version 1 or 2."""
    (output,) = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"][-1:]
    if isinstance(output, dict):  # version 1 has the whole result
        return output["generations"][0][0]["message"]
    return output


async def _invoke(runnable, question, config, kwargs):
    return runnable.invoke(question, config, **kwargs)


async def _ainvoke(runnable, question, config, kwargs):
    return await runnable.ainvoke(question, config, **kwargs)


async def _stream(runnable, question, config, kwargs):
    return added(list(runnable.stream(question, config, **kwargs)))


async def _astream(runnable, question, config, kwargs):
    return added([chunk async for chunk in runnable.astream(question, config, **kwargs)])


async def _batch(runnable, question, config, kwargs):
    return runnable.batch([question, question], config, **kwargs)[1]


async def _abatch(runnable, question, config, kwargs):
    return (await runnable.abatch([question, question], config, **kwargs))[1]


async def _batch_as_completed(runnable, question, config, kwargs):
    return list(runnable.batch_as_completed([question, question], config, **kwargs))[1][1]


async def _abatch_as_completed(runnable, question, config, kwargs):
    return [reply async for _, reply in runnable.abatch_as_completed([question] * 2, config, **kwargs)][1]


async def _transform(runnable, question, config, kwargs):
    return added(list(runnable.transform(iter([question]), config, **kwargs)))


async def _atransform(runnable, question, config, kwargs):
    async def asked():
        yield question

    return added([chunk async for chunk in runnable.atransform(asked(), config, **kwargs)])


async def _astream_log(runnable, question, config, kwargs):
    state = None
    async for patch in runnable.astream_log(question, config, diff=True, **kwargs):
        state = patch if state is None else state + patch
    return message_chunk_to_message(state.state["final_output"])


async def _astream_events_v1(runnable, question, config, kwargs):
    return of_events([e async for e in runnable.astream_events(question, config, version="v1", **kwargs)])


async def _astream_events_v2(runnable, question, config, kwargs):
    return of_events([e async for e in runnable.astream_events(question, config, version="v2", **kwargs)])


ANYWHERE: dict[str, EntryPoint] = {
    "invoke": _invoke,
    "ainvoke": _ainvoke,
    "stream": _stream,
    "astream": _astream,
    "batch": _batch,
    "abatch": _abatch,
    "batch_as_completed": _batch_as_completed,
    "abatch_as_completed": _abatch_as_completed,
    "transform": _transform,
    "atransform": _atransform,
    "astream_log": _astream_log,
    "astream_events v1": _astream_events_v1,
    "astream_events v2": _astream_events_v2,
}
"""Those that any runnable has."""


async def _generate(chat, question, config, kwargs):
    return chat.generate([[HumanMessage(question)]], **kwargs).generations[0][0].message


async def _agenerate(chat, question, config, kwargs):
    return (await chat.agenerate([[HumanMessage(question)]], **kwargs)).generations[0][0].message


async def _stream_events_v3(chat, question, config, kwargs):
    stream = chat.stream_events(question, config, version="v3", **kwargs)
    list(stream)
    return stream.output


async def _astream_events_v3(chat, question, config, kwargs):
    stream = await chat.astream_events(question, config, version="v3", **kwargs)
    async for _ in stream:
        pass
    return await stream.output


ON_A_MODEL: dict[str, EntryPoint] = {
    **ANYWHERE,
    "stream_events v3": _stream_events_v3,
    "astream_events v3": _astream_events_v3,
}
"""Those of a chat model that take a config."""

WITH_KEYWORDS: dict[str, EntryPoint] = {**ON_A_MODEL, "generate": _generate, "agenerate": _agenerate}
"""Those of a chat model that take keywords."""


def chains(chat: Runnable) -> dict[str, Runnable]:
    """Runnables with the model somewhere inside, which answer with its message."""

    def ask(question: Any) -> Any:
        return chat.invoke(question)

    async def ask_awaited(question: Any) -> Any:
        return await chat.ainvoke(question)

    return {
        "sequence": RunnablePassthrough() | chat,
        "lambda": RunnableLambda(ask, ask_awaited),
        "sequence of lambdas": RunnablePassthrough() | RunnableLambda(ask, ask_awaited) | RunnablePassthrough(),
        "parallel": RunnableParallel(reply=chat) | RunnableLambda(lambda found: found["reply"]),
        "retry": chat.with_retry(),
        "fallback": chat.with_fallbacks([chat]),
        "binding": chat.bind(max_tokens=24),
        "configurable": chat.with_config(tags=["x"]),
    }
