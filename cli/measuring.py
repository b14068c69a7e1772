"""What the `prefmw eval` commands share: checks of their options, the folder that a run is kept in, and how its result
is shown and drawn.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefmw.cli.output import print_json, print_table, say
from prefmw.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from prefmw.evaluation.runs import Run

OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Keep the run in this folder: it goes on where it was killed, and gets its figure."),
]

FIGURE = "figure.png"


def check_split(split: str) -> None:
    """Raise UsageError for what is no split to measure on."""
    if split not in ("dev", "test"):
        raise UsageError(f"a split is dev or test, got '{split[:40]}'")


def check_path(path: Path) -> None:
    """Raise for a path that no picture can be written to."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("plotting", "eval")
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise UsageError(f"{path} is no picture's path: a folder that exists, and an ending in .png, .svg or .pdf")


def opened(path: Path | None) -> Any:
    """A file to write to; ``None`` where none is named."""
    if path is None:
        return None
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def names(methods: str) -> list[str]:
    """The methods in a list joined by commas.

    Raises:
        UsageError: there is none.
    """
    found = [name.strip() for name in methods.split(",") if name.strip()]
    if not found:
        raise UsageError("name at least one method, none,prompt,linear say")
    return found


def numbers(text: str, what: str) -> list[float]:
    """The numbers in a list joined by commas.

    Raises:
        UsageError: something in it is no number, or there is none.
    """
    try:
        found = [float(one) for one in text.split(",") if one.strip()]
    except ValueError as error:
        raise UsageError(f"{what} are numbers joined by commas, got '{text[:40]}'") from error
    if not found:
        raise UsageError(f"{what} are numbers joined by commas, got none")
    return found


def finish(run: Run, json: bool, **tables: Any) -> dict[str, Any]:
    """Write a run's result and figure to its folder, where it has one, and show its tables or print its JSON."""
    from prefmw.evaluation.tables import tables_of

    result = run.result(**tables)
    if json:
        print_json(result)
    else:
        for name, table in tables_of(result).items():
            if name != "rows":
                print(name)
            print_table(table.head, table.body)
    if run.folder is not None:
        _draw(result, run.folder / FIGURE)
    return result


def _draw(result: dict[str, Any], path: Path) -> None:
    from prefmw.evaluation.plots import draw_result

    try:
        if draw_result(result, path):
            say(f"{path.parent}: result.json, {path.name}")
            return
    except MissingExtraError as error:
        say(f"no figure: {error}")
    say(f"{path.parent}: result.json")
