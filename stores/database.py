"""Connections and schema: what is particular to SQLite and PostgreSQL, and where Alembic is called."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from prefmw.errors import SchemaVersionError, StoreError, StoreLockedError, UsageError
from prefmw.stores.errors import translated
from prefmw.stores.schema import HEAD, VERSION_TABLE

BUSY_TIMEOUT_MS = 5000
"""How long an SQLite write waits for another process's before it is reported as locked."""

_UPGRADE_LOCK = 0x70726566  # any number, the same in every prefmw: PostgreSQL upgrades wait for each other on it


def _parse(url: str) -> URL:
    """The URL, with psycopg for PostgreSQL whatever driver it names."""
    form = "use sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise UsageError(f"the database URL cannot be read; {form}") from error
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise UsageError(f"an SQLite database in memory would keep nothing; {form}")
    if kind == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise UsageError(f"no database of the kind '{kind[:40]}'; {form}")
    return parsed


class Database:
    """One database by URL: transactions on it, and its schema's version.

    Raises:
        UsageError: the URL cannot be read, or names a database of another kind.
    """

    def __init__(self, url: str) -> None:
        self.url: URL = _parse(url)
        self.name = self.url.render_as_string(hide_password=True)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._writer = threading.Lock()
        with translated(self.name):
            try:
                self._engine: Engine = create_engine(self.url, pool_pre_ping=not self.is_sqlite)
            except (ValueError, TypeError) as error:  # an option behind the URL's question mark
                raise UsageError(f"database '{self.name}' has an option that cannot be read: {error}") from error
        if self.is_sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads, all of it as of one moment."""
        with translated(self.name), self._engine.connect() as connection:
            if not self.is_sqlite:  # which reads so anyway
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: durable when the block ends, undone if it raises.

        SQLite takes its write lock at once, so that two writers wait for each other instead of failing halfway. Threads
        of one process queue for it here, since SQLite lets some of many wait until their time is up.
        """
        queue = self._writer if self.is_sqlite else nullcontext()
        with queue, translated(self.name), self._engine.connect() as connection:
            connection = connection.execution_options(prefmw_writes=True)
            with connection.begin():
                yield connection

    def version(self) -> str | None:
        """The schema's revision, ``None`` where there is no schema or no file yet. One SELECT."""
        if (file := self._file()) and not os.path.lexists(file):
            return None
        with translated(self.name):
            try:
                with self._engine.connect() as connection:
                    return str(connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one())
            except DBAPIError as error:
                if _is_missing_table(error):
                    return None
                raise

    def upgrade(self) -> tuple[str | None, str]:
        """Bring the schema to this version's; returns the revision before and after.

        Raises:
            SchemaVersionError: it was made by a newer prefmw, or the database is another program's.
        """
        self._make_file()
        before = self.version()
        if before is not None and before > HEAD:
            raise SchemaVersionError(self._newer(before))
        if before is None and self._holds_other_tables():
            raise SchemaVersionError(
                f"database '{self.name}' holds another program's tables; give prefmw one of its own"
            )
        if before != HEAD:
            with self.writing() as connection:
                if not self.is_sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
                _run_migrations(connection)  # looks at the version again, under the lock
        return before, HEAD

    def prepare(self) -> None:
        """Check the schema's version; give a fresh SQLite file its schema.

        Raises:
            SchemaVersionError: the schema is another version's, or a PostgreSQL database has none yet.
        """
        version = self.version()
        if version == HEAD:
            return
        if version is None and self.is_sqlite:
            self.upgrade()
            return
        if version is not None and version > HEAD:
            raise SchemaVersionError(self._newer(version))
        state = f"has schema {version}, this prefmw works with {HEAD}" if version else "has no prefmw schema yet"
        raise SchemaVersionError(f"database '{self.name}' {state}; run 'prefmw db upgrade' with the same database")

    def empty_log(self) -> None:
        """Move an SQLite database's write-ahead log into its file and cut it, so that what was deleted is nowhere.

        Raises:
            StoreLockedError: another process reads or writes for longer than the busy timeout.
        """
        if not self.is_sqlite:
            return
        with translated(self.name), self._engine.connect() as connection:
            busy, _, _ = (
                connection.execution_options(isolation_level="AUTOCOMMIT")
                .exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                .one()
            )
        if busy:
            raise StoreLockedError(
                f"the write-ahead log of database '{self.name}' still holds old pages, of what was erased perhaps, "
                "since another process uses it; end that one and run 'prefmw db check'"
            )

    def problems(self) -> list[str]:
        """What SQLite finds wrong with its file; PostgreSQL looks after itself."""
        if not self.is_sqlite:
            return []
        with self.reading() as connection:
            found = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check") if row[0] != "ok"]
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            found += [f"a row of {row[0]} belongs to nobody" for row in broken]
            if (mode := connection.exec_driver_sql("PRAGMA journal_mode").scalar()) != "wal":
                found.append(f"the journal's mode is {mode}, not wal")
        return [f"{self.name}: {problem}" for problem in found]

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _newer(self, version: str) -> str:
        return f"database '{self.name}' has schema {version}, newer than this prefmw's {HEAD}; upgrade prefmw"

    def _holds_other_tables(self) -> bool:
        with self.reading() as connection:
            tables = inspect(connection).get_table_names()
        # Another process may have made the schema since the version was read.
        return bool(tables) and VERSION_TABLE not in tables

    def _file(self) -> Path | None:
        """The file of an SQLite database, where it is one and the URL names it plainly."""
        database = self.url.database
        return Path(database) if self.is_sqlite and database and not database.startswith("file:") else None

    def _make_file(self) -> None:
        """Make an SQLite database's folder and file, readable by their owner alone: they hold conversations."""
        if file := self._file():
            try:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(file, os.O_CREAT | os.O_RDONLY, 0o600))
            except OSError as error:
                raise StoreError(f"the database file '{file}' cannot be made: {error.strerror}") from error


def _is_missing_table(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) == "42P01" or "no such table" in str(error.orig)


def _run_migrations(connection: Connection, to: str = HEAD) -> None:
    from alembic import command  # a quarter of a second to import, needed once in a database's life
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", "prefmw.stores:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, to)
    except CommandError as error:
        raise SchemaVersionError(f"the database's schema is not one that this prefmw knows: {error}") from error


def _configure_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    """Per connection: transactions begun by us, durable write-ahead log, foreign keys, deleted data overwritten."""
    connection.isolation_level = None  # the driver would begin transactions late and commit before some statements
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")
    cursor.execute("PRAGMA synchronous = FULL")
    if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        _switch_to_wal(cursor)
    cursor.close()


def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    """Once in a file's life. SQLite does not wait here, whatever the busy timeout, so this does."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("prefmw_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
