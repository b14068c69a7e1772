"""LangChain agents whose every run follows the preferences of the user it is for.

::

    agent = create_agent(
        model, tools, middleware=[PreferenceMiddleware()], context_schema=PreferenceContext, checkpointer=...
    )
    agent.invoke({"messages": [("user", "...")]}, config, context=PreferenceContext(user_id="alice"))
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NotRequired

from prefmw.adapters.awaiting import in_thread
from prefmw.adapters.langchain import ChatPrefMW
from prefmw.adapters.opening import OnUnknownUser, Opened, opened
from prefmw.errors import MissingExtraError, ThreadOwnerError, UsageError
from prefmw.personalizer import Options
from prefmw.preferences import check_user_id
from prefmw.reply import Plan

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse, hook_config
    from langchain.agents.middleware.types import PrivateStateAttr, ToolCallRequest
    from langgraph.runtime import Runtime
    from langgraph.types import Command
except ModuleNotFoundError as error:
    raise MissingExtraError("PreferenceMiddleware", "agents") from error

from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

_HOW = "create_agent(..., context_schema=PreferenceContext), then invoke(..., context=PreferenceContext(user_id='...'))"


@dataclass
class PreferenceContext:
    """Whom a run of an agent is for. An application's own context may have the same field."""

    user_id: str


class PreferenceState(AgentState[Any]):
    """What the middleware keeps with a thread. Neither input nor output holds it."""

    prefmw_owner: NotRequired[Annotated[str, PrivateStateAttr]]
    """Whose thread it is: that of the first user who ran it."""

    prefmw_seen: NotRequired[Annotated[list[str], PrivateStateAttr]]
    """Ids of the messages that were there when a run of the owner's last began or ended."""

    prefmw_heard: NotRequired[Annotated[list[str], PrivateStateAttr]]
    """What was learned from the owner's words in this run, a line each."""


class PreferenceMiddleware(AgentMiddleware[PreferenceState, Any, Any]):
    """Steers each model call of an agent by the stored preferences of the user whom the run is for.

    A :class:`ChatPrefMW` is steered at every token. Any other chat model gets the preferences in words, behind its
    system prompt. The user is named by ``runtime.context.user_id``, and a run that names none is refused.

    A thread belongs to the user who runs it first. Where another one runs it, what they said is taken out of the thread
    again, no model is called, and the run raises :class:`~prefmw.errors.ThreadOwnerError`. What this cannot do is to
    hide a thread's state from somebody who streams it or reads it from the checkpointer: who may name which thread is
    the application's to decide.

    Args:
        database: SQLAlchemy URL or SQLite file of the preferences; by default the one that the settings name.
        learn: take a preference that the owner states in a new message as theirs; by default as the settings say.
        on_unknown_user: a user whom the store does not know is added to it, is an error, or has no preferences.

    Place it behind (inside) middleware that chooses the model or falls back to another.
    """

    state_schema = PreferenceState

    def __init__(
        self,
        *,
        database: str | None = None,
        learn: bool | None = None,
        on_unknown_user: OnUnknownUser = "create",
    ) -> None:
        super().__init__()
        self._flags = {"database": database, "learn": learn}
        self._on_unknown_user = on_unknown_user
        self._work: Opened | None = None

    # The run begins and ends

    @hook_config(can_jump_to=["end"])
    def before_agent(self, state: PreferenceState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Bind the thread to its owner and hear what they say; take out what somebody else says."""
        user_id = user_of(runtime)
        if state.get("prefmw_owner", user_id) != user_id:
            seen = set(state.get("prefmw_seen", ()))
            strange = [message.id for message in state["messages"] if message.id not in seen]
            return {"messages": [RemoveMessage(id=one) for one in strange if one], "jump_to": "end"}
        heard = self._hear(user_id, new_words(state["messages"], state.get("prefmw_seen", ()), user_id))
        return {"prefmw_owner": user_id, "prefmw_seen": _ids(state["messages"]), "prefmw_heard": heard}

    @hook_config(can_jump_to=["end"])
    async def abefore_agent(self, state: PreferenceState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """As :meth:`before_agent`."""
        return await in_thread(partial(self.before_agent, state, runtime))

    def after_agent(self, state: PreferenceState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Refuse the run if it is not the owner's; it has then done nothing, and its result is not given out."""
        owned(state, runtime)
        return {"prefmw_seen": _ids(state["messages"])}

    async def aafter_agent(self, state: PreferenceState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """As :meth:`after_agent`."""
        return self.after_agent(state, runtime)

    # Each call

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model, steered."""
        steered, applied = self._steered(request)
        return _told(handler(steered), applied)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """As :meth:`wrap_model_call`."""
        steered, applied = await in_thread(partial(self._steered, request))
        return _told(await handler(steered), applied)

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Call the tool, if the run is the owner's: somebody else may have resumed it."""
        owned(request.state, request.runtime)
        return handler(request)

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """As :meth:`wrap_tool_call`."""
        owned(request.state, request.runtime)
        return await handler(request)

    def _steered(self, request: ModelRequest[Any]) -> tuple[ModelRequest[Any], dict[str, Any]]:
        """The request as the user's preferences change it, and what is told of that in the reply."""
        user_id, work = owned(request.state, request.runtime), self._open()
        profile = work.profile(user_id, self._on_unknown_user, "first run of an agent")
        said: Any = request.state.get("prefmw_heard", ())
        heard = list(said)
        if isinstance(request.model, ChatPrefMW):
            if request.model.store is not work.store:
                raise UsageError(
                    "the agent's ChatPrefMW and its PreferenceMiddleware name two databases; give both the same"
                )
            if profile is None:
                nobody = request.model.model_copy(update={"user_id": None, "on_missing_user": "base"})
                return request.override(model=nobody), {"heard": heard}
            return request.override(model_settings={**request.model_settings, "user_id": user_id}), {"heard": heard}
        if profile is None:
            return request, {"user": None, "method": "none", "heard": heard}
        plan = work.personalizer.plan(profile, Options())
        words = "" if plan.method == "none" else work.personalizer.principle(profile)
        if words:
            request = request.override(system_message=with_principle(request.system_message, words))
        return request, {"user": user_id, **_applied(plan, words), "heard": heard}

    def _hear(self, user_id: str, words: Sequence[str]) -> list[str]:
        """What is learned from the owner's new words, a line each."""
        work = self._open()
        if not (work.settings.learn or work.settings.infer):
            return []
        profile = work.profile(user_id, self._on_unknown_user, "first run of an agent")
        heard: list[str] = []
        asked: list[str | None] = [*words] or [None]
        for said in asked:
            if profile is not None:
                profile, notices = work.personalizer.reread(profile, said)
                heard += notices
        return heard

    def _open(self) -> Opened:
        if self._work is None:
            self._work = opened(**self._flags)
        return self._work


def user_of(runtime: Any) -> str:
    """Whom a run is for.

    Raises:
        UsageError: its context names nobody.
    """
    context = getattr(runtime, "context", None)
    user_id = context.get("user_id") if isinstance(context, Mapping) else getattr(context, "user_id", None)
    if user_id is None:
        raise UsageError(f"PreferenceMiddleware needs to know whom the run is for: {_HOW}")
    return check_user_id(user_id)


def owned(state: Mapping[str, Any], runtime: Any) -> str:
    """Whom a run is for, whose thread it is.

    Raises:
        UsageError: its context names nobody.
        ThreadOwnerError: the thread is somebody else's.
    """
    user_id = user_of(runtime)
    if state.get("prefmw_owner", user_id) != user_id:
        raise ThreadOwnerError("this thread belongs to another user; begin one of your own, with another thread_id")
    return user_id


def new_words(messages: Sequence[AnyMessage], seen: Sequence[str], user_id: str) -> list[str]:
    """What the user says in the messages that a run begins with: those behind the last answer that were not there
    before, and no message that bears another name (as those of other agents do).
    """
    words: list[str] = []
    for message in reversed(messages):
        if not isinstance(message, HumanMessage) or message.id in seen:
            break
        if message.name in (None, user_id) and "lc_source" not in message.additional_kwargs:
            words.insert(0, message.text)
    return words


def with_principle(system: SystemMessage | None, principle: str) -> SystemMessage:
    """The system message with preferences in words behind it, as a content block of their own where it has blocks."""
    if system is None:
        return SystemMessage(principle)
    if isinstance(system.content, str):
        return system.model_copy(update={"content": f"{system.content}\n\n{principle}"})
    return system.model_copy(update={"content": [*system.content, {"type": "text", "text": f"\n\n{principle}"}]})


def _applied(plan: Plan, words: str) -> dict[str, Any]:
    """What a model that only reads got of a plan."""
    return {
        "revision": plan.revision,
        "method": "prompt" if words else "none",
        "strength": None,
        "weights": {key: weight.value for key, weight in plan.weights.items()} if words else {},
    }


def _told(response: ModelResponse[Any], applied: Mapping[str, Any]) -> ModelResponse[Any]:
    """The response with what was applied in its messages' metadata, where the model has not said it itself."""
    heard = list(applied["heard"])
    rest = {key: value for key, value in applied.items() if key != "heard"}

    def told(message: BaseMessage) -> BaseMessage:
        if not isinstance(message, AIMessage):
            return message
        own = message.response_metadata.get("prefmw", {**rest, "notices": []})
        said = {"prefmw": {**own, "notices": [*heard, *own["notices"]]}}
        return message.model_copy(update={"response_metadata": message.response_metadata | said})

    return replace(response, result=[told(message) for message in response.result])  # a cache may hold the originals


def _ids(messages: Sequence[AnyMessage]) -> list[str]:
    return [message.id for message in messages if message.id]
