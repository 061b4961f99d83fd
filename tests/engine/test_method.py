"""A method of somebody else's (sliding_window.py), served, counted and traced by what is there."""

from __future__ import annotations

import pytest

from engine.engines import ask, clip, engine, last_reports, video_prompt
from vllm_adaspark.settings import SettingsError

pytestmark = pytest.mark.engine
METHOD = "engine.sliding_window:SlidingWindow"
WINDOW, SIZE = 2, 64


def test_a_toy_method_is_served_counted_and_traced(checkpoint) -> None:
    video = clip(112, seed=3)
    prompts = [video_prompt(video, window=window, trace=True) for window in (WINDOW, 1000)]
    with engine(checkpoint, {"window": WINDOW}, method=METHOD) as llm:
        sparse, everything = (ask(llm, [prompt])[0] for prompt in prompts)
        windowed, whole = last_reports(llm, 2)
        # Beside each other, and from the prefix cache: the same.
        again = ask(llm, prompts)
        (off,) = ask(llm, [video_prompt(video) | {"mm_processor_kwargs": {"adaspark": "off"}}])
        (stock_like,) = last_reports(llm)
        other = video_prompt(clip(24))
        ask(llm, [other, other | {"mm_processor_kwargs": {"adaspark": "off"}}])
        beside = last_reports(llm, 2)
        (traces,) = llm.collective_rpc("adaspark_traces")
        oldest = traces[-1]["id"]
        (heat,) = llm.collective_rpc("adaspark_trace", args=(oldest, "heat", "cube:20"))
        with pytest.raises(SettingsError, match=r"window=0.*1 to 1000"):
            ask(llm, [video_prompt(video, window=0)])
        with pytest.raises(SettingsError, match=r"unknown key 'p_attn'.*allowed: .*window"):
            ask(llm, [video_prompt(video, p_attn=0.5)])
    with engine(checkpoint, {"order": "cube", "p_attn": 1.0, "p_ffn": 1.0}) as llm:
        (dense,) = ask(llm, [video_prompt(video)])
    with engine(checkpoint, None) as llm:
        (stock,) = ask(llm, [video_prompt(video)])

    assert everything.difference(dense) < 1e-3 and off.difference(stock) < 1e-3
    assert sparse.difference(dense) > 1e-3
    assert again[0].difference(sparse) < 1e-3 and again[1].difference(everything) < 1e-3

    assert (windowed["mode"], whole["mode"]) == ("sparse", "dense")
    # Its steps have no plan, and yet its video is counted.
    assert stock_like["reason"] == "off"
    assert stock_like["video_tokens"] == windowed["video_tokens"] == 1680
    assert {report["mode"] for report in beside} == {"sparse", "dense"}
    assert [report["video_tokens"] for report in beside] == [360, 360]
    assert windowed["settings"] == {"window": WINDOW, "trace": True}
    assert windowed["attention_density"] == pytest.approx(density(windowed, WINDOW), abs=1e-6)
    assert windowed["flops_ratio"] < 1 == whole["flops_ratio"]
    for layer in heat["heat"]:  # shares of the cube's queries that attended to each cube
        assert sum(layer[:20]) == WINDOW and layer[18] == layer[19] == 1.0


def density(report: dict, window: int) -> float:
    """Kept over seen cubes, token by token; text sees all of them."""
    tokens, video = report["tokens"], report["video_tokens"]
    first = 15  # tokens of the chat template before the video
    is_video = [first <= token < first + video for token in range(tokens)]
    cubes = {b for b in range(tokens // SIZE) if all(is_video[b * SIZE : (b + 1) * SIZE])}
    kept = seen = 0
    for token in range(tokens):
        before = sum(b < token // SIZE for b in cubes)
        seen += before
        kept += min(before, window) if token // SIZE in cubes else before
    return kept / seen


def test_a_method_that_is_not_there(checkpoint) -> None:
    with (
        pytest.raises(Exception, match=r"method='no.such:Method': no such method.*adaspark"),
        engine(checkpoint, {}, method="no.such:Method"),
    ):
        pass
