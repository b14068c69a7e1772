"""The chat models that need no download: those inside the package, and those in the hub's cache. No tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefmw.embedded import EMBEDDED, embedded_path
from prefmw.errors import nearest


def embedded_models() -> list[dict[str, Any]]:
    """``name kind path present bytes`` of every embedded model."""
    found = []
    for name in EMBEDDED:
        path = embedded_path(name)
        present = (path / "config.json").is_file()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if present else 0
        found.append({"name": name, "kind": "embedded", "path": str(path), "present": present, "bytes": size})
    return found


def cached_models() -> list[dict[str, Any]]:
    """The same of the models in the Hugging Face cache that hold a chat template."""
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


def nearest_model(name: str) -> str:
    """The end of an error message about a chat model that is not found: one whose name is close, then all at hand."""
    try:
        cached = cached_models()
    except (OSError, ValueError):  # a cache that cannot be read hides only itself
        cached = []
    return nearest(name, (model["name"] for model in [*embedded_models(), *cached] if model["present"]))


def _is_chat_model(repo: Any) -> bool:
    for revision in repo.revisions:
        for file in revision.files:
            if file.file_name == "chat_template.jinja":
                return True
            if file.file_name == "tokenizer_config.json" and '"chat_template"' in Path(file.file_path).read_text(
                "utf-8"
            ):
                return True
    return False
