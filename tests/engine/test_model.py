"""The model variant itself: vision in pieces, every size, and what a pipeline stage needs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from engine.engines import SPARSE, ask, clip, engine, last_reports, video_prompt

pytestmark = pytest.mark.engine

# (hidden, heads, kv_heads, intermediate, tied embeddings) of the published Qwen2.5-VL sizes
SIZES = {
    "3B": (2048, 16, 2, 11008, True),
    "7B": (3584, 28, 4, 18944, False),
    "32B": (5120, 40, 8, 27648, False),
    "72B": (8192, 64, 8, 29568, False),
}


def encode_whole_and_in_pieces(model) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Two videos through the vision tower at once and in pieces; patches of each piece."""
    torch.manual_seed(0)
    grids = [[7, 10, 12], [4, 8, 6]]
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3 * 2 * 14 * 14)
    with torch.inference_mode():
        whole = model.visual(pixels, grid_thw=grids)
        method = model.runtime.method
        method.settings = method.settings.override({"encoder_patches": 300})
        sizes: list[int] = []
        forward = model.visual.forward

        def recording(x, grid_thw):
            sizes.append(len(x))
            return forward(x, grid_thw)

        model.visual.forward = recording
        pieces = torch.cat(model._encode_in_pieces(pixels, grids))
    return whole, pieces, sizes


@pytest.fixture(scope="class")
def llm(checkpoint):
    with engine(checkpoint, SPARSE) as llm:
        yield llm


class TestOneEngine:
    def test_vision_in_pieces_equals_whole(self, llm) -> None:
        ((whole, pieces, sizes),) = llm.apply_model(encode_whole_and_in_pieces)
        assert_pieces_are_the_whole(whole, pieces, sizes)

    def test_positions_are_the_stock_models(self, llm) -> None:
        """Bit for bit; in cube order a video's are the same ones, in the order of its tokens."""
        (found,) = llm.apply_model(stock_and_ours)
        assert len(found) == 8
        for stock, ours, spans in found:
            assert_same_positions(stock, ours, spans)


def assert_pieces_are_the_whole(whole, pieces, sizes) -> None:
    assert whole.shape == pieces.shape
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    assert len(sizes) > 2 and max(sizes) <= 300, "memory is bounded by the piece, not the video"


def stock_and_ours(model) -> list[tuple[torch.Tensor, torch.Tensor, list]]:
    """Positions of requests of every kind, stock vLLM's and ours, and where the videos lie."""
    from types import SimpleNamespace

    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    from vllm_adaspark.requests import with_settings

    def feature(modality: str, offset: int, grid: list[int], order: str):
        settings = model.runtime.method.settings.override({"order": order})
        data = {f"{modality}_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
        if modality == "video":
            data["second_per_grid_ts"] = SimpleNamespace(data=torch.tensor(1.5))
        place = PlaceholderRange(offset=offset, length=grid[0] * grid[1] * grid[2] // 4)
        return MultiModalFeatureSpec(data, modality, with_settings("hash", settings), place)

    found = []
    for order in ("raster", "cube"):
        video = feature("video", 5, [9, 10, 12], order)  # 270 tokens
        second = feature("video", 300, [4, 8, 6], order)  # 48
        image = feature("image", 280, [1, 8, 8], order)  # 16
        for features in ([], [image], [video], [video, image, second]):
            ids = list(range(400))
            stock, delta = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions(
                model, ids, features
            )
            ours, our_delta = model.get_mrope_input_positions(ids, features)
            assert delta == our_delta and stock.dtype == ours.dtype
            spans = [
                (f.mm_position.offset, f.mm_position.offset + f.mm_position.length)
                for f in features
                if f.modality == "video" and order == "cube"
            ]
            found.append((stock, ours, spans))
    return found


def assert_same_positions(stock: torch.Tensor, ours: torch.Tensor, spans: list) -> None:
    apart = torch.ones(stock.shape[1], dtype=torch.bool)
    for start, end in spans:
        apart[start:end] = False
        assert not torch.equal(stock[:, start:end], ours[:, start:end])
        as_sets = [set(map(tuple, p[:, start:end].T.tolist())) for p in (stock, ours)]
        assert as_sets[0] == as_sets[1] and len(as_sets[0]) == end - start
    assert torch.equal(stock[:, apart], ours[:, apart])


@pytest.mark.parametrize("size", SIZES)
def test_every_size_runs(checkpoint, tmp_path, size) -> None:
    """The published shapes, one layer each, with dummy weights: prefill and decode, sparse."""
    hidden, heads, kv_heads, intermediate, tied = SIZES[size]
    folder = tmp_path / size
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    shape = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate // 8,  # the width alone, which takes long, tells nothing
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "max_window_layers": 1,
        "tie_word_embeddings": tied,
    }
    shape["rope_parameters"] = config["text_config"]["rope_parameters"] | {
        "mrope_section": [16, 24, 24]
    }
    config["text_config"] |= shape
    config["tie_word_embeddings"] = tied
    config["vision_config"]["out_hidden_size"] = hidden
    path.write_text(json.dumps(config))
    options = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 2048}
    with engine(folder, SPARSE, max_num_batched_tokens=2048, **options) as llm:
        (answer,) = ask(llm, [video_prompt(clip(28))], max_tokens=3)
        (report,) = last_reports(llm)
    assert len(answer.ids) == 3
    density = report["attention_density"], report["ffn_density"]
    assert max(density) < 1, density
