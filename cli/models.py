"""`prefmw models`: the chat models at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prefmw.cli.options import JsonOption
from prefmw.cli.output import print_json, print_table
from prefmw.errors import ModelNotFoundError, nearest

app = typer.Typer(help="The chat models at hand.", no_args_is_help=True)


@app.command("list")
def list_models(json: JsonOption = False) -> None:
    """List embedded models and those in the hub's local cache; any other folder or hub id works with -m as well."""
    from prefmw.settings import load_settings

    default = load_settings().model
    models = [*_embedded(), *_cached()]
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
    found = {model["name"]: model["path"] for model in [*_embedded(), *_cached()] if model["present"]}
    if name not in found:
        raise ModelNotFoundError(f"no model '{name[:80]}' at hand: {nearest(name[:80], found)}")
    print(found[name])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _embedded() -> list[dict[str, Any]]:
    from prefmw.embedded import EMBEDDED, embedded_path

    found = []
    for name in EMBEDDED:
        path = embedded_path(name)
        present = (path / "config.json").is_file()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if present else 0
        found.append({"name": name, "kind": "embedded", "path": str(path), "present": present, "bytes": size})
    return found


def _cached() -> list[dict[str, Any]]:
    """Models in the Hugging Face cache that hold a chat template."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        {
            "name": repo.repo_id,
            "kind": "hub cache",
            "path": str(repo.repo_path),
            "present": True,
            "bytes": repo.size_on_disk,
        }
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model" and _is_chat_model(repo)
    ]


def _is_chat_model(repo: Any) -> bool:
    for revision in repo.revisions:
        for file in revision.files:
            if file.file_name == "chat_template.jinja":
                return True
            if file.file_name == "tokenizer_config.json" and '"chat_template"' in file.file_path.read_text("utf-8"):
                return True
    return False
