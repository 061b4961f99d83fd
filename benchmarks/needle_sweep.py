"""What settings cost in accuracy and save in FLOPs, on the needle model: the tuning guide's curves.

    make needle-sweep                               # writes the JSON, and the guide's picture
    python benchmarks/needle_sweep.py --videos 4    # a quick look

Every contender answers the same held-out questions about the same real mp4 files, in one engine
(settings are per request), video by video in turn.  A video's first question computes all of it:
its account gives the densities.  The others find the video in the prefix cache.  One small model
that knows one kind of video: the order of contenders is worth more than their distance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NEEDLE = ROOT / "examples" / "needle"
sys.path.append(str(NEEDLE))

SKILLS = ("basic", "marked", "before", "order")  # those the model has learnt
DENSE = {"p_attn": 1.0, "p_ffn": 1.0}
BOTH = ((0.9, 0.8), (0.7, 0.5), (0.5, 0.5), (0.5, 0.3))
BUDGETS = (0.7, 0.5, 0.35)
CONTENDERS: dict[str, dict[str, dict]] = {
    "dense": {"stock order": {"off": True}, "cube order": DENSE},
    "attention, top_p": {f"p={p}": DENSE | {"p_attn": p} for p in (0.95, 0.9, 0.8, 0.7, 0.5, 0.3)},
    "attention, top_k": {
        f"keep={k}": DENSE | {"selection": "top_k", "keep": k} for k in (0.7, 0.5, 0.3)
    },
    "attention, uniform": {
        f"keep={k}": DENSE | {"selection": "uniform", "keep": k} for k in (0.7, 0.5, 0.3)
    },
    "FFN, mean": {f"p={p}": DENSE | {"p_ffn": p, "compensation": "mean"} for p in (0.8, 0.5, 0.3)},
    "FFN, bypass": {
        f"p={p}": DENSE | {"p_ffn": p, "compensation": "bypass"} for p in (0.8, 0.5, 0.3)
    },
    "both, mean": {
        f"p={a}/{f}": {"p_attn": a, "p_ffn": f, "compensation": "mean"} for a, f in BOTH
    },
    "both, bypass": {
        f"p={a}/{f}": {"p_attn": a, "p_ffn": f, "compensation": "bypass"} for a, f in BOTH
    },
    "budget, mean": {f"flops={f}": {"flops": f, "compensation": "mean"} for f in BUDGETS},
    "budget, bypass": {f"flops={f}": {"flops": f, "compensation": "bypass"} for f in BUDGETS},
}


def start(checkpoint: Path, tokens: int):
    """vLLM with the plugin, in this process."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # WARNING: two lines a request
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from vllm_adaspark import ARCHITECTURE

    length = -(-(tokens + 512) // 1024) * 1024
    return LLM(
        str(checkpoint),
        hf_overrides={"architectures": [ARCHITECTURE]},
        enforce_eager=True,
        max_model_len=length,
        max_num_batched_tokens=length,
        max_num_seqs=8,
        limit_mm_per_prompt={"video": 1, "image": 0},
        skip_mm_profiling=True,
        distributed_executor_backend="uni",
    )


def ask(llm, video, questions, settings: dict) -> tuple[list[str], dict]:
    """Answers to ``questions``, and the account of the first, which computes the video."""
    from evaluate import PROMPT
    from vllm import SamplingParams

    from vllm_adaspark.reports import merge_reports

    sampling = SamplingParams(max_tokens=4, temperature=0)
    prompts = [
        {
            "prompt": PROMPT.format(question.text),
            "multi_modal_data": {"video": [(video.frames, video.metadata)]},
            "mm_processor_kwargs": {"adaspark": settings},
        }
        for question in questions
    ]
    outputs = llm.generate(prompts[:1], sampling, use_tqdm=False)
    account = merge_reports(llm.collective_rpc("adaspark_report"))["requests"][-1]
    outputs += llm.generate(prompts[1:], sampling, use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs], account


def measure(checkpoint: Path, patches: int, videos: int) -> list[dict]:
    """One row per contender and setting."""
    from evaluate import held_out_video

    llm = start(checkpoint, patches * 16)
    right, cost = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for number in range(videos):
        video = held_out_video(number, patches, motion=("calm", "busy")[number % 2])
        questions = [question for question in video.asked if question.skill in SKILLS]
        for contender, by_name in CONTENDERS.items():
            for name, settings in by_name.items():
                answers, account = ask(llm, video, questions, settings)
                cost[contender, name].append(
                    [account[k] for k in ("attention_density", "ffn_density", "flops_ratio")]
                )
                for question, answer in zip(questions, answers, strict=True):
                    right[contender, name][question.skill].append(answer == question.answer)
        print(f"video {number + 1} of {videos}", flush=True)
    rows = []
    for (contender, name), by_skill in right.items():
        density, ffn, flops = np.mean(cost[contender, name], axis=0)
        answers = [answer for some in by_skill.values() for answer in some]
        rows.append(
            {
                "contender": contender,
                "setting": name,
                "tokens": patches * 16,
                "attention_density": float(density),
                "ffn_density": float(ffn),
                "flops_ratio": float(flops),
                "correct": sum(answers),
                "total": len(answers),
                "by_skill": {skill: [sum(some), len(some)] for skill, some in by_skill.items()},
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| contender | setting | cubes attended | FFN active | FLOPs | correct | "
        + " | ".join(SKILLS)
        + " |",
        "|" + "---|" * (6 + len(SKILLS)),
    ]
    for r in rows:
        skills = [f"{a}/{n}" for a, n in (r["by_skill"][skill] for skill in SKILLS)]
        lines.append(
            f"| {r['contender']} | {r['setting']} | {r['attention_density']:.0%} "
            f"| {r['ffn_density']:.0%} | {r['flops_ratio']:.0%} "
            f"| {r['correct'] / r['total']:.1%} | " + " | ".join(skills) + " |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy against FLOPs, a line per contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for contender in CONTENDERS:
        mine = sorted((r["flops_ratio"], r["correct"] / r["total"]) for r in rows
                      if r["contender"] == contender)  # fmt: skip
        axes.plot(*zip(*mine), marker="o", markersize=4, label=contender)
    axes.set_xlabel("executed FLOPs / dense FLOPs")
    axes.set_ylabel("correct answers")
    axes.set_title(
        f"Needle model, {rows[0]['tokens']:,} video tokens, {rows[0]['total']} questions"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=NEEDLE / "checkpoint")
    parser.add_argument("--patches", type=int, default=256, help="of 16 tokens each")
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/needle_sweep.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/needle_sweep.png")
    options = parser.parse_args()
    rows = measure(options.checkpoint, options.patches, options.videos)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, options.picture)
    print(table(rows))


if __name__ == "__main__":
    main()
