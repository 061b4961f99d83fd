"""Asking the engines' workers from an HTTP handler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def ask_workers(
    engine_client: Any, method: str, *args: Any, seconds: float | None = 30.0
) -> list[list[Any]]:
    """Call a worker method on every rank of every data-parallel engine, between two steps.

    Args:
        engine_client: vLLM's, from ``app.state.engine_client``.
        method: name of a worker's method.
        args: its arguments, msgpack-ready.
        seconds: how long to wait; a step that is under way ends first.  None: until the answer.

    Returns:
        Per engine, what each rank answered.

    Raises:
        TimeoutError: no answer in time.
        Exception: the engine is gone or about to end, or the method failed.
    """
    if getattr(engine_client, "errored", False):
        raise RuntimeError("the engine is dead")
    # An engine that ends answers no questions any more: those who wait would hold up the end.
    ending = getattr(engine_client, "adaspark_ending", None) or asyncio.Event()
    if ending.is_set():
        raise RuntimeError("the engine is about to end")
    core = engine_client.engine_core
    # collective_rpc itself answers for the first engine only.  Its own timeout stays None: it would
    # leave the late answers in the workers' queue, for the next call to take as its own.
    call = core.call_utility_all_async("collective_rpc", method, None, args, {})
    waits = [asyncio.ensure_future(call), asyncio.create_task(ending.wait())]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waits[0].done():
            return waits[0].result()
        raise RuntimeError("the engine is about to end") if ending.is_set() else TimeoutError
    finally:
        for wait in waits:
            wait.cancel()


def engine_ranks(engine_client: Any) -> list[int]:
    """Data-parallel ranks of the engines :func:`ask_workers` asks, in its order."""
    return list(engine_client.engine_core.engine_ranks_managed)


class SharedAnswer:
    """One answer for all who ask at about the same time.

    A call that the engine does not answer cannot be taken back: it waits in the engine's queue.  So
    there is never more than one under way, and whoever asks meanwhile waits for that one.

    Args:
        ask: makes the call; what it raises counts as the answer.
        fresh: seconds for which an answer is good.
    """

    def __init__(self, ask: Callable[[], Awaitable[Any]], fresh: float) -> None:
        self._ask, self._fresh = ask, fresh
        self._call: asyncio.Task[Any] | None = None
        self._began = self._ended = 0.0

    async def get(self, seconds: float) -> Any:
        """The answer, at most so old as it is good for.

        Args:
            seconds: that a call may take; past them all who ask are turned away at once.

        Raises:
            TimeoutError: the call that is under way takes longer than ``seconds``.
            Exception: what the call raised.
        """
        call, loop = self._call, asyncio.get_running_loop()
        if call is None or self._is_stale(call, loop):
            self._began = time.monotonic()
            call = self._call = loop.create_task(self._run())
            call.add_done_callback(_look_at)
        if not call.done():
            left = self._began + seconds - time.monotonic()
            await asyncio.wait([call], timeout=max(left, 0))  # does not cancel the call
        if not call.done():
            raise TimeoutError(f"no answer within {seconds:g} s")
        return call.result()

    def _is_stale(self, call: asyncio.Task[Any], loop: asyncio.AbstractEventLoop) -> bool:
        if call.done():
            return time.monotonic() > self._ended + self._fresh
        return call.get_loop() is not loop  # of a loop that ended without it

    async def _run(self) -> Any:
        try:
            return await self._ask()
        finally:
            self._ended = time.monotonic()


class Turns:
    """Calls to the workers one after the other, each followed by a pause as long as it took.

    Workers answer between two steps, so whoever asks them in a loop holds up everybody's answers.
    This way all who ask together take half of the engine's time at the most, and a call that is
    never answered is followed by no other.

    Args:
        most: how many may wait for their turn; who comes then is turned away at once.
        longest_pause: seconds.
    """

    def __init__(self, most: int = 32, longest_pause: float = 2.0) -> None:
        self._most, self._longest_pause = most, longest_pause
        self._turn = asyncio.Lock()
        self._present, self._free_at = 0, 0.0

    async def take(self, ask: Callable[[], Awaitable[Any]], seconds: float) -> Any:
        """What ``ask()`` returns, once it is its turn.

        Args:
            ask: makes the call; it goes on when its time is over, and keeps its turn.
            seconds: for the wait and the call.

        Raises:
            TimeoutError: too many wait, or the call did not end in time.
            Exception: what the call raised.
        """
        if self._present >= self._most:
            raise TimeoutError(f"{self._present} others are waiting")
        self._present += 1
        call = asyncio.create_task(self._run(ask, time.monotonic() + seconds))
        call.add_done_callback(self._leave)
        await asyncio.wait([call], timeout=seconds)  # does not cancel the call
        if not call.done():
            raise TimeoutError(f"no answer within {seconds:g} s")
        return call.result()

    async def _run(self, ask: Callable[[], Awaitable[Any]], until: float) -> Any:
        async with self._turn:
            await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))
            began = time.monotonic()
            if began > until:  # nobody waits for it any more
                raise TimeoutError
            try:
                return await ask()
            finally:
                ended = time.monotonic()
                self._free_at = ended + min(ended - began, self._longest_pause)

    def _leave(self, call: asyncio.Task[Any]) -> None:
        self._present -= 1
        _look_at(call)


def _look_at(call: asyncio.Task[Any]) -> None:
    """Take note of a call's exception, which asyncio logs if nobody does."""
    if not call.cancelled():
        call.exception()
