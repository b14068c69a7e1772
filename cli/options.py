"""Options that several commands share, and how a command gets its settings and store."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefmw.errors import UsageError

if TYPE_CHECKING:
    from prefmw.preferences import Dimensions, DPACard, PreferenceStore, Stated
    from prefmw.settings import Settings

DatabaseOption = Annotated[
    str | None,
    typer.Option("-d", "--database", metavar="URL", help="SQLAlchemy URL or SQLite file; by default the home's."),
]
PersRMOption = Annotated[
    str | None,
    typer.Option("--persrm", help="The PersRM that guides pad: a folder or hub id; by default the model's own."),
]
DPAOption = Annotated[
    str | None,
    typer.Option("--dpa", help="The DPA checkpoint: a folder or hub id; by default the model's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UserArgument = Annotated[str, typer.Argument(metavar="ID", help="The user's id.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, kept with the revision.")]


@contextmanager
def opened_store(database: str | None) -> Iterator[PreferenceStore]:
    """The store that flag, environment and config file name, closed afterwards."""
    from prefmw.settings import load_settings

    store = store_of(load_settings({"database": database}), is_named=database is not None)
    try:
        yield store
    finally:
        store.close()


def store_of(settings: Settings, *, is_named: bool) -> PreferenceStore:
    """The store of these settings. If this very command names it and it is a file that was not there, that is told: it
    may be a slip of the pen.
    """
    from prefmw.bootstrap import open_store
    from prefmw.cli.output import say
    from prefmw.settings import expanded

    is_new = is_named and "://" not in settings.database and not os.path.exists(expanded(settings.database))
    store = open_store(settings)
    if is_new:
        say(f"{settings.database} is a new database")
    return store


def actor() -> str:
    """Who is recorded as having made a change from this command line."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a uid without a name, as in some containers
        return "cli"


def registry() -> Dimensions:
    """The dimensions that environment and config file name, by default the shipped ones, in the words of the settings'
    chat model.
    """
    from prefmw.bootstrap import load_dimensions
    from prefmw.settings import load_settings

    return load_dimensions(load_settings())


def dpa_card() -> DPACard | None:
    """The card of the DPA checkpoint that environment and config file name, or that the settings' chat model has."""
    from prefmw.checkpoints import dpa_source, has_dpa
    from prefmw.settings import load_settings

    settings = load_settings()
    return dpa_source(settings).card if has_dpa(settings) else None


def parse_weight(item: str, dimensions: Dimensions) -> tuple[str, Stated]:
    """A dimension and its weight from ``verbosity=-0.6``.

    Raises:
        UsageError: there is no such dimension, no number, or one that the dimension does not take.
    """
    from prefmw.preferences import Stated

    name, equals, number = item.partition("=")
    dimension = dimensions.named(name.strip())
    try:
        value = float(number)
    except ValueError as error:
        got = f"'{number[:20]}'" if equals else "no '='"
        raise UsageError(f"expected {dimension.key}=NUMBER, such as {dimension.key}=-0.6, got {got}") from error
    return dimension.key, Stated(dimension.check(value))


def read_texts(path: Path, *names: str) -> list[list[str]]:
    """The texts that a file of JSON lines holds, each line an object with one under every one of ``names``.

    Raises:
        UsageError: it cannot be read, is empty, or has a line that is none; the message names the line.
    """
    import json

    from prefmw.preferences import check_text

    try:
        lines = path.read_bytes().decode().split("\n")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not valid UTF-8; re-encode it") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} is no JSON: {error}") from error
        values = [entry.get(name) if isinstance(entry, dict) else None for name in names]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        if len(texts) < len(names):
            wanted = ", ".join(f'"{name}": TEXT' for name in names)
            raise UsageError(f"line {number} is no {{{wanted}}} of texts that are not empty")
        try:
            found.append([check_text(text, f"the {name}") for name, text in zip(names, texts, strict=True)])
        except UsageError as error:
            raise UsageError(f"line {number}: {error}") from error
    if not found:
        raise UsageError(f"'{path}' is empty")
    return found
