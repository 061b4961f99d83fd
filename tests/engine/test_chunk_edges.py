"""Random requests through our scheduler, without an engine; test_scheduling.py has the engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fuzz import schedules

from vllm_adaspark import scheduler
from vllm_adaspark.methods.adaspark import method as adaspark
from vllm_adaspark.methods.base import SCHEDULER, load

CASES = 30


@pytest.fixture(scope="module")
def schedulers(checkpoint) -> schedules.Schedulers:
    return schedules.Schedulers(checkpoint)


def serve(schedulers: schedules.Schedulers, case: schedules.Case) -> schedules.Seen:
    return schedules.run(case, schedulers.make(case), load(case.method).settings_class)


@pytest.mark.parametrize("method", ["adaspark", "adatp"])
def test_no_chunk_ends_in_a_cube_and_every_request_ends(schedulers, method) -> None:
    """Sync and async, with preemption, prefix hits, full encoder caches, aborts and priorities."""
    preempted = cached = 0
    for seed in range(CASES):
        seen = serve(schedulers, schedules.random_case(np.random.default_rng(seed), method))
        preempted, cached = preempted + seen.preempted, cached + seen.cached
    assert method == "adatp" or (preempted and cached)


def test_cubes_that_choose_together_stay_together(schedulers) -> None:
    """The same, with two cubes in a tile."""
    cached = 0
    for seed in range(CASES):
        case = schedules.in_pairs(schedules.random_case(np.random.default_rng(seed)))
        cached += serve(schedulers, case).cached
    assert cached


def test_stock_vllm_cuts_cubes(schedulers, monkeypatch) -> None:
    """The same cases, without the rule: so the test above could fail."""
    monkeypatch.setattr(scheduler.ChunkRulesMixin, "_uncut", lambda self, rules, start, new: new)
    cuts = 0
    for seed in range(10):
        try:
            serve(schedulers, schedules.random_case(np.random.default_rng(seed)))
        except AssertionError as error:
            cuts += "cuts a cube" in str(error)
    assert cuts >= 3


def case_of(limits: dict, *prompts: schedules.Prompt) -> schedules.Case:
    usual = dict(step_tokens=100, kv_blocks=99, encoder_tokens=4096, rows=8, is_async=False)
    return schedules.Case(schedules.Limits(**usual | limits), list(prompts))


def prompt(*pieces: tuple[str, int], settings=None, arrives: int = 0, answers: int = 1):
    return schedules.Prompt([*pieces], 0, arrives, answers, settings)


SPARSE, OFF = {"p_attn": 0.5}, "off"


@pytest.mark.parametrize(
    ("settings", "chunks"),
    [
        # 20 tokens of text: block 0 is mixed, blocks 1 to 4 are cubes, block 5 is mixed.
        (SPARSE, [(0, 64), (64, 128), (128, 192), (192, 256), (256, 356), (356, 360)]),
        ({"flops": 0.5}, [(0, 64), (64, 128), (128, 192), (192, 256), (256, 356), (356, 360)]),
        (OFF, [(0, 100), (100, 200), (200, 300), (300, 360)]),
        ({"p_attn": 1.0, "p_ffn": 1.0}, [(0, 100), (100, 200), (200, 300), (300, 360)]),
    ],
)
def test_where_chunks_end(schedulers, settings, chunks) -> None:
    asked = prompt(("text", 20), ("video", 310), ("text", 30), settings=settings)
    assert serve(schedulers, case_of({}, asked)).chunks["r0"] == chunks


@pytest.mark.parametrize(
    ("settings", "chunks"),
    [
        # Blocks 2 and 3 are one tile; block 4 has no other cube behind it.
        (SPARSE, [(0, 128), (128, 328), (328, 360)]),
        ({"p_attn": 1.0}, [(0, 192), (192, 360)]),  # each cube is on its own in the FFN
        (OFF, [(0, 200), (200, 360)]),
    ],
)
def test_where_chunks_end_with_two_cubes_in_a_tile(schedulers, settings, chunks) -> None:
    asked = prompt(("text", 20), ("video", 310), ("text", 30), settings=settings)
    limits = {"step_tokens": 200, "tile_cubes": 2}
    assert serve(schedulers, case_of(limits, asked)).chunks["r0"] == chunks


def test_a_prefix_hit_ends_between_tiles(schedulers, monkeypatch) -> None:
    """Of a prompt whose cubes are blocks 1 to 9, the cache still has five blocks."""
    pieces = ("text", 20), ("video", 620), ("text", 30)
    first, again = (prompt(*pieces, settings=SPARSE, arrives=at) for at in (0, 20))
    other = prompt(("text", 400), arrives=10)
    case = case_of({"step_tokens": 128, "kv_blocks": 13, "tile_cubes": 2}, first, other, again)
    assert serve(schedulers, case).chunks["r2"][0] == (4 * 64, 6 * 64)
    stock = scheduler.Scheduler._get_local_prefix_cache_hit
    monkeypatch.setattr(scheduler.ChunkRulesMixin, "_get_local_prefix_cache_hit", stock)
    with pytest.raises(AssertionError, match="parts two cubes"):
        serve(schedulers, case)


def test_what_a_chunk_leaves_goes_to_others(schedulers) -> None:
    video = prompt(("text", 20), ("video", 300), ("text", 30), settings=SPARSE)
    text = prompt(("text", 90))
    seen = serve(schedulers, case_of({}, video, text))
    assert seen.chunks["r0"][0] == (0, 64) and seen.chunks["r1"][0] == (0, 36)


@pytest.mark.parametrize("limits", [{"step_tokens": 63}, {"long_prefill": 63}])
def test_steps_shorter_than_a_block_cut(schedulers, limits) -> None:
    video = prompt(("text", 20), ("video", 300), ("text", 30), settings=SPARSE)
    with pytest.raises(AssertionError, match="cuts a cube"):
        serve(schedulers, case_of(limits, video, video))


def test_a_scheduler_of_the_users_own_is_left_alone_and_said_so(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(adaspark.logger, "warning", lambda text, *args: said.append(text % args))

    class Derived(scheduler.ChunkScheduler):
        """As the warning advises."""

    by_name = "vllm_adaspark.scheduler.ChunkAsyncScheduler"
    for chosen in (None, SCHEDULER, by_name, Derived, "my.Own"):
        config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=chosen))
        adaspark.AdaSpark.check_server(adaspark.AdaSparkConfig(), config)
        assert config.scheduler_config.scheduler_cls == (chosen or SCHEDULER)
    assert len(said) == 1 and "--scheduler-cls my.Own" in said[0]
