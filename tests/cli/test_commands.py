"""Every command, in process: what it prints, what it stores, and one line for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from prefmw.cli.main import app

PERSONA = "I'm a nurse on night shifts; keep it short"
QUESTION = "How do I fall asleep faster?"


@pytest.fixture
def ok(prefmw):
    """Run a command that must succeed; give back its JSON."""

    def call(*arguments: str):
        code, out, err = prefmw(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.fixture
def alice(ok):
    return ok("users", "add", "alice", "--persona", PERSONA)


@pytest.fixture
def chat(ok, toy, alice):
    def call(*arguments: str):
        return ok("chat", QUESTION, "-u", "alice", "-m", str(toy), "--max-tokens", "24", *arguments)

    return call


# Users and preferences


def test_users_are_added_shown_edited_and_listed(ok, alice):
    assert (alice["user"], alice["persona"], alice["revision"], alice["method"]) == ("alice", PERSONA, 1, None)
    edited = ok("users", "edit", "alice", "--method", "linear", "--strength", "3", "--persona", "")
    assert (edited["persona"], edited["method"], edited["strengths"]["linear"]) == ("", "linear", 3.0)
    assert ok("users", "edit", "alice", "--method", "auto")["method"] is None
    assert ok("users", "show", "alice")["revision"] == 3
    ok("users", "add", "bob")
    assert [user["user"] for user in ok("users", "list")] == ["alice", "bob"]


def test_a_strength_can_be_forgotten(ok, alice):
    ok("users", "edit", "alice", "--method", "linear", "--strength", "3")
    assert ok("users", "edit", "alice", "--clear-strengths")["strengths"]["linear"] is None


def test_edits_at_once_all_hold(ok, alice, monkeypatch):
    from prefmw.stores import SQLPreferenceStore

    original, meanwhile = SQLPreferenceStore.edit_user, []

    def interfering(self, user_id, **changes):
        while len(meanwhile) < 3:
            meanwhile.append(original(self, user_id, persona=f"other {len(meanwhile)}", actor="other"))
        return original(self, user_id, **changes)

    monkeypatch.setattr(SQLPreferenceStore, "edit_user", interfering)
    edited = ok("users", "edit", "alice", "--method", "linear")
    assert (edited["method"], edited["persona"]) == ("linear", "other 2")


def test_an_edit_of_nothing_new_says_so(prefmw, alice):
    assert "unchanged" in prefmw("users", "edit", "alice", "--persona", PERSONA)[2]


def test_weights_are_set_shown_and_unset(ok, alice):
    shown = ok("prefs", "set", "alice", "verbosity=-0.6", "humor=1")
    assert shown["weights"] == {
        "verbosity": {"value": -0.6, "source": "user", "confidence": 1.0},
        "humor": {"value": 1.0, "source": "user", "confidence": 1.0},
    }
    assert shown["principle"].endswith("Be funny and add a joke or two. Keep the answer short and to the point.")
    assert set(shown) == {
        *("user", "persona", "revision", "weights", "principle", "dials", "method", "strengths", "direction")
    }
    assert shown == ok("prefs", "show", "alice")
    assert set(ok("prefs", "unset", "alice", "humor")["weights"]) == {"verbosity"}


def test_an_admin_s_weight_covers_the_user_s(ok, prefmw, alice):
    ok("prefs", "set", "alice", "humor=1")
    assert ok("prefs", "set", "alice", "humor=-1", "--as-admin")["weights"]["humor"]["source"] == "admin"
    code, out, err = prefmw("prefs", "unset", "alice", "humor", "--as-admin")
    assert (code, err) == (0, "humor is now +1, from user\n")


def test_a_person_reads_weights_as_bars(prefmw, ok, alice):
    ok("prefs", "set", "alice", "verbosity=-0.6")
    ok("prefs", "set", "alice", "verbosity=0.3", "--as-admin")
    _, out, _ = prefmw("prefs", "show", "alice")
    assert re.search(r"verbosity +\+0\.30  ··········\|███·······  detailed +admin \(over user -0\.60\)", out)


def test_revisions_say_who_and_why(ok, alice):
    from prefmw.bootstrap import open_store
    from prefmw.settings import load_settings

    ok("prefs", "set", "alice", "humor=1", "--reason", "asked for jokes")
    store = open_store(load_settings())
    _, last = store.revisions("alice")
    store.close()
    assert last.actor.startswith("cli")
    assert last.reason == "asked for jokes"


def test_no_stored_text_drives_the_terminal(prefmw, ok):
    ok("users", "add", "eve", "--persona", "\x1b[2J\x1b]0;owned\x07[bold]x[/bold]")
    for command in (["users", "list"], ["users", "show", "eve"]):
        _, out, _ = prefmw(*command)
        assert "\x1b" not in out
        assert "[bold]x[/bold]" in out


def test_an_empty_list_says_what_to_do(prefmw):
    assert prefmw("users", "list") == (0, "", 'no users yet; add one with: prefmw users add ID --persona "..."\n')


def test_a_database_by_flag_is_another_database(ok, prefmw, tmp_path):
    other = str(tmp_path / "other.db")
    assert prefmw("users", "add", "bob", "-d", other)[2] == f"{other} is a new database\nadded bob\n"
    assert ok("users", "show", "bob", "-d", other)["user"] == "bob"
    assert prefmw("users", "show", "bob")[0] == 2
    assert ok("users", "list", "-d", f"sqlite:///{tmp_path}/other.db")[0]["user"] == "bob"


def test_the_schema_is_upgraded_and_told(ok, home):
    assert ok("db", "current") == {"database": f"sqlite:///{home}/prefmw.db", "schema": None, "expected": "0002"}
    assert ok("db", "upgrade")["before"] is None
    assert ok("db", "upgrade")["before"] == "0002"
    assert ok("db", "current")["schema"] == "0002"


def test_models_at_hand_are_listed(ok, monkeypatch, toy, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    (tiny,) = ok("models", "list")
    assert (tiny["name"], tiny["kind"], tiny["default"]) == ("tiny", "embedded", True)
    monkeypatch.setenv("PREFMW_MODEL", str(toy))
    _, mine = ok("models", "list")
    assert (mine["name"], mine["kind"], mine["default"], mine["present"]) == (str(toy), "folder", True, True)


def test_chat_models_in_the_hub_s_cache_are_listed(ok, monkeypatch, tmp_path):
    for repo, name, text in (
        ("models--some--chat", "tokenizer_config.json", '{"chat_template": "x"}'),
        ("models--some--other-chat", "chat_template.jinja", "x"),
        ("models--some--base", "tokenizer_config.json", "{}"),
        ("datasets--some--data", "chat_template.jinja", "x"),
    ):
        snapshot = tmp_path / repo / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / name).write_text(text)
        (tmp_path / repo / "refs").mkdir()
        (tmp_path / repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path))
    assert [model["name"] for model in ok("models", "list")] == ["tiny", "some/chat", "some/other-chat"]


# Choices


def pairs(tmp_path, *lines):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def pair(chosen, rejected):
    return json.dumps({"prompt": QUESTION, "chosen": chosen, "rejected": rejected})


SHORT_AND_LONG = [
    pair(
        "Go to bed early.", "Well, now, there are a great many things to be said about going to bed, and here they are."
    ),
    pair("Get up at seven.", "It so happens that getting up at the same time each and every morning is of some help."),
    pair(
        "Drink less coffee.", "Should it be that you drink coffee in the evening, then drinking less would do you good."
    ),
]


def feedback(prefmw):
    return json.loads(prefmw("users", "export", "alice")[1])["feedback"]


@pytest.fixture
def learner(alice, toy, home, calibrated):
    calibrated(toy, home)


def test_weights_are_learned_from_pairs_and_the_pairs_are_kept_once(ok, prefmw, learner, toy, tmp_path, home):
    from prefmw.preferences.learning import bradley_terry

    (calibration,) = (home / "calibrations").iterdir()
    before = calibration.read_text()
    file = pairs(tmp_path, *SHORT_AND_LONG)
    lesson = ok("prefs", "learn", "alice", file, "-m", str(toy))
    assert lesson["choices"] == 3
    kept = feedback(prefmw)
    keys = list(lesson["weights"])
    assert keys == ["verbosity", "complexity", "humor", "creativity", "friendliness", "formality"]
    learned = bradley_terry([[row["scores"][key][0] - row["scores"][key][1] for key in keys] for row in kept])
    assert [lesson["weights"][key]["value"] for key in keys] == pytest.approx(learned.weights.tolist(), abs=1e-4)
    for weight in lesson["weights"].values():
        assert weight["interval"][0] <= weight["value"] <= weight["interval"][1]
        assert weight["stored"] == (weight["confidence"] >= 0.9)
    stored = {key for key, weight in lesson["weights"].items() if weight["stored"]}
    assert stored == set(ok("prefs", "show", "alice")["weights"])
    code, _, err = prefmw("prefs", "learn", "alice", file, "-m", str(toy))
    assert (code, err) == (0, "3 of 3 pairs were left out: stored before, or of two equal replies\n")
    assert len(feedback(prefmw)) == 3
    assert calibration.read_text() == before


def test_two_choices_are_kept_and_told_to_be_too_few(prefmw, learner, toy, tmp_path):
    code, out, err = prefmw("prefs", "learn", "alice", pairs(tmp_path, *SHORT_AND_LONG[:2]), "-m", str(toy))
    assert (code, out, err) == (0, "", "2 choices; 3 are needed before weights are learned\n")


def test_pairs_of_equal_replies_are_left_out(prefmw, learner, toy, tmp_path):
    file = pairs(tmp_path, pair("A.", "A."), SHORT_AND_LONG[0])
    code, _, err = prefmw("prefs", "learn", "alice", file, "-m", str(toy))
    assert (code, err.splitlines()[0]) == (
        0,
        "1 of 2 pairs were left out: stored before, or of two equal replies",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is no {"),
        ('{"prompt": "x", "chosen": "y"}', "line 2 is no {"),
        ('{"prompt": "x", "chosen": "y", "rejected": 3}', "line 2 is no {"),
        ('{"prompt": "x", "chosen": "y", "rejected": [{"role": "assistant"}]}', "line 2 is no {"),
        ('{"prompt": "x", "chosen": "y", "rejected": ""}', "line 2 is no {"),
        ('{"prompt": "x", "chosen": "y", "rejected": "a\\u0000b"}', "line 2: the rejected holds a NUL"),
    ],
)
def test_a_line_that_is_no_pair_is_named_and_nothing_is_stored(prefmw, ok, alice, toy, tmp_path, line, message):
    code, out, err = prefmw("prefs", "learn", "alice", pairs(tmp_path, SHORT_AND_LONG[0], line), "-m", str(toy))
    assert (code, out) == (2, "")
    assert message in err
    assert feedback(prefmw) == []


def test_replies_are_scored(ok, toy, tmp_path):
    line = json.dumps({"prompt": QUESTION, "response": "Go to bed early."})
    (scores,) = ok("eval", "score", pairs(tmp_path, line), "--zero-shot", "-m", str(toy))
    assert set(scores) == {"verbosity", "complexity", "humor", "creativity", "friendliness", "formality"}


def test_dials_are_turned_and_three_at_once(ok):
    table = ok("eval", "dials", "--n", "2")
    assert len(table["dials"]) == 25
    assert {row["weight"] for row in table["dials"]} == {-1, -0.5, 0, 0.5, 1}
    assert [row["method"] for row in table["chords"] if row["axis"] == "all"] == ["prompt", "linear", "drift"]


# Chat


def test_the_same_seed_gives_the_same_text_and_zero_strength_is_prompting(chat):
    first = chat("--method", "linear", "--seed", "1")
    assert chat("--method", "linear", "--seed", "1")["text"] == first["text"]
    zero = chat("--method", "linear", "--seed", "1", "--strength", "0")
    prompt = chat("--method", "prompt", "--seed", "1")
    assert zero["text"] == prompt["text"] != first["text"]


def test_json_says_all_that_was_applied(chat, ok, toy):
    ok("prefs", "set", "alice", "humor=0.5")
    reply = chat("--seed", "7")
    assert (reply["user"], reply["model"], reply["method"], reply["strength"], reply["seed"]) == (
        "alice",
        str(toy),
        "linear",
        2.0,
        7,
    )
    assert set(reply["usage"]) == {"input_tokens", "output_tokens"}
    assert reply["finish_reason"] in {"stop", "length"}
    assert reply["preferences"]["revision"] == 2
    assert reply["preferences"]["weights"] == {"humor": {"value": 0.5, "source": "user", "confidence": 1.0}}
    assert PERSONA in reply["preferences"]["principle"]
    assert set(reply["timing"]) == {"load_s", "prefill_s", "decode_s", "ms_per_token"}


def test_the_turn_is_stored(chat, home):
    import sqlite3

    reply = chat("--method", "linear", "--seed", "1")
    with sqlite3.connect(home / "prefmw.db") as database:
        row = database.execute("SELECT method, revision, seed, input_tokens, output_tokens, text FROM turns").fetchone()
    usage = reply["usage"]
    assert row == ("linear", 1, 1, usage["input_tokens"], usage["output_tokens"], reply["text"])


def test_no_log_stores_nothing(chat, home):
    import sqlite3

    assert chat("-n")["turn"] is None
    with sqlite3.connect(home / "prefmw.db") as database:
        assert database.execute("SELECT count(*) FROM turns").fetchone() == (0,)


def test_a_conversation_is_continued_with_its_system_prompt(chat):
    first = chat("--seed", "1", "-s", "Be kind.")
    second = chat("--seed", "1", "-c")
    assert second["conversation"] == first["conversation"]
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    fresh = chat("--seed", "1", "-s", "Be kind.")
    assert fresh["conversation"] != first["conversation"]
    assert fresh["text"] == first["text"]
    assert chat("--conversation", first["conversation"])["conversation"] == first["conversation"]


def test_a_method_by_default_by_user_and_by_call(chat, ok, monkeypatch):
    monkeypatch.setenv("PREFMW_METHOD", "prompt")
    assert chat()["method"] == "prompt"
    ok("users", "edit", "alice", "--method", "linear", "--strength", "1.5")
    assert (chat()["method"], chat()["strength"]) == ("linear", 1.5)
    assert chat("--method", "none")["method"] == "none"


def test_a_reply_is_text_on_stdout_and_nothing_else(prefmw, toy, alice):
    arguments = ["chat", QUESTION, "-u", "alice", "-m", str(toy), "--max-tokens", "24", "--seed", "1"]
    code, streamed, err = prefmw(*arguments)
    assert (code, err) == (0, "")
    assert prefmw(*arguments, "--no-stream")[1] == streamed
    assert streamed.endswith("\n")


def test_steering_without_preferences_is_noted(prefmw, ok, toy):
    ok("users", "add", "bob")
    _, _, err = prefmw("chat", "x", "-u", "bob", "-m", str(toy), "--method", "linear", "--max-tokens", "4")
    assert err == "note: bob has no persona and no style weight of 0.15 or more, so the reply is plain\n"


def test_the_user_may_come_from_the_environment(ok, toy, alice, monkeypatch):
    monkeypatch.setenv("PREFMW_USER", "alice")
    assert ok("chat", "x", "-m", str(toy), "--max-tokens", "4")["user"] == "alice"


def test_piped_text_is_joined_to_the_prompt(ok, toy, alice, monkeypatch, home):
    import io
    import sqlite3

    monkeypatch.setattr("sys.stdin", io.StringIO("piped text\n"))
    ok("chat", "Summarise:", "-u", "alice", "-m", str(toy), "--max-tokens", "4")
    monkeypatch.setattr("sys.stdin", io.StringIO("only piped"))
    ok("chat", "-u", "alice", "-m", str(toy), "--max-tokens", "4")
    with sqlite3.connect(home / "prefmw.db") as database:
        prompts = [row[0] for row in database.execute("SELECT prompt FROM turns ORDER BY id")]
    assert prompts == ["Summarise:\n\npiped text", "only piped"]


# Mistakes

TOO_LONG = "x" * 300
MISTAKES = {
    "no such model": (["chat", "x", "-u", "alice", "-m", "no-such-model"], 2, "no model 'no-such-model'"),
    "no such path": (["chat", "x", "-u", "alice", "-m", "./nowhere"], 2, "does not exist"),
    "no user named": (["chat", "x"], 2, "--user"),
    "unknown user": (["users", "show", "bob"], 2, "no user 'bob'"),
    "unknown user at chat": (["chat", "x", "-u", "bob"], 2, "no user 'bob'"),
    "empty id": (["users", "add", ""], 2, "empty"),
    "long id": (["users", "add", TOO_LONG], 2, "at most 128 characters, got 300"),
    "id of two lines": (["users", "add", "a\nb"], 2, "no line break"),
    "long id at chat": (["chat", "x", "-u", TOO_LONG], 2, "at most 128 characters"),
    "taken id": (["users", "add", "alice"], 2, "already"),
    "persona of 1 MB": (["users", "edit", "alice", "--persona", "x" * 1_000_000], 2, "at most 4000 characters"),
    "persona that is no text": (["users", "edit", "alice", "--persona", "\udcff"], 2, "not valid UTF-8"),
    "prompt that is no text": (["chat", "\udcff", "-u", "alice"], 2, "not valid UTF-8"),
    "strength NaN": (["chat", "x", "-u", "alice", "--strength", "nan"], 2, "got nan"),
    "strength below range": (["chat", "x", "-u", "alice", "--strength", "-1"], 2, "[0, 10]"),
    "strength above range": (["chat", "x", "-u", "alice", "--strength", "11"], 2, "[0, 10]"),
    "strength for none": (["chat", "x", "-u", "alice", "--method", "none", "--strength", "1"], 2, "takes no strength"),
    "strength without method": (["users", "edit", "alice", "--strength", "1"], 2, "--method"),
    "max-tokens 0": (["chat", "x", "-u", "alice", "--max-tokens", "0"], 2, "max-tokens is at least 1"),
    "unknown method": (["chat", "x", "-u", "alice", "--method", "liner"], 2, "did you mean 'linear'"),
    "unknown method stored": (["users", "edit", "alice", "--method", "liner"], 2, "did you mean 'linear'"),
    "unknown dimension": (["prefs", "set", "alice", "humour=1"], 2, "did you mean 'humor'"),
    "unknown dimension unset": (["prefs", "unset", "alice", "humour"], 2, "did you mean 'humor'"),
    "weight out of range": (["prefs", "set", "alice", "humor=1.5"], 2, "[-1, 1]"),
    "weight NaN": (["prefs", "set", "alice", "humor=nan"], 2, "[-1, 1]"),
    "weight without number": (["prefs", "set", "alice", "humor"], 2, "humor=-0.6"),
    "weight twice": (["prefs", "set", "alice", "humor=1", "humor=0"], 2, "twice"),
    "nothing to edit": (["users", "edit", "alice"], 2, "nothing to change"),
    "no question": (["chat", "-u", "alice"], 2, "nothing to answer"),
    "blank question": (["chat", "  ", "-u", "alice"], 2, "nothing to answer"),
    "no conversation yet": (["chat", "x", "-u", "alice", "-c"], 2, "no conversation yet"),
    "no such conversation": (["chat", "x", "-u", "alice", "--conversation", "abc"], 2, "no conversation 'abc'"),
    "two conversations": (["chat", "x", "-u", "alice", "-c", "--conversation", "abc"], 2, "one of them"),
    "prompt beyond the context": (["chat", "word " * 3000, "-u", "alice"], 2, "512"),
    "id that is no text": (["users", "show", "\udcff"], 2, "printable"),
    "reason that is no text": (["prefs", "set", "alice", "humor=1", "--reason", "\udcff"], 2, "not valid UTF-8"),
    "conversation that is no text": (["chat", "x", "-u", "alice", "--conversation", "\udcff"], 2, "not valid UTF-8"),
    "model of nobody": (["chat", "x", "-u", "alice", "-m", "~no-such-person/x"], 2, "does not exist"),
    "database of nobody": (["users", "list", "-d", "~no-such-person/x.db"], 2, "write it out"),
    "database that is no text": (["users", "list", "-d", "\udcff"], 2, "UTF-8"),
    "endless model name": (["chat", "x", "-u", "alice", "-m", "/" + "m" * 300], 2, "cannot be read"),
    "temperature beyond range": (["chat", "x", "-u", "alice", "--temperature", "1e308"], 2, "[0.01, 100]"),
    "top-p of nothing": (["chat", "x", "-u", "alice", "--top-p", "1e-50"], 2, "top-p"),
    "endless reason": (["prefs", "set", "alice", "humor=1", "--reason", "x" * 1001], 2, "at most 1000"),
    "endless database name": (["users", "list", "-d", "/tmp/" + "x" * 300], 1, "cannot be"),
    "port that is none": (["users", "list", "-d", "postgresql+psycopg://x@127.0.0.1:abc/x"], 2, "cannot be read"),
    "option that is none": (["users", "list", "-d", "sqlite:///x.db?timeout=abc"], 2, "option"),
    "database in memory": (["users", "list", "-d", "sqlite://"], 2, "keep nothing"),
    "another kind of database": (["users", "list", "-d", "mysql://x/y"], 2, "postgresql"),
    "unknown option": (["chat", "--nope"], 2, "--nope"),
    "unknown command": (["usres"], 2, "users"),
    "not a number": (["chat", "x", "--max-tokens", "many"], 2, "--max-tokens"),
    "a folder as database": (["users", "list", "-d", "/tmp"], 1, "cannot be opened"),
    "no such split": (["eval", "steer", "--split", "train"], 2, "dev or test"),
    "no method at all": (["eval", "steer", "--methods", ","], 2, "at least one method"),
    "method that is none, measured": (["eval", "steer", "--methods", "none,magic"], 2, "no method 'magic'"),
    "auto, measured": (["eval", "steer", "--methods", "auto"], 2, "auto"),
    "strength out of range, measured": (["eval", "steer", "--strength", "99"], 2, "[0, 10]"),
    "no questions": (["eval", "steer", "--n", "0"], 2, "--n"),
    "temperature below zero, measured": (["eval", "steer", "--n", "1", "--temperature", "-1"], 2, "temperature"),
    "strengths tried on the test split": (["eval", "steer", "--strength", "1", "--strength", "2"], 2, "--split dev"),
    "replies nowhere": (["eval", "steer", "--replies", "/nowhere/x.jsonl"], 2, "cannot be written"),
    "curve of one point": (["eval", "steer", "--plot", "x.png"], 2, "several times"),
    "picture of no kind": (
        ["eval", "steer", "--split", "dev", "--strength", "1", "--strength", "2", "--plot", "x.txt"],
        2,
        ".png",
    ),
    "ratings nowhere": (["eval", "agreement", "/nowhere/x.jsonl"], 2, "cannot be read"),
    "ratings that are none": (["eval", "agreement", "/etc/hosts"], 2, "holds no ratings"),
    "recipe that is none": (
        ["train", "sft", "--recipe", "huge", "--out", "/tmp/none"],
        2,
        "no recipe 'huge'; there is",
    ),
    "recipe file that is none": (["train", "sft", "--recipe", "/x.toml", "--out", "/tmp/none"], 2, "no recipe"),
    "score of no kind": (["eval", "score", "/dev/null"], 2, "--zero-shot"),
    "nothing to score": (["eval", "score", "/dev/null", "--zero-shot"], 2, "is empty"),
    "no pairs": (["prefs", "learn", "alice", "/dev/null"], 2, "is empty"),
    "pairs that are not there": (["prefs", "learn", "alice", "tests/nothing.jsonl"], 2, "cannot be read"),
    "several gains beside others": (
        ["eval", "steer", "--methods", "drift", "--strength", "1", "--strength", "2"],
        2,
        "choose a strength on --split dev",
    ),
    "several gains on the test split": (["eval", "dials", "--strength", "1", "--strength", "2"], 2, "--split dev"),
    "a full folder to train in": (["train", "sft", "--recipe", "tiny", "--out", "/etc"], 2, "not empty"),
    "pad without a PersRM": (["chat", "x", "-u", "alice", "--method", "pad"], 2, "needs a PersRM"),
    "PersRM that is none": (
        ["chat", "x", "-u", "alice", "--method", "pad", "--persrm", "/nowhere"],
        2,
        "no PersRM '/nowhere'",
    ),
    "a folder that holds no PersRM": (
        ["chat", "x", "-u", "alice", "--method", "pad", "--persrm", "/etc"],
        2,
        "holds no persrm.json",
    ),
    "beta beyond range": (
        ["chat", "x", "-u", "alice", "--method", "pad", "--strength", "4"],
        2,
        "(beta) lies in [0, 3]",
    ),
    "unknown candidate rule": (["chat", "x", "-u", "alice", "--candidate", "gready"], 2, "did you mean 'greedy'"),
    "pad measured without a PersRM": (["eval", "steer", "--methods", "pad", "--n", "1"], 2, "needs a PersRM"),
    "several betas on the test split": (
        ["eval", "steer", "--methods", "pad", "--strength", "1", "--strength", "2"],
        2,
        "--split dev",
    ),
    "a PersRM of nothing": (["train", "persrm", "--out", "/tmp/none"], 2, "--backbone and pairs with --data"),
    "a PersRM's recipe that is none": (
        ["train", "persrm", "--recipe", "huge", "--out", "/tmp/none"],
        2,
        "no recipe 'huge'; there is tiny",
    ),
    "no pairs for a PersRM": (
        ["train", "persrm", "--backbone", "tiny", "--data", "/nowhere.jsonl", "--out", "/tmp/none"],
        2,
        "'/nowhere.jsonl' cannot be read",
    ),
    "epochs of nothing": (
        ["train", "persrm", "--recipe", "tiny", "--epochs", "0", "--out", "/tmp/none"],
        2,
        "epochs is above 0",
    ),
    "unknown kind of database": (["users", "list", "-d", "nonsense://x"], 2, "no database of the kind"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_helps(name, prefmw, ok, alice, toy, monkeypatch):
    monkeypatch.setenv("PREFMW_MODEL", str(toy))
    arguments, code, message = MISTAKES[name]
    before = ok("users", "list")
    got, out, err = prefmw(*arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert re.fullmatch(r"prefmw: [^\n]+\n", err)
    assert len(err) < 400
    assert ok("users", "list") == before


@pytest.mark.parametrize("arguments", [[], ["x"], ["x", "-u", "bob"]])
def test_the_default_model_is_named_where_it_is_missing(prefmw, monkeypatch, tmp_path, arguments):
    monkeypatch.setattr("prefmw.embedded.embedded_path", lambda name: tmp_path / name)
    code, out, err = prefmw("chat", *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch("prefmw: the embedded chat model 'tiny' is not in this installation; [^\n]*-m[^\n]*\n", err)


def test_a_model_without_a_chat_template_is_told(prefmw, alice, toy, tmp_path):
    import shutil

    base = Path(shutil.copytree(toy, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    code, out, err = prefmw("chat", "x", "-u", "alice", "-m", str(base))
    assert (code, out) == (2, "")
    assert "no chat template" in err


def test_transformers_outside_the_range_is_told(prefmw, alice, toy, monkeypatch):
    monkeypatch.setattr("prefmw.models.chat_model.version", lambda name: "4.40.0")
    code, _, err = prefmw("chat", "x", "-u", "alice", "-m", str(toy))
    assert (code, "transformers 4.40.0 is outside" in err) == (1, True)


def test_a_turn_that_cannot_be_recorded_is_printed_all_the_same(prefmw, alice, toy, monkeypatch):
    from prefmw.errors import StoreLockedError
    from prefmw.stores import SQLPreferenceStore

    def locked(self, turn):
        raise StoreLockedError("database is locked")

    monkeypatch.setattr(SQLPreferenceStore, "record", locked)
    arguments = ["chat", "x", "-u", "alice", "-m", str(toy), "--max-tokens", "8"]
    for extra in ([], ["--no-stream"], ["--json"]):
        code, out, err = prefmw(*arguments, *extra)
        assert (code, err) == (1, "prefmw: this turn was not recorded: database is locked\n")
        assert len(out) > 4


@pytest.mark.parametrize(("flag", "checkpoint"), [("--dpa", "tiny-dpa"), ("--persrm", "tiny-persrm")])
def test_a_checkpoint_that_the_method_does_not_read_is_noted(prefmw, ok, flag, checkpoint):
    ok("users", "add", "bob", "--persona", "likes short answers")
    asked = ["chat", "x", "-u", "bob", "--method", "prompt", flag, checkpoint, "--max-tokens", "4"]
    notice = f"{flag} has no effect: it is {'DPA' if flag == '--dpa' else 'PAD'}'s, and the method is 'prompt'"
    code, out, err = prefmw(*asked, "--json")
    assert (code, err) == (0, f"note: {notice}\n")
    assert json.loads(out)["notices"] == [notice]


def test_a_strength_for_whatever_method_applies_is_noted_where_it_has_no_effect(prefmw, ok, toy):
    ok("users", "add", "bob")
    code, _, err = prefmw("chat", "x", "-u", "bob", "-m", str(toy), "--strength", "3", "--max-tokens", "4")
    assert (code, err) == (0, "note: strength 3 has no effect: method 'none' takes none\n")


def test_a_terminal_that_cannot_show_a_character_shows_a_question_mark(home):
    import os
    import subprocess
    import sys

    command = [sys.executable, "-c", "from prefmw.cli.main import main; main()", "users"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    subprocess.run([*command, "add", "alice", "--persona", "caf\u00e9"], check=True, capture_output=True)
    shown = subprocess.run([*command, "show", "alice"], env=environment, capture_output=True, text=True)
    assert (shown.returncode, "caf?" in shown.stdout) == (0, True)


def test_a_missing_extra_prints_its_pip_command(prefmw, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    code, _, err = prefmw("users", "list", "-d", "postgresql+psycopg://x@127.0.0.1/x")
    assert (code, "pip install 'prefmw[postgres]'" in err) == (1, True)


# Training and measuring


def test_steering_is_measured_and_its_replies_kept(tiny, prefmw, tmp_path):
    kept, picture = tmp_path / "replies.jsonl", tmp_path / "curve.png"
    arguments = ["eval", "steer", "--methods", "none,linear", "--split", "dev", "--n", "2"]
    arguments += ["--strength", "0", "--strength", "2"]
    code, out, _ = prefmw(*arguments, "--replies", str(kept), "--plot", str(picture), "--no-controls", "--json")
    assert code == 0
    result = json.loads(out)
    asked = "method strength axis n followed ci95 relevance helpfulness repetition off_axis cost_ratio"
    assert all(set(asked.split()) <= set(row) for row in result["rows"])
    assert [row["axis"] for row in result["rows"]][:6] == [
        "verbosity",
        "complexity",
        "humor",
        "friendliness",
        "formality",
        "all",
    ]
    assert [(row["method"], row["strength"]) for row in result["rows"][::6]] == [
        ("none", None),
        ("linear", 0.0),
        ("linear", 2.0),
    ]
    assert result["settings"]["model"] == "tiny"
    assert len(kept.read_text().splitlines()) == 3 * 10
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = prefmw(*arguments, "--no-controls")
    assert (code, "linear 2" in out) == (0, True)


def test_readers_and_oracles_are_compared(ok, prefmw, tmp_path):
    neutral = dict.fromkeys(("verbosity", "complexity", "humor", "friendliness", "formality"), 0)
    texts = {"Sleep. No excuses.": -1, "Sleep well, I believe in you, my friend!": 1, "Sleep in a dark room.": 0}
    lines = [
        json.dumps({"text": text, "ratings": [{**neutral, "friendliness": rating}] * 2, "sensible": [True, False]})
        for text, rating in texts.items()
    ]
    (tmp_path / "ratings.jsonl").write_text("\n".join(lines))
    result = ok("eval", "agreement", str(tmp_path / "ratings.jsonl"))
    row = next(row for row in result["rows"] if row["axis"] == "friendliness")
    assert row == {
        "axis": "friendliness",
        "spearman": 1.0,
        "n": 2,
        "same_pole": 1.0,
        "false_pole": 0.0,
        "readers": 1.0,
    }
    assert (result["replies"], result["sensible"]) == (3, 0.5)
    code, out, _ = prefmw("eval", "agreement", str(tmp_path / "ratings.jsonl"))
    assert (code, "3 replies" in out) == (0, True)


def test_training_without_its_extra_prints_the_pip_command(prefmw, monkeypatch):
    monkeypatch.setattr("prefmw.cli.train.find_spec", lambda name: None)
    for kind in ("sft", "persrm"):
        code, _, err = prefmw("train", kind, "--recipe", "tiny", "--out", "x")
        assert (code, "pip install 'prefmw[train]'" in err) == (1, True)


# Help


def commands(group=None, path=()):
    import typer.main

    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_and_option_has_help():
    for path, command in commands():
        assert command.help, path
        for parameter in command.params:
            assert parameter.help, (path, parameter.name)


def test_every_command_and_option_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for path, command in commands():
        assert f"prefmw {' '.join(path)}" in text, path
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in text, (path, option)


def test_no_arguments_print_help(prefmw):
    code, out, _ = prefmw()
    assert code == 0
    assert "chat" in out
