"""What commands print while they work."""

from __future__ import annotations

import gc

import pytest

from prefmw.cli import output
from prefmw.cli.output import loading


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_not_collected_while_a_model_loads_and_is_again_afterwards(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyboardInterrupt), loading("a model"):
            during = gc.isenabled()
            raise KeyboardInterrupt
        assert (during, gc.isenabled()) == (False, enabled)
    finally:
        (gc.enable if before else gc.disable)()


def test_what_the_first_loading_leaves_is_never_gone_through_and_what_comes_later_is():
    with loading("a model"):
        pass
    kept = gc.get_freeze_count()
    assert kept > 0
    with loading("another"):
        cycle: list = []
        cycle.append(cycle)
    assert gc.get_freeze_count() <= kept
    del cycle
    assert gc.collect() > 0


def test_off_a_terminal_long_work_tells_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with output.stages() as tell:
        for at, share in ((1, 0.0), (14, 0.1), (16, 0.2), (20, 0.3), (32, 0.456)):
            now[0] = float(at)
            tell("fitting", share)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "fitting: 20%\nfitting: 46%\n")
