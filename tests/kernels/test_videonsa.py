"""VideoNSA over pages, on vLLM's CPU kernel, against its slow twin on random batches.

Selected blocks must be exactly equal and outputs equal to rounding.  Where two blocks are so nearly
equally important that fp32 cannot tell (the twin's ``margin``), either is right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from harness import PagedLayer, sizes

from kernels.scenes import gather, known_of, random_request, relative_rms, rows_of
from vllm_adaspark.methods.videonsa import gates, reference
from vllm_adaspark.methods.videonsa.method import VideoNSA
from vllm_adaspark.methods.videonsa.request import VideoNSARequest
from vllm_adaspark.methods.videonsa.settings import BLOCK, VideoNSASettings

CASES = 220
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
TIE = 2e-6
HIDDEN = 24
SAMPLED = 24  # tokens of a request's chunk that the twin looks at


class Projection(torch.nn.Linear):
    """As vLLM's linear layers, which also hand out a bias that was left to the caller."""

    def forward(self, x):
        return super().forward(x), None


@dataclass
class Scene:
    """Requests that share a layer."""

    layer: PagedLayer
    modules: dict[str, Projection]
    requests: list

    def step(self, step: list) -> torch.Tensor:
        """Run a step: ``[(request, tokens)]``."""
        tensors = [gather(step, name) for name in ("q", "k", "v", "hidden")]
        return self.layer.step(rows_of(step), known_of(step), *tensors)

    def gates(self, request) -> torch.Tensor:
        return gates.gates_of(request.hidden, self.modules)


def scene(rng: np.random.Generator, configs: list, layouts: list, **shape) -> Scene:
    torch.manual_seed(int(rng.integers(1 << 31)))
    heads, kv_heads, head_size = (shape[name] for name in ("heads", "kv_heads", "head_size"))
    dtype = shape["dtype"]
    modules = {
        "g_proj_1": Projection(HIDDEN, HIDDEN, dtype=dtype),
        "g_proj_2": Projection(HIDDEN, 3 * heads, dtype=dtype),
    }
    for module in modules.values():
        module.requires_grad_(False)
    settings = VideoNSASettings()
    method = VideoNSA(settings, sizes(heads, kv_heads, head_size), "cpu")
    layer = PagedLayer(settings, num_blocks=120, method=method, modules=modules, **shape)
    layer.kv_cache.normal_()  # what a block held before must not matter
    pool = list(range(1, 120))
    requests = []
    for config, layout in zip(configs, layouts, strict=True):
        sharpness = float(rng.choice([0.5, 1.0, 3.0]))
        request = random_request(rng, config, layout, **shape, pool=pool, sharpness=sharpness)
        request.hidden = torch.randn(len(request.is_video), HIDDEN).to(dtype)
        request.kind = VideoNSARequest
        requests.append(request)
    return Scene(layer, modules, requests)


def random_layout(rng: np.random.Generator) -> list[tuple[str, int]]:
    """Text, then one to three videos, or many small images, with text between."""
    layout = [("text", int(rng.integers(1, 2 * BLOCK)))]
    small = rng.random() < 0.25
    vision, text = (BLOCK, BLOCK // 3) if small else (7 * BLOCK, BLOCK + 8)
    for _ in range(int(rng.integers(5, 15) if small else rng.integers(1, 4))):
        layout.append(("video", int(rng.integers(1, vision))))
        layout.append(("text", int(rng.integers(1, text))))
    return layout


def random_config(rng: np.random.Generator) -> VideoNSASettings:
    return VideoNSASettings(
        enabled=bool(rng.random() > 0.05),
        block_counts=int(rng.choice([1, 2, 3, 4, 8, 32])),
        window_size=int(rng.choice([1, 17, 64, 100, 256])),
    )


@pytest.mark.parametrize("seed", range(CASES))
def test_pages_equal_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = torch.float32 if seed % 4 else torch.bfloat16
    kv_heads = int(rng.choice([1, 2]))
    shape = dict(
        heads=kv_heads * int(rng.choice([1, 2, 7])),
        kv_heads=kv_heads,
        head_size=int(rng.choice([32, 64])),
        dtype=dtype,
    )
    number = int(rng.integers(1, 4))
    layouts = [
        random_layout(rng) if rng.random() > 0.15 else [("text", 150)] for _ in range(number)
    ]
    made = scene(rng, [random_config(rng) for _ in range(number)], layouts, **shape)
    chunk = int(rng.choice([63, 64, 100, 333, 10_000]))
    while step := next_step(rng, made.requests, chunk):
        output = made.step(step)
        check_step(rng, made, step, output, TOLERANCE[dtype])
        for request, count in step:
            request.done += count


def next_step(rng: np.random.Generator, requests: list, chunk: int) -> list:
    """Some requests, each with its next chunk; towards its end a request decodes token by token."""
    step = []
    for request in requests:
        left = len(request.is_video) - request.done
        if not left or (step and rng.random() < 0.3):
            continue
        prefill = left - min(2, request.layout[-1][1] - 1)
        step.append((request, min(chunk, prefill) if prefill > 0 else 1))
    rng.shuffle(step)
    return step


def check_step(rng, made: Scene, step: list, output: torch.Tensor, tolerance: float) -> int:
    """Compare some tokens of each request's chunk with the twin.

    Returns:
        How many selections were compared.
    """
    assert output.isfinite().all(), "every token is written"
    selected = selected_by_token(made, step)
    first = compared = 0
    for row, (request, count) in enumerate(step):
        start, end = request.done, request.done + count
        edges = np.flatnonzero(np.diff(request.is_video[start:end].numpy())) + start
        some = rng.integers(start, end, min(SAMPLED, count))
        tokens = np.unique(np.concatenate([[start, end - 1], edges, edges + 1, some]))
        want = twin(made, request, tokens.tolist())
        got, wanted = output[first - start + tokens].double(), want.output[tokens]
        errors = (got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        for t, error in zip(tokens.tolist(), errors.tolist(), strict=True):
            tied = False
            for kv_head in range(made.layer.kv_heads):
                mine = selected.get((row, t, kv_head))
                theirs = want.selected.get((t, kv_head))
                assert (mine is None) == (theirs is None), "only vision tokens select"
                if mine is not None and mine != theirs.cubes:
                    assert theirs.margin < TIE, f"token {t}: {mine} instead of {theirs}"
                    tied = True
            if not tied:
                assert error < 5 * tolerance, f"token {t}"
        compared += len(want.selected)
        ties = any(s.margin < TIE for s in want.selected.values())
        if not ties:
            assert relative_rms(got, wanted) < tolerance
        first += count
    return compared


def twin(made: Scene, request, tokens) -> reference.Result:
    """The twin's, with the request's own settings; off is a request all of text."""
    config = request.config
    on = torch.full_like(request.is_video, config.enabled)
    return reference.attention(
        request.q,
        request.k,
        request.v,
        made.gates(request),
        request.is_video & on,
        block_counts=config.block_counts,
        window_size=config.window_size,
        scale=made.layer.head_size**-0.5,
        tokens=tokens,
    )


def selected_by_token(made: Scene, step: list) -> dict[tuple[int, int, int], list[int]]:
    """(row, token, KV head) -> logical cubes, own block left out, as the last step's table says."""
    plan, kv_heads = made.layer.runtime.plan, made.layer.kv_heads
    if plan is None:
        return {}
    branches = plan.attention
    rows = made.layer.runtime.rows
    vision = np.arange(len(rows.token_row))[branches.vision]
    table = branches.shared.block_table.view(kv_heads, branches.number, -1)
    found = {}
    for nth, token in enumerate(vision.tolist()):
        row, places = int(rows.token_row[token]), int(branches.places[nth])
        logical = {int(b): i for i, b in enumerate(step[row][0].blocks)}
        for kv_head in range(kv_heads):
            chosen = table[kv_head, nth, :places].tolist()
            assert all(block % kv_heads == kv_head for block in chosen)
            key = row, int(rows.token_position[token]), kv_head
            found[key] = sorted(logical[block // kv_heads] for block in chosen)
    return found


SHAPE = dict(heads=4, kv_heads=2, head_size=32, dtype=torch.float32)


def one_scene(layout: list, **settings) -> Scene:
    rng = np.random.default_rng(7)
    return scene(rng, [VideoNSASettings(**settings)], [layout], **SHAPE)


def in_chunks(made: Scene, chunk: int) -> torch.Tensor:
    (request,) = made.requests
    request.done, outputs = 0, []
    while left := len(request.is_video) - request.done:
        step = [(request, min(chunk, left))]
        outputs.append(made.step(step))
        request.done += step[0][1]
    return torch.cat(outputs)


def test_chunks_compute_what_one_step_does() -> None:
    made = one_scene([("text", 20), ("video", 500), ("text", 9)], block_counts=3, window_size=90)
    whole = in_chunks(made, 1000)
    for chunk in (64, 77):
        made.layer.kv_cache.normal_()
        assert relative_rms(in_chunks(made, chunk), whole) < 1e-5


def test_reused_blocks_and_a_prefix_hit_inside_a_video() -> None:
    """Blocks with sums of another request's, then a request that shares the first ones' blocks."""
    layout = [("text", 20), ("video", 500), ("text", 9), ("video", 30), ("text", 80)]
    made = one_scene(layout, block_counts=3, window_size=90)
    (request,) = made.requests
    want = in_chunks(made, 1000)
    other = made.requests[0] = replace(request, blocks=request.blocks[::-1].copy())
    other.k, other.v = -request.k, 3 * request.v
    in_chunks(made, 1000)  # what it leaves in the blocks, sums among them, must not matter
    made.requests[0] = request
    for chunk in (1000, 70, 21):  # 21: the first block's text comes in a step of its own
        assert relative_rms(in_chunks(made, chunk), want) < 1e-5, chunk
    hit = made.requests[0] = replace(request, blocks=request.blocks.copy(), done=4 * BLOCK)
    hit.blocks[4:] = [block for block in range(1, 120) if block not in request.blocks][:6]
    step = [(hit, len(hit.is_video) - hit.done)]
    assert relative_rms(made.step(step), want[hit.done :]) < 1e-5


def test_a_block_with_text_is_selected_by_its_vision_tokens() -> None:
    """The prompt's text in the first block, whatever its keys are, moves neither mean nor choice;
    the block is selected like any other, and shows its text where it is."""
    made = one_scene([("text", 20), ("video", 400), ("text", 9)], block_counts=2, window_size=8)
    (request,) = made.requests
    request.k[20:64] = request.k[20]  # so that one query can prefer this block
    request.q[300] = 4 * request.k[20].repeat_interleave(2, 0)
    before = in_chunks(made, 1000)
    (block,) = {tuple(selected_by_token(made, [(request, 0)])[0, 300, h]) for h in range(2)}
    assert block == (0,)
    request.k[:20] += 10.0
    after = in_chunks(made, 1000)
    selected = selected_by_token(made, [(request, 0)])
    assert selected[0, 300, 0] == selected[0, 300, 1] == [0]
    changed = ((after - before).abs().amax((1, 2)) > 1e-6).nonzero().flatten().tolist()
    sees_text = {t for t in range(20, 64)} | {
        t for (_, t, _), blocks in selected.items() if 0 in blocks
    }
    assert set(changed) <= {*range(20), *sees_text, *range(420, 429)}


def test_a_later_token_changes_no_earlier_one() -> None:
    """The released code shows a query later blocks; paper mode does not."""
    made = one_scene([("text", 20), ("video", 400), ("text", 30)], block_counts=3)
    before = in_chunks(made, 1000)
    (request,) = made.requests
    for changed in (440, 300, 130):
        for name in "kv":
            getattr(request, name)[changed] += 3.0
        after = in_chunks(made, 1000)
        assert torch.equal(after[:changed], before[:changed])
        assert not torch.equal(after[changed:], before[changed:])
        before = after


def test_one_block_has_nothing_to_compress_and_selects_itself() -> None:
    """At most 64 tokens: no compressed branch, and selection and window are the same."""
    made = one_scene([("text", 5), ("video", 50), ("text", 5)], block_counts=32)
    got = in_chunks(made, 1000)
    (request,) = made.requests
    gates_of_request = made.gates(request).clone()
    for cmp, slc, swa in ((9.0, None, None), (None, 0.0, "both"), (None, "both", 0.0)):
        forced = gates_of_request.clone()
        together = forced[..., 1] + forced[..., 2]
        for branch, gate in enumerate((cmp, slc, swa)):
            if gate is not None:
                forced[..., branch] = together if gate == "both" else gate
        want = reference.attention(
            request.q, request.k, request.v, forced, request.is_video,
            block_counts=32, window_size=256, scale=32**-0.5,
        )  # fmt: skip
        assert relative_rms(got, want.output) < 1e-5


def test_blocks_that_are_not_selected_are_not_read() -> None:
    """Not a number in what no token of the step selected, sees or compresses token by token."""
    made = one_scene([("video", 640)], block_counts=2, window_size=64)
    (request,) = made.requests
    made.step([(request, 576)])
    request.done = 576
    step = [(request, 8)]
    want = made.step(step)
    chosen = {block for blocks in selected_by_token(made, step).values() for block in blocks}
    unread = set(range(8)) - chosen  # block 8 is in the window, 9 the own one
    assert unread
    for block in unread:
        made.layer.kv_cache[int(request.blocks[block])] = float("nan")
    assert torch.equal(made.step(step), want)
    for block in chosen:  # the counter-test
        made.layer.kv_cache[int(request.blocks[block])] = float("nan")
    assert not made.step(step).isfinite().all()


def test_images_and_off_and_what_checkpoints_say() -> None:
    said = {"text_config": {"block_counts": 5, "window_size": 70}, "window_size": 9}
    assert VideoNSASettings.of_checkpoint(said) == {"block_counts": 5, "window_size": 70}
    assert VideoNSASettings.of_checkpoint({"block_counts": 4}) == {"block_counts": 4}
    assert VideoNSASettings.of_checkpoint({}) == {}
    assert VideoNSA.media == ("video", "image")
    off = VideoNSARequest(VideoNSASettings().override("off"), np.ones(99, bool))
    assert not off.has_vision(0, 99)


def test_a_prompts_flops_are_what_accounts_count() -> None:
    from vllm_adaspark.accounts.account import Account, count_step
    from vllm_adaspark.accounts.flops import ModelShape
    from vllm_adaspark.methods.videonsa.flops import prompt_flops

    shape = ModelShape(hidden=128, heads=4, kv_heads=2, head_size=32, intermediate=256)
    made = one_scene([("text", 20), ("video", 500), ("text", 9)], block_counts=3, window_size=90)
    (request,) = made.requests
    account = Account(shape, range(1))
    while request.done < len(request.is_video):
        step = [(request, min(100, len(request.is_video) - request.done))]
        made.step(step)
        account.add(count_step(made.layer.runtime.rows, made.layer.runtime.plan, range(1), shape))
        request.done += step[0][1]
    counted = account.report()["flops"]
    executed, is_vision = counted["executed"], request.is_video.numpy()
    told = prompt_flops(request.config, shape, 1, is_vision)
    assert {part: executed[part] for part in told} == pytest.approx(told)
    assert executed["total"] == pytest.approx(sum(told.values()))
    dense = prompt_flops(request.config.override("off"), shape, 1, is_vision)
    assert sum(dense.values()) == pytest.approx(counted["dense"]["total"])
