"""`prefmw db`: the database's schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from prefmw.cli.options import DatabaseOption, JsonOption
from prefmw.cli.output import print_json, progress
from prefmw.errors import UsageError

if TYPE_CHECKING:
    from prefmw.stores.database import Database

app = typer.Typer(help="The database's schema.", no_args_is_help=True)


@app.command()
def upgrade(json: JsonOption = False, database: DatabaseOption = None) -> None:
    """Bring the schema to this version's, keeping every row."""
    with _opened(database) as db:
        before, after = db.upgrade()
        name = db.name
    if json:
        print_json({"database": name, "before": before, "after": after})
    elif before == after:
        print(f"{name}: schema {after} already")
    else:
        print(f"{name}: schema {before or 'none'} -> {after}")


@app.command()
def current(json: JsonOption = False, database: DatabaseOption = None) -> None:
    """Print the schema's version, and the one this prefmw works with."""
    from prefmw.stores.schema import HEAD

    with _opened(database) as db:
        version = db.version()
        name = db.name
    if json:
        print_json({"database": name, "schema": version, "expected": HEAD})
    else:
        print(f"{name}: schema {version or 'none'}" + ("" if version == HEAD else f", this prefmw works with {HEAD}"))


@app.command()
def check(json: JsonOption = False, database: DatabaseOption = None) -> None:
    """Check that the database is sound: its file, its settings, and that every profile is what its history says."""
    from prefmw.settings import load_settings
    from prefmw.stores import SQLPreferenceStore

    with _opened(database) as db:
        if db.version() is None:
            raise UsageError(f"there is no prefmw database at '{db.name}'")
    store = SQLPreferenceStore(load_settings({"database": database}).database_url)
    try:
        with progress("people") as advance:
            problems = store.check(advance)
    finally:
        store.close()
    if json:
        print_json({"database": store.name, "problems": problems})
    else:
        print(*(problems or [f"{store.name}: sound"]), sep="\n")
    if problems:
        raise typer.Exit(1)


@contextmanager
def _opened(database: str | None) -> Iterator[Database]:
    from prefmw.settings import load_settings
    from prefmw.stores.database import Database

    db = Database(load_settings({"database": database}).database_url)
    try:
        yield db
    finally:
        db.close()
