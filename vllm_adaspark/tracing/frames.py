"""Small JPEGs of the frames a model saw, made back from the patches its vision tower got.

Qwen2.5-VL's processor resizes, normalises and cuts a video into patches of two frames; here that is
undone for the first frame of each pair.  So a picture shows what the model saw, not what was sent.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MAX_WIDTH = 320  # pixels
QUALITY = 75


@dataclass(frozen=True)
class PatchShape:
    """How the processor cut and normalised frames."""

    patch: int  # side in pixels
    frames: int  # frames in a patch
    merge: int  # patches along a merged token's side
    mean: Sequence[float]
    std: Sequence[float]


def unpatchify(patches: torch.Tensor, grid: tuple[int, int, int], shape: PatchShape) -> np.ndarray:
    """The first frame of each patch in time.

    Args:
        patches: ``[t * h * w, 3 * frames * patch * patch]``, normalised floats, or uint8 where the
            vision tower normalises by itself.
        grid: (t, h, w) patches.
        shape: how they were made.

    Returns:
        ``[t, h * patch, w * patch, 3]`` uint8, RGB.
    """
    t, h, w = grid
    merge, side = shape.merge, shape.patch
    cut = patches.cpu().view(t, h // merge, w // merge, merge, merge, 3, shape.frames, side, side)
    # [t, h / merge, merge, patch, w / merge, merge, patch, 3]
    first = cut[..., 0, :, :].permute(0, 1, 3, 6, 2, 4, 7, 5)
    image = first.reshape(t, h * side, w * side, 3)
    if image.dtype == torch.uint8:
        return image.numpy()
    image = image.float() * torch.tensor(shape.std) + torch.tensor(shape.mean)
    return (image * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def thumbnails(
    patches: torch.Tensor, grid: tuple[int, int, int], shape: PatchShape, limit: int
) -> dict[int, bytes]:
    """JPEGs by frame pair, at most :data:`MAX_WIDTH` pixels wide and ``limit`` bytes in all."""
    from PIL import Image

    t, h, w = grid
    made, total = {}, 0
    for frame in range(t):
        piece = patches[frame * h * w : (frame + 1) * h * w]
        image = Image.fromarray(unpatchify(piece, (1, h, w), shape)[0])
        image.thumbnail((MAX_WIDTH, 4 * MAX_WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        total += buffer.tell()
        if total > limit:
            break
        made[frame] = buffer.getvalue()
    return made
