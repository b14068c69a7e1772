"""`prefmw logs`: what was said, and how each reply was steered."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from prefmw.cli.options import DatabaseOption, JsonOption, UserArgument, opened_store
from prefmw.cli.output import print_json, print_table, printable, say, shorten
from prefmw.preferences import RecordedTurn

app = typer.Typer(help="What was said, and how each reply was steered.", no_args_is_help=True)


@app.command("list")
def list_conversations(user_id: UserArgument, json: JsonOption = False, database: DatabaseOption = None) -> None:
    """List a user's conversations, the latest first."""
    with opened_store(database) as store:
        entries = store.conversations(user_id)
    if json:
        print_json([asdict(entry) | {"updated_at": entry.updated_at.isoformat()} for entry in entries])
    elif entries:
        rows = [
            [entry.id, str(entry.turns), f"{entry.updated_at:%Y-%m-%d %H:%M}", shorten(entry.first_prompt)]
            for entry in entries
        ]
        print_table(["conversation", "turns", "last (UTC)", "began with"], rows)
    else:
        say(f"{user_id} has no conversation yet")


@app.command()
def show(
    user_id: UserArgument,
    conversation: Annotated[
        str, typer.Argument(metavar="[CONVERSATION]", help="Its id; the latest by default.")
    ] = "latest",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Show a conversation turn by turn, with the method, strength and revision that each reply was made with."""
    with opened_store(database) as store:
        turns = store.turns(user_id, store.conversation(user_id, conversation).id)
    if json:
        print_json([_json(turn) for turn in turns])
        return
    for turn in turns:
        strength = f" {turn.strength:g}" if turn.strength is not None else ""
        how = f"{turn.method}{strength}, revision {turn.revision}, {turn.model}, seed {turn.seed}, {turn.finish_reason}"
        print(printable(f"turn {turn.id}  {turn.created_at:%Y-%m-%d %H:%M:%S} UTC  {how}"))
        print(f"{printable(user_id)}> {printable(turn.prompt)}")
        print(f"{printable(turn.text)}\n")


def _json(turn: RecordedTurn) -> dict[str, Any]:
    return asdict(turn) | {"created_at": turn.created_at.isoformat()}
