"""Checks and settles the configuration once, before anything is built.

vLLM calls :class:`StartupCheck` for our architecture while it makes its configuration.  What cannot
work is refused here with the setting and the fix; nothing is ever silently dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import ARCHITECTURES
from .settings import (
    CHECKPOINT_KEY,
    METHOD_KEY,
    SERVER_KEY,
    Settings,
    SettingsError,
    check_cube_volume,
    operator_settings,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .models.layout import Layout

logger = init_logger("vllm.adaspark")  # a child of "vllm", so it is shown

# What adapters can read head by head: no scales per token, no packing.
CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


# Methods of --speculative-config: drafts looked up in what was said, and drafts of a model.
LOOKED_UP, DRAFTED = "ngram", "eagle3"


class StartupCheck(VerifyAndUpdateConfig):
    """Registered for our architecture in vLLM's MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Settle settings and block size; raise SettingsError on what cannot work."""
        from .methods.base import load, method_name  # a stock server has no use for these
        from .models.layout import LayoutError, layout_of

        hf_config = vllm_config.model_config.hf_config
        try:
            layout = layout_of(hf_config)
        except LayoutError as error:
            raise SettingsError(str(error)) from None
        others = set(ARCHITECTURES.values()) - {layout.architecture}
        if others.intersection(hf_config.architectures):
            raise SettingsError(
                f"--hf-overrides architectures={hf_config.architectures}: this checkpoint's "
                f"model_type is {hf_config.model_type}, so it must be [{layout.architecture!r}]"
            )
        name = method_name(vllm_config.additional_config, hf_config.architectures)
        method = load(name)
        config = settle(vllm_config, method.settings_class)
        _settle_block_size(vllm_config, config)
        refuse_unsupported(vllm_config)
        _settle_speculation(vllm_config)
        method.check_server(config, vllm_config)
        no_prune = why_no_prune(vllm_config, layout)
        if config.dropped_share and no_prune:
            what = f"prune={config.dropped_share} {no_prune}"
            raise SettingsError(f"AdaSpark does not support {what}")
        _split_graphs_at_our_ops(vllm_config)
        _use_our_worker(vllm_config)
        _use_video_loader(vllm_config, layout.loader)
        # The request processor and the model see the model's config, not ours: it travels there.
        hf_config.adaspark_resolved = {
            METHOD_KEY: name,
            "settings": config.to_dict(),
            "step_tokens": _step_tokens(vllm_config),
            "no_prune": no_prune,  # a request's is refused with the same reason
        }
        logger.info("AdaSpark: %s", config)


def _step_tokens(vllm_config: VllmConfig) -> int:
    """The most tokens that a step holds."""
    scheduler = vllm_config.scheduler_config
    return scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens


def settle(vllm_config: VllmConfig, settings: type[Settings]) -> Settings:
    """The checkpoint's settings, and over them the operator's."""
    operator = operator_settings(vllm_config.additional_config, settings)
    checkpoint = settings.of_checkpoint(vllm_config.model_config.hf_config.to_dict())
    config = settings.settled(checkpoint, operator)
    if checkpoint is not None:
        logger.info(
            "AdaSpark: config.json %s says %s; --additional-config %s says %s",
            *(settings.checkpoint_part, checkpoint, SERVER_KEY, operator),
        )
    if not config.enabled and settings.settled(None, operator).enabled:
        logger.warning(
            "AdaSpark: dense, since config.json %s says so; --additional-config '%s' turns it on",
            *(CHECKPOINT_KEY, f'{{"{SERVER_KEY}": {{"enabled": true}}}}'),
        )
    return config


def _settle_block_size(vllm_config: VllmConfig, config: Settings) -> None:
    """A cube is a KV block."""
    cache = vllm_config.cache_config
    volume = config.cube_volume
    operator = operator_settings(vllm_config.additional_config, type(config))
    trained = config.cube != type(config).settled(None, operator).cube
    origin = f" of config.json {CHECKPOINT_KEY}" if trained else ""
    check_cube_volume(config, origin)
    if not cache.user_specified_block_size:
        cache.block_size = volume
        cache.user_specified_block_size = True
    elif cache.block_size != volume:
        raise SettingsError(
            f"--block-size {cache.block_size} does not match cube={list(config.cube)}{origin}, "
            f"which holds {volume} tokens; leave --block-size out, set it to {volume}, or choose "
            "another cube"
        )


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise on every option that AdaSpark does not support yet; listed in docs/features.md."""
    from vllm.platforms import current_platform

    from .models.layout import layout_of

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    multimodal = model.multimodal_config
    mm_kwargs: dict[str, Any] = (multimodal.mm_processor_kwargs if multimodal else None) or {}
    text = model.hf_text_config
    by_layout = layout_of(model.hf_config).refused(mm_kwargs)
    refused = [
        (
            not (current_platform.is_cpu() or current_platform.is_cuda_alike()),
            f"the platform {current_platform.device_name}; it runs on CPUs and CUDA GPUs",
        ),
        (
            multimodal is not None and (multimodal.video_pruning_rate or 0) > 0,
            "--video-pruning-rate: vLLM's EVS does not know of cubes; use "
            f'--additional-config \'{{"{SERVER_KEY}": {{"prune": SHARE}}}}\', which drops the same',
        ),
        (
            vllm_config.kv_transfer_config is not None or bool(cache.kv_offloading_size),
            "--kv-transfer-config and --kv-offloading-size: blocks that come from elsewhere lack "
            "their cube state; leave them out",
        ),
        (
            vllm_config.lora_config is not None
            and vllm_config.lora_config.enable_tower_connector_lora,
            "--enable-tower-connector-lora: the vision tower runs over a few frames at a time, and "
            "adapters are mapped by whole videos; leave it out, or merge the adapter into the "
            "weights",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "--decode-context-parallel-size and --prefill-context-parallel-size; leave them out",
        ),
        (
            parallel.use_ubatching,
            "--enable-dbo and --ubatch-size: a step's plan is made for the whole of it; leave them "
            "out",
        ),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill; leave it out"),
        (
            str(cache.cache_dtype) not in CACHE_DTYPES,
            f"--kv-cache-dtype {cache.cache_dtype}; use auto or fp8",
        ),
        (
            bool(cache.kv_cache_dtype_skip_layers),
            "--kv-cache-dtype-skip-layers: the blocks of all layers must be alike; leave it out",
        ),
        (
            vllm_config.attention_config.use_non_causal,
            "--attention-config use_non_causal; leave it out",
        ),
        (
            multimodal is not None and multimodal.mm_encoder_only,
            "--mm-encoder-only: there would be no language model to make sparse; leave it out",
        ),
        (
            bool(getattr(text, "use_sliding_window", False)),
            "use_sliding_window in the model's config; set it to false",
        ),
        (
            getattr(text, "dual_chunk_attention_config", None) is not None,
            "dual_chunk_attention_config in the model's config; leave it out",
        ),
        (
            SERVER_KEY in mm_kwargs,
            f"--mm-processor-kwargs {SERVER_KEY}; server-wide settings go into "
            f"--additional-config '{{\"{SERVER_KEY}\": {{...}}}}'",
        ),
        (model.runner_type != "generate", f"--runner {model.runner_type}; use generate"),
        (
            parallel.worker_cls != "auto" and not _tells_requests(parallel.worker_cls),
            f"--worker-cls {parallel.worker_cls}: the worker tells the model what its requests ask "
            "for; leave it out, or derive the class from vllm_adaspark.worker.AdaSparkCPUWorker or "
            "AdaSparkGPUWorker",
        ),
        (bool(by_layout), by_layout),
    ]
    for unsupported, what in refused:
        if unsupported:
            raise SettingsError(f"AdaSpark does not support {what}")


def why_no_prune(vllm_config: VllmConfig, layout: Layout) -> str | None:
    """Why this server cannot drop video tokens (``prune``); None if it can."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if not layout.takes_prune:
        return f"for a checkpoint whose model_type is {layout.model_type}; leave it out"
    if stages > 1:
        return (
            f"with --pipeline-parallel-size {stages}: only the first stage would know where the "
            "tokens that are left belong; leave it out, or use --tensor-parallel-size"
        )
    if vllm_config.ec_transfer_config is not None:
        return "with --ec-transfer-config: vLLM moves whole videos only; leave it out"
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method != LOOKED_UP:
        return (
            f"with --speculative-config method {drafts.method}: a draft model would be given the "
            f"videos as they are kept for the model; leave it out, or use method {LOOKED_UP}"
        )
    return None


def _settle_speculation(vllm_config: VllmConfig) -> None:
    """Let the host know how long each request is, which a step's plan is made from.

    With asynchronous scheduling it is known only on the device how many drafted tokens were taken.
    """
    drafts, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    if drafts is None:
        return
    if drafts.method not in (LOOKED_UP, DRAFTED):
        raise SettingsError(
            f"AdaSpark does not support --speculative-config method {drafts.method}; use "
            f"{LOOKED_UP} or {DRAFTED}"
        )
    if scheduler.async_scheduling:
        raise SettingsError(
            "AdaSpark does not support --async-scheduling with --speculative-config: how many "
            "drafted tokens were taken is known on the device only; leave --async-scheduling out"
        )
    scheduler.async_scheduling = False


def _tells_requests(worker_cls: str | type) -> bool:
    """Whether a worker class is one of ours, or made from one."""
    from .worker import AccountingWorker

    return derives_from(worker_cls, AccountingWorker)


def derives_from(named: str | type, base: type) -> bool:
    """Whether an option's class, or its full name, is one that is made from ``base``."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    try:
        cls = resolve_obj_by_qualname(named) if isinstance(named, str) else named
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(cls, type) and issubclass(cls, base)


def _split_graphs_at_our_ops(vllm_config: VllmConfig) -> None:
    """Keep our ops, whose work depends on the step's plan, out of piecewise CUDA graphs."""
    from vllm.platforms import current_platform

    from .models import hidden_attention, sparse_mlp

    compilation = vllm_config.compilation_config
    if not current_platform.is_cuda_alike():
        return
    if compilation.splitting_ops is None:
        compilation.splitting_ops = [
            *compilation._attention_ops,
            "vllm::unified_kv_cache_update",
            "vllm::unified_mla_kv_cache_update",
        ]
    for op in (sparse_mlp.OP_NAME, hidden_attention.OP_NAME):
        if op not in compilation.splitting_ops:
            compilation.splitting_ops.append(op)


def _use_our_worker(vllm_config: VllmConfig) -> None:
    """Run vLLM's worker, as we extend it, unless the user chose one made from it."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    if parallel.worker_cls == "auto":
        kind = "CPU" if current_platform.is_cpu() else "GPU"
        parallel.worker_cls = f"vllm_adaspark.worker.AdaSpark{kind}Worker"


def _use_video_loader(vllm_config: VllmConfig, loader: str) -> None:
    """Read videos with the model's loader, unless the user chose one in --media-io-kwargs.

    Raises:
        ValueError: options with which every video would be refused, or decord is not installed.
    """
    from .video.connector import use_connector
    from .video.load import check_server_options

    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None:
        media = multimodal.media_io_kwargs
        video = dict(media.get("video") or {})
        video["video_backend"] = video.get("video_backend") or loader
        check_server_options(video)
        multimodal.media_io_kwargs = media | {"video": video}
        use_connector()
