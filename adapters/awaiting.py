"""Replies awaited from an event loop, which never waits for an engine: a thread of its own reads each."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from prefmw.reply import Reply, ReplyStream

AT_ONCE = 256
"""Replies read at once, at most; further ones wait for a thread. An engine lets as many wait for rows."""

T = TypeVar("T")

_threads: ThreadPoolExecutor | None = None


def _executor() -> ThreadPoolExecutor:
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="prefmw-reply")
    return _threads


def _forget_threads() -> None:
    global _threads
    _threads = None


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_forget_threads)


async def in_thread(function: Callable[[], T]) -> T:
    """What ``function`` returns, called in one of the threads that replies are read by."""
    return await asyncio.get_running_loop().run_in_executor(_executor(), function)


async def awaited(begin: Callable[[], ReplyStream]) -> AsyncGenerator[str | Reply, None]:
    """The pieces of a reply as they come, and at last the whole :class:`Reply`.

    ``begin`` is called in the thread. However the generator is left, by its end, ``aclose`` or a cancelled task, the
    engine is freed and the turn recorded before that returns.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[str | Reply | BaseException] = asyncio.Queue()
    left = threading.Event()
    begun: list[ReplyStream] = []

    def read() -> None:
        try:
            if left.is_set():
                return
            with begin() as stream:
                begun.append(stream)
                if left.is_set():
                    stream.cancel()
                for piece in stream:
                    loop.call_soon_threadsafe(arrived.put_nowait, piece)  # raises where the loop is closed
            last: Reply | BaseException = stream.reply
        except BaseException as error:
            last = error
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(arrived.put_nowait, last)

    reading = _executor().submit(read)
    try:
        while True:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Reply):
                return
    finally:
        left.set()
        for stream in begun:
            stream.cancel()
        if not reading.cancel():
            await asyncio.wrap_future(reading)
