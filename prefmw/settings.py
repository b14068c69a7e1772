"""Settings: flags over ``PREFMW_*`` environment variables over the config file over defaults, resolved once.

Nothing deeper than this file reads the environment. Every file of a user lies under ``PREFMW_HOME`` (``~/.prefmw``):
the config file ``config.toml`` and, unless a database is named, ``prefmw.db``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import (
    SettingsError as UnreadableEnvironment,
)

from prefmw.errors import SettingsError

CONFIG_FILE = "config.toml"


def home() -> Path:
    """Where a user's files lie: ``PREFMW_HOME``, by default ``~/.prefmw``."""
    return Path(os.environ.get("PREFMW_HOME") or "~/.prefmw").expanduser()


class Settings(BaseSettings):
    """Everything that can be set, with the value in force. Read it with :func:`load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="PREFMW_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    home: Path = Field(default_factory=home)
    """Folder of the config file and the default database."""

    database: str = ""
    """SQLAlchemy URL (``postgresql+psycopg://...``) or the path of an SQLite file; by default prefmw.db under home."""

    user: str | None = None
    """Whose preferences apply where no --user is given."""

    log: bool = True
    """Record turns."""

    model: str = "tiny"
    """The chat model: a folder, a hub id, or an embedded model's name."""

    model_revision: str | None = None
    """Branch, tag or commit of a hub id."""

    device: str = "auto"
    """Torch device; auto is cuda, else mps, else cpu."""

    dtype: str = "auto"
    """Type of the weights: auto, float32, bfloat16 or float16."""

    device_map: str | dict[str, Any] | None = None
    """Handed to transformers: auto spreads a model over several GPUs."""

    quantization: dict[str, Any] | None = None
    """Handed to transformers as its quantisation config, {load_in_4bit = true} say."""

    trust_remote_code: bool = False
    """Run code that comes with a model."""

    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, {enable_thinking = false} say."""

    method: str = "auto"
    """Alignment method for users who chose none: auto, none, prompt or linear."""

    strength: dict[str, float] = Field(default_factory=dict)
    """Strength by method, for users who chose none: {linear = 3.0} say (PREFMW_STRENGTH__LINEAR)."""

    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""

    top_p: float = 0.8
    """Nucleus of the candidate rule (Linear Alignment's released code: 0.8)."""

    top_k: int | None = None
    """Most candidates a token is drawn from; no bound by default."""

    max_tokens: int = 512
    """Tokens of a reply, at most."""

    seed: int | None = None
    """Seed of the sampling; a fresh one is drawn, and told, for every reply where none is set."""

    @property
    def database_url(self) -> str:
        """The database as an SQLAlchemy URL."""
        if not self.database:
            return f"sqlite:///{self.home / 'prefmw.db'}"
        return self.database if "://" in self.database else f"sqlite:///{Path(self.database).expanduser()}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, config file, in that order."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, home() / CONFIG_FILE)


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Resolve the settings; a flag that is ``None`` was not given.

    Raises:
        SettingsError: a value of the wrong type, an unknown entry in the config file, or a file that is not TOML.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    config = home() / CONFIG_FILE
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        place = f"a flag, PREFMW_{name.upper().replace('.', '__')} or {config}"
        raise SettingsError(f"setting '{name}' ({place}): {first['msg']}") from error
    except UnreadableEnvironment as error:
        raise SettingsError(f"a PREFMW_* environment variable cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config} is not valid TOML: {error}") from error
    except OSError as error:
        raise SettingsError(f"{config} cannot be read: {error.strerror}") from error
