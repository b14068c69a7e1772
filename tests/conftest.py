"""What many tests need: no network, a home of their own, a small chat model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("prefmw", deadline=None, derandomize=True)
settings.load_profile("prefmw")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PREFMW_HOME of the test's own, and no other PREFMW_* variable."""
    for name in [name for name in os.environ if name.startswith("PREFMW_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("PREFMW_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small ChatML chat model."""
    from tests.toymodels import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def chat_model(toy: Path):
    """That model, loaded."""
    from prefmw.models import ModelSpec, load_chat_model

    return load_chat_model(ModelSpec(name=str(toy)))


@pytest.fixture(scope="session")
def backend(chat_model) -> Iterator:
    """That model with an engine."""
    from prefmw.decoding import Engine
    from prefmw.steering import Backend

    engine = Engine(chat_model.module, capacity=chat_model.capacity, vocabulary=chat_model.vocabulary)
    yield Backend(chat_model, engine)
    engine.close()


@pytest.fixture(scope="session")
def tiny() -> Iterator:
    """The embedded chat model with an engine."""
    from prefmw.decoding import Engine
    from prefmw.embedded import embedded_path
    from prefmw.models import ModelSpec, load_chat_model
    from prefmw.steering import Backend

    chat = load_chat_model(ModelSpec(name="tiny", path=embedded_path("tiny")))
    engine = Engine(chat.module, capacity=chat.capacity, vocabulary=chat.vocabulary)
    yield Backend(chat, engine)
    engine.close()


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], None]:
    """Put into a home what scores on a model are like, measured once for all tests."""
    from prefmw.bootstrap import load_scale
    from prefmw.cli.output import loading
    from prefmw.preferences import default_dimensions
    from prefmw.settings import load_settings

    measured: dict[Path, Path] = {}

    def put(model: Path, home: Path) -> None:
        if model not in measured:
            with loading(str(model)):
                load_scale(load_settings({"model": str(model)}), default_dimensions())
            measured[model] = tmp_path_factory.mktemp("calibrations") / "kept"
            shutil.copytree(home / "calibrations", measured[model])
        shutil.copytree(measured[model], home / "calibrations", dirs_exist_ok=True)

    return put


@pytest.fixture
def store(tmp_path: Path) -> Iterator:
    """A fresh SQLite store."""
    from prefmw.stores import SQLPreferenceStore

    store = SQLPreferenceStore(f"sqlite:///{tmp_path / 'prefmw.db'}")
    yield store
    store.close()
