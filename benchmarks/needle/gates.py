"""VideoNSA checkpoints whose gates let one branch through: the ablation's servers load them."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoProcessor

from vllm_adaspark.training import VideoNSAForConditionalGeneration
from vllm_adaspark.training.videonsa import force_gates


def forced(checkpoint: Path, branch: str, folder: Path) -> Path:
    """Write ``checkpoint`` into ``folder``, the gates of ``branch`` at 1 and the others at 0."""
    model = VideoNSAForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
    force_gates(model, [branch])
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder
