"""prefmw: per-user alignment for local chat models.

The core knows nothing of SQL, LangChain or the terminal. Its rooms: ``preferences`` (what a user likes), ``alignment``
(the papers' maths), ``decoding`` (token ids in, token ids out), ``models`` (local chat models and their templates) and
``personalizer`` (one turn). ``prefmw.stores``, ``prefmw.adapters`` and ``prefmw.cli`` are built on it.
"""

from prefmw._version import __version__

__all__ = ["__version__"]
