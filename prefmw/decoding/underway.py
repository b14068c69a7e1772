"""What a thread's forward is about, for the hooks that act in it. Other threads may use the same model meanwhile, or
engines of their own: theirs is another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class _UnderWay(threading.local):
    """``owner``: whose forward it is, ``None`` for nobody's; the ``places`` (R, M) whose logits it asks for in each
    row; the rows' head scales ``scale`` (R, D), ``None`` for none.
    """

    owner: object | None = None
    places: Tensor | None = None
    scale: Tensor | None = None


under_way = _UnderWay()


@contextmanager
def forward_of(owner: object, places: Tensor, scale: Tensor | None = None) -> Iterator[None]:
    """Within the block this thread's forward is ``owner``'s."""
    under_way.owner, under_way.places, under_way.scale = owner, places, scale
    try:
        yield
    finally:
        under_way.owner = under_way.places = under_way.scale = None
