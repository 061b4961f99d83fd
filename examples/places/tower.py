"""The tower on single windows and on whole frames, and the heads that say what a token shows."""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import types

import forward
import network
import numpy as np
import places
import torch
from places import ACROSS, GRID, WINDOW
from windows import NO_COLOUR, NO_DIGIT

HIDDEN = 256


def build(layers: int = 5):
    """The untrained model of this test bed, float32: the tower's windows are 2×2 tokens."""
    return network.build(
        layers=layers,
        texts=places.every_question_text(),
        window=WINDOW,
        whole_frame=(),
        interleaved=True,
    )


def make_heads() -> torch.nn.ModuleDict:
    sizes = {"digit": NO_DIGIT + 1, "colour": NO_COLOUR + 1, "content": 96}
    return torch.nn.ModuleDict({n: torch.nn.Linear(HIDDEN, size) for n, size in sizes.items()})


def encode(tower, windows: np.ndarray) -> torch.Tensor:
    """Tokens of windows: a window on its own is what window attention computes.

    Args:
        windows: uint8 [count, 2, 56, 56, 3].

    Returns:
        [count, 4, hidden], row by row.
    """
    frames = windows.reshape(-1, WINDOW, WINDOW, 3)
    weight = tower.patch_embed.proj.weight
    inputs = forward.pixels(frames).to(weight.device, forward.fast_dtype(weight.device))
    model = types.SimpleNamespace(model=types.SimpleNamespace(visual=tower))
    return forward.vision(model, inputs, (2, 2))


@torch.no_grad()
def encode_frames(tower, frames: np.ndarray, at_once: int = 1024) -> torch.Tensor:
    """Tokens of whole frames uint8 [2 × patches, 224, 224, 3]: bf16 [patches, 16, 4, hidden].

    The second index is the window, row by row, the third its token.
    """
    patches = len(frames) // 2
    cut = frames.reshape(patches, 2, ACROSS, WINDOW, ACROSS, WINDOW, 3)
    cut = cut.transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, 2, WINDOW, WINDOW, 3)
    parts = [encode(tower, cut[at : at + at_once]).bfloat16() for at in range(0, len(cut), at_once)]
    return torch.cat(parts).view(patches, ACROSS * ACROSS, 4, HIDDEN)


def in_order(tokens: torch.Tensor) -> torch.Tensor:
    """[patches, 16, 4, ...] by window as the language model has them, [patches, 64, ...]."""
    rest = tokens.shape[3:]
    split = tokens.reshape(len(tokens), ACROSS, ACROSS, 2, 2, *rest).transpose(2, 3)
    return split.reshape(len(tokens), GRID[0] * GRID[1], *rest)
