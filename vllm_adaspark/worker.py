"""vLLM's workers with an account per request: a log line, a report file, and collective_rpc.

The model knows rows, the worker knows which request is which row; here the two meet.  When a
request ends, the first tensor-parallel rank logs what it cost and, with ``report_file`` set, adds
one JSON line to that file.  Offline: ``llm.collective_rpc("adaspark_report")``.

With tensor parallelism the densities are those of the rank's own KV heads; with pipeline
parallelism each stage reports its own layers.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from .accounting import Account, ModelShape, count_step
from .attention.plan import StepPlan
from .attention.state import StepRows
from .runtime import Runtime

logger = init_logger("vllm.adaspark")

RECENT = 256  # finished requests kept for collective_rpc


class RequestAccounts:
    """Accounts of the running requests, the last finished ones, and all together."""

    def __init__(self, runtime: Runtime, shape: ModelShape, layers: range) -> None:
        self._runtime, self._shape, self._layers = runtime, shape, layers
        self._running: dict[str, Account] = {}
        self._finished: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._total = Account(shape, layers)
        self._pending: tuple[list[str], StepRows, StepPlan | None] | None = None

    def remember_step(self, request_ids: list[str]) -> None:
        """Note the step that was just launched; ``request_ids`` in row order."""
        if self._runtime.rows is not None:
            self._pending = (list(request_ids), self._runtime.rows, self._runtime.plan)

    def settle(self) -> None:
        """Account for the noted step.  One step late, so that a GPU need not be waited for."""
        if self._pending is None:
            return
        (request_ids, rows, plan), self._pending = self._pending, None
        counts = count_step(rows, plan, self._layers)
        for row, request_id in enumerate(request_ids):
            account = self._running.get(request_id)
            if account is None:
                account = self._running[request_id] = Account(self._shape, self._layers)
                account.cached_tokens = int(rows.computed[row])
            account.add(counts, row)

    def finish(self, request_ids: set[str]) -> None:
        """Log and file the accounts of requests that ended."""
        for request_id in request_ids:
            account = self._running.pop(request_id, None)
            if account is None:
                continue
            self._total.merge(account)
            report = _report(request_id, account, finished=True)
            self._finished.append(report)
            if account.video_tokens or account.cubes_seen:
                logger.info(
                    "AdaSpark %s: %d tokens (%d video), cubes attended %.1f%%, FFN active %.1f%%, "
                    "%.4g of %.4g TFLOPs (%.1f%% of dense)",
                    request_id,
                    account.tokens,
                    account.video_tokens,
                    100 * report["attention_density"],
                    100 * report["ffn_density"],
                    report["flops"]["executed"]["total"] / 1e12,
                    report["flops"]["dense"]["total"] / 1e12,
                    100 * report["flops_ratio"],
                )
            self._append(report)

    def _append(self, report: dict[str, Any]) -> None:
        path = self._runtime.config.report_file
        if path is None:
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(report) + "\n")
        except OSError as error:  # a full disk must not end the engine
            logger.warning_once("AdaSpark cannot write report_file=%s: %s", path, error)

    def report(self) -> dict[str, Any]:
        """All requests together, and each of the last ones: the finished, then the running."""
        self.settle()
        total = Account(self._shape, self._layers)
        for account in (self._total, *self._running.values()):
            total.merge(account)
        running = [_report(name, account, False) for name, account in self._running.items()]
        return {"total": total.report(), "requests": [*self._finished, *running]}


def _report(request_id: str, account: Account, finished: bool) -> dict[str, Any]:
    return {"request_id": request_id, "finished": finished, **account.report()}


class AccountingWorker:
    """Mixed in before a stock worker."""

    vllm_config: VllmConfig
    _accounts: RequestAccounts | None = None

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if get_tensor_model_parallel_rank() != 0:
            return
        model = self.get_model()
        runtime = getattr(model, "runtime", None)
        if runtime is not None:
            text = self.vllm_config.model_config.hf_text_config
            shape = ModelShape(
                hidden=text.hidden_size,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                head_size=text.hidden_size // text.num_attention_heads,
                intermediate=text.intermediate_size,
            )
            stage = model.language_model.model
            layers = range(stage.start_layer, stage.end_layer)
            self._accounts = RequestAccounts(runtime, shape, layers)

    def execute_model(self, scheduler_output: Any) -> Any:
        accounts = self._accounts
        if accounts is not None:
            accounts.settle()
            accounts.finish(scheduler_output.finished_req_ids)
        output = super().execute_model(scheduler_output)
        if accounts is not None and scheduler_output.total_num_scheduled_tokens > 0:
            accounts.remember_step(self._request_ids())
        return output

    def _request_ids(self) -> list[str]:
        """The requests of the step that just ran, in row order, in either model runner."""
        if self.use_v2_model_runner:
            state = self.model_runner.execute_model_state
            return state.input_batch.req_ids if state is not None else []
        return self.model_runner.input_batch.req_ids

    def adaspark_report(self) -> dict[str, Any] | None:
        """For ``collective_rpc``; None on ranks that do not report."""
        return self._accounts.report() if self._accounts is not None else None


class AdaSparkGPUWorker(AccountingWorker, Worker):
    """vLLM's GPU worker with accounts."""


def __getattr__(name: str) -> Any:
    # vLLM's CPU worker imports CPU-only libraries, so it is made only where it is asked for.
    if name == "AdaSparkCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker

        cpu_worker = type("AdaSparkCPUWorker", (AccountingWorker, CPUWorker), {})
        cpu_worker.__module__ = __name__
        globals()[name] = cpu_worker
        return cpu_worker
    raise AttributeError(name)
