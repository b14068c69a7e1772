"""The preference store in SQL: SQLite and PostgreSQL behind one implementation of ``PreferenceStore``.

Every write to a profile runs in one transaction that holds the user's row, so writers queue and none loses an update.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from math import isfinite
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Row, Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from prefmw.errors import (
    ConflictError,
    StoreLockedError,
    UnknownConversationError,
    UnknownUserError,
    UsageError,
    UserExistsError,
)
from prefmw.preferences import (
    UNCHANGED,
    Conversation,
    ConversationEntry,
    Feedback,
    Message,
    Profile,
    Recorded,
    RecordedFeedback,
    RecordedTurn,
    Revision,
    Source,
    Stated,
    Turn,
    Weight,
    check_key,
    check_persona,
    check_reason,
    check_stated,
    check_text,
    check_user_id,
)
from prefmw.preferences.store import Existing, FeedbackKind, Unchanged
from prefmw.stores.database import Database
from prefmw.stores.rows import (
    BESIDE,
    MOST_FLOAT32,
    chosen,
    feedback_of,
    flat,
    merged,
    message_row,
    ordered,
    packed,
    profile_from_snapshot,
    profile_of,
    snapshot_of,
    storable,
    turn_of,
    unpacked,
)
from prefmw.stores.schema import conversations, revisions, turns, users, vectors, weights
from prefmw.stores.schema import feedback as feedback_table
from prefmw.stores.transfer import export_person, load_people


class SQLPreferenceStore:
    """Preferences, revisions, conversations, turns, feedback and vectors in SQLite or PostgreSQL.

    Args:
        url: SQLAlchemy URL: ``sqlite:///FILE`` or ``postgresql+psycopg://USER@HOST/DATABASE``.

    Raises:
        SchemaVersionError: the schema is another version's; a fresh SQLite file is given its schema.
        StoreError: the database cannot be opened.
        MissingExtraError: PostgreSQL without its driver.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        try:
            self._database.prepare()
        except BaseException:
            self._database.close()
            raise

    @property
    def name(self) -> str:
        """The database's URL, without its password."""
        return self._database.name

    def close(self) -> None:
        """Let go of every connection."""
        self._database.close()

    # Profiles

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
        """Store a new user, at revision 1."""
        now = datetime.now(UTC)
        profile = Profile(
            user_id=check_user_id(user_id),
            persona=check_persona(persona),
            revision=1,
            method=chosen(method),
            strengths=merged({}, dict(strengths or {})),
        )
        with self._database.writing() as connection:
            try:
                connection.execute(
                    insert(users).values(
                        id=profile.user_id,
                        persona=profile.persona,
                        method=profile.method,
                        strengths=profile.strengths,
                        revision=1,
                        created_at=now,
                        updated_at=now,
                    )
                )
            except IntegrityError as error:
                raise UserExistsError(
                    f"there is a user '{user_id}' already; change it with 'prefmw users edit'"
                ) from error
            blank = Profile(user_id=profile.user_id, persona="", revision=0)
            self._append_revision(connection, blank, profile, actor, reason, now)
        return profile

    def users(self) -> Iterator[Profile]:
        """Every profile, by id in the database's own order."""
        with self._database.reading() as connection:
            yield from self._profiles(connection)

    def profile(self, user_id: str) -> Profile:
        """The user's profile as of now, in one query."""
        with self._database.reading() as connection:
            return self._read(connection, user_id)

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
        """Change what is given and nothing else, as one revision."""
        with self._database.writing() as connection:
            before = self._lock(connection, user_id, expected_revision)
            after = replace(
                before,
                persona=before.persona if persona is UNCHANGED else check_persona(persona),
                method=before.method if method is UNCHANGED else chosen(method),
                strengths=merged(dict(before.strengths), dict(strengths or {})),
            )
            after = _with_layers(after, weights or {}, source)
            return self._write(connection, before, after, actor, reason)

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
        """Write one source's layer of each named dimension; ``None`` removes it, uncovering what lies beneath."""
        return self.edit_user(
            user_id, weights=weights, source=source, actor=actor, reason=reason, expected_revision=expected_revision
        )

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
        with self._database.writing() as connection:
            before = self._lock(connection, user_id, expected_revision)
            stale = dict.fromkeys(before.layer(Source.inferred))
            after = _with_layers(before, {**stale, **weights}, Source.inferred)
            return self._write(connection, before, replace(after, inferred_from=inferred_from), actor, reason)

    def rename_user(self, user_id: str, new_id: str, *, actor: str, reason: str = "") -> Profile:
        """Give a user another id; all that hangs on them goes along."""
        with self._database.writing() as connection:
            before = self._lock(connection, user_id, None)
            try:
                after = replace(before, user_id=check_user_id(new_id))
                return self._write(connection, before, after, actor, reason)
            except IntegrityError as error:
                raise UserExistsError(f"there is a user '{new_id}' already; erase or rename that one first") from error

    def revert(
        self, user_id: str, number: int, *, actor: str, reason: str = "", expected_revision: int | None = None
    ) -> Profile:
        """Make the profile what it was after revision ``number``, every layer of it, as a new revision."""
        with self._database.writing() as connection:
            before = self._lock(connection, user_id, expected_revision)
            if not 1 <= number <= before.revision:
                raise UsageError(f"'{user_id}' has no revision {number}; see 'prefmw prefs history {user_id}'")
            then = profile_from_snapshot(user_id, number, self._snapshot(connection, user_id, number))
            same = {replace(layer, updated_at=_ANY): layer for layer in before.layers}
            layers = [same.get(replace(layer, updated_at=_ANY), layer) for layer in then.layers]
            after = replace(then, revision=before.revision, layers=ordered(layers))
            return self._write(connection, before, after, actor, reason or f"back to revision {number}")

    def revisions(self, user_id: str) -> Sequence[Revision]:
        """Every change of the profile, oldest first."""
        with self._database.reading() as connection:
            self._read(connection, user_id)
            rows = connection.execute(select(revisions).where(revisions.c.user_id == user_id).order_by("number"))
            return [Revision(row.number, row.actor, row.reason, row.change, row.created_at) for row in rows]

    # Conversations

    def record(self, turn: Turn) -> Recorded:
        """Append a turn to its conversation, or to a new one where it names none."""
        now = datetime.now(UTC)
        with self._database.writing() as connection:
            conversation_id = turn.conversation_id
            self._lock(connection, turn.user_id, None)
            if conversation_id is None:
                conversation_id = uuid.uuid4().hex[:16]
                connection.execute(
                    insert(conversations).values(
                        id=conversation_id, user_id=turn.user_id, created_at=now, updated_at=now
                    )
                )
            else:
                self._conversation(connection, turn.user_id, conversation_id)
                connection.execute(
                    update(conversations)
                    .where(conversations.c.user_id == turn.user_id, conversations.c.id == conversation_id)
                    .values(updated_at=now)
                )
            values = asdict(turn) | {
                "conversation_id": conversation_id,
                "history": [message_row(message) for message in turn.history],
                "text": storable(turn.text),
                "token_ids": list(turn.token_ids),
                "output_tokens": turn.output_tokens,
                "created_at": now,
            }
            turn_id = connection.execute(insert(turns).values(values).returning(turns.c.id)).scalar_one()
        return Recorded(turn_id, conversation_id)

    def conversation(self, user_id: str, conversation_id: str | Literal["latest"]) -> Conversation:
        """A conversation with its messages; a turn that was left without a reply or was replaced is passed over."""
        with self._database.reading() as connection:
            self._read(connection, user_id)
            row = self._conversation(connection, user_id, conversation_id)
            system = ""
            messages: list[Message] = []
            said = [turn_of(turn) for turn in self._turns(connection, user_id, row.id)]
            replaced = {turn.replaces for turn in said if turn.text}
            last = None
            for turn in said:
                system = turn.system
                messages += turn.history
                if turn.text and turn.id not in replaced:
                    messages += [Message("user", turn.prompt)] if turn.prompt else []
                    messages += [Message("assistant", turn.text)]
                    last = turn.id
            return Conversation(row.id, system, tuple(messages), last)

    def turns(self, user_id: str, conversation_id: str) -> Sequence[RecordedTurn]:
        """The conversation's turns, oldest first."""
        with self._database.reading() as connection:
            self._read(connection, user_id)
            row = self._conversation(connection, user_id, conversation_id)
            return [turn_of(turn) for turn in self._turns(connection, user_id, row.id)]

    def conversations(self, user_id: str) -> Sequence[ConversationEntry]:
        """The user's conversations, the one last spoken in first."""
        inner = turns.alias()
        first = select(inner.c.prompt).where(inner.c.conversation_id == conversations.c.id).order_by(inner.c.id)
        query = (
            select(
                conversations.c.id, func.count(turns.c.id), first.limit(1).scalar_subquery(), conversations.c.updated_at
            )
            .join_from(conversations, turns, isouter=True)
            .where(conversations.c.user_id == user_id)
            .group_by(conversations.c.id)
            .order_by(conversations.c.updated_at.desc(), conversations.c.id)
        )
        with self._database.reading() as connection:
            self._read(connection, user_id)
            return [ConversationEntry(*row) for row in connection.execute(query)]

    # Feedback and vectors

    def add_feedback(self, feedback: Feedback) -> int:
        """Append feedback and return its id."""
        if feedback.kind not in get_args(FeedbackKind):
            raise UsageError(f"no feedback of the kind '{feedback.kind}': {', '.join(get_args(FeedbackKind))}")
        if not all(isfinite(score) for key, pair in feedback.scores.items() if check_key(key) for score in pair):
            raise UsageError("feedback has scores that are no finite numbers")
        values = asdict(feedback) | {"scores": {key: list(pair) for key, pair in feedback.scores.items()}}
        values |= {name: storable(values[name]) for name in ("prompt", "chosen", "rejected")}
        with self._database.writing() as connection:
            self._read(connection, feedback.user_id)
            if feedback.turn_id is not None:
                query = select(turns.c.id).where(turns.c.user_id == feedback.user_id, turns.c.id == feedback.turn_id)
                if connection.execute(query).first() is None:
                    raise UsageError(f"'{feedback.user_id}' has no turn {feedback.turn_id}")
            statement = insert(feedback_table).values(values | {"created_at": datetime.now(UTC)})
            return int(connection.execute(statement.returning(feedback_table.c.id)).scalar_one())

    def feedback(self, user_id: str) -> Sequence[RecordedFeedback]:
        """All feedback of a user, oldest first."""
        query = select(feedback_table).where(feedback_table.c.user_id == user_id).order_by(feedback_table.c.id)
        with self._database.reading() as connection:
            self._read(connection, user_id)
            return [feedback_of(row) for row in connection.execute(query)]

    def vector(self, user_id: str, kind: str, model: str, content: str) -> tuple[float, ...] | None:
        """The vector of that kind that ``model`` made of ``content``; ``None`` if there is none or it is stale."""
        query = select(vectors.c.numbers).where(
            vectors.c.user_id == user_id, vectors.c.kind == kind, vectors.c.model == model, vectors.c.content == content
        )
        with self._database.reading() as connection:
            self._read(connection, user_id)
            stored = connection.execute(query).scalar()
        return None if stored is None else unpacked(stored)

    def put_vector(self, user_id: str, kind: str, model: str, content: str, numbers: Sequence[float]) -> None:
        """Keep a vector, in float32, in place of the one of that kind and model."""
        if not numbers or not all(abs(number) <= MOST_FLOAT32 for number in numbers):
            raise UsageError(f"a vector holds finite numbers in float32, got {len(numbers)} with others among them")
        with self._database.writing() as connection:
            self._lock(connection, user_id, None)
            where = (vectors.c.user_id == user_id, vectors.c.kind == kind, vectors.c.model == model)
            connection.execute(delete(vectors).where(*where))
            values = {"user_id": user_id, "kind": kind, "model": model, "content": content}
            connection.execute(insert(vectors).values(**values, numbers=packed(numbers), created_at=datetime.now(UTC)))

    # Whole people

    def export(self, user_id: str) -> dict[str, Any]:
        """Everything held about a person, as JSON."""
        with self._database.reading() as connection:
            return export_person(connection, self._read(connection, user_id))

    def export_all(self) -> Iterator[dict[str, Any]]:
        """Every person's export, as of one moment."""
        with self._database.reading() as connection:
            for profile in self._profiles(connection):
                yield export_person(connection, profile)

    def erase(self, user_id: str) -> None:
        """Remove everything held about a person; in SQLite their bytes too, from the file and its write-ahead log.

        Raises:
            StoreLockedError: they are removed, but another process keeps the write-ahead log from being emptied.
        """
        with self._database.writing() as connection:
            self._lock(connection, user_id, None)
            connection.execute(delete(users).where(users.c.id == user_id))
        try:
            self._database.empty_log()
        except StoreLockedError as error:
            raise StoreLockedError(f"'{user_id}' is erased, but {error}") from error

    def load(self, people: Iterable[Mapping[str, Any]], *, existing: Existing = "fail", actor: str) -> int:
        """Store people as :meth:`export` gives them, or as few fields of that as ``user`` alone; all or nobody."""
        with self._database.writing() as connection:
            return load_people(connection, people, existing, actor)

    def check(self, advance: Callable[[int], None]) -> list[str]:
        """What is wrong with the database, a line each: a damaged file, settings that lose writes, a profile that is
        not what its latest revision says. ``advance`` is told of every profile that was looked at.
        """
        problems = self._database.problems()
        with self._database.reading() as connection:
            for profile in self._profiles(connection):
                latest = self._snapshot(connection, profile.user_id, profile.revision)
                if {name: value for name, value in latest.items() if name not in BESIDE} != flat(profile):
                    problems.append(f"user '{profile.user_id}': the profile is not what its latest revision says")
                advance(1)
        try:
            self._database.empty_log()
        except StoreLockedError as error:
            problems.append(str(error))
        return problems

    # Rows

    @staticmethod
    def _profiles(connection: Connection) -> Iterator[Profile]:
        query = _PROFILE.order_by(users.c.id, *_LAYER_ORDER)
        group: list[Row[Any]] = []
        for row in connection.execute(query, execution_options={"yield_per": 1000}):
            if group and row.id != group[0].id:
                yield profile_of(group)
                group = []
            group.append(row)
        if group:
            yield profile_of(group)

    @staticmethod
    def _snapshot(connection: Connection, user_id: str, number: int) -> dict[str, Any]:
        query = select(revisions.c.snapshot).where(revisions.c.user_id == user_id, revisions.c.number == number)
        return dict(connection.execute(query).scalar() or {})

    def _read(self, connection: Connection, user_id: str) -> Profile:
        check_user_id(user_id)
        rows = connection.execute(_PROFILE.where(users.c.id == user_id).order_by(*_LAYER_ORDER)).all()
        if not rows:
            raise UnknownUserError(
                f"no user '{user_id[:128]}'; add one with 'prefmw users add', or see 'prefmw users list'"
            )
        return profile_of(rows)

    def _lock(self, connection: Connection, user_id: str, expected_revision: int | None) -> Profile:
        """The profile, with its user's row held until the transaction ends."""
        connection.execute(select(users.c.id).where(users.c.id == check_user_id(user_id)).with_for_update())
        profile = self._read(connection, user_id)
        if expected_revision is not None and profile.revision != expected_revision:
            raise ConflictError(
                f"'{user_id}' is at revision {profile.revision}, not {expected_revision}: somebody changed it "
                "meanwhile; read it again and repeat"
            )
        return profile

    def _write(self, connection: Connection, before: Profile, after: Profile, actor: str, reason: str) -> Profile:
        """Make ``after`` the user's profile as a new revision; nothing at all where nothing changed."""
        if after == before:
            return before
        now = datetime.now(UTC)
        is_revision = replace(after, inferred_from=before.inferred_from) != before
        after = replace(after, revision=before.revision + is_revision)
        connection.execute(
            update(users)
            .where(users.c.id == before.user_id)
            .values(
                id=after.user_id,
                persona=after.persona,
                method=after.method,
                strengths=dict(after.strengths),
                revision=after.revision,
                inferred_from=after.inferred_from,
                updated_at=now,
            )
        )
        if not is_revision:
            return after
        for layer in set(before.layers) - set(after.layers):
            connection.execute(
                delete(weights).where(
                    weights.c.user_id == after.user_id,
                    weights.c.dimension == layer.dimension,
                    weights.c.source == layer.source.name,
                )
            )
        if new := [layer for layer in after.layers if layer not in before.layers]:
            rows = [vars(layer) | {"user_id": after.user_id, "source": layer.source.name} for layer in new]
            connection.execute(insert(weights), rows)
        self._append_revision(connection, before, after, actor, reason, now)
        return after

    @staticmethod
    def _append_revision(
        connection: Connection, before: Profile, after: Profile, actor: str, reason: str, now: datetime
    ) -> None:
        old, new = flat(before), flat(after)
        change = {key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
        if before.revision and before.user_id != after.user_id:
            change["user"] = [before.user_id, after.user_id]
        connection.execute(
            insert(revisions).values(
                user_id=after.user_id,
                number=after.revision,
                actor=check_text(actor, "an actor")[:128],
                reason=check_reason(reason),
                change=change,
                snapshot=snapshot_of(after),
                created_at=now,
            )
        )

    @staticmethod
    def _conversation(connection: Connection, user_id: str, conversation_id: str) -> Row[Any]:
        query = select(conversations).where(conversations.c.user_id == user_id)
        if conversation_id == "latest":
            query = query.order_by(conversations.c.updated_at.desc(), conversations.c.id).limit(1)
        else:
            query = query.where(conversations.c.id == check_text(conversation_id, "a conversation's id"))
        row = connection.execute(query).first()
        if row is None:
            which = "conversation yet" if conversation_id == "latest" else f"conversation '{conversation_id[:32]}'"
            raise UnknownConversationError(f"'{user_id[:128]}' has no {which}")
        return row

    @staticmethod
    def _turns(connection: Connection, user_id: str, conversation_id: str) -> Sequence[Row[Any]]:
        query = select(turns).where(turns.c.user_id == user_id, turns.c.conversation_id == conversation_id)
        return connection.execute(query.order_by(turns.c.id)).all()


_PROFILE: Select[Any] = select(
    users.c.id,
    users.c.persona,
    users.c.method,
    users.c.strengths,
    users.c.revision,
    users.c.inferred_from,
    weights.c.dimension,
    weights.c.source,
    weights.c.value,
    weights.c.confidence,
    weights.c.updated_at,
    weights.c.evidence,
).join_from(users, weights, isouter=True)

_LAYER_ORDER = (weights.c.dimension, weights.c.source)

_ANY = datetime.fromtimestamp(0, UTC)  # a moment for layers that are compared whatever theirs


def _with_layers(profile: Profile, changes: Mapping[str, Stated | None], source: Source) -> Profile:
    """The profile with one source's layers changed; a layer that says the same keeps its time."""
    now = datetime.now(UTC)
    layers = {(layer.dimension, layer.source): layer for layer in profile.layers}
    for dimension, stated in changes.items():
        old = layers.pop((dimension, source), None)
        if stated is None:
            continue
        value, confidence, evidence = check_stated(stated)
        new = Weight(check_key(dimension), source, value, confidence, now, evidence)
        layers[dimension, source] = old if old and replace(old, updated_at=now) == new else new
    return replace(profile, layers=ordered(layers.values()))


def _weights(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name.startswith("weight.")}
