"""Random requests for the kernel tests: prompts of text and videos, chunked and batched at will."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.paged.state import StepRows


@dataclass
class Request:
    """One request with random queries, keys and values; structured enough to be selective."""

    config: AdaSparkConfig
    is_video: torch.Tensor  # [n]
    q: torch.Tensor  # [n, heads, d]
    k: torch.Tensor  # [n, kv_heads, d]
    v: torch.Tensor
    blocks: np.ndarray  # physical blocks, one per logical block
    done: int = 0
    layout: list[tuple[str, int]] = field(default_factory=list)
    hidden: torch.Tensor | None = None  # [n, hidden], for a method that wants it
    kind: type = AdaSparkRequest  # what the method knows of it

    @property
    def known(self) -> AdaSparkRequest | None:
        """What a worker knows of it; a budget is taken as the share to keep, as the twin does."""
        if not self.is_video.any():
            return None
        config = self.config
        if self.kind is not AdaSparkRequest:
            return self.kind(config, self.is_video.numpy())
        return AdaSparkRequest(config, self.is_video.numpy(), config.flops)


def random_request(
    rng: np.random.Generator,
    config: AdaSparkConfig,
    layout: list[tuple[str, int]],
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    pool: list[int],
    sharpness: float = 1.0,
) -> Request:
    """A request whose tokens are ``layout``: ("text" | "video", tokens) pieces in turn.

    Physical blocks are drawn from ``pool`` in random order.  Keys drift slowly through the video,
    so cubes differ, and ``sharpness`` scales queries: higher is more selective.
    """
    is_video = torch.tensor([kind == "video" for kind, n in layout for _ in range(n)])
    n = len(is_video)
    torch.manual_seed(int(rng.integers(1 << 31)))
    drift = torch.randn(n // 16 + 2, kv_heads, head_size).repeat_interleave(16, 0)[:n]
    blocks = [pool.pop(int(rng.integers(len(pool)))) for _ in range(-(-n // config.cube_volume))]
    return Request(
        config=config,
        is_video=is_video,
        q=(sharpness * torch.randn(n, heads, head_size)).to(dtype),
        k=(torch.randn(n, kv_heads, head_size) + drift).to(dtype),
        v=torch.randn(n, kv_heads, head_size).to(dtype),
        blocks=np.array(blocks, dtype=np.int32),
        layout=layout,
    )


def rows_of(step: list[tuple[Request, int]]) -> StepRows:
    """The StepRows of a step in which each request runs so many tokens more."""
    width = max(len(request.blocks) for request, _ in step)
    table = np.zeros((len(step), width), dtype=np.int32)
    for row, (request, _) in enumerate(step):
        table[row, : len(request.blocks)] = request.blocks
    return StepRows(
        query_start=np.cumsum([0] + [count for _, count in step]),
        seq_lens=np.array([request.done + count for request, count in step]),
        block_table=table,
    )


def known_of(step: list[tuple[Request, int]]) -> list[AdaSparkRequest | None]:
    """What a worker knows of each request of a step."""
    return [request.known for request, _ in step]


def gather(step: list[tuple[Request, int]], name: str) -> torch.Tensor:
    """The step's tokens of every request's tensor ``name``, in row order."""
    return torch.cat([getattr(r, name)[r.done : r.done + count] for r, count in step])


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference over the RMS of what is wanted."""
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
