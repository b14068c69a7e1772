"""`prefmw eval report`: several runs on one self-contained page, or their tables in a document."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from prefmw.cli.measuring import FIGURE
from prefmw.cli.output import say
from prefmw.cli.page import page_of
from prefmw.errors import UsageError

if TYPE_CHECKING:
    from prefmw.evaluation.tables import Table

RESULT = "result.json"

STYLE = """
section { margin: 0 0 1.4rem; } .about, .how { color: var(--soft); font-size: .9rem; margin: .2rem 0 .8rem; }
figure { margin: 1rem 0 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
nav { margin: 0 0 1.2rem; } nav a { margin-right: 1rem; color: var(--accent); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--card); white-space: nowrap; }
td { white-space: nowrap; } caption { text-align: left; color: var(--soft); padding: .4rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-family: var(--mono); }
@media print { nav { display: none; } section { break-inside: avoid; } td, th { white-space: normal; } }
@media print { table { font-size: 7.5pt; } td:first-child, th:first-child { position: static; } }
"""

MARKS = re.compile(r"(<!-- table ([\w.-]+)(?: (\w+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
"""Places of a document that hold a run's table: its folder's name, and which of its tables if it has several."""


class Found(NamedTuple):
    """A finished run: its folder and result."""

    folder: Path
    result: Mapping[str, Any]


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or one that holds several.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="An .html page, by default report.html in DIR; or an .md document with marked places."
        ),
    ] = None,
) -> None:
    """Make one HTML page of several runs: tables, figures, how each came to be; or put the tables in a document."""
    path = out or folder / "report.html"
    if path.suffix not in (".html", ".md"):
        raise UsageError(f"'{path}' is neither a page (.html) nor a document (.md)")
    found = find_runs(folder)
    text = page(found) if path.suffix == ".html" else filled(_document(path), found)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}") from error
    say(f"{path}: {len(found)} {'run' if len(found) == 1 else 'runs'}")
    if path.suffix == ".md" and (left := unfilled(text, found)):
        say(f"{folder} holds no run for these places, which stay as they were: {', '.join(left)}")


def find_runs(folder: Path) -> list[Found]:
    """The finished runs in a folder and in those below it, by name.

    Raises:
        UsageError: there is none, or one is of another version or cannot be read.
    """
    from prefmw.evaluation.runs import check_format, read_json

    found = []
    for file in sorted(folder.rglob(RESULT)) if folder.is_dir() else []:
        result = read_json(file)
        check_format(file.parent, result)
        if not isinstance(result.get("settings"), dict) or not isinstance(result.get("command"), str):
            raise UsageError(f"'{file}' is no result of an evaluation; delete it and run again")
        found.append(Found(file.parent, result))
    if not found:
        raise UsageError(f"'{folder}' holds no finished run; make one with: prefmw eval steer --out DIR")
    return found


def page(found: Sequence[Found]) -> str:
    """All runs on one page that needs no other file."""
    links = "".join(f'<a href="#{index}">{escape(_title(one))}</a>' for index, one in enumerate(found))
    sections = "".join(_section(one, index) for index, one in enumerate(found))
    return page_of("Steering, measured", f"<nav>{links}</nav>{sections}", STYLE)


def filled(document: str, found: Sequence[Found]) -> str:
    """The document with the runs' tables in its marked places; those of runs that are not among them stay.

    Raises:
        UsageError: no place is marked, or one asks for a table that its run does not have.
    """
    from prefmw.evaluation.tables import tables_of

    runs = {one.folder.name: one for one in found}
    if not MARKS.search(document):
        raise UsageError("the document has no place for a table: <!-- table FOLDER --> and, below, <!-- end -->")

    def put(place: re.Match[str]) -> str:
        name, which = place[2], place[3] or "rows"
        if name not in runs:
            return place[0]
        tables = tables_of(runs[name].result)
        if which not in tables:
            raise UsageError(f"the run '{name}' has no table '{which}'; it has {', '.join(tables) or 'none'}")
        return f"{place[1]}{_markdown(tables[which])}\n{_asked(runs[name])}\n{place[5]}"

    return MARKS.sub(put, document)


def unfilled(document: str, found: Sequence[Found]) -> list[str]:
    """The names of the marked places that no run is for, each once, in their order."""
    known = {one.folder.name for one in found}
    return list(dict.fromkeys(place[2] for place in MARKS.finditer(document) if place[2] not in known))


def _document(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read as UTF-8 text; an .md document has to be there already") from error


def _title(one: Found) -> str:
    from prefmw.evaluation.tables import KINDS

    kind = KINDS.get(one.result["command"])
    name = kind.title if kind else one.result["command"].capitalize()
    return f"{name}: {one.folder.name}"


def _section(one: Found, index: int) -> str:
    from prefmw.evaluation.tables import KINDS, tables_of

    kind = KINDS.get(one.result["command"])
    tables = "".join(_table(table, name) for name, table in tables_of(one.result).items())
    settings = "\n".join(f"{name}: {_told(value)}" for name, value in one.result["settings"].items())
    return f"""<section class="card" id="{index}">
<h2>{escape(_title(one))}</h2>
<p class="about">{escape(kind.about) if kind else ""}</p>
{tables}
{_figure(one)}
<p class="how">{escape(_how(one))}</p>
<details><summary>settings</summary><pre>{escape(settings)}</pre></details>
</section>
"""


def _figure(one: Found) -> str:
    file = one.folder / FIGURE
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<figure><img alt="{escape(_title(one))}" src="data:image/png;base64,{data}"></figure>'


def _table(table: Table, name: str) -> str:
    caption = f"<caption>{escape(name)}</caption>" if name != "rows" else ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.body)
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _markdown(table: Table) -> str:
    rows = [table.head, ["---"] * len(table.head), *table.body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def _asked(one: Found) -> str:
    """What was asked for a result, in a line."""
    settings = one.result["settings"]
    names = ("model", "split", "n", "seed", "embedder", "people")
    return ", ".join(f"{name} {settings[name]}" for name in names if settings.get(name) is not None)


def _how(one: Found) -> str:
    """The same with what made it."""
    settings = one.result["settings"]
    made = f"prefmw {settings.get('versions', {}).get('prefmw', '?')} at {settings.get('git') or 'no commit'}"
    return ", ".join(filter(None, [_asked(one), made]))


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    return "–" if value is None else str(value)
