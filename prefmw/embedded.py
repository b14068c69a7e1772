"""What ships inside the package, chat models and read-outs of preferences, and where it lies."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from prefmw.errors import ModelNotFoundError

EMBEDDED = ("tiny",)
"""Their names."""


def embedded_path(name: str) -> Path:
    """Where an embedded model lies, or would lie."""
    return Path(str(files("prefmw"))) / "assets" / name


def find_embedded(model: str) -> Path | None:
    """The folder of an embedded model; ``None`` for any other.

    Raises:
        ModelNotFoundError: an embedded model that this installation lacks.
    """
    if model not in EMBEDDED:
        return None
    path = embedded_path(model)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"the embedded chat model '{model}' is not in this installation; name one with -m: a folder, or a hub id "
            "such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    return path


def shipped_readout(embedder: str) -> Path | None:
    """The read-out that ships for an embedder; ``None`` for any other than the default."""
    path = embedded_path("readouts") / f"{embedder}.safetensors"
    return path if path.parent.name == "readouts" and path.is_file() else None
