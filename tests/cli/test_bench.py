"""`prefmw bench decode` on a small model: every way is timed, and it needs torch, transformers and typer alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BLOCKED = "sqlalchemy alembic pydantic_settings langchain_core langchain sentence_transformers matplotlib"


def test_every_way_is_timed_beside_every_other(prefmw, toy):
    arguments = [
        "bench",
        "decode",
        "-m",
        str(toy),
        "--users",
        "1,2",
        "--context",
        "16",
        "--tokens",
        "6",
        "--rounds",
        "2",
    ]
    code, out, _ = prefmw(*arguments, "--json")
    assert code == 0
    result = json.loads(out)
    methods = ["none", "linear", "pad", "generate", "two-forward", "cfg"]
    assert [(row["method"], row["users"]) for row in result["rows"]] == [(m, u) for u in (1, 2) for m in methods]
    asked = "method users context dtype ratio_to_plain ratio_to_generate tokens_per_s ttft_ms"
    assert all(set(asked.split()) <= set(row) for row in result["rows"])
    assert all({"parked_ttft_ms", "memory_mb"} <= set(row) for row in result["rows"] if row["method"] in methods[:3])
    assert all(row["ratio_to_plain"] == 1.0 for row in result["rows"] if row["method"] == "none")
    assert "together_to_one_by_one" in next(r for r in result["rows"] if (r["method"], r["users"]) == ("linear", 2))
    code, out, _ = prefmw(*arguments, "--methods", "linear")
    assert (code, "two-forward" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --model or --shape"),
        (["--shape", "nowhere"], "there is 60m"),
        (["--shape", "60m", "--methods", "dpa"], "no method 'dpa' to time"),
        (["--shape", "60m", "--users", "none"], "--users takes whole numbers"),
        (["--shape", "60m", "--dtype", "int3"], "no dtype 'int3'"),
        (["--shape", "60m", "--context", "9000"], "exceed 8192"),
    ],
)
def test_wrong_use_is_told_before_anything_is_built(prefmw, arguments, message):
    code, out, err = prefmw("bench", "decode", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_it_needs_torch_transformers_and_typer_alone(toy):
    program = f"""
import sys
for name in {BLOCKED.split()!r}:
    sys.modules[name] = None
sys.argv = "prefmw bench decode --context 8 --tokens 3 --rounds 1 --json -m".split() + [{str(toy)!r}]
from prefmw.cli.main import main
main()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["rows"]) == 6


def test_the_store_is_timed_and_loses_nothing(prefmw, tmp_path):
    code, out, err = prefmw(
        "bench", "store", "-d", str(tmp_path / "b.db"), "--people", "200", "--samples", "500", "--json"
    )
    assert code == 0, err
    load, read, write, crowd = json.loads(out)["rows"]
    assert load["n"] == 200
    assert 0 < read["p50_ms"] <= read["p99_ms"] <= read["max_ms"]
    assert write["n"] == 500
    assert (crowd["lost"], crowd["errors"]) == (0, 0), crowd


def test_the_store_is_not_timed_among_real_people(prefmw):
    prefmw("users", "add", "alice")
    home = prefmw("db", "current", "--json")
    database = json.loads(home[1])["database"]
    code, _, err = prefmw("bench", "store", "-d", database, "--people", "10", "--samples", "100")
    assert (code, "holds people" in err) == (2, True)
