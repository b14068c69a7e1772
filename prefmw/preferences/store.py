"""The interface of a preference store. Calls name the user they are about, so none reads across users by omission.

One implementation ships, :class:`prefmw.stores.sql.SQLPreferenceStore`; ``tests/stores/conformance.py`` is what any
other must pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    keeps conversations itself. ``replaces`` is the turn in whose place this one stands: a reply asked for again, or
    edited by its reader.
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
    replaces: int | None

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


FeedbackKind = Literal["choice", "like", "dislike", "edit"]


@dataclass(frozen=True)
class Feedback:
    """What a person said of replies: which of two they chose, one they liked or disliked, or how they edited one.

    ``chosen`` is ``""`` for a dislike and ``rejected`` for a like; of an edit ``rejected`` is the reply and ``chosen``
    what it was made into. ``scores`` are both replies' attribute scores by dimension, where they are known.
    """

    user_id: str
    kind: FeedbackKind
    prompt: str
    chosen: str = ""
    rejected: str = ""
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    turn_id: int | None = None


@dataclass(frozen=True)
class RecordedFeedback(Feedback):
    """Feedback with the id the store gave it, and when."""

    id: int = 0
    created_at: datetime = datetime.min


@dataclass(frozen=True)
class ConversationEntry:
    """A conversation in a list: its id, how many turns it has, the first prompt, and when it was last spoken in."""

    id: str
    turns: int
    first_prompt: str
    updated_at: datetime


Existing = Literal["fail", "skip", "replace"]
"""What loading does with a user who is stored already."""


class PreferenceStore(Protocol):
    """Users, their weights in layers, revisions, conversations, turns, feedback and vectors.

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
        weights: Mapping[str, Stated | None] | None = None,
        source: Source = Source.user,
        actor: str,
        reason: str = "",
        expected_revision: int | None = None,
    ) -> Profile:
        """Change what is given and nothing else, as one revision. Raises ConflictError if the profile is at another
        revision than the expected one.

        ``strengths`` are set for the methods they name, ``weights`` as that source's layer of the dimensions they name;
        ``None`` forgets a strength or removes a layer, uncovering what lies beneath. Weights lie in [-1, 1]; whether a
        dimension takes them is the caller's to check against its registry.
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
        """:meth:`edit_user` for one source's weights alone."""
        ...

    def write_inferred(
        self,
        user_id: str,
        weights: Mapping[str, Stated],
        *,
        inferred_from: str,
        actor: str,
        reason: str = "",
        expected_revision: int | None = None,
    ) -> Profile:
        """Replace every inferred layer by these and note what they were read from, which alone makes no revision."""
        ...

    def rename_user(self, user_id: str, new_id: str, *, actor: str, reason: str = "") -> Profile:
        """Give a user another id; all that hangs on them goes along. Raises UserExistsError if it is taken."""
        ...

    def revert(
        self, user_id: str, number: int, *, actor: str, reason: str = "", expected_revision: int | None = None
    ) -> Profile:
        """Make the profile what it was after revision ``number``, every layer of it, as a new revision.

        Raises UsageError if there is no such revision.
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

    def conversations(self, user_id: str) -> Sequence[ConversationEntry]:
        """The user's conversations, the one last spoken in first."""
        ...

    def add_feedback(self, feedback: Feedback) -> int:
        """Append feedback and return its id. Raises UsageError if its turn is not the user's."""
        ...

    def feedback(self, user_id: str) -> Sequence[RecordedFeedback]:
        """All feedback of a user, oldest first."""
        ...

    def vector(self, user_id: str, kind: str, model: str, content: str) -> tuple[float, ...] | None:
        """The vector of that kind that ``model`` made of ``content`` (a hash); ``None`` if there is none, or if it was
        made of something else and is stale.
        """
        ...

    def put_vector(self, user_id: str, kind: str, model: str, content: str, numbers: Sequence[float]) -> None:
        """Keep a vector, in float32, in place of the one of that kind and model."""
        ...

    def export(self, user_id: str) -> dict[str, Any]:
        """Everything held about a person, as JSON."""
        ...

    def export_all(self) -> Iterator[dict[str, Any]]:
        """:meth:`export` of every user, as of one moment: for the administrator alone."""
        ...

    def erase(self, user_id: str) -> None:
        """Remove everything held about a person, revisions, conversations, feedback and vectors included."""
        ...

    def load(self, people: Iterable[Mapping[str, Any]], *, existing: Existing = "fail", actor: str) -> int:
        """Store people as :meth:`export` gives them, or as few fields of that as ``user`` alone; ``weights`` may stand
        for layers of source user. All or nobody; returns how many.

        Raises UnreadablePersonError, which says the how-manieth of them cannot be read; UserExistsError.
        """
        ...

    def close(self) -> None:
        """Let go of every connection."""
        ...


@dataclass(frozen=True)
class Conversation:
    """A conversation so far: its system prompt (``""`` for none), the messages that follow it, and the turn that its
    last reply is from (``None`` where nothing was answered).
    """

    id: str
    system: str
    messages: tuple[Message, ...]
    last_turn: int | None
