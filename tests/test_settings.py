"""Flags over environment over config file over defaults, and errors that name the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmw.errors import SettingsError
from prefmw.settings import Settings, load_settings


def write_config(home: Path, text: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(text)


def test_defaults(home):
    settings = load_settings()
    assert (settings.model, settings.method, settings.top_p, settings.log) == ("tiny", "auto", 0.8, True)
    assert settings.database_url == f"sqlite:///{home}/prefmw.db"


def test_flags_over_environment_over_config_file(home, monkeypatch):
    write_config(home, "max_tokens = 1\ntemperature = 0.1\ntop_p = 0.2")
    monkeypatch.setenv("PREFMW_MAX_TOKENS", "2")
    monkeypatch.setenv("PREFMW_TEMPERATURE", "0.3")
    settings = load_settings({"max_tokens": 3, "temperature": None})
    assert (settings.max_tokens, settings.temperature, settings.top_p) == (3, 0.3, 0.2)


def test_strength_is_kept_per_method(home, monkeypatch):
    write_config(home, "[strength]\nlinear = 3.5")
    assert load_settings().strength == {"linear": 3.5}
    monkeypatch.setenv("PREFMW_STRENGTH__LINEAR", "1.5")
    assert load_settings().strength == {"linear": 1.5}


def test_home_moves_the_database_and_the_config_file(tmp_path, monkeypatch):
    write_config(tmp_path / "elsewhere", 'model = "mine"')
    monkeypatch.setenv("PREFMW_HOME", str(tmp_path / "elsewhere"))
    settings = load_settings()
    assert settings.model == "mine"
    assert settings.database_url == f"sqlite:///{tmp_path}/elsewhere/prefmw.db"


@pytest.mark.parametrize(
    ("database", "url"),
    [
        ("some/file.db", "sqlite:///some/file.db"),
        ("/abs/file.db", "sqlite:////abs/file.db"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
    ],
)
def test_a_database_is_a_url_or_a_file(database, url):
    assert load_settings({"database": database}).database_url == url


def test_settings_cannot_be_changed_after_they_are_resolved():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().model = "x"


def test_every_setting_says_what_it_is():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_tables_of_the_config_file_reach_transformers_as_they_are(home):
    write_config(home, "[quantization]\nload_in_4bit = true\n[template_options]\nenable_thinking = false\n")
    settings = load_settings()
    assert settings.quantization == {"load_in_4bit": True}
    assert settings.template_options == {"enable_thinking": False}


def test_a_home_may_be_written_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PREFMW_HOME", "~/mine")
    write_config(tmp_path / "mine", 'model = "found"')
    settings = load_settings()
    assert settings.model == "found"
    assert settings.database_url == f"sqlite:///{tmp_path}/mine/prefmw.db"


def test_a_path_that_looks_like_part_of_a_url_is_a_path(tmp_path):
    from prefmw.stores import SQLPreferenceStore

    file = tmp_path / "a?b=c%20#d.db"
    SQLPreferenceStore(load_settings({"database": str(file)}).database_url).close()
    assert file.exists()


def test_entries_of_tables_from_the_environment_have_types(monkeypatch):
    monkeypatch.setenv("PREFMW_TEMPLATE_OPTIONS__ENABLE_THINKING", "false")
    monkeypatch.setenv("PREFMW_QUANTIZATION__BNB_4BIT_COMPUTE_DTYPE", "bfloat16")
    settings = load_settings()
    assert settings.template_options == {"enable_thinking": False}
    assert settings.quantization == {"bnb_4bit_compute_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("modle = 'x'", "no setting 'modle', in .*config.toml or given by name; did you mean 'model'"),
        ("method = 'liner'", "no method 'liner'"),
        ("home = '/x'", "'home'"),
        ("[strength]\nliner = 3.0", "liner"),
        ("[strength]\nlinear = 30.0", r"\[0, 10\]"),
        ("max_tokens = 'many'", "PREFMW_MAX_TOKENS"),
        ("max_tokens = -4", "greater than or equal to 1"),
        ("top_k = 0", "greater than or equal to 1"),
        ("robust = 65", "less than or equal to 64"),
        ("max_tokens = [", "not valid TOML"),
        ("\udcff", "not valid TOML"),
    ],
)
def test_a_wrong_config_file_is_told(home, config, message):
    home.mkdir(parents=True)
    (home / "config.toml").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match=message):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"), [("PREFMW_MAX_TOKENS", "many"), ("PREFMW_QUANTIZATION", "{oops"), ("PREFMW_USER", "\udcff")]
)
def test_a_wrong_environment_variable_is_told(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="PREFMW_"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (0, 0.005, 0.01, 100, 101, float("nan"), float("inf"), -1)),
        ("top_p", (0, 1e-7, 1e-6, 1, 1.5)),
        ("top_k", (0, 1)),
        ("max_tokens", (0, 1)),
        ("seed", (-1, 0, 2**63 - 1, 2**63)),
    ],
)
def test_sampling_is_bounded_as_a_call_bounds_it(name, values):
    from prefmw.decoding import Sampling
    from prefmw.errors import UsageError

    known = {"temperature": 0.7, "top_p": 0.8, "top_k": None, "max_tokens": 8, "seed": 0}
    for value in values:
        refused = []
        for make in (
            lambda value=value: load_settings({name: value}),
            lambda value=value: Sampling(**{**known, name: value}),
        ):
            try:
                make()
            except (SettingsError, UsageError):
                refused.append(make)
        assert len(refused) in (0, 2), value


def test_robust_is_bounded_as_a_call_bounds_it():
    from prefmw.plans import MAX_ROBUST

    assert load_settings({"robust": MAX_ROBUST}).robust == MAX_ROBUST
    with pytest.raises(SettingsError, match="64"):
        load_settings({"robust": MAX_ROBUST + 1})
