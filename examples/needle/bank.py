"""Pictures encoded once: the vision tower's tokens of many cards and clips, to compose videos from.

In stage B the vision tower is frozen, and a video is an index: which encoded temporal patch comes
when. Half of the pictures have been through a video codec.
"""

from dataclasses import dataclass

import footage
import forward
import haystack
import numpy as np
import torch
from scenes import Event, Scene

CLIP = 48  # temporal patches of a clip


@dataclass
class Bank:
    """Encoded patches of one frame size, and where each kind begins.

    tokens: [patches, tokens of a frame, hidden], bf16.
    variants: how many pictures there are of each number card; frames, signs have as many.
    clips: how many clips of each motion.
    """

    grid: tuple[int, int]
    tokens: torch.Tensor
    variants: int
    distractors: int
    clips: int

    def event(self, rng, event: Event) -> int:
        """Index of a picture of this event."""
        kinds = {
            "number": (0, event.colour * 10 + event.value),
            "frame": (80, event.colour * 8 + event.value),
            "sign": (144, event.value),
        }
        if event.kind == "distractor":
            return 148 * self.variants + int(rng.integers(self.distractors))
        first, which = kinds[event.kind]
        return (first + which) * self.variants + int(rng.integers(self.variants))

    def clip(self, rng, motion: str, length: int) -> np.ndarray:
        """Indices of `length` successive patches of one clip."""
        which = haystack.MOTIONS.index(motion) * self.clips + int(rng.integers(self.clips))
        first = 148 * self.variants + self.distractors + which * CLIP
        return first + int(rng.integers(CLIP - length + 1)) + np.arange(length)

    def compose(self, rng, scene: Scene) -> np.ndarray:
        """A scene as indices of encoded patches, int64 [patches]."""
        lengths = footage.clip_lengths(rng, scene.patches)
        chosen = np.concatenate([self.clip(rng, scene.motion, length) for length in lengths])
        for event in scene.events:
            chosen[event.at] = self.event(rng, event)
        return chosen


def make(model, seed: int, grid, variants: int, distractors: int, clips: int) -> Bank:
    """Draw and encode the pictures of a bank; the device is the model's."""
    rng = np.random.default_rng(seed)
    size = (28 * grid[0], 28 * grid[1])
    events = [Event("number", 0, colour, digit) for colour in range(8) for digit in range(10)]
    events += [Event("frame", 0, border, named) for border in range(8) for named in range(8)]
    events += [Event("sign", 0, value=figure) for figure in range(4)]
    pictures = [footage.draw(rng, size, event) for event in events for _ in range(variants)]
    pictures += [footage.draw(rng, size, Event("distractor", 0)) for _ in range(distractors)]
    pictures = np.stack(pictures)
    # Neighbours in the file are unrelated, as a card and its haystack are.
    mixed = rng.permutation(len(pictures))[: len(pictures) // 2]
    coded = footage.through_codec(pictures[mixed].reshape(-1, *size, 3))
    pictures[mixed] = coded.reshape(-1, 2, *size, 3)
    tokens = [_encode(model, pictures.reshape(-1, *size, 3), grid)]
    for motion in haystack.MOTIONS:
        for number in range(clips):
            clip = haystack.clip(rng, size, CLIP, motion)
            tokens.append(_encode(model, footage.through_codec(clip) if number % 2 else clip, grid))
    return Bank(tuple(grid), torch.cat(tokens), variants, distractors, clips)


@torch.no_grad()
def _encode(model, frames: np.ndarray, grid, at_once: int = 64) -> torch.Tensor:
    device = model.device
    dtype = forward.fast_dtype(device)
    parts = []
    for first in range(0, len(frames), 2 * at_once):
        inputs = forward.pixels(frames[first : first + 2 * at_once])
        parts.append(forward.vision(model, inputs.to(device, dtype), grid).bfloat16())
    return torch.cat(parts)
