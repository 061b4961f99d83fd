"""vLLM's schedulers for methods that drop tokens between layers: one step, and no shared blocks.

Such a request's prompt must run in one step, because its text decides which video tokens go on; and
its KV blocks must be its own, because later layers write survivors into the front slots, and not
even the same request again could use them.  So here

* a prompt waits until a step has room for all of it; whatever runs beside it goes on in chunks;
* its blocks are looked up by nobody: it reads no prefix, and its block hashes carry a salt of its
  own, also where clients share a ``cache_salt``.

The encoder's and the processor's caches still serve the same video.  A prompt that no step can hold
would wait for ever; the processor refuses it (models/processing.py).  Which requests these are says
the method (``Method.needs_one_step``).  Written for vLLM 0.32.0, whose
``_try_schedule_encoder_inputs`` is the one place that may shorten a request's part of a step.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .methods import base as methods
from .requests import media_of, settings_of


class OneStepPrompts:
    """Mixed in before a stock scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hf_config = self.vllm_config.model_config.hf_config
        self._method = methods.of_model(hf_config, current_platform.device_type)

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests and self._is_alone(request):
            request.skip_reading_prefix_cache = True  # also after a preemption
            request.cache_salt = f"{request.cache_salt or ''}/{request.request_id}"
            request.block_hashes.clear()  # made with the client's salt
            request.update_block_hashes()
        super().add_request(request)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        **kwargs: Any,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """As stock, but nothing of a prompt unless all of it."""
        needs = request.num_prompt_tokens - num_computed_tokens
        if needs <= 0 or not self._is_alone(request):
            return super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
            )
        nothing = [], 0, encoder_compute_budget, [], []
        if num_new_tokens < needs:
            return nothing
        scheduled = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
        )
        if scheduled[1] < needs:  # the encoder has no room for all of its videos in this step
            self.encoder_cache_manager.free(request)
            return nothing
        return scheduled

    def _is_alone(self, request: Request) -> bool:
        media = media_of(request.mm_features, self._method.media)
        return bool(media) and self._method.needs_one_step(
            settings_of(media[0], self._method.settings_class)
        )


class OneStepScheduler(OneStepPrompts, Scheduler):
    """vLLM's scheduler with prompts in one step."""


class OneStepAsyncScheduler(OneStepPrompts, AsyncScheduler):
    """vLLM's asynchronous scheduler with prompts in one step."""


def scheduler_for(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine; vLLM's engine core calls this as it would a class.

    Whether scheduling is asynchronous is settled after our start-up check has run.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    kind = OneStepAsyncScheduler if is_async else OneStepScheduler
    return kind(vllm_config=vllm_config, **kwargs)
