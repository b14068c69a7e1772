"""`prefmw users export|erase|dump|load`: whole people, out of the database and into it."""

from __future__ import annotations

import json as json_
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

from prefmw.cli.options import DatabaseOption, UserArgument, actor, opened_store, registry
from prefmw.cli.output import progress, say
from prefmw.errors import UnreadablePersonError, UsageError
from prefmw.preferences import Dimensions

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file; - is the terminal's stream.")]


def export(user_id: UserArgument, database: DatabaseOption = None) -> None:
    """Print everything held about a person, as JSON."""
    with opened_store(database) as store:
        print(json_.dumps(store.export(user_id), indent=2))  # in ASCII: no terminal's encoding loses a character


def erase(
    user_id: UserArgument,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    database: DatabaseOption = None,
) -> None:
    """Remove everything held about a person; nothing brings it back."""
    with opened_store(database) as store:
        profile = store.profile(user_id)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError(f"erasing '{user_id}' cannot be undone; say --yes to do it")
            held = f"{profile.revision} revisions and {len(store.conversations(user_id))} conversations"
            typer.confirm(f"Erase {user_id}, with {held}, for good?", abort=True, err=True)
        store.erase(user_id)
    say(f"erased {user_id}")


def dump(file: FileArgument = "-", database: DatabaseOption = None) -> None:
    """Write all people, whole, as one JSON object a line; a file takes its name once it is whole."""
    with opened_store(database) as store, _written(file) as out, progress("people") as advance:
        count = 0
        for person in store.export_all():
            out.write(json_.dumps(person) + "\n")
            advance(1)
            count += 1
    say(f"wrote {count} people")


def load(
    file: FileArgument,
    existing: Annotated[
        Literal["fail", "skip", "replace"], typer.Option(help="What to do with people who are stored already.")
    ] = "fail",
    database: DatabaseOption = None,
) -> None:
    """Store the people of a file, one JSON object a line: all of them or, if a line is wrong, nobody.

    A line holds what `users export` prints, or as little as {"user": "alice", "weights": {"humor": 0.5}}.
    """
    line, dimensions = 0, registry()

    def people() -> Iterator[dict[str, Any]]:
        nonlocal line
        for line, text in enumerate(lines, start=1):  # noqa: B007  (the number is told where a line is wrong)
            if text.strip():
                yield _person(text, dimensions)
            advance(1)

    with opened_store(database) as store, _read(file) as lines, progress("lines") as advance:
        try:
            count = store.load(people(), existing=existing, actor=actor())
        except UnreadablePersonError as error:
            raise UsageError(f"line {line}: {error.text}; nobody was loaded") from error
        except UsageError as error:
            raise UsageError(f"{error}; nobody was loaded") from error
    say(f"loaded {count} people")


def _person(text: bytes, dimensions: Dimensions) -> dict[str, Any]:
    try:
        person = json_.loads(text.decode())
    except UnicodeDecodeError as error:
        raise UsageError("no UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no JSON: {error}") from error
    if not isinstance(person, dict):
        raise UsageError(f"expected a JSON object, got {type(person).__name__}")
    weights = person.get("weights", {})
    for name, value in weights.items() if isinstance(weights, dict) else ():
        if isinstance(value, int | float):  # a dump's layers may lie on dimensions that are retired since
            dimensions.named(name).check(value)
    return person


@contextmanager
def _read(file: str) -> Iterator[Iterable[bytes]]:
    """A file's lines, or stdin's."""
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        with Path(file).open("rb") as stream:
            yield stream
    except OSError as error:
        raise UsageError(f"'{file}' cannot be read: {error.strerror}") from error


@contextmanager
def _written(file: str) -> Iterator[IO[str]]:
    """A file that is there when it is whole, readable by its owner alone; or stdout."""
    if file == "-":
        yield sys.stdout
        return
    path = Path(file)
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as stream:
            try:
                yield stream
                stream.flush()
                os.replace(stream.name, path)
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        raise UsageError(f"'{file}' cannot be written: {error.strerror}") from error
