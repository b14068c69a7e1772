"""`prefmw train`: the offline trainers."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from prefmw.cli.options import JsonOption
from prefmw.cli.output import print_json, say
from prefmw.errors import MissingExtraError, UsageError

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


@app.command()
def persrm(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; a killed run in it is resumed.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A recipe's name (tiny), or the path of a TOML file.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", help="The chat model to train on: a folder, a hub id or an embedded one."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="Preference pairs: .jsonl, .json, .jsonl.gz or .parquet; several times for several."
        ),
    ] = None,
    preference: Annotated[
        str | None, typer.Option("--preference", help="The preference of pairs that name none.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Of stage 1; by default the paper's 3.")] = None,
    head_epochs: Annotated[float | None, typer.Option("--head-epochs", help="Of stage 2; by default 3.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of stage 1; by default the paper's 5e-6.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Pairs a step, all devices together; 128.")] = None,
    per_device: Annotated[int | None, typer.Option("--per-device", help="Pairs at once on a device; 4.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of the LoRA; 8.")] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="Of the loss, not of decoding; 0.1.")] = None,
    penalty: Annotated[float | None, typer.Option("--penalty", help="On W's squared norm; 0.001.")] = None,
    cache_mb: Annotated[int | None, typer.Option("--cache-mb", help="Of hidden states kept for stage 2; 4096.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Pairs beyond this length are left out; 2048.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option("--held-out", help="Share of the prompts that accuracy is told on; 0.1.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="The prefix's system part, with {preference} in it or not.")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option("--user-prefix", help="The prefix's user part, with {prompt} and perhaps {preference}."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the split, the order and the LoRA's start.")] = None,
    json: JsonOption = False,
) -> None:
    """Make a PersRM, which guides pad: stage 1 trains a LoRA on preference pairs, stage 2 the preference head."""
    if any(find_spec(name) is None for name in ("accelerate", "datasets", "peft", "trl")):
        raise MissingExtraError("training", "train")
    from prefmw.embedded import find_embedded
    from prefmw.training.persrm import PersRMRecipe, load_persrm_recipe, train_persrm

    if recipe is None and (backbone is None or not data):
        raise UsageError("name a chat model with --backbone and pairs with --data, or a recipe with --recipe")
    chosen = load_persrm_recipe(recipe) if recipe else PersRMRecipe(name=out.name or "persrm", backbone=str(backbone))
    if recipe and data and chosen.corpus is not None:
        chosen = replace(chosen, corpus=None)

    def changed(part: Any, **values: Any) -> Any:
        return replace(part, **{name: value for name, value in values.items() if value is not None})

    chosen = changed(
        chosen,
        backbone=backbone,
        preference=preference,
        held_out=held_out,
        max_tokens=max_tokens,
        seed=seed,
        prefix=changed(chosen.prefix, system=system, user=user),
        lora=changed(
            chosen.lora,
            epochs=epochs,
            learning_rate=learning_rate,
            batch=batch,
            per_device=per_device,
            rank=rank,
            alpha=None if rank is None else 2 * rank,
            beta=beta,
        ),
        head=changed(chosen.head, epochs=head_epochs, penalty=penalty, cache_mb=cache_mb),
    )
    if chosen.corpus is None and not data:
        raise UsageError("this recipe names no corpus; name pairs with --data")
    folder, metrics = train_persrm(chosen, out, data=data or [], backbone_path=find_embedded(chosen.backbone))
    if json:
        print_json({"persrm": str(folder), **metrics})
        return
    first, second, untrained = metrics["stage1"], metrics["stage2"], metrics["untrained"]
    say(
        f"held-out accuracy {second['accuracy']:.3f} of {second['n']} pairs (after stage 1 {first['accuracy']:.3f}; "
        f"untrained, by likelihood, {untrained['likelihood']:.3f}; the longer reply {untrained['longer']:.3f}); the "
        f"PersRM lies in {folder}"
    )
