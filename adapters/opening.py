"""What adapters work on: a store and a personalizer by settings, opened once in a process and shared."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from prefmw.bootstrap import build_personalizer, open_store
from prefmw.errors import UnknownUserError, UserExistsError
from prefmw.personalizer import Personalizer
from prefmw.preferences import PreferenceStore, Profile
from prefmw.settings import Settings, load_settings

OnUnknownUser = Literal["create", "raise", "base"]
"""What becomes of a user whom the store does not know: added, an error, or answered without preferences."""

_stores: dict[str, PreferenceStore] = {}
_personalizers: dict[str, Personalizer] = {}
_lock = threading.Lock()


class Opened(NamedTuple):
    """A store and a personalizer, and the settings that they were opened with."""

    settings: Settings
    store: PreferenceStore
    personalizer: Personalizer

    def profile(self, user_id: str, on_unknown: OnUnknownUser, reason: str) -> Profile | None:
        """The user's profile; one whom the store does not know is added for that ``reason``, is an error, or has none.

        Raises:
            UnknownUserError: nobody added them, and that is to be an error.
        """
        try:
            return self.store.profile(user_id)
        except UnknownUserError:
            if on_unknown == "raise":
                raise
        if on_unknown == "base":
            return None
        with suppress(UserExistsError):  # by another call, meanwhile
            return self.store.add_user(user_id, actor="prefmw", reason=reason)
        return self.store.profile(user_id)


def opened(**flags: Any) -> Opened:
    """The store and the personalizer of the settings as ``flags`` change them; what is ``None`` was not given.

    Raises:
        SettingsError: a setting is wrong.
        StoreError: the database cannot be opened.
    """
    settings = load_settings(flags)
    key = f"{settings.home} {settings.model_dump_json()}"
    with _lock:
        url = settings.database_url
        if url not in _stores:
            _stores[url] = open_store(settings)
        if key not in _personalizers:
            _personalizers[key] = build_personalizer(settings, _stores[url])
        return Opened(settings, _stores[url], _personalizers[key])


def close_opened() -> None:
    """Let go of every store and personalizer; the next call opens its own anew."""
    with _lock:
        for store in _stores.values():
            store.close()
        _stores.clear()
        _personalizers.clear()


def without_password(database: str | None) -> str | None:
    """The URL of a database without the secrets in it; the driver then looks where it finds passwords otherwise."""
    if database is None or "://" not in database:
        return database
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(database)
    except (ArgumentError, ValueError):  # opening it will tell
        return None
    plain = url._replace(password=None).difference_update_query(["password", "sslpassword"])
    return plain.render_as_string(hide_password=False)
