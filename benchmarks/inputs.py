"""Synthetic attention inputs: one prompt of text, a video in cube order, and a question.

Three kinds, from the hardest for cube selection to the kindest:

* ``flat``: queries, keys and values are independent Gaussians.  No cube matters more than another.
* ``local``: keys and queries share a direction and are rotated by M-RoPE, so that attention falls
  with distance in time, height and width.  Values vary smoothly over the video.
* ``scenes``: the video is a run of scenes that drift and come back.  Keys and values cluster by
  scene, queries look for their own scene and for one other, the question for two cubes.

No model is behind them: they show how the rules differ, not how accurate a model stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_adaspark.video.order import cube_order

GRID = (16, 8, 16)  # merged tokens (T, H, W): 32 cubes of 64
CUBE = (4, 4, 4)
BLOCK = 64
TEXT_BEFORE = 64  # system prompt, one KV block: the video starts at a block edge
QUESTION = 32
HEADS, KV_HEADS, DIM = 8, 2, 64
KINDS = ("flat", "local", "scenes")


@dataclass(frozen=True, slots=True)
class Inputs:
    q: torch.Tensor  # [n, heads, d]
    k: torch.Tensor  # [n, kv_heads, d]
    v: torch.Tensor  # [n, kv_heads, d]
    cube_of: torch.Tensor  # [n], -1 for text
    scale: float = DIM**-0.5

    @property
    def is_video(self) -> torch.Tensor:
        return self.cube_of >= 0


def make(kind: str, seed: int = 0, text_before: int = TEXT_BEFORE) -> Inputs:
    """Inputs of one of :data:`KINDS`; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    at = _positions(text_before)  # [n, 3] time, height, width
    n = len(at)
    video = torch.arange(n - text_before - QUESTION) // BLOCK
    cube_of = torch.cat([torch.full((text_before,), -1), video, torch.full((QUESTION,), -1)])
    q, k, v = {"flat": _flat, "local": _local, "scenes": _scenes}[kind](at, cube_of, generator)
    return Inputs(q, k, v, cube_of)


def _positions(text_before: int) -> torch.Tensor:
    """M-RoPE positions of text, video (in cube order) and question."""
    token_order = np.stack(np.unravel_index(cube_order(GRID, CUBE), GRID), axis=-1)
    after = text_before + max(GRID)
    before = torch.arange(text_before)[:, None].expand(-1, 3)
    question = after + torch.arange(QUESTION)[:, None].expand(-1, 3)
    return torch.cat([before, text_before + torch.from_numpy(token_order), question])


def _flat(at, cube_of, generator):
    n = len(at)
    return tuple(torch.randn(n, h, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))


def _local(at, cube_of, generator):
    q, k, v = _flat(at, cube_of, generator)
    shared = torch.randn(KV_HEADS, DIM, generator=generator)
    # Some heads look near, others less so.
    pull = torch.linspace(0.8, 1.8, HEADS)[:, None]
    q = _rope(0.5 * q + pull * shared.repeat_interleave(HEADS // KV_HEADS, 0), at)
    k = _rope(0.5 * k + 1.8 * shared, at)
    waves = torch.randn(3, KV_HEADS * DIM, generator=generator) * 0.5
    smooth = torch.sin(at.float() @ waves * 0.5).view(len(at), KV_HEADS, DIM)
    return q, k, smooth + 0.3 * v


def _scenes(at, cube_of, generator):
    q, k, v = _flat(at, cube_of, generator)
    cubes = int(cube_of.max()) + 1
    group = HEADS // KV_HEADS
    scene_of = torch.tensor([0, 1, 2, 0, 3, 1, 4, 2]).repeat_interleave(cubes // 8)  # [cubes]
    scenes = torch.randn(5, KV_HEADS, DIM, generator=generator)
    drift = 0.25 * torch.randn(cubes, KV_HEADS, DIM, generator=generator).cumsum(0)
    look = scenes[scene_of] + drift  # [cubes, kv_heads, d] what a cube's keys have in common
    content = torch.randn(cubes, KV_HEADS, DIM, generator=generator) + scenes[scene_of]

    video = cube_of >= 0
    own = cube_of[video]
    k[video] = 0.8 * look[own] + 0.7 * k[video]
    v[video] = content[own] + 0.5 * v[video]
    # Each query head looks for its own cube's scene and for one other cube of its choice.
    other = (torch.rand(cubes, HEADS, generator=generator) * torch.arange(cubes)[:, None]).long()
    kv_head = torch.arange(HEADS) // group
    sought = 0.25 * look.repeat_interleave(group, 1) + 0.45 * look[other, kv_head]
    q[video] = sought[own] + 0.5 * q[video]
    answer = look[[cubes // 3, cubes - 5]].mean(0).repeat_interleave(group, 0)  # [heads, d]
    question = torch.arange(len(at)) >= len(at) - QUESTION
    q[question] = 0.8 * answer + 0.6 * q[question]
    return q, k, v


def _rope(x: torch.Tensor, at: torch.Tensor, base: float = 10_000.0) -> torch.Tensor:
    """M-RoPE of ``[n, heads, d]`` at ``[n, 3]``: a quarter of the pairs time, the rest space."""
    half = DIM // 2
    sections = [half // 4, 3 * half // 8, 3 * half // 8]
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))  # [d / 2]
    angle = at[:, axis].float() * base ** (-torch.arange(half) / half)  # [n, d / 2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
