"""What AdaTP needs of vLLM's configuration, and which options it cannot work with."""

from __future__ import annotations

from typing import Any

from ...settings import SettingsError
from ...startup import LOOKED_UP
from ..base import SCHEDULER
from .encoder import check_encoder
from .flops import event_layers
from .settings import AdaTPSettings


def check_server(settings: AdaTPSettings, vllm_config: Any) -> None:
    """Put our scheduler in place, once nothing stands against it.

    Raises:
        SettingsError: names the option, and what to do.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler, drafts = vllm_config.scheduler_config, vllm_config.speculative_config
    try:
        event_layers(settings, model.hf_text_config.num_hidden_layers)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if settings.encoder is not None:
        check_encoder(settings.encoder)
    refused = [
        (
            drafts is not None and drafts.method != LOOKED_UP,
            f"--speculative-config method {getattr(drafts, 'method', '')}: a draft model reads the "
            f"hidden states of tokens that are dropped; use method {LOOKED_UP}",
        ),
        (
            settings.encoder is not None and model.enable_sleep_mode,
            f"encoder={settings.encoder} with --enable-sleep-mode: its weights would be gone after "
            "a sleep of level 2; leave one of them out",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: a pipeline stage expects "
            "as many tokens as the first got; use --tensor-parallel-size",
        ),
        (
            scheduler.scheduler_cls not in (None, SCHEDULER),
            f"--scheduler-cls {scheduler.scheduler_cls}: a prompt must run in one step and in "
            "blocks of its own, which our scheduler sees to; leave it out",
        ),
        (
            scheduler.long_prefill_token_threshold > 0,
            f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold}: a prompt "
            "with video must run in one step; leave it out",
        ),
    ]
    for unsupported, what in refused:
        if unsupported:
            raise SettingsError(f"AdaTP does not support {what}")
    scheduler.scheduler_cls = SCHEDULER
