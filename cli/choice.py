"""`prefmw eval choice`: of four answers, the one for whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefmw.cli.measuring import OutOption, check_split, finish, names, numbers
from prefmw.cli.options import JsonOption, PersRMOption
from prefmw.cli.output import loading, progress_bar
from prefmw.errors import UsageError

if TYPE_CHECKING:
    from prefmw.evaluation.choice import Question
    from prefmw.evaluation.steer import Condition


def choice(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model; by default the settings'.")
    ] = None,
    methods: Annotated[str, typer.Option("--methods", help="Methods to compare, joined by commas.")] = (
        "none,prompt,linear"
    ),
    way: Annotated[
        str, typer.Option("--by", help="letter, the paper's way, or likelihood, for small models.")
    ] = "letter",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Questions: a file or hub id with the paper's columns, or composed; by default those that ship.",
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="dev, to choose ratios on, or test, to report.")] = "test",
    n: Annotated[int | None, typer.Option("--n", min=1, help="Questions at most; 40 of composed by default.")] = None,
    everybody: Annotated[
        bool, typer.Option("--everybody", help="Ask each question as each of its four people, not as one of them.")
    ] = False,
    strength: Annotated[
        list[float] | None, typer.Option("--strength", help="A strength to try; may be given several times.")
    ] = None,
    ratios: Annotated[
        str | None, typer.Option("--ratios", help="Linear Alignment's ratios to sweep, joined by commas (figure 5).")
    ] = None,
    persrm: PersRMOption = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Add the controls' rows.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the people drawn; the paper's is 42.")] = 42,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Count how often the answer written for whoever asks is chosen, of four: Linear Alignment's table 2."""
    from prefmw.bootstrap import load_backend, load_dimensions
    from prefmw.evaluation.choice import choice_conditions, choice_rows, digest, draw
    from prefmw.evaluation.runs import Run, model_used
    from prefmw.settings import load_settings

    check_split(split)
    if way not in ("letter", "likelihood"):
        raise UsageError(f"a choice is read by letter or likelihood, got '{way[:40]}'")
    swept = numbers(ratios, "--ratios") if ratios is not None else []
    rows = choice_conditions(names(methods), strength or [], way, ratios=swept, controls=controls)  # type: ignore[arg-type]
    questions = _questions(data, split, n, seed)
    is_split = data is None or data == "composed" or any(question.split for question in questions)
    if split == "test" and is_split and any(_count(rows, name) > 1 for name in ("linear", "drift", "pad")):
        raise UsageError("choose a strength on --split dev; the test split is for reporting one")
    settings = load_settings({"model": model, "persrm": persrm})
    with loading(settings.model):
        backend = load_backend(settings)
        guided = backend.guidance().label if any(row.is_pad for row in rows) else None
    drawn, dimensions = draw(questions, seed, everybody=everybody), load_dimensions(settings)
    about = {
        **model_used(backend, dimensions),
        "by": way,
        "data": Path(data).name if data else "shipped",
        "data_digest": digest(questions),
        "split": split if is_split else None,
        "everybody": everybody,
        "n": len(drawn),
        "seed": seed,
        "temperature": 0.0,
        "conditions": [row.label for row in rows],
        "persrm": guided,
    }
    run = Run("choice", about, out)
    with progress_bar() as bar:
        tasks = {row: bar.add_task(row.label, total=len(drawn)) for row in rows}
        table = choice_rows(
            drawn,
            rows,
            way,  # type: ignore[arg-type]
            backend,
            dimensions,
            run,
            lambda row, count: bar.update(tasks[row], completed=count),
        )
    finish(run, json, rows=table)


def _count(rows: list[Condition], name: str) -> int:
    return sum(row.name == name for row in rows)


def _questions(data: str | None, split: str, n: int | None, seed: int) -> list[Question]:
    from prefmw.evaluation.choice import composed_questions, of_split, read_questions, shipped_questions, some

    if data == "composed":
        return composed_questions(split, n or 40, seed)  # type: ignore[arg-type]
    questions = shipped_questions() if data is None else read_questions(_file(data))
    return some(of_split(questions, split), n, seed)


def _file(data: str) -> Path:
    """The file that ``--data`` names; a data set of the hub is downloaded."""
    path = Path(data).expanduser()
    if path.exists() or data.startswith((".", "~", "/")) or data.count("/") != 1 or path.suffix:
        return path
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(data, repo_type="dataset"))
    except Exception as error:  # the hub and the network raise what they like
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"no data '{data[:80]}': no such file here, nor on the hub: {reason}") from error
    found = sorted(
        file for ending in ("jsonl", "json", "csv", "parquet") for file in folder.rglob(f"*.{ending}") if file.is_file()
    )
    if not found:
        raise UsageError(f"the data set '{data[:80]}' holds no .jsonl, .json, .csv or .parquet file; name a file of it")
    return found[0]
