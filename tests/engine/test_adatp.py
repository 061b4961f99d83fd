"""AdaTP in the real engine: against the twin, whatever shares the step, and against itself."""

from __future__ import annotations

import json
import re

import checkpoint as demo_checkpoint  # examples/demo
import numpy as np
import pytest
import tiny_siglip
import torch
import video as demo_video  # examples/demo

from engine.adatp_twin import PrunedTwin
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
from vllm_adaspark.cli import main
from vllm_adaspark.cli.offline import CHUNK_BLOCKS
from vllm_adaspark.methods.adatp.encoder import SiglipEncoder
from vllm_adaspark.methods.adatp.settings import AdaTPSettings
from vllm_adaspark.traces import reader
from vllm_adaspark.traces.trace import unpack_bits

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
VIDEO_TOKENS = 360  # of a clip of 24 frames
DECODE = 9  # the prompt's token and 8 decode steps
SERVER = {"layers": [2, 4], "keep": [0.5, 0.4], "tau_s": 0.9995}
QUESTION = "What is shown?"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A small float32 Qwen2.5-VL with layers to drop tokens between."""
    path = tmp_path_factory.mktemp("adatp")
    return demo_checkpoint.build(path, dtype="float32", seed=3, layers=6, vision_layers=2)


@pytest.fixture(scope="module")
def twin(deep) -> PrunedTwin:
    return PrunedTwin(deep)


@pytest.fixture(scope="module")
def llm(deep):
    # 1,024 tokens in a step: prompts of 400 tokens come staggered, beside decoding ones.
    with engine(deep, SERVER, method="adatp", max_num_batched_tokens=1024) as running:
        yield running


def prompt(video, question: str = QUESTION, **settings) -> dict:
    return video_prompt(video, question=question, **settings)


def equals_twin(
    twin: PrunedTwin, answer: Answer, video, question: str = QUESTION, **settings
) -> list[list[int]]:
    """Compare an answer with the twin's; returns the twin's survivors after each event."""
    config = AdaTPSettings().override(SERVER).override(settings or None)
    layers, shares = config.layers, (config.keep[0], config.keep[0] * config.keep[-1])
    shares = shares[: len(layers)]
    text = chat(VIDEO, question)
    if not config.enabled or video is None:
        layers = shares = ()
        text = text if video is not None else question
    expected = twin.logprobs(text, video, list(answer.ids), config, layers, shares)
    difference = max(
        abs(float(want[token]) - got)
        for want, step in zip(expected, answer.logprobs, strict=True)
        for token, got in step.items()
    )
    assert difference < CLOSE, f"{settings}: {difference}"
    return twin.alive


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dedup": "off"},
        {"dedup": "all", "refill": True, "keep": [0.7, 0.6]},
        {"queries": "last", "tau_s": 1.5},
        {"layers": [3], "keep": 0.3, "tau_s": -1},
        {"enabled": False, "layers": [2, 9]},
    ],
    ids=["default", "by rank", "refilled", "last", "one event", "off"],
)
def test_answers_equal_the_twin(llm, twin, settings) -> None:
    video = clip(24, seed=4)
    answer = ask(llm, [prompt(video, **settings)], max_tokens=DECODE)[0]
    alive = equals_twin(twin, answer, video, **settings)
    (report,) = last_reports(llm)
    layers = [layer.get("means", {}).get("alive", 1.0) for layer in report["layers"]]
    if settings.get("enabled", True):
        assert report["mode"] == "sparse"
        config = AdaTPSettings().override(SERVER).override(settings or None)
        left, event = [], 0
        for layer in range(6):
            left.append(1.0 if event == 0 else len(alive[event - 1]) / report["video_tokens"])
            event += layer + 1 in config.layers
        assert layers == pytest.approx(left)
    else:
        assert (report["mode"], report["reason"]) == ("dense", "off")


def ten_requests() -> list[tuple[dict, object, str, dict]]:
    """(prompt, video, question, settings); video None where there is none."""
    words = "Which number is shown on the card? " * 20
    image = five_prompts()["image"]
    asked: list[tuple[object, str, dict]] = [
        (clip(24), QUESTION, {}),
        (clip(24), "Describe the video.", {}),
        (clip(36, seed=1), "Which digit is shown on the card?", {"keep": [0.3, 0.9]}),
        (clip(24), QUESTION, {"enabled": False}),
        (clip(10, seed=2), QUESTION, {"dedup": "off"}),
        (clip(24, seed=5), QUESTION, {"layers": [1], "keep": 0.25}),
        (clip(24), QUESTION, {"layers": [3], "keep": 0.4, "queries": "last"}),
        (clip(2, seed=6), "What?", {}),
    ]
    made = [(prompt(video, text, **named), video, text, named) for video, text, named in asked]
    made.insert(1, ({"prompt": chat(words)}, None, chat(words), {}))
    return [*made, (image, None, "", {})]


def test_a_batch_of_all_kinds(llm, twin) -> None:
    """Pruned, dense, text-only and image prompts beside each other and beside decoding ones."""
    asked = ten_requests()
    answers = ask(llm, [each[0] for each in asked], max_tokens=DECODE)
    for answer, (_, video, question, settings) in zip(answers[:-1], asked, strict=False):
        equals_twin(twin, answer, video, question, **settings)
    assert answers[-1].difference(ask(llm, [asked[-1][0]], max_tokens=DECODE)[0]) < CLOSE
    modes = {report["mode"] for report in last_reports(llm, 11)}
    assert modes == {"sparse", "dense"}


def test_nobody_shares_a_pruned_requests_blocks(llm, twin) -> None:
    """The same request again, another question, and clients with one salt."""
    video = clip(30, seed=7)
    for question, salt in ((QUESTION, None), (QUESTION, None), ("And now?", None),
                           (QUESTION, "same"), (QUESTION, "same")):  # fmt: skip
        asked = prompt(video, question) | ({"cache_salt": salt} if salt else {})
        answer = ask(llm, [asked], max_tokens=DECODE)[0]
        assert answer.cached_tokens == 0
        equals_twin(twin, answer, video, question)


def test_a_trace_says_which_tokens_went_on(llm, twin) -> None:
    video = clip(24, seed=4)
    answer = ask(llm, [prompt(video, trace=True)], max_tokens=DECODE)[0]
    alive = [range(VIDEO_TOKENS), *equals_twin(twin, answer, video)]
    trace = reader.read_offline(llm)
    (facts,) = llm.collective_rpc("adaspark_trace", args=(trace["id"], "ffn"))
    segments, depths = trace["dropping"]["segments"], [0, 0, 1, 1, 2, 2]
    assert trace["dropping"]["layers"] == [1, 3], "counted from 0, as in the rest of a trace"
    for packed, depth in zip(facts["ran"], depths, strict=True):
        bits = unpack_bits(np.frombuffer(packed, np.uint8), VIDEO_TOKENS)
        assert np.flatnonzero(bits).tolist() == [*alive[depth]]
    for event in (0, 1):
        assert sum(each["kept"][event] for each in segments) == len(alive[event + 1])
    assert [edge for each in segments for edge in each["frames"]] == (
        [0, *(edge for each in segments[1:] for edge in [each["frames"][0]] * 2), 12]
    )
    assert {each["relevance"] for each in segments} == {None}, "there is no encoder"
    # What the question attends of each cube is what is left of it.
    seen = np.zeros(VIDEO_TOKENS)
    seen[alive[2]] = 1
    first = trace["videos"][0]["offset"]
    for start, heat in zip(trace["cube_starts"], trace["heat"]["question"]["heat"][5], strict=True):
        assert heat == pytest.approx(seen[start - first :][:64].mean(), abs=1e-4)
    assert trace["usage"]["means"]["alive"] == pytest.approx(np.mean(facts["share"]), abs=1e-3)
    ask(llm, [prompt(video, trace=True, off=True)])
    off = reader.read_offline(llm)
    assert off["id"] != trace["id"] and off["usage"]["mode"] == "dense"


def test_two_videos(llm) -> None:
    """Segments end with their video, and text between two videos stays."""
    asked = five_prompts()["two videos"]
    first = ask(llm, [asked])[0]
    assert ask(llm, [asked])[0].difference(first) < CLOSE
    (report,) = last_reports(llm)
    assert report["mode"] == "sparse" and report["layers"][-1]["means"]["alive"] < 0.25


def test_why_a_prompt_ran_dense(llm, twin) -> None:
    from vllm import SamplingParams

    video = clip(24)
    silent = {
        "prompt": "<|im_start|>user\n<|vision_start|><|video_pad|>",
        "multi_modal_data": {"video": [video]},
    }
    ask(llm, [silent])
    (report,) = last_reports(llm)
    assert (report["mode"], report["reason"]) == ("dense", "no_text")
    assert report["flops_ratio"] == 1
    wants = SamplingParams(max_tokens=1, prompt_logprobs=1)
    llm.generate([prompt(video)], wants, use_tqdm=False)
    (report,) = last_reports(llm)
    assert (report["mode"], report["reason"]) == ("dense", "prompt_logprobs")


@pytest.mark.parametrize(
    ("frames", "settings", "message"),
    [
        (80, {}, "this prompt has 12.. tokens.*1024 tokens in a step.*--max-num-batched-tokens"),
        (24, {"layers": [2, 6]}, "this model has 6 layers"),
        (24, {"keep": [0.5, 0.5, 0.5]}, "3 shares for 2 layers"),
        (24, {"flops": 0.1}, "flops=0.1 cannot be met.*the smallest budget that can is 0"),
        (24, {"p_attn": 0.5}, "unknown key 'p_attn'"),
    ],
)
def test_refused_requests(llm, frames, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ask(llm, [prompt(clip(frames), **settings)])


def test_a_prompt_no_step_can_hold_runs_when_pruning_is_off(llm, twin) -> None:
    video = clip(80)
    answer = ask(llm, [prompt(video, enabled=False)], max_tokens=DECODE)[0]
    equals_twin(twin, answer, video, enabled=False)


def test_keeping_everything_is_the_stock_model(deep, llm) -> None:
    asked = [prompt(clip(24)), prompt(clip(10, seed=2)), {"prompt": chat("How many? " * 9)}]
    everything = [
        each | {"mm_processor_kwargs": {"adaspark": {"keep": 1.0, "dedup": "off"}}}
        for each in asked[:2]
    ]
    mine = [ask(llm, [each], max_tokens=DECODE)[0] for each in (*everything, asked[2])]
    # Nor is anything scored for them beside a prompt that loses tokens after the same layers.
    ask(llm, [*everything, prompt(clip(16))])
    scored = [each["flops"]["executed"]["selection"] for each in last_reports(llm, 3)]
    assert sorted(flops > 0 for flops in scored) == [False, False, True]
    with engine(deep, None, max_num_batched_tokens=1024) as stock:
        for got, each in zip(mine, asked, strict=True):
            want = ask(stock, [each], max_tokens=DECODE)[0]
            assert (got.ids, got.logprobs) == (want.ids, want.logprobs)


def test_preempted_requests_are_computed_again(deep, llm, twin) -> None:
    """Generated tokens follow the prompt then, and must not be asked for scores."""
    clips = [clip(36, seed=20 + i) for i in range(4)]
    # Four prompts of 9 blocks each fit, their answers of up to two blocks more do not.
    options = {"num_gpu_blocks_override": 39, "max_model_len": 2048, "disable_log_stats": False}
    with engine(deep, SERVER, method="adatp", **options) as tight:
        answers = ask(tight, [prompt(video) for video in clips], max_tokens=100)
        assert sum(m.value for m in tight.get_metrics() if m.name == "vllm:num_preemptions") > 0
    for video, answer in zip(clips, answers, strict=True):
        equals_twin(twin, answer, video)


def test_decoding_is_compiled(deep, twin, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # Dynamo's graph; test_scheduling.py has Inductor's
    with engine(deep, SERVER, method="adatp", enforce_eager=False) as compiled:
        video = clip(24)
        answers = ask(compiled, [prompt(video), prompt(video, enabled=False)], max_tokens=DECODE)
    equals_twin(twin, answers[0], video)
    equals_twin(twin, answers[1], video, enabled=False)


def test_an_encoder_compares_frames_and_finds_what_is_asked(deep, twin, tmp_path) -> None:
    path = tiny_siglip.build(tmp_path)
    encoder = SiglipEncoder(str(path), torch.device("cpu"), torch.float32)
    video = clip(48, seed=9)
    shown = encoder.frames("", lambda: list(video[0][::2]))  # the first frame of each pair
    similar = torch.nn.functional.cosine_similarity(shown[:-1], shown[1:])
    tau = round(float(similar.sort().values[11:13].mean()), 6)  # a cut at half of the pairs
    settings = {"encoder": str(path), "tau_s": tau, "dedup": "off", "alpha_boost": 1.8}
    with engine(deep, SERVER | settings, method="adatp") as llm:
        for question in (QUESTION, "Where is the red circle?", QUESTION):
            answer = ask(llm, [prompt(video, question)], max_tokens=4)[0]
            twin.seen = shown, encoder.question(question)
            equals_twin(twin, answer, video, question, **settings)
            assert True in twin.about and False in twin.about
        (report,) = last_reports(llm)
        assert (report["settings"]["frames_by"], report["settings"]["relevance"]) == (
            "encoder",
            True,
        )
    twin.seen = None
    with (
        pytest.raises(Exception, match="encoder='/no/where'"),
        engine(deep, SERVER | {"encoder": "/no/where"}, method="adatp"),
    ):
        pass


def test_two_ranks_drop_what_one_does(deep, twin) -> None:
    """Each rank sees half of the heads; the score is the mean over all of them."""
    with engine(deep, SERVER, method="adatp", tensor_parallel_size=2) as ranks:
        for video in (clip(24), clip(36, seed=1)):
            answer = ask(ranks, [prompt(video)], max_tokens=4)[0]
            equals_twin(twin, answer, video)


def test_ask_computes_what_inspect_foretells(deep, tmp_path, capsys, monkeypatch) -> None:
    """The prompt is longer than the chunks that AdaSpark's are computed in."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    video = demo_video.write_mp4(tmp_path / "clip.mp4", seconds=40, fps=4, width=168, height=140)
    about = ["--model", str(deep), "--method", "adatp", "--cube", "4,4,2"]
    about += ["--layers", "2,4", "--keep", "0.5,0.4", "--dedup", "off"]
    assert main(["inspect", str(video), *about, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["video_tokens"] == 1200 and cost["prompt_tokens"] > CHUNK_BLOCKS * 32
    started = ["--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization", "0.3"]
    asked = ["ask", str(video), "What moves?", *about, *started, "--max-tokens", "4", "--dense"]
    assert main([*asked, "--picture", str(tmp_path / "heat.png")]) == 0
    out = capsys.readouterr().out
    shown = dict(re.findall(r"(?m)^([\w ,]+?) {2,}(.*)$", out))
    assert shown["video tokens alive"].split() == ["56.7%", "100.0%"]
    sparse, dense = (float(share.rstrip("%")) for share in shown["FLOPs of dense"].split())
    assert dense == 100 and sparse == pytest.approx(100 * cost["flops_ratio"], abs=2)
    assert (tmp_path / "heat.png").stat().st_size > 1000
