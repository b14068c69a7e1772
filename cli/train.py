"""`prefmw train`: the offline trainers."""

from __future__ import annotations

import warnings
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
    _check_extra()
    from prefmw.embedded import find_embedded
    from prefmw.training.persrm import PersRMRecipe, load_persrm_recipe, train_persrm
    from prefmw.training.runs import processes

    if recipe is None and (backbone is None or not data):
        raise UsageError("name a chat model with --backbone and pairs with --data, or a recipe with --recipe")
    chosen = load_persrm_recipe(recipe) if recipe else PersRMRecipe(name=out.name or "persrm", backbone=str(backbone))
    if recipe and data and chosen.corpus is not None:
        chosen = replace(chosen, corpus=None)

    chosen = _changed(
        chosen,
        backbone=backbone,
        preference=preference,
        held_out=held_out,
        max_tokens=max_tokens,
        seed=seed,
        prefix=_changed(chosen.prefix, system=system, user=user),
        lora=_changed(
            chosen.lora,
            epochs=epochs,
            learning_rate=learning_rate,
            batch=batch,
            per_device=per_device,
            rank=rank,
            alpha=None if rank is None else 2 * rank,
            beta=beta,
        ),
        head=_changed(chosen.head, epochs=head_epochs, penalty=penalty, cache_mb=cache_mb),
    )
    if chosen.corpus is None and not data:
        raise UsageError("this recipe names no corpus; name pairs with --data")
    folder, metrics = train_persrm(chosen, out, data=data or [], backbone_path=find_embedded(chosen.backbone))
    if not processes().is_main_process:  # one of them tells
        return
    if json:
        print_json({"persrm": str(folder), **metrics})
        return
    first, second, untrained = metrics["stage1"], metrics["stage2"], metrics["untrained"]
    say(
        f"held-out accuracy {second['accuracy']:.3f} of {second['n']} pairs (after stage 1 {first['accuracy']:.3f}; "
        f"untrained, by likelihood, {untrained['likelihood']:.3f}; the longer reply {untrained['longer']:.3f}); the "
        f"PersRM lies in {folder}"
    )


@app.command()
def reward(
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
        typer.Option("--data", help="Scored replies: .jsonl, .json, .jsonl.gz or .parquet; several times for several."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write one sequence classification model, to OUT/merged.")
    ] = False,
    epochs: Annotated[float | None, typer.Option("--epochs", help="2 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="By default the paper's 1e-5.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Replies a step, all devices together; 64.")] = None,
    per_device: Annotated[int | None, typer.Option("--per-device", help="Replies at once on a device; 4.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of the LoRA; 16.")] = None,
    lm: Annotated[float | None, typer.Option("--lm", help="Weight of the language-model loss; 0.1.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Replies beyond this length are left out; 2048.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option("--held-out", help="Share of the prompts that correlation is told on; 0.1.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the split, the order and the LoRA's start.")] = None,
    json: JsonOption = False,
) -> None:
    """Make a reward model: a regression head and a LoRA on a chat model, which score replies from 0 to 100."""
    _check_extra()
    from prefmw.embedded import find_embedded
    from prefmw.training.reward import RewardRecipe, load_reward_recipe, train_reward
    from prefmw.training.runs import processes

    if recipe is None and (backbone is None or not data):
        raise UsageError("name a chat model with --backbone and scored replies with --data, or a recipe with --recipe")
    chosen = load_reward_recipe(recipe) if recipe else RewardRecipe(name=out.name or "reward", backbone=str(backbone))
    if data:
        chosen = replace(chosen, corpus=None)
    chosen = _changed(
        chosen,
        backbone=backbone,
        held_out=held_out,
        max_tokens=max_tokens,
        seed=seed,
        fit=_changed(
            chosen.fit,
            epochs=epochs,
            learning_rate=learning_rate,
            batch=batch,
            per_device=per_device,
            rank=rank,
            alpha=None if rank is None else 2 * rank,
            lm=lm,
        ),
    )
    if chosen.corpus is None and not data:
        raise UsageError("this recipe names no corpus; name scored replies with --data")
    folder, metrics = train_reward(
        chosen, out, data=data or [], backbone_path=find_embedded(chosen.backbone), merge=merge
    )
    if not processes().is_main_process:
        return
    if json:
        print_json({"reward": str(folder), **metrics})
        return
    told = ", ".join(
        f"{name} {'–' if row['pearson'] is None else format(row['pearson'], '.3f')} (n = {row['n']})"
        for name, row in metrics["held_out"].items()
    )
    say(f"Pearson on held-out replies: {told}; the reward model lies in {folder}")


@app.command()
def dpa(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; a killed run in it is resumed.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A recipe's name (tiny), or the path of a TOML file.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", help="The chat model to start from: a folder, a hub id or an embedded one."),
    ] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="The reward model: a folder, a hub id or an embedded one.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="Prompts with replies: .jsonl, .json, .jsonl.gz or .parquet; several times."),
    ] = None,
    attributes: Annotated[
        str | None, typer.Option("--attributes", help="Joined by commas, the one always wanted first.")
    ] = None,
    cone: Annotated[
        list[str] | None,
        typer.Option("--cone", metavar="ATTR=LOW:HIGH", help="Angles to the first, degrees; verbosity=-45:0."),
    ] = None,
    template: Annotated[str | None, typer.Option("--template", help="The system prompt, {rating} in it.")] = None,
    iterations: Annotated[int | None, typer.Option("--iterations", help="After iteration 0; 4.")] = None,
    prompts: Annotated[int | None, typer.Option("--prompts", help="Prompts used, at most; all by default.")] = None,
    first: Annotated[int | None, typer.Option("--first", help="Replies a prompt in iteration 1; 80.")] = None,
    directions: Annotated[int | None, typer.Option("--directions", help="Directions a prompt; 5.")] = None,
    replies: Annotated[
        int | None, typer.Option("--replies", help="Replies a direction from iteration 2 on; 16.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Of the sampling; 1.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Of a sampled reply, at most; 1024.")] = None,
    replay: Annotated[float | None, typer.Option("--replay", help="Share of original replies; 0.15.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of the LoRA; 0, the default, trains all weights.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Of every iteration; 2.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="By default the paper's 1e-5.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows a step, all devices together; 64.")] = None,
    per_device: Annotated[int | None, typer.Option("--per-device", help="Rows at once on a device; 1.")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Several replies in one row; by default they share.")
    ] = None,
    context: Annotated[int | None, typer.Option("--context", help="Tokens of a row; 4096.")] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="What draws the replies: engine or vllm.")] = "engine",
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything that is drawn.")] = None,
    json: JsonOption = False,
) -> None:
    """Make a DPA checkpoint, a chat model that reads directions, by rejection sampling against a reward model."""
    _check_extra()
    from functools import partial

    from prefmw.bootstrap import close_engines, scorer_on
    from prefmw.checkpoints import reward_source
    from prefmw.embedded import find_embedded
    from prefmw.settings import load_settings
    from prefmw.training.dpa import train_dpa
    from prefmw.training.dpa_recipe import DPARecipe, load_dpa_recipe
    from prefmw.training.drawing import check_sampler
    from prefmw.training.runs import processes

    check_sampler(sampler)
    if recipe is None and (backbone is None or reward is None or not data):
        raise UsageError(
            "name a chat model with --backbone, a reward model with --reward and prompts with --data, or a recipe with "
            "--recipe"
        )
    chosen = (
        load_dpa_recipe(recipe)
        if recipe
        else DPARecipe(name=out.name or "dpa", backbone=str(backbone), reward=str(reward))
    )
    if data:
        chosen = replace(chosen, corpus=None)
    chosen = _changed(
        chosen,
        backbone=backbone,
        reward=reward,
        attributes=tuple(name.strip() for name in attributes.split(",")) if attributes else None,
        cone=_cone(cone) if cone else None,
        template=template,
        iterations=iterations,
        prompts=prompts,
        replay=replay,
        seed=seed,
        draws=_changed(
            chosen.draws,
            first=first,
            directions=directions,
            replies=replies,
            temperature=temperature,
            max_tokens=max_tokens,
        ),
        fit=_changed(
            chosen.fit,
            rank=rank,
            epochs=epochs,
            learning_rate=learning_rate,
            batch=batch,
            per_device=per_device,
            packing=packing,
            max_tokens=context,
        ),
    )
    if chosen.corpus is None and not data:
        raise UsageError("this recipe names no corpus; name prompts with --data")
    reward_source(chosen.reward, chosen.backbone).card.mixture(chosen.attributes)  # told before anything is begun
    settings = load_settings({"model": chosen.backbone})
    try:
        folder, metrics = train_dpa(
            chosen,
            out,
            load_scorer=partial(scorer_on, settings, chosen.reward),
            data=data or [],
            backbone_path=find_embedded(chosen.backbone),
            sampler=sampler,
        )
    finally:
        close_engines()
    if not processes().is_main_process:
        return
    if json:
        print_json({"dpa": str(folder), **metrics})
        return
    ends = [metrics["fronts"][-1][place]["rewards"] for place in (0, -1)]
    first_end, last_end = (
        ", ".join(f"{name} {value:.1f}" for name, value in zip(chosen.attributes, row, strict=True)) for row in ends
    )
    say(
        f"rewards on held-out prompts from one end of the cone, {first_end}, to the other, {last_end}; the checkpoint "
        f"lies in {folder}"
    )


def _check_extra() -> None:
    """Raise MissingExtraError where a library of the trainers' is missing; else have them keep their notes for
    developers, and their bars for every model that is loaded, to themselves.
    """
    if any(find_spec(name) is None for name in ("accelerate", "datasets", "peft", "trl")):
        raise MissingExtraError("training", "train")
    from transformers.utils import logging

    logging.disable_progress_bar()
    for kind in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", kind)


def _changed(part: Any, **values: Any) -> Any:
    """A recipe's part with what a flag gives in place of its own."""
    return replace(part, **{name: value for name, value in values.items() if value is not None})


def _cone(items: list[str]) -> dict[str, tuple[float, float]]:
    found = {}
    for item in items:
        name, _, angles = item.partition("=")
        low, _, high = angles.partition(":")
        try:
            found[name.strip()] = (float(low), float(high))
        except ValueError as error:
            raise UsageError(f"expected ATTRIBUTE=LOW:HIGH, such as verbosity=-45:0, got '{item[:40]}'") from error
    return found
