"""`prefmw eval rewards`: PAD's table, by reward models and a judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefmw.cli.measuring import OutOption, check_split, finish, names
from prefmw.cli.options import JsonOption, PersRMOption
from prefmw.cli.output import loading, progress_bar
from prefmw.errors import UsageError

if TYPE_CHECKING:
    from prefmw.evaluation.judges import Judge
    from prefmw.evaluation.reward_models import Reward
    from prefmw.preferences import Dimensions
    from prefmw.steering import Backend

BUILT_IN = ("zero-shot", "second-opinion")


def rewards(
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            help="NAME=MODEL[:OUTPUT][|TEMPLATE], a sequence classification model; or zero-shot or second-opinion.",
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Who tells the win rate over the base: a chat model, or oracle.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model; by default the settings'.")
    ] = None,
    methods: Annotated[str, typer.Option("--methods", help="Methods to compare, joined by commas.")] = (
        "none,prompt,linear,pad"
    ),
    data: Annotated[
        Path | None, typer.Option("--data", help="Prompts: a file; by default the embedded model's held-out questions.")
    ] = None,
    preference: Annotated[
        list[str] | None,
        typer.Option("--preference", help="Ask --data's prompts under this preference; by default under PAD's seven."),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=1, help="Held-out questions an axis, or prompts of --data at most.")
    ] = 40,
    split: Annotated[str, typer.Option("--split", help="Of the held-out questions: dev or test.")] = "test",
    strength: Annotated[
        list[float] | None, typer.Option("--strength", help="A strength to try; may be given several times.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampling; 0 is greedy.")] = 0.7,
    persrm: PersRMOption = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Add the controls' rows.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the questions and the sampling.")] = 0,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Score each method's replies by reward models, tell how varied they are and how often a judge prefers them."""
    from prefmw.bootstrap import load_backend, load_dimensions
    from prefmw.evaluation.rewards import PREDEFINED, held_out, read_prompts, reward_rows
    from prefmw.evaluation.runs import Run, model_used
    from prefmw.evaluation.steer import MAX_TOKENS, TOP_P, conditions
    from prefmw.settings import load_settings

    check_split(split)
    asked_methods = names(methods)
    rows = [
        row
        for row in conditions(asked_methods, strength or [], temperature, controls=controls)
        if row.name != "shuffled"  # who stands in asks under another preference, which no reward knows
    ]
    if split == "test" and data is None and len({row.strength for row in rows if row.name in ("linear", "pad")}) > 2:
        raise UsageError("choose a strength on --split dev; the test split is for reporting one")
    sources = reward or (list(BUILT_IN) if data is None else [])
    if not sources:
        raise UsageError("name reward models for --data: --reward NAME=MODEL, by folder or hub id")
    settings = load_settings({"model": model, "persrm": persrm})
    dimensions = load_dimensions(settings)
    if data is None:
        asked = held_out(split, n, seed, dimensions)  # type: ignore[arg-type]
    else:
        if "drift" in asked_methods:
            raise UsageError("drift acts by weights, and --data states preferences in words; leave it out")
        asked = read_prompts(data, preference or PREDEFINED)[: n * len(preference or PREDEFINED)]
    with loading(settings.model):
        backend = load_backend(settings)
        guided = backend.guidance().label if any(row.is_pad for row in rows) else None
    with loading("reward models"):
        found = {name: _reward(name, source, backend, dimensions) for name, source in map(_named, sources)}
        verdict = _judge(judge)
    about = {
        **model_used(backend, dimensions),
        "rewards": sources,
        "judge": judge,
        "data": data.name if data else "held-out",
        "preferences": preference or (list(PREDEFINED) if data else None),
        "split": None if data else split,
        "n": len(asked),
        "seed": seed,
        "temperature": temperature,
        "top_p": TOP_P,
        "max_tokens": MAX_TOKENS,
        "conditions": [[row.label, row.temperature] for row in rows],
        "persrm": guided,
    }
    run = Run("rewards", about, out)
    with progress_bar() as bar:
        tasks = {row: bar.add_task(row.label, total=len(asked)) for row in rows}
        table = reward_rows(
            asked,
            rows,
            found,
            verdict,
            backend,
            dimensions,
            run,
            seed=seed,
            progress=lambda row, count: bar.update(tasks[row], completed=count),
        )
    finish(run, json, rows=table)


def _named(source: str) -> tuple[str, str]:
    """A reward's name and where it comes from."""
    if source in BUILT_IN:
        return source, source
    name, equals, where = source.partition("=")
    if not equals or not name.strip() or not where.strip():
        raise UsageError(f"a reward is NAME=MODEL, {' or '.join(BUILT_IN)}, got '{source[:60]}'")
    return name.strip(), where.strip()


def _reward(name: str, source: str, backend: Backend, dimensions: Dimensions) -> Reward:
    from prefmw.evaluation import reward_models

    if source == "zero-shot":
        return reward_models.zero_shot(backend, dimensions)
    if source == "second-opinion":
        return reward_models.second_opinion()
    source, bar, template = source.partition("|")
    filled = template.replace("\\n", "\n") if bar else None
    where, colon, output = source.rpartition(":")
    if colon and output.isdecimal():
        return reward_models.reward_model(where, int(output), filled)
    return reward_models.reward_model(source, None, filled)


def _judge(judge: str | None) -> Judge | None:
    from prefmw.bootstrap import load_backend
    from prefmw.evaluation.judges import model_judge, oracle_judge
    from prefmw.settings import load_settings

    if judge is None:
        return None
    return oracle_judge if judge == "oracle" else model_judge(load_backend(load_settings({"model": judge})))
