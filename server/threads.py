"""Blocking work beside an event loop: in threads, and ahead of whoever uses what it makes.

Whoever is cancelled while a thread works for it waits until that thread is done: what the thread uses,
such as a connection, is then free to be closed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from typing import Any, TypeVar

Item = TypeVar("Item")


async def in_thread(work: Callable[[], Item]) -> Item:
    """What `work` returns, from a thread."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    finally:
        await _ended(task)


async def threaded(
    items: Generator[Item, None, None], ahead: int = 1
) -> AsyncGenerator[Item, None]:
    """The items of a generator, made in a thread of its own, up to so many before they are asked for.

    Of its own, since it waits while nobody asks: of the shared ones, there might be none left for
    whoever does.
    """
    loop = asyncio.get_running_loop()
    made: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()
    room = threading.Semaphore(ahead)
    is_over = False
    ended: asyncio.Future[None] = loop.create_future()

    def make_all() -> None:
        try:
            for item in items:
                loop.call_soon_threadsafe(made.put_nowait, (True, item))
                room.acquire()
                if is_over:
                    return
        finally:
            items.close()

    def work() -> None:
        try:
            make_all()
        except BaseException as error:  # noqa: BLE001 (whoever asks for the next item is told)
            loop.call_soon_threadsafe(ended.set_exception, error)
        else:
            loop.call_soon_threadsafe(ended.set_result, None)
        loop.call_soon_threadsafe(made.put_nowait, (False, None))

    threading.Thread(target=work, name="maker", daemon=True).start()
    try:
        while True:
            is_item, item = await made.get()
            if not is_item:
                break
            room.release()
            yield item
        await ended  # raises what the generator did
    finally:
        is_over = True
        room.release()
        await _ended(ended)


async def a_step_ahead(items: AsyncIterator[Item]) -> AsyncGenerator[Item, None]:
    """The same items, the next one being made while one is used."""
    end = object()

    async def following() -> object:
        return await anext(items, end)

    upcoming = asyncio.ensure_future(following())
    try:
        while (item := await upcoming) is not end:
            upcoming = asyncio.ensure_future(following())
            yield item  # type: ignore[misc]
    finally:
        upcoming.cancel()
        await _ended(upcoming)
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def _ended(task: asyncio.Future[Item]) -> None:
    """Waits for a task's end; of what became of it nobody wants to know."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
