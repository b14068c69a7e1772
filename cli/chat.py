"""`prefmw chat`: one question answered, or a conversation at the prompt, as a user's preferences say."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated

import typer

from prefmw.cli.options import DatabaseOption, DPAOption, PersRMOption, actor, store_of
from prefmw.cli.output import emit, loading, print_json, say
from prefmw.errors import PrefmwError, UnknownUserError, UsageError

if TYPE_CHECKING:
    from prefmw.personalizer import Personalizer
    from prefmw.plans import Options
    from prefmw.preferences import Message, PreferenceStore, Profile
    from prefmw.reply import Reply
    from prefmw.settings import Settings


@dataclass
class Session:
    """A user talking to a model: what every turn of one `prefmw chat` shares."""

    user_id: str
    personalizer: Personalizer
    store: PreferenceStore
    options: Options
    system: str
    history: list[Message]
    conversation_id: str | None
    log: bool
    settings: Settings
    streams: bool = True
    latest: Reply | None = None
    """The latest reply, whole or not."""
    last: Reply | None = None
    """The reply that the history ends with, as the model said it; ``None`` where that was before this session."""
    turn_id: int | None = None
    """The turn that the history's last reply was recorded as, where it was."""
    checkpoints: tuple[tuple[str, str], ...] = ()
    """Checkpoints that were named: by which flag, and the method that reads them."""

    def ask(self, prompt: str, *, show: bool = True, replaces: int | None = None) -> Reply:
        """Answer one message, streaming it to stdout if it is to be shown, and remember the exchange."""
        from prefmw.preferences import Message

        asked = Message("user", prompt)
        stream = self.personalizer.stream(
            self.user_id,
            [*self.context(self.history), asked],
            self.options,
            conversation_id=self.conversation_id,
            replaces=replaces,
            log=self.log,
        )
        shown = False
        try:
            with _one_interrupt(), stream:
                for piece in stream:
                    if show and self.streams:
                        emit(piece)
                        shown = True
            if show:
                emit("\n" if self.streams else stream.reply.text + "\n")
        except (KeyboardInterrupt, PrefmwError):
            if shown:
                print(file=sys.stderr)  # what is said next begins a line
            raise
        finally:
            self.latest = reply = self._noted(stream.reply)
            if reply.text:
                self.history += [asked, Message("assistant", reply.text)]
                self.turn_id, self.last = reply.turn_id, reply
            self.conversation_id = reply.conversation_id
            if reply.not_recorded:
                say(f"prefmw: this turn was not recorded: {reply.not_recorded}")
        for notice in reply.notices:
            say(f"note: {notice}")
        return reply

    def _noted(self, reply: Reply) -> Reply:
        """The reply with a notice of each checkpoint that was named for it and not read."""
        from prefmw.plans import not_read

        method = reply.plan.method
        notices = [not_read(flag, reader, method) for flag, reader in self.checkpoints if reader != method]
        return replace(reply, notices=(*reply.notices, *notices))

    def context(self, history: Sequence[Message]) -> list[Message]:
        """The system prompt, where there is one, in front of ``history``."""
        from prefmw.preferences import Message

        return [*([Message("system", self.system)] if self.system else []), *history]

    def replace_reply(self, edited: str) -> None:
        """Let the person's own wording stand in place of the last reply, in what is recorded as well."""
        from prefmw.preferences import Message, Turn

        if self.log and self.conversation_id is not None and self.turn_id is not None:
            turns = self.store.turns(self.user_id, self.conversation_id)
            turn = next(turn for turn in turns if turn.id == self.turn_id)
            values = {field.name: getattr(turn, field.name) for field in fields(Turn)}
            changes = {"text": edited, "finish_reason": "edited", "token_ids": (), "history": (), "replaces": turn.id}
            recorded = self.store.record(Turn(**values | changes))
            self.turn_id = recorded.turn_id
        self.history[-1] = Message("assistant", edited)
        self.last = None

    @property
    def fate(self) -> str:
        """What became of a reply that was broken off."""
        return "; the reply so far is kept, marked so" if self.latest and self.latest.turn_id else ""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The question; without one, a conversation.")
    ] = None,
    user: Annotated[str | None, typer.Option("-u", "--user", metavar="ID", help="Whose preferences apply.")] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Chat model: a folder, a hub id or an embedded model.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="auto, none, prompt, linear, drift, pad or dpa.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help="How far to steer; linear: ratio in 0..10, 2 by default; drift: gain in 0..5, 1; pad: beta, 0..3, 1.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("-s", "--system", help="System prompt.")] = None,
    continue_: Annotated[bool, typer.Option("-c", "--continue", help="Continue the latest conversation.")] = False,
    conversation: Annotated[
        str | None, typer.Option("--conversation", metavar="ID", help="Continue this conversation.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Nucleus of the candidate rule, in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Most candidates a token is drawn from.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Tokens of the reply, at most.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same reply.")] = None,
    persrm: PersRMOption = None,
    candidate: Annotated[
        str | None, typer.Option("--candidate", help="How pad picks: greedy, stochastic or best-of-k.")
    ] = None,
    dpa: DPAOption = None,
    robust: Annotated[
        int | None, typer.Option("--robust", help="Under dpa, the best of this many replies asked for around you.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all that was applied.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the reply when it is whole.")] = False,
    learn: Annotated[
        bool | None, typer.Option("--learn/--no-learn", help="Take preferences you state in messages as yours.")
    ] = None,
    no_log: Annotated[bool, typer.Option("-n", "--no-log", help="Record nothing.")] = False,
    database: DatabaseOption = None,
) -> None:
    """Ask a chat model, steered by a user's preferences. Without PROMPT on a terminal: a conversation.

    Piped text is read too, and put behind PROMPT. The reply goes to stdout, everything else to stderr.
    """
    from prefmw.bootstrap import build_personalizer, close_engines
    from prefmw.embedded import find_embedded
    from prefmw.preferences import check_user_id
    from prefmw.settings import load_settings

    if continue_ and conversation:
        raise UsageError("-c continues the latest conversation, --conversation another; give one of them")
    flags = {"user": user, "model": model, "database": database, "learn": learn, "persrm": persrm}
    flags["dpa"] = dpa
    flags["log"] = False if no_log else None
    settings = load_settings(flags)
    find_embedded(settings.model)  # before anybody is asked anything
    if settings.user is None:
        raise UsageError("whose preferences? give --user ID, or set PREFMW_USER")
    question = _question(prompt)
    if question is None and json:
        raise UsageError("--json answers one question; give a PROMPT or pipe one in")

    check_user_id(settings.user)
    store = store_of(settings, is_named=database is not None)
    try:
        profile = _known_or_new(store, settings.user)
        with loading(settings.model):
            from prefmw.plans import Options

            options = Options(
                method, strength, temperature, top_p, top_k, max_tokens, seed, candidate=candidate, robust=robust
            )
            personalizer = build_personalizer(settings, store)
            personalizer.plan(profile, options)  # a wrong flag is told before the weights load
            earlier = None
            if continue_ or conversation:
                earlier = store.conversation(settings.user, conversation or "latest")
            chat_model = personalizer.load()
        session = Session(
            user_id=settings.user,
            personalizer=personalizer,
            store=store,
            options=options,
            system=system if system is not None else (earlier.system if earlier else ""),
            history=list(earlier.messages) if earlier else [],
            conversation_id=earlier.id if earlier else None,
            turn_id=earlier.last_turn if earlier else None,
            log=settings.log,
            settings=settings,
            streams=not no_stream,
            checkpoints=tuple((f"--{name}", of) for name, of in (("persrm", "pad"), ("dpa", "dpa")) if flags[name]),
        )
        if question is None:
            from prefmw.cli.repl import converse

            converse(session, chat_model)
            return
        _answer(session, question, json)
    finally:
        store.close()
        close_engines()


def _answer(session: Session, question: str, json: bool) -> None:
    try:
        reply = session.ask(question, show=not json)
    except KeyboardInterrupt:
        if json and session.latest:
            print_json(session.latest.as_json())
        elif not session.streams and session.latest:
            emit(session.latest.text + "\n")
        say(f"prefmw: interrupted{session.fate}")
        raise typer.Exit(130) from None
    if json:
        print_json(reply.as_json())
    if reply.not_recorded:
        raise typer.Exit(1)


def _question(prompt: str | None) -> str | None:
    """PROMPT and piped text joined; ``None`` where a person sits at the terminal and has not asked yet."""
    piped = ""
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            piped = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise UsageError("the piped text is not valid UTF-8; re-encode it") from error
    elif prompt is None:
        return None
    question = "\n\n".join(part for part in ((prompt or "").strip(), piped) if part)
    if not question:
        raise UsageError("there is nothing to answer; give a PROMPT or pipe one in")
    return question


def _known_or_new(store: PreferenceStore, user_id: str) -> Profile:
    """The user; on a terminal an unknown one is created, and offered one line to describe themselves."""
    try:
        return store.profile(user_id)
    except UnknownUserError:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
    say(f"{user_id} is new here. In one line, who are you and how do you like your answers? (Enter to skip)")
    try:
        persona = _ask_line("> ")
    except (EOFError, KeyboardInterrupt):
        raise typer.Exit(130) from None
    try:
        return store.add_user(user_id, persona=persona, actor=actor(), reason="first chat")
    except UsageError as error:
        profile = store.add_user(user_id, actor=actor(), reason="first chat")
        say(f"{error}; {user_id} is stored without one, add it with: prefmw users edit {user_id} --persona '...'")
        return profile


def _ask_line(prompt: str) -> str:
    """A line from the terminal, asked for on stderr."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """The first Ctrl-C stops the reply; until :func:`heed_interrupts`, no further one keeps it from being recorded."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    yield
    heed_interrupts()


def heed_interrupts() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
