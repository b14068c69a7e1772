"""What ships inside the package, and where: chat models, their checkpoints and calibrations, read-outs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from prefmw.errors import ModelNotFoundError

EMBEDDED = ("tiny",)
"""The chat models' names."""

PERSRM = {"tiny": "tiny-persrm"}
"""The PersRM that is embedded for a chat model."""

DPA = {"tiny": "tiny-dpa"}
"""Likewise the DPA checkpoint."""

REWARD = {"tiny": "tiny-reward"}
"""Likewise the reward model."""


def embedded_path(name: str) -> Path:
    """Where an embedded model lies, or would lie."""
    return Path(str(files("prefmw"))) / "assets" / name


def embedded_checkpoint(name: str | None, model: str, known: Mapping[str, str]) -> Path | None:
    """The folder of the checkpoint of that name among those ``known``, or of the one embedded for ``model`` where none
    is named; ``None`` for a path or hub id, or where there is none.
    """
    found = known.get(model) if name is None else name if name in known.values() else None
    path = embedded_path(found) if found else None
    return path if path and any(path.glob("*.json")) else None


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


def shipped_calibration(model: str) -> Path | None:
    """The calibration of an embedded model; ``None`` for any other."""
    path = embedded_path("calibrations") / f"{model}.json"
    return path if model in EMBEDDED and path.is_file() else None


def shipped_readout(embedder: str) -> Path | None:
    """The read-out that ships for an embedder; ``None`` for any other than the default."""
    path = embedded_path("readouts") / f"{embedder}.safetensors"
    return path if path.parent.name == "readouts" and path.is_file() else None
