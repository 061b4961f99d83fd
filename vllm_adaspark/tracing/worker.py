"""Recording, on the worker: which requests are traced, and RPCs to read their traces.

A request asks for it (``{"adaspark": {"trace": true}}``).  In a step with such a request every
layer leaves its choice, bit-packed, on the step's plan; one step later, so that a GPU need not be
waited for, the rows of traced requests go to their traces on the host.  In any other step a
layer's whole cost is one ``is not None``.

Every rank records its own layers and KV heads; reader.py puts them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ..attention.plan import StepPlan
from ..attention.state import StepRows
from ..reports import told_settings
from ..requests import settings_of, videos_of
from ..runtime import Runtime
from .frames import PatchShape, thumbnails
from .step import StepTrace, chunk_of
from .store import TraceStore, trace_id
from .trace import Trace, Video

logger = init_logger("vllm.adaspark")

FRAME_SHARE = 4  # a trace's frames may take a quarter of the memory for traces


class Tracer:
    """Decides which steps are recorded, and files what they left."""

    def __init__(
        self,
        runtime: Runtime,
        layers: range,
        block_size: int,
        shape: PatchShape,
        keeps_frames: bool = True,
    ) -> None:
        self.store = TraceStore(runtime.config.trace_mb << 20)
        self._runtime, self._layers, self._block_size = runtime, layers, block_size
        self._shape, self._keeps_frames = shape, keeps_frames
        self._pending: tuple[list[str], StepRows, StepPlan | None] | None = None
        self._without_frames: list[tuple[Trace, list[Any]]] = []

    def before_step(self, scheduler_output: Any) -> list[Trace]:
        """Settle the last step, arm the next if it holds a traced request.

        Returns:
            The traces whose requests have ended.
        """
        self.settle()
        running = self.store.running
        ended = [self.store.finish(r) for r in scheduler_output.finished_req_ids if r in running]
        for request in scheduler_output.scheduled_new_reqs:
            self._start(request)
        scheduled = scheduler_output.num_scheduled_tokens
        armed = any(name in scheduled and not t.truncated for name, t in running.items())
        self._runtime.new_trace = StepTrace if armed else None
        return ended

    def after_step(self, request_ids: Callable[[], list[str]]) -> None:
        """Note the step that was launched, and make frames while it runs."""
        if self._runtime.new_trace is None:
            return
        if self._runtime.rows is not None:
            self._pending = (list(request_ids()), self._runtime.rows, self._runtime.plan)
        for trace, features in self._without_frames:
            self._add_frames(trace, features)
        self._without_frames = []

    def settle(self) -> None:
        """File what the noted step left."""
        if self._pending is None:
            return
        (request_ids, rows, plan), self._pending = self._pending, None
        step = plan.trace if plan is not None and plan.trace is not None else StepTrace()
        bits = step.to_host(self._layers)
        for row, request_id in enumerate(request_ids):
            trace = self.store.running.get(request_id)
            if trace is None or trace.truncated:
                continue
            chunk = chunk_of(row, rows, plan, bits, self._block_size)
            if not trace.chunks:
                trace.cached = chunk.start
            if chunk.end > chunk.start and self.store.make_room(trace, chunk.nbytes):
                trace.add(chunk)

    def note_answer(self, output: ModelRunnerOutput) -> None:
        """Keep the tokens that were sampled for traced requests."""
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
            or not any(settings_of(video).trace for video in videos)
        ):
            return
        trace = Trace(
            id=trace_id(request.req_id),
            request_id=request.req_id,
            started=time.time(),
            prompt_ids=np.array(request.prompt_token_ids, np.int32),
            videos=[_video(feature, self._shape.merge) for feature in videos],
            settings=told_settings(self._runtime.requests[request.req_id]),
            block_size=self._block_size,
            layers=self._layers,
            stop_ids=_stop_ids(request.sampling_params),
        )
        has_room = self.store.make_room(trace, trace.nbytes)
        if not has_room:
            logger.warning_once("AdaSpark: no room for another trace, see trace_mb")
        self.store.running[request.req_id] = trace
        if has_room and self._keeps_frames:
            self._without_frames.append((trace, videos))

    def _add_frames(self, trace: Trace, features: list[Any]) -> None:
        limit = self.store.limit // FRAME_SHARE
        for number, feature in enumerate(features):
            pixels = feature.data.get("pixel_values_videos")
            if pixels is None or pixels.data is None:
                continue  # the whole video came from the prefix cache, or as embeddings
            grid = tuple(feature.data["video_grid_thw"].data.tolist())
            made = thumbnails(pixels.data, grid, self._shape, limit)
            size = sum(map(len, made.values()))
            limit -= size
            if self.store.make_room(trace, size):
                for frame, jpeg in made.items():
                    trace.add_frame(number, frame, jpeg)


def _stop_ids(sampling: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    stop = {sampling.eos_token_id, *(sampling.stop_token_ids or ())}
    return frozenset(stop - {None})


def _video(feature: Any, merge: int) -> Video:
    config = settings_of(feature)
    frames, rows, columns = feature.data["video_grid_thw"].data.tolist()
    seconds = feature.data.get("second_per_grid_ts")
    return Video(
        offset=feature.mm_position.offset,
        grid=(frames, rows // merge, columns // merge),
        cube=config.cube,
        order=config.order,
        seconds=float(seconds.data) if seconds is not None and seconds.data is not None else None,
    )


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
                self.vllm_config.cache_config.block_size,
                _patch_shape(self.vllm_config.model_config),
                keeps_frames=get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank,
            )

    def execute_model(self, scheduler_output: Any) -> Any:
        tracer = self._tracer
        if tracer is None:
            return super().execute_model(scheduler_output)
        for trace in tracer.before_step(scheduler_output):
            trace.usage = self.adaspark_usage(trace.request_id)
        output = super().execute_model(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens > 0:
            tracer.after_step(self._request_ids)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if self._tracer is None or not self._tracer.store.running:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _NotingOutput(output, self._tracer.note_answer)
        if isinstance(output, ModelRunnerOutput):
            self._tracer.note_answer(output)
        return output

    # -- for collective_rpc -----------------------------------------------------------------------

    def adaspark_traces(self) -> list[dict[str, Any]]:
        """Summaries, latest first."""
        if self._tracer is None:
            return []
        self._tracer.settle()
        return [trace.summary() for trace in self._tracer.store]

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
        self._tracer.settle()
        trace = self._tracer.store[wanted]
        if trace is None:
            return None
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
            return trace.frames.get(tuple(arguments))
        if what == "delete":
            return self._tracer.store.delete(wanted)
        raise ValueError(f"what={what!r}: expected 'meta', 'heat', 'ffn', 'frame' or 'delete'")


def _patch_shape(model_config: Any) -> PatchShape:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    vision = model_config.hf_config.vision_config
    processor = model_config.hf_image_processor_config
    return PatchShape(
        patch=vision.patch_size,
        frames=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        mean=processor.get("image_mean", OPENAI_CLIP_MEAN),
        std=processor.get("image_std", OPENAI_CLIP_STD),
    )
