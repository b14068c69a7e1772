"""What is remembered about one person: persona, weights in layers, chosen method, and the revisions it went through."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any, Literal, NamedTuple

from prefmw.errors import UsageError

MAX_USER_ID = 128
"""Characters in a user id, at most."""

MAX_KEY = 64
"""Characters in a dimension's key, at most."""

MAX_REASON = 1000
"""Characters in a revision's reason, at most."""

MAX_PERSONA = 4000
"""Characters in a persona, at most: it stands in front of every prompt."""


class Source(IntEnum):
    """Where a weight came from, weakest first; the strongest source of a dimension is in effect."""

    inferred = 1
    learned = 2
    user = 3
    admin = 4


class Stated(NamedTuple):
    """A weight as somebody states it: a value in [-1, 1], how surely, in [0, 1], and in JSON what it rests on."""

    value: float
    confidence: float = 1.0
    evidence: Any = None


@dataclass(frozen=True)
class Weight:
    """One layer of one dimension: a value in [-1, 1], who said so, how surely (confidence in [0, 1]), and in JSON what
    it rests on: the anchors that an inference was decided by, say, or the words that were heard.
    """

    dimension: str
    source: Source
    value: float
    confidence: float
    updated_at: datetime
    evidence: Any = field(default=None, hash=False)

    def as_json(self) -> dict[str, Any]:
        """Value, source and confidence, as every command prints them."""
        return {"value": self.value, "source": self.source.name, "confidence": self.confidence}


@dataclass(frozen=True)
class Profile:
    """A person as of one revision. ``layers`` holds every stored weight; ``weights`` those in effect. ``inferred_from``
    is a hash of what the inferred layers were read from; ``None`` if nothing was inferred yet.
    """

    user_id: str
    persona: str
    revision: int
    layers: tuple[Weight, ...] = ()
    method: str | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)
    inferred_from: str | None = None

    @property
    def weights(self) -> dict[str, Weight]:
        """The effective weight of each set dimension: its strongest source's. An unset dimension is absent."""
        effective: dict[str, Weight] = {}
        for weight in sorted(self.layers, key=lambda layer: (layer.dimension, layer.source)):
            effective[weight.dimension] = weight
        return effective

    def layer(self, source: Source) -> dict[str, Weight]:
        """What one source says, by dimension, whether or not it is in effect."""
        return {weight.dimension: weight for weight in self.layers if weight.source is source}


@dataclass(frozen=True)
class Revision:
    """One change of a profile: who made it, when, why, and what changed (``{field: [before, after]}``)."""

    number: int
    actor: str
    reason: str
    change: Mapping[str, Any]
    created_at: datetime


class ToolCall(NamedTuple):
    """A call of a tool: its name, its arguments as a JSON object, and an id that its answer names."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One message of a conversation. Its content is text and never becomes a control token.

    An assistant's message may call tools; a tool's answers the call of that id.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    calls: tuple[ToolCall, ...] = ()
    answers: str = ""


def check_text(text: str, what: str) -> str:
    """Return ``text`` if every store and tokenizer can hold it.

    Raises:
        UsageError: it holds a NUL character or is not valid Unicode (undecodable bytes of a pipe or an argument).
    """
    if "\0" in text:
        raise UsageError(f"{what} holds a NUL character, which no text may; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not valid UTF-8; re-encode it") from error
    return text


def check_user_id(user_id: str) -> str:
    """Return ``user_id`` if it is one: 1 to 128 printable characters, no space around them.

    Raises:
        UsageError: it is empty, too long, or holds line breaks or other control characters.
    """
    if not isinstance(user_id, str):
        raise UsageError(f"a user id is text, got {type(user_id).__name__}")
    if not user_id.strip():
        raise UsageError("a user id is empty; give 1 to 128 printable characters")
    if len(user_id) > MAX_USER_ID:
        raise UsageError(f"a user id has at most {MAX_USER_ID} characters, got {len(user_id)}")
    if not user_id.isprintable() or user_id != user_id.strip():
        raise UsageError("a user id holds printable characters only, no line break and no space around them")
    if user_id != unicodedata.normalize("NFC", user_id):
        raise UsageError("a user id is written in Unicode's composed form (NFC), so that it has one spelling")
    return user_id


def check_key(key: str) -> str:
    """Return ``key`` if it can name a dimension: 1 to 64 printable characters.

    Raises:
        UsageError: it cannot.
    """
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise UsageError(f"a dimension's key has 1 to {MAX_KEY} printable characters, got {len(key)}")
    return key


def check_reason(reason: str) -> str:
    """Return ``reason`` if a revision can hold it: at most 1,000 characters of text.

    Raises:
        UsageError: it is too long or not text.
    """
    if len(reason) > MAX_REASON:
        raise UsageError(f"a reason has at most {MAX_REASON} characters, got {len(reason)}")
    return check_text(reason, "a reason")


def check_stated(stated: Stated) -> Stated:
    """Return ``stated`` if its value lies in [-1, 1] and its confidence in [0, 1].

    Raises:
        UsageError: either does not (NaN included).
    """
    if not -1 <= stated.value <= 1:
        raise UsageError(f"a weight lies in [-1, 1], got {stated.value:g}")
    if not 0 <= stated.confidence <= 1:
        raise UsageError(f"a confidence lies in [0, 1], got {stated.confidence:g}")
    return Stated(float(stated.value), float(stated.confidence), stated.evidence)


def check_persona(persona: str) -> str:
    """Return ``persona`` without surrounding space if it is one: at most 4,000 characters of text.

    Raises:
        UsageError: it is too long or not text.
    """
    persona = check_text(persona, "a persona").strip()
    if len(persona) > MAX_PERSONA:
        raise UsageError(f"a persona has at most {MAX_PERSONA} characters, got {len(persona)}; say it in fewer words")
    return persona
