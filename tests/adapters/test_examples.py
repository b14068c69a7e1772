"""The Python of docs/langchain.md runs, each block by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.adapters.scripted import dutiful, scripted
from tests.toymodels import save_chat_model

TEXT = (Path(__file__).parents[2] / "docs" / "langchain.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def example(about: str) -> str:
    (block,) = [block for block in BLOCKS if about in block]
    return block


@pytest.fixture
def run(people, capsys):
    def run(block: str) -> str:
        exec(compile(block, "docs/langchain.md", "exec"), {"__name__": "example"})
        return capsys.readouterr().out

    return run


def test_there_is_no_other_block():
    assert len(BLOCKS) == 4


def test_a_chain(run):
    shown = run(example("StrOutputParser"))
    alice, bob = shown.removeprefix("alice: ").split("\nbob: ")
    assert alice.strip() != bob.strip()
    assert min(len(alice), len(bob)) > 20


def test_an_agent_with_two_tools(run, tmp_path):
    engine = scripted(save_chat_model(tmp_path / "model", "hermes", context=4096), dutiful)
    shown = run(example("create_agent").replace("Qwen/Qwen2.5-1.5B-Instruct", str(tmp_path / "model")))
    assert "It says: sunny in Ghent" in shown
    assert "It says: noon in Oslo" in shown
    assert all("nurse" in steered and "nurse" not in plain for plain, steered in engine.prompts)


def test_a_view_of_the_store(run, people):
    assert "'pole': 'humorous'" in run(example("PreferenceView"))
    assert people.profile("alice").weights["humor"].value == 0.5


def test_a_server_for_two_users(run, people):
    shown = run(example("TaskGroup"))
    assert sorted(re.findall(r"^(\w+): ", shown, re.MULTILINE)) == ["alice", "alice", "bob", "bob"]
    assert [len(people.conversations(user)) for user in ("alice", "bob")] == [2, 2]
