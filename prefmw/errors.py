"""Every error that prefmw raises on purpose.

::

    PrefmwError                    exit code 1: the request was sound, something failed
    ├── UsageError                 exit code 2: the request itself must change
    │   ├── SettingsError          a flag, environment variable or config file entry is wrong
    │   ├── UnknownUserError       no such user in the store
    │   ├── UserExistsError        the id is taken
    │   ├── UnreadablePersonError  one of the people to be loaded cannot be read
    │   ├── UnknownConversationError
    │   ├── ThreadOwnerError       an agent's thread is another user's
    │   ├── ModelNotFoundError     no model by that path or hub id
    │   ├── ChatTemplateError      the model has no chat template, or its template refuses these messages
    │   └── ContextLengthError     the prompt does not fit the model's context
    ├── MissingExtraError          an optional package is not installed
    ├── ModelError                 weights or tokenizer could not be loaded, or cannot be used
    ├── TrainingError              a training met a number that is not finite
    ├── StoreError                 the database could not do it
    │   ├── StoreLockedError       another process holds the write lock; worth a retry
    │   ├── SchemaVersionError     the database was made by another version of prefmw
    │   └── ConflictError          the profile changed since it was read
    └── EngineError                decoding failed
        ├── EngineClosedError      the engine was shut down
        └── EngineOverloadedError  the queue is full; worth a retry

A message says what was expected, what came (a value or a shape, never a user's text or a key) and what to do next.
Adapters translate the exceptions of other libraries at the edge and keep them as ``__cause__``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ChatTemplateError",
    "ConflictError",
    "ContextLengthError",
    "EngineClosedError",
    "EngineError",
    "EngineOverloadedError",
    "MissingExtraError",
    "ModelError",
    "ModelNotFoundError",
    "PrefmwError",
    "SchemaVersionError",
    "SettingsError",
    "StoreError",
    "StoreLockedError",
    "ThreadOwnerError",
    "TrainingError",
    "UnknownConversationError",
    "UnknownUserError",
    "UnreadablePersonError",
    "UsageError",
    "UserExistsError",
    "nearest",
]


class PrefmwError(Exception):
    """Base of all errors raised on purpose; its text is one line, fit to be shown to a person."""

    exit_code = 1


class UsageError(PrefmwError):
    """The request itself must change: a wrong flag, value, id or text."""

    exit_code = 2


class SettingsError(UsageError):
    """A flag, environment variable or config file entry is wrong."""


class UnknownUserError(UsageError):
    """The store knows no user by that id."""


class UserExistsError(UsageError):
    """A user by that id is already stored."""


class UnreadablePersonError(UsageError):
    """One of the people to be loaded cannot be read; ``number`` says which, from 1."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"person {number}: {text}")
        self.number = number
        self.text = text


class UnknownConversationError(UsageError):
    """The user has no conversation by that id."""


class ThreadOwnerError(UsageError):
    """An agent's thread belongs to another user than the one who runs it."""


class ModelNotFoundError(UsageError):
    """There is no model at that path or by that hub id."""


class ChatTemplateError(UsageError):
    """The model has no chat template, or its template refuses these messages."""


class ContextLengthError(UsageError):
    """The prompt does not fit the model's context."""


class MissingExtraError(PrefmwError):
    """An optional package is not installed; the message prints the pip command."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra '{extra}': pip install 'prefmw[{extra}]'")


class ModelError(PrefmwError):
    """Weights or tokenizer could not be loaded, or cannot be used."""


class TrainingError(PrefmwError):
    """A training stopped: its loss or a weight is not finite."""


class StoreError(PrefmwError):
    """The database could not do what was asked."""


class StoreLockedError(StoreError):
    """Another process holds the database's write lock; the same call may succeed later."""


class SchemaVersionError(StoreError):
    """The database's schema is older or newer than this prefmw."""


class ConflictError(StoreError):
    """The profile changed between reading and writing; read it again and repeat."""


class EngineError(PrefmwError):
    """Decoding failed."""


class EngineClosedError(EngineError):
    """The engine was shut down before or while it served the request."""


class EngineOverloadedError(EngineError):
    """The engine's queue is full; the same request may succeed later."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: a suggestion if one is close, then all that are known."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"
