"""One engine in this process, and a request to it that is watched while it runs.

vLLM is stepped by hand: how much of a prompt is computed is read from its scheduler between steps,
how much of the video is encoded from hooks on the vision tower's blocks, how much is decoded from
the loader.  vLLM's encoder cache is as large as ``max_num_batched_tokens``, so a video must fit
that; ``max_num_scheduled_tokens`` still cuts prefill in chunks.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..accounts.cost import Cost, Model
from ..models.layout import Sampling
from . import CommandError, UsageError
from .progress import Progress
from .vllm_options import merge

CHUNK_BLOCKS = 32  # KV blocks computed per step
PLUGIN = "adaspark"


def prepare_environment() -> None:
    """Settings that vLLM reads when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # bars and warnings do not mix
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the answer's
    warnings.filterwarnings("ignore", category=FutureWarning)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{PLUGIN},{allowed}"


def engine_options(model: str, rest: list[str]) -> Any:
    """vLLM's EngineArgs from the arguments that are not ours.

    Raises:
        UsageError: vLLM does not know or take them.
    """
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str):
            raise UsageError(f"vLLM's options: {message}")

    parser = Parser(add_help=False)
    EngineArgs.add_cli_args(parser)
    try:
        options = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *rest]))
    except ValueError as error:
        raise UsageError(f"vLLM's options: {error}") from None
    except OSError as error:  # the model is looked up on its hub
        raise CommandError(f"--model {model!r} could not be fetched: {error}") from None
    video = (options.media_io_kwargs or {}).get("video", {})
    for name in ("fps", "max_frames", "min_frames", "num_frames"):
        if name in video:
            raise UsageError(
                f"--media-io-kwargs video.{name}={video[name]!r}: use --fps or --max-frames"
            )
    return options


@contextmanager
def engine(
    options: Any, model: Model, settings: dict[str, Any], volume: int, cost: Cost
) -> Iterator[Any]:
    """A running ``vllm.LLM`` with room for one such video.

    Args:
        options: vLLM's EngineArgs; what they leave open is filled in here.
        model: the checkpoint.
        settings: AdaSpark's server settings.
        volume: tokens in a KV block.
        cost: of the video.

    Raises:
        UsageError: too small a limit for this video.
        CommandError: vLLM does not start.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    for name in ("max_model_len", "max_num_batched_tokens"):
        given, needed = getattr(options, name), cost.prompt_tokens
        if given is not None and 0 < given < needed:
            raise UsageError(
                f"--{name.replace('_', '-')} {given}: the prompt has about {needed} tokens, and "
                "must fit; leave it out, or give it at least the value that inspect tells"
            )
    options.hf_overrides = {**options.hf_overrides, "architectures": [model.layout.architecture]}
    options.additional_config = merge(dict(options.additional_config), {PLUGIN: settings})
    options.limit_mm_per_prompt = options.limit_mm_per_prompt or {"video": 1, "image": 0}
    options.max_model_len = options.max_model_len or cost.max_model_len
    options.max_num_batched_tokens = options.max_num_batched_tokens or cost.max_num_batched_tokens
    options.max_num_scheduled_tokens = options.max_num_scheduled_tokens or min(
        CHUNK_BLOCKS * volume, options.max_num_batched_tokens
    )
    options.use_tqdm_on_load = False
    try:
        llm = LLM.from_engine_args(options)
    except Exception as error:  # whatever vLLM refuses, in its words
        raise CommandError(f"the engine did not start: {_reason(error)}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def _reason(error: Exception) -> str:
    """The message, without the frame that pydantic puts around it."""
    if not hasattr(error, "errors"):
        return str(error)
    return "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())


def decode(
    data: bytes, model: Model, sampling: Sampling, options: Any, progress: Progress
) -> tuple[Any, dict]:
    """(frames ``[n, h, w, 3]``, metadata), read by the loader a server would use.

    Raises:
        CommandError: the loader refuses the video.
    """
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from ..video.load import VideoLoader, check_server_options

    chosen = dict((options.media_io_kwargs or {}).get("video") or {})
    chosen["video_backend"] = chosen.get("video_backend") or model.layout.loader
    frames = model.rules.loader_options(sampling)

    def decoded(packets: int, of: int) -> None:
        progress.to(packets, of)

    try:
        check_server_options(chosen)
        loader = VIDEO_LOADER_REGISTRY.load(chosen.pop("video_backend"))
        if isinstance(loader, VideoLoader):
            return loader.load(data, loader.options(frames), decoded)
        return loader.load_bytes(data, **{**frames, **chosen})
    except ValueError as error:
        raise CommandError(f"VIDEO: {error}") from None


def video_prompt(llm: Any, question: str, frames: Any, max_pixels: int | None) -> dict[str, Any]:
    """A question about a decoded video, by the checkpoint's chat template."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    prompt = {"prompt": text, "multi_modal_data": {"video": [frames]}}
    if max_pixels is not None:
        prompt["mm_processor_kwargs"] = {"max_pixels": max_pixels}
    return prompt


@dataclass
class Answer:
    """What one request gave and took."""

    request_id: str
    text: str
    tokens: int
    prompt_tokens: int
    account: dict[str, Any] | None  # worker.py's, None if there is none
    # By stage.  With several ranks nobody sees where "encode" ends: None, and "prefill" has both.
    seconds: dict[str, float | None] = field(default_factory=dict)


def ask(
    llm: Any, prompt: dict[str, Any], cost: Cost, *, max_tokens: int, name: str = "", quiet: bool
) -> Answer:
    """Run one request, showing how far it is.

    Raises:
        CommandError: vLLM refuses it.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    engine = llm.llm_engine
    label = f"{name} " if name else ""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    with Progress(f"{label}prepare", cost.frames, "frames", quiet=quiet) as prepare:
        try:
            request_id = engine.add_request("ask", prompt, sampling)
        except (ValueError, VLLMValidationError) as error:
            raise CommandError(str(error)) from None
        prepare.to(cost.frames)

    length = engine.output_processor.request_states[request_id].prompt_len
    one_rank = engine.vllm_config.parallel_config.world_size == 1
    with (
        Progress(f"{label}encode", cost.patches, "patches", quiet=quiet or not one_rank) as encode,
        _watch_encoder(llm, encode),
    ):
        outputs = engine.step()
    with Progress(f"{label}prefill", length, "tokens", quiet=quiet) as prefill:
        while not _tokens(outputs):
            prefill.to(_computed(engine, request_id, length))
            outputs = engine.step()
        prefill.to(length)
    with Progress(f"{label}answer", max_tokens, "tokens", quiet=quiet) as answer:
        answer.to(_tokens(outputs))
        while not (outputs and outputs[0].finished):
            outputs = engine.step() or outputs
            answer.to(_tokens(outputs))

    completion = outputs[0].outputs[0]
    # The first step encodes and begins to compute; the hooks tell where the one ends.
    seconds = {
        "prepare": prepare.seconds,
        "encode": encode.reached,
        "prefill": encode.seconds - (encode.reached or 0.0) + prefill.seconds,
        "answer": answer.seconds,
    }
    return Answer(
        request_id=request_id,
        text=completion.text,
        tokens=len(completion.token_ids),
        prompt_tokens=length,
        account=_account(llm, request_id),
        seconds=seconds | {"total": sum(filter(None, seconds.values()))},
    )


def _tokens(outputs: list[Any]) -> int:
    return len(outputs[0].outputs[0].token_ids) if outputs else 0


def _computed(engine: Any, request_id: str, length: int) -> int:
    request = engine.engine_core.engine_core.scheduler.requests.get(request_id)
    return min(request.num_computed_tokens, length) if request is not None else length


@contextmanager
def _watch_encoder(llm: Any, progress: Progress) -> Iterator[None]:
    """Move ``progress`` by the patches that a block of the vision tower has done.

    With several ranks the model is in other processes, and nothing is shown.
    """
    if llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        yield
        return
    depth, done = 1, 0

    def passed(_module: Any, _arguments: Any, output: Any) -> None:
        nonlocal done
        done += output.numel() // output.shape[-1]  # [..., hidden], a patch each
        progress.to(done // depth)

    def register(model: Any) -> list[Any]:
        nonlocal depth
        # The blocks themselves are called past their hooks: vLLM may compile them.
        feed_forward = model.encoder_feed_forward()
        depth = len(feed_forward)
        return [module.register_forward_hook(passed) for module in feed_forward]

    handles = llm.apply_model(register)[0]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _account(llm: Any, request_id: str) -> dict[str, Any] | None:
    from ..accounts.reports import merge_reports

    try:
        requests = merge_reports(llm.collective_rpc("adaspark_report"))["requests"]
    except ValueError:  # another --worker-cls keeps none
        return None
    return next((one for one in requests if one["request_id"] == request_id), None)
