"""Recording, on the worker: which requests are traced, and RPCs to read their traces.

A request asks for it (``{"adaspark": {"trace": true}}``).  In a step with such a request every
layer leaves its choice, bit-packed, on the step's plan; one step later, so that a GPU need not be
waited for, the rows of traced requests go to their traces on the host.  In any other step a
layer's whole cost is one ``is not None``.

Every rank records its own layers and KV heads; reader.py puts them together.  A rank that fails to
record drops the whole trace, and the others' parts of it then count as gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ..accounts.reports import shown_settings
from ..accounts.request_ids import search_name
from ..methods.base import Method
from ..models.layout import Layout, Pictures
from ..observing import observing
from ..paged.plan import StepPlan
from ..paged.state import StepRows
from ..requests import settings_of, videos_of
from ..step import Runtime
from . import dropping
from .frames import FrameMaker, Frames
from .step import StepTrace, chunk_of, counted_bytes
from .store import Sizes, TraceStore, trace_id
from .survivors import Survivors
from .trace import Trace, Video

logger = init_logger("vllm.adaspark")

FRAME_SHARE = 4  # a trace's frames may take a quarter of the memory for traces


class Tracer:
    """Decides which steps are recorded, and files what they left."""

    def __init__(
        self,
        runtime: Runtime,
        layers: range,
        sizes: Sizes,
        layout: Layout,
        pictures: Pictures,
        keeps_frames: bool = True,
    ) -> None:
        self._settings_class = runtime.method.settings_class
        self.store = TraceStore(runtime.method.settings.trace_mb << 20)
        self._runtime, self._layers, self._sizes = runtime, layers, sizes
        self._layout, self._pictures = layout, pictures
        self._keeps_frames = keeps_frames
        self._frame_maker = FrameMaker()
        self._survivors = Survivors()
        self._pending: tuple[list[str], StepRows, StepPlan | None] | None = None

    def before_step(self, scheduler_output: Any) -> list[Trace]:
        """Settle the last step, arm the next if it holds a traced request.

        Returns:
            The traces whose requests have ended.
        """
        self._runtime.new_trace = None
        self.settle()
        running, ended = self.store.running, []
        # Sorted: a set's order differs from rank to rank, and the oldest finished trace goes first.
        for request_id in sorted(scheduler_output.finished_req_ids):
            self._survivors.forget(request_id)
            if request_id not in running:
                continue
            if self.knows_survivors(running[request_id]):
                ended.append(self.store.finish(request_id))
            else:
                del running[request_id]
                logger.warning_once(
                    "AdaSpark: no trace of a request whose pruned video was encoded too long ago"
                )
        for request in scheduler_output.scheduled_new_reqs:
            with observing("starting a trace"):
                if self.store.limit:
                    self._survivors.expect(request.req_id, self._pruned(request))
                self._start(request)
        scheduled = scheduler_output.num_scheduled_tokens
        if any(name in scheduled and not t.truncated for name, t in running.items()):
            self._runtime.new_trace = StepTrace
        return ended

    def after_step(
        self, request_ids: Callable[[], list[str]], encoder_cache: Mapping[str, torch.Tensor]
    ) -> None:
        """Note the step that was launched, and the videos that were encoded for it."""
        self._survivors.note(encoder_cache)
        if self._runtime.new_trace is not None and self._runtime.rows is not None:
            self._pending = (list(request_ids()), self._runtime.rows, self._runtime.plan)

    def settle(self) -> None:
        """File what the noted step left; a trace that cannot be filed is dropped."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with observing("filing a step's traces"):
            self._file(*pending)
            return
        for request_id in pending[0]:
            self.store.running.pop(request_id, None)

    def _file(self, request_ids: list[str], rows: StepRows, plan: StepPlan | None) -> None:
        step = plan.trace if plan is not None and plan.trace is not None else StepTrace()
        if step.failed:
            raise RuntimeError("a layer's choice was not recorded")
        bits = step.to_host(self._layers)
        for trace in self.store.running.values():
            self._fill_in_survivors(trace)
        for row, request_id in enumerate(request_ids):
            trace = self.store.running.get(request_id)
            if trace is None or trace.truncated:
                continue
            chunk = chunk_of(row, rows, plan, bits, self._sizes.block_size)
            chunk.counted = counted_bytes(row, rows, plan, self._sizes)
            if not trace.chunks:
                trace.cached = chunk.start
            if chunk.end > chunk.start and self.store.grow(trace, chunk.counted):
                trace.add(chunk)
                facts = None if plan is None else plan.dropping(row)
                if facts is not None:
                    tokens = sum(video.length for video in trace.videos)
                    lasted = step.lasted(row, tokens, self._layers.stop)
                    trace.dropping = dropping.Dropping(lasted, facts)

    def _fill_in_survivors(self, trace: Trace) -> None:
        for number in trace.pruned:
            if number not in trace.survivors:
                kept = self._survivors.get(trace.videos[number].name)
                if kept is not None:
                    trace.survivors[number] = kept

    def knows_survivors(self, trace: Trace) -> bool:
        """Whether it is known which tokens of a trace's videos were kept."""
        self._fill_in_survivors(trace)
        return len(trace.survivors) == len(trace.pruned)

    def note_answer(self, output: ModelRunnerOutput) -> None:
        """Keep the tokens that were sampled for traced requests."""
        with observing("keeping a traced answer"):
            for request_id, tokens in zip(output.req_ids, output.sampled_token_ids):
                trace = self.store.running.get(request_id)
                if trace is not None:
                    trace.add_answer(tokens)

    def _start(self, request: Any) -> None:
        videos = videos_of(request.mm_features)
        if (
            not self.store.limit
            or request.req_id in self.store.running  # resumed after preemption
            or request.prompt_token_ids is None
            or request.sampling_params is None
            or not any(settings_of(video, self._settings_class).trace for video in videos)
            or self._is_traced_search(request.req_id)
        ):
            return
        known = self._runtime.requests[request.req_id]
        told = self._runtime.method.told(known)
        trace = Trace(
            id=trace_id(request.req_id),
            request_id=request.req_id,
            started=time.time(),
            prompt_ids=np.array(request.prompt_token_ids, np.int32),
            videos=[self._video(feature) for feature in videos],
            settings=shown_settings(told),
            block_size=self._sizes.block_size,
            layers=self._layers,
            cubes=np.flatnonzero(known.is_cube),
            stop_ids=_stop_ids(request.sampling_params),
            dropping_bytes=self._dropping_bytes(videos, told),
            frames=Frames(
                [self._pixels(feature) for feature in videos],
                self._pictures,
                self.store.limit // FRAME_SHARE,
            ),
        )
        if not self._keeps_frames:
            trace.frames.forget()  # but they count, as they do on the rank that has them
        if not self.store.start(trace, self._sizes.prompt(trace, request.num_computed_tokens)):
            logger.warning_once("AdaSpark: no room for another trace, see trace_mb")
        elif trace.frames.number_of_all:
            self._frame_maker.submit(trace.frames)

    def _dropping_bytes(self, videos: list[Any], told: dict[str, Any]) -> int:
        """What a request keeps of the tokens that leave between its layers."""
        if "layers" not in told:
            return 0
        grids = [self._layout.grid(video) for video in videos]
        frames, tokens = sum(grid[0] for grid in grids), sum(map(math.prod, grids))
        return dropping.most_bytes(tokens, frames, len(told["layers"]))

    def _is_traced_search(self, request_id: str) -> bool:
        """Whether this is a later request of a beam search, of which the first one is traced."""
        name = search_name(request_id)
        return name is not None and any(search_name(t.request_id) == name for t in self.store)

    def _pixels(self, feature: Any) -> tuple[Any, tuple[int, int, int]] | None:
        """A video's pixels and its grid; None if it came as embeddings, or whole from the cache."""
        pixels = self._layout.pixels(feature)
        return None if pixels is None else (pixels, self._layout.grid(feature))

    def _pruned(self, request: Any) -> list[str]:
        """What the encoder cache calls the videos of a request that asked to drop some tokens."""
        return [
            video.identifier
            for video in videos_of(request.mm_features)
            if settings_of(video, self._settings_class).dropped_share
        ]

    def _video(self, feature: Any) -> Video:
        config = settings_of(feature, self._settings_class)
        return Video(
            offset=feature.mm_position.offset,
            grid=self._layout.grid(feature),
            cube=config.cube,
            order=config.order,
            seconds=self._layout.seconds(feature),
            kept=feature.mm_position.length if config.dropped_share else None,
            name=feature.identifier,
        )


def _stop_ids(sampling: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    stop = {sampling.eos_token_id, *(sampling.stop_token_ids or ())}
    return frozenset(stop - {None})


class _NotingOutput(AsyncModelRunnerOutput):
    """Async scheduling's output, of which the tokens are noted once they are there."""

    def __init__(self, output: AsyncModelRunnerOutput, note: Callable) -> None:
        self._output, self._note = output, note

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        self._note(output)
        return output


class TracingWorker:
    """Mixed in before a worker with accounts."""

    vllm_config: VllmConfig
    _tracer: Tracer | None = None

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        model = self.get_model()
        runtime = getattr(model, "runtime", None)
        if runtime is not None:
            stage = model.language_model.model
            self._tracer = Tracer(
                runtime,
                range(stage.start_layer, stage.end_layer),
                _sizes(self.vllm_config, runtime.method),
                model.layout,
                model.layout.pictures(self.vllm_config.model_config.hf_image_processor_config),
                keeps_frames=get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank,
            )

    def _before_step(self, scheduler_output: Any) -> None:
        super()._before_step(scheduler_output)
        with observing("traces before a step"):
            for trace in self._tracer.before_step(scheduler_output):
                trace.usage = self.adaspark_usage(trace.request_id)

    def _after_step(self) -> None:
        super()._after_step()
        with observing("traces after a step"):
            cache = self.model_runner.encoder_cache  # model runner V2 has one around the entries
            self._tracer.after_step(
                self._request_ids, getattr(cache, "encoder_outputs", cache) or {}
            )

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if self._tracer is None or not self._tracer.store.running:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _NotingOutput(output, self._tracer.note_answer)
        if isinstance(output, ModelRunnerOutput):
            self._tracer.note_answer(output)
        return output

    def traces_held(self) -> dict[str, int]:
        """How many traces there are, and the bytes of this rank's part of them."""
        traces = list(self._tracer.store) if self._tracer is not None else []
        return {"held": len(traces), "bytes": sum(trace.nbytes for trace in traces)}

    # -- for collective_rpc -----------------------------------------------------------------------
    # None of these raises: vLLM would leave other ranks' answers in its queue, for the next call to
    # take for its own.

    def adaspark_traces(self) -> list[dict[str, Any]]:
        """Summaries, latest first."""
        if self._tracer is None:
            return []
        with observing("listing traces"):
            self._tracer.settle()
            return [trace.summary() for trace in self._tracer.store]
        return []

    def adaspark_trace(self, wanted: str, what: str = "meta", *arguments: Any) -> Any:
        """Something about one trace; see reader.py, which puts ranks together.

        Args:
            wanted: a trace's id.
            what: ``"meta"``, ``"heat"`` with a source, ``"ffn"``, ``"frame"`` with the numbers of a
                video and of a frame pair in it, or ``"delete"``.

        Returns:
            None for an unknown trace or frame, ``{"error": ...}`` for a source that is not in it.
        """
        if self._tracer is None:
            return None
        with observing("reading a trace"):
            self._tracer.settle()
            trace = self._tracer.store[wanted]
            if trace is None or not self._tracer.knows_survivors(trace):
                return None
            return self._read(trace, what, *arguments)
        return None

    def _read(self, trace: Trace, what: str, *arguments: Any) -> Any:
        if what == "meta":
            # An engine inside the caller's process learns of a request's end in its next step.
            return trace.meta() | {"usage": trace.usage or self.adaspark_usage(trace.request_id)}
        if what == "heat":
            try:
                return trace.heat(*arguments)
            except ValueError as error:
                return {"error": str(error)}
        if what == "ffn":
            return trace.ffn()
        if what == "frame":
            return trace.frames.get(*arguments)
        if what == "delete":
            return self._tracer.store.delete(trace.id)
        return {"error": f"what={what!r}: expected 'meta', 'heat', 'ffn', 'frame' or 'delete'"}


def _sizes(config: VllmConfig, method: Method) -> Sizes:
    """What all ranks go by, whichever layers are theirs."""
    model, parallel, scheduler = (
        config.model_config,
        config.parallel_config,
        config.scheduler_config,
    )
    stages, layers = parallel.pipeline_parallel_size, model.hf_text_config.num_hidden_layers
    ends = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    return Sizes(
        layers=max(end - start for start, end in ends),
        kv_heads=model.get_num_kv_heads(parallel),
        block_size=config.cache_config.block_size,
        step_tokens=scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens,
        choices=config.cache_config.block_size if method.tokens_choose else 1,
    )
