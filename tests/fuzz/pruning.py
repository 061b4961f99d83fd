"""Random videos through ``prune``: which tokens survive, in which order, and at which places."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch

from vllm_adaspark.video.order import cube_order
from vllm_adaspark.video.prune import kept_tokens, split_places, survivors, with_places

from .cases import Case, Request

TIE = 1e-6
CUBES = ((2, 4, 4), (4, 4, 4), (8, 4, 4))


def random_prune(rng: np.random.Generator) -> Case:
    grid = [int(n) for n in (rng.integers(1, 14), rng.integers(1, 9), rng.integers(1, 9))]
    settings = {
        "grid": grid,
        "prune": int(rng.integers(0, 1000)) / 1000,
        "cube": CUBES[int(rng.integers(3))],
        "order": str(rng.choice(["cube", "raster"])),
        "still": float(rng.choice([0.0, 0.5, 0.9, 1.0])),
        "pace": float(rng.choice([0.3, 1.0, 2.5])),
    }
    shape = {"dtype": str(rng.choice(["float32", "bfloat16"]))}
    return Case("prune", shape, [Request([], settings, int(rng.integers(1 << 31)))], [[[0, 1]]])


def check_prune(case: Case) -> Counter:
    """Compare with the rule as a sentence; places must come back exactly."""
    settings = {"still": 0.5, "pace": 1.0, "order": "cube", "cube": CUBES[0], "prune": 0.5}
    settings |= case.requests[0].settings
    t, h, w = grid = tuple(settings.get("grid", (3, 4, 4)))
    rng = np.random.default_rng(case.requests[0].seed)
    video = np.repeat(rng.normal(size=(1, h * w, 12)), t, axis=0)
    changes = rng.random((t, h * w)) > settings["still"]
    video[changes] = rng.normal(size=(int(changes.sum()), 12))
    video = torch.tensor(video.reshape(-1, 12)).to(case.dtype)
    order = cube_order(grid, tuple(settings["cube"]), settings["order"])
    assert sorted(order.tolist()) == list(range(t * h * w))
    kept = survivors(video, grid, settings["prune"], order).tolist()
    assert len(kept) == kept_tokens(grid, settings["prune"])
    assert len(kept) <= max(h * w, t * h * w * (1 - settings["prune"]) + 1e-6)
    wanted, margin = by_sentence(video, grid, len(kept))
    ties = set(kept) != wanted
    assert not ties or margin < TIE, f"kept {sorted(set(kept) ^ wanted)}"
    assert kept == [token for token in order.tolist() if token in set(kept)], "in cube order"
    carried = with_places(video, torch.tensor(kept), grid, settings["pace"])
    back, places = split_places(carried, 12)
    assert torch.equal(back, video[kept])
    theirs = [[int(k // (h * w) * settings["pace"]), k // w % h, k % w, k] for k in kept]
    assert places.T.tolist() == theirs
    return Counter(steps=1, sets=1, ties=int(ties))


def by_sentence(
    video: torch.Tensor, grid: tuple[int, int, int], number: int
) -> tuple[set[int], float]:
    """The first frame, then whatever differs most from the frame before; and the margin."""
    _, h, w = grid
    place, x = h * w, video.double()
    x /= x.norm(dim=1, keepdim=True)
    alike = (x[place:] * x[:-place]).sum(1).tolist()
    difference = {place + nth: 1 - cosine for nth, cosine in enumerate(alike)}
    ranked = sorted(difference, key=lambda token: -difference[token])
    left = number - place
    margin = math.inf
    if 0 < left < len(ranked):
        margin = difference[ranked[left - 1]] - difference[ranked[left]]
    return set(range(place)) | set(ranked[:left]), margin
