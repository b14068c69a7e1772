"""The conversation at the prompt: `prefmw chat` without a question."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prefmw.cli.chat import heed_interrupts
from prefmw.cli.editing import edited
from prefmw.cli.options import actor, parse_weight, registry
from prefmw.cli.output import emit, loading, print_profile, printable, say, stages
from prefmw.errors import PrefmwError, UsageError, nearest
from prefmw.preferences import STRENGTHS, Message, Source

if TYPE_CHECKING:
    from prefmw.choices import Choice
    from prefmw.cli.chat import Session
    from prefmw.models import ChatModel
    from prefmw.scoring import Scale


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
    from prefmw.bootstrap import load_dimensions

    profile = session.store.profile(session.user_id)
    method = session.personalizer.plan(profile, session.options).method
    print_profile(profile, load_dimensions(session.settings), sys.stderr, method=method)


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
    _, text = _last(session)
    changed = edited(text, "reply.txt").strip()
    if not changed or changed == text.strip():
        say("nothing was changed")
        return
    turn_id = session.turn_id
    session.replace_reply(changed)
    say("the reply reads as you wrote it from here on")
    if session.log:
        from prefmw.choices import Choice

        asked = session.context(session.history[:-1])
        _learn(session, Choice("edit", asked, changed, text, turn_id), _scale(session))


def _why(session: Session, rest: str) -> None:
    """Which words of the last reply your preference changed, and by how much; /why FILE.html draws it"""
    from prefmw.bootstrap import load_backend
    from prefmw.cli.why import Shown, picture_path, show
    from prefmw.explanation import explain, explain_turn, find_turn

    path = picture_path(Path(rest).expanduser()) if rest else None
    _last(session)  # refuses where nothing was answered
    backend, reply = load_backend(session.settings), session.last
    if reply is not None:
        asked, ended = session.context(session.history[:-1]), reply.finish_reason == "stop"
        found = explain(reply.plan, asked, reply.token_ids, ended, backend)
    elif session.turn_id is None:
        raise UsageError("this reply was not recorded, so nothing is known of how it was made")
    else:
        found = explain_turn(*find_turn(session.store, session.user_id, session.turn_id), backend)
    show([Shown(session.store.profile(session.user_id), session.turn_id, backend.chat.name, found)], path)


def _like(session: Session, _: str) -> None:
    """The last reply is as you like it: your weights learn from it"""
    _thumb(session, "like")


def _dislike(session: Session, _: str) -> None:
    """The last reply is not as you like it: your weights learn from it"""
    _thumb(session, "dislike")


def _compare(session: Session, rest: str) -> None:
    """Two answers to the last question, or to one you add; say which is better, and your weights learn from it"""
    import secrets

    from prefmw.bootstrap import load_backend, load_dimensions
    from prefmw.choices import Choice, differences, instructive_pair
    from prefmw.preferences.learning import bradley_terry

    _check_recorded(session)
    if rest:
        asked = session.context([*session.history, Message("user", rest)])
    else:
        _last(session)  # refuses where nothing was answered
        asked = session.context(session.history[:-1])
    scale = _scale(session)
    with loading("two answers"):
        one, other = instructive_pair(
            asked,
            session.store.profile(session.user_id),
            bradley_terry(differences(session.store.feedback(session.user_id), scale.dimensions)),
            load_backend(session.settings),
            load_dimensions(session.settings),
            scale,
            session.personalizer.sampling(replace(session.options, seed=secrets.randbelow(2**31))),
        )
    emit(f"[a] {one}\n\n[b] {other}\n")
    try:
        answer = input("a or b? (Enter for neither) ").strip().lower()
    except (EOFError, KeyboardInterrupt, UnicodeDecodeError):
        emit("\n")
        answer = ""
    if answer not in ("a", "b"):
        say("nothing was learned")
        return
    chosen, rejected = (one, other) if answer == "a" else (other, one)
    _learn(session, Choice("choice", asked, chosen, rejected), scale)


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
    session.turn_id = session.last = None
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
    for action in (_help, _prefs, _set, _method, _why, _retry, _edit, _like, _dislike, _compare, _multi, _clear, _save)
}


def _scale(session: Session) -> Scale:
    """What scores on this model are like, measured at the first need."""
    from prefmw.bootstrap import load_dimensions, load_scale

    dimensions = load_dimensions(session.settings)
    with stages() as tell:
        return load_scale(session.settings, dimensions, lambda share: tell("calibrating, once for this model", share))


def _check_recorded(session: Session) -> None:
    if not session.log:
        raise UsageError("nothing of this conversation is recorded (--no-log), so nothing is learned from it")


def _thumb(session: Session, kind: Literal["like", "dislike"]) -> None:
    from prefmw.choices import Choice

    _check_recorded(session)
    _, text = _last(session)
    chosen, rejected = (text, "") if kind == "like" else ("", text)
    ended = session.latest is None or session.latest.finish_reason == "stop"
    asked = session.context(session.history[:-1])
    _learn(session, Choice(kind, asked, chosen, rejected, session.turn_id, ended), _scale(session))


def _learn(session: Session, choice: Choice, scale: Scale) -> None:
    """Store what was said of replies, and tell what the weights are now."""
    from prefmw.bootstrap import load_backend, load_dimensions
    from prefmw.choices import LEAST, learn_from_choices, score_choices

    before = session.store.profile(session.user_id).revision
    backend, dimensions = load_backend(session.settings), load_dimensions(session.settings)
    (feedback,) = score_choices(session.user_id, [choice], backend, dimensions, scale)
    session.store.add_feedback(feedback)
    lesson = learn_from_choices(
        session.store, session.user_id, scale.dimensions, actor=actor(), reason="chosen in a conversation"
    )
    if lesson.learned is None:
        say(f"noted; {LEAST - lesson.choices} more and your weights learn from it")
        return
    told = [f"{key} {lesson.learned.weights[lesson.dimensions.index(key)]:+.2f}" for key in lesson.stored]
    undo = f" (undo: prefmw prefs revert {session.user_id} {before})" if told else ""
    say(f"from {lesson.choices} choices: {', '.join(told) or 'nothing sure yet'}{undo}")


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
