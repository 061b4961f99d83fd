"""VideoNSA's training passes: against a twin that loops over tokens; the model around them."""

from __future__ import annotations

import json

import checkpoint as demo_checkpoint  # examples/demo
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from unit.training_batches import gradients, inputs

from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.methods.videonsa import reference
from vllm_adaspark.settings import SettingsError
from vllm_adaspark.training import (
    VideoNSAForConditionalGeneration,
    attention,
    branches,
    disable_sparse_training,
    enable_sparse_training,
)
from vllm_adaspark.training.branches import NSAPlan, gated_attention
from vllm_adaspark.training.packing import pack
from vllm_adaspark.training.prompt import Prompt
from vllm_adaspark.training.videonsa import BRANCHES, force_gates, gate_parameters, start_gates

LONG = [9, (20, 4, 8), 20]  # text, 640 tokens of video, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    return demo_checkpoint.build(path, dtype="float32", layers=2, vision_layers=1, seed=1)


@pytest.fixture
def model(folder):
    """With gates that differ from token to token."""
    torch.manual_seed(0)
    made = VideoNSAForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, block_counts=3, window_size=40
    ).eval()
    for layer in made.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.g_proj_1.weight, std=0.3)
        torch.nn.init.normal_(layer.self_attn.g_proj_2.weight, std=0.3)
    return made


# -- the branches --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_attention_equals_the_twin(seed, monkeypatch) -> None:
    monkeypatch.setattr(attention, "SLAB", 100)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    count, window = int(rng.integers(1, 6)), int(rng.integers(1, 200))
    prompts = []
    for _ in range(2):
        parts = [np.full(rng.integers(0, 300), kind % 2 == 1) for kind in range(5)]
        is_vision = np.concatenate([np.zeros(1, bool), *parts])
        at = np.arange(len(is_vision))
        prompts.append(Prompt(at, np.stack([at] * 3), is_vision, is_vision, []))
    longest = max(len(prompt.columns) for prompt in prompts)
    step = pack(torch.randn(2, longest, 4), prompts, 64, 64)
    is_vision = torch.from_numpy(np.concatenate([prompt.is_vision for prompt in prompts]))
    step.plan = NSAPlan(is_vision, count, window)
    heads, kv_heads, d, scale = 4, 2, 16, 0.25
    q = 2 * torch.randn(len(is_vision), heads, d)
    k, v = torch.randn(2, len(is_vision), kv_heads, d)
    gates = torch.rand(len(is_vision), heads, 3)
    out = gated_attention(q, k, v, gates, step, 0, scale)
    first, compared = 0, 0
    for prompt in prompts:
        rows = slice(first, first := first + len(prompt.is_vision))
        twin = reference.attention(
            q[rows], k[rows], v[rows], gates[rows], is_vision[rows],
            block_counts=count, window_size=window, scale=scale,
        )  # fmt: skip
        error = (out[rows] - twin.output).norm() / twin.output.norm()
        assert error < 1e-5, error
        for (t, kv_head), expected in twin.selected.items():
            got = step.cubes[0][rows][t, kv_head].nonzero().flatten().tolist()
            if expected.margin > 1e-6:
                assert set(got) == {*expected.cubes, t // 64}, (t, kv_head)
                compared += len(got) > 1
    assert compared > 50 or count == 1


# -- the whole model -----------------------------------------------------------------------------


def test_all_selected_and_gates_forced_is_dense(model, folder) -> None:
    """With enough blocks, none of which holds text, the selected branch alone is dense."""
    model.config.text_config.block_counts = 99
    force_gates(model, ["slc"])
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    enable_sparse_training(stock, AdaSparkConfig(p_attn=1.0, p_ffn=1.0, order="raster"))
    batch = inputs(model, [(20, 4, 8), 20], [(3, 6, 4), 30])
    with torch.no_grad():
        ours, dense = model(**batch).logits, stock(**batch).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(ours[real], dense[real], atol=1e-4, rtol=1e-4)
        model.config.text_config.block_counts = 3
        assert (model(**batch).logits[real] - dense[real]).abs().max() > 1e-2
        text = {"input_ids": torch.randint(30, 200, (1, 90))}
        torch.testing.assert_close(model(**text).logits, stock(**text).logits)


def test_images_are_vision(model) -> None:
    """An image's tokens have gates; a video's of the same pixels stand elsewhere in time only."""
    batch = inputs(model, [9, (1, 8, 16), 20])
    image = {
        "input_ids": torch.where(
            batch["input_ids"] == model.config.video_token_id,
            model.config.image_token_id,
            batch["input_ids"],
        ),
        "pixel_values": batch["pixel_values_videos"],
        "image_grid_thw": batch["video_grid_thw"],
    }
    with torch.no_grad():
        one, other = model(**batch).logits, model(**image).logits
        torch.testing.assert_close(one[0, -20:], other[0, -20:], atol=1e-4, rtol=1e-4)


def test_each_branch_counts(model) -> None:
    batch = inputs(model, LONG)
    with torch.no_grad():
        trained = model(**batch).logits
        answers = [trained]
        for branch in BRANCHES:
            force_gates(model, [branch])
            answers.append(model(**batch).logits)
    for one in range(len(answers)):
        for other in range(one):
            assert (answers[one] - answers[other]).abs().max() > 1e-3, (one, other)
    with pytest.raises(ValueError, match=r"branches=.*cmp, slc, swa"):
        force_gates(model, ["window"])


def test_a_later_token_changes_nothing_before_it(model) -> None:
    batch = inputs(model, LONG)
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True).hidden_states[-1]
        batch["pixel_values_videos"][-64:] += 1  # the last 16 tokens of the video
        after = model(**batch, output_hidden_states=True).hidden_states[-1]
    changed = (before != after).any(-1)[0].nonzero().flatten()
    assert int(changed[0]) >= 9 + 640 - 32  # a window of the vision tower
    torch.testing.assert_close(before[0, :600], after[0, :600])


def test_questions_share_a_video(model) -> None:
    """Three questions about one video: computed once, as if each had been asked alone."""
    batch = inputs(model, LONG)
    ids = batch["input_ids"].repeat(3, 1)
    ids[1:, -12:] = torch.randint(30, 200, (2, 12))
    shared = {
        "input_ids": ids,
        "pixel_values_videos": batch["pixel_values_videos"].repeat(3, 1),
        "video_grid_thw": batch["video_grid_thw"].repeat(3, 1),
    }
    together = model(**shared).logits
    together[:, -1].square().sum().backward()
    gradient = gradients(model)
    for row in range(3):
        alone = model(**batch | {"input_ids": ids[row : row + 1]}).logits
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
        alone[:, -1].square().sum().backward()
    for name, value in gradients(model).items():
        error = (gradient[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: {error}"


def test_checkpointing_repeats_the_choice(model, monkeypatch) -> None:
    """Slab by slab or layer by layer: the same loss and gradients, chosen once."""
    made = []
    original = branches._choose
    monkeypatch.setattr(branches, "_choose", lambda *args: made.append(1) or original(*args))
    batch = inputs(model.train(), LONG)

    def run() -> tuple[float, dict]:
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return loss.item(), gradients(model)

    expected = run()
    assert len(made) == 2
    monkeypatch.setattr(attention, "SLAB", 90)
    monkeypatch.setattr(attention, "MASK_ENTRIES", 1000)
    slabs = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = run()
    assert len(made) == 6
    for loss, got in (slabs, layers):
        assert loss == pytest.approx(expected[0], rel=1e-5)
        for name, value in expected[1].items():
            error = (got[name] - value).norm() / value.norm().clamp(min=1e-6)
            assert error < 1e-3, name


def test_gradients_reach_the_gates_and_training_learns(model) -> None:
    batch = inputs(model.train(), LONG)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:] = batch["input_ids"][:, -4:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        # Nothing reads what the last layer makes of vision tokens: the labels are of text.
        for number, weight in enumerate(gate_parameters(model)):
            assert weight.grad.isfinite().all() and (weight.grad.abs().max() > 0) == (number < 4)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# -- the checkpoint ------------------------------------------------------------------------------


def test_a_stock_checkpoint_starts_near_the_selected_branch(folder) -> None:
    model, told = VideoNSAForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert len(told["missing_keys"]) == 2 * 4 and not told["unexpected_keys"]
    text = model.config.text_config
    assert (text.block_counts, text.window_size) == (32, 256)
    seen = []
    attention = model.model.language_model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["gates"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs(model, LONG))
        means = seen[0].mean((0, 1))
        torch.testing.assert_close(means, torch.tensor([0.05, 0.95, 0.05]), atol=0.05, rtol=0)
        start_gates(model, at=(0.5, 0.5, 0.5))
        model(**inputs(model, LONG))
    torch.testing.assert_close(seen[1].mean((0, 1)), torch.full((3,), 0.5), atol=0.05, rtol=0)


def test_a_saved_checkpoint_is_what_it_was(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["VideoNSAForConditionalGeneration"]
    text = config["text_config"]
    assert (text["block_counts"], text["window_size"]) == (3, 40)
    assert config["model_type"] == "qwen2_5_vl"
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        shape = file.get_slice("model.layers.1.self_attn.g_proj_2.weight").get_shape()
    assert shape == [3 * model.config.text_config.num_attention_heads, 256]
    assert "model.layers.0.self_attn.g_proj_1.bias" in names and "visual.merger.mlp.0.bias" in names
    again = VideoNSAForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    batch = inputs(model, LONG)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_bad_use_is_refused(model, folder, tmp_path) -> None:
    for change in ({"block_counts": 0}, {"window_size": "256"}):
        with pytest.raises(SettingsError, match="expected an integer from 1"):
            VideoNSAForConditionalGeneration.from_pretrained(folder, **change)
    with pytest.raises(TypeError, match="sparse by itself"):
        enable_sparse_training(model, AdaSparkConfig())
    with pytest.raises(TypeError, match="sparse by itself"):
        disable_sparse_training(model)
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(**inputs(model, LONG), max_new_tokens=2)
    with pytest.raises(RuntimeError, match="call the whole model"):
        model.model.language_model(inputs_embeds=torch.zeros(1, 4, 256))
    weights = {n: w for n, w in model.state_dict().items() if "layers.1.self_attn.g_proj" not in n}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(SettingsError, match=r"gate weights are missing: .*layers\.1\."):
        VideoNSAForConditionalGeneration.from_pretrained(tmp_path)
