"""Runs of one benchmark under several settings, side by side: scores, differences, what they cost.

Plain data in, plain data and Markdown out; `compare.py` makes the runs.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

FLOPS_PARTS = ("attention", "ffn", "total")
RESAMPLES = 10_000
# What a task calls the given and the right answer, where it does not say `score` itself.
ANSWER_KEYS = (("pred_answer", "answer"), ("parsed_pred", "answer"))


@dataclass(frozen=True)
class Run:
    """One setting's answers.

    metrics: per task, each metric's value and standard error (None where lmms-eval has none).
    samples: per task, what lmms-eval logs of each question.
    records: what each question cost (`AdaSparkServer.records`).
    """

    name: str
    metrics: dict[str, dict[str, tuple[float, float | None]]]
    samples: dict[str, list[dict]]
    records: list[dict]


def metrics_of(results: dict) -> dict[str, dict[str, tuple[float, float | None]]]:
    """`Run.metrics` from lmms-eval's results; a group without a score of its own gets the mean."""
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for task, values in results["results"].items():
        found[task] = {}
        for key, value in values.items():
            metric, _, filtered_by = key.partition(",")
            if filtered_by and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    continue
                error = values.get(f"{metric}_stderr,{filtered_by}")
                known = isinstance(error, (int, float))
                found[task][metric] = (float(value), float(error) if known else None)
    for group, tasks in results.get("group_subtasks", {}).items():
        if tasks and not found.get(group):
            found[group] = _mean_of(found[task] for task in tasks if task in found)
    return {task: values for task, values in found.items() if values}


def _mean_of(parts) -> dict[str, tuple[float, None]]:
    values: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for metric, (value, _) in part.items():
            values[metric].append(value)
    return {metric: (float(np.mean(all_)), None) for metric, all_ in values.items()}


def score_of(value) -> float | None:
    """A question's score from what its task logged under a metric; None if it has none."""
    if isinstance(value, dict):
        for given, right in ANSWER_KEYS:
            if "score" not in value and given in value and right in value:
                return float(value[given] == value[right])
        value = value.get("score")
    return float(value) if isinstance(value, (int, float)) else None


def differences(reference: Run, other: Run, task: str, metric: str) -> np.ndarray:
    """Score of `other` minus score of `reference`, question by question; empty if there is none."""
    scores = [
        {
            sample["doc_id"]: score_of(sample[metric])
            for sample in run.samples.get(task, [])
            if metric in sample
        }
        for run in (reference, other)
    ]
    pairs = [(scores[0][at], scores[1][at]) for at in scores[0].keys() & scores[1].keys()]
    return np.array([b - a for a, b in pairs if a is not None and b is not None])


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    # One at a time: all resamples of a large benchmark at once would take gigabytes.
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def cost(run: Run, task: str) -> dict:
    """What a task's questions cost.

    Returns:
        `questions`, `failed`, `prompt_tokens` (mean), and `flops`: executed over dense FLOPs of the
        language model per part, or None if the server kept no accounts. Tokens that the prefix
        cache had are in neither count.
    """
    records = [record for record in run.records if record["task"] == task]
    answered = [record for record in records if record["error"] is None]
    accounts = [record["adaspark"]["flops"] for record in answered if record["adaspark"]]
    totals = {
        kind: {part: sum(account[kind][part] for account in accounts) for part in FLOPS_PARTS}
        for kind in ("executed", "dense")
    }
    shares = {
        part: totals["executed"][part] / totals["dense"][part]
        for part in FLOPS_PARTS
        if totals["dense"][part]
    }
    tokens = [record["prompt_tokens"] for record in answered]
    return {
        "questions": len(records),
        "failed": len(records) - len(answered),
        "prompt_tokens": float(np.mean(tokens)) if tokens else None,
        "flops": shares or None,
    }


def same_answers(reference: Run, other: Run, task: str) -> float | None:
    """Share of the questions that got word for word the same answer."""
    answers = [
        {sample["doc_id"]: sample["filtered_resps"] for sample in run.samples.get(task, [])}
        for run in (reference, other)
    ]
    shared = answers[0].keys() & answers[1].keys()
    return sum(answers[0][at] == answers[1][at] for at in shared) / len(shared) if shared else None


def compare(runs: list[Run]) -> dict:
    """All of it, JSON-ready; the first run is what the others are compared with."""
    reference, *others = runs
    tasks = {}
    for task, metrics in reference.metrics.items():
        scores = {}
        for metric in metrics:
            values = {run.name: run.metrics.get(task, {}).get(metric) for run in runs}
            scores[metric] = {"values": values, "differences": {}}
            for other in others:
                found = differences(reference, other, task, metric)
                if len(found):
                    low, high = interval(found)
                    told = {"mean": float(found.mean()), "low": low, "high": high, "n": len(found)}
                    scores[metric]["differences"][other.name] = told
        tasks[task] = {
            "scores": scores,
            "cost": {run.name: cost(run, task) for run in runs},
            "same_answers": {run.name: same_answers(reference, run, task) for run in others},
        }
    return {"settings": [run.name for run in runs], "tasks": tasks}


def markdown(compared: dict) -> str:
    """Two tables: scores, and what they cost."""
    reference, *others = compared["settings"]
    head = ["task", "metric", *compared["settings"]]
    head += [f"{name} − {reference}, points (95 %)" for name in others]
    rows = []
    for task, told in compared["tasks"].items():
        for metric, scores in told["scores"].items():
            values = [_value(scores["values"].get(name)) for name in compared["settings"]]
            gaps = [_gap(scores["differences"].get(name)) for name in others]
            rows.append([task, metric, *values, *gaps])
    head2 = ["task", "setting", "questions", "failed", "prompt tokens"]
    head2 += [f"{part} FLOPs" for part in FLOPS_PARTS] + [f"answers as {reference}"]
    rows2 = []
    for task, told in compared["tasks"].items():
        for name, spent in told["cost"].items():
            if not spent["questions"]:  # a group: its tasks have rows of their own
                continue
            flops = spent["flops"] or {}
            rows2.append(
                [
                    *(task, name, str(spent["questions"]), str(spent["failed"])),
                    "–" if spent["prompt_tokens"] is None else f"{spent['prompt_tokens']:.0f}",
                    *(_percent(flops.get(part)) for part in FLOPS_PARTS),
                    _percent(told["same_answers"].get(name)),
                ]
            )
    return f"{_table(head, rows)}\n{_table(head2, rows2)}"


def _value(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "–"
    mean, error = value
    return f"{mean:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _gap(told: dict | None) -> str:
    if told is None:
        return "–"
    mean, low, high = (100 * told[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
