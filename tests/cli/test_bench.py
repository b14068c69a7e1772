"""`prefmw bench decode` on a small model: every way is timed, and it needs torch, transformers and typer alone."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefmw.cli import bench
from prefmw.evaluation.decode_speed import METHODS, VIEWS, _Bench

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
        (["--shape", "60m", "--methods", ""], "--methods joins its values by commas and leaves none empty"),
        (["--shape", "60m", "--methods", "none,pad,none"], "--methods names none twice"),
        (["--shape", "60m", "--users", "none"], "--users takes whole numbers"),
        (["--shape", "60m", "--users", "0"], "--users takes whole numbers from 1"),
        (["--shape", "60m", "--users", "9" * 5000], "--users takes whole numbers"),
        (["--shape", "60m", "--users", "1,,2"], "--users joins its values by commas and leaves none empty"),
        (["--shape", "60m", "--users", "2,02"], "--users names 2 twice"),
        (["--shape", "60m", "--context", "64,64"], "--context names 64 twice"),
        (["--shape", "60m", "--dtype", "float32", "--dtype", "float32"], "--dtype names float32 twice"),
        (["--shape", "60m", "--device", "abacus"], "no device 'abacus'"),
        (["-m", "tinny"], "did you mean 'tiny'?"),
        (["--shape", "60m", "--dtype", "int3"], "no dtype 'int3'"),
        (["--shape", "60m", "--context", "9000"], "exceed the model's 8192"),
        (["--shape", "60m", "--context", "16,9000"], "exceed the model's 8192"),
    ],
)
def test_wrong_use_is_told_before_anything_is_built(prefmw, arguments, message):
    code, out, err = prefmw("bench", "decode", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_document_names_every_default():
    rows = (Path(__file__).parents[2] / "docs" / "cli.md").read_text().split("`bench decode` times")[1].splitlines()
    for name, parameter in inspect.signature(bench.decode).parameters.items():
        if parameter.default not in (None, False):
            (row,) = (row for row in rows if row.startswith(f"| `--{name}`"))
            assert f"`{parameter.default}` by default" in row, name


@pytest.mark.parametrize("name", METHODS)
def test_a_request_has_as_many_views_as_are_reckoned_with(chat_model, name):
    bench = _Bench(chat_model.module, users=1, context=4, tokens=2)
    try:
        assert len(bench._request(name, 0).views) == VIEWS[name]
    finally:
        bench.engine.close()


@pytest.mark.parametrize(("name", "users"), [("drift", 20), ("none", 300)])
def test_however_many_users_are_asked_for_reply_together(chat_model, name, users):
    """20 users of five views are more rows than an engine has by default, 300 requests more than its queue."""
    bench = _Bench(chat_model.module, users=users, context=4, tokens=40)
    try:
        _, generations = bench.ask(name, kept=False)
    finally:
        bench.engine.close()
    assert [generation.finish_reason for generation in generations] == ["length"] * users
    begun = max(generation.first_token_at for generation in generations)
    assert begun <= min(generation.ended_at for generation in generations)


def test_what_a_token_takes_is_timed_while_all_users_reply(chat_model, monkeypatch):
    """Prompts so long that the first replies end before the last begin: no figure for one is taken from those."""
    bench = _Bench(chat_model.module, users=8, context=200, tokens=4)
    asked, ask = [], bench.ask
    monkeypatch.setattr(bench, "ask", lambda *a, **k: asked.append(ask(*a, **k)) or asked[-1])
    try:
        _, each, _ = bench.engine_reply("none")
    finally:
        bench.engine.close()
    cold, kept = ((max(g.first_token_at for g in gs), min(g.ended_at for g in gs)) for _, gs in asked)
    assert cold[0] > cold[1]
    assert kept[0] < kept[1]
    assert each == pytest.approx(1000 * (max(g.ended_at for g in asked[1][1]) - kept[0]) / 3)


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
