"""``usage.adaspark`` in the answers of vLLM's generating routes: what the request cost.

The stock handler runs first and untouched; then its response gets one field more.  The workers know
what a request with a video cost, and are asked once, when the answer is complete.  The field is
null when they do not answer in time or do not know the request.  A request without video or image
runs dense, so its cost follows from its tokens, and nobody is asked.  A streamed answer carries the
field where vLLM puts the usage of the whole request: in the usage chunk, for clients that ask for
one (``stream_options.include_usage``), or in the last event of ``/v1/responses``.

``/v1/completions`` and ``/v1/responses`` take text, the latter images too.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vllm.entrypoints.openai.chat_completion import api_router as stock_chat
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as stock_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as stock_responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.logger import init_logger

from ..accounts import reports
from ..accounts.account import Account
from ..accounts.flops import ModelShape
from ..accounts.request_ids import brief
from ..observing import observing
from .engine import ask_workers
from .refusals import count_error, count_refusal

logger = init_logger("vllm.adaspark")

LAST_EVENT = "event: response.completed\ndata: "  # of a streamed /v1/responses
SECONDS = 30.0  # that an answer may wait for its account, while a step of others is under way


def attach(app: FastAPI) -> None:
    """Put our handlers in the place of vLLM's, with the same checks before them."""
    for router, path, handler in (
        (stock_chat.router, "/v1/chat/completions", create_chat_completion),
        (stock_completion.router, "/v1/completions", create_completion),
        (stock_responses.router, "/v1/responses", create_responses),
    ):
        _replace(app, router, path, handler)


def _replace(app: FastAPI, router: APIRouter, path: str, handler: Callable) -> None:
    route = next(r for r in router.routes if r.path == path and "POST" in r.methods)
    app.add_api_route(
        route.path,
        handler,
        methods=["POST"],
        name=route.name,
        dependencies=route.dependencies,
        responses=route.responses,
        response_model=None,
    )


def init(state: Any) -> None:
    """Have vLLM's handlers say, in every usage, what only the engine knows.

    ``prompt_tokens_details`` holds how many tokens were cached, and in a chat how many belong to
    videos and images.  It is an option of the server's, of which clients see no more than before:
    where it is off, it is taken out of the answer here.
    """
    for name in ("openai_serving_chat", "openai_serving_completion"):
        serving = getattr(state, name, None)
        if serving is not None:
            state.adaspark_shows_details = serving.enable_prompt_tokens_details
            serving.enable_prompt_tokens_details = True


async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request):
    """vLLM's answer, with ``usage.adaspark``."""
    one = (request.n or 1) == 1 and not request.use_beam_search
    return await _answer(stock_chat.create_chat_completion, request, raw_request, one)


async def create_completion(request: CompletionRequest, raw_request: Request):
    """vLLM's answer, with ``usage.adaspark``; null if there are several prompts."""
    prompts = max(_number(request.prompt), _number(request.prompt_embeds))
    one = prompts == 1 and (request.n or 1) == 1 and not request.use_beam_search
    suffix = "" if request.use_beam_search else "-0"  # vLLM's for the first prompt
    suffix = suffix if prompts == 1 else None
    return await _answer(stock_completion.create_completion, request, raw_request, one, suffix)


async def create_responses(request: ResponsesRequest, raw_request: Request):
    """vLLM's answer, with ``usage.adaspark`` of its first turn; tools of vLLM's make others."""
    return await _answer(stock_responses.create_responses, request, raw_request, False, "_0")


def _number(prompt: Any) -> int:
    """How many prompts a completion asks about: texts, or lists of token ids."""
    if not isinstance(prompt, list):
        return 0 if prompt is None else 1
    return 1 if prompt and isinstance(prompt[0], int) else len(prompt)


async def _answer(
    stock: Callable[[Any, Request], Awaitable[Any]],
    request: Any,
    raw_request: Request,
    one: bool,
    suffix: str | None = "",
) -> Any:
    """What vLLM's handler answers, with the account.

    Args:
        stock: the handler, with its decorators: cancellation, load tracking, keep-alive.
        request, raw_request: what it takes.
        one: whether the engine had a single request for it (no n > 1, no beam search), and says how
            many of its tokens belong to videos and images.
        suffix: of the engine's id, behind the client's; None if that means several requests.
    """
    state = raw_request.app.state
    try:
        response = await stock(request, raw_request)
    except Exception as error:
        with observing("counting refused requests"):
            count_error(state, error)
        raise
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_account(response.body_iterator, state, one, suffix)
    elif isinstance(response, JSONResponse):
        with observing("usage.adaspark"):
            content = json.loads(response.body)
            if content.get("error"):
                count_refusal(state, content["error"])
            elif content.get("usage"):
                shows_details = await _add_account(content, state, one, suffix)
                if not shows_details and "prompt_tokens_details" in content["usage"]:
                    content["usage"]["prompt_tokens_details"] = None
                body = response.render(content)
                response.headers["content-length"] = str(len(body))
                response.body = body
    return response


async def _with_account(
    chunks: AsyncIterator[str], state: Any, one: bool = False, suffix: str | None = ""
) -> AsyncIterator[str]:
    """A stream's chunks; the one with the usage of the whole request gets the account."""
    async with aclosing(chunks):
        async for chunk in chunks:
            with observing("usage.adaspark in a stream"):
                chunk = await _complete(chunk, state, one, suffix)
            yield chunk


async def _complete(chunk: str, state: Any, one: bool, suffix: str | None) -> str:
    # Quotes are escaped inside strings, so no generated text looks like any of these.
    if '"choices":[]' in chunk and chunk.startswith("data: {"):
        content = json.loads(chunk.removeprefix("data: "))
        if content.get("usage"):
            if not await _add_account(content, state, one, suffix):
                content["usage"].pop("prompt_tokens_details", None)
            return f"data: {_dump(content)}\n\n"
    elif chunk.startswith(LAST_EVENT):
        content = json.loads(chunk.removeprefix(LAST_EVENT))
        if content["response"].get("usage"):
            await _add_account(content["response"], state, one, suffix)
            return f"{LAST_EVENT}{_dump(content)}\n\n"
    elif chunk.startswith('data: {"error":'):
        count_refusal(state, json.loads(chunk.removeprefix("data: "))["error"])
    return chunk


def _dump(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


async def _add_account(content: dict[str, Any], state: Any, one: bool, suffix: str | None) -> bool:
    """Put the account into an answer's usage.

    Args:
        content: the answer, or its last chunk.
        state: the application's.
        one, suffix: see :func:`_answer`.

    Returns:
        Whether clients are to see ``prompt_tokens_details``.
    """
    usage, shown = content["usage"], getattr(state, "adaspark_shows_details", True)
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    if not state.adaspark_accounts or suffix is None:
        usage["adaspark"] = None
    elif one and cached is not None and not details.get("multimodal_tokens"):
        usage["adaspark"] = text_account(state, usage, cached)
    else:
        usage["adaspark"] = await account_of(content["id"] + suffix, state)
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
        logger.warning("AdaSpark: no account of %s: %r", brief(request_id), error)
        return None
