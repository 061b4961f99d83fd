"""VideoNSA's own settings: how many blocks a token selects, how far its window reaches, which mode.

A checkpoint says ``block_counts`` and ``window_size`` in its text config, as the released one does
(``vision_config.window_size`` is the vision tower's and has nothing to do with it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...settings import Settings, SettingsError, setting

BLOCK = 64  # tokens in a block, fixed in the weights' training
MODES = ("paper", "faithful")
OF_TEXT_CONFIG = ("block_counts", "window_size")


def places_of(block_counts: int) -> int:
    """Blocks that a token selects in the released code: the next power of two.

    Above 32 its merge of partial lists is not exact; here the choice is.
    """
    return 1 << (block_counts - 1).bit_length()


@dataclass(frozen=True)
class VideoNSASettings(Settings):
    """VideoNSA's settings.

    Blocks are 64 tokens in a row, and a video's tokens stay in raster order, so ``cube`` and
    ``order`` are as they are.  ``"off"`` attends densely with the same weights, which is a model
    nobody trained (the paper has it as a contender).

    Raises:
        SettingsError: a value has the wrong type or is out of range.
    """

    refused: ClassVar[dict[str, str]] = {
        "flops": "what VideoNSA spends follows from block_counts and window_size, which its "
        "weights were trained with, so there is no budget to choose them by; set these instead"
    }
    summaries_per_block: ClassVar[int] = 2
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    checkpoint_part: ClassVar[str] = "text_config or adaspark_config"

    cube: tuple[int, int, int] = setting(
        (4, 4, 4), "a block's 64 tokens; fixed", request=False, checkpoint=False
    )
    order: str = setting(
        "raster",
        "order of a video's tokens in the prompt; fixed",
        request=False,
        checkpoint=False,
        choices=("raster",),
    )
    mode: str = setting(
        "paper",
        "the paper's rules, or what the released code computes",
        request=False,
        choices=MODES,
    )
    lse: str = setting(
        "released",
        "faithful mode's log-sum-exp in the choice of blocks: in the layout in which the released "
        "code reads it, or each query's own",
        request=False,
        choices=("released", "own"),
    )
    block_counts: int = setting(
        32, "blocks a vision token selects, its own among them", low=1, high=4096
    )
    window_size: int = setting(
        256, "tokens that a vision token's window holds, its own among them", low=1, high=1 << 20
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cube != (4, 4, 4):
            raise SettingsError(
                f"cube={list(self.cube)}: VideoNSA's blocks are {BLOCK} tokens in a row, whatever "
                "a video's shape; leave cube out"
            )

    @property
    def one_step(self) -> bool:
        """In faithful mode: a vision token sees the means of later blocks."""
        return self.mode == "faithful" and self.enabled

    def forecast(self, shape: Any, layers: int, is_video: Any, dropped: int = 0) -> Any:
        """Exact, branch by branch: see flops.py."""
        from ...accounts.flops import Forecast
        from .flops import prompt_flops

        parts = prompt_flops(self, shape, layers, is_video)
        dense = super().forecast(shape, layers, is_video, dropped).dense
        return Forecast(dense, sum(parts.values()), by_part=parts)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | str | None:
        """What the checkpoint's text config says, and over it its ``adaspark_config``."""
        text = config | config.get("text_config", {})  # older checkpoints have no text_config
        said = {key: text[key] for key in OF_TEXT_CONFIG if text.get(key) is not None}
        own = super().of_checkpoint(config)
        return own if isinstance(own, str) else said | dict(own or {})
