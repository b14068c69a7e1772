"""Work that was killed goes on where it was, and never with another's."""

from __future__ import annotations

import pytest
import torch

from prefmw.errors import UsageError
from prefmw.training import unfinished
from prefmw.training.unfinished import Unfinished, beside

ABOUT = {"seed": 0, "texts": "abc"}


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    return tmp_path / "result.bin"


def test_what_was_kept_last_is_found_again(result):
    work = Unfinished(result, ABOUT)
    assert work.state() is None
    for step in (1, 2):
        work.keep(lambda step=step: {"step": step, "weights": [torch.full((2,), float(step))], "said": ["ä"]})
    found = Unfinished(result, ABOUT).state()
    assert (found["step"], found["weights"][0].tolist(), found["said"]) == (2, [2.0, 2.0], ["ä"])
    work.done()
    assert not beside(result).exists()
    assert Unfinished(result, ABOUT).state() is None


def test_states_are_kept_a_while_apart(result, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(unfinished, "EVERY", 20.0)
    work = Unfinished(result, ABOUT)
    for at in (119.0, 121.0, 140.0, 142.0):
        now[0] = at
        work.keep(lambda at=at: at)
        kept = work.state()
        assert kept == {119.0: None, 121.0: 121.0, 140.0: 121.0, 142.0: 142.0}[at]


def test_who_is_killed_while_writing_leaves_the_state_before(result, monkeypatch):
    work = Unfinished(result, ABOUT)
    work.keep(lambda: 1)

    def half(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        work.keep(lambda: 2)
    assert Unfinished(result, ABOUT).state() == 1


def test_other_work_is_refused(result):
    Unfinished(result, ABOUT)
    with pytest.raises(UsageError, match="name another --out, or delete it"):
        Unfinished(result, {**ABOUT, "seed": 1})


def test_a_state_that_cannot_be_read_is_told(result):
    work = Unfinished(result, ABOUT)
    (beside(result) / "state.pt").write_bytes(b"no state")
    with pytest.raises(UsageError, match="cannot be read .*delete"):
        work.state()


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name another --out"):
        Unfinished(tmp_path / "file" / "result.bin", ABOUT)
