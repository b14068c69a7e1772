"""LangChain: a drop-in chat model whose replies follow the preferences of the user they are for.

::

    chat = ChatPrefMW(model="Qwen/Qwen2.5-0.5B-Instruct")
    chat.invoke("How do I fall asleep faster?", user_id="alice")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, get_config_list
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr

from prefmw.adapters.awaiting import AwaitedReply, in_thread
from prefmw.adapters.calls import Call, trimmed
from prefmw.adapters.chunks import Chunks, result
from prefmw.adapters.messages import conversation
from prefmw.adapters.opening import OnUnknownUser, Opened, opened, without_password
from prefmw.adapters.tool_calls import chosen_tool, opening
from prefmw.errors import ContextLengthError, UnknownUserError, UsageError
from prefmw.plans import Options, Prepared
from prefmw.preferences import Message, PreferenceStore, Profile, check_user_id
from prefmw.reply import Reply, ReplyStream
from prefmw.settings import load_settings

_PER_CALL = ("method", "strength", "candidate", "robust", "temperature", "top_p", "top_k", "max_tokens", "seed")
"""Fields that a call's keywords may override, beside ``model`` and ``user_id``."""

BATCH_AT_ONCE = 128
"""Calls of a batch in flight at once, where its config sets no ``max_concurrency``: twice the rows that an engine
decodes at once, and half of those that it lets wait.
"""


_answering: ContextVar[tuple[str | None] | None] = ContextVar("prefmw_answering", default=None)


@contextmanager
def answering(user_id: str | None) -> Iterator[None]:
    """Calls within it are for this user, or for nobody, whatever their keywords, configs and objects name."""
    before = _answering.set((user_id,))
    try:
        yield
    finally:
        _answering.reset(before)


class PromptTooLongError(ContextLengthError, ContextOverflowError):
    """The conversation does not fit the model's context; both prefmw's error and LangChain's for that."""


class ChatPrefMW(BaseChatModel):
    """A local chat model steered, at every token, by the stored preferences of the user it answers.

    Which user: the ``user_id`` keyword of a call (or of ``bind``), else the ``user_id`` under ``configurable`` in the
    config of the call or of the chain around it, else the one that the object was built with. Building the object is
    free; weights load at the first call and are shared within the process. What is not given comes from prefmw's
    environment variables and config file.

    LangChain's caches may be on: a reply is kept under its user and plan, so that another user, or the same one with
    other preferences, never gets it.
    """

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    user_id: str | None = None
    """Whose preferences apply where a call names no user."""

    on_missing_user: Literal["raise", "base"] = "raise"
    """A call that names nobody is an error, or is answered without anybody's preferences and not recorded."""

    on_unknown_user: OnUnknownUser = "create"
    """A user whom the store does not know is added to it, is an error, or is answered as if nobody was named."""

    model: str | None = None
    """The chat model: a folder, a hub id or an embedded model's name."""

    method: str | None = None
    """Alignment method; by default the user's own, else by their profile."""

    strength: float | None = None
    """Strength of the method."""

    persrm: str | None = None
    """PAD's reward model, a folder; by default the settings', or the one embedded for the model."""

    candidate: str | None = None
    """How PAD picks: greedy, stochastic or best-of-k."""

    dpa: str | None = None
    """The DPA checkpoint, a folder or hub id; by default the settings', or the one that the model has."""

    robust: int | None = None
    """Replies that DPA keeps the best of, each asked for with a direction near the user's."""

    temperature: float | None = None
    """Sampling temperature; 0 is greedy."""

    top_p: float | None = None
    """Nucleus of the candidate rule, up to 1 (no bound)."""

    top_k: int | None = None
    """Most candidates a token is drawn from."""

    max_tokens: int | None = None
    """Tokens of a reply, at most."""

    seed: int | None = None
    """The same seed gives the same reply."""

    stop: list[str] | None = None
    """Strings that end a reply, where a call gives none; neither they nor what follows is part of it."""

    on_overflow: Literal["raise", "trim"] = "raise"
    """A conversation beyond the model's context is an error, or loses its oldest exchanges: as many as leave room for a
    reply of ``max_tokens``, or of a quarter of the context if that is less. System messages and the last question stay.
    """

    streaming: bool | None = None
    """Decode token by token for callbacks where ``invoke`` is called, too."""

    database: str | None = Field(default=None, repr=False)  # it may hold a password
    """SQLAlchemy URL or SQLite file of the preferences."""

    log: bool | None = None
    """Whether turns are recorded."""

    _opened: dict[tuple[Any, ...], Opened] = PrivateAttr(default_factory=dict)

    # Whose call it is: every entry point puts the user into the keywords, where caches and callbacks see it.

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """The reply to a conversation."""
        return super().invoke(input, config, **self._with_user(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """The reply to a conversation, awaited."""
        return await super().ainvoke(input, config, **self._with_user(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        """The reply in pieces; leaving the iterator frees the engine."""
        return super().stream(input, config, **self._with_user(config, kwargs))

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """The reply in pieces, awaited; closing the iterator frees the engine."""
        return super().astream(input, config, **self._with_user(config, kwargs))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The reply as events."""
        return super().stream_events(input, config, **self._with_user(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The reply as events, awaited."""
        return super().astream_events(input, config, **self._with_user(config, kwargs))

    # Batches: all calls at once, so that the engine decodes them together.

    def batch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        """The replies to several conversations, decoded together."""
        return super().batch(inputs, _at_once(config, len(inputs)), **kwargs)

    async def abatch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        """The replies to several conversations, decoded together, awaited."""
        return await super().abatch(inputs, _at_once(config, len(inputs)), **kwargs)

    def batch_as_completed(  # type: ignore[override]
        self, inputs: Sequence[LanguageModelInput], config: Any = None, **kwargs: Any
    ) -> Iterator[tuple[int, AIMessage | Exception]]:
        """The replies to several conversations, decoded together, each as it is whole."""
        return super().batch_as_completed(inputs, _at_once(config, len(inputs)), **kwargs)

    def abatch_as_completed(  # type: ignore[override]
        self, inputs: Sequence[LanguageModelInput], config: Any = None, **kwargs: Any
    ) -> AsyncIterator[tuple[int, AIMessage | Exception]]:
        """The replies to several conversations, decoded together, each as it is whole, awaited."""
        return super().abatch_as_completed(inputs, _at_once(config, len(inputs)), **kwargs)

    # One call

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, self._with_user(None, kwargs))
        return super()._generate_with_cache(messages, stop, run_manager, **{**kwargs, **call.keywords})

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = await self._acall(messages, stop, kwargs)
        return await super()._agenerate_with_cache(messages, stop, run_manager, **{**kwargs, **call.keywords})

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = _asked(kwargs) or self._call(messages, stop, self._with_user(None, kwargs))
        with _begun(call) as stream:
            for _ in stream:
                pass
        return result(stream.reply, call.reader())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = _asked(kwargs) or await self._acall(messages, stop, kwargs)
        async with aclosing(AwaitedReply(partial(_begun, call))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Reply):
                    return result(piece, call.reader())
        raise AssertionError("a reply came to no end")

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = _asked(kwargs) or self._call(messages, stop, self._with_user(None, kwargs))
        chunks = Chunks(call.reader())
        with _begun(call) as stream:
            for piece in stream:
                for chunk in chunks.of(piece):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
        yield from chunks.end(stream.reply)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = _asked(kwargs) or await self._acall(messages, stop, kwargs)
        chunks = Chunks(call.reader())
        async with aclosing(AwaitedReply(partial(_begun, call))) as pieces:
            async for piece in pieces:
                for chunk in chunks.end(piece) if isinstance(piece, Reply) else chunks.of(piece):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _acall(self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Call:
        return await in_thread(partial(self._call, messages, stop, self._with_user(None, kwargs)))

    def _with_user(self, config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords with the user in them, as far as one is known; one that is ``None`` in them is nobody."""
        if (whose := _answering.get()) is not None:
            return {**kwargs, "user_id": whose[0]}
        if "user_id" in kwargs:
            return kwargs
        user = (ensure_config(config).get("configurable") or {}).get("user_id")
        return {**kwargs, "user_id": self.user_id if user is None else user}

    def _call(self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Call:
        """What a call comes to: its user, its plan and its options, read from the store once."""
        kwargs = dict(kwargs)
        user_id = kwargs.pop("user_id", None)
        if user_id is None and self.on_missing_user == "raise" and _answering.get() is None:
            raise UsageError(
                "whose preferences? pass user_id='...' to the call, bind(user_id='...'), a config of "
                "{'configurable': {'user_id': '...'}}, or ChatPrefMW(user_id='...'); "
                "ChatPrefMW(on_missing_user='base') answers without"
            )
        if user_id is not None:
            check_user_id(user_id)
        model = kwargs.pop("model", None) or self.model
        if model is not None and not isinstance(model, str):
            raise UsageError(f"a model is named by text, got {type(model).__name__}")
        values = {name: kwargs.pop(name, getattr(self, name)) for name in _PER_CALL}
        tools, choice = kwargs.pop("tools", None) or [], kwargs.pop("tool_choice", None)
        kwargs.pop("stream", None)  # LangChain has acted on it
        if kwargs:
            raise UsageError(
                f"ChatPrefMW takes no {', '.join(sorted(kwargs))}; it takes user_id, model, stop, "
                f"{', '.join(_PER_CALL)}"
            )
        stop = self.stop if stop is None else stop
        if stop is not None and not (isinstance(stop, list | tuple) and all(isinstance(text, str) for text in stop)):
            raise UsageError("stop takes a list of strings")
        work = self._open(model)
        options = Options(**values, stop=tuple(stop or ()))
        if choice != "none" and (tools or chosen_tool(choice, ())):
            options = replace(options, **self._tools(work, tools, choice))
        said = conversation(messages)
        prepared = self._prepared(work, user_id, said, options)
        if self.on_overflow == "trim":
            said, prepared = trimmed(said, prepared, work.personalizer)
        return Call.of(work, prepared, said, options, trimmed=self.on_overflow == "trim")

    def _prepared(self, work: Opened, user_id: str | None, said: list[Message], options: Options) -> Prepared:
        try:
            return work.personalizer.prepare(user_id, said, options)
        except UnknownUserError:
            if user_id is None or self.on_unknown_user == "raise":
                raise
            if self.on_unknown_user == "base":
                prepared = work.personalizer.prepare(None, said, options)
                return prepared._replace(
                    notices=("the store does not know this user; the reply follows nobody's preferences",)
                )
        work.personalizer.plan(Profile(user_id, persona="", revision=0), options)  # a call refused adds nobody
        work.profile(user_id, "create", "first call through LangChain")
        return work.personalizer.prepare(user_id, said, options)

    @staticmethod
    def _tools(work: Opened, tools: Sequence[Any], choice: Any) -> dict[str, Any]:
        """The options that let the reply call tools, the model loaded to know how it does."""
        schemas = [convert_to_openai_tool(tool) for tool in tools]
        if strange := [schema.get("type") for schema in schemas if "function" not in schema]:
            raise UsageError(f"ChatPrefMW calls functions, not tools of the type '{str(strange[0])[:40]}'")
        forced = chosen_tool(choice, [schema["function"]["name"] for schema in schemas])
        form = work.personalizer.load().template.tool_form
        return {"tools": tuple(schemas), "opening": tuple(opening(form, forced))}

    def _open(self, model: str | None) -> Opened:
        """The personalizer for the fields as they are now, opened at the first call with them."""
        flags = {"model": model, "persrm": self.persrm, "dpa": self.dpa, "database": self.database, "log": self.log}
        key = tuple(flags.values())
        if key not in self._opened:
            self._opened[key] = opened(**flags)
        return self._opened[key]

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools that its replies may call, where its chat template takes tools.

        Args:
            tools: functions, pydantic models, LangChain tools or schemas in OpenAI's form.
            tool_choice: a tool's name makes the reply call it, ``any`` makes it call one; ``none`` offers none.
        """
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], tool_choice=tool_choice, **kwargs)

    @property
    def store(self) -> PreferenceStore:
        """Where preferences are read from."""
        return self._open(self.model).store

    # What LangChain asks about the model

    @property
    def _llm_type(self) -> str:
        return "prefmw"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "user_id", *_PER_CALL, "stop")}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        if "ls_model_name" not in params:
            params["ls_model_name"] = load_settings().model
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The text's token ids by the chat model's own tokenizer; loads the model."""
        tokenizer = self._open(self.model).personalizer.load().tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def __getstate__(self) -> dict[Any, Any]:
        """The configuration alone: neither weights nor connections are pickled, nor a database's password."""
        state = super().__getstate__()
        fields = {name: value for name, value in state["__dict__"].items() if name in type(self).model_fields}
        fields["database"] = without_password(self.database)
        return state | {"__dict__": fields, "__pydantic_private__": {"_opened": {}}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ChatPrefMW:
        copy = self.model_copy()
        copy._opened = {}
        return copy


def _at_once(config: Any, count: int) -> list[RunnableConfig]:
    """A config for each of a batch's calls, which lets them be in flight together."""
    configs = get_config_list(config, count)
    if configs and configs[0].get("max_concurrency") is None:
        configs[0] = {**configs[0], "max_concurrency": min(count, BATCH_AT_ONCE)}
    return configs


def _asked(kwargs: dict[str, Any]) -> Call | None:
    """The call that was read before caches were asked, where one was."""
    plan = kwargs.get("plan")
    return plan if isinstance(plan, Call) else None


def _begun(call: Call) -> ReplyStream:
    """The call's reply, begun."""
    try:
        return call.opened.personalizer.begin(call.prepared, call.messages, call.options, log=call.opened.settings.log)
    except ContextLengthError as error:
        hint = "" if call.trimmed else ", or let ChatPrefMW(on_overflow='trim') drop the oldest"
        raise PromptTooLongError(f"{error}{hint}") from error
