"""Tables: what a row says stands where it belongs."""

from __future__ import annotations

import pytest

from prefmw.errors import UsageError
from prefmw.evaluation.tables import interval, pivoted, plain_table, tables_of


def row(method, axis, followed, **more):
    ends = [followed - 0.1, followed + 0.1]
    return {"method": method, "strength": None, "axis": axis, "followed": followed, "ci95": ends, **more}


def test_a_line_a_method_and_a_column_a_group():
    rows = [row("none", "humor", 0.2), row("none", "all", 0.3), row("prompt", "humor", 0.5), row("prompt", "all", 0.6)]
    table = pivoted(rows, "axis", "followed", {"twice": lambda row: f"{2 * row['followed']:.1f}"})
    assert table.head == ["method", "humor", "all", "95%", "twice"]
    assert table.body == [
        ["none", "0.20", "0.30", "0.20–0.40", "0.6"],
        ["prompt", "0.50", "0.60", "0.50–0.70", "1.2"],
    ]


def test_other_temperatures_are_named():
    rows = [row("prompt", "all", 0.5, temperature=heat) for heat in (0.7, 0.3)] + [
        row("none", "all", 0, temperature=0.7)
    ]
    assert [line[0] for line in pivoted(rows, "axis", "followed", {}).body] == ["prompt", "prompt at 0.3", "none"]


def test_intervals_below_zero_are_spelled_out():
    assert interval({"ci95": [-0.1, 0.2]}) == "-0.10 to 0.20"
    assert interval({}) == interval(None) == "–"


def test_an_unknown_command_s_rows_are_shown_as_they_are():
    result = {
        "command": "new",
        "rows": [{"name": "x", "value": 0.123456, "ends": [1.0, 2.0], "more": {}, "none": None}],
    }
    (table,) = tables_of(result).values()
    assert table == plain_table(result["rows"])
    assert table.head == ["name", "value", "ends", "none"]
    assert table.body == [["x", "0.1235", "1 to 2", "–"]]


def test_rows_of_another_kind_are_told():
    with pytest.raises(UsageError, match="eval choice.*rows"):
        tables_of({"command": "choice", "rows": [{"a": 1}]})
