"""One request in many circumstances, on real engines: what it chooses and answers must not change.

Each round draws prompts and asks them one by one, each in one step.  Then it asks them again in
engines with other chunk sizes, a small KV cache (preemption), a prefix cache, two ranks, in another
order and all at once, and compares every choice of every layer (:mod:`fuzz.choices`).

A budget (``flops``) is left out: its p depends on the chunk (docs/concepts.md).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .choices import recorded

CLOSE = 1e-3  # of log-probabilities in float32
ANSWER = 24
CUBE = 64  # tokens
SERVERS: dict[str, dict[str, Any]] = {
    "adaspark": {"p_attn": 0.6, "p_ffn": 0.5, "min_cubes": 1, "dense_below": 2},
    "videonsa": {},
    "adatp": {"layers": [2, 4], "keep": [0.5, 0.4], "tau_s": 0.9995},
}
# In float32 a choice that is a tie may fall the other way where a product has another shape; of so
# many choices one may.  What it changes is small, but makes later choices near ties, too.
TIES = 1e-3


@dataclass
class Compared:
    """Choices compared, and where they differ: (variant, request, what, layer, first token).

    ``followed`` counts those that differ where an earlier one did before them.
    """

    choices: int = 0
    differ: list[tuple] = field(default_factory=list)
    followed: int = 0
    answers: list[str] = field(default_factory=list)  # those that differ

    @property
    def failed(self) -> bool:
        return bool(self.answers) or len(self.differ) > TIES * self.choices


def random_prompts(rng: np.random.Generator, number: int, method: str) -> list[dict]:
    """Prompts of one or two videos with settings of their own, and one of text."""
    from engine.engines import VIDEO, chat, clip, video_prompt

    prompts = []
    for _ in range(number):
        clips = [
            clip(
                int(rng.integers(4, 40)),
                28 * int(rng.integers(3, 8)),
                28 * int(rng.integers(3, 8)),
                seed=int(rng.integers(99)),
            )
            for _ in range(int(rng.choice([1, 1, 2])))
        ]
        settings = random_settings(rng, method)
        words = "What is shown? " * int(rng.integers(1, 20))
        prompts.append(video_prompt(*clips, question=words, **settings))
        if rng.random() < 0.3:  # text in front and between
            prompts[-1]["prompt"] = chat("Look: " * 9, "Then: ".join([VIDEO] * len(clips)), words)
    prompts.append({"prompt": chat("Which number is shown on the card? " * 9)})
    return prompts


def random_settings(rng: np.random.Generator, method: str) -> dict[str, Any]:
    """A request's; a checkpoint of VideoNSA was trained with its own."""
    if method == "videonsa":
        return {}
    if method == "adatp":
        return {
            "keep": [float(rng.choice([0.3, 0.6, 0.9])) for _ in range(2)],
            "dedup": str(rng.choice(["first", "all", "off"])),
            "queries": str(rng.choice(["all", "last"])),
        }
    settings: dict[str, Any] = {
        "p_attn": float(rng.choice([0.2, 0.5, 0.8, 1.0])),
        "p_ffn": float(rng.choice([0.3, 0.7, 1.0])),
        "text_queries": str(rng.choice(["sparse", "dense"])),
        "dense_layers": int(rng.choice([0, 1])),
    }
    if rng.random() < 0.3:
        settings |= {"selection": "top_k", "keep": 0.3}
    return settings


def variants(
    rng: np.random.Generator, method: str, tile_cubes: int = 1
) -> dict[str, dict[str, Any]]:
    """Engine options by name."""
    low, high = (2200, 3000) if method == "adatp" else (70, 600)  # there a prompt is one chunk
    low = max(low, tile_cubes * CUBE)
    return {
        "odd chunks, prefix cache": {"max_num_scheduled_tokens": int(rng.integers(low, high))},
        "small cache": {
            "max_num_scheduled_tokens": int(rng.integers(low + 30, high + 100)),
            "enable_prefix_caching": bool(rng.random() < 0.5),
            "max_model_len": 2560,
            "num_gpu_blocks_override": 46,
        },
        "two ranks": {"tensor_parallel_size": 2, "enable_prefix_caching": False},
    }


def check(
    checkpoint: Any,
    rng: np.random.Generator,
    names: Sequence[str],
    method: str = "adaspark",
    number: int = 5,
    **server: Any,
) -> Compared:
    """One round, with the named variants; ``server``: more of its settings."""
    from engine import engines

    def engine(**options: Any) -> Any:
        if method == "videonsa":  # the checkpoint says it all
            options |= {"method": None, "architecture": None}
        settings = SERVERS[method] | server
        return engines.engine(checkpoint, settings, **{"method": method} | options)

    prompts, result = random_prompts(rng, number, method), Compared()
    asking = partial(engines.ask, max_tokens=ANSWER)
    with engine(enable_prefix_caching=False) as llm:
        alone = [recorded(llm, partial(asking, llm, [prompt])) for prompt in prompts]
    for name, options in variants(rng, method, server.get("tile_cubes", 1)).items():
        if name not in names:
            continue
        order = rng.permutation(len(prompts))
        with engine(**options) as llm:
            for again in range(2):  # the second time from the prefix cache, where there is one
                batch = [prompts[i] for i in order]
                answers, choices = recorded(llm, partial(asking, llm, batch))
                for nth, (i, answer) in enumerate(zip(order, answers, strict=True)):
                    (want,), chosen = alone[i]
                    if not answer.difference(want) < CLOSE:
                        result.answers.append(f"{name} {again}: request {i}")
                    where = f"{name} {again}", int(i)
                    mine, theirs = choices.get(nth, {}), chosen.get(0, {})
                    compare(result, where, theirs, mine, answer.cached_tokens)
    return result


def compare(result: Compared, where: tuple, want: dict, got: dict, cached: int) -> None:
    """Every choice behind the cached tokens, which must be the same each time it is made."""
    keys = [key for key in want if key[2] >= cached]
    result.choices += len(keys)
    differ = [key for key in {*keys, *got} if not same(got.get(key, []), want.get(key, []))]
    differ.sort(key=lambda key: (key[1], key[0] == "ffn", key[2]))  # as they are made
    for nth, (what, layer, first) in enumerate(differ):
        earlier = differ[:nth]
        if any(key[:2] != (what, layer) and key[2] < first + CUBE for key in earlier):
            result.followed += 1
        else:
            result.differ.append((*where, what, layer, first))


def same(mine: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    """Whether a choice was the same each time it was made.

    One that keeps everything need not be made: in a layer that is dense for all rows of a step
    nobody chooses, and where others do, who is dense there keeps everything.
    """
    if not mine or not theirs:
        return all(choice.all() for choice in (*mine, *theirs))
    return len(mine) == len(theirs) == 1 and np.array_equal(mine[0], theirs[0])


def main(minutes: float, seed: int) -> int:
    """Rounds until the time is over; 1 if something differs."""
    import checkpoint as demo_checkpoint  # examples/demo
    import tiny_videonsa

    cores = sorted(os.sched_getaffinity(0))[:2]
    names = ["odd chunks, prefix cache", "small cache"]
    if len(cores) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
        names.append("two ranks")
    end, number, failed = time.time() + 60 * minutes, 0, False
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {
            "adaspark": demo_checkpoint.build(Path(folder) / "2", dtype="float32", seed=seed),
            "videonsa": tiny_videonsa.build(Path(folder) / "nsa", seed=seed, new_names=True),
            "adatp": demo_checkpoint.build(
                Path(folder) / "6", dtype="float32", seed=seed, layers=6, vision_layers=2
            ),
        }
        while number == 0 or time.time() < end:
            for at, (method, path) in enumerate(checkpoints.items()):
                server = {"tile_cubes": 1 + number % 2} if method == "adaspark" else {}
                rng = np.random.default_rng([seed, at, number])
                result = check(path, rng, names, method, **server)
                print(
                    f"{method}, round {number} of seed {seed}: {result.choices:,} choices, "
                    f"{len(result.differ)} differ {result.differ[:5]}, {result.followed} after "
                    f"them; {result.answers}",
                    flush=True,
                )
                failed |= result.failed
            number += 1
    return int(failed)
