"""HTTP: traces as JSON and JPEG under ``/v1/adaspark/traces``, and the viewer's page.

vLLM's API key guards everything under ``/v1``.  The page at ``/adaspark/`` holds no data, so it is
open, and asks for the key itself.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, RedirectResponse, Response
from vllm.logger import init_logger

from ..traces import reader
from .engine import Turns, ask_workers

logger = init_logger("vllm.adaspark")

SECONDS = 30.0  # that a reader may wait, while others read or a step is under way

PAGE = Path(__file__).parent / "viewer"
FILES = {
    "index.html": "text/html",
    "viewer.css": "text/css",
    "viewer.js": "text/javascript",
    "api.js": "text/javascript",
    "stage.js": "text/javascript",
    "chart.js": "text/javascript",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# What a trace says is the user's video: no cache between here and the browser may keep it.
DATA_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

TraceId = Annotated[str, InPath(pattern="^[0-9a-f]{16}$", max_length=16)]
Number = Annotated[int, InPath(ge=0, le=10_000_000)]
Source = Annotated[str, Query(pattern="^(question|answer|(token|cube):[0-9]{1,8})$", max_length=16)]

data = APIRouter(prefix="/v1/adaspark/traces", tags=["adaspark"])
page = APIRouter(prefix="/adaspark", include_in_schema=False)


def attach(app: FastAPI) -> None:
    """Add the routes."""
    app.state.adaspark_turns = Turns()
    app.include_router(data)
    app.include_router(page)


@data.get("")
async def list_traces(request: Request) -> Response:
    """The traces that are kept, latest first."""

    def read(engines: list[list[Any]]) -> list[dict[str, Any]]:
        traces = [trace for ranks in engines for trace in reader.merge_lists(ranks)]
        return sorted(traces, key=lambda trace: -trace["started"])

    traces = await _ask(request, read, "adaspark_traces")
    return JSONResponse({"traces": traces}, headers=DATA_HEADERS)


@data.get("/{trace_id}")
async def one_trace(request: Request, trace_id: TraceId) -> Response:
    """Everything about a trace but the selection itself."""
    tokenizer = _tokenizer(request)

    def read(ranks: list[Any]) -> dict[str, Any] | None:
        meta = reader.merge_meta(ranks)
        return meta and reader.complete(meta, tokenizer)

    return JSONResponse(await _trace(request, read, trace_id, "meta"), headers=DATA_HEADERS)


@data.get("/{trace_id}/heat")
async def heat(request: Request, trace_id: TraceId, source: Source = "answer") -> Response:
    """Per layer and cube, the share of KV heads and source tokens that attended."""
    found = await _trace(request, reader.merge_heat, trace_id, "heat", source)
    if "error" in found:
        raise HTTPException(404, found["error"])
    return JSONResponse(found, headers=DATA_HEADERS)


@data.get("/{trace_id}/ffn")
async def ffn(request: Request, trace_id: TraceId) -> Response:
    """Per layer, a bit for each video token that ran the FFN; bits in base64, lowest first."""
    found = await _trace(request, reader.merge_ffn, trace_id, "ffn")
    found["ran"] = [base64.b64encode(bits).decode() for bits in found["ran"]]
    found["recorded"] = base64.b64encode(found["recorded"]).decode()
    return JSONResponse(found, headers=DATA_HEADERS)


@data.get("/{trace_id}/frames/{video}/{n}.jpg")
async def frame(request: Request, trace_id: TraceId, video: Number, n: Number) -> Response:
    """The n-th frame pair's first frame, as the model saw it."""

    def read(ranks: list[Any]) -> bytes | None:
        return next((rank for rank in ranks if rank), None)

    missing = f"no frame {n} of video {video} in trace {trace_id}"
    jpeg = await _trace(request, read, trace_id, "frame", video, n, missing=missing)
    return Response(jpeg, media_type="image/jpeg", headers=DATA_HEADERS)


@data.delete("/{trace_id}")
async def delete(request: Request, trace_id: TraceId) -> Response:
    """Forget a trace."""
    await _trace(request, lambda ranks: any(ranks) or None, trace_id, "delete")
    return Response(status_code=204)


@page.get("")
async def redirect() -> Response:
    # Relative, so that it holds behind a proxy with a path prefix.
    return RedirectResponse("adaspark/", status_code=307)


@page.get("/")
async def index() -> Response:
    return _file("index.html")


@page.get("/{name}")
async def static_file(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    if name not in FILES:  # names, never paths: nothing else of the disk can be asked for
        raise HTTPException(404, f"no page {name[:40]!r}")
    content = (PAGE / name).read_bytes()
    return Response(content, media_type=f"{FILES[name]}; charset=utf-8", headers=PAGE_HEADERS)


def _tokenizer(request: Request) -> Any:
    """The server's; None where it runs without (``--skip-tokenizer-init``)."""
    try:
        return request.app.state.engine_client.get_tokenizer()
    except ValueError:
        return None


async def _ask(
    request: Request, read: Callable[[list[list[Any]]], Any], method: str, *arguments: Any
) -> Any:
    """What ``read`` makes of the workers' answers, once it is this reader's turn.

    It runs in a thread, as a long prompt has a hundred thousand tokens to decode; vLLM makes its
    tokenizer's decode safe for that (vllm/tokenizers/hf.py).
    """
    state = request.app.state
    engine_client = getattr(state, "engine_client", None)
    if engine_client is None:
        raise HTTPException(503, "this server has no engine, so there are no traces")
    if not getattr(state, "adaspark_accounts", False):
        raise HTTPException(503, "this server's workers keep no traces: leave --worker-cls out")

    async def ask() -> Any:
        try:
            answers = await ask_workers(engine_client, method, *arguments, seconds=None)
        except Exception as error:
            raise _silent(error) from error
        return await asyncio.to_thread(read, answers)

    try:
        return await state.adaspark_turns.take(ask, SECONDS)
    except TimeoutError as error:
        raise _silent(error) from error


def _silent(error: Exception) -> HTTPException:
    logger.warning("AdaSpark: no traces from the workers: %r", error)
    return HTTPException(503, "the workers did not answer: try again in a while")


async def _trace(
    request: Request,
    read: Callable[[list[Any]], Any],
    trace_id: str,
    what: str,
    *arguments: Any,
    missing: str | None = None,
) -> Any:
    """What ``read`` makes of the answers of the ranks that have the trace, of one engine.

    Where it is None the answer is a 404 that says what is ``missing``.
    """

    def of_one(engines: list[list[Any]]) -> Any:
        return read(next((ranks for ranks in engines if any(ranks)), []))

    found = await _ask(request, of_one, "adaspark_trace", trace_id, what, *arguments)
    if found is None:
        raise HTTPException(
            404, missing or f"no trace {trace_id}: it may have made room for later ones"
        )
    return found
