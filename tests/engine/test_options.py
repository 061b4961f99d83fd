"""Options of vLLM's that change what layers see or compute: quantized weights, LoRA, drafts.

Every method must answer with them as it does without: a quantized checkpoint as its rounded weights
do, a LoRA adapter as weights into which it was merged, and drafts as none.
"""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint as demo_checkpoint  # examples/demo
import pytest
import tiny_lora
import tiny_quantized
import tiny_videonsa
import torch

from engine.engines import SPARSE, Answer, ask, chat, clip, engine, last_reports, video_prompt

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
TOKENS = 16
# The server's settings of each method, and how an engine is told to use it.
METHODS = {
    "adaspark": (SPARSE, {}),
    "adatp": ({"layers": [2, 4], "keep": [0.5, 0.4], "tau_s": 0.9995}, {"method": "adatp"}),
    "videonsa": ({}, {"method": None, "architecture": None}),
    "prune": (SPARSE | {"prune": 0.5}, {}),
}
STEP = {"adatp": 1024}  # tokens; its prompts come in one step, the others' in chunks
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


def prompts() -> list[dict]:
    return [
        video_prompt(clip(44, seed=7), question="Which digit?"),
        video_prompt(clip(20, seed=8), question="What?"),
        {"prompt": chat("Which number is shown?")},
    ]


def running(checkpoint: Path, method: str, **options):
    settings, named = METHODS[method]
    step = STEP.get(method, 512)
    return engine(checkpoint, settings, max_num_batched_tokens=step, **named, **options)


def answers(checkpoint: Path, method: str, **options) -> list[Answer]:
    """To each prompt alone."""
    with running(checkpoint, method, **options) as llm:
        return [ask(llm, [prompt], max_tokens=TOKENS)[0] for prompt in prompts()]


def all_equal(got: list[Answer], want: list[Answer]) -> None:
    differences = [mine.difference(its) for mine, its in zip(got, want, strict=True)]
    assert max(differences) < CLOSE, differences


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A small float32 model for each method, whose weights are what int4 can hold."""
    path = tmp_path_factory.mktemp("options")
    shape = {"vision_layers": 2, "intermediate": 704}  # multiples of 32, as int4 needs
    made = demo_checkpoint.build(path / "made", dtype="float32", seed=3, layers=6, **shape)
    learned = tiny_videonsa.build(path / "learned", **shape)
    plain, gated = (
        tiny_quantized.build(checkpoint, path / f"{checkpoint.name}4", "AWQ")[1]
        for checkpoint in (made, learned)
    )
    return {"adaspark": plain, "adatp": plain, "videonsa": gated, "prune": plain}


@pytest.fixture(scope="module")
def plain(checkpoints):
    """A method's answers, by name, without any option."""
    known: dict[str, list[Answer]] = {}

    def of(method: str) -> list[Answer]:
        if method not in known:
            known[method] = answers(checkpoints[method], method)
        return known[method]

    return of


# -- quantized weights -----------------------------------------------------------------------------


def naive_gemm(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
    """vLLM's CPU kernel for int4 weights, which needs AVX-512, from its own layout of them."""
    if not hasattr(q_weight, "naive"):
        q_weight.naive = unpacked(q_weight, scales, zeros, pack_factor, input.shape[-1])
    output = input.float() @ q_weight.naive
    return (output if bias is None else output + bias).to(input.dtype)


def unpacked(q_weight, scales, zeros, pack_factor: int, inputs: int) -> torch.Tensor:
    """``[inputs, outputs]`` float32."""
    packed = q_weight.view(-1, inputs, 16 // pack_factor).permute(1, 0, 2).reshape(inputs, -1)
    nibbles = 4 * torch.arange(pack_factor)

    def unpack(words):
        return (words[..., None] >> nibbles & 15).flatten(-2).float()

    group = inputs // len(scales)
    zero = 8.0 if zeros is None else unpack(zeros).repeat_interleave(group, 0)
    return (unpack(packed) - zero) * scales.float().repeat_interleave(group, 0)


@pytest.mark.parametrize(
    "method, kind",
    [("adaspark", "compressed-tensors int4"), ("adatp", "GPTQ"), ("videonsa", "AWQ")],
)
def test_int4_weights(checkpoints, plain, tmp_path, monkeypatch, method, kind) -> None:
    """They answer as the same numbers in float32, with a naive kernel in place of vLLM's."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    monkeypatch.setattr(_custom_ops, "cpu_gemm_wna16", naive_gemm)
    for config in (AutoAWQConfig, AutoGPTQConfig):  # no float32, because of their GPU kernels
        monkeypatch.setattr(config, "get_supported_act_dtypes", lambda *_: [torch.float32])
    quantized, _ = tiny_quantized.build(checkpoints[method], tmp_path, kind)
    with running(quantized, method) as llm:
        got = [ask(llm, [prompt], max_tokens=TOKENS)[0] for prompt in prompts()]
        reports = last_reports(llm, 3)
    assert [report["mode"] for report in reports] == ["sparse", "sparse", "dense"]
    all_equal(got, plain(method))


def test_int8_weights(checkpoints, tmp_path) -> None:
    """With vLLM's own kernel, which rounds each token's input to int8, too."""
    quantized, _ = tiny_quantized.build(
        checkpoints["adaspark"], tmp_path, "compressed-tensors int8"
    )
    options = {"max_num_batched_tokens": 512}
    with engine(quantized, None, **options) as llm:
        stock = [ask(llm, [prompt], max_tokens=TOKENS)[0] for prompt in prompts()]
    video = clip(44, seed=7)
    with engine(quantized, SPARSE, **options) as llm:
        off = ask(llm, [video_prompt(video, question="Which digit?", off=True)], max_tokens=TOKENS)
        text = ask(llm, prompts()[2:], max_tokens=TOKENS)
        all_equal([*off, *text], [stock[0], stock[2]])
        sparse = ask(llm, prompts()[:1], max_tokens=TOKENS)[0]
        (report,) = last_reports(llm)
        again = ask(llm, prompts(), max_tokens=TOKENS)[0]
    assert report["ffn_density"] < 0.7 and sparse.difference(stock[0]) > CLOSE
    assert again.difference(sparse) < CLOSE


def naive_fp8(self, layer, x, bias=None):
    """vLLM's CPU kernel for fp8 weights ``[inputs, outputs]``, which needs AMX."""
    weight, scale = (getattr(layer, name) for name in self.layer_param_names[:2])
    output = x.float() @ (weight.float() * scale)
    return (output if bias is None else output + bias).to(x.dtype)


def to_fp8(number: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (number.float() / scale).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("method", METHODS)
def test_fp8_weights(checkpoints, tmp_path, monkeypatch, method) -> None:
    """They answer as the same numbers in float32, with naive kernels in place of vLLM's."""
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8PerTensorScaledMMLinearKernel
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    kernel = CPUFp8PerTensorScaledMMLinearKernel
    monkeypatch.setattr(kernel, "is_supported", lambda *_: (True, None))
    monkeypatch.setattr(kernel, "can_implement", lambda *_: (True, None))
    monkeypatch.setattr(kernel, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(kernel, "apply_weights", naive_fp8)
    monkeypatch.setattr(_custom_ops, "scaled_fp8_quant", to_fp8)  # vLLM's CPU build has none
    monkeypatch.setattr(Fp8Config, "get_supported_act_dtypes", lambda *_: [torch.float32])
    quantized, rounded = tiny_quantized.build(checkpoints[method], tmp_path, "fp8")
    with running(quantized, method) as llm:
        got = [ask(llm, [prompt], max_tokens=TOKENS)[0] for prompt in prompts()]
        reports = last_reports(llm, 3)
    assert [report["mode"] for report in reports] == ["sparse", "sparse", "dense"]
    all_equal(got, answers(rounded, method))


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, number", [("adaspark", 2), ("adatp", 1), ("videonsa", 1), ("prune", 1)]
)
def test_adapters_answer_as_merged_ones(checkpoints, plain, tmp_path, method, number) -> None:
    """Adapters and none in one batch, whose layers see other tokens than the step has."""
    from vllm.lora.request import LoRARequest

    base = checkpoints[method]
    adapters, merged = [], []
    for seed in range(1, number + 1):
        path = tiny_lora.build(base, tmp_path / f"adapter{seed}", seed=seed)
        adapters.append(LoRARequest(f"adapter{seed}", seed, str(path)))
        merged.append(answers(tiny_lora.merge(base, path, tmp_path / f"merged{seed}"), method))
    first, last, none = merged[0], merged[-1], plain(method)
    for adapted in merged:
        assert min(a.difference(b) for a, b in zip(adapted, none, strict=True)) > CLOSE
    # One slot more than adapters: vLLM's CPU kernels take the last one for requests without any.
    with running(base, method, enable_lora=True, max_loras=3, max_lora_rank=8) as llm:
        alone = ask(llm, prompts()[:1], max_tokens=TOKENS, lora=adapters[:1])
        assert last_reports(llm)[0]["mode"] == "sparse"
        all_equal(alone, first[:1])
        mixed = [
            (0, adapters[0], first),
            (1, None, none),
            (0, adapters[-1], last),
            (2, adapters[-1], last),
            (1, adapters[0], first),
            (0, None, none),
        ]
        asked = [prompts()[which] for which, _, _ in mixed]
        got = ask(llm, asked, max_tokens=TOKENS, lora=[lora for _, lora, _ in mixed])
    all_equal(got, [want[which] for which, _, want in mixed])


# -- drafted tokens --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eagle(tmp_path_factory) -> dict:
    """A draft model that knows nothing, so that all of its tokens are refused."""
    path = tmp_path_factory.mktemp("eagle")
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "hidden_size": 256,
        "target_hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 448,
        "draft_vocab_size": 448,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return {
        "method": "eagle3",
        "model": str(path),
        "num_speculative_tokens": 3,
        "draft_load_config": {"load_format": "dummy"},
    }


@pytest.mark.parametrize("method", METHODS)
def test_drafts_looked_up_change_nothing(checkpoints, plain, method) -> None:
    options = {"speculative_config": NGRAM, "disable_log_stats": False}
    with running(checkpoints[method], method, **options) as llm:
        got = [ask(llm, [prompt], max_tokens=TOKENS)[0] for prompt in prompts()]
        together = ask(llm, prompts(), max_tokens=TOKENS)
        counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    all_equal(got, plain(method))
    all_equal(together, plain(method))
    drafted, taken = (
        counted[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted")
    )
    assert 0 < taken < drafted


@pytest.mark.parametrize("method", ["adaspark", "videonsa"])
def test_drafts_of_a_model_change_nothing(checkpoints, plain, eagle, method) -> None:
    with running(checkpoints[method], method, speculative_config=eagle) as llm:
        got = [ask(llm, [prompt], max_tokens=TOKENS)[0] for prompt in prompts()]
        tokens = [report["tokens"] for report in last_reports(llm, 3)]
    all_equal(got, plain(method))
    assert tokens[2] > len(prompts()[2]["prompt"].split()) + 3 * TOKENS  # the refused ones, too
