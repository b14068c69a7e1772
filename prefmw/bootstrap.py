"""The one place that wires the rooms: settings in, a store and a personalizer out. Imports late, so that each is free
until it is used.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefmw.checkpoints import dpa_source, has_dpa, has_persrm, persrm_folder, reward_source
from prefmw.embedded import find_embedded, shipped_calibration, shipped_readout
from prefmw.errors import UsageError
from prefmw.preferences import Dimensions, PreferenceStore, default_dimensions, parse_dimensions
from prefmw.settings import Settings, expanded

if TYPE_CHECKING:
    from prefmw.arithmetic import Arithmetic
    from prefmw.decoding import Engine
    from prefmw.guidance import Guidance
    from prefmw.models import ChatModel, ModelSpec
    from prefmw.personalizer import Personalizer
    from prefmw.preferences.calibration import Calibration
    from prefmw.preferences.inference import Inferer
    from prefmw.rewards import Scorer
    from prefmw.scoring import Scale
    from prefmw.steering import Backend

_backends: dict[str, Backend] = {}
_guidances: dict[tuple[str, str], Guidance] = {}
_arithmetics: dict[tuple[str, str, str], Arithmetic] = {}
_scorers: dict[tuple[str, str], Scorer] = {}
_backbones: dict[str, ChatModel] = {}
_inferers: dict[str, Inferer] = {}
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def open_store(settings: Settings) -> PreferenceStore:
    """The store that the settings name; a fresh SQLite file gets its schema here.

    Raises:
        StoreError: it cannot be opened, or its schema is not this version's.
    """
    from prefmw.stores import SQLPreferenceStore

    return SQLPreferenceStore(settings.database_url)


def build_personalizer(settings: Settings, store: PreferenceStore) -> Personalizer:
    """A personalizer on the settings' chat model, which is loaded at the first reply and shared within the process."""
    from prefmw.personalizer import Personalizer
    from prefmw.plans import Defaults

    dimensions = load_dimensions(settings)
    defaults = Defaults(
        method=settings.method,
        strength=settings.strength,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        max_dials=settings.max_dials,
        candidate=settings.candidate,
        has_persrm=has_persrm(settings),
        dpa=(lambda: dpa_source(settings).card) if has_dpa(settings) else None,
        robust=settings.robust,
    )
    return Personalizer(
        store,
        lambda: load_backend(settings),
        dimensions,
        defaults,
        inferer=(lambda: load_inferer(settings, dimensions)) if settings.infer or settings.learn else None,
        infers=settings.infer,
        learns=settings.learn,
    )


def load_dimensions(settings: Settings) -> Dimensions:
    """The shipped dimensions, with what the settings' file adds, replaces and retires, in the words and with the
    midpoints of the settings' chat model, where it was calibrated.

    Raises:
        UsageError: the file is not there, or is no registry.
    """
    registry, calibration = load_registry(settings), load_calibration(settings) if settings.calibrated else None
    return registry if calibration is None else calibration.applied(registry)


def load_registry(settings: Settings) -> Dimensions:
    """The same before any model's calibration.

    Raises:
        UsageError: as above.
    """
    if settings.dimensions is None:
        return default_dimensions()
    path = expanded(settings.dimensions)
    try:
        return parse_dimensions(path.read_text(encoding="utf-8"), default_dimensions())
    except OSError as error:
        raise UsageError(f"the dimensions in '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path, or no UTF-8 in the file
        raise UsageError(f"the dimensions in '{path}' cannot be read: {error}") from error
    except UsageError as error:
        raise UsageError(f"the dimensions in '{path}': {error}") from error


def load_inferer(settings: Settings, dimensions: Dimensions) -> Inferer:
    """What reads preferences out of words, loaded once in a process; its embedder loads when it is first used.

    Raises:
        UsageError: there is no read-out, or it was fitted to another embedder than the settings'.
    """
    from prefmw.models.embedder import Embedder
    from prefmw.models.readout import load_readout
    from prefmw.preferences.inference import Inferer

    with _lock:
        key = repr((settings.embedder, settings.readout, tuple(dimensions.values())))
        if key not in _inferers:
            path = shipped_readout(settings.embedder) if settings.readout is None else expanded(settings.readout)
            if path is None:
                raise UsageError(
                    f"no read-out ships for the embedder '{settings.embedder[:80]}': make one with 'prefmw prefs "
                    "fit-readout --out FILE' and name it by the setting 'readout' (PREFMW_READOUT)"
                )
            embedder = Embedder(settings.embedder)
            readout = load_readout(path, embedder)
            _inferers[key] = Inferer(readout, dimensions)
        return _inferers[key]


def load_calibration(settings: Settings) -> Calibration | None:
    """What ``prefmw prefs calibrate`` found for the settings' chat model, or what ships for it; ``None`` where nobody
    calibrated it.
    """
    from prefmw.preferences.calibration import Calibration

    for file in filter(None, (calibration_file(settings), shipped_calibration(settings.model))):
        try:
            return Calibration.from_json(file.read_text(encoding="utf-8"))
        except UsageError as error:
            _log.warning("%s is left aside: %s; remake it with 'prefmw prefs calibrate'", file, error)
        except (OSError, ValueError):  # not there, or no text
            pass
    return None


def calibration_file(settings: Settings) -> Path:
    """Where the settings' chat model's calibration lies, or would lie."""
    import hashlib

    about = (settings.model, settings.model_revision, settings.quantization, settings.template_options)
    return settings.home / "calibrations" / f"dials-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"


def load_scale(
    settings: Settings, dimensions: Dimensions, progress: Callable[[float], None] = lambda share: None
) -> Scale:
    """What scores on the settings' chat model are like: measured once per model and registry, then remembered.

    Raises:
        ModelError: the model cannot be found or loaded.
        UsageError: its replies do not differ on some dimension.
    """
    import hashlib

    from prefmw.scoring import CALIBRATION, Scale, measured_scale
    from prefmw.training.topics import load_topics

    backend = load_backend(settings)
    chat = backend.chat
    model = (chat.name, chat.revision, chat.dtype, settings.quantization, settings.template_options)
    about = repr((CALIBRATION, model, tuple(dimensions.items())))
    file = settings.home / "calibrations" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, UsageError):  # what is not there or no calibration is measured anew
        return Scale.from_json(file.read_text(encoding="utf-8"))
    scale = measured_scale([topic.questions[0] for topic in load_topics()], backend, dimensions, progress)
    with suppress(OSError):  # a home that cannot be written to costs the measuring every time
        write_whole(file, scale.to_json() + "\n")
    return scale


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it meanwhile finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def load_backend(settings: Settings) -> Backend:
    """The settings' chat model and its engine: one per model, revision, dtype and device in this process; with it what
    loads the settings' PersRM and DPA checkpoint when they are needed.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    from prefmw.decoding import Engine
    from prefmw.models import load_chat_model
    from prefmw.steering import Backend

    spec = _spec(settings)
    with _lock:
        key = repr(spec)
        if key not in _backends:
            chat = load_chat_model(spec)
            engine = Engine(
                chat.module,
                capacity=chat.capacity,
                vocabulary=chat.vocabulary,
                parked_bytes=settings.parked_mb << 20,
                park_on_cpu=settings.park_on_cpu,
            )
            _check_once(settings.home / "checked-models.json", chat, engine)
            calibration = load_calibration(settings) if settings.calibrated else None
            if calibration is not None and calibration.revision != chat.revision:
                _log.warning(
                    "%s was calibrated with other weights than these; run 'prefmw prefs calibrate' again", chat.name
                )
            if not _backends:
                atexit.register(close_engines)
            _backends[key] = Backend(chat, engine)
        backend = _backends[key]
    if has_persrm(settings):
        backend = backend._replace(load_guidance=partial(load_guidance, settings, backend))
    if has_dpa(settings):
        backend = backend._replace(load_arithmetic=partial(load_arithmetic, settings, backend))
    return backend


def load_guidance(settings: Settings, backend: Backend) -> Guidance:
    """The settings' PersRM on their chat model's engine, loaded once per engine.

    Raises:
        ModelNotFoundError: there is none by that path or id, or its backbone is not to be found.
        ModelError: it cannot be read, or does not fit the backbone.
    """
    from prefmw.guidance import put_on
    from prefmw.models import load_chat_model
    from prefmw.models.persrm import load_persrm

    def load_backbone(name: str) -> ChatModel:
        spec = replace(_spec(settings), name=name, path=find_embedded(name), revision=None, quantization=None)
        if repr(spec) not in _backbones:
            _backbones[repr(spec)] = load_chat_model(spec)
        return _backbones[repr(spec)]

    with _lock:
        persrm = load_persrm(persrm_folder(settings))
        key = (repr(_spec(settings)), persrm.revision)
        if key not in _guidances:
            _guidances[key] = put_on(persrm, backend.chat, backend.engine, load_backbone)
        return _guidances[key]


def load_arithmetic(settings: Settings, backend: Backend) -> Arithmetic:
    """The settings' DPA checkpoint on the engine that decodes its replies: the chat model's, or where the checkpoint is
    a whole model, its own.

    Raises:
        ModelNotFoundError: there is none by that path or id.
        ModelError: it cannot be read, or does not fit the chat model.
        UsageError: it is conditioned on rewards.
    """
    from prefmw.models.dpa import check_is_directional

    check_is_directional(dpa_source(settings).card)
    return load_policy(settings, backend)


def load_policy(settings: Settings, backend: Backend) -> Arithmetic:
    """The same of any checkpoint, a SteerLM-style one among them; loaded once per engine.

    Raises:
        ModelNotFoundError, ModelError: as there.
    """
    from prefmw.arithmetic import Arithmetic, put_dpa_on
    from prefmw.models.dpa import load_dpa

    card, source = dpa_source(settings)
    name = settings.reward or card.reward
    if card.weights == "lora":
        dpa = load_dpa(Path(source))
        key = (repr(_spec(settings)), dpa.revision, name)
        with _lock:
            if key not in _arithmetics:
                scorer = partial(load_scorer, settings, backend, name) if name else None
                _arithmetics[key] = put_dpa_on(dpa, backend.chat, backend.engine, scorer)
            return _arithmetics[key]
    own = backend
    if source != settings.model:
        own = load_backend(settings.model_copy(update={"model": source, "model_revision": None}))
    scorer = partial(load_scorer, settings, own, name) if name else None
    return Arithmetic(card, own.chat.revision, own.chat, own.engine, None, scorer)


def load_scorer(settings: Settings, backend: Backend, name: str) -> Scorer:
    """:func:`scorer_on` a backend, loaded once."""
    key = (repr(_spec(settings)), name)
    if key not in _scorers:
        _scorers[key] = scorer_on(settings, name, backend.chat, backend.engine)
    return _scorers[key]


def scorer_on(settings: Settings, name: str, chat: ChatModel, engine: Engine) -> Scorer:
    """The reward model of that name, or the one embedded for the settings' chat model where it is empty: on an engine
    of ours where that decodes with its backbone.

    Raises:
        ModelNotFoundError: there is none by that name, or its backbone is not to be found.
        ModelError: it cannot be read, or does not fit its backbone.
    """
    from prefmw.models.persrm import weights_digest
    from prefmw.models.reward import load_reward
    from prefmw.rewards import load_whole_reward, put_reward_on

    card, source = reward_source(name, settings.model)
    if card.weights == "whole":
        return load_whole_reward(card, source, source, _spec(settings), remote_code=settings.trust_remote_code)
    model = load_reward(Path(source))
    if weights_digest(chat.module) != model.card.backbone["weights"]:
        other = {"model": str(model.card.backbone["name"]), "model_revision": None}
        reader = load_backend(settings.model_copy(update=other))
        chat, engine = reader.chat, reader.engine
    return put_reward_on(model, chat, engine)


def _spec(settings: Settings) -> ModelSpec:
    from prefmw.models import ModelSpec

    return ModelSpec(
        name=settings.model,
        path=find_embedded(settings.model),
        revision=settings.model_revision,
        device=settings.device,
        dtype=settings.dtype,
        device_map=settings.device_map,
        quantization=settings.quantization,
        trust_remote_code=settings.trust_remote_code,
        template_options=settings.template_options,
    )


def _check_once(remembered: Path, chat: ChatModel, engine: Engine) -> None:
    """The engine's self-check, once per configuration, type, kind of device and version of the libraries; what passed
    is remembered.
    """
    import hashlib
    import json
    from importlib.metadata import version

    config = chat.module.config
    shape = hashlib.sha256(config.to_json_string().encode()).hexdigest()[:12]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    kind = f"{type(chat.module).__name__} {shape}, {config._attn_implementation}"
    asked = f"{kind}, {chat.dtype} on {chat.device.type}, {libraries}"
    try:
        passed = set(json.loads(remembered.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        passed = set()
    if asked not in passed:
        engine.self_check()
        with suppress(OSError):  # a home that cannot be written to costs the check every time
            remembered.parent.mkdir(parents=True, exist_ok=True)
            remembered.write_text(json.dumps(sorted({*passed, asked}), indent=1) + "\n", encoding="utf-8")


def close_engines() -> None:
    """Shut down every engine of this process; for the end of a program."""
    with _lock:
        for backend in _backends.values():
            backend.engine.close()
        _backends.clear()
        _guidances.clear()
        _arithmetics.clear()
        _scorers.clear()
        _backbones.clear()
