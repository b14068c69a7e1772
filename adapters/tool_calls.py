"""Calls of tools read out of a reply's text as it comes, in the two ways that chat models write them.

Hermes and Qwen: text, then ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, once or several times.
Llama 3: the whole reply is ``{"name": ..., "parameters": {...}}``, several apart by ``;``. A call is given out when it
is whole; what looks like one and is no JSON, or was cut off, is given out as unreadable and never mended by guessing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefmw.errors import UsageError, nearest

BEGIN, END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"

Form = Literal["hermes", "llama"]
Opening = list[tuple[str, bool]]
"""What a reply is made to begin with, in pieces: (text, whether it is somebody's, not the model's own)."""


@dataclass(frozen=True)
class Called:
    """A call that was read: the tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """What stands where a call should, as the model wrote it."""

    text: str


Part = str | Called | Unreadable


def chosen_tool(choice: Any, names: Sequence[str]) -> str | bool:
    """What a ``tool_choice`` forces: one tool by its name, any (``True``) or none of them (``False``).

    Raises:
        UsageError: it names no tool there is.
    """
    if isinstance(choice, dict):
        choice = choice.get("function", {}).get("name", choice.get("name"))
    if choice in (None, False, "auto", "none", ""):
        return False
    if not names:
        raise UsageError("tool_choice needs tools to choose from; pass tools, or bind them with bind_tools")
    if choice in (True, "any", "required"):
        return names[0] if len(names) == 1 else True
    if choice not in names:
        raise UsageError(f"tool_choice '{str(choice)[:40]}' is none of the tools: {nearest(str(choice)[:40], names)}")
    return str(choice)


def opening(form: Form, forced: str | bool) -> Opening:
    """What makes a reply call a tool: the beginning of a call, as far as it is known."""
    if forced is False:
        return []
    start, key = (BEGIN + "\n", "arguments") if form == "hermes" else ("", "parameters")
    if forced is True:
        return [(f'{start}{{"name": "', False)]
    name = json.dumps(forced, ensure_ascii=False)
    return [(f'{start}{{"name": ', False), (name, True), (f', "{key}": ', False)]


class ToolCallReader:
    """Takes a reply piece by piece and gives out its text and its calls.

    Args:
        form: how the model writes calls.
        begun: what the reply was made to begin with.
    """

    def __init__(self, form: Form, begun: str = "") -> None:
        self._form = form
        self._held = begun  # not given out yet
        self._inside = False  # behind <tool_call>
        self._plain = False  # llama: a reply that is no call
        self._behind_call = False  # where white space is nobody's

    def push(self, piece: str) -> list[Part]:
        """What is certain now."""
        self._held += piece
        return self._hermes() if self._form == "hermes" else self._llama()

    def finish(self) -> list[Part]:
        """What is left when no more text comes."""
        parts = self.push("")
        rest, self._held = self._held, ""
        if self._inside:
            return [*parts, _parsed(rest) or Unreadable(rest.strip())]
        if self._form == "llama" and not self._plain and rest.lstrip().startswith("{") and '"name"' in rest:
            return [*parts, Unreadable(rest.strip())]
        return [*parts, *self._text(rest)]

    def _text(self, text: str) -> list[Part]:
        """Text that is given out, without white space behind a call."""
        text = text.lstrip() if self._behind_call else text
        self._behind_call = self._behind_call and not text
        return [text] if text else []

    def _hermes(self) -> list[Part]:
        parts: list[Part] = []
        while True:
            if not self._inside:
                at = self._held.find(BEGIN)
                sure = at if at >= 0 else _sure(self._held)
                parts += self._text(self._held[:sure].rstrip() if at >= 0 else self._held[:sure])
                if at < 0:
                    self._held = self._held[sure:]
                    return parts
                self._held, self._inside = self._held[at + len(BEGIN) :], True
            end = _end(self._held)
            if end < 0:
                return parts
            body, self._held = self._held[:end], self._held[end + len(END) :]
            parts.append(_parsed(body) or Unreadable(body.strip()))
            self._inside, self._behind_call = False, True

    def _llama(self) -> list[Part]:
        parts: list[Part] = []
        while not self._plain:
            text = self._held.lstrip(" \t\n\r;" if self._behind_call else None).removeprefix(PYTHON_TAG).lstrip()
            if not text or PYTHON_TAG.startswith(text):
                return parts
            if not text.startswith("{"):
                self._plain = True
                break
            if "}" not in text:
                return parts
            try:
                _, end = _DECODER.raw_decode(text)
            except (ValueError, RecursionError):
                return parts
            call = _parsed(text[:end])
            if call is None:
                self._plain = True
                break
            parts.append(call)
            self._held, self._behind_call = text[end:], True
        rest, self._held = self._held, ""
        return [*parts, *self._text(rest)]


def _sure(text: str) -> int:
    """How much of a text cannot turn out to be white space before a call, or the beginning of its mark."""
    size = next((size for size in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:size])), 0)
    return len(text[: len(text) - size].rstrip())


def _end(body: str) -> int:
    """Where the mark stands that ends a call: not one in a string of its JSON. -1 if it has not come."""
    at = body.find(END)
    while at >= 0:
        inside = escaped = False
        for character in body[:at]:
            if character == '"' and not escaped:
                inside = not inside
            escaped = character == "\\" and not escaped
        if not inside:
            return at
        at = body.find(END, at + 1)
    return -1


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _parsed(text: str) -> Called | None:
    """A call in JSON; ``None`` if it is none."""
    try:
        found = _DECODER.decode(text.strip())
        if not isinstance(found, dict):
            return None
        arguments = found.get("arguments", found.get("parameters"))
        if isinstance(arguments, str):  # JSON in JSON
            arguments = _DECODER.decode(arguments)
    except (ValueError, RecursionError):
        return None
    name, arguments = found.get("name"), {} if arguments is None else arguments
    return Called(name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None
