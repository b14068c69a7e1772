"""Preference data in every format that it comes in; what is no pair is counted by its reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from prefmw.errors import UsageError
from prefmw.preferences import Message
from prefmw.training.composed_pairs import composed_pairs
from prefmw.training.composer import Composer
from prefmw.training.pairs import GENERAL, Pair, read_pairs
from prefmw.training.styles import load_styles

PLAIN = {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "preference": "Be brief."}


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    text = (
        json.dumps(list(rows))
        if ".json" in name and ".jsonl" not in name
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


EXPECTED = Pair((Message("user", "Why?"),), "Because.", "No.", "Be brief.")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_plain_pairs(tmp_path: Path, name: str):
    pairs, left_out = read_pairs([written(tmp_path, PLAIN, name=name)])
    assert pairs == [EXPECTED]
    assert not left_out


def test_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([PLAIN, PLAIN]), tmp_path / "a.parquet")
    assert read_pairs([tmp_path / "a.parquet"])[0] == [EXPECTED] * 2
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    with pytest.raises(UsageError, match="cut short"):
        read_pairs([tmp_path / "b.parquet"])


def test_trl_s_conversational_format_with_the_prompt_apart_or_within(tmp_path: Path):
    apart = {
        "prompt": [{"role": "system", "content": "Be kind."}, user("Why?")],
        "chosen": [assistant("Because.")],
        "rejected": [assistant("No.")],
        "preference": "Be brief.",
    }
    within = {
        "chosen": [*apart["prompt"], assistant("Because.")],
        "rejected": [*apart["prompt"], assistant("No.")],
        "preference": "Be brief.",
    }
    pairs, _ = read_pairs([written(tmp_path, apart, within)])
    assert pairs[0] == pairs[1]
    assert pairs[0].messages == (Message("system", "Be kind."), Message("user", "Why?"))


def test_hh_rlhf_dialogues(tmp_path: Path):
    before = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Why?\n\nAssistant:"
    pairs, _ = read_pairs([written(tmp_path, {"chosen": before + " Because.\n\nReally.", "rejected": before + " No."})])
    assert pairs == [
        Pair(
            (Message("user", "Hello"), Message("assistant", "Hi!"), Message("user", "Why?")),
            "Because.\n\nReally.",
            "No.",
            GENERAL,
        )
    ]


def test_a_preference_for_rows_that_name_none(tmp_path: Path):
    row = {key: PLAIN[key] for key in ("prompt", "chosen", "rejected")}
    path = written(tmp_path, row)
    assert read_pairs([path], "Be brief.")[0] == [EXPECTED]
    with pytest.raises(UsageError, match="no pair is left to train on: 1 without a preference"):
        read_pairs([path])


def test_helpsteer2_s_scores_are_compared_attribute_by_attribute(tmp_path: Path):
    good = {
        "prompt": "Why?",
        "response": "Because.",
        "helpfulness": 4,
        "correctness": 4,
        "coherence": 4,
        "verbosity": 1,
    }
    poor = {"prompt": "Why?", "response": "No.", "helpfulness": 1, "correctness": 4, "coherence": 3, "verbosity": 2}
    alone = {"prompt": "Where?", "response": "There.", "helpfulness": 1}
    pairs, left_out = read_pairs([written(tmp_path, good, poor, alone)])
    assert {(pair.chosen, pair.preference.split()[-1]) for pair in pairs} == {
        ("Because.", "helpful."),
        ("Because.", "coherent."),
        ("No.", "verbose."),
    }
    assert left_out == {"with equal scores": 1, "without another reply to compare with": 1}


def test_ultrafeedback_s_ratings_are_compared_too(tmp_path: Path):
    def completion(text: str, rating: str) -> dict[str, Any]:
        return {"response": text, "annotations": {"honesty": {"Rating": rating}, "truthfulness": {"Rating": "N/A"}}}

    row = {"instruction": "Why?", "completions": [completion("A.", "2"), completion("B.", "5"), completion("C.", "5")]}
    pairs, left_out = read_pairs([written(tmp_path, row)])
    assert [(pair.chosen, pair.rejected, pair.preference) for pair in pairs] == [
        ("B.", "A.", "Generate a response that is honest."),
        ("C.", "A.", "Generate a response that is honest."),
    ]
    assert left_out == {"with equal scores": 1}


BAD: dict[str, tuple[Any, str]] = {
    "a field missing": ({"prompt": "Why?", "chosen": "A."}, "without chosen, rejected or prompt"),
    "an empty reply": (PLAIN | {"rejected": "  "}, "with an empty reply"),
    "equal replies": (PLAIN | {"rejected": "Because. "}, "with two equal replies"),
    "an empty prompt": (PLAIN | {"prompt": ""}, "with an empty prompt"),
    "an empty preference": (PLAIN | {"preference": " "}, "without a preference"),
    "a number": (PLAIN | {"chosen": 3}, "without chosen, rejected or prompt"),
    "a list": ([1, 2], "that are no objects"),
    "a message without a role": ({"prompt": [{"content": "x"}], "chosen": [], "rejected": []}, "no role or content"),
    "a role of its own": (
        {"prompt": [{"role": "tool", "content": "x"}], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "another role",
    ),
    "two replies in one": (
        {
            "prompt": [user("x")],
            "chosen": [assistant("a"), assistant("b")],
            "rejected": [assistant("c")],
            "preference": "p",
        },
        "not one message",
    ),
    "a text that is no dialogue": ({"chosen": "A.", "rejected": "B."}, "no dialogue"),
    "dialogues that part early": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "differ before the last reply",
    ),
    "completions without scores": ({"instruction": "x", "completions": [{"response": "a"}]}, "two scored replies"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_is_no_pair_is_counted_by_its_reason_and_left_out(tmp_path: Path, case: str):
    row, reason = BAD[case]
    pairs, left_out = read_pairs([written(tmp_path, row, PLAIN, row)])
    assert pairs == [EXPECTED]
    assert list(left_out.values()) == [2]
    assert reason in next(iter(left_out))


def test_lines_that_are_no_json_are_counted(tmp_path: Path):
    path = written(tmp_path, PLAIN)
    path.write_text(path.read_text() + '{"prompt": "half\n\n')
    assert read_pairs([path]) == ([EXPECTED], {"that are no JSON": 1})


def test_where_nothing_is_left_all_reasons_are_told(tmp_path: Path):
    rows = [BAD["an empty reply"][0], BAD["an empty reply"][0], BAD["equal replies"][0]]
    with pytest.raises(
        UsageError, match="no pair is left to train on: 2 with an empty reply; 1 with two equal replies"
    ):
        read_pairs([written(tmp_path, *rows)])


@pytest.mark.parametrize(
    "name", ["a.txt", "a.csv", "missing.jsonl", "cut.jsonl.gz", "list.json", "broken.json", "latin.jsonl"]
)
def test_files_that_cannot_be_read_are_told_by_name(tmp_path: Path, name: str):
    contents = {
        "cut.jsonl.gz": gzip.compress(b"x" * 1000)[:20],
        "list.json": b"{}",
        "broken.json": b"[",
        "latin.jsonl": b"\xe9",
        "a.txt": b"",
        "a.csv": b"",
    }
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        read_pairs([tmp_path / name])


# Composed pairs


def test_composed_pairs_are_the_same_for_the_same_seed():
    first, again, other = (list(composed_pairs("train", 5, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_training_s_pairs_ask_for_nothing_that_is_held_out():
    pairs = list(composed_pairs("train", 400, seed=1))
    assert {pair.group for pair in pairs} == {"seen"}
    styles = load_styles()
    for split in ("dev", "test"):
        held_out = {text for words in styles.wordings[split].values() for text in (*words.personas, *words.indirect)}
        assert not any(f"is {text}," in pair.preference for pair in pairs for text in held_out)


def test_held_out_pairs_hold_the_share_of_unseen_combinations_that_was_asked_for():
    groups = [pair.group for pair in composed_pairs("test", 100, seed=1, unseen=0.4)]
    assert 0.4 <= groups.count("unseen") / 100 < 0.9
    assert "seen" in groups


def test_the_better_answer_has_more_of_what_was_asked():
    from prefmw.evaluation.oracles import measure

    composer = Composer("train", seed=1)
    humorous = composer.principles({"humor": 1})
    pairs = [pair for pair in composed_pairs("train", 3000, seed=1) if pair.preference == humorous]
    assert len(pairs) > 10
    better = [measure(pair.chosen)["humor"] >= measure(pair.rejected)["humor"] for pair in pairs]
    assert sum(better) >= 0.9 * len(better)
