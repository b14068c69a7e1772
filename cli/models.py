"""`prefmw models`: the chat models at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefmw.cli.options import JsonOption
from prefmw.cli.output import print_json, print_table
from prefmw.errors import ModelNotFoundError, nearest

app = typer.Typer(help="The chat models at hand.", no_args_is_help=True)


@app.command("list")
def list_models(json: JsonOption = False) -> None:
    """List embedded models and those in the hub's local cache; any other folder or hub id works with -m as well."""
    from prefmw.at_hand import cached_models, embedded_models
    from prefmw.settings import load_settings

    default = load_settings().model
    models = [*embedded_models(), *cached_models()]
    if default not in {model["name"] for model in models}:
        folder = Path(default).expanduser()
        present = (folder / "config.json").is_file()
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if present else 0
        kind = "folder" if present else "not at hand"
        models.append({"name": default, "kind": kind, "path": str(folder), "present": present, "bytes": size})
    for model in models:
        model["default"] = model["name"] == default
    if json:
        print_json(models)
        return
    rows = [
        [
            model["name"],
            model["kind"],
            _size(model["bytes"]) if model["present"] else "not installed",
            "yes" if model["default"] else "",
        ]
        for model in models
    ]
    print_table(["model", "kind", "size", "default"], rows)


@app.command()
def path(name: Annotated[str, typer.Argument(metavar="MODEL", help="A name that 'models list' shows.")]) -> None:
    """Print the folder that a model lies in."""
    from prefmw.at_hand import cached_models, embedded_models

    found = {model["name"]: model["path"] for model in [*embedded_models(), *cached_models()] if model["present"]}
    if name not in found:
        raise ModelNotFoundError(f"no model '{name[:80]}' at hand: {nearest(name[:80], found)}")
    print(found[name])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
