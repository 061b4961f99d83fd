"""``usage.adaspark`` in the answers of POST /v1/chat/completions: what the request cost.

The stock handler runs first and untouched; then its response gets one field more.  For that the
workers are asked once, when the answer is complete.  The field is null when they do not answer in
time or do not know the request.  A streamed answer carries it in its usage chunk, for clients that
ask for one (``stream_options.include_usage``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vllm.entrypoints.openai.chat_completion import api_router as stock
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.logger import init_logger

from .. import reports
from .engine import ask_workers
from .refusals import count_error, count_refusal

logger = init_logger("vllm.adaspark")

PATH = "/v1/chat/completions"
SECONDS = 5.0  # that an answer may wait for its account, while a step of others is under way


def attach(app: FastAPI) -> None:
    """Put our handler in the place of vLLM's, with the same checks before it."""
    route = next(r for r in stock.router.routes if r.path == PATH and "POST" in r.methods)
    app.add_api_route(
        route.path,
        create_chat_completion,
        methods=["POST"],
        name=route.name,
        dependencies=route.dependencies,
        responses=route.responses,
        response_model=None,
    )


async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request):
    """vLLM's answer, with ``usage.adaspark``."""
    state = raw_request.app.state
    try:
        # With its decorators: cancellation, load tracking, keep-alive.
        response = await stock.create_chat_completion(request, raw_request)
    except Exception as error:
        count_error(state, error)
        raise
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_account(response.body_iterator, state)
    elif isinstance(response, JSONResponse):
        content = json.loads(response.body)
        if "error" in content:
            count_refusal(state, content["error"])
        elif content.get("usage"):
            content["usage"]["adaspark"] = await account_of(content["id"], state)
            response.body = response.render(content)
            response.headers["content-length"] = str(len(response.body))
    return response


async def _with_account(chunks: AsyncIterator[str], state: Any) -> AsyncIterator[str]:
    """A stream's chunks; the one with the usage of the whole request gets the account."""
    async with aclosing(chunks):
        async for chunk in chunks:
            # Quotes are escaped inside strings, so no generated text looks like this.
            if '"choices":[]' in chunk and chunk.startswith("data: {"):
                content = json.loads(chunk.removeprefix("data: "))
                if content.get("usage"):
                    content["usage"]["adaspark"] = await account_of(content["id"], state)
                    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
                    chunk = f"data: {text}\n\n"
            elif chunk.startswith('data: {"error":'):
                count_refusal(state, json.loads(chunk.removeprefix("data: "))["error"])
            yield chunk


async def account_of(request_id: str, state: Any) -> dict[str, Any] | None:
    """What a request cost, by the id its client knows; None if that cannot be said."""
    if not state.adaspark_accounts:
        return None
    client = state.engine_client
    try:
        engines = await ask_workers(client, "adaspark_usage", request_id, seconds=SECONDS)
    except Exception as error:  # the answer itself is complete and must get through
        logger.warning("AdaSpark: no account of %s: %r", request_id, error)
        return None
    known = [[counts for counts in ranks if counts is not None] for ranks in engines]
    accounts = [reports.merge_ranks(ranks) for ranks in known if ranks]
    return reports.usage(reports.merge_engines(accounts)) if accounts else None
