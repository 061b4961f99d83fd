"""Our schedulers without an engine: prompts that run in one step, in blocks of their own."""

from __future__ import annotations

import gc

import checkpoint as demo_checkpoint  # examples/demo
import pytest

from vllm_adaspark import ARCHITECTURE
from vllm_adaspark.methods.adatp.settings import AdaTPSettings
from vllm_adaspark.requests import with_settings

pytestmark = pytest.mark.engine
BUDGET, BLOCK = 512, 64  # tokens in a step
OFF = {"enabled": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return demo_checkpoint.build(tmp_path_factory.mktemp("scheduler"), dtype="float32", layers=4)


class Steps:
    """A scheduler, and a model that says 7 whenever a prompt is complete."""

    def __init__(self, checkpoint, is_async: bool, blocks: int = 200) -> None:
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_adaspark.scheduler import scheduler_for

        config = EngineArgs(
            str(checkpoint),
            dtype="float32",
            max_model_len=2048,
            max_num_batched_tokens=BUDGET,
            hf_overrides={"architectures": [ARCHITECTURE]},
            additional_config={"method": "adatp", "adaspark": {"keep": 0.5}},
            async_scheduling=is_async,
            enforce_eager=True,
        ).create_engine_config()
        assert config.cache_config.block_size == BLOCK
        config.cache_config.num_gpu_blocks = blocks
        layer = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32
        )
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], layer)])
        self.scheduler = scheduler_for(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.cached: dict[str, int] = {}  # tokens that a request found in the prefix cache

    def add(
        self, name: str, text: int, video: int = 0, settings=None, salt=None, answer: int = 3
    ) -> None:
        """A request of ``video`` tokens and then ``text`` others."""
        from vllm import SamplingParams
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.v1.request import Request

        features = []
        if video:
            named = with_settings("hash", AdaTPSettings(keep=(0.5,), flops=None).override(settings))
            place = PlaceholderRange(offset=0, length=video)
            features = [MultiModalFeatureSpec(None, "video", named, place)]
        self.scheduler.add_request(
            Request(
                name,
                [5] * (video + text),
                SamplingParams(max_tokens=answer, ignore_eos=True),
                None,
                mm_features=features,
                cache_salt=salt,
                block_hasher=self._hasher,
            )
        )

    def step(self) -> dict[str, int]:
        """Run one; how many tokens of each request it held."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            self.cached[new.req_id] = new.num_computed_tokens
        names = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        complete = [each.num_computed_tokens >= each.num_prompt_tokens for each in requests]
        said = ModelRunnerOutput(
            names,
            {name: index for index, name in enumerate(names)},
            sampled_token_ids=[[7] if done else [] for done in complete],
        )
        self.scheduler.update_from_output(output, said)
        return dict(output.num_scheduled_tokens)

    def remembered(self) -> set[str]:
        """The requests of whose rules the scheduler still knows."""
        gc.collect()
        return {request.request_id for request in self.scheduler._rules}

    def run(self) -> list[dict[str, int]]:
        steps = []
        while self.scheduler.has_unfinished_requests():
            steps.append(self.step())
            assert len(steps) < 500, "a request waits for ever"
        return steps


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def steps(checkpoint, request) -> Steps:
    return Steps(checkpoint, request.param)


def test_a_prompt_waits_for_a_step_that_holds_it(steps) -> None:
    """The text's chunks leave no room for all of the video's prompt until the text is read."""
    from vllm_adaspark.scheduler import ChunkAsyncScheduler, ChunkScheduler

    is_async = steps.scheduler.scheduler_config.async_scheduling
    assert type(steps.scheduler) is (ChunkAsyncScheduler if is_async else ChunkScheduler)
    steps.add("decoding", 10, answer=8)
    steps.step()
    steps.add("text", 900)
    steps.add("video", 60, video=384)
    steps.add("stock", 60, video=384, settings=OFF)
    steps.add("short", 20)
    ran = steps.run()
    assert [step["video"] for step in ran if step.get("video", 0) > 1] == [444]
    assert [step["text"] for step in ran if step.get("text", 0) > 1] == [511, 389]
    # Whoever needs no whole step takes what others leave, also before the one that waits.
    first = next(n for n, step in enumerate(ran) if "video" in step)
    assert sum(len(step) > 1 for step in ran[: first + 1]) == first + 1
    assert sum(step.get("stock", 0) for step in ran) == 444 + 2
    assert any(0 < step.get("stock", 0) < 444 and step["stock"] > 1 for step in ran)
    assert not steps.remembered()


def test_nobody_finds_its_blocks_and_it_finds_nobodys(steps) -> None:
    for name, settings in (("a", None), ("b", None), ("off", OFF), ("off again", OFF)):
        steps.add(name, 60, video=384, settings=settings, salt="shared")
        ran = steps.run()
        assert max(step.get(name, 0) for step in ran) == (60 if name == "off again" else 444)
    # The same tokens under other settings are other videos; the last one's are cached.
    assert steps.cached == {"a": 0, "b": 0, "off": 0, "off again": 384}


def test_aborted_and_preempted_requests(checkpoint) -> None:
    """A preempted prompt waits for a whole step again, and what ended is forgotten."""
    from vllm.v1.request import RequestStatus

    steps = Steps(checkpoint, False, blocks=12)  # of which one is never used
    steps.add("first", 60, video=192, answer=150)
    steps.add("second", 60, video=192, answer=150)
    ran = steps.run()
    assert sum(step.get("second", 0) > 200 for step in ran) >= 2, "it was preempted"
    assert all(step["second"] == 1 or step["second"] >= 252 for step in ran if "second" in step)
    steps.add("left", 60, video=192)
    assert steps.remembered() == {"left"}
    steps.scheduler.finish_requests("left", RequestStatus.FINISHED_ABORTED)
    assert not steps.remembered()
