"""Where the settings' PersRM, DPA checkpoint and reward model lie: inside the package, in a folder, or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefmw.embedded import DPA, PERSRM, REWARD, embedded_checkpoint
from prefmw.errors import ModelNotFoundError, SettingsError
from prefmw.preferences.directions import PRESETS, DPACard, read_card
from prefmw.settings import Settings, expanded

if TYPE_CHECKING:
    from prefmw.models.reward import RewardCard

_REWARD_FILES = ["reward.*", "*.json", "*.safetensors", "*.model", "*.txt"]


class DPASource(NamedTuple):
    """A DPA checkpoint: its card, and its folder or hub id."""

    card: DPACard
    source: str


class RewardSource(NamedTuple):
    """A reward model: its card, and its folder or hub id."""

    card: RewardCard
    source: str


def has_persrm(settings: Settings) -> bool:
    """Whether a PersRM is configured, or embedded for the settings' chat model."""
    return settings.persrm is not None or embedded_checkpoint(None, settings.model, PERSRM) is not None


def persrm_folder(settings: Settings) -> Path:
    """Where the settings' PersRM lies; one by hub id is downloaded.

    Raises:
        ModelNotFoundError: there is none.
    """
    if (embedded := embedded_checkpoint(settings.persrm, settings.model, PERSRM)) is not None:
        return embedded
    return _folder(settings.persrm or "", "PersRM", "persrm", PERSRM, ["persrm.*", "*.pt", "*.bin"])


def has_dpa(settings: Settings) -> bool:
    """Whether a DPA checkpoint is configured, embedded for the settings' chat model, or that model itself."""
    return settings.dpa is not None or _own_dpa(settings) is not None


def dpa_source(settings: Settings) -> DPASource:
    """The settings' DPA checkpoint; of one by hub id the card is downloaded, unless it is a released one.

    Raises:
        ModelNotFoundError: there is none, or it has no card.
        ModelError: its card cannot be read.
    """
    if settings.dpa is None:
        own = _own_dpa(settings)
        if own is None:
            raise ModelNotFoundError("no DPA checkpoint is known for this model; name one with --dpa")
        return own
    if settings.dpa in PRESETS:
        return DPASource(PRESETS[settings.dpa], settings.dpa)
    folder = embedded_checkpoint(settings.dpa, settings.model, DPA)
    if folder is None:
        folder = _folder(settings.dpa, "DPA checkpoint", "dpa", DPA, ["dpa.*"])
    card = read_card(folder)
    if card is None:
        raise ModelNotFoundError(
            f"no DPA checkpoint '{settings.dpa[:80]}': it holds no dpa.json, which says what its directions are over; "
            "name one that 'prefmw train dpa' wrote, or put the card beside it"
        )
    whole = card.weights == "whole"
    return DPASource(card, settings.dpa if whole and not expanded(settings.dpa).is_dir() else str(folder))


def reward_source(name: str, model: str = "") -> RewardSource:
    """The reward model of that name, an embedded one's, a folder or a hub id; with no name the one embedded for
    ``model``.

    Raises:
        ModelNotFoundError: there is none.
        ModelError: its card cannot be read.
    """
    from prefmw.models.reward import REWARD_PRESETS, read_reward_card

    if name in REWARD_PRESETS:
        return RewardSource(REWARD_PRESETS[name], name)
    folder = embedded_checkpoint(name or None, model, REWARD)
    if folder is None:
        if not name:
            raise ModelNotFoundError("no reward model is known for this model; name one with --reward")
        folder = _folder(name, "reward model", "reward", REWARD, _REWARD_FILES)
    return RewardSource(read_reward_card(folder), str(folder))


def _own_dpa(settings: Settings) -> DPASource | None:
    """The checkpoint that comes with the settings' chat model."""
    if (folder := embedded_checkpoint(None, settings.model, DPA)) is not None:
        card = read_card(folder)
        return DPASource(card, str(folder)) if card else None
    if settings.model in PRESETS:
        return DPASource(PRESETS[settings.model], settings.model)
    try:
        folder = expanded(settings.model)
        card = read_card(folder) if folder.is_dir() else None
    except (SettingsError, OSError):  # no path at all: who loads the model tells what is amiss
        return None
    return DPASource(card, settings.model) if card and card.weights == "whole" else None


def _folder(name: str, what: str, trainer: str, known: Mapping[str, str], patterns: list[str]) -> Path:
    """The folder of that path, or of a hub id what is downloaded of it; ``known`` are the embedded ones."""
    path = expanded(name)
    if path.is_dir() or path.is_file() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        if not path.is_dir():
            raise ModelNotFoundError(
                f"no {what} '{name[:80]}'; name a folder that 'prefmw train {trainer}' wrote, or a hub id; embedded is "
                f"{', '.join(known.values())}"
            )
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub and the network raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ModelNotFoundError(f"no {what} '{name[:80]}': no such folder here, nor on the hub: {reason}") from error
