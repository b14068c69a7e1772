"""Exceptions of SQLAlchemy and its drivers, translated into this project's; the one place that reads their texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

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

_POSTGRES = {
    "08": (StoreError, "lost the connection; try again"),
    "25006": (StoreError, "is read-only; give this role write access"),
    "28": (StoreError, "refuses this role; check user and password"),
    "3D000": (StoreError, "does not exist on that server; create it first"),
    "40": (StoreLockedError, "could not serialise this change with another; try again"),
    "42501": (StoreError, "does not allow this role to do that; grant it the rights"),
    "53100": (StoreError, "cannot grow: the disk is full; nothing of this change was written"),
    "53300": (StoreLockedError, "has no connection left; try again"),
    "55P03": (StoreLockedError, "is locked by another session; try again"),
    "57": (StoreLockedError, "stopped the statement: it took too long or the server is going down; try again"),
}
"""By SQLSTATE: a code, or the class that its codes begin with."""


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
    except JSONDecodeError as error:
        raise StoreError(f"database '{name}' holds a row that cannot be read; restore it from a backup") from error
    except SQLAlchemyError as error:
        raise StoreError(f"database '{name}': {_one_line(error)}") from error


def _from_driver(name: str, error: DBAPIError) -> StoreError:
    sqlite = getattr(error.orig, "sqlite_errorname", None)
    postgres = getattr(error.orig, "sqlstate", None)
    for code, table in ((sqlite, _SQLITE), (postgres, _POSTGRES)):
        for prefix, (kind, text) in table.items():
            if code and code.startswith(prefix):
                return kind(f"database '{name}' {text}")
    if not sqlite and not postgres and isinstance(error, OperationalError):
        return StoreError(f"database '{name}' does not answer: {_one_line(error.orig)}")
    # The server's first line alone: what follows may quote a row.
    primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return StoreError(f"database '{name}': {primary or _one_line(error.orig)}")


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200]
