"""Sparse training passes: against the naive twin, against stock transformers; their gradients."""

from __future__ import annotations

import json
import subprocess
import sys

import checkpoint as demo_checkpoint  # examples/demo
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from unit.training_batches import gradients, inputs

from vllm_adaspark.methods.adaspark.reference import tile_attention, tile_ffn
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.paged.tiles import DENSE
from vllm_adaspark.settings import SettingsError
from vllm_adaspark.training import attention, disable_sparse_training, enable_sparse_training
from vllm_adaspark.training.enable import checkpoint_settings, plan_step
from vllm_adaspark.training.ffn import sparse_mlp
from vllm_adaspark.training.packing import pack
from vllm_adaspark.training.prompt import Prompt, read_prompts
from vllm_adaspark.video.order import cube_order

SPARSE = AdaSparkConfig(p_attn=0.5, p_ffn=0.5, min_cubes=1, dense_below=2, cube=(2, 4, 4))
SETTINGS = {
    "sparse": {},
    "paper": {"paper": True},
    "bypass": {"compensation": "bypass"},
    "dense text": {"text_queries": "dense"},
    "dense layers": {"dense_layers": 1},
    "top_k": {"selection": "top_k", "keep": 0.3},
    "uniform": {"selection": "uniform", "keep": 0.3},
    "budget": {"flops": 0.5},
    "attention only": {"p_ffn": 1.0},
    "ffn only": {"p_attn": 1.0},
    "two cubes": {"tile_cubes": 2},
    "two cubes, budget": {"tile_cubes": 2, "flops": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    return demo_checkpoint.build(path, dtype="float32", layers=3, vision_layers=1, seed=1)


@pytest.fixture
def model(folder):
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


# -- one layer against the twin ------------------------------------------------------------------


@pytest.fixture
def step_of(model):
    """A step of two prompts with random embeddings: text, a video, text, perhaps another video."""

    def make(config: AdaSparkConfig, *layouts: list[tuple[str, int]]):
        prompts = []
        for layout in layouts:
            is_video = np.concatenate([np.full(n, kind == "video") for kind, n in layout])
            ends = np.cumsum([n for _, n in layout])
            videos = [(int(e) - n, n) for (kind, n), e in zip(layout, ends) if kind == "video"]
            at = np.arange(len(is_video))
            prompts.append(Prompt(at, np.stack([at] * 3), is_video, is_video, videos))
        longest = max(len(prompt.columns) for prompt in prompts)
        embeddings = torch.randn(len(prompts), longest, 4)
        step = pack(embeddings, prompts, config.cube_volume, config.tile_tokens)
        step.plan = plan_step(step, prompts, text_config=model.config.text_config, config=config)
        return step, prompts

    return make


LAYOUTS = (
    [("text", 5), ("video", 300), ("text", 70), ("video", 130), ("text", 9)],
    [("text", 40), ("video", 222), ("text", 3)],
    [("text", 50)],
)


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_equals_the_twin(step_of, name) -> None:
    config = SPARSE.override(SETTINGS[name])
    torch.manual_seed(0)
    step, prompts = step_of(config, *LAYOUTS)
    layer, heads, kv_heads, d, scale = 1, 4, 2, 16, 0.25
    tokens = int(step.rows.query_start[-1])
    q = 2 * torch.randn(tokens, heads, d)
    k, v = torch.randn(tokens, kv_heads, d), torch.randn(tokens, kv_heads, d)
    out = attention.sparse_attention(q, k, v, step, layer, scale)

    plan = step.plan.attention
    if plan is not None:
        sparse = np.flatnonzero(plan.tiles.kind != DENSE)
        chosen = {int(plan.tiles.start[tile]): row for tile, row in zip(sparse, step.cubes[layer])}
    compared = 0
    for row, prompt in enumerate(prompts):
        mine = slice(*step.rows.query_start[row : row + 2].tolist())
        is_video = torch.from_numpy(prompt.is_video)
        expected, tiles = tile_attention(
            q[mine], k[mine], v[mine], is_video, 32, (0, len(is_video)),
            of_row(config, step, row), layer, scale,
        )  # fmt: skip
        for tile in tiles:
            if not tile.dense and tile.candidates and plan is not None:
                got = chosen[mine.start + tile.tokens.start][:, tile.candidates]
                assert torch.equal(got, tile.kept), tile
                compared += 1
        torch.testing.assert_close(out[mine], expected)
    least = 0 if name == "ffn only" else 10 // config.tile_cubes
    assert compared > least or name == "ffn only"


@pytest.mark.parametrize("name", SETTINGS)
def test_ffn_equals_the_twin(step_of, name) -> None:
    config = SPARSE.override(SETTINGS[name])
    torch.manual_seed(1)
    step, prompts = step_of(config, *LAYOUTS)
    tokens = int(step.rows.query_start[-1])
    x = torch.randn(tokens, 24) * torch.rand(tokens, 1)
    h, weight = torch.nn.functional.normalize(x), torch.randn(24, 24)

    def ffn(inputs: torch.Tensor) -> torch.Tensor:
        return (inputs @ weight).relu()

    out = sparse_mlp(h, x, ffn, step, layer=1)
    skipped = 0
    for row, prompt in enumerate(prompts):
        mine = slice(*step.rows.query_start[row : row + 2].tolist())
        is_video = torch.from_numpy(prompt.is_video)
        expected, active = tile_ffn(
            x[mine], h[mine], ffn, is_video, 32, (0, len(is_video)), of_row(config, step, row), 1
        )
        torch.testing.assert_close(out[mine], expected)
        skipped += int((~active).sum())
    dense = name == "attention only"
    assert (skipped == 0) == dense


def of_row(config: AdaSparkConfig, step, row: int) -> AdaSparkConfig:
    """With a budget, the twin takes the share that the prompt's length leaves."""
    mine = np.flatnonzero(step.plan.ffn.row == row) if config.flops is not None else []
    if not len(mine):
        return config
    return config.override({"flops": round(float(step.plan.ffn.share[mine[0]]), 3)})


# -- the whole model -----------------------------------------------------------------------------


def test_dense_in_raster_order_equals_stock(model) -> None:
    batch = inputs(model, [9, (8, 4, 5), 20], [3, (3, 6, 4), 30, (4, 4, 4), 5], [17])
    with torch.no_grad():
        stock = model(**batch).logits
        positions, _ = model.model.get_rope_index(
            batch["input_ids"],
            batch["mm_token_type_ids"],
            video_grid_thw=batch["video_grid_thw"],
            second_per_grid_ts=batch["second_per_grid_ts"],
            attention_mask=batch["attention_mask"],
        )
        enable_sparse_training(model, AdaSparkConfig(p_attn=1.0, p_ffn=1.0, order="raster"))
        ours = model(**batch, position_ids=positions).logits
        served = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], stock[real], atol=1e-4, rtol=1e-4)
    # Text after a video stands elsewhere when served.
    assert (served[real] - stock[real]).abs().max() > 1e-3


def test_dense_in_cube_order_equals_stock_with_permuted_inputs(model) -> None:
    batch = inputs(model, [9, (8, 4, 8), 20])
    with torch.no_grad():
        encoded = model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"])
        (video,) = encoded.pooler_output
        order = torch.from_numpy(cube_order((8, 4, 8), (2, 4, 4)).copy())
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        embeddings[0, 9 : 9 + len(order)] = video[order]
        (prompt,) = read_prompts(
            batch["input_ids"], None, None, None, batch["video_grid_thw"], None, model.config,
            AdaSparkConfig(order="raster"),
        )  # fmt: skip
        positions = torch.from_numpy(prompt.positions)[:, None]
        after = positions[:, 0, 9 + len(order)]
        assert (after == positions[:, 0, : 9 + len(order)].max() + 1).all(), "vLLM's convention"
        positions[:, 0, 9 : 9 + len(order)] = positions[:, 0, 9 : 9 + len(order)][:, order]
        expected = model(inputs_embeds=embeddings, position_ids=positions).logits
        enable_sparse_training(model, AdaSparkConfig(p_attn=1.0, p_ffn=1.0, cube=(2, 4, 4)))
        ours = model(**batch).logits
    torch.testing.assert_close(ours[0, -20:], expected[0, -20:], atol=1e-4, rtol=1e-4)
    # What comes out is in the order of input_ids.
    torch.testing.assert_close(
        ours[0, 9 + order], expected[0, 9 : 9 + len(order)], atol=1e-4, rtol=1e-4
    )


def test_a_batch_equals_its_sequences_alone(model) -> None:
    enable_sparse_training(model, SPARSE)
    layouts = [9, (8, 4, 8), 20], [3, (12, 4, 4), 30, (8, 4, 4), 5], [17]
    batch = inputs(model, *layouts, pad=2)
    grids, seconds = batch["video_grid_thw"], batch["second_per_grid_ts"]
    pixels = batch["pixel_values_videos"].split(grids.prod(-1).tolist())
    videos = iter(zip(grids, pixels, seconds, strict=True))
    with torch.no_grad():
        together = model(**batch).logits
        flipped = model(**left_padded(batch)).logits
        for row, layout in enumerate(layouts):
            real = batch["attention_mask"][row].bool()
            alone = {"input_ids": batch["input_ids"][row, real][None]}
            if mine := [next(videos) for part in layout if not isinstance(part, int)]:
                grid, pixel, second = zip(*mine, strict=True)
                alone |= {"video_grid_thw": torch.stack(grid), "second_per_grid_ts": list(second)}
                alone["pixel_values_videos"] = torch.cat(pixel)
            expected = model(**alone).logits[0]
            torch.testing.assert_close(together[row, real], expected, atol=1e-4, rtol=1e-4)
            left = flipped[row, left_padded(batch)["attention_mask"][row].bool()]
            torch.testing.assert_close(left, expected, atol=1e-4, rtol=1e-4)


def left_padded(batch: dict) -> dict:
    """The same batch, padded on the other side."""
    moved = dict(batch)
    for key in ("input_ids", "attention_mask"):
        real = batch["attention_mask"].bool()
        rows = [torch.cat([row[~is_real], row[is_real]]) for row, is_real in zip(batch[key], real)]
        moved[key] = torch.stack(rows)
    return moved


def test_questions_share_a_video_and_its_gradient(model) -> None:
    """Three questions about one video: computed once, as if each had been asked alone."""
    enable_sparse_training(model, SPARSE)
    batch = inputs(model, [9, (8, 4, 8), 20])
    one = batch["input_ids"]
    ids = one.repeat(3, 1)
    ids[1:, -12:] = torch.randint(30, 200, (2, 12))
    shared = {
        "input_ids": ids,
        "pixel_values_videos": batch["pixel_values_videos"].repeat(3, 1),
        "video_grid_thw": batch["video_grid_thw"].repeat(3, 1),
    }
    steps = record_steps(model)
    together = model(**shared).logits
    (step,) = steps
    lengths = np.diff(step.rows.query_start).tolist()
    # 9 + 256 tokens before the questions: eight blocks of 32 are shared.
    assert lengths == [285, 285 - 256, 285 - 256]
    together[:, -1].square().sum().backward()
    gradient = gradients(model)
    for row in range(3):
        alone = model(**batch | {"input_ids": ids[row : row + 1]}).logits
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
        alone[:, -1].square().sum().backward()
    expected = gradients(model)
    for name, value in expected.items():
        error = (gradient[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: {error}"


@pytest.mark.parametrize(("tile", "shared"), [(32, 160), (64, 128)])
def test_what_is_shared_ends_between_tiles(tile, shared) -> None:
    """Two sequences that differ in the sixth block: its tile is computed for each of them."""
    at = np.arange(300)
    prompts = [Prompt(at, np.stack([at] * 3), at > 8, at > 8, [(9, 291)])] * 2
    embeddings = torch.randn(1, 300, 4).repeat(2, 1, 1)
    embeddings[1, 163:] = 0
    step = pack(embeddings, prompts, 32, tile)
    assert step.rows.computed.tolist() == [0, shared]
    assert (step.rows.block_table[0] == step.rows.block_table[1]).sum() == shared // 32


def record_steps(model) -> list:
    """Every step the model makes from now on."""
    steps = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(kwargs["step"]), with_kwargs=True
    )
    return steps


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparse", "paper", "bypass", "top_k", "budget"])
def test_gradients_flow_and_training_learns(model, name) -> None:
    enable_sparse_training(model.train(), SPARSE.override(SETTINGS[name]))
    batch = inputs(model, [9, (8, 4, 8), 20])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:] = batch["input_ids"][:, -4:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        for name_of, weight in model.named_parameters():
            assert weight.grad is not None, f"no gradient reaches {name_of}"
            assert weight.grad.isfinite().all(), name_of
        for layer in model.model.language_model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.up_proj):
                assert part.weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradient_is_that_of_the_masked_model(model) -> None:
    """A finite difference along the gradient, at a fixed choice."""
    enable_sparse_training(model.double(), SPARSE)
    batch = inputs(model, [9, (8, 4, 8), 20])
    batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
    layer = model.model.language_model.layers[1]
    steps = record_steps(model)
    model(**batch).logits[0, -1].square().sum().backward()

    def moved(weight: torch.Tensor, by: float) -> float:
        with torch.no_grad():
            weight += by * weight.grad / weight.grad.norm()
            out = model(**batch).logits[0, -1].square().sum().item()
            weight -= by * weight.grad / weight.grad.norm()
        for kind in ("cubes", "active"):
            for first, second in zip(*(getattr(s, kind).values() for s in (steps[0], steps[-1]))):
                assert torch.equal(first, second), "the step was too large: the choice changed"
        return out

    # Norms and means are computed in float32, hence no smaller step.
    epsilon = 3e-4
    for weight in (layer.mlp.gate_proj.weight, layer.self_attn.v_proj.weight):
        slope = (moved(weight, epsilon) - moved(weight, -epsilon)) / (2 * epsilon)
        assert slope == pytest.approx(weight.grad.norm().item(), rel=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_choice(model, reentrant, monkeypatch) -> None:
    """The same loss and gradients, and the choice is made once, two forward passes in flight."""
    enable_sparse_training(model.train(), SPARSE)
    batches = [inputs(model, [9, (8, 4, 8), 20], seed=seed) for seed in (1, 2)]
    made = []
    original = attention.choose_cubes
    monkeypatch.setattr(attention, "choose_cubes", lambda *args: made.append(1) or original(*args))

    def run() -> tuple[float, dict]:
        losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
        sum(losses).backward()
        return [loss.item() for loss in losses], gradients(model)

    losses, expected = run()
    count = len(made)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, got = run()
    assert len(made) - count == count == 2 * 3
    assert again == pytest.approx(losses, rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-4)


def test_long_sequences_are_computed_again_in_slabs(model, monkeypatch) -> None:
    enable_sparse_training(model, SPARSE)
    batch = inputs(model, [9, (8, 4, 8), 20])
    whole = model(**batch).logits
    whole.square().sum().backward()
    expected = gradients(model)
    monkeypatch.setattr(attention, "SLAB", 50)
    monkeypatch.setattr(attention, "MASK_ENTRIES", 1000)
    slabs = model(**batch).logits
    torch.testing.assert_close(slabs, whole, atol=1e-4, rtol=1e-4)
    slabs.square().sum().backward()
    for name, value in gradients(model).items():
        error = (value - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-3, name


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16(model, how) -> None:
    batch = inputs(model, [9, (8, 4, 8), 20])
    enable_sparse_training(model, SPARSE)
    with torch.no_grad():
        exact = model(**batch).logits[0, -1].log_softmax(-1)
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits = model(**batch).logits
    logits.float().square().mean().backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    close = (logits[0, -1].float().log_softmax(-1) - exact).abs().mean()
    assert close < 0.3


# -- settings and checkpoints --------------------------------------------------------------------


def test_bad_use_is_refused(model) -> None:
    with pytest.raises(TypeError, match="Qwen2_5_VLForConditionalGeneration"):
        enable_sparse_training(torch.nn.Linear(2, 2), SPARSE)
    with pytest.raises(TypeError, match="expected an AdaSparkConfig"):
        enable_sparse_training(model, {"p_attn": 0.5})
    with pytest.raises(SettingsError, match="enabled=False"):
        enable_sparse_training(model, AdaSparkConfig(enabled=False))
    with pytest.raises(SettingsError, match=r"prune=0\.5: training keeps all tokens"):
        enable_sparse_training(model, AdaSparkConfig(prune=0.5))
    with pytest.raises(SettingsError, match="no adaspark_config"):
        enable_sparse_training(model)
    with pytest.raises(SettingsError, match=r"cube=\[3, 3, 3\] holds 27"):
        enable_sparse_training(model, AdaSparkConfig(cube=(3, 3, 3)))
    enable_sparse_training(model, SPARSE)
    batch = inputs(model, [9, (8, 4, 8), 20])
    for change, message in (
        ({"input_ids": batch["input_ids"][:, :-40]}, "attention_mask of shape"),
        ({"video_grid_thw": torch.tensor([[9, 8, 16]])}, "stands for 288 tokens"),
        ({"video_grid_thw": batch["video_grid_thw"].repeat(2, 1)}, "second_per_grid_ts has 1"),
        (dict.fromkeys(("video_grid_thw", "pixel_values_videos", "second_per_grid_ts")), "fewer"),
        ({"position_ids": torch.zeros(1, 285).long()}, "position_ids of shape"),
        ({"attention_mask": torch.zeros(1, 285).long()}, "sequence 0 is all padding"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch | change)
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(**batch, max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids=None"):
        model(inputs_embeds=torch.zeros(1, 4, 256))
    with pytest.raises(RuntimeError, match="call the whole model"):
        model.model.language_model(inputs_embeds=torch.zeros(1, 4, 256))


def test_enable_and_disable_leave_the_model_as_it_was(model, folder, tmp_path) -> None:
    batch = inputs(model, [9, (8, 4, 8), 20])
    names = [type(module).__name__ for module in model.modules()]
    with torch.no_grad():
        stock = model(**batch).logits
        enable_sparse_training(model, SPARSE)
        first = model(**batch).logits
        enable_sparse_training(model, SPARSE.override({"p_attn": 0.2}))
        second = model(**batch).logits
        assert [type(module).__name__ for module in model.modules()] == names
        disable_sparse_training(model)
        assert torch.equal(model(**batch).logits, stock)
    assert not torch.allclose(first, stock) and not torch.allclose(first, second)
    disable_sparse_training(model)  # twice is as good as once
    model.save_pretrained(tmp_path)
    assert "adaspark" not in (tmp_path / "config.json").read_text()


def test_a_saved_checkpoint_says_how_it_was_trained(model, tmp_path) -> None:
    config = SPARSE.override({"report_file": "here.json", "trace": True})
    enable_sparse_training(model, config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    settings = saved.pop("adaspark_config")
    assert "adaspark" not in json.dumps(saved), "the attention's name is no server's business"
    assert settings == checkpoint_settings(SPARSE)
    assert AdaSparkConfig().override(settings) == SPARSE
    assert not {"report_file", "trace", "enabled", "trace_mb", "encoder_patches"} & set(settings)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    enable_sparse_training(again)  # as it was trained
    batch = inputs(model, [9, (8, 4, 8), 20])
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


def test_imports_no_vllm() -> None:
    code = "import sys, vllm_adaspark.training; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "False", done.stderr
