"""The tables. Alembic alone makes and changes them (``migrations/``); a test holds both together.

users 1-n weights (one row per user, dimension and source), 1-n revisions (append-only), 1-n conversations 1-n turns,
1-n feedback (about a turn or about texts from elsewhere), 1-n vectors (one row per user, kind and model).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

VERSION_TABLE = "prefmw_version"
"""Where Alembic keeps the schema's revision; not its default name, which another program's database may hold."""

HEAD = "0002"
"""The schema revision that this version of prefmw works with: the newest file in ``migrations/versions``."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware point in time, stored in UTC; SQLite, which has no time zones, gets it back with its own."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC."""
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """From UTC."""
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _user_id(**options: Any) -> Column[str]:
    return Column(
        "user_id",
        String(128),
        ForeignKey("users.id", ondelete="CASCADE", onupdate="CASCADE"),
        nullable=False,
        **options,
    )


users = Table(
    "users",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("persona", Text, nullable=False),
    Column("method", String(32)),
    Column("strengths", JSON, nullable=False),  # {method: strength}
    Column("revision", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("inferred_from", String(64)),  # what the inferred layers were read from
)

weights = Table(
    "weights",
    metadata,
    _user_id(primary_key=True),
    Column("dimension", String(64), primary_key=True),
    Column("source", String(16), primary_key=True),  # a name of preferences.Source
    Column("value", Float, nullable=False),
    Column("confidence", Float, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("evidence", JSON(none_as_null=True)),  # what the weight rests on
)

revisions = Table(
    "revisions",
    metadata,
    _user_id(primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("actor", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("change", JSON, nullable=False),  # {field: [before, after]}
    Column("snapshot", JSON, nullable=False),  # the whole profile after it, layers included
    Column("created_at", UtcDateTime, nullable=False),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", String(32), primary_key=True),
    _user_id(),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Index(None, "user_id", "updated_at"),
)

turns = Table(
    "turns",
    metadata,
    # BIGINT in PostgreSQL; SQLite numbers rows by itself only where the type reads INTEGER.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _user_id(),
    Column(
        "conversation_id", String(32), ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False, index=True
    ),
    Column("system", Text, nullable=False),
    # Messages before the prompt that are no turns of the conversation, by rows.message_row; where a tool's answer comes
    # last, it is one of them, and the prompt is empty.
    Column("history", JSON, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("plan", JSON, nullable=False),
    Column("plan_hash", String(64), nullable=False),
    Column("method", String(32), nullable=False),
    Column("strength", Float),
    Column("revision", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("model_revision", String(64), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("token_ids", JSON, nullable=False),
    Column("input_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("replaces", BigInteger),  # the turn in whose place this one stands
    Index(None, "user_id"),
    sqlite_autoincrement=True,  # an id that was given out is never another turn's
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _user_id(),
    Column("turn_id", BigInteger, ForeignKey("turns.id", ondelete="CASCADE"), index=True),
    Column("kind", String(16), nullable=False),  # a name of preferences.FEEDBACK
    Column("prompt", Text, nullable=False),
    Column("chosen", Text, nullable=False),  # "" for a dislike
    Column("rejected", Text, nullable=False),  # "" for a like
    Column("scores", JSON, nullable=False),  # {dimension: [the chosen one's, the rejected one's]}
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "user_id"),
    sqlite_autoincrement=True,
)

vectors = Table(
    "vectors",
    metadata,
    _user_id(primary_key=True),
    Column("kind", String(32), primary_key=True),
    Column("model", String(255), primary_key=True),
    Column("content", String(64), nullable=False),  # a hash of what it was made from
    Column("numbers", LargeBinary, nullable=False),  # float32, little-endian
    Column("created_at", UtcDateTime, nullable=False),
)
