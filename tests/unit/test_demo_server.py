"""What starts the servers of demo, benchmarks and tests (examples/demo/server.py)."""

from __future__ import annotations

import os
import urllib.request

import demo  # examples/demo
import pytest
from server import go_around_proxies


def test_a_proxy_is_not_asked_for_a_server_of_this_machine(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "files.example")
    assert not urllib.request.proxy_bypass("127.0.0.1:8000")
    go_around_proxies()
    go_around_proxies()
    assert os.environ["NO_PROXY"] == "files.example,127.0.0.1,localhost"
    assert os.environ["no_proxy"] == "127.0.0.1,localhost"
    assert urllib.request.proxy_bypass("127.0.0.1:8000")
    assert not urllib.request.proxy_bypass("videos.example")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--video", "missing.mp4"], "--video missing.mp4: no such file"),
        (["--seconds", "3"], "--seconds 3: expected at least 4"),
    ],
)
def test_the_demo_refuses_before_it_starts_a_server(monkeypatch, capsys, arguments, words) -> None:
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit):
        demo.parse_arguments()
    assert words in capsys.readouterr().err
