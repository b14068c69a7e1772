"""Inference with a read-out that knows a few words and counts them for its states, so that every value is plain."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from prefmw.errors import UsageError
from prefmw.evaluation.inference import Labelled, read_labelled, score_inference
from prefmw.hearing import infer_persona, learn_from
from prefmw.preferences import Source, Stated, default_dimensions, parse_dimensions
from prefmw.preferences.anchors import Anchor, anchor_bank
from prefmw.preferences.inference import Inferer, Read, units

VOCABULARY = ["short", "long", "jokes", "funny", "grave", "tea"]
DIMENSIONS = ("verbosity", "humor")
ANCHORS = [
    Anchor("short answers", "verbosity", -1),
    Anchor("long answers", "verbosity", 1),
    Anchor("jokes", "humor", 1),
    Anchor("grave words", "humor", -1),
    Anchor("tea", None, 0),
]


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def embed(texts):
    """How often each word of the vocabulary occurs, as a unit vector."""
    counts = np.array([[words_of(text).count(word) for word in VOCABULARY] for text in texts], dtype=np.float32)
    counts = counts.reshape(-1, len(VOCABULARY))
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


class WordReadOut:
    """Verbosity by short and long, humor by jokes, funny and grave; "no" and "never" turn it round."""

    dimensions = DIMENSIONS
    poles = tuple(default_dimensions()[key].poles for key in DIMENSIONS)
    threshold = 0.5
    anchors = tuple(ANCHORS)
    vectors = embed([anchor.text for anchor in ANCHORS])

    def version(self) -> str:
        return "words"

    def read(self, clauses):
        found = np.zeros((len(clauses), 2))
        for row, clause in enumerate(clauses):
            words = words_of(clause)
            turned = -1 if {"no", "never"} & set(words) else 1
            for word, (column, side) in {"short": (0, -1), "long": (0, 1), "jokes": (1, 1), "grave": (1, -1)}.items():
                if word in words:
                    found[row, column] = 0.98 * side * turned
        return Read(found, embed(clauses))


@pytest.fixture
def inferer() -> Inferer:
    return Inferer(WordReadOut(), default_dimensions())


def found(inferer, text):
    return {key: round(one.value) for key, one in inferer.infer(text).weights.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I like short answers.", {"verbosity": -1}),
        ("No short answers.", {"verbosity": 1}),
        ("I drink tea.", {}),
        ("", {}),
        ("Short answers. No jokes!", {"verbosity": -1, "humor": -1}),
        ("I like it short, but never any jokes.", {"verbosity": -1, "humor": -1}),
    ],
)
def test_weights_are_read_from_sentences_and_clauses(inferer, text, expected):
    assert found(inferer, text) == expected


def test_the_nearest_anchors_of_the_pole_explain_a_weight(inferer):
    (proof, *_) = inferer.infer("I like short answers.").weights["verbosity"].because
    assert (proof.anchor, proof.pole, proof.clause) == ("short answers", "concise", "I like short answers.")
    assert proof.similarity == pytest.approx(1.0, abs=1e-3)


def test_of_two_opposite_statements_neither_wins(inferer):
    inference = inferer.infer("I like long answers. Keep it short.")
    assert inference.weights == {}
    for_, against = inference.conflicts["verbosity"]
    assert (for_.clause, against.clause) == ("I like long answers.", "Keep it short.")
    assert inference.as_json()["conflicts"]["verbosity"][1]["value"] < 0


def test_a_stricter_threshold_leaves_more_alone(inferer):
    assert inferer.infer("I like short answers.", threshold=0.99).weights == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One thing. Another thing!", ["One thing.", "Another thing!"]),
        ("Keep it short, and add a joke.", ["Keep it short, and add a joke.", "Keep it short", "add a joke."]),
        ("Long, but funny.", ["Long, but funny."]),
        ("a\n\nb", ["a", "b"]),
        ("  ", []),
    ],
)
def test_a_text_comes_apart_into_sentences_and_clauses_of_two_words(text, expected):
    assert [unit.text for unit in units(text)] == expected


def test_what_is_no_text_is_refused(inferer):
    for text in ("x" * 5000, "nul \0"):
        with pytest.raises(UsageError):
            inferer.infer(text)


# What is stored


def test_a_persona_is_read_once_and_again_when_it_changes(store, inferer):
    before = store.add_user("alice", persona="I like short answers.", actor="test")
    after = infer_persona(store, before, inferer)
    assert after == store.profile("alice")
    weight = after.weights["verbosity"]
    assert (weight.source, weight.value < -0.9, weight.evidence[0]["anchor"]) == (
        Source.inferred,
        True,
        "short answers",
    )
    assert infer_persona(store, after, inferer) == after
    changed = store.edit_user("alice", persona="Add jokes.", actor="test")
    assert set(infer_persona(store, changed, inferer).weights) == {"humor"}


def test_inference_never_covers_what_a_person_set(store, inferer):
    store.add_user("alice", persona="I like short answers.", actor="test")
    set_ = store.write_weights("alice", {"verbosity": Stated(0.3)}, source=Source.user, actor="test")
    assert infer_persona(store, set_, inferer).weights["verbosity"].value == 0.3


def test_what_a_message_states_is_learned_quoted_and_can_be_undone(store, inferer):
    profile = store.add_user("alice", actor="test")
    learned, notices = learn_from(store, profile, "Jokes, please! What is tea?", inferer, default_dimensions())
    weight = learned.weights["humor"]
    assert (weight.source, weight.evidence) == (Source.learned, {"quote": "Jokes, please!"})
    assert notices == [
        f'heard humor {weight.value:+.2f}, humorous, in "Jokes, please!" (undo: prefmw prefs revert alice 1)'
    ]
    again, nothing = learn_from(store, learned, "Jokes, please!", inferer, default_dimensions())
    assert (again, nothing) == (learned, [])
    assert store.revert("alice", 1, actor="alice").weights == {}


def test_a_document_is_no_wish(store, inferer):
    profile = store.add_user("alice", actor="test")
    assert learn_from(store, profile, "jokes " * 2000, inferer, default_dimensions()) == (profile, [])


# Measuring


def test_inference_is_scored_by_hand(inferer):
    statements = [
        Labelled("I like short answers.", {"verbosity": -1}),
        Labelled("I like long answers.", {"verbosity": -1}),  # labelled wrong, so one of three pairs is missed
        Labelled("No jokes.", {"humor": -1}),
        Labelled("I drink tea.", {}),
        Labelled("grave tea", {}),
    ]
    result = score_inference(statements, inferer, default_dimensions())
    assert result["sign_accuracy"] == pytest.approx(2 / 3)
    assert (result["spurious_rate"], result["neutral_accuracy"], result["n"]) == (0.0, 0.5, 5)
    assert [one["text"] for one in result["misses"]] == ["I like long answers.", "grave tea"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2"),
        ('{"text": "a"}', "line 2"),
        ('{"text": "a", "expect": {"humour": 1}}', "line 2: no dimension 'humour'"),
        ('{"text": "a", "expect": {"humor": 2}}', "line 2: a text, and sides"),
        ('{"text": 3, "expect": {}}', "line 2: a text, and sides"),
        ("[]", "line 2"),
    ],
)
def test_a_line_that_is_no_labelled_statement_is_told(tmp_path, line, message):
    file = tmp_path / "labelled.jsonl"
    file.write_text(f'{{"text": "a", "expect": {{}}}}\n{line}\n')
    with pytest.raises(UsageError, match=message):
        read_labelled(file, default_dimensions())


def test_a_file_of_nothing_is_told(tmp_path):
    file = tmp_path / "labelled.jsonl"
    file.write_text("\n")
    with pytest.raises(UsageError, match="no statement"):
        read_labelled(file, default_dimensions())
    with pytest.raises(UsageError, match="cannot be read"):
        read_labelled(tmp_path / "none.jsonl", default_dimensions())


@pytest.mark.parametrize(
    "text",
    [
        "[humor]\nretired = true",
        '[humor]\nnegative = { name = "humorous", principle = "H." }\n'
        'positive = { name = "serious", principle = "S." }',
        '[humor]\npositive = { name = "humorous", principle = "H." }',
        '[humor]\nkind = "quality"\nnegative = { name = "serious", principle = "S." }\n'
        'positive = { name = "humorous", principle = "H." }',
    ],
)
def test_what_the_registry_does_not_have_as_it_was_fitted_is_not_read(inferer, text):
    other = Inferer(WordReadOut(), parse_dimensions(text, default_dimensions()))
    assert list(other.infer("No jokes. I like short answers.").weights) == ["verbosity"]
    assert other.key("No jokes.") != inferer.key("No jokes.")


def test_what_was_inferred_on_a_retired_dimension_is_kept(store, inferer):
    store.add_user("alice", persona="No jokes. I like short answers.", actor="test")
    profile = infer_persona(store, store.profile("alice"), inferer)
    retired = Inferer(WordReadOut(), parse_dimensions("[humor]\nretired = true\n", default_dimensions()))
    profile = store.edit_user("alice", persona="I like long answers.", actor="test")
    profile = infer_persona(store, profile, retired)
    assert {key: round(weight.value) for key, weight in profile.weights.items()} == {"verbosity": 1, "humor": -1}
    assert list(infer_persona(store, profile, inferer).weights) == ["verbosity"]


# The data


def test_every_pole_has_forty_anchors_and_some_ask_for_none():
    bank = anchor_bank(default_dimensions())
    for key, dimension in default_dimensions().items():
        if dimension.kind == "style":
            for side in (-1, 1):
                assert sum((anchor.dimension, anchor.side) == (key, side) for anchor in bank) >= 40
    assert sum(anchor.dimension is None for anchor in bank) >= 200


def test_no_test_statement_is_fitted_on():
    from prefmw.training.readout import written_examples

    def bare(text: str) -> str:
        return " ".join(words_of(text))

    file = Path(__file__).parent / "statements.jsonl"
    tested = {bare(json.loads(line)["text"]) for line in file.read_text(encoding="utf-8").splitlines()}
    assert len(tested) >= 250
    dimensions = default_dimensions()
    fitted = {bare(one.text) for one in written_examples(anchor_bank(dimensions), dimensions, 0)}
    assert tested & fitted == set()


# The read-out that ships


@pytest.fixture(scope="module")
def shipped() -> Inferer:
    from prefmw.bootstrap import load_inferer
    from prefmw.settings import Settings

    return load_inferer(Settings(), default_dimensions())


def test_plain_wishes_are_read_and_their_opposites_too(shipped):
    for text, expected in (
        ("Keep your answers short.", {"verbosity": -1}),
        ("Keep your answers short", {"verbosity": -1}),
        ("Don't be too brief, I like to understand everything in depth.", {"verbosity": 1}),
        ("Please skip the jokes.", {"humor": -1}),
        ("Explain it to me like I'm five.", {"complexity": -1}),
        ("I have two cats and a bicycle.", {}),
        ("How deep should I plant garlic cloves?", {}),
        ("Fasse dich kurz.", {}),  # its embedder knows English alone
    ):
        found = shipped.infer(text).weights
        assert {key: round(one.value / abs(one.value)) for key, one in found.items()} == expected, text


def test_it_reads_unseen_statements_no_worse_than_documented(shipped):
    dimensions = default_dimensions()
    statements = read_labelled(Path(__file__).parent / "statements.jsonl", dimensions)
    row = score_inference(statements, shipped, dimensions)
    assert row["sign_accuracy"] >= 0.92
    assert row["spurious_rate"] <= 0.01
    assert row["neutral_accuracy"] >= 0.95
