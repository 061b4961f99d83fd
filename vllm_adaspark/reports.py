"""From the accounts of single ranks to what a reader wants: one account, its mode, its settings.

Every rank counts what it did: a tensor-parallel rank has its own KV heads, a pipeline stage its own
layers.  They send bare counts (``Account.to_counts``); here ranks of the same layers are averaged
and stages put one after the other.  No vLLM, so that a client can read what workers sent::

    report = merge_reports(llm.collective_rpc("adaspark_report"))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from . import tags
from .accounting import PER_LAYER, SECONDS, Account
from .config import (
    COMPENSATIONS,
    IMPORTANCES,
    ORDERS,
    SELECTIONS,
    SHARE_STEPS,
    TEXT_QUERIES,
)

# Why a request ran dense.  "fallback": its cubes were cut by chunk edges, or its text was too long.
DENSE_REASONS = ("no_video", "off", "few_cubes", "fallback")


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
    for name in SECONDS:
        seconds = [np.mean([getattr(a, name) for a in stage]) for stage in ordered]
        setattr(merged, name, float(sum(seconds)))
    return merged


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


def usage(account: Account, *, layers: bool = False) -> dict[str, Any]:
    """What a request cost: ``Account.report`` with its mode and settings, JSON-ready."""
    mode, reason = mode_of(account)
    report = account.report()
    if not layers:
        del report["layers"]
    return {"mode": mode, "reason": reason, **report, "settings": settings_of(account.video)}


def mode_of(account: Account) -> tuple[str, str | None]:
    """``("sparse", None)``, or ``("dense", reason)`` when nothing could be left out."""
    if account.choices:
        return "sparse", None
    if not account.video:
        return "dense", "no_video"
    if _is_off(account.video):
        return "dense", "off"
    if account.fallback_tokens["cut_cube"] or account.fallback_tokens["long_text"]:
        return "dense", "fallback"
    return "dense", "few_cubes"


def _is_off(video: tuple[int, ...]) -> bool:
    settings = tags.unpack(video[0])
    return settings.attn_share == settings.ffn_share == SHARE_STEPS


def settings_of(video: tuple[int, ...]) -> dict[str, Any] | None:
    """A request's settings, under the names config.py has, from what its video carries.

    ``flops`` is the budget, or None; with a budget there is no ``p_attn``, ``p_ffn`` or ``keep``.
    """
    if not video:
        return None
    word, *cube, order, trace, flops = video
    carried = tags.unpack(word)
    if carried.rule == tags.BUDGET:
        shares = {"selection": "top_p"}
    else:
        attention = "p_attn" if SELECTIONS[carried.rule] == "top_p" else "keep"
        shares = {
            "selection": SELECTIONS[carried.rule],
            attention: carried.attn_share / SHARE_STEPS,
            "p_ffn": carried.ffn_share / SHARE_STEPS,
        }
    return shares | {
        "flops": flops / SHARE_STEPS if flops else None,
        "min_cubes": carried.min_cubes,
        "dense_layers": carried.dense_layers,
        "text_queries": TEXT_QUERIES[0 if carried.sparse_text else 1],
        "importance": IMPORTANCES[carried.importance],
        "compensation": COMPENSATIONS[carried.compensation],
        "cube": cube,
        "order": ORDERS[order],
        "trace": bool(trace),
    }
