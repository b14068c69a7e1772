"""The wheel holds what running it takes: rooms from three top-level folders, migrations, data files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tree and unpacked."""
    pytest.importorskip("build", reason="needs the extra 'dev'")
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("out")
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Deprecat" not in result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_an_installed_wheel_stores_and_shows_a_user(installed, home, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import prefmw
assert prefmw.__file__.startswith({str(installed)!r})
from prefmw.cli.main import run
assert run(["users", "add", "alice", "--persona", "a nurse"]) == 0
assert run(["prefs", "set", "alice", "humor=1"]) == 0
from prefmw.adapters.langchain import ChatPrefMW
from prefmw.training import load_topics
assert load_topics()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "humorous" in result.stdout


def test_the_wheel_holds_the_licence_and_no_tests(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"prefmw"}
