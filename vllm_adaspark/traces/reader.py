"""Traces read from outside: ranks put together, and one dictionary for pages and pictures.

Every rank answers for its own layers and KV heads.  Under tensor parallelism the ranks of a stage
hold the same layers and are averaged; under pipeline parallelism the stages' layers follow one
another.  Which rank is which shows in the answers themselves.  A trace of which any rank of the
engine has lost its part is gone: some heads or layers must never pass for all of them.

A whole trace, as :func:`read_offline` and :func:`read_http` return it::

    {**meta, "heat": {"question": [layers][cubes], ...}, "jpegs": {(video, frame): bytes}}
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..accounts.request_ids import search_name, unnumbered
from ..video.order import cube_order, encode_order
from .attended import cube_heat, most_attended

SOURCES = ("question", "answer")


# -- ranks put together ---------------------------------------------------------------------------


def merge_lists(ranks: Iterable[list[dict[str, Any]] | None]) -> list[dict[str, Any]]:
    """Summaries of all ranks of an engine, one per trace that all of them have, latest first."""
    ranks = list(ranks)
    by_id: dict[str, list[dict[str, Any]]] = {}
    for summaries in ranks:
        for summary in summaries or ():
            by_id.setdefault(summary["id"], []).append(summary)
    whole = [_merge_summaries(same) for same in by_id.values() if len(same) == len(ranks)]
    return sorted(whole, key=lambda summary: -summary["started"])


def merge_meta(ranks: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """``adaspark_trace(id, "meta")`` of all ranks; None unless all have the trace."""
    from ..accounts import reports  # needs torch, which a client over HTTP can do without

    known = _all_or_none(ranks)
    if not known:
        return None
    stages = _stages(known)
    # Only the rank that samples knows the answer's tokens, only the first keeps the frames.
    speaker = max(known, key=lambda rank: rank["answer_tokens"])
    merged = speaker | _merge_summaries(known)
    merged["layers"] = [layer for stage in stages for layer in stage[0]["layers"]]
    merged["density"] = {
        kind: [x for stage in stages for x in _mean([rank["density"][kind] for rank in stage])]
        for kind in speaker["density"]
    }
    for number, video in enumerate(merged["videos"]):
        video["frames"] = max(rank["videos"][number]["frames"] for rank in known)
    counts = _all_or_none(rank["usage"] for rank in known)
    account = reports.merge_ranks(counts) if counts else None
    merged["usage"] = reports.usage(account) if account else None
    merged["means"] = reports.means_by_layer(account) if account else {}
    return merged


def merge_heat(ranks: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """``adaspark_trace(id, "heat", source)`` of all ranks; None unless all have the trace.

    ``{"error": ...}`` where a rank says that its trace has no such source.
    """
    known = _all_or_none(ranks)
    for rank in known:
        if "error" in rank:
            return rank
    if not known:
        return None
    stages = _stages(known)
    return {
        "layers": [layer for stage in stages for layer in stage[0]["layers"]],
        "heat": [
            _mean(list(rows))
            for stage in stages
            for rows in zip(*(rank["heat"] for rank in stage), strict=True)
        ],
        "tokens": min(rank["tokens"] for rank in known),
        "wanted": max(rank["wanted"] for rank in known),
    }


def merge_ffn(ranks: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """``adaspark_trace(id, "ffn")`` of all ranks; those of a stage ran the same tokens.

    None unless all have the trace.
    """
    known = _all_or_none(ranks)
    if not known:
        return None
    first = [stage[0] for stage in _stages(known)]
    joined = {key: [x for stage in first for x in stage[key]] for key in ("layers", "ran", "share")}
    return joined | {"recorded": first[0]["recorded"]}


def _all_or_none(ranks: Iterable[Any]) -> list[Any]:
    """What all ranks said, or nothing if one of them has lost its part."""
    answers = list(ranks)
    return [] if any(answer is None for answer in answers) else answers


def _stages(ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Ranks by pipeline stage, in the order of their layers."""
    stages: dict[int, list[dict[str, Any]]] = {}
    for rank in ranks:
        stages.setdefault(rank["layers"][0], []).append(rank)
    return [stages[first] for first in sorted(stages)]


def _merge_summaries(same: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one trace on several ranks."""
    merged = max(same, key=lambda rank: rank["answer_tokens"])
    summary = {key: merged[key] for key in SUMMARY_KEYS}
    summary["bytes"] = sum(rank["bytes"] for rank in same)
    summary["truncated"] = next((rank["truncated"] for rank in same if rank["truncated"]), None)
    return summary


SUMMARY_KEYS = (
    "id",
    "request_id",
    "started",
    "finished",
    "prompt_tokens",
    "video_tokens",
    "answer_tokens",
    "cached_tokens",
    "bytes",
    "truncated",
)


def _mean(rows: list[list[float | None]]) -> list[float | None]:
    """Entry by entry, over ranks; None where it is None on any rank."""
    if len(rows) == 1:
        return rows[0]
    mean = np.array(rows, dtype=float).mean(axis=0)  # None becomes NaN
    return [None if np.isnan(x) else round(x, 4) for x in mean.tolist()]


# -- what only the front end knows ----------------------------------------------------------------


def complete(meta: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """``meta`` with the text of its tokens, and each video's token order.

    ``spans[...]["texts"]``: one string per token; ``videos[...]["token_order"]``: base64 of
    little-endian int32, the raster index of the video's i-th token.  A pruned video's is in its
    trace.
    """
    for span in meta["spans"]:
        if "ids" in span and tokenizer is not None:
            span["texts"] = [tokenizer.decode([token]) for token in span["ids"]]
            span["text"] = tokenizer.decode(span["ids"])
    for video in meta["videos"]:
        if video["token_order"] is None:
            token_order = cube_order(tuple(video["grid"]), tuple(video["cube"]), video["order"])
            video["token_order"] = encode_order(token_order)
    return meta


# -- a whole trace --------------------------------------------------------------------------------


def read_offline(llm: Any, trace_id: str | None = None, frames: int = 12) -> dict[str, Any]:
    """A trace of an ``LLM`` in this process: the latest one, or that of ``trace_id``.

    Args:
        llm: vLLM's ``LLM``.
        trace_id: from ``collective_rpc("adaspark_traces")``.
        frames: how many frames to fetch for each source: those that it attended most.

    Raises:
        LookupError: no such trace, or not on all ranks.
    """
    if trace_id is None:
        trace_id = _latest(merge_lists(llm.collective_rpc("adaspark_traces")), None)["id"]

    def ask(what: str, *arguments: Any) -> list[Any]:
        return llm.collective_rpc("adaspark_trace", args=(trace_id, what, *arguments))

    meta = merge_meta(ask("meta"))
    if meta is None:
        raise LookupError(f"no trace {trace_id!r}")
    return _whole(
        complete(meta, llm.get_tokenizer()),
        heat=lambda source: merge_heat(ask("heat", source)),
        frame=lambda video, n: next((jpeg for jpeg in ask("frame", video, n) if jpeg), None),
        frames=frames,
    )


def read_http(
    url: str,
    request_id: str | None = None,
    *,
    api_key: str | None = None,
    frames: int = 12,
    timeout: float = 60,
) -> dict[str, Any]:
    """A trace of a server with the viewer: the latest one, or that of an answer.

    Args:
        url: the server's address, without ``/v1``.
        request_id: the ``id`` of the answer the client got.
        api_key: the server's, if it has one.
        frames: how many frames to fetch for each source: those that it attended most.
        timeout: seconds for each request.

    Raises:
        LookupError: no such trace.
        urllib.error.URLError: the server does not answer, or refuses.
    """

    def get(path: str) -> bytes:
        request = urllib.request.Request(f"{url.rstrip('/')}/v1/adaspark/traces{path}")
        if api_key is not None:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read()

    trace_id = _latest(json.loads(get(""))["traces"], request_id)["id"]
    return _whole(
        json.loads(get(f"/{trace_id}")),
        heat=lambda source: json.loads(get(f"/{trace_id}/heat?source={source}")),
        frame=lambda video, n: get(f"/{trace_id}/frames/{video}/{n}.jpg"),
        frames=frames,
    )


def _latest(summaries: list[dict[str, Any]], request_id: str | None) -> dict[str, Any]:
    """The latest trace, or that of a request: of its n answers, the latest."""
    for summary in summaries:
        name = search_name(summary["request_id"]) or summary["request_id"]
        if request_id is None or unnumbered(name, request_id) is not None:
            return summary
    if request_id is None:
        raise LookupError('no trace: ask with mm_processor_kwargs={"adaspark": {"trace": true}}')
    raise LookupError(f"no trace of request {request_id!r}: it asked for none, or lost its room")


def _whole(meta: dict[str, Any], heat: Callable, frame: Callable, frames: int) -> dict[str, Any]:
    heats = {source: heat(source) for source in SOURCES}
    if None in heats.values():
        raise LookupError(f"no trace {meta['id']!r}: it made room for later ones just now")
    there = [
        (video, n) for video, facts in enumerate(meta["videos"]) for n in range(facts["frames"])
    ]
    wanted = {
        place
        for told in heats.values()
        for place in most_attended(
            meta, cube_heat(told["heat"], meta["layers"], None), there, frames
        )
    }
    jpegs = {place: jpeg for place in sorted(wanted) if (jpeg := frame(*place))}
    return meta | {"heat": heats, "jpegs": jpegs}
