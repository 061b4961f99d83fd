"""A checkpoint in a real model's shape, without weights (``--load-format dummy``); and its videos.

The language model has the 3B's layers, four of them.  Vocabulary and vision tower are small, so
that what is measured is the language model.  Dummy weights attend evenly and make all tokens alike:
a share of the probability is then a share of the cubes, and of a cube's tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import checkpoint as demo_checkpoint  # examples/demo
import video as demo_video  # examples/demo

from vllm_adaspark.accounts.flops import ModelShape

LAYERS = 4
SHAPES = {
    "3B": ModelShape(hidden=2048, heads=16, kv_heads=2, head_size=128, intermediate=11008),
    "deep": ModelShape(hidden=256, heads=4, kv_heads=2, head_size=64, intermediate=2048),
    "tiny": ModelShape(hidden=256, heads=8, kv_heads=2, head_size=32, intermediate=688),
}
MAX_POSITIONS = 131072


def write_checkpoint(folder: Path, shape: ModelShape, layers: int = LAYERS) -> Path:
    """Configuration, tokenizer and processors of a Qwen2.5-VL of this shape; no weights."""
    path = demo_checkpoint.build(folder, layers=layers, vision_layers=2)
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    sixteenth = shape.head_size // 16
    config["text_config"] |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
    }
    rope = config["text_config"].get("rope_parameters") or config["text_config"]["rope_scaling"]
    rope["mrope_section"] = [2 * sixteenth, 3 * sixteenth, 3 * sixteenth]
    config["vision_config"]["out_hidden_size"] = shape.hidden
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path


def flops(shape: ModelShape, tokens: int, *, attention: float = 1.0, ffn: float = 1.0) -> float:
    """FLOPs of one layer's prefill with these shares of its pairs and of its FFN's tokens."""
    pairs = tokens * (tokens + 1) / 2
    return (
        tokens * (shape.qkvo_flops_per_token + ffn * shape.ffn_flops_per_token)
        + attention * pairs * shape.attention_flops_per_pair
    )


def pruning_rate(shape: ModelShape, tokens: int, share: float) -> float:
    """The share of ``tokens`` that EVS must drop to cost ``share`` of the dense FLOPs."""
    low, high = 0.0, 1.0  # of tokens kept
    for _ in range(30):
        middle = (low + high) / 2
        costs = flops(shape, round(tokens * middle)) / flops(shape, tokens)
        low, high = (middle, high) if costs < share else (low, middle)
    return round(1 - low, 3)


@dataclass(frozen=True)
class Videos:
    """Distinct mp4 files by number, made when asked for.  Two frames a second, all are taken."""

    folder: Path

    def url(self, tokens: int, number: int) -> str:
        """Of a video with so many tokens.

        Raises:
            ValueError: no whole number of frame pairs has so many.
        """
        columns, rows = (16, 8) if tokens >= 1024 else (8, 4)  # merged tokens of a frame
        pairs, rest = divmod(tokens, columns * rows)
        if rest or not pairs:
            raise ValueError(f"tokens={tokens}: must be a multiple of {columns * rows}")
        path = self.folder / f"{tokens}-{number}.mp4"
        if not path.exists():
            side = demo_checkpoint.MERGED_PATCH
            demo_video.write_mp4(
                path, seconds=pairs, fps=2, width=columns * side, height=rows * side, seed=number
            )
        return path.as_uri()
