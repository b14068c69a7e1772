"""LangChain agents whose every run follows the preferences of the user it is for.

::

    agent = create_agent(
        model, tools, middleware=[PreferenceMiddleware()], context_schema=PreferenceContext, checkpointer=...
    )
    agent.invoke({"messages": [("user", "...")]}, config, context=PreferenceContext(user_id="alice"))
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NotRequired

from prefmw.adapters.awaiting import in_thread
from prefmw.adapters.langchain import ChatPrefMW, answering
from prefmw.adapters.opening import OnUnknownUser, Opened, opened
from prefmw.errors import MissingExtraError, PrefmwError, ThreadOwnerError, UsageError
from prefmw.plans import Options, Plan
from prefmw.preferences import check_user_id

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
from langchain_core.runnables import Runnable, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import DynamicRunnable, RunnableConfigurableAlternatives

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

    prefmw_refused: NotRequired[Annotated[tuple[str | None, str] | None, PrivateStateAttr]]
    """Whose run is refused, as far as that is known, and why."""


class PreferenceMiddleware(AgentMiddleware[PreferenceState, Any, Any]):
    """Steers each model call of an agent by the stored preferences of the user whom the run is for.

    A :class:`ChatPrefMW`, also one that is bound, retried or configurable, is steered at every token. Any other chat
    model gets the preferences in words, behind its system prompt. The user is named by ``runtime.context.user_id``,
    which wins over whatever else names one, and a run that names none is refused.

    A thread belongs to the user who runs it first. Where a run is refused, as another user's is, what it brought is
    taken out of the thread again, no model is called, and it raises (:class:`~prefmw.errors.ThreadOwnerError`). What
    this cannot do is to hide a thread's state from somebody who streams it or reads it from the checkpointer, or to
    keep two runs apart that begin one thread at the same time: who may name which thread is the application's to
    decide.

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
        """Bind the thread to its owner and hear what they say; take out again what a run brings that is refused."""
        seen = state.get("prefmw_seen", ())
        try:
            user_id = self._admitted(state, runtime)
            heard = self._hear(user_id, new_words(state["messages"], seen, user_id))
        except Exception as error:  # whatever it is, the thread's next user must not find what was said
            strange = [RemoveMessage(id=one) for one in _ids(state["messages"]) if one not in seen]
            refused = (_named(runtime), f"{type(error).__name__}: {error}")
            return {"messages": strange, "prefmw_refused": refused, "jump_to": "end"}
        return {
            "prefmw_owner": user_id,
            "prefmw_seen": _ids(state["messages"]),
            "prefmw_heard": heard,
            "prefmw_refused": None,
        }

    @hook_config(can_jump_to=["end"])
    async def abefore_agent(self, state: PreferenceState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """As :meth:`before_agent`."""
        return await in_thread(partial(self.before_agent, state, runtime))

    def after_agent(self, state: PreferenceState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Raise what refused the run; it has then done nothing, and its result is not given out."""
        refused = state.get("prefmw_refused")
        user_id = self._admitted(state, runtime) if refused else owned(state, runtime)
        if refused and refused[0] == user_id:  # for what has passed since
            raise PrefmwError(f"the run was refused, and its message is not part of the thread: {refused[1]}")
        return {"prefmw_seen": _ids(state["messages"])}

    async def aafter_agent(self, state: PreferenceState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """As :meth:`after_agent`."""
        return await in_thread(partial(self.after_agent, state, runtime))

    # Each call

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model, steered."""
        steered, whose, applied = self._steered(request)
        with whose:
            return _told(handler(steered), applied)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """As :meth:`wrap_model_call`."""
        steered, whose, applied = await in_thread(partial(self._steered, request))
        with whose:
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

    def _steered(
        self, request: ModelRequest[Any]
    ) -> tuple[ModelRequest[Any], AbstractContextManager[None], dict[str, Any]]:
        """The request as the user's preferences change it, what says whose it is while the model is called, and what is
        told in the reply.
        """
        user_id, work = owned(request.state, request.runtime), self._open()
        profile = work.profile(user_id, self._on_unknown_user, "first run of an agent")
        said: Any = request.state.get("prefmw_heard", ())
        heard = list(said)
        models = models_within(request.model)
        if ours := [model for model in models if isinstance(model, ChatPrefMW)]:
            if len(ours) < len(models):
                raise UsageError(
                    "the agent's model is ChatPrefMW in some cases and another in others; fall back by "
                    "ModelFallbackMiddleware, in front of PreferenceMiddleware"
                )
            if any(model.store is not work.store for model in ours):
                raise UsageError(
                    "the agent's ChatPrefMW and its PreferenceMiddleware name two databases; give both the same"
                )
            return request, answering(user_id if profile else None), {"heard": heard}
        whose = nullcontext()
        if profile is None:
            return request, whose, {"user": None, "method": "none", "heard": heard}
        plan = work.personalizer.plan(profile, Options())
        words = "" if plan.method == "none" else work.personalizer.principle(profile)
        if words:
            request = request.override(system_message=with_principle(request.system_message, words))
        return request, whose, {"user": user_id, **_applied(plan, words), "heard": heard}

    def _admitted(self, state: PreferenceState, runtime: Runtime[Any]) -> str:
        """Whom a run is for, if it may go on.

        Raises:
            UsageError, ThreadOwnerError: as of :func:`owned`.
            UnknownUserError: the store does not know the user, and that is to be an error.
            StoreError: the database failed.
        """
        user_id = owned(state, runtime)
        self._open().profile(user_id, self._on_unknown_user, "first run of an agent")
        return user_id

    def _hear(self, user_id: str, words: str | None) -> list[str]:
        """What is learned from the owner's new words, a line each."""
        work = self._open()
        if not (work.settings.learn or work.settings.infer):
            return []
        profile = work.profile(user_id, self._on_unknown_user, "first run of an agent")
        return [] if profile is None else work.personalizer.reread(profile, words)[1]

    def _open(self) -> Opened:
        if self._work is None:
            self._work = opened(**self._flags)
        return self._work


def user_of(runtime: Any) -> str:
    """Whom a run is for.

    Raises:
        UsageError: its context names nobody.
    """
    user_id = _named(runtime)
    if user_id is None:
        raise UsageError(f"PreferenceMiddleware needs to know whom the run is for: {_HOW}")
    return check_user_id(user_id)


def _named(runtime: Any) -> Any:
    context = getattr(runtime, "context", None)
    return context.get("user_id") if isinstance(context, Mapping) else getattr(context, "user_id", None)


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


def models_within(model: Any) -> list[Any]:
    """The chat models that are called where ``model`` is, which may be one that is bound, retried, configurable or
    fallen back from.
    """
    inner: list[Any] = []
    match model:
        case RunnableBindingBase():
            inner = [model.bound]
        case RunnableWithFallbacks():
            inner = [model.runnable, *model.fallbacks]
        case RunnableConfigurableAlternatives():
            inner = [model.default, *(one for one in model.alternatives.values() if isinstance(one, Runnable))]
        case DynamicRunnable():
            inner = [model.default]
    return [one for part in inner for one in models_within(part)] or [model]


def new_words(messages: Sequence[AnyMessage], seen: Sequence[str], user_id: str) -> str | None:
    """What the user says in the message that a run begins with: the last one, if it is new and bears no other name (as
    those of other agents do). New ones before it may be what a run brought that was broken off, maybe another user's.
    """
    match list(messages[-1:]):
        case [HumanMessage() as last] if last.id not in seen and last.name in (None, user_id):
            return None if "lc_source" in last.additional_kwargs else last.text
    return None


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
