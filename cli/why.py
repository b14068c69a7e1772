"""`prefmw why`: which tokens of a reply a person's preference changed, on the terminal or as a picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefmw.cli.options import DatabaseOption, DPAOption, JsonOption, PersRMOption, opened_store
from prefmw.cli.output import loading, print_json, print_table, printable, say
from prefmw.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from prefmw.explanation import Explanation, Likelihood
    from prefmw.preferences import Profile

TOLD = math.log(2)
"""Nats from which a change is worth showing: a token twice, or half, as likely."""

FULL = math.log(100)
"""Nats at which its colour is at its strongest."""

LIKELIER, UNLIKELIER = (0, 133, 120), (214, 106, 18)
"""Teal and orange, which the colour-blind tell apart."""

END = "■ end"
"""What stands for the token that ends a reply."""


@dataclass(frozen=True)
class Shown:
    """An explained reply, whose it is (as the profile is today), and the model that made it."""

    profile: Profile
    turn_id: int | None
    model: str
    found: Explanation

    @property
    def how(self) -> str:
        """The method, its strength and the model in a phrase."""
        plan = self.found.plan
        strength = "" if plan.strength is None else f" {plan.strength:g}"
        return f"{plan.method}{strength} on {self.model}, seed {plan.sampling.seed}"

    @property
    def about(self) -> str:
        """Who the person says to be, where the reply was steered by that; else what it was steered by."""
        persona, principle = self.profile.persona, self.found.plan.principle
        return persona if persona and persona in principle else principle or "no preference in words"

    @property
    def weights(self) -> str:
        """Their weights then, the largest first."""
        ordered = sorted(self.found.weights.items(), key=lambda item: -abs(item[1]))
        return ", ".join(f"{key} {value:+g}" for key, value in ordered)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {"user": self.profile.user_id, "turn": self.turn_id, "model": self.model, **self.found.as_json()}


def why(
    turn: Annotated[
        int | None, typer.Argument(metavar="[TURN]", help="A turn's number; the latest one by default.")
    ] = None,
    user: Annotated[
        list[str] | None, typer.Option("-u", "--user", metavar="ID", help="Whose reply; several, to compare.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="The chat model, where it goes by another name today.")
    ] = None,
    persrm: PersRMOption = None,
    dpa: DPAOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw it to this .html page or .svg picture instead.")
    ] = None,
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Show which tokens of a reply the preference changed, and by how much: aligned beside plain probabilities."""
    from prefmw.settings import load_settings

    chosen = load_settings()
    users = user or ([chosen.user] if chosen.user else [])
    if not users:
        raise UsageError("whose reply? give --user ID, or set PREFMW_USER")
    if turn is not None and len(users) > 1:
        raise UsageError("a turn is one user's; leave TURN out to see the latest of each, or name one --user")
    path = picture_path(out) if out is not None else None
    shown = []
    with opened_store(database) as store:
        from prefmw.bootstrap import load_backend
        from prefmw.explanation import explain_turn, find_turn

        for user_id in users:
            profile = store.profile(user_id)
            recorded, messages = find_turn(store, user_id, turn)
            settings = load_settings(
                {"model": model or recorded.model, "persrm": persrm, "dpa": dpa, "database": database}
            )
            with loading(settings.model):
                backend = load_backend(settings)
            found = explain_turn(recorded, messages, backend)
            shown.append(Shown(profile, recorded.id, backend.chat.name, found))
    if json:
        print_json([one.as_json() for one in shown] if len(shown) > 1 else shown[0].as_json())
        if path is None:
            return
    show(shown, path)


def picture_path(path: Path) -> Path:
    """The path, if a picture can be written there.

    Raises:
        UsageError: another ending than .html and .svg, or no such folder.
    """
    if path.suffix not in (".html", ".svg") or not path.parent.is_dir():
        raise UsageError(f"'{path}' is no picture's path: a folder that exists, and an ending in .html or .svg")
    return path


def show(shown: Sequence[Shown], path: Path | None) -> None:
    """Explained replies on stdout, or drawn to a file.

    Raises:
        UsageError: the file cannot be written.
    """
    if path is None:
        for one in shown:
            _print(one)
        return
    from prefmw.cli.why_page import page
    from prefmw.cli.why_picture import picture

    try:
        path.write_text((page if path.suffix == ".html" else picture)(shown), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}") from error
    say(f"{path}: {len(shown)} {'reply' if len(shown) == 1 else 'replies'}")


def strength_of(change: float) -> float:
    """How strongly a change is coloured, 0 to 1; 0 below a factor of two, from where on it is well to be seen."""
    if abs(change) < TOLD:
        return 0.0
    return 0.25 + 0.75 * min(1.0, (abs(change) - TOLD) / (FULL - TOLD))


def colour(change: float, paper: tuple[int, int, int] = (255, 255, 255), most: float = 0.75) -> str | None:
    """A change as a background on ``paper``, ``#rrggbb``; ``None`` where it is not worth showing."""
    share = most * strength_of(change)
    ink = LIKELIER if change > 0 else UNLIKELIER
    mixed = [round(share * one + (1 - share) * ground) for one, ground in zip(ink, paper, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed) if share else None


def times(change: float) -> str:
    """A change in nats as a factor: ``×12``, ``÷3``."""
    factor = math.exp(min(abs(change), 700.0))
    if factor < 1.05:
        return "="
    size = f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}".replace(",", " ") if factor < 1e5 else "100 000+"
    return ("×" if change > 0 else "÷") + size


def percent(log_probability: float) -> str:
    """A probability as a person reads it."""
    share = 100 * math.exp(log_probability)
    if share >= 99.95:
        return "100 %"
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %" if share >= 0.1 else "<0.1 %"


def token_text(one: Likelihood) -> str:
    """A token alone, so that its spaces and line breaks are seen."""
    return END if one.end else printable(one.text).replace("\n", "↵").strip() or "␣"


def _print(one: Shown) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    coloured = sys.stdout.isatty() and console.color_system is not None
    print(printable(f"{one.profile.user_id}, turn {one.turn_id or '–'}: {one.how}"))
    print(printable(f"preference  {one.found.plan.principle or '–'}"))
    if one.weights:
        print(f"weights     {one.weights}")
    print(printable(f"> {one.found.prompt}\n"))
    if coloured:
        console.print(_coloured(one), _legend(), sep="\n")
    else:
        print(_bracketed(one))
    print()
    rows = []
    for step in one.found.most_changed(12):
        said, favourite = step.said, step.plain_favourite
        if abs(said.change) >= TOLD:
            instead = "the same" if favourite.token == said.token else token_text(favourite)
            rows.append(
                [
                    token_text(said),
                    percent(said.plain),
                    percent(said.aligned),
                    times(said.change),
                    f"{instead} {percent(favourite.plain)}",
                ]
            )
    if rows:
        print_table(["token", "plain", "aligned", "change", "likeliest without the preference"], rows)
    elif one.found.plan.method == "none" or not (one.found.plan.principle or one.found.plan.dials):
        say("this reply was made without a preference: it is the model's own")
    else:
        say("the preference made no token of this reply twice or half as likely")


def _coloured(one: Shown) -> Text:
    from rich.text import Text

    text = Text()
    for step in one.found.steps:
        background = colour(step.said.change)
        said = f" {END} " if step.said.end else printable(step.said.text)
        text.append(said[: len(said) - len(said.lstrip())])
        text.append(said.lstrip(), style=f"#101010 on {background}" if background else "dim" if step.said.end else "")
    return text


def _bracketed(one: Shown) -> str:
    """The reply without colours: what the preference made likelier stands in [], what it made less likely in ()."""
    parts, opened = [], ""
    for step in one.found.steps:
        side = "" if abs(step.said.change) < TOLD else "[" if step.said.change > 0 else "("
        said = END if step.said.end else printable(step.said.text)
        space = said[: len(said) - len(said.lstrip())]
        if side != opened:
            parts.append({"[": "]", "(": ")", "": ""}[opened] + space + side)
            said = said[len(space) :]
        parts.append(said)
        opened = side
    return "".join(parts) + {"[": "]", "(": ")", "": ""}[opened]


def _legend() -> Text:
    from rich.text import Text

    text = Text("\n").append("by the preference  ", style="dim")
    for factor in (3, 10, 100):
        text.append(f" ×{factor} ", style=f"#101010 on {colour(math.log(factor))}").append(" ")
    text.append(" likelier   ", style="dim")
    for factor in (3, 10, 100):
        text.append(f" ÷{factor} ", style=f"#101010 on {colour(-math.log(factor))}").append(" ")
    return text.append(" less likely", style="dim")
