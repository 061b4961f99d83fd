"""vLLM's workers: they tell the model which requests a step runs, and keep an account of each.

The scheduler tells the worker of its requests, the model plans by them; here the two meet.  Every
rank keeps accounts of its own KV heads and layers (accounts/ledger.py) and sends them when asked;
whoever asks merges them (accounts/reports.py).  When a request ends, the first rank of an engine
logs what it cost and, with ``report_file`` set, adds one JSON line to that file: of its own part,
as the line says.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile, takewhile
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.gpu_worker import Worker

from .accounts.account import Account
from .accounts.ledger import Ledger, keep_counts
from .accounts.reports import append_line, part_of_model, request_report
from .accounts.request_ids import brief
from .methods.base import Method
from .models.layout import Layout
from .observing import observing
from .paged.plan import MAX_TEXT_TILES, StepPlan
from .paged.state import StepRows, kept_bytes
from .requests import Prompt, Request, RequestTable, Video, media_of, settings_of, videos_of
from .settings import Settings
from .step import Runtime
from .traces.worker import TracingWorker

logger = init_logger("vllm.adaspark")


@dataclass(frozen=True)
class Step:
    """A step that was launched; its counts may still be computed on a GPU."""

    request_ids: list[str]  # in row order
    rows: StepRows
    plan: StepPlan | None  # only its counts
    video: np.ndarray  # [rows] video tokens
    end: torch.cuda.Event | None  # None: it is over

    @property
    def over(self) -> bool:
        return self.end is None or self.end.query()


class RequestAccounts:
    """Brings what happened to the ledger, in order, once it can be read without waiting."""

    def __init__(
        self, runtime: Runtime, ledger: Ledger, writes: bool, part: str | None = None
    ) -> None:
        self.ledger = ledger
        self._runtime, self._writes, self._part = runtime, writes, part
        self._behind: deque[Step | set[str]] = deque()  # steps, and requests that ended since

    def admit(self, request_id: str, request: Request | None) -> None:
        """Note what a new request asked for; None if it has no video."""
        if request is None:
            self.ledger.admit(request_id, None)
        else:
            self.ledger.admit(request_id, self._runtime.method.told(request), request.whole)

    def remember_step(self, request_ids: list[str]) -> None:
        """Note the step that was just launched; ``request_ids`` in row order."""
        rows = self._runtime.rows
        if rows is None:
            return
        end = None
        if torch.cuda.is_available():
            end = torch.cuda.Event()
            end.record()
        plan, video = keep_counts(self._runtime.plan), self._runtime.video_tokens()
        self._behind.append(Step(list(request_ids), rows, plan, video, end))

    def remember_finished(self, request_ids: set[str]) -> None:
        if request_ids:
            self._behind.append(request_ids)

    def settle(self, *, wait: bool = False) -> None:
        """Account for what was noted; ``wait`` also for steps that a GPU has not finished."""
        while self._behind:
            if isinstance(self._behind[0], Step):
                if not (wait or self._behind[0].over):
                    return
                step = self._behind.popleft()
                with observing("the account of a step"):
                    self.ledger.add_step(step.request_ids, step.rows, step.plan, step.video)
            else:
                for request_id in sorted(self._behind.popleft()):
                    with observing("the account of a request"):
                        account = self.ledger.finish(request_id)
                        if account is not None and self._writes:
                            self._write(request_id, account)

    def _write(self, request_id: str, account: Account) -> None:
        """Log a request that ended, and file it."""
        request_id = brief(request_id)
        report = request_report(request_id, account, finished=True) | {"part": self._part}
        if account.settings is not None:
            logger.info(
                "AdaSpark %s: %d tokens (%d video, %d more dropped), attention density %.1f%%, "
                "FFN density %.1f%%, %.4g of %.4g TFLOPs (%.1f%% of dense)%s",
                request_id,
                account.tokens,
                account.video_tokens,
                account.dropped_tokens,
                100 * report["attention_density"],
                100 * report["ffn_density"],
                report["flops"]["executed"]["total"] / 1e12,
                report["flops"]["dense"]["total"] / 1e12,
                100 * report["flops_ratio"],
                f", counting {self._part}" if self._part else "",
            )
        path = self._runtime.method.settings.report_file
        if path is None:
            return
        try:
            append_line(path, json.dumps(report))
        except OSError as error:  # a full disk must not end the engine
            logger.warning_once("AdaSpark cannot write report_file=%s: %s", path, str(error))


def cache_beside_summaries(
    available: int, layers: Mapping[str, AttentionSpec], settings: Settings, dtype: torch.dtype
) -> int:
    """How many of ``available`` bytes the KV cache may take.

    Block summaries are made at the first video, when vLLM has long given all memory to the cache;
    so the cache leaves memory for those of all its blocks.

    Args:
        available: bytes for both.
        layers: this rank's, as vLLM sizes the cache by them.
        settings: of the method, which say what is kept of each block.
        dtype: of the model.
    """
    page = sum(layer.page_size_bytes for layer in layers.values())
    summaries = sum(
        kept_bytes(settings, layer.num_kv_heads, layer.head_size, dtype)
        for layer in layers.values()
    )
    return available * page // (page + summaries) if summaries else available


def step_bytes(config: VllmConfig, method: Method) -> int:
    """What a sparse step's layers share beside vLLM's own activations, at the most.

    Where the method chooses among KV blocks: queries and outputs once more, head by head; and per
    (tile, KV head) a block table, and the probabilities and choice it is made from, also those of
    other tensor-parallel ranks (paged/heads.py).  Beside that, what the method says.  Layers run
    one after the other, so it counts once.
    """
    model, parallel = config.model_config, config.parallel_config
    scheduler = config.scheduler_config
    block = config.cache_config.block_size
    tokens = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
    of_method = method.step_bytes(
        tokens, heads, kv_heads, model.get_head_size(), model.dtype.itemsize
    )
    if not method.settings_class.summaries_per_block:
        return of_method
    turned = 2 * tokens * heads * model.get_head_size() * model.dtype.itemsize
    answering = scheduler.max_num_seqs * (1 + config.num_speculative_tokens)  # tokens of answers
    tiles = tokens // block + min(tokens, MAX_TEXT_TILES + answering)
    entry = 2 * torch.int32.itemsize + torch.float32.itemsize + torch.bool.itemsize
    ranks = parallel.tensor_parallel_size
    entry += 2 * ranks * torch.float32.itemsize if ranks > 1 else 0  # gathered, and averaged
    return turned + tiles * kv_heads * (model.max_model_len // block + 1) * entry + of_method


def _prompt_tokens(new: Any) -> int:
    """How many tokens the prompt of a new request has, from vLLM's NewRequestData."""
    embeds = new.prompt_embeds
    return len(new.prompt_token_ids if embeds is None else embeds)


class AccountingWorker:
    """Mixed in before a stock worker."""

    vllm_config: VllmConfig
    _accounts: RequestAccounts | None = None
    _runtime: Runtime | None = None  # the model's, if it is one of ours
    _layout: Layout  # of such a model

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        model = self.get_model()
        runtime = getattr(model, "runtime", None)
        if runtime is None:
            return
        self._runtime, self._layout = runtime, model.layout
        runtime.requests = RequestTable(self._describe)
        runtime.lora = model.language_model.take_lora()
        text = self.vllm_config.model_config.hf_text_config
        stage = model.language_model.model
        layers = range(stage.start_layer, stage.end_layer)
        ledger = Ledger(runtime.method.shape, layers, text.num_hidden_layers)
        writes = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
        ranks = get_tensor_model_parallel_world_size()
        part = part_of_model(layers, text.num_hidden_layers, ranks)
        self._accounts = RequestAccounts(runtime, ledger, writes, part)

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, once block summaries and what a step takes have their part."""
        available = super().determine_available_memory()
        runtime = getattr(self.get_model(), "runtime", None)
        if runtime is None:
            return available
        if not current_platform.is_cpu():  # there the cache's size is given, beside everything else
            taken = step_bytes(self.vllm_config, runtime.method)
            available = max(0, available - taken)
        cache = cache_beside_summaries(
            available,
            self.get_kv_cache_spec(),
            runtime.method.settings,
            self.vllm_config.model_config.dtype,
        )
        logger.info(
            "AdaSpark: of %.2f GiB for the KV cache, %.1f MiB are for block summaries",
            available / 2**30,
            (available - cache) / 2**20,
        )
        return cache

    def _describe(self, new: Any) -> Request | None:
        """What a new request asked for, from vLLM's NewRequestData; None without video."""
        method = self._runtime.method
        media = media_of(new.mm_features, method.media)
        if not media:
            return None
        tokens = _prompt_tokens(new)
        settings = settings_of(media[0], method.settings_class)
        sampling, videos = new.sampling_params, videos_of(new.mm_features)
        whole = self._layout.whole_prompt(tokens, new.mm_features)
        prompt = Prompt.from_features(
            tokens,
            new.mm_features,
            after_video=self._layout.after_video,
            videos=[self._video(video) for video in videos],
            wants_all=sampling is not None and sampling.prompt_logprobs is not None,
            question=partial(self._question, new.prompt_token_ids, videos),
            dropped=whole.dropped,
        )
        positions = self._layout.positions(tokens, videos, settings)
        return replace(
            method.describe(settings, prompt),
            positions=positions,
            whole=whole if whole.dropped else None,
        )

    def _video(self, feature: Any) -> Video:
        """What a worker knows of a video, from vLLM's MultiModalFeatureSpec."""
        grid = self._layout.grid(feature)

        def encoded() -> torch.Tensor:
            # Runner V2's cache is an object that holds the same dictionary.
            cache = self.model_runner.encoder_cache
            everything = getattr(cache, "encoder_outputs", cache)[feature.identifier]
            return everything[: math.prod(grid)]

        pixels = self._layout.pixels(feature)

        def pictures() -> list[np.ndarray]:
            model = self.vllm_config.model_config
            maker = self._layout.pictures(model.hf_image_processor_config)
            return [maker.frame(pixels, grid, place) for place in range(grid[0])]

        return Video(grid, encoded, feature.identifier, None if pixels is None else pictures)

    def _question(self, ids: Sequence[int] | None, videos: Sequence[Any]) -> str:
        """The text behind the last video, as far as the next token of the chat template."""
        if ids is None:
            return ""
        tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
        added = getattr(tokenizer, "added_tokens_decoder", {})  # <|vision_end|>, for instance
        template = {*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)}
        place = max(videos, key=lambda video: video.mm_position.offset).mm_position
        behind = dropwhile(template.__contains__, ids[place.offset + place.length :])
        text = takewhile(lambda token: token not in template, behind)
        return tokenizer.decode(list(text)).strip()

    def execute_model(self, scheduler_output: Any) -> Any:
        runtime = self._runtime
        if runtime is None:
            return super().execute_model(scheduler_output)
        runtime.requests.update(scheduler_output)
        self._before_step(scheduler_output)
        if not self.use_v2_model_runner:  # for V2, see models/model_state.py
            runtime.request_ids = lambda: self.model_runner.input_batch.req_ids
        try:
            output = super().execute_model(scheduler_output)
        finally:
            runtime.request_ids = None  # dummy runs between steps are nobody's
        if scheduler_output.total_num_scheduled_tokens > 0:
            self._after_step()
        return output

    def _before_step(self, scheduler_output: Any) -> None:
        """What a worker does beside the model's work, before a step."""
        accounts, requests = self._accounts, self._runtime.requests
        accounts.remember_finished(scheduler_output.finished_req_ids)
        with observing("accounts"):
            accounts.settle()
        with observing("the settings in accounts"):
            for new in scheduler_output.scheduled_new_reqs:
                accounts.admit(new.req_id, requests[new.req_id])

    def _after_step(self) -> None:
        """The same, once a step is launched."""
        with observing("the account of a step"):
            self._accounts.remember_step(self._request_ids())

    def _request_ids(self) -> list[str]:
        """The requests of the step that just ran, in row order, in either model runner."""
        if self.use_v2_model_runner:
            state = self.model_runner.execute_model_state
            return state.input_batch.req_ids if state is not None else []
        return self.model_runner.input_batch.req_ids

    def adaspark_report(self) -> dict[str, Any] | None:
        """This rank's accounts, for reports.merge_reports; None if it keeps none."""
        return self._ask(Ledger.report)

    def adaspark_usage(self, client_id: str) -> dict[str, Any] | None:
        """This rank's account of one request, for reports.merge_ranks; None if it is not known."""
        return self._ask(Ledger.usage, client_id)

    def adaspark_metrics(self) -> dict[str, Any] | None:
        """This rank's totals since start, and the traces it holds, for server/metrics.py."""
        metrics = self._ask(Ledger.metrics)
        if metrics is not None:
            metrics["traces"] = self.traces_held()
        return metrics

    def _ask(self, what: Callable[..., Any], *args: Any) -> Any:
        if self._accounts is None:
            return None
        # An exception here would leave the other ranks' answers in vLLM's queue, for the next call.
        with observing("reading accounts"):
            self._accounts.settle(wait=True)
            return what(self._accounts.ledger, *args)
        return None


class AdaSparkGPUWorker(TracingWorker, AccountingWorker, Worker):
    """vLLM's GPU worker with accounts and traces."""


def __getattr__(name: str) -> Any:
    # vLLM's CPU worker imports CPU-only libraries, so it is made only where it is asked for.
    if name == "AdaSparkCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker

        cpu_worker = type("AdaSparkCPUWorker", (TracingWorker, AccountingWorker, CPUWorker), {})
        cpu_worker.__module__ = __name__
        globals()[name] = cpu_worker
        return cpu_worker
    raise AttributeError(name)
