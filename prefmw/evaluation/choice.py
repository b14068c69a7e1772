"""Does a model choose, of four answers, the one for whoever asks? Linear Alignment's personal preference questions.

A question has four people and an answer for each of them. One of the people is drawn and described to the model, whose
choice is right where it is that person's answer. Two ways to read the choice:

- ``letter``, the paper's: the four answers are listed as A to D, the assistant's turn is opened with "Answer:", at most
  ten tokens follow, and the first character is the choice.
- ``likelihood``, for models too small to choose by letters: the answer whose tokens, its end among them, have the
  highest mean log-probability under the aligned distribution, as replies to the question alone.

Controls: ``sharpened``, prompting at a temperature of 1 / (1 + ratio); ``shuffled``, another question's person;
``contrast``, the answer that the principle makes likelier by the most, mean of log p(with) - log p(without), where
Linear Alignment ends up as its ratio grows; beside PAD its prefix alone and w_p alone.

Source: Gao et al., "Linear Alignment", section 5.2 and Appendix B; figure 5 is the sweep of its step size, here the
ratio.
"""

from __future__ import annotations

import csv
import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from prefmw.alignment import Combined
from prefmw.decoding import Request
from prefmw.decoding.forced import look_into
from prefmw.errors import UsageError
from prefmw.evaluation.held_out import profile_of
from prefmw.evaluation.runs import Run
from prefmw.evaluation.statistics import cluster_interval
from prefmw.evaluation.steer import Condition, conditions, request_of, said_to
from prefmw.preferences import Dimensions, Message, Profile
from prefmw.scoring import Exchange, reply_tokens
from prefmw.steering import Backend
from prefmw.training.composer import Composer
from prefmw.training.rows import read_rows
from prefmw.training.styles import AXES, Split, load_styles, pole_name

Way = Literal["letter", "likelihood"]

LETTERS = "ABCD"

COLUMNS = ("domain", "question", *(f"{kind}_{letter}" for kind in ("preference", "answer") for letter in "abcd"))
"""Of the paper's data, and of any other."""

SYSTEM = "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe."
"""The system prompt of the letter way, as released."""

MAX_TOKENS = 10
"""Tokens that a letter may take to come."""

ALL = "all"


@dataclass(frozen=True)
class Question:
    """A question with four people and an answer for each."""

    domain: str
    question: str
    people: tuple[str, ...]
    answers: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class Drawn:
    """A question, which of its people asks, and who stands in under the shuffled control."""

    question: Question
    right: int
    stranger: str

    @property
    def person(self) -> str:
        """Who asks."""
        return self.question.people[self.right]


def read_questions(path: Path) -> list[Question]:
    """The questions in a file of JSON lines, a JSON list, CSV or Parquet with the paper's columns.

    Raises:
        UsageError: the file cannot be read or is empty, or a row lacks a column or holds no text there.
    """
    left_out: Counter[str] = Counter()
    rows = _csv(path) if path.suffix == ".csv" else list(read_rows(path, left_out))
    if not rows or left_out:
        told = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UsageError(f"'{path}' holds {'rows ' + told if told else 'no question'}; expected one question a row")
    return [_question(row, number, path) for number, row in enumerate(rows, start=1)]


def shipped_questions() -> list[Question]:
    """The 125 questions that were written for this project, 25 a domain."""
    with as_file(files("prefmw.evaluation") / "choice_questions.jsonl") as path:
        return read_questions(path)


def digest(questions: Sequence[Question]) -> str:
    """What tells data apart whose name is the same."""
    return hashlib.sha256(repr(list(questions)).encode()).hexdigest()[:16]


def composed_questions(split: Split, n: int, seed: int) -> list[Question]:
    """``n`` questions that the embedded model can read: held-out questions of its topics, people in held-out wordings
    of four poles each, and the composer's answers in those poles.
    """
    rng, composer = random.Random(f"{split}:{seed}:choice"), Composer(split, seed=seed, follow_rate=1.0)
    found = []
    topics = rng.sample(composer.topics, len(composer.topics))
    for index in range(n):
        topic = topics[index % len(topics)]
        axes = rng.sample(AXES, len(LETTERS))
        wanted = [{axis: rng.choice((-1, 1))} for axis in axes]
        wordings = [load_styles().wordings[split][pole_name(*next(iter(one.items())))] for one in wanted]
        people = tuple(rng.choice([*one.personas, *one.indirect]) for one in wordings)
        answers = tuple(composer.answer(topic, one).text for one in wanted)
        found.append(Question(topic.domain, rng.choice(topic.held_out(split)), people, answers))
    return found


def of_split(questions: Sequence[Question], split: str) -> list[Question]:
    """Those of a split; data without a ``split`` column is all one.

    Raises:
        UsageError: there are none.
    """
    found = [question for question in questions if question.split in ("", split)]
    if not found:
        known = ", ".join(sorted({question.split for question in questions}))
        raise UsageError(f"no question is of the split '{split[:40]}'; there are {known}")
    return found


def some(questions: Sequence[Question], n: int | None, seed: int) -> list[Question]:
    """At most ``n`` of them at random, in their order, so that every domain has its share."""
    if n is None or n >= len(questions):
        return list(questions)
    chosen = sorted(random.Random(f"{seed}:some").sample(range(len(questions)), n))
    return [questions[index] for index in chosen]


def draw(questions: Sequence[Question], seed: int, *, everybody: bool = False) -> list[Drawn]:
    """For each question one of its people, at random; or ``everybody``, each of them once."""
    rng = random.Random(seed)
    if everybody:
        questions = [question for question in questions for _ in LETTERS]
        rights = [index % len(LETTERS) for index in range(len(questions))]
    else:
        rights = [rng.randrange(len(LETTERS)) for _ in questions]
    return [
        Drawn(
            question,
            right,
            rng.choice([other for other in questions if other is not question] or [question]).people[right],
        )
        for question, right in zip(questions, rights, strict=True)
    ]


def choice_conditions(
    methods: Sequence[str], strengths: Sequence[float], way: Way, *, ratios: Sequence[float] = (), controls: bool
) -> list[Condition]:
    """The rows of a table, greedy: each method, once per strength where it takes one (linear once per ratio, where
    ``ratios`` are given), then the controls.

    Raises:
        UsageError: an unknown method, or a strength out of range.
    """
    rows = []
    for method in methods:
        rows += conditions([method], ratios if method == "linear" and ratios else strengths, 0.0, controls=False)
    rows = [replace(row, temperature=0.0) for row in rows]
    if controls:
        for ratio in [row.strength for row in rows if row.name == "linear"]:
            rows += [Condition(name, ratio, 0.0) for name in ("sharpened", "shuffled")]
        if way == "likelihood" and any(row.name == "linear" for row in rows):
            rows.append(Condition("contrast", None, 0.0))
        for row in [row for row in rows if row.name == "pad"]:
            rows += [replace(row, name=name) for name in ("pad-prefix", "pad-weights")]
            rows += [replace(row, name="persrm", strength=1.0)] if row.strength != 1 else []
    return list(dict.fromkeys(rows))


def choice_rows(
    drawn: Sequence[Drawn],
    conditions: Iterable[Condition],
    way: Way,
    backend: Backend,
    dimensions: Dimensions,
    run: Run,
    progress: Callable[[Condition, int], None] = lambda condition, count: None,
) -> list[dict[str, Any]]:
    """Per condition one row a domain and one over ``all``, the mean over questions, which is the domains' weighted by
    their sizes.

    ``ci95`` resamples questions; ``over_prompt`` is the paired difference to prompting; ``no_choice`` the share of
    replies that begin with no letter; ``cost_ratio`` the time per token over that of ``none``.
    """
    rows: list[dict[str, Any]] = []
    domains = list(dict.fromkeys(one.question.domain for one in drawn))
    prompted: list[float] | None = None
    plain_cost: float | None = None
    _chosen(drawn[:2], Condition("none", temperature=0.0), way, backend, dimensions, lambda count: None)  # warms up
    for condition in conditions:

        def choose(condition: Condition = condition) -> dict[str, Any]:
            return _chosen(drawn, condition, way, backend, dimensions, lambda count: progress(condition, count))

        kept = run.unit(repr(condition), choose)
        progress(condition, len(drawn))
        hits = [float(choice == one.right) for choice, one in zip(kept["choices"], drawn, strict=True)]
        plain_cost = kept["seconds"] if condition.name == "none" else plain_cost
        prompted = hits if condition.name == "prompt" else prompted
        for domain in (*domains, ALL):
            at = [index for index, one in enumerate(drawn) if domain in (one.question.domain, ALL)]
            row: dict[str, Any] = {
                "method": condition.name,
                "strength": condition.strength,
                "domain": domain,
                "n": len(at),
            }
            asked = [drawn[index].question for index in at]
            row |= _share("accuracy", [hits[index] for index in at], asked)
            row["no_choice"] = round(sum(kept["choices"][index] is None for index in at) / len(at), 4)
            row["cost_ratio"] = round(kept["seconds"] / plain_cost, 3) if plain_cost else None
            if prompted is not None and condition.name != "prompt":
                better = _share("mean", [hits[index] - prompted[index] for index in at], asked)
                row["over_prompt"] = better
            rows.append(row)
    return rows


def _share(name: str, values: Sequence[float], asked: Sequence[Question]) -> dict[str, Any]:
    low, high = cluster_interval(values, [question.question for question in asked])
    return {name: round(sum(values) / len(values), 4), "ci95": [round(low, 4), round(high, 4)]}


def _chosen(
    drawn: Sequence[Drawn],
    condition: Condition,
    way: Way,
    backend: Backend,
    dimensions: Dimensions,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """The index of the answer chosen for each question, ``None`` for none, and the seconds a token took."""
    people = [profile_of({}, one.stranger if condition.name == "shuffled" else one.person) for one in drawn]
    choose = _by_letter if way == "letter" else _by_likelihood
    started = time.perf_counter()
    choices, tokens = choose(drawn, people, condition, backend, dimensions, progress)
    return {"choices": choices, "seconds": (time.perf_counter() - started) / max(1, tokens)}


def _by_letter(
    drawn: Sequence[Drawn],
    people: Sequence[Profile],
    condition: Condition,
    backend: Backend,
    dimensions: Dimensions,
    progress: Callable[[int], None],
) -> tuple[list[int | None], int]:
    requests = []
    for one, person in zip(drawn, people, strict=True):
        listed = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, one.question.answers, strict=True))
        asked = (
            f"Question: {one.question.question}\n{listed}\nYou need to choose the best answer for the given question."
        )
        messages = [Message("system", SYSTEM), Message("user", asked)]
        request = request_of(messages, person, condition, backend, dimensions, opening=(("Answer:", False),))
        requests.append(replace(request, sampling=replace(request.sampling, max_tokens=MAX_TOKENS)))
    choices: list[int | None] = []
    tokens = 0
    for ids, _ in said_to(requests, backend):
        text = backend.chat.tokenizer.decode(ids, skip_special_tokens=True)
        choices.append(letter_of(text))
        tokens += len(ids) + 1
        progress(len(choices))
    return choices, tokens


def letter_of(text: str) -> int | None:
    """The choice that a reply begins with, white space apart: 0 for A; ``None`` where it is no letter from A to D."""
    first = text.strip()[:1]
    return LETTERS.index(first) if first and first in LETTERS else None


def _by_likelihood(
    drawn: Sequence[Drawn],
    people: Sequence[Profile],
    condition: Condition,
    backend: Backend,
    dimensions: Dimensions,
    progress: Callable[[int], None],
) -> tuple[list[int | None], int]:
    replies: list[tuple[Request, list[int]]] = []
    contrast = condition.name == "contrast"
    asked_by = replace(condition, name="linear", strength=1.0) if contrast else condition
    for one, person in zip(drawn, people, strict=True):
        messages = [Message("user", one.question.question)]
        request = request_of(messages, person, asked_by, backend, dimensions)
        replies += [
            (request, reply_tokens(Exchange(messages, answer), backend.chat)) for answer in one.question.answers
        ]
    seen = look_into(
        replies, backend.engine, _gain if contrast else _aligned, progress=lambda count: progress(count // len(LETTERS))
    )
    means = [sum(one) / len(one) for one in seen]
    grouped = [means[at : at + len(LETTERS)] for at in range(0, len(means), len(LETTERS))]
    return [four.index(max(four)) for four in grouped], sum(len(one) for one in seen)


def _log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of tokens (B,) under logits (B, V)."""
    logits = logits.float()
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


def _aligned(combined: Combined, views: Sequence[Tensor], tokens: Tensor) -> list[float]:
    found: list[float] = _log_probability(combined.logits, tokens).tolist()
    return found


def _gain(combined: Combined, views: Sequence[Tensor], tokens: Tensor) -> list[float]:
    without, with_principle = (_log_probability(view, tokens) for view in views)
    found: list[float] = (with_principle - without).tolist()
    return found


def _csv(path: Path) -> list[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"'{path}' cannot be read as CSV in UTF-8") from error


def _question(row: Mapping[str, Any], number: int, path: Path) -> Question:
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        found = ", ".join(str(name)[:40] for name in row) or "none"
        raise UsageError(f"'{path}', row {number}: the columns {', '.join(missing)} are missing; found {found}")
    empty = [name for name in COLUMNS if not isinstance(row[name], str) or not row[name].strip()]
    if empty:
        raise UsageError(f"'{path}', row {number}: {', '.join(empty)} must be a text that is not empty")
    people, answers = (tuple(row[f"{kind}_{letter}"].strip() for letter in "abcd") for kind in ("preference", "answer"))
    split = row.get("split") or ""
    return Question(row["domain"].strip(), row["question"].strip(), people, answers, str(split))
