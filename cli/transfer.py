"""`prefmw users export|erase|dump|load`: whole people, out of the database and into it."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

from prefmw.cli.options import DatabaseOption, UserArgument, actor, opened_store
from prefmw.cli.output import print_json, progress, say
from prefmw.errors import UsageError
from prefmw.preferences import default_dimensions

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file; - is the terminal's stream.")]


def export(user_id: UserArgument, database: DatabaseOption = None) -> None:
    """Print everything held about a person, as JSON."""
    with opened_store(database) as store:
        print_json(store.export(user_id))


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
    """Write all people, whole, as one JSON object a line."""
    with opened_store(database) as store, _opened(file, "w") as out, progress("people") as advance:
        count = 0
        for profile in store.users():
            out.write(json_.dumps(store.export(profile.user_id), ensure_ascii=False) + "\n")
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
    line = 0

    def people() -> Iterator[dict[str, Any]]:
        nonlocal line
        for line, text in enumerate(lines, start=1):  # noqa: B007  (the number is told if the line is wrong)
            if text.strip():
                yield _person(text)
            advance(1)

    with opened_store(database) as store, _opened(file, "r") as lines, progress("lines") as advance:
        try:
            count = store.load(people(), existing=existing, actor=actor())
        except UnicodeDecodeError as error:
            raise UsageError(f"'{file}' is not UTF-8 after line {line}; nobody was loaded") from error
        except UsageError as error:
            raise UsageError(f"line {line}: {error}; nobody was loaded") from error
    say(f"loaded {count} people")


def _person(text: str) -> dict[str, Any]:
    try:
        person = json_.loads(text)
    except ValueError as error:
        raise UsageError(f"no JSON: {error}") from error
    if not isinstance(person, dict):
        raise UsageError(f"expected a JSON object, got {type(person).__name__}")
    weights = person.get("weights", {})
    for name, value in weights.items() if isinstance(weights, dict) else ():
        dimension = default_dimensions().named(name)
        if isinstance(value, int | float):
            dimension.check(value)
    return person


@contextmanager
def _opened(file: str, mode: Literal["r", "w"]) -> Iterator[IO[str]]:
    if file == "-":
        yield sys.stdin if mode == "r" else sys.stdout
        return
    try:
        with Path(file).open(mode, encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        raise UsageError(f"'{file}' cannot be {'read' if mode == 'r' else 'written'}: {error.strerror}") from error
