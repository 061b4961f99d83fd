"""``tune`` without an engine: statistics, what is chosen, and what is written."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import numpy as np
import pytest

from vllm_adaspark.cli import main, offline
from vllm_adaspark.cli.tune import _loss
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.tune import compare, grid, intervals, report
from vllm_adaspark.tune.engine import Asker
from vllm_adaspark.tune.grid import Contender
from vllm_adaspark.tune.questions import Question

STOCK = grid.Model(trained_for=None, config={}, takes_prune=True, layers=28)

# -- statistics -----------------------------------------------------------------------------------


def test_what_so_many_questions_could_miss() -> None:
    """A loss of ``unseen(n)`` shows nothing in n questions once in twenty runs."""
    for n in (20, 60, 300):
        assert (1 - intervals.unseen(n)) ** n == pytest.approx(0.05)
        assert intervals.unseen(n) == pytest.approx(3 / n, rel=0.1)


def test_all_alike_is_not_sure() -> None:
    loss = intervals.loss((video, 0) for video in range(10) for _ in range(6))
    assert (loss.value, loss.questions, loss.videos) == (0, 60, 10)
    assert loss.low == -loss.high and 0.04 < loss.high < 0.06
    needed = loss.needed(0.01)
    assert 290 < needed < 310
    assert intervals.loss((n, 0) for n in range(needed)).high <= 0.01
    assert intervals.loss((n, 0) for n in range(needed - 2)).high > 0.01


def test_a_loss_is_drawn_by_videos() -> None:
    """Six questions about one video that fail together are one thing that failed."""
    together = intervals.loss((v, int(v == 0)) for v in range(10) for _ in range(6))
    apart = intervals.loss((v, int(n == 0 and v < 6)) for v in range(10) for n in range(6))
    assert together.value == apart.value == pytest.approx(0.1)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    assert intervals.loss((n, (-1) ** n) for n in range(40)).value == 0
    # As wide as the smallest loss that could be missed, and needed() knows what is hopeless.
    assert apart.needed(0.1) is None and apart.needed(0.05) is None
    assert apart.needed(0.2) < apart.needed(0.15)


def test_intervals_hold_what_they_say() -> None:
    """Of losses that are rare, and of few videos, where a resample shows little or nothing: nine in
    ten intervals hold them.
    """
    rng = np.random.default_rng(0)
    rare = ((0.02, 0.0, 10, 6), (0.05, 0.02, 20, 3), (0.15, 0.05, 12, 5))
    for lost, won, videos, each in (*rare, *((0.15, 0.05, n, 60 // n) for n in (1, 2, 3, 5))):
        held = 0
        for _ in range(60):
            drawn = rng.choice([1, -1, 0], (videos, each), p=[lost, won, 1 - lost - won])
            loss = intervals.loss((v, int(x)) for v in range(videos) for x in drawn[v])
            held += loss.low <= lost - won <= loss.high
        assert held >= 54, (lost, won, held)


# -- comparisons ----------------------------------------------------------------------------------


def said(text: str, *places: dict[str, float], tokens: list[int] | None = None) -> dict:
    logs = [{token: math.log(p) for token, p in place.items()} for place in places]
    return {"text": text, "tokens": tokens or [1] * len(places), "logprobs": logs}


def test_lost_and_won() -> None:
    known = Question(Path("v"), "v", "?", ("3",))
    unknown = replace(known, answers=())
    answers = {name: said(name) for name in ("3", "4", "5")}
    for before, after, with_answer, without in (
        ("3", "3", 0, 0), ("3", "4", 1, 1), ("4", "3", -1, 1), ("4", "5", 0, 1), ("4", "4", 0, 0),
    ):  # fmt: skip
        assert compare.lost(known, answers[before], answers[after]) == with_answer
        assert compare.lost(unknown, answers[before], answers[after]) == without


def test_divergence_of_the_first_tokens() -> None:
    p, q = {"1": 0.7, "2": 0.3}, {"1": 0.4, "2": 0.6}
    kl = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    assert compare.divergence(said("a", p), said("a", q)) == pytest.approx(kl, rel=1e-6)
    assert compare.divergence(said("a", p), said("a", p)) == pytest.approx(0, abs=1e-9)
    # Places after the first token that differs had other tokens before them.
    later = compare.divergence(
        said("a", p, p, tokens=[1, 1]), said("b", q, {"3": 1.0}, tokens=[2, 1])
    )
    assert later == pytest.approx(kl, rel=1e-6)
    both = compare.divergence(said("a", p, p), said("a", q, p))
    assert both == pytest.approx(kl / 2, rel=1e-6)
    # Tokens that only one of them tells count together: never more than the true divergence.
    true_p, true_q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.2, 0.3, 0.4])
    exact = float((true_p * np.log(true_p / true_q)).sum())
    few = compare.divergence(
        said("a", {"0": 0.5, "1": 0.3}), said("a", {"3": 0.4, "2": 0.3, "1": 0.2})
    )
    assert 0 < few <= exact
    assert compare.divergence(said("a"), said("a")) is None


def asked(videos: int = 10, each: int = 6) -> list[list[Question]]:
    return [
        [Question(Path(f"{v}.mp4"), f"{v}.mp4", f"What is {n}?", (str(n),)) for n in range(each)]
        for v in range(videos)
    ]


CONTENDERS = [
    Contender("dense", "adaspark", {"off": True}),
    grid.contender("adaspark", p_attn=0.8),
    grid.contender("adaspark", p_attn=0.4),
    grid.contender("adaspark", p_attn=0.1),
    grid.contender("adatp", flops=0.01),
]


def found_for(videos, contenders=CONTENDERS) -> list[compare.Outcome]:
    lines = {
        (c.name, some[0].name): fake_engine.line(c, some) for c in contenders for some in videos
    }
    return compare.outcomes(contenders, videos, lines)


def test_outcomes_count_what_was_answered() -> None:
    videos = asked()
    dense, mild, hard, worst, refused = found_for(videos)
    assert dense.right == dense.same == 1 and dense.kl == 0 and dense.loss.value == 0
    assert (dense.mode, mild.mode) == ("dense (off)", "sparse")
    texts = [fake_engine.answer(q, 0.1)["text"] for some in videos for q in some]
    lost = texts.count("lost") / len(texts)
    assert 0.3 < lost == pytest.approx(worst.loss.value) == pytest.approx(1 - worst.right)
    assert worst.kl > hard.kl >= mild.kl and worst.options is None
    assert worst.flops == pytest.approx(0.1) and worst.prefill == pytest.approx(0.2)
    assert worst.layers["attention"] == pytest.approx([1, 0.1, 0.1, 0.1])
    assert worst.added == pytest.approx([0.05 * 0.3 / 4, *[0.9 * 0.9 / 4] * 3])
    assert compare.first_dense(worst) == 1
    assert refused.loss is None and refused.refused == "flops=0.01 cannot be met"


def test_a_model_that_is_hardly_ever_right_is_judged_by_its_own_answers() -> None:
    """It answers in sentences, say: else the cheapest setting would lose nothing."""
    videos = [[replace(q, answers=("six",)) for q in some] for some in asked(40)]
    lines = {
        (c.name, some[0].name): fake_engine.line(c, known)
        for c in CONTENDERS
        for some, known in zip(videos, asked(40))
    }
    found = compare.outcomes(CONTENDERS, videos, lines)
    dense, _, _, worst, _ = found
    assert dense.right == 0 and not dense.by_answers and not worst.by_answers
    assert worst.loss.value == pytest.approx(1 - worst.same) and worst.loss.value > 0.3
    choice = compare.choose(found, 0.05)
    assert choice.outcome is not worst
    page = report.page(made(found, choice=choice))
    assert "Judged by whether answers are dense's own" in page and "only 0 % of" in page
    # One answer in five is enough to lose.
    for some in videos[::4]:
        some[:] = [replace(q, answers=(q.text.split()[-1].rstrip("?"),)) for q in some]
    dense, *_, worst, _ = compare.outcomes(CONTENDERS, videos, lines)
    assert dense.right == 0.25 and dense.by_answers and worst.loss.value < 0.2
    assert "Judged by" not in report.page(made(found_for(asked())))


def test_half_a_run_compares_what_is_there() -> None:
    videos = asked()
    lines = {
        (c.name, some[0].name): fake_engine.line(c, some)
        for c, number in zip(CONTENDERS[:3], (10, 4, 0))
        for some in videos[:number]
    }
    dense, mild, hard = compare.outcomes(CONTENDERS[:3], videos, lines)
    assert (dense.questions, mild.questions, hard.loss) == (60, 24, None)
    # What has not answered everything is not recommended.
    assert compare.choose([dense, mild, hard], 0.5).outcome is dense
    assert compare.choose(compare.outcomes(CONTENDERS, videos, {}), 0.5).outcome.loss is None


def test_the_cheapest_that_fits_is_taken() -> None:
    few, many = found_for(asked()), found_for(asked(200))
    assert many[2].loss.high < 0.2 < many[3].loss.low
    sure = compare.choose(many, 0.2)
    assert (sure.outcome, sure.sure, sure.maybe) == (many[2], True, None)
    # The estimate of 60 questions fits, and its interval reaches too far.
    del few[1]
    dense, hard, _, _ = few
    likely = compare.choose(few, hard.loss.value + 0.01)
    assert (likely.outcome, likely.sure) == (hard, False)
    assert likely.needed == hard.loss.needed(hard.loss.value + 0.01) > 60
    assert compare.choose(few, 0.0).outcome is dense
    both = compare.choose(many, many[2].loss.value + 1e-4)
    assert (both.outcome, both.sure, both.maybe) == (many[1], True, many[2])


# -- what is written ------------------------------------------------------------------------------


def found_without_mild() -> list[compare.Outcome]:
    dense, _, *others = found_for(asked())
    return [dense, *others]


def made(found, wanted: float = 0.2, **changes) -> report.Run:
    run = report.Run(
        model="some/model",
        videos=asked(),
        found=found,
        choice=compare.choose(found, wanted),
        wanted=wanted,
        left_out={"broken.mp4": "no frames"},
        flags=["--max-model-len 2048"],
        missing=0,
        about={"device": "a fake"},
        command="vllm-adaspark tune some/model clips",
    )
    return replace(run, **changes)


def test_the_page_says_what_to_take_and_how_sure_that_is(tmp_path: Path) -> None:
    run = made(found_without_mild())
    files = report.write(run, tmp_path)
    assert [file.name for file in files] == ["tune.md", "tune.json", "adaspark_config.json"]
    page = (tmp_path / "tune.md").read_text()
    assert "**Take adaspark p_attn=0.4**: it spends 40 % of the dense FLOPs" in page
    assert "60 questions about 10 videos" in page
    assert re.search(r"too few to be sure\*\* of at most 20 %: about [\d,]+ of this kind", page)
    assert "    vllm-adaspark serve some/model --p-attn 0.4 --max-model-len 2048" in page
    assert "adatp flops=0.01 did not run: flops=0.01 cannot be met" in page
    assert "left out: broken.mp4: no frames" in page
    assert (
        "The first layer keeps 90 % and more and could stay dense" in page
        and "still to come" not in page
    )
    told = json.loads((tmp_path / "tune.json").read_text())
    assert told["take"] == "adaspark p_attn=0.4" and told["sure"] is False
    assert told["questions_needed"] == run.choice.needed
    assert len(told["contenders"]) == 4
    settings = json.loads((tmp_path / "adaspark_config.json").read_text())
    assert settings == {"adaspark_config": {"p_attn": 0.4}}
    # A later report that says to keep dense leaves no settings of an earlier one behind.
    report.write(made(found_without_mild(), wanted=0.0, missing=3), tmp_path)
    assert not (tmp_path / "adaspark_config.json").exists()
    page = (tmp_path / "tune.md").read_text()
    assert "**Keep dense.** No setting that costs less lost at most 0 %" in page
    assert "3 of 40 are still to come" in page


@pytest.mark.parametrize(
    "contender",
    [
        grid.contender("adaspark", p_attn=0.3, p_ffn=0.5, prune=0.5),
        grid.contender("adaspark", selection="top_k", keep=0.2, cube=[8, 4, 4]),
        grid.contender("adatp", fastv=True, flops=0.3),
        grid.contender("adatp", layers=[2, 8], keep=[0.5, 0.4], refill=True, keep_budget=False),
        grid.contender("adatp", refill=False, keep_budget=True),
        grid.contender("adaspark", flops=None, trace=False, p_attn=0.3),
        grid.contender("adaspark", enabled=False),
    ],
)
def test_the_server_line_serves_it(contender: Contender, capsys) -> None:
    """Given to ``vllm-adaspark serve``, it comes to the contender's settings."""
    line = report.server_line(made(found_for(asked())), contender)
    program, *arguments = shlex.split(line)
    assert program == "vllm-adaspark" and main([*arguments, "--print"]) == 0
    shown = shlex.split(capsys.readouterr().out)
    told = json.loads(shown[shown.index("--additional-config") + 1])
    assert told.get("method", "adaspark") == contender.method
    config = grid.check(contender, STOCK, "here")
    assert type(config).settled(None, told["adaspark"]) == config


def test_what_a_checkpoint_can_say() -> None:
    for contender, want in (
        (grid.contender("adaspark", p_attn=0.3), {"p_attn": 0.3}),
        (grid.contender("videonsa", block_counts=4), {"block_counts": 4}),
        (grid.contender("adatp", flops=0.3), None),
        (CONTENDERS[0], None),
        (grid.contender("adaspark"), None),
    ):
        assert report.checkpoint_settings(contender) == want
    served = grid.contender("adaspark", p_attn=0.3, trace=True, report_file="/tmp/x")
    assert report.checkpoint_settings(served) == {"p_attn": 0.3}


@pytest.mark.parametrize(
    "trained, settings",
    [
        ({"p_attn": 0.9, "dense_layers": 1}, {"p_attn": 0.3, "prune": 0.5}),
        ({"importance": "norm", "p_ffn": 0.3}, {"paper": True}),
        ({"paper": True}, {"p_ffn": 0.4}),
        ({"p_attn": 0.9, "order": "raster"}, {"flops": 0.3}),
        ({"flops": 0.5, "cube": [2, 4, 8]}, {"selection": "top_k", "keep": 0.2}),
        ("off", {"p_attn": 0.3}),
    ],
)
def test_a_checkpoint_keeps_what_it_says_itself(trained, settings) -> None:
    said = report.checkpoint_settings(Contender("a", "adaspark", settings), trained)
    if isinstance(trained, str):
        assert said == settings
    else:
        want = AdaSparkConfig.settled(trained, settings).to_dict()
        assert AdaSparkConfig.settled(said, None).to_dict() == want


def test_questions_about_one_video_say_nothing_of_others(tmp_path: Path) -> None:
    videos = asked(videos=1, each=60)
    run = made(found_for(videos), videos=videos)
    assert "**All are about one video**" in report.verdict(run)
    assert "one video" not in report.verdict(made(found_for(asked())))


def test_the_picture_shows_something(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from vllm_adaspark.tune.picture import draw

    for found in (
        found_for(asked()),
        found_for(asked())[:1],
        compare.outcomes(CONTENDERS, asked(), {}),
    ):
        image = Image.open(draw(made(found), tmp_path)).convert("RGB")
        assert image.size[0] > 1000 and len(image.getcolors(1 << 24)) > 50


def test_names_are_words_and_nothing_else(tmp_path: Path) -> None:
    """Not a formula of matplotlib's, a column of the table, or two lines."""
    file = tmp_path / "grid.jsonl"
    file.write_text(json.dumps({"name": " $x^$\n|y ", "p_attn": 0.4}))
    mine = grid.read(file, STOCK)[1]
    found = found_without_mild()
    run = made([found[0], replace(found[1], contender=mine)])
    assert mine.name == "$x^$ |y" and "| **$x^$ \\|y** |" in report.page(run)
    pytest.importorskip("matplotlib")
    from vllm_adaspark.tune.picture import draw

    assert draw(run, tmp_path).exists()


@pytest.mark.parametrize(
    "text, want", [("1%", 0.01), ("1 %", 0.01), ("0.02", 0.02), ("0", 0), ("0.5%", 0.005)]
)
def test_a_loss_as_it_is_given(text: str, want: float) -> None:
    assert _loss(text) == pytest.approx(want)


@pytest.mark.parametrize("text", ["1", "-1%", "x", "1%%", "120%", ""])
def test_a_wrong_loss(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"1% or 0\.01"):
        _loss(text)


# -- what an engine sends -------------------------------------------------------------------------


class FakeLLM:
    """Answers "yes" to everything; the account is that of the request that ended last."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], dict]] = []

    def chat(self, conversations, sampling, use_tqdm, mm_processor_kwargs):
        if mm_processor_kwargs["adaspark"].get("flops") == 0.01:
            raise ValueError("flops=0.01 cannot be met")
        texts = [messages[0]["content"][1]["text"] for messages in conversations]
        self.calls.append((texts, mm_processor_kwargs))
        log = {7: SimpleNamespace(logprob=-0.1), 8: SimpleNamespace(logprob=-math.inf)}
        said = SimpleNamespace(text=" yes\n", token_ids=[7, 9], logprobs=[log, log])
        times = SimpleNamespace(queued_ts=1.0, first_token_ts=3.5)
        return [SimpleNamespace(outputs=[said], metrics=times) for _ in texts]


def test_an_asker_makes_lines_of_the_journal(monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    layer = {"attention_density": 0.25, "ffn_density": 0.5, "means": {"alive": 0.75}}
    parts = {"total": 10.0, "attention": 6.0, "ffn": 3.0}
    account = {
        "mode": "sparse",
        "reason": None,
        "layers": [layer] * 2,
        "flops": {"dense": parts, "executed": {"total": 4.0}},
    }
    monkeypatch.setattr(offline, "last_account", lambda llm: account)
    llm, (questions, *_) = FakeLLM(), asked(1, 20)
    job = SimpleNamespace(max_pixels=3136, max_tokens=4)
    asker = Asker(llm, job)
    line = asker.ask(grid.contender("adaspark", p_attn=0.3, dense_below=2), questions)
    json.loads(json.dumps(line))
    # The first alone, the others together; what only a server may set is the engine's.
    assert [len(texts) for texts, _ in llm.calls] == [1, 16, 3]
    assert llm.calls[0][1] == {"adaspark": {"p_attn": 0.3}, "max_pixels": 3136}
    assert [answer["question"] for answer in line["answers"]] == [q.prompt for q in questions]
    assert line["answers"][0] == {
        "question": questions[0].prompt,
        "text": "yes",
        "tokens": [7, 9],
        "logprobs": [{"7": -0.1, "8": -math.inf}] * 2,
    }
    assert line["prefill"] == 2.5 and line["memory"] > 1 << 20 and line["device"]
    cost = line["cost"]
    assert (cost["executed"], cost["dense"], cost["dense_attention"]) == (4.0, 10.0, 6.0)
    assert (cost["attention"], cost["ffn"], cost["alive"]) == ([0.25] * 2, [0.5] * 2, [0.75] * 2)
    refused = asker.ask(grid.contender("adatp", flops=0.01), questions)
    assert refused["refused"] == "flops=0.01 cannot be met" and "answers" not in refused
