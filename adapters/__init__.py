"""Adapters: prefmw where other frameworks expect a chat model, an agent's middleware or a store.

What is named here is imported when it is first asked for, so that nobody needs the packages of another.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefmw.adapters.langchain import ChatPrefMW
    from prefmw.adapters.langgraph_store import PreferenceView, namespace_of
    from prefmw.adapters.middleware import PreferenceContext, PreferenceMiddleware
    from prefmw.adapters.transformers import linear_alignment

__all__ = [
    "ChatPrefMW",
    "PreferenceContext",
    "PreferenceMiddleware",
    "PreferenceView",
    "linear_alignment",
    "namespace_of",
]

_HOMES = {
    "ChatPrefMW": "langchain",
    "PreferenceContext": "middleware",
    "PreferenceMiddleware": "middleware",
    "PreferenceView": "langgraph_store",
    "linear_alignment": "transformers",
    "namespace_of": "langgraph_store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
