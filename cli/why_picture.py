"""Explained replies as one SVG picture, for a document: widths are fixed by the file, not by the fonts at hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from prefmw.cli.output import printable
from prefmw.cli.why import END, TOLD, Shown, colour, percent, times, token_text

if TYPE_CHECKING:
    from prefmw.explanation import Step

WIDTH, MARGIN = 900, 28
LETTER, LINE = 9.0, 27.0
"""Width of a letter of a reply and height of its lines."""

MOST_CHANGED = 4
"""Tokens of a reply whose probabilities are drawn."""

BAR = 170.0
"""The width of a whole probability."""

INK, SOFT, LINE_COLOUR, PLAIN, ALIGNED = "#1c2024", "#5d6670", "#d9dee3", "#aab2b9", "#008578"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


class _Piece(NamedTuple):
    """A token, or as much of it as stands on one line: its text, background, and place."""

    text: str
    background: str | None
    x: float
    row: int
    end: bool


def picture(shown: Sequence[Shown]) -> str:
    """The picture."""
    asked = list(dict.fromkeys(one.found.prompt for one in shown))
    parts: list[str] = []
    y = 46.0
    for line in _lines(f"“{asked[0]}”", 70) if len(asked) == 1 else ["Why these words"]:
        parts.append(_text(MARGIN, y, line, size=21, weight=600))
        y += 28
    parts.append(_legend(y))
    y += 26
    for one in shown:
        panel, y = _panel(one, y + 8, asked=len(asked) > 1)
        parts += panel
    height = math.ceil(y + 6)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Which tokens of a reply the preference changed">'
        f'<rect width="{WIDTH}" height="{height}" rx="14" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"
    )


def _panel(one: Shown, y: float, *, asked: bool) -> tuple[list[str], float]:
    parts = [f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="{LINE_COLOUR}"/>']
    y += 30
    parts.append(_text(MARGIN, y, one.profile.user_id, size=17, weight=700))
    name = 11.0 * len(one.profile.user_id) + 14
    lines = [*(_lines(f"“{one.found.prompt}”", 88) if asked else []), *_lines(one.about, 88)]
    for line in lines:
        parts.append(_text(MARGIN + name, y, line, size=15, fill=SOFT))
        y += 20
    if one.weights:
        parts.append(_text(MARGIN + name, y, one.weights, size=13, fill=ALIGNED))
        y += 20
    y += 14
    pieces = list(_laid_out(one.found.steps))
    for piece in pieces:
        top, width = y + LINE * piece.row, LETTER * len(piece.text)
        if piece.background:
            parts.append(
                f'<rect x="{piece.x - 2:.1f}" y="{top - 17:.1f}" width="{width + 4:.1f}" height="23" rx="4" '
                f'fill="{piece.background}"/>'
            )
        parts.append(
            _text(piece.x, top, piece.text, size=15, family=MONO, width=width, fill=SOFT if piece.end else INK)
        )
    y += LINE * (max((piece.row for piece in pieces), default=0) + 1)
    changed = [step for step in one.found.most_changed(MOST_CHANGED) if abs(step.said.change) >= TOLD]
    if changed:
        parts.append(_text(MARGIN + 150, y + 4, "without the preference", size=12, fill=SOFT))
        parts.append(_text(MARGIN + 150 + BAR + 75, y + 4, "with it", size=12, fill=SOFT))
        y += 12
    for step in changed:
        parts += _bars(step, y)
        y += 25
    return parts, y + 10


def _lines(text: str, width: int) -> list[str]:
    """The text on up to three lines."""
    return wrap(text, width, max_lines=3, placeholder=" …")


def _bars(step: Step, y: float) -> list[str]:
    said, favourite = step.said, step.plain_favourite
    parts = [_text(MARGIN, y + 13, token_text(said)[:15], size=14, family=MONO, weight=600)]
    for left, value, fill in (
        (MARGIN + 150, said.plain, PLAIN),
        (MARGIN + 150 + BAR + 75, said.aligned, ALIGNED),
    ):
        width = max(1.5, BAR * math.exp(value))
        parts.append(f'<rect x="{left}" y="{y + 1:.1f}" width="{BAR}" height="16" rx="3" fill="#f0f2f4"/>')
        parts.append(f'<rect x="{left}" y="{y + 1:.1f}" width="{width:.1f}" height="16" rx="3" fill="{fill}"/>')
        parts.append(_text(left + BAR + 8, y + 13, percent(value), size=13, fill=SOFT))
    place = MARGIN + 150 + 2 * (BAR + 75)
    parts.append(_text(place, y + 13, times(said.change), size=14, weight=700))
    if favourite.token != said.token:
        instead = "rather than end" if favourite.end else f"not “{token_text(favourite)[:12]}”"
        parts.append(_text(place + 62, y + 13, instead, size=13, fill=SOFT))
    return parts


def _laid_out(steps: Iterable[Step]) -> Iterator[_Piece]:
    """Tokens on lines, broken in front of a word that would stick out."""
    columns = int((WIDTH - 2 * MARGIN) / LETTER)
    column = row = 0
    for word in _words(steps):
        length = sum(len(text) for text, _, _ in word)
        if column and column + length > columns:
            column, row = 0, row + 1
        for index, (text, background, end) in enumerate(word):
            shown = text.lstrip() if index == 0 and column == 0 else text
            for at in range(0, len(shown), columns):
                line = shown[at : at + columns]
                if column + len(line) > columns:
                    column, row = 0, row + 1
                space = len(line) - len(line.lstrip())
                yield _Piece(line[space:], background, MARGIN + LETTER * (column + space), row, end)
                column += len(line)


def _words(steps: Iterable[Step]) -> Iterator[list[tuple[str, str | None, bool]]]:
    """Tokens that belong together: those that no white space parts."""
    word: list[tuple[str, str | None, bool]] = []
    for step in steps:
        text = f" {END}" if step.said.end else " ".join(f".{printable(step.said.text)}.".split())[1:-1]
        if word and text.startswith(" "):
            yield word
            word = []
        word.append((text, colour(step.said.change), step.said.end))
    if word:
        yield word


def _legend(y: float) -> str:
    parts, x = [], float(MARGIN)
    for sign, mark, label in ((1, "×", "made likelier by the preference"), (-1, "÷", "less likely")):
        for factor in (3, 10, 100):
            width = 40
            parts.append(
                f'<rect x="{x:.1f}" y="{y - 14}" width="{width}" height="19" rx="4" '
                f'fill="{colour(sign * math.log(factor))}"/>'
            )
            parts.append(_text(x + 6, y, f"{mark}{factor}", size=12))
            x += width + 4
        parts.append(_text(x + 4, y, label, size=13, fill=SOFT))
        x += 8 + 7.0 * len(label) + 24
    return "".join(parts)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    family: str = SANS,
    fill: str = INK,
    weight: int = 400,
    width: float | None = None,
) -> str:
    fixed = f' textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs"' if width else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="{escape(family)}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}"{fixed} xml:space="preserve">{escape(printable(text))}</text>'
    )
