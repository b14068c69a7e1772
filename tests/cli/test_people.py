"""Whole people at the command line: history and going back, export, erase, dump, load, the editor, the logs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def ok(prefmw):
    """Run a command that must succeed; give back what it printed."""

    def call(*arguments: str) -> str:
        code, out, err = prefmw(*arguments)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def alice(ok, toy):
    ok("users", "add", "alice", "--persona", "a nurse on night shifts")
    ok("prefs", "set", "alice", "humor=0.5", "--reason", "likes jokes")
    ok("chat", "How do I sleep?", "-u", "alice", "-m", str(toy), "--max-tokens", "8", "--seed", "1")


def terminal(monkeypatch, answer: str = "") -> None:
    """A person at stdin and stderr."""

    class Person(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Person(answer))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


# History


def test_history_says_what_changed_and_revert_goes_back(ok, alice):
    ok("prefs", "set", "alice", "humor=-1", "verbosity=0.25")
    first, second, third = json.loads(ok("prefs", "history", "alice", "--json"))
    assert (second["reason"], second["change"]) == ("likes jokes", {"weight.humor.user": [None, [0.5, 1.0]]})
    assert third["change"]["weight.humor.user"] == [[0.5, 1.0], [-1.0, 1.0]]
    shown = ok("prefs", "history", "alice")
    assert "humor (user) +0.50 → -1.00" in shown
    assert "persona – → a nurse on night shifts" in shown
    back = json.loads(ok("prefs", "revert", "alice", "2", "--reason", "better before", "--json"))
    assert (back["revision"], {key: w["value"] for key, w in back["weights"].items()}) == (4, {"humor": 0.5})


@pytest.mark.parametrize("number", ["0", "9", "-1", "99999999999999999999"])
def test_a_revision_that_never_was_is_told(prefmw, alice, number):
    code, _, err = prefmw("prefs", "revert", "alice", "--", number)
    assert (code, err) == (
        2,
        f"prefmw: 'alice' has no revision {number}; see 'prefmw prefs history alice'\n",
    )


def test_dimensions_are_listed_with_their_principles(ok):
    shown = json.loads(ok("prefs", "dimensions", "--json"))
    assert shown["verbosity"]["negative"]["name"] == "concise"
    assert shown["helpfulness"]["negative"] is None
    assert "Keep the answer short and to the point." in ok("prefs", "dimensions")


# Export and erase


def test_a_person_is_exported_whole_and_erased(ok, prefmw, alice):
    person = json.loads(ok("users", "export", "alice"))
    assert person["conversations"][0]["turns"][0]["prompt"] == "How do I sleep?"
    assert [revision["reason"] for revision in person["revisions"]] == ["", "likes jokes"]
    code, _, err = prefmw("users", "erase", "alice")
    assert (code, "--yes" in err) == (2, True)
    assert json.loads(ok("users", "export", "alice")) == person
    ok("users", "erase", "alice", "--yes")
    assert prefmw("users", "show", "alice")[0] == 2


@pytest.mark.parametrize(("answer", "left"), [("n\n", True), ("y\n", False), ("", True)])
def test_a_person_at_the_terminal_is_asked_before_erasing(prefmw, alice, monkeypatch, answer, left):
    terminal(monkeypatch, answer)
    prefmw("users", "erase", "alice")
    assert (prefmw("users", "show", "alice")[0] == 0) == left


def test_a_renamed_user_keeps_history(ok, prefmw, alice):
    ok("users", "rename", "alice", "alicia")
    assert len(json.loads(ok("prefs", "history", "alicia", "--json"))) == 3
    assert prefmw("users", "rename", "alicia", "a\nb")[0] == 2
    assert prefmw("users", "rename", "nobody", "x")[0] == 2


# Dump and load


def test_what_is_dumped_is_loaded_elsewhere(ok, alice, tmp_path):
    ok("users", "add", "bob")
    file = tmp_path / "all.jsonl"
    ok("users", "dump", str(file))
    assert len(file.read_text().splitlines()) == 2
    other = str(tmp_path / "other.db")
    ok("users", "load", str(file), "-d", other)
    assert ok("users", "dump", "-", "-d", other).count("\n") == 2
    assert json.loads(ok("users", "show", "alice", "--json", "-d", other)) == json.loads(
        ok("users", "show", "alice", "--json")
    )
    assert ok("logs", "show", "alice", "-d", other) == ok("logs", "show", "alice")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 3: no JSON"),
        ('["bob"]', "line 3: expected a JSON object, got list"),
        ('{"user": "bob", "weights": {"humour": 1}}', "line 3: no dimension 'humour': did you mean 'humor'?"),
        ('{"user": "bob", "weights": {"humor": 7}}', "line 3: a weight for humor lies in [-1, 1], got 7"),
        ('{"user": "bob", "weights": {"humor": NaN}}', "line 3: a weight for humor lies in [-1, 1], got nan"),
        ('{"user": "bob", "weights": [1]}', "line 3: weights: Input should be"),
        ('{"user": "alice"}', "line 3: user 'alice' stands twice"),
        ('{"user": "bob", "weights": {"humor": true}}', "line 3: weights.humor"),
        ('{"user": "bob", "weights": {"humor": "1"}}', "line 3: weights.humor"),
        ('{"user": "bob", "strengths": {"auto": 1}}', "line 3: a strength belongs to a method"),
        ('{"user": "bob", "weights": {"humor": 1' + "0" * 400 + "}}", "line 3: a weight for humor lies in"),
        ("[" * 100_000, "line 3: no JSON"),
        ('{"user": ""}', "line 3: user: a user id is empty"),
    ],
)
def test_a_wrong_line_is_told_by_number_and_nobody_is_loaded(prefmw, tmp_path, line, message):
    file = tmp_path / "people.jsonl"
    file.write_text(f'{{"user": "alice"}}\n\n{line}\n{{"user": "carol"}}\n')
    code, _, err = prefmw("users", "load", str(file))
    assert (code, err.startswith(f"prefmw: {message}")) == (2, True), err
    assert err.endswith("nobody was loaded\n")
    assert json.loads(prefmw("users", "list", "--json")[1]) == []


def test_somebody_stored_already_is_told_and_nobody_loaded(prefmw, ok, tmp_path):
    ok("users", "add", "bob", "--persona", "old")
    file = tmp_path / "people.jsonl"
    file.write_text('{"user": "alice"}\n{"user": "bob", "persona": "new"}\n{"user": "carol"}\n')
    code, _, err = prefmw("users", "load", str(file))
    said = "prefmw: user 'bob' is stored already; skip or replace those who are (--existing); nobody was loaded\n"
    assert (code, err) == (2, said)
    ok("users", "load", str(file), "--existing", "skip")
    assert [one["persona"] for one in json.loads(ok("users", "list", "--json"))] == ["", "old", ""]


def test_a_dump_that_breaks_off_leaves_the_last_one(prefmw, alice, tmp_path, monkeypatch):
    from prefmw.stores import SQLPreferenceStore

    file = tmp_path / "all.jsonl"
    file.write_text("the last one")

    def broken(self):
        yield {"user": "alice"}
        raise KeyboardInterrupt

    monkeypatch.setattr(SQLPreferenceStore, "export_all", broken)
    assert prefmw("users", "dump", str(file))[0] == 130
    assert file.read_text() == "the last one"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["all.jsonl"]


def test_a_dump_is_for_its_owner_alone_and_in_any_encoding(ok, tmp_path):
    ok("users", "add", "é夜", "--persona", "🛌")
    ok("users", "dump", str(tmp_path / "all.jsonl"))
    assert (tmp_path / "all.jsonl").stat().st_mode & 0o777 == 0o600
    assert ok("users", "export", "é夜").isascii()


def test_a_file_that_is_none_is_told(prefmw, tmp_path):
    assert "cannot be read: No such file" in prefmw("users", "load", str(tmp_path / "none.jsonl"))[2]
    (tmp_path / "bytes.jsonl").write_bytes(b'{"user": "alice"}\n\xff\xfe\n')
    assert "line 2: no UTF-8" in prefmw("users", "load", str(tmp_path / "bytes.jsonl"))[2]
    assert "cannot be written" in prefmw("users", "dump", str(tmp_path))[2]


# The editor


def editor(monkeypatch, tmp_path: Path, *steps: str) -> None:
    """An editor that runs one Python line on the ``text`` each time it is opened."""
    script = tmp_path / "editor.py"
    script.write_text(
        "import sys, pathlib\n"
        f"steps, count = {steps!r}, pathlib.Path({str(tmp_path / 'count')!r})\n"
        "n = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (n + 1))\n"
        "file = pathlib.Path(sys.argv[1]); scope = {'text': file.read_text()}\n"
        "exec(steps[n], scope); file.write_text(scope['text'])\n"
    )
    monkeypatch.setenv("EDITOR", f"{sys.executable} {script}")
    monkeypatch.delenv("VISUAL", raising=False)


def test_a_profile_is_edited_as_text_in_one_revision(ok, alice, monkeypatch, tmp_path):
    terminal(monkeypatch)
    editor(
        monkeypatch,
        tmp_path,
        "text = text.replace('a nurse on night shifts', 'a \\\\u00e9migr\\\\u00e9')"
        ".replace('humor = 0.5', 'humor = -0.5')"
        ".replace('# verbosity = 0.0', 'verbosity = 0.25').replace('\"auto\"', '\"linear\"')"
        ".replace('# linear = 2.0', 'linear = 3.0')",
    )
    shown = json.loads(ok("users", "edit", "alice", "--json"))
    assert (shown["persona"], shown["method"], shown["strengths"]["linear"]) == ("a émigré", "linear", 3.0)
    assert {key: weight["value"] for key, weight in shown["weights"].items()} == {"humor": -0.5, "verbosity": 0.25}
    assert shown["revision"] == 3


def test_saving_without_a_change_is_no_revision(ok, alice, monkeypatch, tmp_path):
    terminal(monkeypatch)
    editor(monkeypatch, tmp_path, "pass")
    assert json.loads(ok("users", "edit", "alice", "--json"))["revision"] == 2


def test_a_line_that_is_taken_out_unsets_the_weight(ok, alice, monkeypatch, tmp_path):
    terminal(monkeypatch)
    editor(monkeypatch, tmp_path, "text = text.replace('humor = 0.5', '')")
    assert json.loads(ok("users", "edit", "alice", "--json"))["weights"] == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("text = 'persona = '", "no TOML"),
        ("text = ''", "the text is empty"),
        ("text = text.replace('humor = 0.5', 'humor = 1' + '0' * 400)", "lies in [-1, 1]"),
        ("text = text.replace('# linear = 2.0', 'auto = 2.0')", "a strength belongs to a method"),
        ("text = text + '\\ncolour = 3'", "a table of numbers|unknown entry|no dimension"),
        ("text = text.replace('humor = 0.5', 'humor = 5')", "lies in [-1, 1]"),
        ("text = text.replace('humor = 0.5', 'humour = 0.5')", "did you mean 'humor'?"),
        ("text = text.replace('humor = 0.5', 'humor = true')", "a table of numbers"),
        ("text = text.replace('\"auto\"', '\"magic\"')", "no method 'magic'"),
    ],
)
def test_a_wrong_edit_is_told_edited_again_and_only_then_saved(prefmw, alice, monkeypatch, tmp_path, wrong, message):
    terminal(monkeypatch, "y\n")
    editor(monkeypatch, tmp_path, wrong, "text = 'persona = \"second try\"'")
    code, out, err = prefmw("users", "edit", "alice")
    assert code == 0
    assert any(part in err for part in message.split("|"))
    assert "second try" in out


def test_giving_up_a_wrong_edit_changes_nothing(prefmw, ok, alice, monkeypatch, tmp_path):
    terminal(monkeypatch, "n\n")
    editor(monkeypatch, tmp_path, "text = 'persona = '")
    code, _, err = prefmw("users", "edit", "alice")
    assert (code, "nothing was changed" in err) == (2, True)
    assert json.loads(ok("users", "show", "alice", "--json"))["revision"] == 2


def test_weights_that_are_left_as_they_were_keep_what_they_rest_on(ok, alice, monkeypatch, tmp_path, home):
    from prefmw.preferences import Source, Stated
    from prefmw.stores import SQLPreferenceStore

    store = SQLPreferenceStore(f"sqlite:///{home}/prefmw.db")
    odd = {"my dim": Stated(0.5, 0.4, ["because"])}
    store.write_weights("alice", odd, source=Source.user, actor="t")
    store.edit_user("alice", persona='with \x7f and "quotes"', actor="t")
    before = store.profile("alice")
    terminal(monkeypatch)
    editor(monkeypatch, tmp_path, "pass")
    ok("users", "edit", "alice")
    assert store.profile("alice") == before
    store.close()


@pytest.mark.parametrize("command", ["/no/such/editor", "false", 'vim "'])
def test_an_editor_that_fails_is_told(prefmw, alice, monkeypatch, command):
    terminal(monkeypatch)
    monkeypatch.setenv("EDITOR", command)
    monkeypatch.delenv("VISUAL", raising=False)
    code, _, err = prefmw("users", "edit", "alice")
    assert (code, "editor" in err.lower()) == (2, True)


def test_an_edit_of_what_somebody_changed_meanwhile_is_refused(prefmw, alice, monkeypatch, tmp_path, home):
    terminal(monkeypatch)
    change = (
        "from prefmw.stores import SQLPreferenceStore; "
        f"s = SQLPreferenceStore('sqlite:///{home}/prefmw.db'); s.edit_user('alice', persona='other', actor='t'); "
        "text = text.replace('a nurse', 'a doctor')"
    )
    editor(monkeypatch, tmp_path, change)
    code, _, err = prefmw("users", "edit", "alice")
    assert (code, "somebody changed it meanwhile" in err) == (1, True)


# Logs, models, the database


def test_conversations_are_listed_and_shown(ok, alice):
    (entry,) = json.loads(ok("logs", "list", "alice", "--json"))
    assert (entry["turns"], entry["first_prompt"]) == (1, "How do I sleep?")
    assert entry["id"] in ok("logs", "list", "alice")
    (turn,) = json.loads(ok("logs", "show", "alice", "--json"))
    assert (turn["method"], turn["seed"], turn["conversation_id"]) == ("linear", 1, entry["id"])
    assert "alice> How do I sleep?" in ok("logs", "show", "alice", entry["id"])


def test_nobody_s_logs_are_told(prefmw, ok, alice):
    ok("users", "add", "bob")
    assert prefmw("logs", "list", "nobody")[0] == 2
    assert prefmw("logs", "show", "bob")[0] == 2
    assert "no conversation yet" in prefmw("logs", "list", "bob")[2]


def test_the_embedded_model_s_folder_is_printed(ok, prefmw):
    assert (Path(ok("models", "path", "tiny").strip()) / "model.safetensors").is_file()
    assert (
        prefmw("models", "path", "tinny")[2] == "prefmw: no model 'tinny' at hand: did you mean 'tiny'? known: tiny\n"
    )


def test_a_sound_database_is_told_and_a_changed_one(ok, prefmw, alice, home):
    import sqlite3

    assert json.loads(ok("db", "check", "--json"))["problems"] == []
    with sqlite3.connect(home / "prefmw.db") as raw:
        raw.execute("UPDATE weights SET value = 0.75")
    code, out, _ = prefmw("db", "check")
    assert (code, "the profile is not what its latest revision says" in out) == (1, True)


def test_a_database_that_is_not_there_is_not_made(prefmw, tmp_path):
    code, _, err = prefmw("db", "check", "-d", str(tmp_path / "typo.db"))
    assert (code, "there is no prefmw database" in err) == (2, True)
    assert not (tmp_path / "typo.db").exists()


# A deployment's own dimensions


@pytest.fixture
def own_dimensions(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "dimensions.toml"
    file.write_text(
        "[humor]\nretired = true\n[optimism]\n"
        'negative = { name = "sceptical", principle = "Name the risks first." }\n'
        'positive = { name = "hopeful", principle = "Look at the bright side." }\n'
    )
    monkeypatch.setenv("PREFMW_DIMENSIONS", str(file))
    return file


def test_own_dimensions_are_set_like_any_other(ok, own_dimensions):
    ok("users", "add", "alice")
    shown = json.loads(ok("prefs", "set", "alice", "optimism=-0.7", "--json"))
    assert shown["weights"]["optimism"]["value"] == -0.7
    assert shown["principle"] == "Name the risks first."
    assert "optimism" in json.loads(ok("prefs", "dimensions", "--json"))


def test_a_retired_dimension_is_kept_and_acts_no_more(ok, prefmw, alice, own_dimensions):
    shown = ok("prefs", "show", "alice")
    assert "retired" in shown
    assert "joke" not in shown.split("principle")[1]
    code, _, err = prefmw("prefs", "set", "alice", "humor=1")
    assert code == 2
    assert "no dimension 'humor'" in err
    ok("prefs", "unset", "alice", "humor")
    assert "humor" not in ok("prefs", "show", "alice")


def test_people_are_loaded_with_what_is_retired_since(ok, alice, tmp_path, own_dimensions):
    ok("prefs", "set", "alice", "optimism=0.5")
    ok("users", "dump", str(tmp_path / "people.jsonl"))
    ok("users", "erase", "alice", "--yes")
    ok("users", "load", str(tmp_path / "people.jsonl"))
    shown = json.loads(ok("prefs", "show", "alice", "--json"))
    assert {key: weight["value"] for key, weight in shown["weights"].items()} == {"humor": 0.5, "optimism": 0.5}


@pytest.mark.parametrize("content", [None, "[humor", "[spice]\nheat = 1\n"])
def test_dimensions_that_cannot_be_read_are_told(prefmw, own_dimensions, content):
    own_dimensions.unlink()
    if content is not None:
        own_dimensions.write_text(content)
    code, _, err = prefmw("prefs", "dimensions")
    assert code == 2
    assert str(own_dimensions) in err
    assert "Traceback" not in err
