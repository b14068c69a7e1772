"""`prefmw train`: the offline trainers."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from prefmw.cli.options import JsonOption
from prefmw.cli.output import print_json, say
from prefmw.errors import MissingExtraError

app = typer.Typer(
    help="The offline trainers. They need the extra: pip install 'prefmw\\[train]'.", no_args_is_help=True
)


@app.command()
def sft(
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe's name (tiny), or the path of a TOML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; a killed run in it is resumed.")],
    follow_rate: Annotated[
        float | None,
        typer.Option("--follow-rate", min=0, max=1, help="How often the corpus has the style asked for; the recipe's."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a chat model as a recipe says: compose the corpus, learn the tokenizer, train the weights."""
    if find_spec("accelerate") is None:
        raise MissingExtraError("training", "train")
    from prefmw.training.sft import load_recipe, train_sft

    chosen = load_recipe(recipe)
    if follow_rate is not None:
        chosen = replace(chosen, corpus={**chosen.corpus, "follow_rate": follow_rate})
    folder, metrics = train_sft(chosen, out)
    if json:
        print_json({"model": str(folder), **metrics})
    else:
        say(f"held-out loss {metrics['held_out_loss']:.3f} nats a token; the model lies in {folder}")
