"""Limits of what a request may ask of the processor; each breach would end the engine."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from vllm_adaspark.models.qwen2_5_vl_checks import Grid, check_positions, position_limit
from vllm_adaspark.models.sent_items import SentItems

ROPES = {
    "default": {"rope_type": "default"},
    "YaRN": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_the_limit_is_the_length_of_vllms_table(rope) -> None:
    rope = rope | {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text_config = SimpleNamespace(max_position_embeddings=96, rope_parameters=rope)
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(16, max_position=96, rope_parameters=rope, dtype=torch.float32)
    assert position_limit(text_config) == len(table.cos_sin_cache)


def stock_positions(tokens: int, media: list[tuple[int, str, tuple, float | None]]) -> np.ndarray:
    """Those of vLLM's own Qwen2.5-VL; ``media`` are (offset, modality, patches, seconds)."""
    features = []
    for offset, modality, patches, seconds in media:
        data = {f"{modality}_grid_thw": SimpleNamespace(data=torch.tensor(patches))}
        if seconds is not None:
            data["second_per_grid_ts"] = SimpleNamespace(data=torch.tensor(seconds))
        place = SimpleNamespace(offset=offset)
        features.append(SimpleNamespace(modality=modality, data=data, mm_position=place))
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.iter_mm_grid_thw = lambda f: Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw(model, f)
    positions, _ = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions(
        model, list(range(tokens)), features
    )
    return positions.numpy()


@pytest.mark.parametrize("seed", range(20))
def test_positions_are_counted_as_vllm_gives_them(seed) -> None:
    """The bound is exact: one position less is refused."""
    rng = np.random.default_rng(seed)
    tokens, media, grids = int(rng.integers(1, 30)), [], []
    for _ in range(int(rng.integers(1, 4))):
        modality = str(rng.choice(["image", "video"]))
        t = 1 if modality == "image" else int(rng.integers(1, 6))
        h, w = (2 * int(n) for n in rng.integers(1, 9, 2))
        seconds = None
        if modality == "video" and rng.random() < 0.8:
            seconds = float(rng.choice([0.0, 0.3, 1.0, 70.7]))
        apart = 2 * (1.0 if seconds is None else seconds)
        media.append((tokens, modality, (t, h, w), seconds))
        grids.append((t * h * w // 4, Grid(t, h // 2, w // 2, apart)))
        tokens += t * h * w // 4 + int(rng.integers(0, 9))
    used = int(stock_positions(tokens, media).max()) + 1
    room = 25  # tokens that the answer may have
    check_positions(tokens, grids, tokens + room, used + room)
    with pytest.raises(ValueError, match="send fewer or shorter videos"):
        check_positions(tokens, grids, tokens + room, used + room - 1)


class Cache(set):
    """What a sender cache holds."""

    invalidate = set.discard


def test_media_of_a_refused_request_are_taken_back() -> None:
    items, cache = SentItems(), Cache()

    def prepare(name: str, *, ok: bool = True) -> None:
        with items.preparing() as prepared:
            cache.add(name)
            items.add(cache, name)
            prepared.ok = ok

    prepare("good")
    prepare("bad", ok=False)
    assert cache == {"good"}
    with pytest.raises(RuntimeError), items.preparing():
        cache.add("worse")
        items.add(cache, "worse")
        raise RuntimeError
    assert cache == {"good"}
    moment = time.monotonic()
    prepare("refused later")
    items.forget_since(moment)
    assert cache == {"good"}


def test_media_still_being_prepared_are_taken_back_when_they_are_done() -> None:
    items, cache, moment = SentItems(), Cache(), time.monotonic()
    with items.preparing() as prepared:
        items.forget_since(moment)  # the client left
        cache.add("late")
        items.add(cache, "late")
        prepared.ok = True
    assert not cache
