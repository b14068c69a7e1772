"""LangChain: a drop-in chat model whose replies follow the preferences of the user they are for.

::

    chat = ChatPrefMW(model="Qwen/Qwen2.5-0.5B-Instruct")
    chat.invoke("How do I fall asleep faster?", user_id="alice")
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, PrivateAttr

from prefmw.bootstrap import build_personalizer, open_store
from prefmw.errors import UsageError
from prefmw.personalizer import Options, Personalizer
from prefmw.preferences import Message
from prefmw.reply import Reply, ReplyStream
from prefmw.settings import load_settings

_PER_CALL = ("method", "strength", "temperature", "top_p", "top_k", "max_tokens", "seed")
"""Fields that a call's keywords may override."""

_opening = threading.Lock()


class _Opened(NamedTuple):
    """What a ChatPrefMW works with once it was called: made for these flags."""

    flags: dict[str, Any]
    personalizer: Personalizer
    log: bool


class ChatPrefMW(BaseChatModel):
    """A local chat model steered, at every token, by the stored preferences of the user it answers.

    Which user: the ``user_id`` keyword of a call, else the ``user_id`` the object was built with. Building the object
    is free; weights load at the first call and are shared within the process. What is not given comes from prefmw's
    environment variables and config file.
    """

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    user_id: str | None = None
    """Whose preferences apply where a call names no user."""

    model: str | None = None
    """The chat model: a folder, a hub id or an embedded model's name."""

    method: str | None = None
    """Alignment method; by default the user's own, else by their profile."""

    strength: float | None = None
    """Strength of the method."""

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

    database: str | None = Field(default=None, repr=False)  # it may hold a password
    """SQLAlchemy URL or SQLite file of the preferences."""

    log: bool | None = None
    """Whether turns are recorded."""

    cache: Literal[False] = False
    """Off, and not to be switched on: a LangChain cache would not see that a user's preferences changed."""

    _opened: _Opened | None = PrivateAttr(default=None)

    @property
    def _llm_type(self) -> str:
        return "prefmw"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "user_id", *_PER_CALL)}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._begin(messages, stop, kwargs) as stream:
            for _ in stream:
                pass
        reply = stream.reply
        message = AIMessage(content=reply.text, usage_metadata=_usage(reply), response_metadata=_metadata(reply))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._begin(messages, stop, kwargs) as stream:
            for piece in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        reply = stream.reply
        last = AIMessageChunk(
            content="", usage_metadata=_usage(reply), response_metadata=_metadata(reply), chunk_position="last"
        )
        yield ChatGenerationChunk(message=last)

    def _begin(self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> ReplyStream:
        user_id = kwargs.pop("user_id", None) or self.user_id
        if not user_id:
            raise UsageError("whose preferences? pass user_id='...' to the call, or to ChatPrefMW(user_id='...')")
        values = {name: kwargs.pop(name, getattr(self, name)) for name in _PER_CALL}
        if kwargs:
            raise UsageError(
                f"ChatPrefMW takes no {', '.join(sorted(kwargs))}; it takes user_id, {', '.join(_PER_CALL)}, stop"
            )
        if stop is not None and not (isinstance(stop, list | tuple) and all(isinstance(text, str) for text in stop)):
            raise UsageError("stop takes a list of strings")
        opened = self._open()
        options = Options(**values, stop=tuple(stop or ()))
        said = [_message(message) for message in messages]
        return opened.personalizer.stream(user_id, said, options, log=opened.log)

    def _open(self) -> _Opened:
        """The personalizer for the fields as they are now, made at the first call with them."""
        flags = {"model": self.model, "database": self.database, "log": self.log}
        with _opening:
            if self._opened is None or self._opened.flags != flags:
                settings = load_settings(flags)
                store = open_store(settings)
                self._opened = _Opened(flags, build_personalizer(settings, store), settings.log)
            return self._opened

    def get_token_ids(self, text: str) -> list[int]:
        """The text's token ids by the chat model's own tokenizer; loads the model."""
        ids: list[int] = self._open().personalizer.load().tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def __getstate__(self) -> dict[Any, Any]:
        """The configuration alone: neither weights nor connections are pickled or copied."""
        return super().__getstate__() | {"__pydantic_private__": {"_opened": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ChatPrefMW:
        copy = self.model_copy()
        copy._opened = None
        return copy


def _message(message: BaseMessage) -> Message:
    if isinstance(message, HumanMessage):
        return Message("user", _text(message))
    if isinstance(message, AIMessage):
        return Message("assistant", _text(message))
    if isinstance(message, SystemMessage):
        return Message("system", _text(message))
    raise UsageError(f"ChatPrefMW takes system, human and AI messages, got {type(message).__name__}")


def _text(message: BaseMessage) -> str:
    """A message's text; content blocks are joined."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts = []
    for block in blocks:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        else:
            raise UsageError(f"ChatPrefMW reads text, got a content block of type '{block.get('type')}'")
    return "".join(texts)


def _usage(reply: Reply) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=reply.input_tokens,
        output_tokens=reply.output_tokens,
        total_tokens=reply.input_tokens + reply.output_tokens,
    )


def _metadata(reply: Reply) -> dict[str, Any]:
    plan = reply.plan
    return {
        "model_name": reply.model,
        "finish_reason": reply.finish_reason,
        "prefmw": {
            "user": reply.user_id,
            "revision": plan.revision,
            "method": plan.method,
            "strength": plan.strength,
            "weights": {key: weight.value for key, weight in plan.weights.items()},
            "seed": plan.sampling.seed,
            "notices": [*reply.notices, *filter(None, [reply.not_recorded])],
        },
    }
