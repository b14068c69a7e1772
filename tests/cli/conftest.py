"""What tests of commands share: a closed stdin, and a way to run a command in process."""

from __future__ import annotations

import pytest

from prefmw.cli.main import run


class Closed:
    """A stdin that holds nothing, as under cron."""

    def isatty(self) -> bool:
        return False

    def read(self) -> str:
        return ""


@pytest.fixture(autouse=True)
def stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", Closed())


@pytest.fixture
def prefmw(capsys):
    """Run a command; give back exit code, stdout and stderr."""

    def call(*arguments: str):
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call
