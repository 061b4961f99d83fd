"""Counting requests that were refused: HTTP 4xx after their body was understood.

No worker ever sees them, so they are counted here, where the answer is made: by a Prometheus
counter that adds up over API-server processes and shares its family with the workers' counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import Counter
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from ..models.sent_items import sent_items
from ..settings import SettingsError

REQUESTS = "vllm_adaspark:requests"
REQUESTS_HELP = "Requests that ended, by mode and, where they were not sparse, by reason."
LABELS = ["model_name", "engine", "mode", "reason"]
REASONS = ("settings", "media", "too_long", "other")

_refused = Counter(REQUESTS, REQUESTS_HELP, LABELS)

# vLLM has no exception of its own for these, so they are told by what its messages say.
_SETTINGS = ("mm_processor_kwargs",)
_TOO_LONG = (
    "maximum context length",
    "maximum model length",
    "reduce the input",
    "tokens in a step",  # ours, methods/adatp
)
# Answers of requests that prepared no media: without key, without a route or a model.
_BEFORE_MEDIA = (401, 404, 405)
# Code that reads media: what it raises is about them.
_MEDIA_MODULES = ("vllm.multimodal.media", "vllm.multimodal.video", "vllm_adaspark.video")


class TakeBackMedia:
    """ASGI middleware: what a request cached that never reached the engine is taken back.

    A request counts as such if it is answered with an error, in its stream or instead of one, or
    is not answered to the end, because its client left.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        began, answered, failed = time.monotonic(), False, False

        async def watched(message: Any) -> None:
            nonlocal answered, failed
            if message["type"] == "http.response.start":
                failed = message["status"] >= 400 and message["status"] not in _BEFORE_MEDIA
            elif message["type"] == "http.response.body":
                failed |= message.get("body", b"").startswith(b'data: {"error":')
                answered = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if failed or not answered:
                sent_items.forget_since(began)


def expose(model_name: str) -> None:
    """Let every reason be seen from the start, as 0."""
    for reason in REASONS:
        _refused.labels(model_name, "", "refused", reason)


def count_error(state: Any, error: Exception) -> None:
    """Count what the handler raised, if vLLM will answer it with a 4xx."""
    if 400 <= create_error_response(error).error.code < 500:
        _count(state, reason_of(error))


def count_refusal(state: Any, error: dict[str, Any]) -> None:
    """Count an error that the handler put into its answer, if it is a 4xx."""
    if 400 <= error["code"] < 500:
        _count(state, _reason_of_message(error["message"]))


def _count(state: Any, reason: str) -> None:
    model_name = state.vllm_config.model_config.served_model_name
    _refused.labels(model_name, "", "refused", reason).inc()


def reason_of(error: Exception) -> str:
    """One of REASONS."""
    for cause in _causes(error):
        if isinstance(cause, SettingsError):
            return "settings"
        if any(name.startswith(_MEDIA_MODULES) for name in _modules(cause)):
            return "media"
    return _reason_of_message(str(error))


def _reason_of_message(message: str) -> str:
    if any(words in message for words in _TOO_LONG):
        return "too_long"
    if any(words in message for words in _SETTINGS):
        return "settings"
    return "other"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _modules(error: BaseException) -> Iterator[str]:
    """Modules that an exception passed through."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame.f_globals.get("__name__", "")
        step = step.tb_next
