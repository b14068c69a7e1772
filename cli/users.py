"""`prefmw users`: the people whose preferences are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from prefmw.cli.options import DatabaseOption, JsonOption, ReasonOption, UserArgument, actor, opened_store
from prefmw.cli.output import print_json, print_profile, print_table, profile_json, say, shorten
from prefmw.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from prefmw.preferences import Profile

app = typer.Typer(help="The people whose preferences are stored.", no_args_is_help=True)

ATTEMPTS = 20
"""Tries of an edit while others write to the same user."""

PersonaOption = Annotated[
    str | None, typer.Option("--persona", help="The person in plain words, at most 4,000 characters.")
]
MethodOption = Annotated[str | None, typer.Option("--method", help="Alignment method: auto, none, prompt or linear.")]
StrengthOption = Annotated[float | None, typer.Option("--strength", help="Strength of that method.")]


@app.command()
def add(
    user_id: UserArgument,
    persona: PersonaOption = None,
    method: MethodOption = None,
    strength: StrengthOption = None,
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Add a user."""
    chosen, strengths = _dial(None, {}, method, strength)
    with opened_store(database) as store:
        profile = store.add_user(
            user_id, persona=persona or "", method=chosen, strengths=strengths, actor=actor(), reason=reason
        )
    _show(profile, json, f"added {user_id}")


@app.command("list")
def list_users(json: JsonOption = False, database: DatabaseOption = None) -> None:
    """List all users."""
    with opened_store(database) as store:
        profiles = list(store.users())
    if json:
        print_json(
            [
                {
                    "user": profile.user_id,
                    "persona": profile.persona,
                    "method": profile.method,
                    "weights": {key: weight.value for key, weight in profile.weights.items()},
                    "revision": profile.revision,
                }
                for profile in profiles
            ]
        )
    elif profiles:
        rows = [
            [
                profile.user_id,
                profile.method or "auto",
                " ".join(f"{key} {weight.value:+g}" for key, weight in profile.weights.items()),
                shorten(profile.persona),
            ]
            for profile in profiles
        ]
        print_table(["user", "method", "weights", "persona"], rows)
    else:
        say('no users yet; add one with: prefmw users add ID --persona "..."')


@app.command()
def show(user_id: UserArgument, json: JsonOption = False, database: DatabaseOption = None) -> None:
    """Show a user: persona, method, weights and the principle text they add up to."""
    with opened_store(database) as store:
        profile = store.profile(user_id)
    _show(profile, json)


@app.command()
def edit(
    user_id: UserArgument,
    persona: PersonaOption = None,
    method: MethodOption = None,
    strength: StrengthOption = None,
    clear_strengths: Annotated[
        bool, typer.Option("--clear-strengths", help="Forget the strengths set before.")
    ] = False,
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Change a user's persona, method or strength; what is not given stays, an empty persona clears it."""
    from prefmw.preferences import UNCHANGED

    if persona is None and method is None and strength is None and not clear_strengths:
        raise UsageError("nothing to change; give --persona, --method, --strength or --clear-strengths")
    with opened_store(database) as store:
        for attempt in range(ATTEMPTS):
            before = store.profile(user_id)
            kept = {} if clear_strengths else before.strengths
            chosen, strengths = _dial(before.method, kept, method, strength)
            try:
                profile = store.edit_user(
                    user_id,
                    persona=UNCHANGED if persona is None else persona,
                    method=chosen,
                    strengths=strengths,
                    actor=actor(),
                    reason=reason,
                    expected_revision=before.revision,
                )
                break
            except ConflictError:  # somebody wrote in between; what was asked holds all the same
                if attempt == ATTEMPTS - 1:
                    raise
    changed = "changed" if profile.revision > before.revision else "unchanged:"
    _show(profile, json, f"{changed} {user_id}")


def _dial(
    method: str | None, strengths: Mapping[str, float], new_method: str | None, new_strength: float | None
) -> tuple[str | None, dict[str, float]]:
    """Method and strengths after an edit; ``auto`` clears the method, a strength belongs to the method in force."""
    from prefmw.preferences import AUTO, check_method, check_strength

    after = dict(strengths)
    if new_method is not None:
        method = None if check_method(new_method) == AUTO else new_method
    if new_strength is not None:
        if method is None:
            raise UsageError("a strength belongs to a method; say which, as in --method linear --strength 3")
        check_strength(method, new_strength)
        after[method] = new_strength
    return method, after


def _show(profile: Profile, json: bool, done: str = "") -> None:
    from prefmw.preferences import default_dimensions

    if done and not json:
        say(done)
    if json:
        print_json(profile_json(profile, default_dimensions()))
    else:
        print_profile(profile, default_dimensions())
