"""`prefmw prefs`: a user's preferences, as numbers one can read and edit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from prefmw.cli.options import (
    DatabaseOption,
    JsonOption,
    ReasonOption,
    UserArgument,
    actor,
    opened_store,
    parse_weight,
    read_texts,
    registry,
)
from prefmw.cli.output import print_inference, print_json, print_lesson, print_table, say, shorten, show_profile, stages
from prefmw.errors import UsageError
from prefmw.preferences import Source

app = typer.Typer(help="A user's preferences: numbers one can read and edit.", no_args_is_help=True)

AsAdminOption = Annotated[
    bool, typer.Option("--as-admin", help="Write the admin's layer, which covers the user's own.")
]


@app.command()
def show(user_id: UserArgument, json: JsonOption = False, database: DatabaseOption = None) -> None:
    """Show the weights in effect, where each came from, and the principle text they add up to."""
    with opened_store(database) as store:
        profile = store.profile(user_id)
    show_profile(profile, json)


@app.command("set")
def set_weights(
    user_id: UserArgument,
    weights: Annotated[list[str], typer.Argument(metavar="DIM=WEIGHT...", help="verbosity=-0.6, say; in [-1, 1].")],
    as_admin: AsAdminOption = False,
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Set weights."""
    dimensions = registry()
    values = dict(parse_weight(item, dimensions) for item in weights)
    if len(values) < len(weights):
        raise UsageError("a dimension is given twice; give each once")
    with opened_store(database) as store:
        profile = store.write_weights(user_id, values, source=_layer(as_admin), actor=actor(), reason=reason)
    show_profile(profile, json)


@app.command("unset")
def unset_weights(
    user_id: UserArgument,
    names: Annotated[list[str], typer.Argument(metavar="DIM...", help="Dimensions to unset.")],
    as_admin: AsAdminOption = False,
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Unset weights; what lay beneath, inferred or learned, is in effect again."""
    source = _layer(as_admin)
    with opened_store(database) as store:
        before = store.profile(user_id)
        dimensions = registry()
        known = {*dimensions, *(layer.dimension for layer in before.layers)}  # a retired one can be unset
        for name in names:
            if name not in known:
                dimensions.named(name)
        profile = store.write_weights(user_id, dict.fromkeys(names), source=source, actor=actor(), reason=reason)
    for name in names:
        if left := profile.weights.get(name):
            say(f"{name} is now {left.value:+g}, from {left.source.name}")
        elif name not in before.weights:
            say(f"{name} was not set")
    show_profile(profile, json)


@app.command()
def infer(
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What somebody says of themselves.")] = None,
    user: Annotated[
        str | None, typer.Option("-u", "--user", metavar="ID", help="Read this user's persona, and store the weights.")
    ] = None,
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Infer weights from words, and show the anchors they resemble. TEXT is only read; --user's weights are stored."""
    from prefmw.bootstrap import load_inferer
    from prefmw.hearing import store_inference
    from prefmw.settings import load_settings

    if (text is None) == (user is None):
        raise UsageError("give either a TEXT or --user ID")
    dimensions = registry()
    inferer = load_inferer(load_settings(), dimensions)
    if text is not None:
        found = inferer.infer(text)
    else:
        with opened_store(database) as store:
            profile = store.profile(str(user))
            found = inferer.infer(profile.persona)
            store_inference(store, profile, inferer, found)
    if json:
        print_json(found.as_json())
    else:
        print_inference(found, dimensions)


@app.command("fit-readout")
def fit_readout(
    out: Annotated[Path, typer.Option("--out", help="Where to write the read-out, a .safetensors file.")],
    embedder: Annotated[
        str | None, typer.Option("--embedder", help="A folder or hub id; by default the settings'.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--start", help="A read-out to go on from: two more passes, with further texts say.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same read-out.")] = 0,
    json: JsonOption = False,
) -> None:
    """Fit the read-out that turns words into weights, and print how it does on the tenth that is held out. Killed and
    started again, it goes on where it was.
    """
    from prefmw.models.embedder import Embedder
    from prefmw.models.readout import load_readout
    from prefmw.preferences.anchors import anchor_bank
    from prefmw.settings import load_settings
    from prefmw.training.readout import EPOCHS, FURTHER
    from prefmw.training.readout import fit_readout as fit
    from prefmw.training.unfinished import beside

    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UsageError(f"'{out}' is no path for a read-out: a folder that exists, and an ending in .safetensors")
    known = Embedder(load_settings({"embedder": embedder}).embedder)
    begun = load_readout(start, known) if start else None
    epochs = FURTHER if begun else EPOCHS
    dimensions = registry()
    if beside(out).exists():
        say(f"going on with what '{beside(out)}' holds")
    with stages() as tell:
        _, measured = fit(
            known, anchor_bank(dimensions), dimensions, seed=seed, epochs=epochs, start=begun, progress=tell, out=out
        )
    if json:
        print_json({"readout": str(out), "embedder": known.name, **measured})
    else:
        print(
            *(
                f"{key:<17} {value:.3f}" if isinstance(value, float) else f"{key:<17} {value}"
                for key, value in measured.items()
            ),
            sep="\n",
        )


@app.command()
def calibrate(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model; by default the settings'.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=8, help="Questions asked in every setting.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write it here instead of where it takes effect.")] = None,
    json: JsonOption = False,
) -> None:
    """Find the words that ask a chat model best for each pole, and how far half a weight must go to do half of what
    they do. Killed and started again, it goes on where it was.
    """
    from prefmw.bootstrap import calibration_file, load_backend, load_registry, write_whole
    from prefmw.cli.output import loading
    from prefmw.evaluation.calibrate import Trials, calibrate
    from prefmw.settings import load_settings
    from prefmw.training.topics import load_topics
    from prefmw.training.unfinished import Unfinished, beside

    if out is not None and not out.parent.is_dir():
        raise UsageError(f"'{out}' is no path for a calibration: its folder does not exist")
    settings = load_settings({"model": model})
    dimensions = load_registry(settings)
    questions = [topic.questions[0] for topic in load_topics()][:n]
    with loading(settings.model):
        backend = load_backend(settings)
    trials, path = Trials(backend, questions, seed=seed), out or calibration_file(settings)
    if beside(path).exists():
        say(f"going on with what '{beside(path)}' holds")
    unfinished = Unfinished(path, trials.about(dimensions))
    with stages() as tell:
        found, rows = calibrate(trials, dimensions, tell, unfinished)
    try:
        write_whole(path, found.to_json() + "\n")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}") from error
    unfinished.done()
    if json:
        print_json({"calibration": str(path), "rows": rows, "settings": {"n": len(questions), "seed": seed}})
        return
    print_table(
        ["dimension", "pole", "words do", "words loop", "half goes", "half does", "principle"],
        [
            [
                row["dimension"],
                row["pole"],
                f"{row['moves'][row['wording']]:+.2f}",
                f"{row['loops']:.2f}",
                f"{row['midpoint']:.2f}",
                _half(row),
                row["principle"],
            ]
            for row in rows
        ],
    )
    say(f"written to {path}")


@app.command()
def learn(
    user_id: UserArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help='JSON lines: {"prompt", "chosen", "rejected"}.')],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The chat model that scores; by default the settings'.")
    ] = None,
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Learn weights from choices between replies, these and all that were stored before."""
    from prefmw.bootstrap import load_backend, load_dimensions, load_scale
    from prefmw.choices import LEAST, Choice, learn_from_choices, score_choices
    from prefmw.cli.output import loading
    from prefmw.preferences import Message
    from prefmw.settings import load_settings

    settings = load_settings({"model": model})
    dimensions = load_dimensions(settings)
    pairs = read_texts(file, "prompt", "chosen", "rejected")
    with opened_store(database) as store:
        known = {(one.prompt, one.chosen, one.rejected) for one in store.feedback(user_id)}
        new = [texts for texts in pairs if tuple(texts) not in known and texts[1].strip() != texts[2].strip()]
        choices = [Choice("choice", (Message("user", asked),), chosen, rejected) for asked, chosen, rejected in new]
        with loading(settings.model):
            backend = load_backend(settings)
        with stages() as tell:
            scale = load_scale(settings, dimensions, lambda share: tell("calibrating, once for this model", share))
            feedback = score_choices(user_id, choices, backend, dimensions, scale, lambda share: tell("scoring", share))
        for one in feedback:
            store.add_feedback(one)
        reason = f"{len(feedback)} choices from {file.name}"
        lesson = learn_from_choices(store, user_id, scale.dimensions, actor=actor(), reason=reason)
        profile = store.profile(user_id)
    if skipped := len(pairs) - len(new):
        say(f"{skipped} of {len(pairs)} pairs were left out: stored before, or of two equal replies")
    if lesson.learned is None:
        say(f"{lesson.choices} choices; {LEAST} are needed before weights are learned")
    if json:
        print_json(lesson.as_json())
    elif lesson.learned is not None:
        print_lesson(lesson, profile)


@app.command()
def history(user_id: UserArgument, json: JsonOption = False, database: DatabaseOption = None) -> None:
    """Show every change of a user's profile: when, who, why and what."""
    with opened_store(database) as store:
        revisions = store.revisions(user_id)
    if json:
        print_json([asdict(revision) | {"created_at": revision.created_at.isoformat()} for revision in revisions])
        return
    rows = [
        [
            str(revision.number),
            f"{revision.created_at:%Y-%m-%d %H:%M:%S}",
            revision.actor,
            "; ".join(_change(name, *pair) for name, pair in revision.change.items()),
            revision.reason,
        ]
        for revision in revisions
    ]
    print_table(["revision", "when (UTC)", "who", "what", "why"], rows)


@app.command()
def revert(
    user_id: UserArgument,
    revision: Annotated[int, typer.Argument(metavar="REVISION", help="A number that 'prefs history' shows.")],
    reason: ReasonOption = "",
    json: JsonOption = False,
    database: DatabaseOption = None,
) -> None:
    """Make a profile what it was after a revision, every layer of it; that is a new revision."""
    with opened_store(database) as store:
        before = store.profile(user_id).revision
        profile = store.revert(user_id, revision, actor=actor(), reason=reason)
    if not json:
        say(f"{user_id} is back at revision {revision}" if profile.revision > before else "nothing had changed since")
    show_profile(profile, json)


@app.command()
def dimensions(json: JsonOption = False) -> None:
    """List the dimensions that a preference can be set on, and the sentence that asks a model for each pole."""
    known = registry()
    if json:
        print_json({key: asdict(dimension) for key, dimension in known.items()})
        return
    rows = [
        [
            dimension.key,
            f"{weight:+d} {pole.name}" if pole else "",
            dimension.kind if weight < 0 or not dimension.negative else "",
            pole.principle,
        ]
        for dimension in known.values()
        for weight, pole in ((-1, dimension.negative), (1, dimension.positive))
        if pole
    ]
    print_table(["dimension", "pole", "kind", "principle"], rows)


def _change(name: str, before: Any, after: Any) -> str:
    """One field's change for a person: ``humor (user) +0.50 -> +1.00``."""
    kind, _, rest = name.partition(".")
    if kind == "weight":
        dimension, _, source = rest.rpartition(".")
        old, new = (f"{value[0]:+.2f}" if isinstance(value, list) else "unset" for value in (before, after))
        return f"{dimension} ({source}) {old} → {new}"
    old, new = (shorten(str(value), 40) if value not in (None, "") else "–" for value in (before, after))
    return f"{name} {old} → {new}"


def _half(row: dict[str, Any]) -> str:
    """What half a weight does, for a person."""
    if row["moved"] is None:
        return "(words do nothing)"
    return f"{row['moved']:+.2f}" + ("" if row["reached"] else " (short)")


def _layer(as_admin: bool) -> Source:
    return Source.admin if as_admin else Source.user
