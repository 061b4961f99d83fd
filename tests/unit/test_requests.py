"""What is known of requests, from what the scheduler tells; and a plan made from that alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import adaspark

from vllm_adaspark.methods.adaspark.choose import BUDGET
from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest, RowSettings
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.methods.videonsa.request import VideoNSARequest
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.requests import (
    Prompt,
    RequestTable,
    mask_of,
    pack_settings,
    settings_of,
    unpack_settings,
    videos_of,
    with_settings,
)
from vllm_adaspark.step import Runtime

VIDEO = SimpleNamespace(modality="video")
IMAGE = SimpleNamespace(modality="image")
CONFIG = AdaSparkConfig(cube=(2, 4, 4), dense_below=1, min_cubes=1)


def new(request_id: str, blocks: list[int], *features) -> SimpleNamespace:
    return SimpleNamespace(req_id=request_id, mm_features=list(features), block_ids=(blocks,))


def told(*fresh, finished=(), cached=(), resumed=()) -> SimpleNamespace:
    """A scheduler's output; ``cached`` are (request, new blocks or None)."""
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=list(fresh),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in cached],
            new_block_ids=[None if blocks is None else (blocks,) for _, blocks in cached],
            resumed_req_ids=set(resumed),
        ),
    )


@pytest.fixture
def table() -> RequestTable:
    return RequestTable(
        lambda request: f"facts of {request.req_id}" if videos_of(request.mm_features) else None
    )


def test_facts_are_made_once(table) -> None:
    table.update(told(new("v", [1], IMAGE, VIDEO), new("i", [2], IMAGE), new("t", [3])))
    assert table.rows(["t", "v", "i"]) == [None, "facts of v", None]
    assert "v" in table and "x" not in table
    table.update(told(cached=[("v", None), ("i", None)]))
    assert table["v"] == "facts of v"


def test_blocks_grow_are_replaced_after_preemption_and_forgotten(table) -> None:
    table.update(told(new("a", [5, 6], VIDEO), new("b", [9])))
    table.update(told(cached=[("a", [7]), ("b", None)]))
    assert table.block_table(["b", "a"]).tolist() == [[9, 0, 0], [5, 6, 7]]
    assert table.block_table(["a"], padding=1).tolist() == [[5, 6, 7], [0, 0, 0]]
    table.update(told(cached=[("a", [2, 3])], resumed=["a"]))
    assert table.block_table(["a"]).tolist() == [[2, 3]]
    for block in range(10, 200):
        table.update(told(cached=[("a", [block])]))
    assert table.block_table(["a"]).tolist() == [[2, 3, *range(10, 200)]]
    table.update(
        told(new("a", [1], VIDEO), finished=["a", "b", "never seen"])
    )  # the id comes again
    assert table.block_table(["a"]).tolist() == [[1]] and "b" not in table


@pytest.mark.parametrize(
    "settings",
    [{}, {"off": True}, {"flops": 0.3}, {"selection": "uniform", "keep": 0.7, "trace": True}],
)
def test_settings_survive_the_ride_with_a_video(settings) -> None:
    config = AdaSparkConfig(report_file="x", cube_queries=4).override(settings)
    assert unpack_settings(pack_settings(config), AdaSparkConfig) == config
    # Behind the hash, also behind one that a client chose to look like it.
    for mm_hash in ("0f3a", with_settings("0f3a", AdaSparkConfig())):
        feature = SimpleNamespace(identifier=with_settings(mm_hash, config), data=None)
        assert settings_of(feature, AdaSparkConfig) == config


@pytest.mark.parametrize("behind", ["", "#adaspark=", "#adaspark={", '#adaspark={"p":1}'])
def test_a_video_that_came_past_the_processor_runs_dense(behind) -> None:
    feature = SimpleNamespace(identifier="0f3a" + behind, data=None)
    assert settings_of(feature, AdaSparkConfig) == AdaSparkConfig().override("off")


def test_a_video_may_lie_in_several_spans() -> None:
    embeds = torch.tensor([True, True, False, True])
    places = [
        SimpleNamespace(offset=1, length=4, is_embed=embeds),
        SimpleNamespace(offset=6, length=2, is_embed=None),
    ]
    assert mask_of(9, places).nonzero()[0].tolist() == [1, 2, 4, 6, 7]


def test_a_prompt_tells_images_from_videos() -> None:
    places = {"image": (2, 3), "video": (6, 2)}
    features = [
        SimpleNamespace(
            modality=kind, mm_position=SimpleNamespace(offset=at, length=n, is_embed=None)
        )
        for kind, (at, n) in places.items()
    ]
    prompt = Prompt.from_features(10, features)
    assert prompt.of(("video",)).nonzero()[0].tolist() == [6, 7]
    assert prompt.of(("image",)).nonzero()[0].tolist() == [2, 3, 4]
    assert prompt.of(("video", "image")).sum() == 5 and not Prompt(10, {}).of(("video",)).any()


def test_cubes_are_the_blocks_of_nothing_but_video() -> None:
    is_video = np.zeros(150, bool)
    is_video[10:140] = True
    assert AdaSparkRequest(CONFIG, is_video).is_cube.tolist() == [False, True, True, True]


def test_videonsas_cubes_are_the_blocks_with_vision_tokens() -> None:
    is_video = np.zeros(330, bool)
    is_video[10:140] = is_video[260:262] = True
    request = VideoNSARequest(VideoNSASettings(), is_video)
    assert request.is_cube.tolist() == [True, True, True, False, True]
    assert request.video_in_block.tolist() == [54, 64, 12, 0, 2]
    assert request.opens_block.nonzero()[0].tolist() == [10, 64, 128, 260]


def test_settings_of_rows() -> None:
    mask = np.ones(9, bool)
    rows = RowSettings.of_rows(
        [
            None,
            AdaSparkRequest(CONFIG, mask),
            AdaSparkRequest(CONFIG.override({"selection": "top_k", "keep": 0.3}), mask),
            AdaSparkRequest(CONFIG.override({"flops": 0.5}), mask, share=0.25, least_budget=0.2),
            AdaSparkRequest(CONFIG.override("off"), mask),
        ]
    )
    assert rows.attention_share.tolist() == [1.0, 0.5, 0.3, 0.25, 1.0]
    assert rows.ffn_share.tolist() == [1.0, 0.5, 0.5, 0.25, 1.0]
    assert rows.rule.tolist() == [0, 0, 1, BUDGET, 0]


def many_rows() -> tuple[StepRows, list[AdaSparkRequest | None]]:
    """Prefill, decode, text and padding in one step, and every kind of settings."""
    video = np.concatenate([np.zeros(7, bool), np.ones(32 * 9, bool), np.zeros(20, bool)])
    requests = [
        AdaSparkRequest(CONFIG, video),
        None,
        AdaSparkRequest(CONFIG.override({"flops": 0.5}), video, 0.4, 0.1),
        AdaSparkRequest(CONFIG.override({"selection": "uniform"}), video),
        None,
    ]
    lens = np.array([200, 5, 315, 1, 0])
    done = np.array([64, 0, 0, 330, 0])
    rows = StepRows(np.append(0, np.cumsum(lens)), lens + done, np.arange(5 * 12).reshape(5, 12))
    return rows, requests


def test_a_plan_reads_nothing_back_from_the_device() -> None:
    """On the meta device there is nothing to read: whoever tries gets an error."""
    rows, requests = many_rows()
    plan = build_plan(
        rows, requests, 32, dense_below=1, cube_queries=8, device=torch.device("meta")
    )
    assert plan.attention is not None and plan.ffn is not None and not plan.summary_writes.empty
    assert plan.attention.blocks.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        plan.attention.blocks.tolist()  # the counter-test


def test_steps_without_video_have_no_plan_and_no_block_table() -> None:
    runtime = Runtime(adaspark(CONFIG, 4, 2, 16))
    runtime.requests = RequestTable(
        lambda new: AdaSparkRequest(CONFIG, np.ones(320, bool)) if new.mm_features else None
    )
    runtime.requests.update(told(new("v", list(range(11)), VIDEO), new("t", [20])))
    rows = StepRows(np.array([0, 1]), np.array([30]), None)
    runtime.request_ids = lambda: ["t"]
    runtime.begin_step(rows, torch.device("cpu"))
    assert runtime.plan is None and runtime.rows is rows and rows.block_table is None
    runtime.request_ids = lambda: ["v"]
    runtime.begin_step(StepRows(np.array([0, 1]), np.array([330]), None), torch.device("cpu"))
    assert runtime.plan.attention is not None and runtime.rows.block_table.shape == (1, 11)
    # Dummy runs between steps have rows but no requests.
    runtime.request_ids = None
    runtime.begin_step(rows, torch.device("cpu"))
    assert runtime.plan is None
    runtime.begin_step(None, torch.device("cpu"))
    assert runtime.plan is None and runtime.rows is None


def test_padded_rows_of_a_cuda_graph_are_nobodys() -> None:
    runtime = Runtime(adaspark(CONFIG, 4, 2, 16))
    runtime.requests = RequestTable(
        lambda new: AdaSparkRequest(CONFIG, np.ones(320, bool)) if new.mm_features else None
    )
    runtime.requests.update(told(new("v", list(range(1, 12)), VIDEO)))
    runtime.request_ids = lambda: ["v"]
    rows = StepRows(np.array([0, 1, 1, 1]), np.array([330, 0, 0]), None)
    runtime.begin_step(rows, torch.device("cpu"))
    assert runtime.plan.attention.tiles.row.tolist() == [0]


def test_dense_settings_sum_no_keys() -> None:
    video = np.ones(320, bool)
    rows = StepRows(np.array([0, 320]), np.array([320]), np.arange(10)[None])
    for settings in ("off", {"p_attn": 1.0}):
        request = AdaSparkRequest(CONFIG.override(settings), video)
        plan = build_plan(
            rows, [request], 32, dense_below=1, cube_queries=8, device=torch.device("cpu")
        )
        assert plan.attention is None and (plan.summary_writes is None or plan.summary_writes.empty)
        assert (plan.ffn is None) == (settings == "off")


def test_requests_that_leave_nothing_out_are_counted_and_no_more() -> None:
    """As many video tokens and cubes as token by token, for whatever part of a prompt runs."""
    rng = np.random.default_rng(0)
    for settings in ("off", {"p_attn": 1.0, "p_ffn": 1.0}):
        for _ in range(20):
            runs = rng.integers(1, 200, int(rng.integers(1, 6)))
            video = np.repeat(np.arange(len(runs)) % 2 == 0, runs)
            request = AdaSparkRequest(CONFIG.override(settings), video)
            start = int(rng.integers(0, len(video) + 40))
            stop = start + int(rng.integers(1, 300))
            rows = StepRows(np.array([0, stop - start]), np.array([stop]), np.arange(20)[None])
            plan = build_plan(
                rows, [request], 32, dense_below=1, cube_queries=8, device=torch.device("cpu")
            )
            assert plan.attention is plan.ffn is plan.summary_writes is None
            assert plan.video_tokens.tolist() == [video[start:stop].sum()]
            cubes = [video[i : i + 32].all() for i in range(0, len(video) - 31, 32)]
            seen = sum(sum(cubes[: position // 32]) for position in range(start, stop))
            assert plan.cubes_seen.tolist() == [seen]
