"""`prefmw`: the commands put together, and the one place where errors meet the terminal."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from prefmw import __version__
from prefmw.cli import bench, chat, db, evaluate, logs, models, prefs, train, users, why
from prefmw.cli.output import say
from prefmw.errors import PrefmwError

app = typer.Typer(
    name="prefmw",
    help="Per-user alignment for local chat models.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)
app.command("chat")(chat.chat)
app.add_typer(users.app, name="users")
app.add_typer(prefs.app, name="prefs")
app.add_typer(logs.app, name="logs")
app.command("why")(why.why)
app.add_typer(models.app, name="models")
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.add_typer(db.app, name="db")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Per-user alignment for local chat models: preferences stored as numbers, applied to the logits at every token."""
    if version:
        print(f"prefmw {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line and exit: 0 done, 1 it failed, 2 wrong use, 128 + n ended by signal n."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        sys.exit(run())
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second one while the interpreter ends changes nothing


def _leave(number: int, frame: object) -> None:
    """End by an exception, so that a reply in the making is kept."""
    raise SystemExit(128 + number)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; every foreseeable error becomes one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character shows a question mark
    try:
        code = app(args=arguments, prog_name="prefmw", standalone_mode=False)
        sys.stdout.flush()
    except PrefmwError as error:
        say(f"prefmw: {error}")
        return error.exit_code
    except typer.TyperException as error:
        if error.format_message():
            say(f"prefmw: {error.format_message().rstrip('.')}; see --help")
        return error.exit_code
    except typer.Abort:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # where the reader left (`| head -1`) there is nobody to tell
            say(f"prefmw: the output cannot be written: {error.strerror}")
        # Give the interpreter a stdout that its last flush can't fail on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
