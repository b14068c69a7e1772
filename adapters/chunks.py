"""Replies as LangChain's messages and chunks: text, calls of tools, and at the end what was applied."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from prefmw.adapters.messages import quoted, response_metadata, usage
from prefmw.adapters.tool_calls import Called, Part, ToolCallReader
from prefmw.reply import Reply


class Chunks:
    """The chunks of one reply.

    Args:
        reader: reads calls of tools out of its text; ``None`` where there is nothing to call.
    """

    def __init__(self, reader: ToolCallReader | None) -> None:
        self._reader = reader
        self._blocks = 0  # text and calls that have begun
        self._in_text = False

    def of(self, piece: str) -> list[ChatGenerationChunk]:
        """The chunks that a piece of text makes certain."""
        return self._chunks([piece] if self._reader is None else self._reader.push(piece))

    def end(self, reply: Reply) -> list[ChatGenerationChunk]:
        """The last ones: what was held back, then what the reply cost and what was applied."""
        rest = [] if self._reader is None else self._chunks(self._reader.finish())
        last = AIMessageChunk(
            content="", usage_metadata=usage(reply), response_metadata=response_metadata(reply), chunk_position="last"
        )
        return [*rest, ChatGenerationChunk(message=last)]

    def _chunks(self, parts: Iterable[Part]) -> list[ChatGenerationChunk]:
        return [ChatGenerationChunk(message=self._chunk(part)) for part in parts]

    def _chunk(self, part: Part) -> AIMessageChunk:
        self._blocks += not (isinstance(part, str) and self._in_text)
        self._in_text = isinstance(part, str)
        if isinstance(part, str):
            return AIMessageChunk(content=part)
        name, arguments = (
            (part.name, json.dumps(part.arguments)) if isinstance(part, Called) else (None, quoted(part.text))
        )
        call = tool_call_chunk(name=name, args=arguments, id=_call_id(), index=self._blocks - 1)
        return AIMessageChunk(content="", tool_call_chunks=[call])


def result(reply: Reply, reader: ToolCallReader | None) -> ChatResult:
    """The whole reply as LangChain's result."""
    parts: list[Part] = [reply.text] if reader is None else [*reader.push(reply.text), *reader.finish()]
    calls = [part for part in parts if isinstance(part, Called)]
    unread = [part for part in parts if not isinstance(part, str | Called)]
    message = AIMessage(
        content="".join(part for part in parts if isinstance(part, str)),
        tool_calls=[tool_call(name=call.name, args=call.arguments, id=_call_id()) for call in calls],
        invalid_tool_calls=[
            invalid_tool_call(name=None, args=quoted(part.text), id=_call_id(), error="no call that can be read")
            for part in unread
        ],
        usage_metadata=usage(reply),
        response_metadata=response_metadata(reply),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
