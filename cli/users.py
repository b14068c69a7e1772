"""`prefmw users`: the people whose preferences are stored."""

from __future__ import annotations

from typing import Annotated

import typer

from prefmw.cli import editing, transfer
from prefmw.cli.options import DatabaseOption, JsonOption, ReasonOption, UserArgument, actor, opened_store
from prefmw.cli.output import print_json, print_table, say, shorten, show_profile
from prefmw.errors import UsageError

app = typer.Typer(help="The people whose preferences are stored.", no_args_is_help=True)
for command in (transfer.export, transfer.erase, transfer.dump, transfer.load):
    app.command()(command)

PersonaOption = Annotated[
    str | None, typer.Option("--persona", help="The person in plain words, at most 4,000 characters.")
]
MethodOption = Annotated[str | None, typer.Option("--method", help="auto, none, prompt, linear or drift.")]
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
    chosen, strengths = _dial(None, method, strength)
    with opened_store(database) as store:
        profile = store.add_user(
            user_id, persona=persona or "", method=chosen, strengths=strengths, actor=actor(), reason=reason
        )
    if not json:
        say(f"added {user_id}")
    show_profile(profile, json)


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
    show_profile(profile, json)


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
    """Change a user's persona, method or strength; what is not given stays, an empty persona clears it.

    Without an option, on a terminal: opens the whole profile in $EDITOR as TOML, and checks it before it is saved.
    """
    from prefmw.preferences import UNCHANGED

    with opened_store(database) as store:
        before = store.profile(user_id)
        if persona is None and method is None and strength is None and not clear_strengths:
            profile = editing.edit_profile(store, before, reason)
        else:
            chosen, changes = _dial(before.method, method, strength)
            forgotten = dict.fromkeys(before.strengths) if clear_strengths else {}
            profile = store.edit_user(
                user_id,
                persona=UNCHANGED if persona is None else persona,
                method=UNCHANGED if method is None else chosen,
                strengths={**forgotten, **changes},
                actor=actor(),
                reason=reason,
            )
    if not json:
        say(f"{'changed' if profile.revision > before.revision else 'unchanged:'} {user_id}")
    show_profile(profile, json)


@app.command()
def rename(
    user_id: UserArgument,
    new_id: Annotated[str, typer.Argument(metavar="NEW", help="The id they have from now on.")],
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Give a user another id; preferences, history and conversations go along."""
    with opened_store(database) as store:
        profile = store.rename_user(user_id, new_id, actor=actor(), reason=reason)
    if not json:
        say(f"{user_id} is {new_id} now")
    show_profile(profile, json)


def _dial(
    method: str | None, new_method: str | None, new_strength: float | None
) -> tuple[str | None, dict[str, float]]:
    """The method after an edit, and the strength set for it; ``auto`` clears the method."""
    from prefmw.preferences import AUTO, check_method, check_strength

    if new_method is not None:
        method = None if check_method(new_method) == AUTO else new_method
    if new_strength is None:
        return method, {}
    if method is None:
        raise UsageError("a strength belongs to a method; say which, as in --method linear --strength 3")
    check_strength(method, new_strength)
    return method, {method: new_strength}
