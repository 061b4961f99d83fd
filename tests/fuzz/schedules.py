"""Random requests through our scheduler, without an engine: where do chunks end, and do all finish?

The scheduler is vLLM's own under our rules (vllm_adaspark/scheduler.py); what the worker would
answer is made up.  Requests have several videos and images, share prefixes, settings and videos,
and compete for tokens, KV blocks and the encoder's cache.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

BLOCK = 64
MOST_STEPS = 3000


@dataclass
class Prompt:
    """One request: ``pieces`` are ("text" | "video" | "image", tokens), ``seed`` names what they
    show; two prompts of one seed share their prefix."""

    pieces: list[tuple[str, int]]
    seed: int
    arrives: int  # before this step
    answers: int  # tokens
    settings: dict | str | None = None
    aborts: int | None = None  # after so many steps

    @property
    def tokens(self) -> int:
        return sum(n for _, n in self.pieces)


@dataclass
class Limits:
    """Of the server."""

    step_tokens: int
    kv_blocks: int
    encoder_tokens: int
    rows: int
    is_async: bool
    long_prefill: int = 0
    prefix_caching: bool = True
    priority: bool = False
    tile_cubes: int = 1

    def settings_of(self, prompt: Prompt, method: type) -> Any:
        """A prompt's settings, over the server's."""
        server = {"tile_cubes": self.tile_cubes, "dense_below": 1} if self.tile_cubes > 1 else None
        return method().override(server).override(prompt.settings)


@dataclass
class Case:
    limits: Limits
    prompts: list[Prompt]
    method: str = "adaspark"


@dataclass
class Seen:
    """What a run of a case showed."""

    chunks: dict[str, list[tuple[int, int]]] = field(
        default_factory=dict
    )  # (start, end) by request
    steps: int = 0
    preempted: int = 0
    cached: int = 0  # prompt tokens from the prefix cache
    left: list[int] = field(default_factory=list)  # tokens empty in steps that cut some prompt


def random_case(rng: np.random.Generator, method: str = "adaspark") -> Case:
    """A case that stock vLLM can serve, and so must we."""
    step = int(rng.choice([64, 65, 100, 127, 200, 333, 640, 1000]))
    prompts = [random_prompt(rng, method) for _ in range(int(rng.integers(1, 9)))]
    if method == "adatp":  # a prompt above a step's size is refused before it gets here
        step = max(step, *(p.tokens for p in prompts))
    most = max(p.tokens + p.answers for p in prompts)
    media = [[n for kind, n in p.pieces if kind != "text"] for p in prompts]
    together = sum if method == "adatp" else max  # what the encoder must hold at once
    largest = max(together([0, *of_prompt]) for of_prompt in media)
    rows = int(rng.choice([1, 2, 4, 16]))
    blocks = -(-most // BLOCK) + int(rng.choice([2, 4, 40]))
    limits = Limits(
        step_tokens=max(step, rows),
        kv_blocks=blocks,
        encoder_tokens=max(largest, int(rng.choice([0, 300, 3000]))),
        rows=rows,
        is_async=bool(rng.random() < 0.5),
        long_prefill=0 if method == "adatp" else int(rng.choice([0, 0, 64, 90, 300])),
        prefix_caching=bool(rng.random() < 0.8),
        priority=bool(rng.random() < 0.2),
    )
    return Case(limits, prompts, method)


def in_pairs(case: Case) -> Case:
    """The same where two cubes choose together, and a step may hold them."""
    limits, least = case.limits, 2 * BLOCK
    long_prefill = limits.long_prefill and max(limits.long_prefill, least)
    step_tokens = max(limits.step_tokens, least)
    limits = replace(limits, tile_cubes=2, step_tokens=step_tokens, long_prefill=long_prefill)
    return replace(case, limits=limits)


def random_prompt(rng: np.random.Generator, method: str) -> Prompt:
    pieces = [("text", int(rng.integers(1, 100)))]
    for _ in range(int(rng.choice([0, 1, 1, 2, 3]))):
        kind = str(rng.choice(["video", "video", "video", "image"]))
        pieces.append((kind, int(rng.integers(1, 12 * BLOCK) if kind == "video" else 70)))
        pieces.append(("text", int(rng.choice([0, 1, 2, 30, 100]))))
    pieces[-1] = ("text", int(rng.integers(1, 100)))
    sparse = {"keep": 0.5, "layers": [1]} if method == "adatp" else {"p_attn": 0.5}
    choices = [sparse, sparse, "off", None]
    if method == "adaspark":
        choices += [{"p_attn": 1.0, "p_ffn": 1.0}, {"p_attn": 1.0}, {"flops": 0.5}]
    return Prompt(
        pieces=[piece for piece in pieces if piece[1]],
        seed=int(rng.integers(0, 3)),
        arrives=int(rng.integers(0, 12)),
        answers=int(rng.choice([1, 5, 80])),
        settings=choices[int(rng.integers(len(choices)))],
        aborts=int(rng.integers(1, 20)) if rng.random() < 0.1 else None,
    )


class Schedulers:
    """Makes schedulers for one checkpoint; vLLM's configuration of it takes seconds."""

    def __init__(self, checkpoint: str, methods: tuple[str, ...] = ("adaspark", "adatp")) -> None:
        self._configs = {name: self._config(str(checkpoint), name) for name in methods}

    def _config(self, checkpoint: str, method: str) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        settings = {"keep": 0.5, "layers": [1]} if method == "adatp" else {"p_attn": 0.5}
        config = EngineArgs(
            checkpoint,
            max_model_len=8192,
            dtype="float32",
            hf_overrides={"architectures": ["AdaSparkQwen2_5_VLForConditionalGeneration"]},
            additional_config={"method": method, "adaspark": settings},
        ).create_engine_config()
        return config

    def make(self, case: Case) -> Any:
        """A scheduler with the limits of a case."""
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        limits, config = case.limits, self._configs[case.method]
        if case.method == "adaspark":
            config.model_config.hf_config.adaspark_resolved["settings"]["tile_cubes"] = (
                limits.tile_cubes
            )
        scheduler = config.scheduler_config
        scheduler.max_num_batched_tokens = max(limits.step_tokens, limits.encoder_tokens)
        scheduler.max_num_scheduled_tokens = limits.step_tokens
        scheduler.max_num_encoder_input_tokens = limits.encoder_tokens
        scheduler.encoder_cache_size = limits.encoder_tokens
        scheduler.max_num_seqs = limits.rows
        scheduler.long_prefill_token_threshold = limits.long_prefill
        scheduler.async_scheduling = limits.is_async
        scheduler.policy = "priority" if limits.priority else "fcfs"
        config.cache_config.enable_prefix_caching = limits.prefix_caching
        config.cache_config.num_gpu_blocks = limits.kv_blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        cache = KVCacheConfig(limits.kv_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        return config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )


def request_of(prompt: Prompt, name: str, settings: Any) -> Any:
    """vLLM's request."""
    from vllm import SamplingParams
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from vllm_adaspark.requests import with_settings

    init_none_hash(sha256)
    ids, features = [], []
    for nth, (kind, tokens) in enumerate(prompt.pieces):
        if kind != "text":
            shown = f"{prompt.seed}-{nth}-{kind}-{tokens}"
            features.append(
                MultiModalFeatureSpec(
                    None, kind, with_settings(shown, settings), PlaceholderRange(len(ids), tokens)
                )
            )
        ids += [1000 * prompt.seed + nth] * tokens
    sampling = SamplingParams(max_tokens=prompt.answers, ignore_eos=True)
    sampling.update_from_generation_config({}, 5)
    return Request(
        name,
        ids,
        sampling,
        None,
        mm_features=features,
        priority=prompt.seed,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def run(case: Case, scheduler: Any, method: type) -> Seen:
    """Serve a case's requests to their ends.

    Raises:
        AssertionError: a chunk ends inside a cube or between two that choose together, a prompt
            that must be whole is not, or some request never ends.
    """
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    seen, names = Seen(), {f"r{i}": prompt for i, prompt in enumerate(case.prompts)}
    settings = {name: case.limits.settings_of(prompt, method) for name, prompt in names.items()}
    requests = {name: request_of(prompt, name, settings[name]) for name, prompt in names.items()}
    on_the_way: deque[tuple[Any, Any]] = deque()
    for now in range(MOST_STEPS):
        for name, prompt in names.items():
            if prompt.arrives == now:
                scheduler.add_request(requests[name])
            if prompt.aborts is not None and prompt.arrives + prompt.aborts == now:
                scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        started = {name: request.num_computed_tokens for name, request in requests.items()}
        output = scheduler.schedule()
        for new in output.scheduled_new_reqs:
            started[new.req_id] = new.num_computed_tokens
            seen.cached += new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        started |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        seen.preempted += len(output.preempted_req_ids or ())
        scheduled = output.num_scheduled_tokens
        for name, number in scheduled.items():
            chunk = started[name], started[name] + number
            seen.chunks.setdefault(name, []).append(chunk)
            check_chunk(names[name], chunk, settings[name])
        if any(started[n] + k < requests[n].num_prompt_tokens for n, k in scheduled.items()):
            seen.left.append(case.limits.step_tokens - output.total_num_scheduled_tokens)
        sampled = []
        for name, number in scheduled.items():
            done = started[name] + number >= requests[name].num_tokens
            sampled.append([7] if done else [])
        ids = list(scheduled)
        answer = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, sampled)
        on_the_way.append((output, answer))
        if len(on_the_way) > case.limits.is_async:
            scheduler.update_from_output(*on_the_way.popleft())
        over = all(request.is_finished() for request in requests.values())
        if over and now > max(prompt.arrives for prompt in names.values()):
            seen.steps = now
            return seen
    raise AssertionError(f"not all requests ended within {MOST_STEPS} steps")


def check_chunk(prompt: Prompt, chunk: tuple[int, int], settings: Any) -> None:
    """No chunk ends inside a cube of a sparse request, or begins or ends between two that choose
    together; a prompt that must be whole is."""
    start, end = chunk
    text = json.dumps([prompt.settings, prompt.pieces])
    has_video = any(kind == "video" for kind, _ in prompt.pieces)
    if settings.one_step:
        if has_video and start < prompt.tokens:
            assert start == 0 and end >= prompt.tokens, f"{chunk} of a prompt in one step: {text}"
        return
    shares = getattr(settings, "p_attn", 1), getattr(settings, "p_ffn", 1)
    if not settings.enabled or (min(shares) == 1 and settings.flops is None):
        return
    is_video = [kind == "video" for kind, tokens in prompt.pieces for _ in range(tokens)]
    block = is_video[end // BLOCK * BLOCK :][:BLOCK]
    cut = end % BLOCK and len(block) == BLOCK and all(block)
    assert not cut, f"{chunk} cuts a cube: {text}"
    if getattr(settings, "tile_cubes", 1) == 1 or not settings.sparse_attention:
        return
    cubes = [all(is_video[i : i + BLOCK]) for i in range(0, len(is_video) - BLOCK + 1, BLOCK)]
    for edge in chunk:
        block = edge // BLOCK
        if edge % BLOCK or not block % 2 or block >= len(cubes):
            continue
        paired = cubes[block - 1] and cubes[block] and sum(cubes[: block - 1]) >= 1
        assert not paired, f"{chunk} parts two cubes: {text}"
