"""VideoNSA's faithful mode in the real engine, on a tiny checkpoint with random gates."""

from __future__ import annotations

import pytest
import tiny_videonsa
import torch
from torch.nn import functional

from engine.engines import VIDEO, ask, chat, clip, engine, last_reports, video_prompt
from engine.test_videonsa import CLOSE, OURS, VideoNSATwin, prompts
from vllm_adaspark.methods.videonsa import faithful_reference as reference
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings

pytestmark = pytest.mark.engine
FAITHFUL = {"mode": "faithful", "block_counts": 2}
WHOLE = {"enable_chunked_prefill": False, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def videonsa(tmp_path_factory):
    return tiny_videonsa.build(tmp_path_factory.mktemp("videonsa"))


class FaithfulTwin(VideoNSATwin):
    """Hugging Face's modules, the transcription in the prompt, dense attention after it."""

    def _attend(self, q, k, v, normed, is_video, start, index) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        if start:
            query = q[start:].unflatten(1, (k.shape[1], -1)).transpose(0, 1)  # [kv, 1, group, d]
            keys, values = k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]
            probs = (query @ keys.transpose(-1, -2) * scale).softmax(-1)
            return (probs @ values).transpose(0, 1).flatten(1, 2)
        layer = f"model.layers.{index}.self_attn.g_proj"
        w1, b1, w2, b2 = (
            self.weights[f"{layer}_{nth}.{what}"] for nth in (1, 2) for what in ("weight", "bias")
        )
        z = functional.linear(functional.gelu(functional.linear(normed, w1, b1)), w2, b2)
        answer = reference.attend(
            q, k, v, is_video, z.unflatten(-1, (-1, 3)), scale=scale,
            block_counts=self.config.block_counts, window=self.config.window_size,
        )  # fmt: skip
        return answer.output.float()


def test_one_engine_asked_many_things(videonsa) -> None:
    with engine(videonsa, FAITHFUL, **WHOLE, **OURS) as llm:
        equals_twin(videonsa, llm)
        answers = {name: ask(llm, [prompt])[0] for name, prompt in prompts().items()}
        (report,) = last_reports(llm)
        account_and_trace(llm)
        for (name, want), got in zip(
            answers.items(), ask(llm, list(prompts().values())), strict=True
        ):
            assert got.difference(want) < CLOSE, f"{name} beside others"
    assert report["settings"]["mode"] == "faithful" and report["video_tokens"] > 0
    with engine(videonsa, {"block_counts": 2}, **OURS) as llm:
        for name, answer in answers.items():
            (paper,) = ask(llm, [prompts()[name]])
            far = paper.difference(answer)
            assert (far < CLOSE) == (name == "text only"), f"{name}: paper mode is another model"


def equals_twin(checkpoint, llm) -> None:
    video = clip(26, seed=7)
    answer = ask(llm, [video_prompt(video, question="Which digit?")], max_tokens=3, logprobs=20)[0]
    settings = VideoNSASettings(block_counts=2, window_size=tiny_videonsa.WINDOW_SIZE)
    expected = FaithfulTwin(checkpoint, settings).logprobs(
        chat(VIDEO, "Which digit?"), video, list(answer.ids)
    )
    for step, (got, want) in enumerate(zip(answer.logprobs, expected, strict=True)):
        named = torch.tensor(list(got))
        difference = (want[named] - torch.tensor(list(got.values()))).abs().max()
        assert difference < CLOSE, f"step {step}: {difference}"


def account_and_trace(llm) -> None:
    """FLOPs for the rows that are really run, and the blocks that a token selected."""
    ask(llm, [video_prompt(clip(40, seed=9), trace=True)])
    (report,) = last_reports(llm)
    executed, tokens = report["flops"]["executed"], report["video_tokens"]
    first, layers, heads, head_size = 4, 4, 8, 32  # 4 tokens of the chat template come first
    pairs = sum(min(first + t + 1, tiny_videonsa.WINDOW_SIZE) for t in range(tokens))
    rows = 32  # 8 heads over 2 KV heads, in groups of 16
    assert executed["swa"] == layers * 4 * rows * head_size * pairs and rows > heads
    own = [(first + t) // 64 for t in range(tokens)]
    assert report["attention_density"] == pytest.approx(sum(min(1, b) for b in own) / sum(own))
    (listed,) = llm.collective_rpc("adaspark_traces")
    (told,) = llm.collective_rpc("adaspark_trace", args=(listed[0]["id"], "heat", "token:450"))
    for layer in told["heat"]:
        assert sum(share or 0 for share in layer) == pytest.approx(2), "one block and its own"


def test_preemption(videonsa) -> None:
    """Generated tokens are computed again with the prompt, and get nothing of its terms."""
    batch = [video_prompt(clip(36, seed=20 + i), question="What moves?") for i in range(4)]
    with engine(videonsa, FAITHFUL, **WHOLE, **OURS) as llm:
        want = [ask(llm, [prompt], max_tokens=100)[0] for prompt in batch]
    few = {"num_gpu_blocks_override": 43, "max_model_len": 2048, "disable_log_stats": False}
    with engine(videonsa, FAITHFUL, **few, **WHOLE, **OURS) as llm:
        together = ask(llm, batch, max_tokens=100)
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0
    for got, expected in zip(together, want, strict=True):
        assert got.difference(expected) < CLOSE


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_prefix_caching": False}, r"chunked prefill: .*--no-enable-chunked-prefill"),
        ({"enable_chunked_prefill": False}, r"prefix caching: .*--no-enable-prefix-caching"),
        (WHOLE | {"tensor_parallel_size": 2}, r"--tensor-parallel-size 2: .*use 1"),
    ],
)
def test_refused_at_start(videonsa, options, message) -> None:
    with pytest.raises(Exception, match=message), engine(videonsa, FAITHFUL, **options, **OURS):
        pass
