"""Settings: flags over ``PREFMW_*`` environment variables over the config file over defaults, resolved once.

Nothing deeper than this file reads the environment. Every file of a user lies under ``PREFMW_HOME`` (``~/.prefmw``):
the config file ``config.toml`` and, unless a database is named, ``prefmw.db``.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import (
    SettingsError as UnreadableEnvironment,
)

from prefmw.errors import SettingsError, UsageError, nearest
from prefmw.preferences import check_candidate, check_method, check_strength

CONFIG_FILE = "config.toml"


def home() -> Path:
    """Where a user's files lie: ``PREFMW_HOME``, by default ``~/.prefmw``."""
    return expanded(os.environ.get("PREFMW_HOME") or "~/.prefmw")


def expanded(path: str) -> Path:
    """A path as somebody wrote it, ``~`` as their home.

    Raises:
        SettingsError: it is no text, or names the home of nobody.
    """
    try:
        path.encode()  # an argument that is no text has surrogates in it
        return Path(path).expanduser()
    except UnicodeEncodeError as error:
        raise SettingsError("a path is not valid UTF-8; give another") from error
    except RuntimeError as error:  # no such user, or no home at all
        raise SettingsError(f"the path '{path[:80]}' cannot be read: {error}; write it out") from error


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

    _home: Path = PrivateAttr(default_factory=home)

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

    dimensions: str | None = None
    """A TOML file of the deployment's own dimensions, which adds to the shipped ones, replaces or retires them."""

    calibrated: bool = True
    """Take the words and midpoints that ``prefmw prefs calibrate`` found for the chat model, where it did."""

    embedder: str = "all-MiniLM-L6-v2"
    """What reads preferences out of words: a folder or hub id of a sentence-transformers model."""

    readout: str | None = None
    """The read-out fitted to that embedder (``prefmw prefs fit-readout``); by default the one that ships for it."""

    infer: bool = False
    """Infer weights from a persona when a turn first needs them."""

    learn: bool = False
    """Take a preference that a user states in conversation as theirs."""

    parked_mb: int = Field(default=1024, ge=0)
    """Memory for what conversations have read, between two turns; 0 keeps nothing."""

    park_on_cpu: bool = False
    """Keep that in the computer's memory rather than the device's."""

    method: str = "auto"
    """Alignment method for users who chose none: auto, none, prompt, linear, drift, pad or dpa."""

    persrm: str | None = None
    """The PersRM that pad is guided by: a folder, a hub id, or an embedded one's name; by default the chat model's own,
    where one is embedded for it."""

    dpa: str | None = None
    """The DPA checkpoint that dpa answers by: a folder, a hub id, or an embedded one's name; by default the chat
    model's own, where it has one."""

    reward: str | None = None
    """The reward model that chooses among replies: a folder, a hub id, or an embedded one's name; by default the one
    that the DPA checkpoint's card names."""

    robust: int | None = Field(default=None, ge=1, le=64)
    """Replies that dpa keeps the best of, each asked for with a direction near the user's; one reply by default."""

    candidate: str | None = None
    """How pad picks: greedy, stochastic or best-of-k; by default the temperature decides between the first two."""

    strength: dict[str, float] = Field(default_factory=dict)
    """Strength by method, for users who chose none: {linear = 3.0} say (PREFMW_STRENGTH__LINEAR)."""

    temperature: float = Field(default=0.7, ge=0, le=100)
    """Sampling temperature; 0 is greedy, else from 0.01."""

    top_p: float = Field(default=0.8, ge=1e-6, le=1)
    """Nucleus of the candidate rule (Linear Alignment's released code: 0.8)."""

    top_k: int | None = Field(default=None, ge=1)
    """Most candidates a token is drawn from; no bound by default."""

    max_tokens: int = Field(default=512, ge=1)
    """Tokens of a reply, at most."""

    max_dials: int = Field(default=7, ge=1)
    """Weights that act at once under drift, at most, the strongest first: each is one more row of the forward pass."""

    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the sampling; a fresh one is drawn, and told, for every reply where none is set."""

    @property
    def home(self) -> Path:
        """Folder of the config file and the default database."""
        return self._home

    @property
    def database_url(self) -> str:
        """The database as an SQLAlchemy URL, its password in it."""
        if "://" in self.database:
            return self.database
        from sqlalchemy.engine import URL  # the path may hold what means something in a URL

        file = expanded(self.database) if self.database else self.home / "prefmw.db"
        return URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)

    @field_validator("quantization", "template_options", mode="before")
    @classmethod
    def _typed(cls, values: Any) -> Any:
        """Entries given as PREFMW_..__NAME arrive as strings: true, 4 and null mean what they mean in JSON."""
        if not isinstance(values, dict):
            return values
        return {name: _from_json(value) if isinstance(value, str) else value for name, value in values.items()}

    @field_validator("candidate", "method")
    @classmethod
    def _known(cls, name: str | None, info: ValidationInfo) -> str | None:
        try:
            return check_candidate(name) if info.field_name == "candidate" else check_method(name or "")
        except UsageError as error:
            raise ValueError(str(error)) from error

    @field_validator("temperature")
    @classmethod
    def _greedy_or_not(cls, temperature: float) -> float:
        if 0 < temperature < 0.01:
            raise ValueError("a temperature is 0, which is greedy, or at least 0.01")
        return temperature

    @field_validator("strength")
    @classmethod
    def _by_method(cls, strength: dict[str, float]) -> dict[str, float]:
        for method, value in strength.items():
            try:
                check_strength(check_method(method), value)
            except UsageError as error:
                raise ValueError(str(error)) from error
        return strength

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
    for name, value in os.environ.items():
        if name.startswith("PREFMW_") and value != value.encode("utf-8", "replace").decode():
            raise SettingsError(f"the environment variable {name} is not valid UTF-8; set it anew")
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    config = home() / CONFIG_FILE
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = nearest(name, Settings.model_fields)
            raise SettingsError(f"there is no setting '{name}', in {config} or given by name; {known}") from error
        place = f"a flag, PREFMW_{name.upper().replace('.', '__')} or {config}"
        raise SettingsError(f"setting '{name}' ({place}): {first['msg']}") from error
    except UnreadableEnvironment as error:
        raise SettingsError(f"a PREFMW_* environment variable cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config} is not valid TOML: {error}") from error
    except OSError as error:
        raise SettingsError(f"{config} cannot be read: {error.strerror}") from error


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
