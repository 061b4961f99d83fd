"""The GPU benchmark's measurements: first whether results are right, then how long they take."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from gpu_contenders import DENSE, sparse_contenders
from gpu_scene import Scene, Selection, Shape, candidates, choose, make_scene, own_block

COPIES = 3  # of the inputs
REPEATS = 5  # at the most
# Relative RMS against fp32: bf16 probabilities alone give 2e-3.
TOLERANCE = 1e-2


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())


def reference(scene: Scene) -> torch.Tensor:
    """Attention over the chosen blocks in fp32, ``[kv_heads, queries, group, d]``."""
    shape, d = scene.shape, scene.shape.head_size
    out = torch.empty(scene.by_head.shape, device=scene.query.device)
    visible = torch.ones(shape.block, shape.block, device=out.device).tril().bool()
    for tile, own in enumerate(own_block(shape, "cpu").tolist()):
        tokens = slice(tile * shape.block, (tile + 1) * shape.block)
        for head in range(shape.kv_heads):
            logical = [*scene.chosen[tile, head].nonzero().flatten().tolist(), own]
            kv = scene.cache[scene.blocks[logical].long(), head].float().flatten(0, 1)
            q = scene.by_head[head, tokens].float()  # [block, group, d]
            logits = torch.einsum("qgd,kd->gqk", q, kv[:, :d]) * shape.scale
            logits[..., -shape.block :].masked_fill_(~visible, float("-inf"))
            out[head, tokens] = torch.einsum("gqk,kd->qgd", logits.softmax(-1), kv[:, d:])
    return out


def check_correct(shape: Shape, device: torch.device) -> dict[str, float | str]:
    """Relative RMS of every contender and kernel against fp32, or why it is absent.

    Raises:
        SystemExit: one is wrong.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    seed = int.from_bytes(os.urandom(4), "little")
    errors: dict[str, float | str] = {"seed": str(seed)}
    for density, family in ((0.4, sparse_contenders()), (1.0, DENSE)):
        scene = make_scene(shape, density, device, seed)
        if density == 1:
            scene.chosen = candidates(shape, device)[:, None].expand_as(scene.chosen)
        want = reference(scene)
        for name, make in family.items():
            kind = "dense" if density == 1 else "sparse"
            out = torch.full_like(scene.query if density == 1 else scene.by_head.flatten(0, 1),
                                  float("nan"))  # fmt: skip
            try:
                got = make(scene)(out)
            except Exception as error:  # whatever a kernel says that does not run here
                errors[f"{kind}: {name}"] = f"absent: {_short(error)}"
                continue
            got = out if got is None else got
            by_head = want.transpose(0, 1) if density == 1 else want
            errors[f"{kind}: {name}"] = relative_rms(got, by_head.reshape(got.shape))

    choice = Selection(scene)
    choice.probs.fill_(float("nan"))
    choice.scores()
    means = (choice.sums[choice.blocks] / shape.block).to(torch.bfloat16).float()
    logits = torch.einsum("hqgd,khd->hqgk", scene.by_head.float(), means) * shape.scale
    tiles = logits.unflatten(1, (shape.tiles, shape.block))
    tiles = tiles.masked_fill(~choice.candidates[None, :, None, None], float("-inf"))
    want = tiles.softmax(-1).mean((2, 3)).transpose(0, 1)
    some = choice.candidates.any(1)  # the first tile has nothing to choose from
    valid = choice.candidates[:, None].expand_as(want)
    errors["scores"] = relative_rms(choice.probs[valid], want[valid])
    choice.probs.masked_fill_(~valid, 0.0)
    choice.nucleus()
    there = choice.probs.double().masked_fill(~valid, -1.0)
    falling, index = there.sort(dim=-1, descending=True, stable=True)
    ranked_before = falling.cumsum(-1) - falling < choice.share[..., None]
    want = torch.empty_like(ranked_before).scatter_(-1, index, ranked_before) & valid
    # A sum in another order may take one entry more or less where it meets the share.
    errors["nucleus"] = float((choice.kept[some] != want[some]).float().mean())
    for kind in ("dense", "sparse"):
        if not any(name.startswith(kind) and isinstance(e, float) for name, e in errors.items()):
            raise SystemExit(f"no {kind} kernel runs on this machine: {errors}")
    wrong = {k: v for k, v in errors.items() if isinstance(v, float) and not v < TOLERANCE}
    if wrong:
        raise SystemExit(f"wrong results, nothing was timed: {wrong} (seed {seed})")
    return errors


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(
    runs: dict[str, list[Callable[[], object]]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Times of each, one after the other, over the copies of its inputs; the first is a warm-up.

    Args:
        runs: by contender, a run per copy of the inputs.
        seconds: after which no more rounds begin; three at the least.
    """
    times: dict[str, list[float]] = {}
    for name, copies in list(runs.items()):
        try:
            timed(copies[0], device)
            times[name] = []
        except Exception as error:  # whatever a kernel says that does not take this shape
            print(f"  {name} left out: {_short(error)}", file=sys.stderr)
    began = time.perf_counter()
    for turn in range(REPEATS):
        for name in times:
            copies = runs[name]
            times[name].append(timed(copies[turn % len(copies)], device))
        if turn >= 2 and time.perf_counter() - began > seconds:
            break
    return times


def measure(
    shape: Shape, densities: list[float], device: torch.device, present: set[str], seconds: float
) -> list[dict]:
    """Rows of one shape: dense, selection, and each sparse contender at each density."""
    scenes = [make_scene(shape, densities[0], device, seed) for seed in range(COPIES)]
    outs = {"dense": torch.empty_like(scenes[0].query),
            "sparse": torch.empty_like(scenes[0].by_head.flatten(0, 1))}  # fmt: skip

    def runs(kind: str, family: dict) -> dict[str, list[Callable[[], object]]]:
        made = {}
        for name, make in family.items():
            if f"{kind}: {name}" in present:
                each = [make(scene) for scene in scenes]
                made[name] = [lambda run=run: run(outs[kind]) for run in each]
        return made

    pairs = shape.queries * (shape.tokens - shape.queries + (shape.queries + 1) / 2)
    flops = 4 * shape.heads * shape.head_size * pairs
    facts = {
        "name": "chunk" if shape.queries < shape.tokens else "prefill",
        "tokens": shape.tokens,
        "queries": shape.queries,
        "block": shape.block,
    }
    dense = interleaved(runs("dense", DENSE), device, seconds / 4)
    rows = [
        facts | {"contender": name, "kind": "dense", "density": 1.0, "time_s": t,
                 "tflops": flops / statistics.median(t) / 1e12}
        for name, t in dense.items()
    ]  # fmt: skip
    best = min(map(statistics.median, dense.values()))

    choices = [Selection(scene).parts() for scene in scenes]
    parts = interleaved(
        {part: [choice[part] for choice in choices] for part in choices[0]}, device, seconds / 8
    )
    del choices
    rows += [facts | {"contender": p, "kind": "selection", "time_s": t} for p, t in parts.items()]
    choosing = sum(map(statistics.median, parts.values()))

    for wanted in densities:
        for scene in scenes:
            choose(scene, wanted)
        kept = sum(float(scene.kept_blocks.sum()) for scene in scenes) / len(scenes)
        # Of a tile's own block a token sees half, and itself.
        kept_pairs = kept / shape.kv_heads * shape.block**2
        kept_pairs -= shape.tiles * shape.block * (shape.block - 1) / 2
        density = kept_pairs / pairs
        times = interleaved(
            runs("sparse", sparse_contenders()), device, seconds / 2 / len(densities)
        )
        for name, t in times.items():
            alone = statistics.median(t)
            rows.append(
                facts | {
                    "contender": name, "kind": "sparse", "density": density, "time_s": t,
                    "tflops": flops * density / alone / 1e12,
                    "efficiency": best * density / (alone + choosing),
                    "ratio_to_dense": best / (alone + choosing),
                    "selection_share": choosing / (alone + choosing),
                }
            )  # fmt: skip
    return rows
