"""What weights rest on, what was inferred from, turns that replace others, feedback and vectors.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns to users, weights and turns, and two tables."""
    op.add_column("users", sa.Column("inferred_from", sa.String(64)))
    op.add_column("weights", sa.Column("evidence", sa.JSON))
    # SQLite makes the table anew, to number its rows without ever using a number again.
    with op.batch_alter_table(
        "turns",
        table_kwargs={"sqlite_autoincrement": True},
        recreate="always" if op.get_bind().dialect.name == "sqlite" else "never",
    ) as turns:
        turns.add_column(sa.Column("replaces", sa.BigInteger))
    op.create_table(
        "feedback",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False, autoincrement=True),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("turn_id", sa.BigInteger),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("chosen", sa.Text, nullable=False),
        sa.Column("rejected", sa.Text, nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        _of_user("feedback"),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"], name="fk_feedback_turn_id", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feedback_user_id", "feedback", ["user_id"])
    op.create_index("ix_feedback_turn_id", "feedback", ["turn_id"])
    op.create_table(
        "vectors",
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("content", sa.String(64), nullable=False),
        sa.Column("numbers", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "kind", "model", name="pk_vectors"),
        _of_user("vectors"),
    )


def _of_user(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["user_id"], ["users.id"], name=f"fk_{table}_user_id", ondelete="CASCADE", onupdate="CASCADE"
    )
