"""prefmw: per-user alignment for local chat models.

The core knows nothing of SQL, LangChain or the terminal. Its rooms: ``preferences`` (what a user likes), ``alignment``
(the papers' maths), ``decoding`` (token ids in, token ids out) and ``models`` (local chat models and their templates).
On them stand ``plans`` (how a turn is steered), ``steering`` (what the engine is asked for it) and ``personalizer``
(one turn), and on that ``prefmw.stores``, ``prefmw.adapters`` and ``prefmw.cli``.
"""

from prefmw._version import __version__

__all__ = ["__version__"]
