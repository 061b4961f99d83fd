"""Asking the engines' workers from an HTTP handler."""

from __future__ import annotations

import asyncio
from typing import Any


async def ask_workers(
    engine_client: Any, method: str, *args: Any, seconds: float = 30.0
) -> list[list[Any]]:
    """Call a worker method on every rank of every data-parallel engine, between two steps.

    Args:
        engine_client: vLLM's, from ``app.state.engine_client``.
        method: name of a worker's method.
        args: its arguments, msgpack-ready.
        seconds: how long to wait; a step that is under way ends first.

    Returns:
        Per engine, what each rank answered.

    Raises:
        TimeoutError: no answer in time.
        Exception: the engine is gone, or the method failed.
    """
    core = engine_client.engine_core
    # collective_rpc itself answers for the first engine only.  Its own timeout stays None: it would
    # leave the late answers in the workers' queue, for the next call to take as its own.
    call = core.call_utility_all_async("collective_rpc", method, None, args, {})
    return await asyncio.wait_for(call, seconds)


def engine_ranks(engine_client: Any) -> list[int]:
    """Data-parallel ranks of the engines :func:`ask_workers` asks, in its order."""
    return list(engine_client.engine_core.engine_ranks_managed)
