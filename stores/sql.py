"""The preference store in SQL: SQLite and PostgreSQL behind one implementation of ``PreferenceStore``.

Every write to a profile runs in one transaction that holds the user's row, so writers queue and none loses an update.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from prefmw.errors import ConflictError, UnknownConversationError, UnknownUserError, UserExistsError
from prefmw.preferences import (
    UNCHANGED,
    Conversation,
    Message,
    Profile,
    Recorded,
    RecordedTurn,
    Revision,
    Source,
    Stated,
    Turn,
    Weight,
    check_key,
    check_method,
    check_persona,
    check_reason,
    check_stated,
    check_strength,
    check_text,
    check_user_id,
)
from prefmw.preferences.store import Unchanged
from prefmw.stores.database import Database
from prefmw.stores.schema import conversations, revisions, turns, users, weights


class SQLPreferenceStore:
    """Preferences, revisions, conversations and turns in SQLite or PostgreSQL.

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
            method=_checked_method(method),
            strengths=_merged({}, strengths or {}),
        )
        with self._database.writing() as connection:
            try:
                connection.execute(
                    insert(users).values(
                        id=profile.user_id,
                        persona=profile.persona,
                        method=method,
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
        """Every profile, by id."""
        with self._database.reading() as connection:
            rows = connection.execution_options(yield_per=1000).execute(_PROFILE.order_by(users.c.id, *_LAYER_ORDER))
            group: list[_Row] = []
            for row in rows:
                if group and row.id != group[0].id:
                    yield _profile(group)
                    group = []
                group.append(row)
            if group:
                yield _profile(group)

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
        actor: str,
        reason: str = "",
        expected_revision: int | None = None,
    ) -> Profile:
        """Change what is given and nothing else."""
        with self._database.writing() as connection:
            before = self._lock(connection, user_id, expected_revision)
            after = replace(
                before,
                persona=before.persona if persona is UNCHANGED else check_persona(persona),
                method=before.method if method is UNCHANGED else _checked_method(method),
                strengths=_merged(before.strengths, strengths or {}),
            )
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
        with self._database.writing() as connection:
            before = self._lock(connection, user_id, expected_revision)
            now = datetime.now(UTC)
            layers = {(layer.dimension, layer.source): layer for layer in before.layers}
            for dimension, stated in weights.items():
                old = layers.pop((dimension, source), None)
                if stated is None:
                    continue
                new = Weight(check_key(dimension), source, *check_stated(stated), updated_at=now)
                layers[dimension, source] = old if old and replace(old, updated_at=now) == new else new
            return self._write(connection, before, replace(before, layers=_ordered(layers.values())), actor, reason)

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
            if conversation_id is None:
                self._read(connection, turn.user_id)
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
                "history": [[message.role, message.content] for message in turn.history],
                "text": _text(turn.text),
                "token_ids": list(turn.token_ids),
                "output_tokens": turn.output_tokens,
                "created_at": now,
            }
            turn_id = connection.execute(insert(turns).values(values).returning(turns.c.id)).scalar_one()
        return Recorded(turn_id, conversation_id)

    def conversation(self, user_id: str, conversation_id: str | Literal["latest"]) -> Conversation:
        """A conversation with its messages; a turn that was left without a reply is passed over."""
        with self._database.reading() as connection:
            self._read(connection, user_id)
            row = self._conversation(connection, user_id, conversation_id)
            system = ""
            messages: list[Message] = []
            for turn in map(_turn, self._turns(connection, user_id, row.id)):
                system = turn.system
                messages += turn.history
                if turn.text:
                    messages += [Message("user", turn.prompt), Message("assistant", turn.text)]
            return Conversation(row.id, system, tuple(messages))

    def turns(self, user_id: str, conversation_id: str) -> Sequence[RecordedTurn]:
        """The conversation's turns, oldest first."""
        with self._database.reading() as connection:
            row = self._conversation(connection, user_id, conversation_id)
            return [_turn(turn) for turn in self._turns(connection, user_id, row.id)]

    # Rows

    def _read(self, connection: Connection, user_id: str) -> Profile:
        check_user_id(user_id)
        rows = connection.execute(_PROFILE.where(users.c.id == user_id).order_by(*_LAYER_ORDER)).all()
        if not rows:
            raise UnknownUserError(
                f"no user '{user_id[:128]}'; add one with 'prefmw users add', or see 'prefmw users list'"
            )
        return _profile(rows)

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
        after = replace(after, revision=before.revision + 1)
        connection.execute(
            update(users)
            .where(users.c.id == before.user_id)
            .values(
                persona=after.persona,
                method=after.method,
                strengths=dict(after.strengths),
                revision=after.revision,
                updated_at=now,
            )
        )
        for layer in set(before.layers) - set(after.layers):
            connection.execute(
                delete(weights).where(
                    weights.c.user_id == before.user_id,
                    weights.c.dimension == layer.dimension,
                    weights.c.source == layer.source.name,
                )
            )
        if new := [layer for layer in after.layers if layer not in before.layers]:
            rows = [asdict(layer) | {"user_id": before.user_id, "source": layer.source.name} for layer in new]
            connection.execute(insert(weights), rows)
        self._append_revision(connection, before, after, actor, reason, now)
        return after

    @staticmethod
    def _append_revision(
        connection: Connection, before: Profile, after: Profile, actor: str, reason: str, now: datetime
    ) -> None:
        old, new = _flat(before), _flat(after)
        change = {key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
        connection.execute(
            insert(revisions).values(
                user_id=after.user_id,
                number=after.revision,
                actor=check_text(actor, "an actor")[:128],
                reason=check_reason(reason),
                change=change,
                snapshot=new | {"updated_at": {_layer_key(x): x.updated_at.isoformat() for x in after.layers}},
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


_PROFILE = select(
    users.c.id,
    users.c.persona,
    users.c.method,
    users.c.strengths,
    users.c.revision,
    weights.c.dimension,
    weights.c.source,
    weights.c.value,
    weights.c.confidence,
    weights.c.updated_at,
).join_from(users, weights, isouter=True)

_Row = Row[*tuple[Any, ...]]

_LAYER_ORDER = (weights.c.dimension, weights.c.source)


def _profile(rows: Sequence[_Row]) -> Profile:
    """One profile from its rows, one for each layer (a single row with empty layer columns where there is none)."""
    layers = [
        Weight(row.dimension, Source[row.source], row.value, row.confidence, row.updated_at)
        for row in rows
        if row.dimension is not None
    ]
    first = rows[0]
    return Profile(first.id, first.persona, first.revision, _ordered(layers), first.method, first.strengths)


def _turn(row: Row[Any]) -> RecordedTurn:
    values = dict(row._mapping)
    del values["output_tokens"]  # the number of token ids
    values["token_ids"] = tuple(row.token_ids)
    values["history"] = tuple(Message(role, content) for role, content in row.history)
    return RecordedTurn(**values)


def _ordered(layers: Iterable[Weight]) -> tuple[Weight, ...]:
    return tuple(sorted(layers, key=lambda layer: (layer.dimension, layer.source)))


def _flat(profile: Profile) -> dict[str, Any]:
    """A profile as ``{field: value}`` in JSON: ``persona``, ``method``, ``strength.METHOD``, ``weight.DIM.SOURCE``."""
    return {
        "persona": profile.persona,
        "method": profile.method,
        **{f"strength.{method}": value for method, value in profile.strengths.items()},
        **{_layer_key(layer): [layer.value, layer.confidence] for layer in profile.layers},
    }


def _layer_key(layer: Weight) -> str:
    return f"weight.{layer.dimension}.{layer.source.name}"


def _checked_method(method: str | None) -> str | None:
    return None if method is None else check_method(method)


def _merged(strengths: Mapping[str, float], changes: Mapping[str, float | None]) -> dict[str, float]:
    """The strengths after the changes, each of which is within its method's range; ``None`` forgets one."""
    for method, strength in changes.items():
        if strength is not None:
            check_strength(check_method(method), strength)
    return {method: strength for method, strength in {**strengths, **changes}.items() if strength is not None}


def _text(text: str) -> str:
    """Text that both databases hold: PostgreSQL takes no NUL, which a model may emit."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
