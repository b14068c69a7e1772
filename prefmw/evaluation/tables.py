"""Results as tables: the same columns on a terminal, on a page and in a document, whichever command measured them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prefmw.errors import UsageError
from prefmw.evaluation.steer import Condition

Row = Mapping[str, Any]

ALL = "all"


class Table(NamedTuple):
    """Column heads and cells, as people read them."""

    head: list[str]
    body: list[list[str]]


class Kind(NamedTuple):
    """What a command's result is called, what it means, and how each of its lists of rows is put."""

    title: str
    about: str
    tables: Mapping[str, Callable[[Sequence[Row]], Table]]


def tables_of(result: Mapping[str, Any]) -> dict[str, Table]:
    """Every list of rows in a result as a table; those of a command that is not known here with all their plain
    columns.

    Raises:
        UsageError: rows lack what the command's have.
    """
    kind = KINDS.get(result.get("command", ""))
    known = kind.tables if kind else {}
    found = {}
    for name, rows in result.items():
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            try:
                found[name] = known.get(name, plain_table)(rows)
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(
                    f"the result of 'eval {str(result.get('command'))[:40]}' is not one of this version's: its {name} "
                    f"lack or spoil {str(error)[:60]}; delete it and run again"
                ) from error
    return found


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(row: Row | None, digits: int = 2) -> str:
    """A row's 95% interval."""
    ends = row.get("ci95") if row else None
    if not ends:
        return "–"
    low, high = (f"{end:.{digits}f}" for end in ends)
    return f"{low}–{high}" if ends[0] >= 0 else f"{low} to {high}"


def difference(row: Row | None) -> str:
    """A paired difference with its interval."""
    return f"{row['mean']:+.2f} ({interval(row)})" if row else "–"


def label(row: Row) -> str:
    """The method with what it was asked with."""
    one = Condition(row["method"], row.get("strength"), top_k=row.get("top_k"))
    return one.label


def plain_table(rows: Sequence[Row]) -> Table:
    """Every column that holds a number or a word."""
    head = [key for key in rows[0] if not isinstance(rows[0][key], Mapping)]

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, list):
            return " to ".join(cell(one) for one in value)
        return "–" if value is None else str(value)

    return Table(head, [[cell(row.get(key)) for key in head] for row in rows])


def pivoted(rows: Sequence[Row], group: str, value: str, tail: Mapping[str, Callable[[Row], str]]) -> Table:
    """A line a method, a column each value of ``group`` and one over all with its interval, then what ``tail`` makes of
    the row over all.
    """
    groups = [name for name in dict.fromkeys(row[group] for row in rows) if name != ALL]
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["method"], row.get("strength"), row.get("temperature"), row.get("top_k"))
        lines.setdefault(key, {})[row[group]] = row
    heats = [key[2] for key in lines]
    usual = max(heats, key=heats.count) if heats else None
    body = []
    for key, line in lines.items():
        whole = line.get(ALL)
        first = next(iter(line.values()))
        name = label(first) + ("" if key[2] in (None, usual) else f" at {key[2]:g}")
        cells = [number(line[one][value]) if one in line else "–" for one in groups]
        over_all = [number(whole[value]), interval(whole), *(make(whole) for make in tail.values())] if whole else []
        body.append([name, *cells, *over_all])
    return Table(["method", *groups, ALL, "95%", *tail], body)


def steer_table(rows: Sequence[Row]) -> Table:
    """``eval steer``: followed styles by axis."""
    judged: dict[str, Callable[[Row], str]] = {}
    if any("second_opinion" in row for row in rows):
        judged["second opinion"] = lambda row: number(row.get("second_opinion"))
    return pivoted(
        rows,
        "axis",
        "followed",
        {
            **judged,
            "over prompting": lambda row: difference(row.get("over_prompt")),
            "relevant": lambda row: number(row["relevance"]),
            "helpful": lambda row: number(row["helpfulness"], 0),
            "loops": lambda row: number(row["repetition"], 3),
            "off axis": lambda row: number(row["off_axis"]),
            "cost": lambda row: number(row["cost_ratio"], 1),
        },
    )


def choice_table(rows: Sequence[Row]) -> Table:
    """``eval choice``: accuracy by domain, as Linear Alignment's table 2."""
    return pivoted(
        rows,
        "domain",
        "accuracy",
        {
            "over prompting": lambda row: difference(row.get("over_prompt")),
            "no choice": lambda row: number(row["no_choice"]),
            "cost": lambda row: number(row["cost_ratio"], 1),
        },
    )


def dials_table(rows: Sequence[Row]) -> Table:
    """``eval dials``: an axis' measure by its weight."""
    head = ["gain", "axis", "weight", "mean", "95%", "off axis", "relevant", "loops"]
    body = [
        [
            f"{row['strength']:g}",
            row["axis"],
            f"{row['weight']:+g}",
            number(row["mean"]),
            interval(row),
            *(number(row[key]) for key in ("off_axis", "relevance", "repetition")),
        ]
        for row in rows
    ]
    return Table(head, body)


def chords_table(rows: Sequence[Row]) -> Table:
    """``eval dials``: three weights at once."""
    return pivoted(
        rows,
        "axis",
        "followed",
        {"relevant": lambda row: number(row["relevance"]), "loops": lambda row: number(row["repetition"])},
    )


def rewards_table(rows: Sequence[Row]) -> Table:
    """``eval rewards``: PAD's table 2, with diversity."""
    names = [name for name in dict.fromkeys(row["reward"] for row in rows) if name != ALL]
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((label(row), row["temperature"]), {})[row["reward"]] = row
    heats = [heat for _, heat in lines]
    body = []
    for (method, heat), line in lines.items():
        whole = line[ALL]
        cells = [f"{number(line[name]['mean'])} ({interval(line[name])})" for name in names]
        over = [difference(line[name].get("over_prompt")) for name in names]
        won = {"ci95": whole.get("win_ci95")}
        wins = f"{number(whole['win_rate'])} ({interval(won)})" if "win_rate" in whole else "–"
        name = method if heat == max(heats, key=heats.count) else f"{method} at {heat:g}"
        body.append([name, *cells, *over, number(whole["diversity"]), wins, number(whole["cost_ratio"], 1)])
    heads = [f"{name} over prompting" for name in names]
    return Table(["method", *names, *heads, "diversity", "win rate", "cost"], body)


def points_table(rows: Sequence[Row]) -> Table:
    """``eval control``: what each direction gives, or with ``--robust`` each way of choosing."""
    if rows and "how" in rows[0]:
        head = ["policy", "angle", "how", "v · r", "95%", "helpful", "verbosity", "over best of as many"]
        return Table(
            head,
            [
                [
                    row["policy"],
                    f"{row['angle']:+g}°",
                    row["how"],
                    number(row["value"], 1),
                    interval(row, 1),
                    number(row["helpfulness"], 1),
                    number(row["verbosity"], 1),
                    difference(row.get("over_best_of")),
                ]
                for row in rows
            ],
        )
    head = ["policy", "asked", "helpful", "95%", "verbosity", "95%", "words", "relevant", "loops"]
    body = []
    for row in rows:
        measured = []
        for name in ("helpfulness", "verbosity"):
            measured += [number(row[name], 1), interval({"ci95": row[f"{name}_ci95"]}, 1)]
        told = (number(row["words"], 1), number(row["relevance"]), number(row["repetition"], 3))
        body.append([row["policy"], row["asked"], *measured, *told])
    return Table(head, body)


def fronts_table(rows: Sequence[Row]) -> Table:
    """``eval control``: how verbosity goes with the angle, and each policy's hypervolumes."""
    head = ["policy", "points", "falls", "spearman", "brief", "95%", "long", "95%"]
    body = []
    for row in rows:
        falls = "–" if row["falls"] is None else f"{row['falls']} of {row['points'] - 1}"
        volumes = []
        for name in ("brief", "long"):
            volumes += [number(row[name], 3), interval({"ci95": row[f"{name}_ci95"]}, 3)]
        body.append([row["policy"], str(row["points"]), falls, number(row["spearman"], 3), *volumes])
    return Table(head, body)


def volumes_table(rows: Sequence[Row]) -> Table:
    """``eval control``: how much a policy's hypervolumes are above another's."""
    head = ["policy", "over", "brief", "long"]
    body = []
    for row in rows:
        gains = [f"{row[name]['mean']:+.3f} ({interval(row[name], 3)})" for name in ("brief", "long")]
        body.append([row["policy"], row["other"], *gains])
    return Table(head, body)


def accuracy_table(rows: Sequence[Row]) -> Table:
    """``eval choices --model``: how many of a person's other choices are predicted."""
    head = ["learner", "choices", "predicted", "95%"]
    body = [[row["learner"], str(row["choices"]), number(row["accuracy"], 3), interval(row, 3)] for row in rows]
    return Table(head, body)


def learners_table(rows: Sequence[Row]) -> Table:
    """``eval choices``: how near what is learned comes to the truth."""
    head = ["learner", "wrong", "cosine", "95%", "enough for random pairs'"]
    body = [
        [
            row["learner"],
            f"{row['wrong']:g}",
            number(row["cosine"], 3),
            interval(row, 3),
            f"{row['enough']} of {row['choices']}" if row["enough"] else "",
        ]
        for row in rows
    ]
    return Table(head, body)


KINDS = {
    "steer": Kind(
        "Steering",
        "How often a reply has the style that its reader asked for, by the oracles: the right sign and a size of at "
        "least 0.2. Intervals resample preferences; cost is the time per token over that of plain replies.",
        {"rows": steer_table},
    ),
    "choice": Kind(
        "Personal choice",
        "How often the answer written for whoever asks is chosen, of four. 0.25 is chance. Intervals resample "
        "questions; cost is the time per token over that of plain decoding.",
        {"rows": choice_table},
    ),
    "rewards": Kind(
        "Rewards",
        "What reward models make of each method's replies; diversity is the product of unique over all 2-, 3- and "
        "4-grams; the win rate is over the replies of the model left alone. Intervals resample preferences.",
        {"rows": rewards_table},
    ),
    "dials": Kind(
        "Dials",
        "How far each style moves with its weight under Drift, by the oracles' measure in [-1, 1]; and three weights "
        "at once.",
        {"dials": dials_table, "chords": chords_table},
    ),
    "control": Kind(
        "Directions",
        "What replies are worth to a reader and how long they are, by the oracles, 0 to 100, under directions from "
        "long to brief. Brief and long are hypervolumes: the share of the square of (helpfulness, brevity) or "
        "(helpfulness, length) from (0, 0) that a front dominates. Intervals resample questions.",
        {"rows": points_table, "fronts": fronts_table, "over": volumes_table},
    ),
    "choices": Kind(
        "Learning from choices",
        "The cosine of the weights learned from simulated people's choices to the weights that they chose by; between "
        "a model's own replies, the share of their other choices that what was learned predicts.",
        {"rows": learners_table, "accuracy": accuracy_table},
    ),
}
"""By command."""
