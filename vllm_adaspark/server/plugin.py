"""The endpoint plugin: request accounts in answers, our series in /metrics, the viewer.

Opt-in, as vLLM demands of endpoint plugins: ``VLLM_PLUGINS=adaspark,adaspark_http``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from vllm.logger import init_logger

from . import metrics, refusals, traces, usage

logger = init_logger("vllm.adaspark")


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
