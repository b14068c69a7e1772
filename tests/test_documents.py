"""The README's commands and snippets run, and the documents hold together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_the_readme_s_commands_and_snippets_run(tmp_path):
    """In one home, in the README's order: the console lines that begin with prefmw, then the Python."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    script = bin_folder / "prefmw"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from prefmw.cli.main import main; main()' \"$@\"\n")
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    lines = [line.removeprefix("$ ") for line in README.splitlines() if line.startswith("$ prefmw ")]
    assert len(lines) >= 5
    shown = ""
    for line in lines:
        result = subprocess.run(
            line, shell=True, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
        )
        assert (result.returncode, result.stdout != "") == (0, True), f"{line}\n{result.stderr}"
        shown = result.stdout
    assert shown in README  # the last line shows alice's preferences, as the README prints them
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", snippet], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "'method': 'linear'" in result.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_files_named_in_the_architecture_exist():
    for name in set(re.findall(r"`([\w/]+\.(?:py|toml))`", (ROOT / "docs" / "architecture.md").read_text())):
        found = (ROOT / name).exists() or (ROOT / "prefmw" / name).exists()
        assert found or list(ROOT.glob(f"prefmw/**/{name}")), name


def test_the_readme_s_test_command_is_what_ci_runs():
    assert "make test" in README
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "pytest" in check[1]
    assert "make check" in (ROOT / ".ci" / "run").read_text()
