"""The command line as a process: pipes, signals, and a conversation on a real terminal."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest

PREFMW = [sys.executable, "-c", "from prefmw.cli.main import main; main()"]


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A model of long context, so that a reply takes seconds."""
    from tests.toymodels import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("models") / "slow", context=20_000)


@pytest.fixture
def environment(home, slow, monkeypatch) -> dict[str, str]:
    """alice is stored, the model set, and the reply of seed 1 never ends by itself."""
    subprocess.run([*PREFMW, "users", "add", "alice", "--persona", "a nurse"], check=True, capture_output=True)
    return {**os.environ, "PREFMW_MODEL": str(slow), "PREFMW_SEED": "1", "TERM": "dumb", "COLUMNS": "100"}


def turns(home: Path) -> list[tuple[str, str, int]]:
    with sqlite3.connect(home / "prefmw.db") as database:
        return database.execute("SELECT prompt, finish_reason, output_tokens FROM turns ORDER BY id").fetchall()


def start(environment, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*PREFMW, "chat", "Count.", "-u", "alice", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_reader_that_leaves_ends_the_reply_without_a_word(environment, home):
    process = start(environment, "--max-tokens", "15000")
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    with process.stderr as err:
        assert err.read() == b""
    ((_, reason, tokens),) = turns(home)
    assert (reason, 0 < tokens < 15000) == ("interrupted", True)


def test_ctrl_c_keeps_the_partial_reply(environment, home):
    process = start(environment, "--max-tokens", "15000")
    seen = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip() == "prefmw: interrupted; the reply so far is kept, marked so"
    ((_, reason, tokens),) = turns(home)
    assert (reason, 0 < tokens < 15000) == ("interrupted", True)
    with sqlite3.connect(home / "prefmw.db") as database:
        text = database.execute("SELECT text FROM turns").fetchone()[0]
    assert text.encode().startswith((seen + rest)[:50])


ANNOUNCING = """
import sys
from prefmw.decoding import Engine
submit = Engine.submit
def announced(self, request):
    print("begun", file=sys.stderr, flush=True)
    return submit(self, request)
Engine.submit = announced
from prefmw.cli.main import main
main()
"""


@pytest.mark.parametrize("how", ["--json", "--no-stream"])
def test_ctrl_c_prints_what_was_not_shown_yet(environment, home, how):
    command = [sys.executable, "-c", ANNOUNCING, "chat", "Count.", "-u", "alice", "--max-tokens", "15000", how]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr.readline() == b"begun\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    ((_, reason, tokens),) = turns(home)
    assert (process.returncode, reason) == (130, "interrupted")
    assert 0 < tokens < 15000
    assert len(out) > 10
    if how == "--json":
        reply = json.loads(out)
        assert (reply["finish_reason"], reply["usage"]["output_tokens"]) == ("interrupted", tokens)


def test_an_interrupted_turn_that_cannot_be_recorded_says_so(environment, home):
    process = start(environment, "--max-tokens", "15000")
    assert process.stdout.read(20)
    other = sqlite3.connect(home / "prefmw.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    other.close()
    assert process.returncode == 130
    assert b"this turn was not recorded: database" in err
    assert b"kept" not in err


def test_a_second_ctrl_c_does_not_lose_the_reply(environment, home):
    process = start(environment, "--max-tokens", "15000")
    assert process.stdout.read(20)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.003)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip() == "prefmw: interrupted; the reply so far is kept, marked so"
    assert [turn[1] for turn in turns(home)] == ["interrupted"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["terminate", "hang up"])
def test_a_signal_to_end_keeps_the_partial_reply(environment, home, number):
    process = start(environment, "--max-tokens", "15000")
    assert process.stdout.read(20)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, b"Traceback" in err) == (128 + number, False)
    assert [turn[1] for turn in turns(home)] == ["interrupted"]


@pytest.mark.parametrize(
    "command", [["users", "list"], ["users", "show", "alice"], ["--version"], ["--help"]], ids=" ".join
)
def test_an_output_that_cannot_be_written_is_one_line(environment, command):
    with open("/dev/full", "w") as full:
        result = subprocess.run([*PREFMW, *command], env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "prefmw: the output cannot be written: No space left on device\n"


def test_streams_that_are_closed_are_no_traceback(environment):
    script = 'exec "$@" {} '
    for closing, code in ((">&-", 0), ("2>&-", 0), ("<&-", 0)):
        line = script.format(closing)
        command = ["sh", "-c", line, "sh", *PREFMW, "users", "show", "alice"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (code, "")
    chat = ["sh", "-c", script.format("<&-"), "sh", *PREFMW, "chat", "-u", "alice"]
    result = subprocess.run(chat, env=environment, capture_output=True, text=True)
    assert (result.returncode, "nothing to answer" in result.stderr) == (2, True)


def test_tokens_come_before_the_reply_is_done(environment):
    process = start(environment, "--max-tokens", "3000")
    assert process.stdout.read(1)
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.fixture
def terminal(environment):
    def spawn(*arguments: str, user: str = "alice") -> pexpect.spawn:
        command = [*PREFMW, "chat", "-u", user, "--max-tokens", "12", *arguments]
        return pexpect.spawn(
            command[0], command[1:], env=environment, timeout=60, encoding="utf-8", dimensions=(40, 200)
        )

    return spawn


def leave(child: pexpect.spawn) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def test_a_conversation_on_a_terminal(terminal, home):
    child = terminal()
    child.expect("method linear, ratio 2; /help")
    child.expect("alice> ")
    child.sendline("Hello.")
    child.expect("alice> ")
    child.sendline("And then?")
    child.expect("alice> ")
    child.sendline("/prefs")
    child.expect("persona +a nurse")
    child.expect("alice> ")
    child.sendline("/help")
    child.expect("/clear +Begin a new conversation")
    child.sendline("/claer")
    child.expect("did you mean '/clear'")
    child.sendline("/clear")
    child.expect("a new conversation")
    child.expect("alice> ")
    child.sendline("Again.")
    child.expect("alice> ")
    child.sendline("/bye")
    assert leave(child) == 0
    assert [turn[0] for turn in turns(home)] == ["Hello.", "And then?", "Again."]
    with sqlite3.connect(home / "prefmw.db") as database:
        assert database.execute("SELECT count(*) FROM conversations").fetchone() == (2,)


def test_preferences_and_method_are_changed_in_a_conversation(terminal, home):
    child = terminal()
    child.expect("alice> ")
    child.sendline("/set humour=1")
    child.expect("did you mean 'humor'")
    child.sendline("/set humor=2")
    child.expect(r"lies in \[-1, 1\]")
    child.sendline("/set humor=1 verbosity=-0.5")
    child.expect(r"humor \+1.00, humorous \(user\)")
    child.expect(r"verbosity -0.50, concise \(user\)")
    child.sendline("/set humor=none")
    child.expect("humor is not set")
    child.sendline("/method linear 99")
    child.expect(r"lies in \[0, 10\]")
    child.sendline("/method prompt")
    child.expect("method prompt; to keep one for good")
    child.sendline("Hello.")
    child.expect("alice> ")
    child.sendline("/bye")
    assert leave(child) == 0
    with sqlite3.connect(home / "prefmw.db") as database:
        assert database.execute("SELECT method FROM turns").fetchall() == [("prompt",)]


def test_weights_learn_from_thumbs_and_comparisons(terminal, home, slow, calibrated):
    calibrated(slow, home)
    child = terminal()
    child.expect("alice> ")
    child.sendline("/like")
    child.expect("nothing was answered yet")
    child.sendline("Hello.")
    child.expect("alice> ")
    child.sendline("/like")
    child.expect("noted; 2 more")
    child.sendline("/compare")
    child.expect(r"\[a\] ")
    child.expect(r"\[b\] ")
    child.expect("a or b")
    child.sendline("")
    child.expect("nothing was learned")
    child.sendline("/compare How long should a nap be?")
    child.expect("a or b")
    child.sendline("b")
    child.expect("noted; 1 more")
    child.sendline("/dislike")
    child.expect("noted; 1 more")  # of two thumbs for a reply the later one counts
    child.sendline("/compare")
    child.expect("a or b")
    child.sendline("a")
    child.expect("from 3 choices: ")
    child.sendline("/bye")
    assert leave(child) == 0
    with sqlite3.connect(home / "prefmw.db") as database:
        assert database.execute("SELECT kind FROM feedback ORDER BY id").fetchall() == [
            ("like",),
            ("choice",),
            ("dislike",),
            ("choice",),
        ]


def test_nothing_is_learned_where_nothing_is_recorded(terminal, home):
    child = terminal("--no-log")
    child.expect("alice> ")
    child.sendline("Hello.")
    child.expect("alice> ")
    for command in ("/like", "/dislike", "/compare"):
        child.sendline(command)
        child.expect("nothing is learned from it")
    child.sendline("/bye")
    assert leave(child) == 0


def test_a_reply_is_asked_for_again_and_edited(terminal, environment, home, tmp_path, slow, calibrated):
    calibrated(slow, home)
    environment["EDITOR"] = f"{sys.executable} -c \"import sys; open(sys.argv[1], 'w').write('mine')\""
    environment.pop("VISUAL", None)
    child = terminal()
    child.expect("alice> ")
    child.sendline("/retry")
    child.expect("nothing was answered yet")
    child.sendline("Hello.")
    child.expect("alice> ")
    child.sendline("/retry")
    child.expect("alice> ")
    child.sendline("/edit")
    child.expect("reads as you wrote it")
    child.sendline("/multi")
    child.expect(r"\.\.\. ")
    child.sendline("two")
    child.sendline("lines")
    child.sendline("/end")
    child.expect("alice> ")
    child.sendline(f"/save {tmp_path}/talk.md")
    child.expect("4 messages in")
    child.sendline(f"/save {tmp_path}/talk.md")
    child.expect("is there already")
    child.sendline("/bye")
    assert leave(child) == 0
    assert "**alice**\n\nHello.\n\n" in (tmp_path / "talk.md").read_text()
    with sqlite3.connect(home / "prefmw.db") as database:
        rows = database.execute("SELECT id, prompt, text, replaces FROM turns ORDER BY id").fetchall()
        assert database.execute("SELECT kind, chosen, rejected FROM feedback").fetchall() == [
            ("edit", "mine", rows[1][2])
        ]
    assert [(row[1], row[3]) for row in rows] == [
        ("Hello.", None),
        ("Hello.", rows[0][0]),
        ("Hello.", rows[1][0]),
        ("two\nlines", None),
    ]
    assert rows[2][2] == "mine"


def test_a_retry_in_a_conversation_taken_up_again_replaces_its_last_turn(terminal, home):
    child = terminal()
    child.expect("alice> ")
    child.sendline("Hello.")
    child.expect("alice> ")
    child.sendline("/bye")
    assert leave(child) == 0
    child = terminal("-c")
    child.expect("2 messages so far")
    child.sendline("/retry")
    child.expect("alice> ")
    child.expect("alice> ")
    child.sendline("/bye")
    assert leave(child) == 0
    with sqlite3.connect(home / "prefmw.db") as database:
        (first, none), (_, replaced) = database.execute("SELECT id, replaces FROM turns ORDER BY id").fetchall()
    assert (none, replaced) == (None, first)


def test_ctrl_c_stops_a_reply_and_ctrl_d_leaves(terminal, home):
    child = terminal("--max-tokens", "15000")
    child.expect("alice> ")
    child.sendline("Hello.")
    child.expect("Hello.\r\n")
    time.sleep(1)
    child.sendintr()
    child.expect("stopped; the reply so far is kept, marked so")
    child.expect("alice> ")
    child.sendintr()  # at the prompt it drops the line and stays
    child.expect("alice> ")
    child.sendeof()
    assert leave(child) == 0
    assert turns(home)[0][1] == "interrupted"


def test_a_mistake_in_a_conversation_is_told_and_it_goes_on(terminal, toy):
    child = terminal("-m", str(toy))
    child.expect("alice> ")
    child.sendline("   ")
    child.expect("alice> ")
    child.sendline("word " * 700)
    child.expect("beyond the 512")
    child.expect("alice> ")
    child.sendline("Hello.")
    child.expect("alice> ")
    child.sendline("/bye")
    assert leave(child) == 0


def test_a_user_who_is_new_on_a_terminal_is_created(terminal, environment, home):
    child = terminal(user="bob")
    child.expect("bob is new here")
    child.sendline("a cook who likes it brief")
    child.expect("bob> ")
    child.sendline("/prefs")
    child.expect("a cook who likes it brief")
    child.sendline("/bye")
    assert leave(child) == 0


def test_a_wrong_option_is_told_before_a_conversation_begins(terminal):
    child = terminal("--method", "liner")
    child.expect("did you mean 'linear'")
    assert leave(child) == 2


def test_a_conversation_cannot_print_json(terminal):
    child = terminal("--json")
    child.expect("--json answers one question")
    assert leave(child) == 2


def test_why_explains_the_last_reply_of_a_conversation(terminal, tmp_path):
    child = terminal("--method", "linear")
    child.expect("alice> ")
    child.sendline("/why")
    child.expect("nothing was answered yet")
    child.sendline("Count.")
    child.expect("alice> ")
    child.sendline("/why")
    child.expect(r"alice, turn 1: linear 2 on")
    child.expect("alice> ")
    child.sendline(f"/why {tmp_path}/why.html")
    child.expect("1 reply")
    child.sendline("/bye")
    assert leave(child) == 0
    assert "tabindex" in (tmp_path / "why.html").read_text()


def test_why_needs_no_record(terminal, home):
    child = terminal("--method", "linear", "--no-log")
    child.expect("alice> ")
    child.sendline("Count.")
    child.expect("alice> ")
    child.sendline("/why")
    child.expect(r"alice, turn –: linear 2 on")
    child.sendline("/why talk.gif")
    child.expect(r"an ending in .html or .svg")
    child.sendline("/bye")
    assert leave(child) == 0
    assert turns(home) == []
