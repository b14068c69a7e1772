"""Personal choice: the data's form, who is drawn, how a choice is read, and that steering towards a person shows."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from prefmw.errors import UsageError
from prefmw.evaluation.choice import (
    COLUMNS,
    choice_conditions,
    choice_rows,
    composed_questions,
    draw,
    letter_of,
    of_split,
    read_questions,
    shipped_questions,
    some,
)
from prefmw.evaluation.runs import Run
from prefmw.evaluation.steer import Condition
from prefmw.preferences import Message, default_dimensions, persona_sentence
from prefmw.scoring import Exchange, reply_tokens

ROW = {name: f"{name} text" for name in COLUMNS}


@pytest.fixture(scope="module")
def shipped():
    return shipped_questions()


def test_enough_questions_ship_in_five_domains(shipped):
    assert len(shipped) >= 120
    assert set(Counter(one.domain for one in shipped).values()) == {25}
    assert set(Counter((one.domain, one.split) for one in shipped).values()) == {8, 17}
    assert len({one.question for one in shipped}) == len(shipped)
    for one in shipped:
        assert len(set(one.people)) == len(set(one.answers)) == 4


def test_the_same_seed_draws_the_same_people_evenly(shipped):
    drawn = draw(shipped, 42)
    assert drawn == draw(shipped, 42) != draw(shipped, 43)
    # 125 draws of four: fewer than 16 of any has a chance below 1e-3
    assert min(Counter(one.right for one in drawn).values()) >= 16
    assert all(one.stranger not in one.question.people for one in drawn)


def test_fewer_questions_are_of_every_domain(shipped):
    few = some(shipped, 40, 1)
    assert len(few) == 40
    assert few == some(shipped, 40, 1) != some(shipped, 40, 2)
    assert len({one.domain for one in few}) == 5
    assert some(shipped, None, 0) == some(shipped, 999, 0) == shipped


def test_everybody_asks_once(shipped):
    drawn = draw(shipped[:3], 0, everybody=True)
    assert [(one.question, one.right) for one in drawn] == [(q, k) for q in shipped[:3] for k in range(4)]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", 0),
        (" B.", 1),
        ("\nC because", 2),
        ("D", 3),
        ("a", None),
        ("", None),
        ("The answer is A", None),
        ("E", None),
    ],
)
def test_the_first_character_is_the_choice(text, choice):
    assert letter_of(text) == choice


def written(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_the_paper_s_columns_are_read(tmp_path):
    (one,) = read_questions(written(tmp_path, [ROW]))
    assert one.people == tuple(f"preference_{letter} text" for letter in "abcd")
    assert one.answers[2] == "answer_c text"
    assert of_split([one], "test") == [one]
    path = tmp_path / "data.csv"
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(ROW[name] for name in COLUMNS) + "\n")
    assert read_questions(path) == [one]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no question"),
        ([{"question": "x", "answer": "y"}], "domain, preference_a.* are missing; found question, answer"),
        ([ROW, {**ROW, "answer_b": " "}], "row 2: answer_b must be a text that is not empty"),
        ([{**ROW, "preference_c": 3}], "preference_c must be a text"),
        (["text"], "that are no objects"),
    ],
)
def test_data_of_another_form_is_refused(tmp_path, rows, said):
    with pytest.raises(UsageError, match=said):
        read_questions(written(tmp_path, rows))


def test_a_split_that_is_not_there_is_refused(tmp_path):
    questions = read_questions(written(tmp_path, [{**ROW, "split": "train"}]))
    with pytest.raises(UsageError, match="there are train"):
        of_split(questions, "test")


def test_conditions_hold_the_controls():
    names = [
        row.label for row in choice_conditions(["none", "prompt", "linear", "pad"], [], "likelihood", controls=True)
    ]
    assert names == [
        *(
            "none",
            "prompt",
            "linear 2",
            "pad 1",
            "sharpened 2",
            "shuffled 2",
            "contrast",
            "pad-prefix 1",
            "pad-weights 1",
        )
    ]
    assert "contrast" not in [row.name for row in choice_conditions(["linear"], [], "letter", controls=True)]
    assert {row.temperature for row in choice_conditions(["linear"], [1.0], "letter", controls=True)} == {0.0}


def rows_of(drawn, names, backend, way="likelihood", run=None):
    conditions = [Condition(name, 2.0 if name in ("linear", "sharpened", "shuffled") else None, 0.0) for name in names]
    return choice_rows(drawn, conditions, way, backend, default_dimensions(), run or Run("choice", {}))


def test_likelihood_chooses_the_answer_of_the_highest_mean(tiny, shipped):
    """Against whole forwards, answer by answer."""
    from prefmw.evaluation.choice import _chosen
    from prefmw.evaluation.held_out import profile_of
    from prefmw.steering import with_principle

    drawn = draw(shipped[:4], 1)
    chosen = _chosen(drawn, Condition("prompt", None, 0.0), "likelihood", tiny, default_dimensions(), lambda n: None)
    for one, choice in zip(drawn, chosen["choices"], strict=True):
        messages = [Message("user", one.question.question)]
        principle = persona_sentence(profile_of({}, one.person))
        context = tiny.chat.template.encode(with_principle(messages, principle, tiny.chat))
        answers = [reply_tokens(Exchange(messages, answer), tiny.chat) for answer in one.question.answers]
        means = [float(read.mean()) for read in tiny.engine.log_probabilities([(context, ids) for ids in answers])]
        assert choice == means.index(max(means))


def test_steering_towards_a_person_is_seen_on_the_embedded_model(tiny):
    drawn = draw(composed_questions("dev", 24, 0), 0, everybody=True)
    done = []
    table = choice_rows(
        drawn,
        [Condition("none", None, 0.0), Condition("prompt", None, 0.0), Condition("linear", 2.0, 0.0)],
        "likelihood",
        tiny,
        default_dimensions(),
        Run("choice", {}),
        lambda condition, count: done.append((condition.name, count)),
    )
    whole = {row["method"]: row for row in table if row["domain"] == "all"}
    assert whole["none"]["accuracy"] == 0.25  # whoever asks, the plain model chooses the same answer
    assert whole["linear"]["accuracy"] > 0.4
    assert whole["linear"]["over_prompt"]["mean"] > 0
    assert done[-1] == ("linear", 96)
    assert all(low <= row["accuracy"] <= high for row in table for low, high in [row["ci95"]])


def test_the_total_is_the_domains_weighted_by_their_sizes(tiny, shipped):
    table = rows_of(draw(shipped[20:31], 0), ["none"], tiny)
    *domains, whole = table
    assert [row["n"] for row in domains] == [5, 6]
    assert whole["accuracy"] == pytest.approx(sum(row["n"] * row["accuracy"] for row in domains) / 11, abs=1e-3)


def test_letters_are_asked_for_and_a_reply_without_one_is_no_choice(tiny, shipped):
    table = rows_of(draw(shipped[:2], 0), ["none", "linear", "shuffled"], tiny, way="letter")
    assert all(0 <= row["accuracy"] <= 1 - row["no_choice"] for row in table)


def test_a_run_that_goes_on_asks_no_more_than_is_left(tiny, shipped, tmp_path, monkeypatch):
    drawn = draw(shipped[:2], 0)
    first = rows_of(drawn, ["none"], tiny, run=Run("choice", {"seed": 0}, tmp_path / "run"))
    from prefmw.evaluation import choice

    asked = []
    original = choice._chosen

    def counted(drawn, condition, *rest):
        asked.append(condition.name)
        return original(drawn, condition, *rest)

    monkeypatch.setattr(choice, "_chosen", counted)
    again = rows_of(drawn, ["none", "sharpened"], tiny, run=Run("choice", {"seed": 0}, tmp_path / "run"))
    assert asked == ["none", "sharpened"]  # the first warms up
    assert again[: len(first)] == first
