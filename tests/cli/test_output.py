"""What commands print while they work."""

from __future__ import annotations

import gc

import pytest

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
