"""The conversation at the prompt: `prefmw chat` without a question."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from prefmw.cli.chat import heed_interrupts
from prefmw.cli.output import emit, print_profile, say
from prefmw.errors import PrefmwError, nearest
from prefmw.preferences import default_dimensions

if TYPE_CHECKING:
    from prefmw.cli.chat import Session
    from prefmw.models import ChatModel


def converse(session: Session, chat: ChatModel) -> None:
    """Read, answer, repeat, until /bye or Ctrl-D. Ctrl-C stops a reply and stays."""
    _enable_line_editing()
    plan = session.personalizer.plan(session.store.profile(session.user_id), session.options)
    strength = f" {plan.strength:g}" if plan.strength is not None else ""
    say(f"{chat.name} on {chat.device} in {chat.dtype}, method {plan.method}{strength}; /help, /bye")
    if session.history:
        say(f"continuing conversation {session.conversation_id}, {len(session.history)} messages so far")
    while True:
        heed_interrupts()
        try:
            line = input(f"{session.user_id}> ").strip()
        except EOFError:
            emit("\n")
            return
        except KeyboardInterrupt:
            emit("\n")  # an unfinished line is dropped
            continue
        if line.split()[:1] == ["/bye"]:
            return
        try:
            if line.startswith("/"):
                _command(session, line)
            elif line:
                session.ask(line)
        except KeyboardInterrupt:
            say(f"(stopped{session.fate})")
        except PrefmwError as error:
            say(f"{error}")


def _command(session: Session, line: str) -> None:
    name = line.split()[0]
    if name in _COMMANDS:
        _COMMANDS[name][0](session)
    else:
        say(f"no command {name}: {nearest(name, [*_COMMANDS, '/bye'])}")


def _help(session: Session) -> None:
    """This list"""
    for name, (_, what) in _COMMANDS.items():
        print(f"  {name:<8} {what}", file=sys.stderr)
    print("  /bye     Leave (Ctrl-D does too; Ctrl-C stops a reply)", file=sys.stderr)


def _prefs(session: Session) -> None:
    """Your persona, weights and the principle text they add up to"""
    print_profile(session.store.profile(session.user_id), default_dimensions(), file=sys.stderr)


def _clear(session: Session) -> None:
    """Begin a new conversation; the old one stays stored"""
    session.history.clear()
    session.conversation_id = None
    say("a new conversation")


_COMMANDS: dict[str, tuple[Callable[[Session], None], str]] = {
    f"/{action.__name__.lstrip('_')}": (action, (action.__doc__ or "").strip()) for action in (_help, _prefs, _clear)
}


def _enable_line_editing() -> None:
    """Arrow keys and history within the session, where readline exists; nothing is kept on disk."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it is what changes input())
