"""The endpoint plugin: request accounts in answers, our series in /metrics, the viewer.

Opt-in, as vLLM demands of endpoint plugins: ``VLLM_PLUGINS=adaspark,adaspark_http``.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from vllm.logger import init_logger

from . import metrics, refusals, traces, usage

logger = init_logger("vllm.adaspark")

LEAVE_SECONDS = 10  # for clients to take the rest of their answers, once the server is to end


class AdaSparkHttp:
    """Found by vLLM through the entry-point group ``vllm.endpoint_plugins``."""

    name = "adaspark_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """vLLM lets a plugin's route take the place of its own with the same path and method."""
        usage.attach(app)
        metrics.attach(app)
        traces.attach(app)
        app.add_middleware(refusals.TakeBackMedia)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        refusals.expose(engine_client.vllm_config.model_config.served_model_name)
        state.adaspark_leave = asyncio.create_task(end_in_time(state))
        watch_the_end(engine_client)
        worker = str(engine_client.vllm_config.parallel_config.worker_cls)
        state.adaspark_accounts = worker.startswith("vllm_adaspark.")
        if state.adaspark_accounts:
            usage.init(state)
        else:
            logger.warning(
                "AdaSpark: no usage.adaspark and no vllm_adaspark: series: the worker is %s; serve "
                "our architecture and leave --worker-cls out",
                worker,
            )


async def end_in_time(state: Any) -> None:
    """See that a server which is to end does so, whoever is connected.

    vLLM sets no time for it: one client that does not read, or whose machine is gone, would keep it
    for ever, without an engine and with its port closed, so that nobody could start it again.
    ``app.state.server`` is vLLM's uvicorn server, which it makes after its plugins.
    """
    while not hasattr(state, "server"):
        await asyncio.sleep(0.5)
    if state.server.config.timeout_graceful_shutdown is None:
        state.server.config.timeout_graceful_shutdown = LEAVE_SECONDS


def watch_the_end(engine_client: Any) -> None:
    """See that nobody waits for an engine that ends, and that one which died is told from others.

    vLLM shuts its engine client down once, whatever the reason, in a thread of its own.  Then
    ``engine_client.adaspark_ending``, an ``asyncio.Event``, is set (engine.py).  And where the
    engine had died, which only then makes its client errored, the exit code will not be 0: vLLM's
    API server ends as if it had been asked to, and a container that is restarted on failure would
    stay down.
    """
    loop, shut_down = asyncio.get_running_loop(), engine_client.shutdown
    engine_client.adaspark_ending = asyncio.Event()

    def shutdown(*args: Any, **options: Any) -> None:
        if engine_client.shutdown is shutdown:
            engine_client.shutdown = shut_down
            if engine_client.errored:
                atexit.register(_fail)
            if not loop.is_closed():
                loop.call_soon_threadsafe(engine_client.adaspark_ending.set)
        shut_down(*args, **options)

    engine_client.shutdown = shutdown


def _fail() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
