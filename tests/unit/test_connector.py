"""URLs without a server: video/connector.py."""

from __future__ import annotations

import asyncio
import socket

import pytest
from vllm.connections import HTTPConnection
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MediaConnector

from vllm_adaspark.video.connector import LONGEST_URL, AdaSparkConnector


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a port that nobody listens at."""
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/{'v' * 5000}.mp4"


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_url_without_a_server_is_the_clients_fault(kind: str, url: str) -> None:
    connector = AdaSparkConnector({}, connection=HTTPConnection())
    fetch, again = (getattr(connector, f"fetch_{kind}{how}") for how in ("", "_async"))
    for ask in (lambda: fetch(url), lambda: asyncio.run(again(url))):
        with pytest.raises(VLLMUnprocessableEntityError, match="no connection") as raised:
            ask()
        told = create_error_response(raised.value).error
        assert told.code == 422 and url[:60] in told.message
        assert len(told.message) < LONGEST_URL + 200


def test_stock_vllm_calls_it_its_own_fault(url: str) -> None:
    """Once it does not, ours is not needed."""
    with pytest.raises(Exception, match="connect") as raised:
        asyncio.run(MediaConnector(connection=HTTPConnection()).fetch_image_async(url))
    assert create_error_response(raised.value).error.code == 500
