"""Connections and schema: what is particular to SQLite and PostgreSQL, and where Alembic is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from prefmw.errors import SchemaVersionError, UsageError
from prefmw.stores.errors import translated
from prefmw.stores.schema import HEAD

BUSY_TIMEOUT_MS = 5000
"""How long an SQLite write waits for another process's before it is reported as locked."""


class Database:
    """One database by URL: transactions on it, and its schema's version.

    Raises:
        UsageError: the URL cannot be read, or names a database of another kind.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url: URL = make_url(url)
        except ArgumentError as error:
            raise UsageError(
                "the database URL cannot be read; use sqlite:///FILE or postgresql+psycopg://..."
            ) from error
        self.name = self.url.render_as_string(hide_password=True)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        with translated(self.name):
            self._engine: Engine = create_engine(self.url, pool_pre_ping=not self.is_sqlite)
        if self.is_sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads."""
        with translated(self.name), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: durable when the block ends, undone if it raises.

        SQLite takes its write lock at once, so that two writers wait for each other instead of failing halfway.
        """
        with translated(self.name), self._engine.connect() as connection:
            connection = connection.execution_options(prefmw_writes=True)
            with connection.begin():
                yield connection

    def version(self) -> str | None:
        """The schema's revision, ``None`` where there is no schema or no file yet. One SELECT."""
        if (file := self._file()) and not file.exists():
            return None
        with translated(self.name):
            try:
                with self._engine.connect() as connection:
                    return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
            except DBAPIError as error:
                if _is_missing_table(error):
                    return None
                raise

    def upgrade(self) -> tuple[str | None, str]:
        """Bring the schema to this version's; returns the revision before and after.

        Raises:
            SchemaVersionError: it was made by a newer prefmw.
        """
        self._make_folder()
        before = self.version()
        if before is not None and before > HEAD:
            raise SchemaVersionError(self._newer(before))
        if before != HEAD:
            with self.writing() as connection:
                _run_migrations(connection)  # looks at the version again, under the write lock
        return before, HEAD

    def prepare(self) -> None:
        """Check the schema's version; give a fresh SQLite file its schema.

        Raises:
            SchemaVersionError: the schema is another version's, or a PostgreSQL database has none yet.
        """
        self._make_folder()
        version = self.version()
        if version == HEAD:
            return
        if version is None and self.is_sqlite and self._is_empty():
            self.upgrade()
            return
        if version is not None and version > HEAD:
            raise SchemaVersionError(self._newer(version))
        state = f"has schema {version}, this prefmw works with {HEAD}" if version else "has no prefmw schema yet"
        raise SchemaVersionError(f"database '{self.name}' {state}; run: prefmw db upgrade -d '{self.name}'")

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _newer(self, version: str) -> str:
        return f"database '{self.name}' has schema {version}, newer than this prefmw's {HEAD}; upgrade prefmw"

    def _is_empty(self) -> bool:
        with self.reading() as connection:
            tables = inspect(connection).get_table_names()
        # Another process may have made the schema since the version was read.
        return not tables or "alembic_version" in tables

    def _file(self) -> Path | None:
        """The file of an SQLite database, where it is one and the URL names it plainly."""
        database = self.url.database
        plain = self.is_sqlite and database and database != ":memory:" and not database.startswith("file:")
        return Path(database) if plain and database else None

    def _make_folder(self) -> None:
        if file := self._file():
            folder = file.parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"the database's folder '{folder}' cannot be made: {error.strerror}") from error


def _is_missing_table(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) == "42P01" or "no such table" in str(error.orig)


def _run_migrations(connection: Connection) -> None:
    from alembic import command  # a quarter of a second to import, needed once in a database's life
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "prefmw.stores:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _configure_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    """Per connection: transactions begun by us, durable write-ahead log, foreign keys, deleted data overwritten."""
    connection.isolation_level = None  # the driver would begin transactions late and commit before some statements
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA journal_mode")
    if cursor.fetchone() != ("wal",):
        cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("prefmw_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
