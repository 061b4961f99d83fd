"""GET /metrics: vLLM's own series and ours, in one exposition.

Ours are pulled from the workers when /metrics is scraped, and only then.  They count since the
workers started, running requests included, and never go backwards.  When the workers do not answer
in time, vLLM's series are served with ``vllm_adaspark:up 0``.

The route needs no key, and what it asks of the workers they do between two steps.  So scrapes share
one question to them, whose answer is good for a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from vllm.logger import init_logger
from vllm.v1.metrics.prometheus import get_prometheus_registry

from ..accounts.account import Account
from ..accounts.ledger import EDGES
from ..accounts.reports import merge_ranks
from .engine import SharedAnswer, ask_workers, engine_ranks
from .refusals import LABELS, REQUESTS, REQUESTS_HELP

logger = init_logger("vllm.adaspark")

SECONDS = 8.0  # Prometheus gives up after ten
FRESH_SECONDS = 1.0
ENGINE = ["model_name", "engine"]  # as vLLM labels its own


def attach(app: FastAPI) -> None:
    """Put our handler in the place of vLLM's."""

    async def ask() -> dict[int, list[Any]]:
        client = app.state.engine_client
        answers = await ask_workers(client, "adaspark_metrics", seconds=None)
        return dict(zip(engine_ranks(client), answers, strict=True))

    app.state.adaspark_metrics = SharedAnswer(ask, FRESH_SECONDS)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)


async def metrics(request: Request) -> Response:
    """vLLM's and our series, for Prometheus."""
    state = request.app.state
    # As the stock handler: with several API servers, made for each scrape.
    registry = get_prometheus_registry()
    ours = await pull(state) if getattr(state, "adaspark_accounts", False) else []
    return Response(generate_latest(_Joined(registry, ours)), media_type=CONTENT_TYPE_LATEST)


async def pull(state: Any) -> list[Metric]:
    """Our series, from the workers of all engines."""
    model_name = state.vllm_config.model_config.served_model_name
    up = GaugeMetricFamily("vllm_adaspark:up", "1 if the workers answered.", labels=["model_name"])
    try:
        engines = await state.adaspark_metrics.get(SECONDS)
        ours = families(model_name, engines)
    except Exception as error:  # vLLM's own series must get through, whatever it was
        if not getattr(state, "adaspark_silent", False):  # anybody may scrape, at any rate
            logger.warning("AdaSpark: no metrics from the workers: %r", error)
        state.adaspark_silent = True
        up.add_metric([model_name], 0)
        return [up]
    state.adaspark_silent = False
    up.add_metric([model_name], 1)
    return [up, *ours]


class _Joined:
    """A registry with families of ours; where both have a family, it has both's samples."""

    def __init__(self, registry: Any, ours: Iterable[Metric]) -> None:
        self._registry, self._ours = registry, {family.name: family for family in ours}

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            mine = self._ours.get(family.name)
            if mine is None:
                yield family
            else:
                mine.samples.extend(family.samples)
        yield from self._ours.values()


def families(model_name: str, engines: dict[int, list[dict[str, Any]]]) -> list[Metric]:
    """Our series.

    Args:
        model_name: as served.
        engines: by data-parallel rank, what each rank of the engine counted (``Ledger.metrics``).
    """

    def counter(name: str, what: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"vllm_adaspark:{name}", what, labels=[*ENGINE, *labels])

    def histogram(name: str, what: str) -> HistogramMetricFamily:
        return HistogramMetricFamily(f"vllm_adaspark:{name}", what, labels=[*ENGINE, "layers"])

    executed = counter("executed_flops", "FLOPs of the language model's layers.", "part")
    dense = counter("dense_flops", "What they would have been dense.", "part")
    tokens = counter("tokens", "Tokens computed, prompt and answer.", "kind")
    dropped = counter("dropped_tokens", "Video tokens that the language model never saw.")
    fallbacks = counter(
        "planner_fallback_tokens", "Tokens run dense against their settings.", "reason"
    )
    selection = counter("selection_seconds", "Time spent choosing cubes, in attention.")
    planning = counter("planning_seconds", "Time spent on plans, on the host.")
    requests = CounterMetricFamily(REQUESTS, REQUESTS_HELP, labels=LABELS)
    density = histogram("attention_density", "Share of preceding cubes attended, per request.")
    ffn_density = histogram("ffn_density", "Share of video tokens that ran the FFN, per request.")
    mean = GaugeMetricFamily(
        "vllm_adaspark:mean",
        "Means over video tokens that the method tells.",
        labels=[*ENGINE, "of"],
    )
    traces = GaugeMetricFamily("vllm_adaspark:traces", "Traces held.", labels=ENGINE)
    trace_bytes = GaugeMetricFamily("vllm_adaspark:trace_bytes", "Their memory.", labels=ENGINE)
    for engine, ranks in engines.items():
        labels = [model_name, str(engine)]
        total = merge_ranks([rank["total"] for rank in ranks])
        report = total.report()
        flops = report["flops"]
        for name, value in report.get("means", {}).items():
            mean.add_metric([*labels, name], value)
        for family, by_part in ((executed, flops["executed"]), (dense, flops["dense"])):
            for part, value in by_part.items():
                if part != "total":
                    family.add_metric([*labels, part], value)
        _add_tokens(tokens, fallbacks, labels, total)
        dropped.add_metric(labels, total.dropped_tokens)
        selection.add_metric(labels, total.selection_seconds)
        planning.add_metric(labels, total.planning_seconds)
        for mode, reason, number in ranks[0]["requests"]:
            requests.add_metric([*labels, mode, reason or ""], number)
        for family, name in ((density, "attention_density"), (ffn_density, "ffn_density")):
            _add_histograms(family, labels, [rank[name] for rank in ranks])
        held = [rank["traces"] for rank in ranks]  # each rank has its part of every trace
        traces.add_metric(labels, held[0]["held"])
        trace_bytes.add_metric(labels, sum(part["bytes"] for part in held))
    counters = [executed, dense, tokens, dropped, fallbacks, selection, planning, requests]
    return [*counters, density, ffn_density, mean, traces, trace_bytes]


def _add_tokens(
    tokens: CounterMetricFamily, fallbacks: CounterMetricFamily, labels: list[str], total: Account
) -> None:
    tokens.add_metric([*labels, "video"], total.video_tokens)
    tokens.add_metric([*labels, "text"], total.tokens - total.video_tokens)
    for reason, number in total.fallback_tokens.items():
        fallbacks.add_metric([*labels, reason], number)


def _add_histograms(
    family: HistogramMetricFamily, labels: list[str], ranks: list[dict[str, dict[str, Any]]]
) -> None:
    """One histogram per layer group.

    Each rank saw its own KV heads, or layers.  A request counts once: as a whole where one rank
    has the group, else in parts, by how many layers each has.  So a bucket may hold 2.5 requests.
    """
    for group in dict.fromkeys(label for rank in ranks for label in rank):
        parts = [rank[group] for rank in ranks if group in rank]
        weights = [part["layers"] for part in parts]
        counts = np.average([part["counts"] for part in parts], axis=0, weights=weights)
        total = np.average([part["sum"] for part in parts], weights=weights)
        cumulative = np.cumsum(counts).tolist()
        buckets = [(str(edge), value) for edge, value in zip(EDGES, cumulative, strict=True)]
        buckets.append(("+Inf", cumulative[-1]))
        family.add_metric([*labels, group], buckets, float(total))
