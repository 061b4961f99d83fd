"""``usage.adaspark`` in the answers of POST /v1/chat/completions: what the request cost.

The stock handler runs first and untouched; then its response gets one field more.  The workers know
what a request with a video cost, and are asked once, when the answer is complete.  The field is
null when they do not answer in time or do not know the request.  A request without video or image
runs dense, so its cost follows from its tokens, and nobody is asked.  A streamed answer carries the
field in its usage chunk, for clients that ask for one (``stream_options.include_usage``).
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
from ..accounting import Account, ModelShape
from ..observing import observing
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


def init(state: Any) -> None:
    """Have vLLM's chat handler say, in every usage, what only the engine knows.

    ``prompt_tokens_details`` holds how many tokens were cached, and how many belong to videos and
    images.  It is an option of the server's, of which clients see no more than before: where it is
    off, it is taken out of the answer here.
    """
    chat = getattr(state, "openai_serving_chat", None)
    if chat is not None:
        state.adaspark_shows_details = chat.enable_prompt_tokens_details
        chat.enable_prompt_tokens_details = True


async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request):
    """vLLM's answer, with ``usage.adaspark``."""
    state = raw_request.app.state
    try:
        # With its decorators: cancellation, load tracking, keep-alive.
        response = await stock.create_chat_completion(request, raw_request)
    except Exception as error:
        with observing("counting refused requests"):
            count_error(state, error)
        raise
    one = (request.n or 1) == 1 and not request.use_beam_search
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_account(response.body_iterator, state, one)
    elif isinstance(response, JSONResponse):
        with observing("usage.adaspark"):
            content = json.loads(response.body)
            if "error" in content:
                count_refusal(state, content["error"])
            elif content.get("usage"):
                shows_details = await _add_account(content, state, one)
                if not shows_details:
                    content["usage"]["prompt_tokens_details"] = None
                body = response.render(content)
                response.headers["content-length"] = str(len(body))
                response.body = body
    return response


async def _with_account(
    chunks: AsyncIterator[str], state: Any, one: bool = False
) -> AsyncIterator[str]:
    """A stream's chunks; the one with the usage of the whole request gets the account."""
    async with aclosing(chunks):
        async for chunk in chunks:
            with observing("usage.adaspark in a stream"):
                chunk = await _complete(chunk, state, one)
            yield chunk


async def _complete(chunk: str, state: Any, one: bool) -> str:
    # Quotes are escaped inside strings, so no generated text looks like this.
    if '"choices":[]' in chunk and chunk.startswith("data: {"):
        content = json.loads(chunk.removeprefix("data: "))
        if content.get("usage"):
            if not await _add_account(content, state, one):
                content["usage"].pop("prompt_tokens_details", None)
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            return f"data: {text}\n\n"
    elif chunk.startswith('data: {"error":'):
        count_refusal(state, json.loads(chunk.removeprefix("data: "))["error"])
    return chunk


async def _add_account(content: dict[str, Any], state: Any, one: bool) -> bool:
    """Put the account into an answer's usage.

    Args:
        content: the answer, or its last chunk.
        state: the application's.
        one: whether the engine had a single request for it (no n > 1, no beam search).

    Returns:
        Whether clients are to see ``prompt_tokens_details``.
    """
    usage, shown = content["usage"], getattr(state, "adaspark_shows_details", True)
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    if not state.adaspark_accounts:
        usage["adaspark"] = None
    elif one and cached is not None and not details.get("multimodal_tokens"):
        usage["adaspark"] = text_account(state, usage, cached)
    else:
        usage["adaspark"] = await account_of(content["id"], state)
    return shown


def text_account(state: Any, usage: dict[str, Any], cached: int) -> dict[str, Any]:
    """What a request of nothing but text cost, which is what it costs dense.

    Args:
        state: the application's.
        usage: its tokens, as vLLM counts them.
        cached: how many of its prompt's came from the prefix cache.
    """
    text_config = state.vllm_config.model_config.hf_text_config
    account = Account(ModelShape.of(text_config), range(text_config.num_hidden_layers))
    context = usage["prompt_tokens"] + max(usage["completion_tokens"], 1) - 1  # none reads the last
    account.cached_tokens, account.tokens = cached, context - cached
    account.dense_pairs = float((cached + 1 + context) * account.tokens / 2)  # causal
    account.pairs[:] = account.dense_pairs
    return reports.usage(account)


async def account_of(request_id: str, state: Any) -> dict[str, Any] | None:
    """What the workers say a request cost, by the id its client knows; None if they cannot say."""
    if not state.adaspark_accounts:
        return None
    client = state.engine_client
    try:
        engines = await ask_workers(client, "adaspark_usage", request_id, seconds=SECONDS)
        # Each engine whose ranks all know the request; its n answers may run on several.
        known = [ranks for ranks in engines if ranks and None not in ranks]
        accounts = [reports.merge_ranks(ranks) for ranks in known]
        return reports.usage(reports.merge_engines(accounts)) if accounts else None
    except Exception as error:  # the answer itself is complete and must get through
        logger.warning("AdaSpark: no account of %s: %r", request_id, error)
        return None
