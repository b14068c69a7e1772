"""`prefmw prefs`: a user's preferences, as numbers one can read and edit."""

from __future__ import annotations

from typing import Annotated

import typer

from prefmw.cli.options import DatabaseOption, JsonOption, ReasonOption, UserArgument, actor, opened_store
from prefmw.cli.output import say, show_profile
from prefmw.errors import UsageError
from prefmw.preferences import Source, Stated, default_dimensions

app = typer.Typer(help="A user's preferences: numbers one can read and edit.", no_args_is_help=True)

AsAdminOption = Annotated[
    bool, typer.Option("--as-admin", help="Write the admin's layer, which covers the user's own.")
]


@app.command()
def show(user_id: UserArgument, json: JsonOption = False, database: DatabaseOption = None) -> None:
    """Show the weights in effect, where each came from, and the principle text they add up to."""
    with opened_store(database) as store:
        profile = store.profile(user_id)
    show_profile(profile, json)


@app.command("set")
def set_weights(
    user_id: UserArgument,
    weights: Annotated[list[str], typer.Argument(metavar="DIM=WEIGHT...", help="verbosity=-0.6, say; in [-1, 1].")],
    as_admin: AsAdminOption = False,
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Set weights."""
    values = dict(_parse(item) for item in weights)
    if len(values) < len(weights):
        raise UsageError("a dimension is given twice; give each once")
    with opened_store(database) as store:
        profile = store.write_weights(user_id, values, source=_layer(as_admin), actor=actor(), reason=reason)
    show_profile(profile, json)


@app.command("unset")
def unset_weights(
    user_id: UserArgument,
    names: Annotated[list[str], typer.Argument(metavar="DIM...", help="Dimensions to unset.")],
    as_admin: AsAdminOption = False,
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Unset weights; what lay beneath, inferred or learned, is in effect again."""
    source = _layer(as_admin)
    with opened_store(database) as store:
        before = store.profile(user_id)
        known = {*default_dimensions(), *(layer.dimension for layer in before.layers)}  # a retired one can be unset
        for name in names:
            if name not in known:
                default_dimensions().named(name)
        profile = store.write_weights(user_id, dict.fromkeys(names), source=source, actor=actor(), reason=reason)
    for name in names:
        if left := profile.weights.get(name):
            say(f"{name} is now {left.value:+g}, from {left.source.name}")
        elif name not in before.weights:
            say(f"{name} was not set")
    show_profile(profile, json)


def _parse(item: str) -> tuple[str, Stated]:
    name, equals, number = item.partition("=")
    dimension = default_dimensions().named(name.strip())
    try:
        value = float(number)
    except ValueError as error:
        got = f"'{number[:20]}'" if equals else "no '='"
        raise UsageError(f"expected {dimension.key}=NUMBER, such as {dimension.key}=-0.6, got {got}") from error
    return dimension.key, Stated(dimension.check(value))


def _layer(as_admin: bool) -> Source:
    return Source.admin if as_admin else Source.user
