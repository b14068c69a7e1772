"""The conversation at the prompt: `prefmw chat` without a question."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefmw.cli.chat import heed_interrupts
from prefmw.cli.editing import edited
from prefmw.cli.options import actor, parse_weight, registry
from prefmw.cli.output import emit, print_profile, printable, say
from prefmw.errors import PrefmwError, UsageError, nearest
from prefmw.preferences import STRENGTHS, Message, Source

if TYPE_CHECKING:
    from prefmw.cli.chat import Session
    from prefmw.models import ChatModel


def converse(session: Session, chat: ChatModel) -> None:
    """Read, answer, repeat, until /bye or Ctrl-D. Ctrl-C stops a reply and stays."""
    _enable_line_editing()
    say(f"{chat.name} on {chat.device} in {chat.dtype}, {_how(session)}; /help, /bye")
    if session.history:
        say(f"continuing conversation {session.conversation_id}, {len(session.history)} messages so far")
    while True:
        heed_interrupts()
        session.latest = None
        try:
            line = input(f"{session.user_id}> ").strip()
        except EOFError:
            emit("\n")
            return
        except KeyboardInterrupt:
            emit("\n")  # an unfinished line is dropped
            continue
        except UnicodeDecodeError:
            say("that line is not valid UTF-8; set the terminal's encoding")
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
    name, _, rest = line.partition(" ")
    if name in _COMMANDS:
        _COMMANDS[name][0](session, rest.strip())
    else:
        say(f"no command {name}: {nearest(name, [*_COMMANDS, '/bye'])}")


def _help(session: Session, _: str) -> None:
    """This list"""
    for name, (_action, what) in _COMMANDS.items():
        print(f"  {name:<8} {what}", file=sys.stderr)
    print("  /bye     Leave (Ctrl-D does too; Ctrl-C stops a reply)", file=sys.stderr)


def _prefs(session: Session, _: str) -> None:
    """Your persona, weights and the principle text they add up to"""
    print_profile(session.store.profile(session.user_id), registry(), file=sys.stderr)


def _set(session: Session, rest: str) -> None:
    """Set weights, as in /set verbosity=-0.6 humor=1; /set humor=none unsets one"""
    dimensions = registry()
    if not rest:
        raise UsageError(f"which? as in /set verbosity=-0.6; dimensions: {', '.join(dimensions)}")
    changes = {}
    for item in rest.split():
        name, _, value = item.partition("=")
        unset = value == "none"
        key, stated = (dimensions.named(name).key, None) if unset else parse_weight(item, dimensions)
        changes[key] = stated
    profile = session.store.write_weights(
        session.user_id, changes, source=Source.user, actor=actor(), reason="said in a conversation"
    )
    for key in changes:
        weight = profile.weights.get(key)
        pole = dimensions[key].pole(weight.value).name if weight else ""
        say(f"{key} {weight.value:+.2f}, {pole} ({weight.source.name})" if weight else f"{key} is not set")


def _method(session: Session, rest: str) -> None:
    """Steer otherwise from here on, as in /method linear 3 or /method none"""
    if rest:
        name, _, strength = rest.partition(" ")
        try:
            options = replace(session.options, method=name, strength=float(strength) if strength else None)
        except ValueError as error:
            raise UsageError(f"a strength is a number, got '{strength[:20]}'") from error
        session.personalizer.plan(session.store.profile(session.user_id), options)  # refuses what cannot be
        session.options = options
    say(f"{_how(session)}; to keep one for good: prefmw users edit {session.user_id} --method M --strength F")


def _retry(session: Session, _: str) -> None:
    """Ask the last question again; the new reply takes the old one's place"""
    prompt, _text = _last(session)
    said, session.history[:] = session.history[-2:], session.history[:-2]
    before = len(session.history)
    try:
        session.ask(prompt, replaces=session.turn_id)
    finally:
        if len(session.history) == before:  # nothing came
            session.history += said


def _edit(session: Session, _: str) -> None:
    """Edit the last reply in $EDITOR; your wording takes its place, and is kept as feedback"""
    prompt, text = _last(session)
    changed = edited(text, "reply.txt").strip()
    if not changed or changed == text.strip():
        say("nothing was changed")
        return
    session.replace_reply(prompt, text, changed)
    say("the reply reads as you wrote it from here on")


def _multi(session: Session, _: str) -> None:
    """Write a message of several lines; a line with /end alone sends it"""
    lines = []
    try:
        while (line := input("... ")) != "/end":
            lines.append(line)
    except (EOFError, KeyboardInterrupt, UnicodeDecodeError):
        emit("\n")
        say("nothing was sent")
        return
    if text := "\n".join(lines).strip():
        session.ask(text)


def _clear(session: Session, _: str) -> None:
    """Begin a new conversation; the old one stays stored"""
    session.history.clear()
    session.conversation_id = None
    session.turn_id = None
    say("a new conversation")


def _save(session: Session, rest: str) -> None:
    """Write the conversation to a file, as in /save talk.md (or .json)"""
    if not rest:
        raise UsageError("where to? as in /save talk.md")
    try:
        file = Path(rest).expanduser()
    except RuntimeError as error:  # no such user
        raise UsageError(f"the path '{rest[:80]}' cannot be read: {error}") from error
    if file.suffix == ".json":
        text = json.dumps([vars(message) for message in session.history], ensure_ascii=False, indent=2) + "\n"
    else:
        names = {"user": session.user_id, "assistant": session.personalizer.load().name}
        text = "".join(f"**{names.get(m.role, m.role)}**\n\n{m.content}\n\n" for m in session.history)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise UsageError(f"'{file}' is there already; name another file") from error
    except OSError as error:
        raise UsageError(f"'{file}' cannot be written: {error.strerror}") from error
    say(f"{len(session.history)} messages in {printable(str(file))}")


_COMMANDS: dict[str, tuple[Callable[[Session, str], None], str]] = {
    f"/{action.__name__.lstrip('_')}": (action, (action.__doc__ or "").strip())
    for action in (_help, _prefs, _set, _method, _retry, _edit, _multi, _clear, _save)
}


def _how(session: Session) -> str:
    """How the next reply will be steered."""
    plan = session.personalizer.plan(session.store.profile(session.user_id), session.options)
    dial = STRENGTHS[plan.method]
    return f"method {plan.method}" + (f", {dial.symbol} {plan.strength:g}" if dial else "")


def _last(session: Session) -> tuple[str, str]:
    """The last question and its reply."""
    match session.history[-2:]:
        case [Message("user", prompt), Message("assistant", text)]:
            return prompt, text
    raise UsageError("nothing was answered yet")


def _enable_line_editing() -> None:
    """Arrow keys and history within the session, where readline exists; nothing is kept on disk."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it is what changes input())
