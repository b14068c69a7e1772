"""LangChain's messages as prefmw's, and a reply's figures as LangChain's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata

from prefmw.errors import UsageError
from prefmw.preferences import Message, ToolCall
from prefmw.reply import Reply

_NOT_SAID = (
    *("reasoning", "thinking", "redacted_thinking"),
    *("tool_use", "function_call", "tool_call", "tool_call_chunk", "invalid_tool_call"),
    *("server_tool_call", "server_tool_call_chunk", "server_tool_result"),
)
"""Blocks of an AI message that are not its words: thoughts and what a provider's own tools did are not read again;
calls stand in ``tool_calls`` and ``invalid_tool_calls``.
"""


def conversation(messages: Sequence[BaseMessage]) -> list[Message]:
    """The messages as prefmw's: text alone, system messages in front, where chat templates have their one.

    Raises:
        UsageError: a message of another kind, or content that is no text (an image, audio, a file).
    """
    return sorted((_message(message) for message in messages), key=lambda message: message.role != "system")


def _message(message: BaseMessage) -> Message:
    if isinstance(message, HumanMessage):
        return Message("user", text_of(message))
    if isinstance(message, AIMessage):
        calls = tuple(
            ToolCall(call["name"], json.dumps(call["args"], ensure_ascii=False), call["id"] or "")
            for call in message.tool_calls
        )
        unread = [_unquoted(call["args"] or "") for call in message.invalid_tool_calls]
        return Message("assistant", "\n".join(filter(None, [text_of(message), *unread])), calls)
    if isinstance(message, ToolMessage):
        return Message("tool", text_of(message), answers=message.tool_call_id)
    if isinstance(message, SystemMessage):
        return Message("system", text_of(message))
    if isinstance(message, ChatMessage):
        match message.role:
            case "system" | "user" | "assistant" as role:
                return Message(role, text_of(message))
    raise UsageError(f"ChatPrefMW takes system, human, AI and tool messages, got {type(message).__name__}")


def quoted(text: str) -> str:
    """What a model wrote in place of a call, as the arguments of an invalid call: a JSON string, so that nobody who
    mends broken JSON takes it for arguments.
    """
    return json.dumps(text, ensure_ascii=False)


def _unquoted(arguments: str) -> str:
    with suppress(ValueError):
        if isinstance(text := json.loads(arguments), str):
            return text
    return arguments


def text_of(message: BaseMessage) -> str:
    """A message's text; content blocks are joined.

    Raises:
        UsageError: a block of its content is no text.
    """
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts = []
    for block in blocks:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif not (isinstance(message, AIMessage) and block.get("type") in _NOT_SAID):
            raise UsageError(
                f"ChatPrefMW reads text, got a content block of type '{str(block.get('type'))[:40]}' in a message of "
                f"type '{message.type}'; take it out, or give it to a model that reads such content"
            )
    return "".join(texts)


def usage(reply: Reply) -> UsageMetadata:
    """What the reply cost, in tokens."""
    return UsageMetadata(
        input_tokens=reply.input_tokens,
        output_tokens=reply.output_tokens,
        total_tokens=reply.input_tokens + reply.output_tokens,
    )


def response_metadata(reply: Reply) -> dict[str, Any]:
    """Which model replied, how it ended, and under ``prefmw`` all that was applied."""
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
            "turn": reply.turn_id,
            "notices": [*reply.notices, *filter(None, [reply.not_recorded])],
        },
    }
