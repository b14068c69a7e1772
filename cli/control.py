"""`prefmw eval control`: what DPA checkpoints give under directions."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from prefmw.cli.measuring import check_path, check_split, opened
from prefmw.cli.options import JsonOption
from prefmw.cli.output import loading, print_json, print_table, progress
from prefmw.errors import UsageError


def control(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model; by default the settings'.")
    ] = None,
    dpa: Annotated[
        list[str] | None,
        typer.Option("--dpa", help="A checkpoint; by default the model's own; may be given several times."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="The folder of a `train dpa`, whose iterations are all compared.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Replies a direction.")] = 100,
    directions: Annotated[int, typer.Option("--directions", min=2, help="Across the cone, in equal steps.")] = 10,
    split: Annotated[str, typer.Option("--split", help="dev or test.")] = "test",
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampling; 0 is greedy.")] = 0.7,
    reward: Annotated[
        str | None, typer.Option("--reward", help="The reward model; by default the checkpoint's.")
    ] = None,
    robust: Annotated[
        int | None,
        typer.Option("--robust", min=2, help="Compare robust selection with the best of as many, in place of fronts."),
    ] = None,
    angle: Annotated[
        list[float] | None,
        typer.Option("--angle", help="A direction in place of the spread ones, degrees; several times."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the questions and the sampling.")] = 0,
    replies: Annotated[Path | None, typer.Option("--replies", help="Write every reply to this JSONL file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the front to this picture.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare what DPA checkpoints give under directions across their cone, by the oracles: the front."""
    from prefmw.bootstrap import load_backend, load_dimensions, load_policy, load_scorer
    from prefmw.evaluation.control import (
        Trial,
        front_rows,
        held_out_questions,
        plain_points,
        point_rows,
        policy_points,
        robust_rows,
    )
    from prefmw.evaluation.plots import plot_control
    from prefmw.evaluation.runs import model_used, versions
    from prefmw.preferences.directions import from_angles
    from prefmw.settings import load_settings

    check_split(split)
    if plot is not None:
        check_path(plot)
    names = [*(dpa or []), *(_iterations(run) if run else [])]
    file = opened(replies)
    settings = load_settings({"model": model, "reward": reward})
    with loading(settings.model):
        backend = load_backend(settings)
        policies = [load_policy(settings.model_copy(update={"dpa": name}), backend) for name in names]
        if not names:
            policies = [backend.arithmetic()]
        for policy in policies:
            _check_attributes(policy.card.attributes)
        known = settings.reward or policies[-1].card.reward
        scorer = load_scorer(settings, backend, known) if known else None
    labels, dimensions = _labels(policies), load_dimensions(settings)
    points: list[Any] = []
    table: list[dict[str, Any]]
    with progress("replies") as advance:
        questions = held_out_questions(split, n, seed)  # type: ignore[arg-type]
        trial = Trial(questions, backend, dimensions, scorer, seed, temperature, advance)
        if robust is not None:
            vectors = [from_angles([one]) for one in (angle or [-60.0, -45.0, 0.0, 45.0])]
            last = [
                (label, one) for label, one in zip(labels, policies, strict=True) if one.card.condition == "direction"
            ]
            table = [row for label, policy in last for row in robust_rows(trial, label, policy, vectors, robust)]
            fronts: list[dict[str, Any]] = []
        else:
            points = plain_points(trial)
            for label, policy in zip(labels, policies, strict=True):
                points += policy_points(trial, label, policy, directions, angle or [])
            table, fronts = point_rows(trial, points), front_rows(trial, points)
    if file is not None:
        for point in points:
            for question, text, scores in zip(questions, point.texts, point.oracles, strict=True):
                row = {"policy": point.policy, "asked": point.label, "topic": question.topic.id}
                row |= {"question": question.text, "text": text}
                row |= {"helpfulness": float(scores[0]), "verbosity": round(float(scores[1]), 3)}
                file.write(dumps(row) + "\n")
        file.close()
    if plot is not None and robust is None:
        plot_control(table, plot)
    if json:
        asked = {"split": split, "n": n, "seed": seed, "temperature": temperature, "directions": directions}
        asked |= {"dpa": [policy.label for policy in policies], "reward": scorer.label if scorer else None}
        about = {**model_used(backend, dimensions), **asked, "versions": versions()}
        print_json({"rows": table, "fronts": fronts, "settings": about})
        return
    if robust is not None:
        _print_robust(table)
    else:
        _print_fronts(table, fronts)


def _iterations(run: Path) -> list[str]:
    """The checkpoints of a run's iterations, in their order."""
    found = sorted(run.glob("iteration-*/dpa/dpa.json"), key=lambda file: int(file.parts[-3].rpartition("-")[2]))
    if not found:
        raise UsageError(f"{run} holds no iteration of a 'prefmw train dpa' that is finished")
    return [str(file.parent) for file in found]


def _labels(policies: Sequence[Any]) -> list[str]:
    """What the policies are called in a table: by their iteration, where one run made them all."""
    found = [policy.card.training.get("iteration") for policy in policies]
    if None in found or len(set(found)) < len(found) or len(found) < 2:
        return [policy.card.name for policy in policies]
    return ["steerlm" if one == 0 else f"dpa t={one}" for one in found]


def _check_attributes(attributes: Sequence[str]) -> None:
    from prefmw.training.composed_scores import ATTRIBUTES

    if tuple(attributes) != ATTRIBUTES:
        raise UsageError(
            f"the oracles score {' and '.join(ATTRIBUTES)}, in this order; this checkpoint's directions are over "
            f"{', '.join(attributes)}"
        )


def _print_robust(table: list[dict[str, Any]]) -> None:
    columns = ["policy", "angle", "how", "n", "v.r", "95%", "helpful", "verbosity"]
    print_table(
        columns,
        [
            [
                row["policy"],
                f"{row['angle']:+g}",
                row["how"],
                str(row["n"]),
                f"{row['value']:.1f}",
                "{:.1f} to {:.1f}".format(*row["ci95"]),
                f"{row['helpfulness']:.1f}",
                f"{row['verbosity']:.1f}",
            ]
            for row in table
        ],
    )


def _print_fronts(table: list[dict[str, Any]], fronts: list[dict[str, Any]]) -> None:
    from prefmw.evaluation.tables import number

    print_table(
        ["policy", "asked", "n", "helpful", "95%", "verbosity", "95%", "words", "relevant", "loops"],
        [
            [
                row["policy"],
                row["asked"],
                str(row["n"]),
                f"{row['helpfulness']:.1f}",
                "{:.1f} to {:.1f}".format(*row["helpfulness_ci95"]),
                f"{row['verbosity']:.1f}",
                "{:.1f} to {:.1f}".format(*row["verbosity_ci95"]),
                f"{row['words']:.1f}",
                *(number(row[key]) for key in ("relevance", "repetition")),
            ]
            for row in table
        ],
    )
    print_table(
        ["policy", "points", "falls", "spearman", "brief", "95%", "long", "95%"],
        [
            [
                row["policy"],
                str(row["points"]),
                "–" if row["falls"] is None else f"{row['falls']} of {row['points'] - 1}",
                number(row["spearman"], 3),
                number(row["brief"], 3),
                "{:.3f} to {:.3f}".format(*row["brief_ci95"]),
                number(row["long"], 3),
                "{:.3f} to {:.3f}".format(*row["long_ci95"]),
            ]
            for row in fronts
        ],
    )
