"""One engine in this process, and questions to it, by vLLM's ``LLM`` and its ``chat``.

vLLM's encoder cache is as large as ``max_num_batched_tokens``, so a video must fit that;
``max_num_scheduled_tokens`` still cuts prefill in chunks.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..accounts.cost import Cost, Model
from ..methods import DEFAULT, OF_ARCHITECTURE
from ..models.layout import Sampling
from ..settings import METHOD_KEY, SERVER_KEY
from . import CommandError, UsageError
from .checkpoints import trained_for
from .media import is_web_address, local_path, read_video
from .vllm_options import merge

CHUNK_BLOCKS = 32  # KV blocks computed per step
PLUGIN = "adaspark"


def say(what: str) -> None:
    """What is being done, on stderr."""
    print(what, file=sys.stderr, flush=True)


def prepare_environment() -> None:
    """Settings that vLLM reads when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # bars and warnings do not mix
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the answer's
    warnings.filterwarnings("ignore", category=FutureWarning)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{PLUGIN},{allowed}"


@contextmanager
def video_file(source: str) -> Iterator[Path]:
    """The file of a video; what comes from elsewhere is kept in one until the block ends.

    Raises:
        UsageError: no such file, a folder, a data URL that is none.
        CommandError: it could not be fetched.
    """
    path = local_path(source)
    if path is not None:
        yield path
        return
    if is_web_address(source):
        say("fetching the video")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        path.write_bytes(read_video(source))
        yield path


def engine_options(model: Model, sampling: Sampling, folder: Path, rest: list[str]) -> Any:
    """vLLM's EngineArgs from the arguments that are not ours.

    Args:
        model: the checkpoint.
        sampling: which frames are read.
        folder: that vLLM may read videos in.
        rest: the arguments.

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
        options = EngineArgs.from_cli_args(parser.parse_args(["--model", model.name, *rest]))
        media = dict(options.media_io_kwargs or {})
        chosen = dict(media.get("video") or {})
        for name in ("fps", "max_frames", "min_frames", "num_frames"):
            if name in chosen:
                raise UsageError(
                    f"--media-io-kwargs video.{name}={chosen[name]!r}: use --fps or --max-frames"
                )
        chosen |= model.rules.loader_options(sampling)
    except ValueError as error:
        raise UsageError(f"vLLM's options: {error}") from None
    except OSError as error:  # the model is looked up on its hub
        raise CommandError(f"--model {model.name!r} could not be fetched: {error}") from None
    options.media_io_kwargs = media | {"video": chosen}
    options.allowed_local_media_path = str(folder.absolute())
    return options


@contextmanager
def engine(
    options: Any, model: Model, method: str, settings: dict[str, Any], volume: int, cost: Cost
) -> Iterator[Any]:
    """A running ``vllm.LLM`` with room for one such video.

    Args:
        options: vLLM's EngineArgs; what they leave open is filled in here.
        model: the checkpoint.
        method: the sparsity method's name.
        settings: the method's server settings.
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
    architecture = trained_for(model.name, model.config) or model.layout.architecture
    ours = {SERVER_KEY: settings}
    if method != OF_ARCHITECTURE.get(architecture, DEFAULT):
        ours[METHOD_KEY] = method
    options.hf_overrides = {**options.hf_overrides, "architectures": [architecture]}
    options.additional_config = merge(dict(options.additional_config), ours)
    options.limit_mm_per_prompt = options.limit_mm_per_prompt or {"video": 1, "image": 0}
    options.max_model_len = options.max_model_len or cost.max_model_len
    options.max_num_batched_tokens = options.max_num_batched_tokens or cost.max_num_batched_tokens
    if options.max_num_scheduled_tokens is None and not cost.one_step:
        options.max_num_scheduled_tokens = min(
            CHUNK_BLOCKS * volume, options.max_num_batched_tokens
        )
    options.disable_log_stats = False  # an answer's times are among them
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


@dataclass(frozen=True)
class Question:
    """About a video that the engine may read."""

    video: Path
    text: str
    max_pixels: int | None = None


@dataclass(frozen=True)
class Answer:
    """What one request gave and took."""

    text: str
    tokens: int
    prompt_token_ids: list[int]
    account: dict[str, Any]  # worker.py's
    seconds: dict[str, float]  # by stage, and "total"


def ask(
    llm: Any, question: Question, settings: Any, *, max_tokens: int, quiet: bool = True
) -> Answer:
    """The greedy answer.

    Args:
        llm: of :func:`engine`.
        question: what is asked, and about which video.
        settings: the request's own.
        max_tokens: of the answer.
        quiet: show no progress bar.

    Raises:
        CommandError: vLLM refuses it.
    """
    began = time.monotonic()
    (output,) = chat(llm, [question], settings, max_tokens=max_tokens, quiet=quiet)
    total, times = time.monotonic() - began, output.metrics
    ran = times.last_token_ts - times.queued_ts
    return Answer(
        text=output.outputs[0].text,
        tokens=len(output.outputs[0].token_ids),
        prompt_token_ids=output.prompt_token_ids,
        account=last_account(llm),
        seconds={
            "read": total - ran,  # decoded, and cut into patches
            "prefill": times.first_token_ts - times.queued_ts,  # the vision tower included
            "answer": times.last_token_ts - times.first_token_ts,
            "total": total,
        },
    )


def chat(
    llm: Any,
    questions: Sequence[Question],
    settings: Any,
    *,
    max_tokens: int,
    logprobs: int | None = None,
    quiet: bool = True,
) -> list[Any]:
    """vLLM's ``RequestOutput`` of each question, answered greedily, all at the same time.

    Args:
        llm, settings, max_tokens, quiet: as of :func:`ask`.
        questions: what is asked; all with the same ``max_pixels``.
        logprobs: of so many tokens at each place of an answer; None for none.

    Raises:
        CommandError: vLLM refuses one.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    (max_pixels,) = {question.max_pixels for question in questions}
    options = {SERVER_KEY: settings}
    if max_pixels is not None:
        options["max_pixels"] = max_pixels
    try:
        return llm.chat(
            [[{"role": "user", "content": _content(question)}] for question in questions],
            SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=logprobs),
            use_tqdm=not quiet,
            mm_processor_kwargs=options,
        )
    except (ValueError, VLLMValidationError) as error:
        raise CommandError(str(error)) from None


def _content(question: Question) -> list[dict[str, Any]]:
    video = {"type": "video_url", "video_url": {"url": question.video.absolute().as_uri()}}
    return [video, {"type": "text", "text": question.text}]


def last_account(llm: Any) -> dict[str, Any]:
    """Of the request that ended last."""
    from ..accounts.reports import merge_reports

    return merge_reports(llm.collective_rpc("adaspark_report"))["requests"][-1]
