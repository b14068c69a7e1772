"""What ships inside the package: chat models, their PersRMs and calibrations, read-outs of preferences; and where."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from prefmw.errors import ModelNotFoundError

EMBEDDED = ("tiny",)
"""The chat models' names."""

PERSRM = {"tiny": "tiny-persrm"}
"""The PersRM that is embedded for a chat model."""


def embedded_path(name: str) -> Path:
    """Where an embedded model lies, or would lie."""
    return Path(str(files("prefmw"))) / "assets" / name


def find_persrm(name: str | None, model: str) -> Path | None:
    """The folder of the PersRM of that name, or of the one embedded for ``model`` where none is named; ``None`` for a
    path or hub id, or where there is none.
    """
    known = PERSRM.get(model) if name is None else name if name in PERSRM.values() else None
    path = embedded_path(known) if known else None
    return path if path and (path / "persrm.json").is_file() else None


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
