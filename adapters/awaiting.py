"""Replies awaited from an event loop, which never waits for an engine: a thread of its own reads each."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

from prefmw.reply import Reply, ReplyStream

THREADS = 256
"""Replies read at once, at most; further ones wait for a thread. An engine lets as many wait for rows."""

T = TypeVar("T")

_threads: ThreadPoolExecutor | None = None


def _executor() -> ThreadPoolExecutor:
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prefmw-reply")
    return _threads


def _forget_threads() -> None:
    global _threads
    _threads = None


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_forget_threads)


async def in_thread(function: Callable[[], T]) -> T:
    """What ``function`` returns, called in one of the threads that replies are read by, with the caller's context."""
    return await asyncio.get_running_loop().run_in_executor(_executor(), copy_context().run, function)


class AwaitedReply:
    """The pieces of a reply as they come, and at last the whole :class:`Reply`; an asynchronous iterator.

    However it is left, by its end, :meth:`aclose` or a cancelled task, the engine is freed and the turn recorded before
    that returns. It is no generator, since a loop that ends closes every generator by itself, this one as its reader
    would be closing it.

    Args:
        begin: called in the thread that reads the reply.
    """

    def __init__(self, begin: Callable[[], ReplyStream]) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[str | Reply | BaseException] = asyncio.Queue()
        self._left = threading.Event()
        self._begun: list[ReplyStream] = []
        self._ended = False
        self._reading = _executor().submit(self._read, begin)

    def __aiter__(self) -> AwaitedReply:
        return self

    async def __anext__(self) -> str | Reply:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._arrived.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if not isinstance(item, str):
            await self.aclose()
        if isinstance(item, BaseException):
            raise item
        return item

    async def aclose(self) -> None:
        """Let the engine do other work; what was said up to here is recorded when this returns."""
        self._ended = True
        self._left.set()
        for stream in self._begun:
            stream.cancel()
        if not self._reading.cancel() and not self._loop.is_closed():
            await asyncio.wrap_future(self._reading, loop=self._loop)

    def _read(self, begin: Callable[[], ReplyStream]) -> None:
        try:
            if self._left.is_set():
                return
            with begin() as stream:
                self._begun.append(stream)
                if self._left.is_set():
                    stream.cancel()
                for piece in stream:
                    self._loop.call_soon_threadsafe(self._arrived.put_nowait, piece)  # raises where the loop is closed
            last: Reply | BaseException = stream.reply
        except BaseException as error:
            last = error
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, last)
