"""A SigLIP checkpoint beside the model: what a frame shows, and what a question asks, in one space.

The paper compares frames by their visual encoder's global token and finds the segments that a text
is about by a dedicated text encoder.  That both are a SigLIP's, its pooled outputs, is this
project's reading.  It runs once for each video and once for each question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ...settings import SettingsError

FRAMES_AT_ONCE = 16
VIDEOS = 64  # whose frames are remembered; 4.6 KB a frame with the largest SigLIP


def check_encoder(path: str) -> None:
    """Raise a SettingsError unless ``path`` is the folder of a SigLIP checkpoint."""
    config = Path(path) / "config.json"
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"encoder={path!r}: {error}; name the folder of a SigLIP checkpoint, or leave it out"
        ) from None
    if model_type != "siglip":
        raise SettingsError(
            f"encoder={path!r}: {config} says model_type {model_type!r}, expected 'siglip'"
        )


class SiglipEncoder:
    """The whole checkpoint: vision tower and text tower with their pooling.

    Args:
        path: its folder.
        device: where it runs.
        dtype: of its weights.
    """

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

        self._device = device
        self._model = SiglipModel.from_pretrained(path, dtype=dtype).eval().to(device)
        self._images = AutoImageProcessor.from_pretrained(path)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._seen: dict[str, torch.Tensor] = {}

    def frames(self, name: str, pictures: Callable[[], Sequence[np.ndarray]]) -> torch.Tensor:
        """``[frames, d]`` fp32 of a video.

        Args:
            name: by which the video is known when it comes again.
            pictures: gives its frames, ``[height, width, 3]`` uint8 RGB each.
        """
        embedded = self._seen.pop(name, None)
        if embedded is None:
            frames = pictures()
            parts = range(0, len(frames), FRAMES_AT_ONCE)
            embedded = torch.cat([self._embed(frames[i : i + FRAMES_AT_ONCE]) for i in parts])
        self._seen[name] = embedded
        if len(self._seen) > VIDEOS:
            del self._seen[next(iter(self._seen))]
        return embedded

    @torch.inference_mode()
    def _embed(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        pixels = self._images(list(frames), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self._device, self._model.dtype)
        return self._model.vision_model(pixel_values=pixels).pooler_output.float()

    @torch.inference_mode()
    def question(self, text: str) -> torch.Tensor:
        """``[d]`` fp32 of a question; what a SigLIP cannot take of a long one is cut off."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            [text], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids = tokens["input_ids"].to(self._device)
        return self._model.text_model(input_ids=ids).pooler_output[0].float()
