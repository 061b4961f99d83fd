"""From the accounts of single ranks to what a reader wants: one account, its mode, its settings.

Every rank counts what it did: a tensor-parallel rank has its own KV heads, a pipeline stage its own
layers.  They send bare counts (``Account.to_counts``); here ranks of the same layers are averaged
and stages put one after the other.  No vLLM, so that a client can read what workers sent::

    report = merge_reports(llm.collective_rpc("adaspark_report"))
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np

from .account import BY_NAME, PER_LAYER, SECONDS, Account

# Why a method that must see a whole prompt at once let it run dense (docs/adatp.md).
PROMPT_REASONS = ("no_text", "one_step", "prompt_logprobs")
# Why a request ran dense.  "fallback": its cubes were cut by chunk edges, or its text was too long.
# "cached": all of its video came from the prefix cache, and its text leaves nothing out.
DENSE_REASONS = ("no_video", "off", "few_cubes", "cached", "fallback", *PROMPT_REASONS)


def merge_ranks(accounts: Sequence[dict[str, Any]]) -> Account:
    """One account of a request, or of all, from the counts of each rank of an engine.

    Counts that ranks share are the first's.  Seconds are averaged over tensor-parallel ranks, which
    work at the same time, and added over pipeline stages.

    Raises:
        ValueError: no accounts, or layers that do not follow one another.
    """
    stages: dict[int, list[Account]] = defaultdict(list)
    for counts in accounts:
        account = Account.from_counts(counts)
        stages[account.layers.start].append(account)
    if not stages:
        raise ValueError("no accounts to merge")
    merged = Account.from_counts(accounts[0])
    ordered = [stages[start] for start in sorted(stages)]
    for stage, following in pairwise(ordered):
        if stage[0].layers.stop != following[0].layers.start:
            raise ValueError(f"layers {stage[0].layers} and {following[0].layers} do not join")
    merged.layers = range(ordered[0][0].layers.start, ordered[-1][0].layers.stop)
    for name in PER_LAYER:
        parts = [np.mean([getattr(a, name) for a in stage], axis=0) for stage in ordered]
        setattr(merged, name, np.concatenate(parts))
    for name in BY_NAME:
        setattr(
            merged, name, {part: _joined(ordered, name, part) for part in _parts(ordered, name)}
        )
    for name in SECONDS:
        seconds = [np.mean([getattr(a, name) for a in stage]) for stage in ordered]
        setattr(merged, name, float(sum(seconds)))
    return merged


def _parts(stages: list[list[Account]], name: str) -> list[str]:
    """The parts that some rank has told, in the order of the first that did."""
    return list(dict.fromkeys(part for stage in stages for a in stage for part in getattr(a, name)))


def _joined(stages: list[list[Account]], name: str, part: str) -> np.ndarray:
    """One told part of all layers: averaged over a stage's ranks, which have parts of its heads."""
    nothing = [np.zeros(len(stage[0].layers)) for stage in stages]
    return np.concatenate(
        [
            np.mean([getattr(a, name).get(part, none) for a in stage], axis=0)
            for stage, none in zip(stages, nothing, strict=True)
        ]
    )


def merge_engines(accounts: Iterable[Account]) -> Account:
    """The sum of accounts of the same request (its n > 1 answers) from data-parallel engines."""
    first, *others = accounts
    total = Account.from_counts(first.to_counts())
    for account in others:
        total.merge(account)
    return total


def merge_reports(reports: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One report from what ``collective_rpc("adaspark_report")`` returned.

    Returns:
        ``total``: all requests together (``Account.report``); ``requests``: the last finished and
        the running ones, oldest first, each as :func:`request_report`.

    Raises:
        ValueError: no rank keeps accounts, as with another ``--worker-cls``.
    """
    ranks = [report for report in reports if report is not None]
    if not ranks:
        raise ValueError("no worker keeps accounts: leave --worker-cls out")
    by_request: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        for entry in rank["requests"]:
            by_request.setdefault(entry["request_id"], []).append(entry)
    return {
        "total": merge_ranks([rank["total"] for rank in ranks]).report(),
        "requests": [
            request_report(
                name, merge_ranks([e["counts"] for e in entries]), entries[0]["finished"]
            )
            for name, entries in by_request.items()
        ],
    }


def request_report(request_id: str, account: Account, finished: bool) -> dict[str, Any]:
    """What a request cost, per layer and in all, JSON-ready."""
    return {"request_id": request_id, "finished": finished, **usage(account, layers=True)}


def append_line(path: str, line: str) -> None:
    """Add a line to a file: all of it, or nothing.

    Raises:
        OSError: it cannot be written, for lack of space for instance.
    """
    data = f"{line}\n".encode()
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END) if file.seekable() else 0
        try:
            written = file.write(data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):  # a part of a line would spoil the next one, too
                file.truncate(end)
            raise


def part_of_model(layers: range, num_layers: int, ranks: int) -> str | None:
    """What one rank's account leaves out, in words; None if it is the whole.

    Args:
        layers: this rank's.
        num_layers: of the model.
        ranks: of tensor parallelism.
    """
    parts = []
    if len(layers) < num_layers:
        parts.append(f"layers {layers[0]} to {layers[-1]} of {num_layers}")
    if ranks > 1:
        parts.append(f"the choices of tensor-parallel rank 0 of {ranks}")
    return " and ".join(parts) or None


def usage(account: Account, *, layers: bool = False) -> dict[str, Any]:
    """What a request cost: ``Account.report`` with its mode, settings and budget, JSON-ready."""
    mode, reason = mode_of(account)
    report = account.report()
    if not layers:
        del report["layers"]
    told = account.settings
    settings = None if told is None else shown_settings(told)
    budget = None if told is None else told.get("budget")
    return {"mode": mode, "reason": reason, **report, "settings": settings, "budget": budget}


def means_by_layer(account: Account) -> dict[str, list[float]]:
    """``Account.means``, JSON-ready."""
    return {name: means.tolist() for name, means in account.means().items()}


def shown_settings(told: dict[str, Any]) -> dict[str, Any]:
    """Of what a method tells of a request (``Method.told``), what users see as its settings."""
    return {key: value for key, value in told.items() if key not in ("budget", "off")}


def mode_of(account: Account) -> tuple[str, str | None]:
    """``("sparse", None)``, or ``("dense", reason)`` when nothing could be left out."""
    if account.choices or (account.settings or {}).get("prune"):
        return "sparse", None
    if account.settings is None:
        return "dense", "no_video"
    if account.settings["off"]:
        return "dense", "off"
    for reason in PROMPT_REASONS:
        if account.fallback_tokens.get(reason):
            return "dense", reason
    if account.fallback_tokens["cut_cube"] or account.fallback_tokens["long_text"]:
        return "dense", "fallback"
    if account.cached_tokens and not account.video_tokens:
        return "dense", "cached"
    return "dense", "few_cubes"
