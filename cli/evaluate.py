"""`prefmw eval`: steering measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefmw.cli.choice import choice
from prefmw.cli.control import control
from prefmw.cli.measuring import OutOption, check_path, check_split, finish, names, opened
from prefmw.cli.options import JsonOption, PersRMOption, read_texts, registry
from prefmw.cli.output import loading, print_json, print_table, printable, progress, progress_bar, shorten, stages
from prefmw.cli.report import report
from prefmw.cli.rewards import rewards
from prefmw.errors import UsageError

if TYPE_CHECKING:
    from prefmw.evaluation.steer import Answered, Condition

app = typer.Typer(help="Steering, inference and learning, measured.", no_args_is_help=True)
app.command("choice")(choice)
app.command("control")(control)
app.command("rewards")(rewards)
app.command("report")(report)


@app.command()
def steer(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model; by default the settings'.")
    ] = None,
    methods: Annotated[str, typer.Option("--methods", help="Methods to compare, joined by commas.")] = (
        "none,prompt,linear"
    ),
    n: Annotated[int, typer.Option("--n", min=1, help="Questions an axis.")] = 40,
    split: Annotated[str, typer.Option("--split", help="dev, to choose strengths on, or test, to report.")] = "test",
    strength: Annotated[
        list[float] | None, typer.Option("--strength", help="A strength to try; may be given several times.")
    ] = None,
    further: Annotated[
        bool, typer.Option("--further", help="The more roundabout held-out questions and personas.")
    ] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampling; 0 is greedy.")] = 0.7,
    persrm: PersRMOption = None,
    candidate: Annotated[
        str | None, typer.Option("--candidate", help="How pad picks: greedy, stochastic or best-of-k.")
    ] = None,
    top_k: Annotated[
        list[int] | None, typer.Option("--top-k", help="Candidates of pad's; may be given several times.")
    ] = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Add the controls' rows.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the questions and the sampling.")] = 0,
    replies: Annotated[
        Path | None, typer.Option("--replies", help="Write every reply with its measures to this JSONL file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw linear's or pad's curve over its strengths to this picture.")
    ] = None,
    second_opinion: Annotated[
        bool, typer.Option("--second-opinion", help="Judge by a classifier on sentence embeddings as well.")
    ] = False,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Compare methods and controls: how often the style asked for is followed, and what it costs."""
    from prefmw.bootstrap import load_backend, load_dimensions
    from prefmw.evaluation.plots import plot_strengths
    from prefmw.evaluation.runs import Run, model_used
    from prefmw.evaluation.second_opinion import SecondOpinion
    from prefmw.evaluation.steer import MAX_TOKENS, TOP_P, conditions, steer_rows
    from prefmw.settings import load_settings
    from prefmw.training.styles import AXES

    check_split(split)
    asked = names(methods)
    rows = conditions(asked, strength or [], temperature, controls=controls, candidate=candidate, top_ks=top_k or [])
    if split == "test" and any(sum(row.name == name for row in rows) > 1 for name in ("linear", "drift", "pad")):
        raise UsageError("choose a strength on --split dev; the test split is for reporting one")
    if plot is not None:
        _check_picture(plot, rows)
    file = opened(replies)
    settings = load_settings({"model": model, "persrm": persrm})
    with loading(settings.model):
        backend = load_backend(settings)
        if any(row.is_pad for row in rows):
            backend.guidance()  # what is amiss with it is told before anything is asked
        judge = SecondOpinion() if second_opinion else None
    dimensions = load_dimensions(settings)
    about = {
        **model_used(backend, dimensions),
        "split": split,
        "further": further,
        "n": n,
        "seed": seed,
        "methods": asked,
        "controls": controls,
        "temperature": temperature,
        "top_p": TOP_P,
        "max_tokens": MAX_TOKENS,
        "second_opinion": second_opinion,
        "conditions": [[row.label, row.temperature] for row in rows],
        "persrm": backend.guidance().label if any(row.is_pad for row in rows) else None,
    }
    run = Run("steer", about, out)
    with progress_bar() as bar:
        tasks = {row: bar.add_task(f"{row.label} t={row.temperature:g}", total=n * len(AXES)) for row in rows}

        def advance(row: Condition, count: int) -> None:
            bar.update(tasks[row], completed=count)

        def keep(row: Condition, answered: list[Answered]) -> None:
            if file is not None:
                file.writelines(answer.as_json_line(row) for answer in answered)

        table = steer_rows(
            split,  # type: ignore[arg-type]
            rows,
            n,
            backend,
            dimensions,
            seed=seed,
            further=further,
            judge=judge,
            run=run,
            progress=advance,
            keep=keep,
        )
    if file is not None:
        file.close()
    finish(run, json, rows=table)
    if plot is not None:
        plot_strengths(table, plot)


@app.command("agreement")
def show_agreement(
    ratings: Annotated[Path, typer.Argument(metavar="RATINGS", help="JSON lines: text, ratings, sensible.")],
    json: JsonOption = False,
) -> None:
    """Compare the oracles with readers' ratings of replies."""
    from prefmw.evaluation.agreement import agreement, read_ratings

    replies = read_ratings(ratings)
    rows = agreement(replies)
    sensible = [verdict for reply in replies for verdict in reply.sensible]
    if json:
        print_json({"replies": len(replies), "sensible": sum(sensible) / len(sensible), "rows": rows})
        return
    columns = ["axis", "spearman", "n", "same_pole", "false_pole", "readers"]
    print_table(columns, [["–" if row[column] is None else str(row[column]) for column in columns] for row in rows])
    print(f"{len(replies)} replies; {sum(sensible) / len(sensible):.0%} of the verdicts: a sensible reply")


@app.command()
def inference(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='JSON lines: {"text", "expect": {DIM: -1 or 1}}.')],
    misses: Annotated[bool, typer.Option("--misses", help="Show the texts that were not read right.")] = False,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Measure inference of weights from words on labelled statements."""
    from prefmw.bootstrap import load_inferer
    from prefmw.evaluation.inference import read_labelled, score_inference
    from prefmw.evaluation.runs import Run
    from prefmw.settings import load_settings

    settings, dimensions = load_settings(), registry()
    statements = read_labelled(file, dimensions)
    with progress("texts") as advance:
        result = score_inference(statements, load_inferer(settings, dimensions), dimensions, advance)
    wrong = result.pop("misses")
    run = Run("inference", {"embedder": settings.embedder, "file": file.name, "readout": settings.readout}, out)
    written = run.result(**result, rows=[result])
    if json:
        print_json({**written, **({"misses": wrong} if misses else {})})
        return
    for name, value in result.items():
        print(f"{name:<17} {'–' if value is None else f'{value:.3f}' if isinstance(value, float) else value}")
    for one in wrong if misses else []:
        print(printable(f"{one['text']}  expected {one['expect']}, found {one['found']}"))


@app.command("dials")
def turn_dials(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model; by default the settings'.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Questions an axis and weight.")] = 40,
    split: Annotated[str, typer.Option("--split", help="dev or test.")] = "test",
    strength: Annotated[
        list[float] | None, typer.Option("--strength", help="A gain to try; may be given several times.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampling; 0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", help="Of the questions and the sampling.")] = 0,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the dials to this picture.")] = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Turn each of Drift's dials from -1 to 1, then three at once beside one composed principle."""
    from prefmw.bootstrap import load_backend, load_dimensions
    from prefmw.evaluation.dials import WEIGHTS, Trial, chord_rows, dial_rows
    from prefmw.evaluation.plots import plot_dials
    from prefmw.evaluation.runs import Run, model_used
    from prefmw.evaluation.steer import MAX_TOKENS, TOP_P, conditions
    from prefmw.settings import load_settings
    from prefmw.training.styles import AXES

    check_split(split)
    gains = conditions(["drift"], strength or [], temperature, controls=False)
    if split == "test" and len(gains) > 1:
        raise UsageError("choose a gain on --split dev; the test split is for reporting one")
    beside = [*conditions(["prompt", "linear"], [], temperature, controls=False), *gains]
    if plot is not None:
        check_path(plot)
    settings = load_settings({"model": model})
    with loading(settings.model):
        backend = load_backend(settings)
    dimensions = load_dimensions(settings)
    about = {
        **model_used(backend, dimensions),
        "split": split,
        "n": n,
        "seed": seed,
        "gains": [row.strength for row in gains],
        "temperature": temperature,
        "top_p": TOP_P,
        "max_tokens": MAX_TOKENS,
    }
    run = Run("dials", about, out)
    total = n * (len(gains) * len(AXES) * len(WEIGHTS) + len(beside))
    with progress_bar() as bar:
        task = bar.add_task("replies", total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)

        trial = Trial(split, n, backend, dimensions, seed, advance, run)  # type: ignore[arg-type]
        dials, chords = dial_rows(trial, gains), chord_rows(trial, beside)
    if plot is not None:
        plot_dials(dials, plot)
    finish(run, json, dials=dials, chords=chords)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='JSON lines: {"prompt", "response"}.')],
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="By the chat model itself, asked for either pole.")
    ] = False,
    reward: Annotated[
        str | None,
        typer.Option("--reward", help="By this reward model: a folder, a hub id or an embedded one's name."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model; by default the settings'.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score replies: on every style dimension by the chat model itself, or on a reward model's attributes."""
    from prefmw.bootstrap import load_backend, load_dimensions, load_scorer
    from prefmw.preferences import Message
    from prefmw.scoring import Exchange, attribute_scores, scored_dimensions
    from prefmw.settings import load_settings

    if zero_shot == (reward is not None):
        raise UsageError("score either by --zero-shot or by --reward NAME, tiny-reward say")
    texts, settings = read_texts(file, "prompt", "response"), load_settings({"model": model})
    if reward is not None:
        with loading(settings.model):
            scorer = load_scorer(settings, load_backend(settings), reward)
        rewards = scorer.rewards([([Message("user", asked)], reply) for asked, reply in texts], scorer.card.attributes)
        _print_scores(scorer.card.attributes, [reply for _, reply in texts], rewards.tolist(), json, digits=2)
        return
    dimensions = load_dimensions(settings)
    with loading(settings.model):
        backend = load_backend(settings)
    keys = scored_dimensions(dimensions)
    exchanges = [Exchange([Message("user", asked)], reply) for asked, reply in texts]
    with stages() as tell:
        scores = attribute_scores(exchanges, backend, dimensions, lambda share: tell("scoring", share))
    _print_scores(keys, [reply for _, reply in texts], scores.tolist(), json, digits=5)


def _print_scores(
    keys: Sequence[str], replies: Sequence[str], scores: Sequence[Sequence[float]], json: bool, digits: int
) -> None:
    if json:
        print_json([dict(zip(keys, (round(value, digits) for value in row), strict=True)) for row in scores])
        return
    rows = [
        [printable(shorten(reply, 40)), *(f"{value:+.3f}" for value in row)]
        for reply, row in zip(replies, scores, strict=True)
    ]
    print_table(["reply", *keys], rows)


@app.command()
def choices(
    people: Annotated[int, typer.Option("--people", min=1, help="Simulated people.")] = 300,
    count: Annotated[int, typer.Option("--choices", min=1, help="Choices that each of them makes.")] = 15,
    wrong: Annotated[
        list[float] | None, typer.Option("--wrong", help="Share of wrong choices; may be given several times.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Let them choose between this chat model's replies, by the oracles."),
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", min=12, help="With --model: questions that it answers six times.")
    ] = 60,
    seed: Annotated[int, typer.Option("--seed", help="Of people and replies.")] = 0,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Compare what is learned from simulated people's choices with the truth, beside the best that is possible; with
    --model, tell how many of their other choices it predicts.
    """
    from prefmw.evaluation.choosers import chooser_rows
    from prefmw.evaluation.runs import Run

    if model is not None:
        _real_choices(model, questions, people, seed, out, json)
        return
    shares = wrong or [0.0, 0.2]
    if any(not 0 <= share < 0.5 for share in shares):
        raise UsageError("a share of wrong choices lies in [0, 0.5)")
    run = Run("choices", {"people": people, "choices": count, "wrong": shares, "seed": seed}, out)
    rows = [
        row
        for share in shares
        for row in run.unit(f"wrong {share}", lambda share=share: chooser_rows(people, count, share, seed))  # type: ignore[misc]
    ]
    finish(run, json, rows=rows)


def _real_choices(model: str, questions: int, people: int, seed: int, out: Path | None, json: bool) -> None:
    from prefmw.bootstrap import load_backend, load_dimensions, load_scale
    from prefmw.evaluation.real_choices import accuracy_rows, real_pairs
    from prefmw.evaluation.runs import Run, model_used
    from prefmw.settings import load_settings

    settings = load_settings({"model": model})
    with loading(settings.model):
        backend = load_backend(settings)
    dimensions = load_dimensions(settings)
    about = {**model_used(backend, dimensions), "questions": questions, "people": people, "seed": seed}
    run = Run("choices", about, out)
    with stages() as tell:
        scale = load_scale(settings, dimensions, lambda share: tell("measuring scores", share))

        def rows() -> list[dict[str, Any]]:
            asked, judged = real_pairs("test", questions, backend, dimensions, scale, seed, tell)
            return accuracy_rows(asked, judged, people, seed)

        found = run.unit("accuracy", rows)
    finish(run, json, accuracy=found)


def _check_picture(path: Path, rows: Sequence[Condition]) -> None:
    if max(sum(row.name == name for row in rows) for name in ("linear", "pad")) < 2:
        raise UsageError(
            "--plot draws linear's or pad's curve; name it among the methods and give --strength several times"
        )
    check_path(path)
