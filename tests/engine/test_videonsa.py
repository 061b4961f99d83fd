"""VideoNSA in the real engine, on a tiny checkpoint with random gates."""

from __future__ import annotations

import shutil

import pytest
import tiny_videonsa
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from vllm import EngineArgs

from engine.engines import (
    VIDEO,
    Answer,
    ask,
    chat,
    clip,
    engine,
    five_prompts,
    last_reports,
    video_prompt,
)
from engine.twin import TwinModel
from vllm_adaspark.methods.videonsa import faithful_reference, reference
from vllm_adaspark.methods.videonsa.gates import flops_per_token
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings
from vllm_adaspark.settings import SettingsError

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
OURS = {"method": None, "architecture": None}  # the checkpoint says it all
BRANCHES = ("cmp", "slc", "swa")


@pytest.fixture(scope="module")
def videonsa(tmp_path_factory):
    """A checkpoint with weights called as they are in memory; see tests/tiny_videonsa.py."""
    return tiny_videonsa.build(tmp_path_factory.mktemp("videonsa"), new_names=True)


def prompts() -> dict[str, dict]:
    """One of each kind; the long video first."""
    return {"question": video_prompt(clip(60, seed=1), question="Which digit?"), **five_prompts()}


@pytest.fixture(scope="module")
def stock(checkpoint) -> dict[str, Answer]:
    """Stock Qwen2.5-VL's answers with the same weights, gates aside; each prompt alone."""
    with engine(checkpoint, None) as llm:
        return {name: ask(llm, [prompt])[0] for name, prompt in prompts().items()}


@pytest.fixture(scope="module")
def alone(videonsa, stock) -> dict[str, Answer]:
    """Each prompt alone and in one chunk; what else one engine has to show is shown here."""
    with engine(videonsa, {}, **OURS) as llm:
        answers = {name: ask(llm, [prompt])[0] for name, prompt in prompts().items()}
        (report,) = last_reports(llm)
        for name, answer in answers.items():
            if name == "text only":
                assert answer == stock[name], "the stock path, to the bit"
            else:
                assert answer.difference(stock[name]) > CLOSE, "images are vision tokens, too"
        equals_twin(videonsa, llm)
        account_tells_branches(llm)
        trace_has_each_tokens_blocks(llm)
        mixed_batch_equals_alone(llm, answers)
        prefix_hit_inside_a_video(llm)
        settings_per_request(llm, stock)
    assert report["mode"] == "sparse" and report["video_tokens"] > 0, "of the image"
    return answers


def test_one_engine_asked_many_things(alone) -> None:
    """See ``alone``."""


class VideoNSATwin(TwinModel):
    """Hugging Face's modules, the slow twin's rules, gates as the checkpoint has them."""

    def __init__(self, checkpoint, config: VideoNSASettings) -> None:
        super().__init__(checkpoint, config)
        self.weights = load_file(checkpoint / "model.safetensors")

    def _attend(self, q, k, v, normed, is_video, start, index) -> torch.Tensor:
        gates = torch.sigmoid(self._gate_logits(normed, index) / 0.3)
        gates = torch.cat([gates.new_zeros(start, *gates.shape[1:]), gates])
        result = reference.attention(
            q, k, v, gates, is_video,
            block_counts=self.config.block_counts, window_size=self.config.window_size,
            scale=q.shape[-1] ** -0.5, tokens=range(start, len(q)),
        )  # fmt: skip
        return result.output[start:].float()

    def _gate_logits(self, normed, index) -> torch.Tensor:
        """``[n, heads, 3]`` as ``g_proj_2`` gives them."""
        layer = f"model.language_model.layers.{index}.self_attn.g_proj"
        for nth in (1, 2):
            weight, bias = (self.weights[f"{layer}_{nth}.{what}"] for what in ("weight", "bias"))
            normed = functional.linear(
                functional.gelu(normed) if nth == 2 else normed, weight, bias
            )
        return normed.unflatten(-1, (-1, 3))

    def _ffn(self, x, normed, is_video, start, index) -> torch.Tensor:
        return self.text.layers[index].mlp(normed)


def equals_twin(checkpoint, llm) -> None:
    """The whole model against the naive one, prompt and decode, at the checkpoint's settings."""
    video = clip(40, seed=7)
    answer = ask(llm, [video_prompt(video, question="Which digit?")], max_tokens=4, logprobs=20)[0]
    settings = VideoNSASettings(
        block_counts=tiny_videonsa.BLOCK_COUNTS, window_size=tiny_videonsa.WINDOW_SIZE
    )
    twin = VideoNSATwin(checkpoint, settings)
    expected = twin.logprobs(chat(VIDEO, "Which digit?"), video, list(answer.ids))
    for step, (got, want) in enumerate(zip(answer.logprobs, expected, strict=True)):
        named = torch.tensor(list(got))
        difference = (want[named] - torch.tensor(list(got.values()))).abs().max()
        assert difference < CLOSE, f"step {step}: {difference}"


def account_tells_branches(llm) -> None:
    """FLOPs by branch, mean gates by branch and layer, of a request with one video."""
    video = clip(40, seed=8)
    ask(llm, [video_prompt(video)], max_tokens=3)
    (report,) = last_reports(llm)
    executed, dense = report["flops"]["executed"], report["flops"]["dense"]
    assert all(executed[branch] > 0 for branch in (*BRANCHES, "gates", "text"))
    assert 0 < executed["attention"] < executed["text"], "decode steps take the stock path"
    assert executed["qkvo"] == dense["qkvo"] and executed["ffn"] == dense["ffn"]
    # A video token selects 2 of the cubes before it; the first also holds the chat template.
    first, tokens = 4, report["video_tokens"]
    before = [(first + t) // 64 for t in range(tokens)]
    kept = sum(min(2, n) for n in before)
    assert report["attention_density"] == pytest.approx(kept / sum(before))
    pairs = sum(min(first + t + 1, tiny_videonsa.WINDOW_SIZE) for t in range(tokens))
    layers, heads, head_size = 4, 8, 32
    assert executed["swa"] == layers * 4 * heads * head_size * pairs
    # Neither text nor the two decode steps have gates.
    assert executed["gates"] == layers * tokens * flops_per_token(heads * head_size, heads)
    for part in (report, *report["layers"]):
        assert all(0.05 < part["means"][f"gate_{branch}"] < 0.95 for branch in BRANCHES)
    assert len({layer["means"]["gate_cmp"] for layer in report["layers"]}) == layers


def trace_has_each_tokens_blocks(llm) -> None:
    """A vision token's two cubes and its own; a text token's all."""
    ask(llm, [video_prompt(clip(40, seed=9), trace=True)])
    (listed,) = llm.collective_rpc("adaspark_traces")
    token = 6 * 64 + 7  # in block 6, a cube as all before it
    (of_token,), (of_text,) = (
        llm.collective_rpc("adaspark_trace", args=(listed[0]["id"], "heat", source))
        for source in (f"token:{token}", "question")
    )
    for layer in of_token["heat"]:
        assert sum(layer[:6]) == pytest.approx(2) and layer[6] == 1 and layer[7] is None
    assert all(share == 1 for layer in of_text["heat"] for share in layer)
    (meta,) = llm.collective_rpc("adaspark_trace", args=(listed[0]["id"], "meta"))
    assert meta["truncated"] is None and meta["settings"]["block_counts"] == 3


def mixed_batch_equals_alone(llm, answers: dict[str, Answer]) -> None:
    together = ask(llm, list(prompts().values()))
    for (name, want), got in zip(answers.items(), together, strict=True):
        assert got.difference(want) < CLOSE, name


def prefix_hit_inside_a_video(llm) -> None:
    video = clip(40, seed=11)
    cold = ask(llm, [video_prompt(video, question="What moves?")])[0]
    hit = ask(llm, [video_prompt(video, question="What moves?")])[0]
    assert cold.cached_tokens == 0 and hit.cached_tokens >= 64 * 8
    assert hit.difference(cold) < CLOSE
    (report,) = last_reports(llm)
    assert (report["mode"], report["reason"]) in {("dense", "cached"), ("sparse", None)}


def settings_per_request(llm, stock) -> None:
    """More blocks than there are and a window over all; off; what a request may not set."""
    video = clip(60, seed=1)
    few = ask(llm, [video_prompt(video, question="Which digit?")])[0]
    many = ask(llm, [video_prompt(video, question="Which digit?", block_counts=99)])[0]
    assert many.cached_tokens == 0 and many.difference(few) > CLOSE
    (off,) = ask(llm, [prompts()["question"] | {"mm_processor_kwargs": {"adaspark": "off"}}])
    assert off.difference(stock["question"]) < CLOSE
    assert last_reports(llm)[0]["reason"] == "off"
    for settings, message in (
        ({"block_counts": 0}, r"block_counts=0: expected an integer from 1"),
        ({"mode": "faithful"}, r"'mode' is a server setting"),
        ({"order": "cube"}, r"'order' is a server setting"),
        ({"p_attn": 0.5}, r"unknown key 'p_attn'.*block_counts"),
        ({"flops": 0.5}, r"flops=0.5: what VideoNSA spends follows from block_counts"),
    ):
        with pytest.raises(SettingsError, match=message):
            ask(llm, [video_prompt(video, **settings)])


@pytest.mark.parametrize("chunk", [100, 256])
def test_chunks(videonsa, alone, chunk) -> None:
    """Odd chunks, and chunks of whole blocks: the same answers, with prefix hits between them."""
    with engine(videonsa, {}, max_num_scheduled_tokens=chunk, **OURS) as llm:
        for name, prompt in prompts().items():
            assert ask(llm, [prompt])[0].difference(alone[name]) < CLOSE, name
        together = ask(llm, list(prompts().values()))
        for (name, want), got in zip(alone.items(), together, strict=True):
            assert got.difference(want) < CLOSE, name


def test_compiled_with_old_names_and_preemption(videonsa, alone, tmp_path) -> None:
    """Weights as transformers writes them, torch.compile, and too few KV blocks for all."""
    path = tiny_videonsa.build(tmp_path / "old")
    batch = [video_prompt(clip(36, seed=20 + i), question="What moves?") for i in range(4)]
    with engine(videonsa, {}, enable_prefix_caching=False, **OURS) as llm:
        want = ask(llm, batch, max_tokens=100)
    options = {"num_gpu_blocks_override": 43, "max_model_len": 2048, "disable_log_stats": False}
    options |= {"enable_prefix_caching": False, "enforce_eager": False}
    with engine(path, {}, **options, **OURS) as llm:
        (answer,) = ask(llm, [prompts()["question"]])
        together = ask(llm, batch, max_tokens=100)
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0
    assert answer.difference(alone["question"]) < CLOSE
    for got, expected in zip(together, want, strict=True):
        assert got.ids[:3] == expected.ids[:3] and got.difference(expected) < CLOSE


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_tensor_parallel_equals_one_rank(kv_heads, tmp_path) -> None:
    """Gates are sharded; ranks that share a KV head select by the whole GQA group."""
    path = tiny_videonsa.build(tmp_path / "model", kv_heads=kv_heads)
    asked = list(prompts().values())[:3]
    with engine(path, {}, **OURS) as llm:
        want = [(ask(llm, [prompt])[0], last_reports(llm)[0]) for prompt in asked]
    with engine(path, {}, tensor_parallel_size=2, **OURS) as llm:
        for prompt, (answer, account) in zip(asked, want, strict=True):
            assert ask(llm, [prompt])[0].difference(answer) < CLOSE
            (report,) = last_reports(llm)
            assert report["flops"] == account["flops"]
            assert report["means"] == pytest.approx(account["means"], abs=1e-4)


def test_a_checkpoint_without_gates_is_refused(checkpoint, videonsa, tmp_path) -> None:
    with (
        pytest.raises(Exception, match=r"method=videonsa .* only a checkpoint trained for it has"),
        engine(checkpoint, {}, method="videonsa"),
    ):
        pass
    with (
        pytest.raises(Exception, match=r"method='adaspark'.* was trained for videonsa"),
        engine(videonsa, {}, method="adaspark", architecture=None),
    ):
        pass
    path = shutil.copytree(videonsa, tmp_path / "less")
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if ".2.self_attn.g_proj_1" in name]:
        del weights[name]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(Exception, match=r"lacks 2 weights.*layers\.2\.self_attn\.g_proj_1\.weight"),
        engine(path, {}, **OURS),
    ):
        pass


class FaithfulTwin(VideoNSATwin):
    """What the released code computes, as its transcription has it; decode is dense."""

    def _attend(self, q, k, v, normed, is_video, start, index) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        sizes = {"block_counts": self.config.block_counts}
        if start:
            nothing = torch.zeros_like(is_video), torch.zeros(*q.shape[:2], 3)
            result = reference.attention(
                q, k, v, nothing[1], nothing[0], window_size=self.config.window_size,
                scale=scale, tokens=range(start, len(q)), **sizes,
            )  # fmt: skip
            return result.output[start:].float()
        logits = self._gate_logits(normed, index)
        answer = faithful_reference.attend(
            q, k, v, is_video, logits, scale=scale, window=self.config.window_size, **sizes
        )
        return answer.output.float()


FAITHFUL = {"enable_chunked_prefill": False, "enable_prefix_caching": False}


def test_faithful_mode(videonsa, alone) -> None:
    """Equals the transcription of the released code, beside others and after preemption."""
    settings = {"mode": "faithful"}
    video = clip(40, seed=7)
    one = video_prompt(video, question="Which digit?")
    batch = [video_prompt(clip(36, seed=20 + i), question="What moves?") for i in range(4)]
    with engine(videonsa, settings, **FAITHFUL, **OURS) as llm:
        answer = ask(llm, [one], max_tokens=4, logprobs=20)[0]
        (report,) = last_reports(llm)
        text = ask(llm, [prompts()["text only"]])[0]
        want = ask(llm, batch, max_tokens=100)
        named = [one, prompts()["text only"], prompts()["two videos"], prompts()["image"]]
        singly = [ask(llm, [prompt])[0] for prompt in named]
        for got, expected in zip(ask(llm, named), singly, strict=True):
            assert got.difference(expected) < CLOSE
    assert text.difference(alone["text only"]) == 0
    assert report["settings"]["mode"] == "faithful"
    assert all(report["flops"]["executed"][branch] > 0 for branch in (*BRANCHES, "gates", "text"))
    config = VideoNSASettings(
        mode="faithful",
        block_counts=tiny_videonsa.BLOCK_COUNTS,
        window_size=tiny_videonsa.WINDOW_SIZE,
    )
    twin = FaithfulTwin(videonsa, config)
    expected = twin.logprobs(chat(VIDEO, "Which digit?"), video, list(answer.ids))
    for step, (got, theirs) in enumerate(zip(answer.logprobs, expected, strict=True)):
        tokens = torch.tensor(list(got))
        difference = (theirs[tokens] - torch.tensor(list(got.values()))).abs().max()
        assert difference < CLOSE, f"step {step}: {difference}"
    options = {"num_gpu_blocks_override": 43, "max_model_len": 2048, "disable_log_stats": False}
    with engine(videonsa, settings, **FAITHFUL, **OURS, **options) as llm:
        together = ask(llm, batch, max_tokens=100)
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0
    for got, theirs in zip(together, want, strict=True):
        assert got.ids[:3] == theirs.ids[:3] and got.difference(theirs) < CLOSE


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_chunked_prefill": True}, r"chunked prefill, because .*--no-enable-chunked"),
        ({"enable_prefix_caching": True}, r"prefix caching, because .*--no-enable-prefix"),
        ({"tensor_parallel_size": 2}, r"--tensor-parallel-size 2, because"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            r"--speculative-config, which nobody",
        ),
    ],
)
def test_faithful_mode_refuses_at_start(videonsa, options, message) -> None:
    arguments = EngineArgs(
        model=str(videonsa),
        max_model_len=4096,
        max_num_batched_tokens=4096,
        additional_config={"adaspark": {"mode": "faithful"}},
        **FAITHFUL | options,
    )
    with pytest.raises(Exception, match=f"mode=faithful does not support {message}"):
        arguments.create_engine_config()
