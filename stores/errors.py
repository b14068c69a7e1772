"""Exceptions of SQLAlchemy and its drivers, translated into this project's; the one place that reads their texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from prefmw.errors import MissingExtraError, PrefmwError, StoreError, StoreLockedError, UsageError

_SQLITE = {
    "SQLITE_BUSY": (StoreLockedError, "is locked by another process; try again, or end the one that writes to it"),
    "SQLITE_LOCKED": (StoreLockedError, "is locked by another process; try again, or end the one that writes to it"),
    "SQLITE_READONLY": (StoreError, "is read-only; give this user write access to the file and its folder"),
    "SQLITE_FULL": (StoreError, "cannot grow: the disk is full; nothing of this change was written"),
    "SQLITE_NOTADB": (StoreError, "is not an SQLite database; name another file"),
    "SQLITE_CORRUPT": (StoreError, "is damaged; restore it from a backup"),
    "SQLITE_CANTOPEN": (StoreError, "cannot be opened; check that its folder exists and may be written to"),
    "SQLITE_IOERR": (StoreError, "cannot be read or written: the disk reported an error"),
    "SQLITE_PERM": (StoreError, "cannot be opened: this user may not access it"),
}


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn what SQLAlchemy raises about the database ``name`` into a PrefmwError, the cause kept."""
    try:
        yield
    except PrefmwError:
        raise
    except NoSuchModuleError as error:
        raise UsageError(f"database '{name}': unknown kind; use sqlite:///FILE or postgresql+psycopg://...") from error
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("psycopg"):
            raise MissingExtraError("PostgreSQL", "postgres") from error
        raise StoreError(f"database '{name}' needs the package '{error.name}', which is not installed") from error
    except PoolTimeoutError as error:
        raise StoreLockedError(f"database '{name}': every connection is in use; try again") from error
    except DBAPIError as error:
        raise _from_driver(name, error) from error
    except SQLAlchemyError as error:
        raise StoreError(f"database '{name}': {_one_line(error)}") from error


def _from_driver(name: str, error: DBAPIError) -> StoreError:
    code = getattr(error.orig, "sqlite_errorname", None)
    if code:
        for prefix, (kind, text) in _SQLITE.items():
            if code.startswith(prefix):
                return kind(f"database '{name}' {text}")
    if isinstance(error, OperationalError) and error.connection_invalidated is False and not code:
        return StoreError(f"database '{name}' does not answer: {_one_line(error.orig)}")
    return StoreError(f"database '{name}': {_one_line(error.orig)}")


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200]
