"""`prefmw eval control`: what DPA checkpoints give under directions."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from prefmw.cli.measuring import OutOption, check_split, finish, opened
from prefmw.cli.options import JsonOption
from prefmw.cli.output import loading, progress_bar
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
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Compare what DPA checkpoints give under directions across their cone, by the oracles: the front."""
    from prefmw.bootstrap import load_backend, load_dimensions, load_policy, load_scorer
    from prefmw.evaluation.control import (
        PLAIN,
        Trial,
        asked_of,
        front_rows,
        held_out_questions,
        plain_points,
        point_rows,
        policy_points,
        robust_rows,
    )
    from prefmw.evaluation.runs import Run, model_used
    from prefmw.evaluation.steer import MAX_TOKENS, TOP_P
    from prefmw.preferences.directions import from_angles
    from prefmw.settings import load_settings
    from prefmw.training.composed_scores import ATTRIBUTES

    check_split(split)
    if replies is not None and robust is not None:
        raise UsageError("--replies keeps a front's replies; leave out --robust")
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
    about = {
        **model_used(backend, dimensions),
        "dpa": [policy.label for policy in policies],
        "reward": scorer.label if scorer else None,
        "split": split,
        "n": n,
        "seed": seed,
        "temperature": temperature,
        "top_p": TOP_P,
        "max_tokens": MAX_TOKENS,
        "directions": directions,
        "angles": angle,
        "robust": robust,
    }
    kept = Run("control", about, out)
    steered = [(label, one) for label, one in zip(labels, policies, strict=True) if one.card.condition == "direction"]
    vectors = [from_angles([one]) for one in (angle or [-60.0, -45.0, 0.0, 45.0])]
    with progress_bar() as bar:
        questions = held_out_questions(split, n, seed)  # type: ignore[arg-type]
        points_asked = len(PLAIN) + sum(len(asked_of(one.card, directions, angle or [])) for one in policies)
        total = n * (points_asked if robust is None else 2 * robust * len(vectors) * len(steered))
        task = bar.add_task("replies", total=total)
        trial = Trial(
            questions,
            backend,
            dimensions,
            scorer,
            kept,
            seed,
            temperature,
            lambda count: bar.update(task, advance=count),
        )
        if robust is not None:
            table = [row for label, one in steered for row in robust_rows(trial, label, one, vectors, robust)]
            finish(kept, json, rows=table)
            return
        points = plain_points(trial)
        for label, one in zip(labels, policies, strict=True):
            points += policy_points(trial, label, one, directions, angle or [])
    if file is not None:
        for point in points:
            for question, text, scores in zip(questions, point.texts, point.oracles, strict=True):
                told = {"policy": point.policy, "asked": point.label, "topic": question.topic.id}
                measured = dict(zip(ATTRIBUTES, scores.round(3).tolist(), strict=True))
                file.write(dumps({**told, "question": question.text, "text": text, **measured}) + "\n")
        file.close()
    fronts, over = front_rows(trial, points)
    finish(kept, json, rows=point_rows(trial, points), fronts=fronts, over=over)


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
        names = [policy.card.name for policy in policies]
        return [
            name if names.count(name) == 1 else f"{name} {names[: at + 1].count(name)}" for at, name in enumerate(names)
        ]
    return ["steerlm" if one == 0 else f"dpa t={one}" for one in found]


def _check_attributes(attributes: Sequence[str]) -> None:
    from prefmw.training.composed_scores import ATTRIBUTES

    if tuple(attributes) != ATTRIBUTES:
        raise UsageError(
            f"the oracles score {' and '.join(ATTRIBUTES)}, in this order; this checkpoint's directions are over "
            f"{', '.join(attributes)}"
        )
