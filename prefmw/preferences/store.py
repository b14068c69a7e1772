"""The interface of a preference store. Calls name the user they are about, so none reads across users by omission.

One implementation ships, :class:`prefmw.stores.sql.SQLPreferenceStore`; ``tests/stores/conformance.py`` is what any
other must pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Final, Literal, Protocol

from prefmw.preferences.profile import Message, Profile, Revision, Source, Stated


class Unchanged(Enum):
    """The type of :data:`UNCHANGED`."""

    token = 0


UNCHANGED: Final = Unchanged.token
"""Leaves a field as it is, where ``None`` would clear it."""


@dataclass(frozen=True)
class Turn:
    """One exchange, as it is recorded: what was asked, what was answered, and all that is needed to decode it again.

    ``history`` holds messages that came before the prompt and are no turns of its conversation, as where an application
    keeps conversations itself.
    """

    user_id: str
    conversation_id: str | None
    system: str
    history: tuple[Message, ...]
    prompt: str
    text: str
    finish_reason: str
    plan: Mapping[str, Any]
    plan_hash: str
    method: str
    strength: float | None
    revision: int
    model: str
    model_revision: str
    seed: int
    token_ids: tuple[int, ...]
    input_tokens: int

    @property
    def output_tokens(self) -> int:
        """Tokens of the reply."""
        return len(self.token_ids)


@dataclass(frozen=True)
class RecordedTurn(Turn):
    """A turn with the id the store gave it, and when."""

    id: int
    created_at: datetime


@dataclass(frozen=True)
class Recorded:
    """Where a turn was put: its own id and its conversation's."""

    turn_id: int
    conversation_id: str


class PreferenceStore(Protocol):
    """Users, their weights in layers, revisions, conversations and turns.

    Writes are whole or not at all, and acknowledged only when durable. Every change of a profile makes the next
    revision; ``expected_revision`` makes it conditional on the profile being as it was read.

    Any call may raise StoreError; a call about a user nobody added raises UnknownUserError.
    """

    def add_user(
        self,
        user_id: str,
        *,
        persona: str = "",
        method: str | None = None,
        strengths: Mapping[str, float] | None = None,
        actor: str,
        reason: str = "",
    ) -> Profile:
        """Store a new user, at revision 1. Raises UserExistsError if the id is taken."""
        ...

    def users(self) -> Iterator[Profile]:
        """Every profile, by id: for the administrator alone."""
        ...

    def profile(self, user_id: str) -> Profile:
        """The user's profile as of now, in one query."""
        ...

    def edit_user(
        self,
        user_id: str,
        *,
        persona: str | Unchanged = UNCHANGED,
        method: str | Unchanged | None = UNCHANGED,
        strengths: Mapping[str, float | None] | None = None,
        actor: str,
        reason: str = "",
        expected_revision: int | None = None,
    ) -> Profile:
        """Change what is given and nothing else. Raises ConflictError if the revision is not the expected one.

        ``strengths`` are set for the methods they name, ``None`` forgetting one; other methods keep theirs.
        """
        ...

    def write_weights(
        self,
        user_id: str,
        weights: Mapping[str, Stated | None],
        *,
        source: Source,
        actor: str,
        reason: str = "",
        expected_revision: int | None = None,
    ) -> Profile:
        """Write one source's layer of each named dimension; ``None`` removes it, uncovering what lies beneath.

        Values lie in [-1, 1]; whether a dimension takes them is the caller's to check against its registry.
        """
        ...

    def revisions(self, user_id: str) -> Sequence[Revision]:
        """Every change of the profile, oldest first."""
        ...

    def record(self, turn: Turn) -> Recorded:
        """Append a turn to its conversation, or to a new one where it names none.

        Raises UnknownConversationError if the user has no such conversation.
        """
        ...

    def conversation(self, user_id: str, conversation_id: str | Literal["latest"]) -> Conversation:
        """A conversation with its messages. Raises UnknownConversationError if the user has no such one."""
        ...

    def turns(self, user_id: str, conversation_id: str) -> Sequence[RecordedTurn]:
        """The conversation's turns, oldest first."""
        ...

    def close(self) -> None:
        """Let go of every connection."""
        ...


@dataclass(frozen=True)
class Conversation:
    """A conversation so far: its system prompt (``""`` for none) and the messages that follow it."""

    id: str
    system: str
    messages: tuple[Message, ...]
