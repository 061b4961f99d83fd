"""``vllm-adaspark serve`` for real: the command it prints is the process it becomes, and serves."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from serving import Served, mm

from vllm_adaspark import ARCHITECTURE

pytestmark = pytest.mark.server


def test_serve_prints_the_command_and_becomes_it(viewed: Served) -> None:
    """The server with a key, which conftest.py starts by our command."""
    server = viewed.server
    printed = subprocess.run(
        [*server.command, "--print"], capture_output=True, text=True, check=True, env=server.env
    ).stdout
    assert server.log.read_text().startswith(printed)

    # The process that was started is vLLM now, with the arguments and variables printed.
    process = Path(f"/proc/{server.process.pid}")
    running = process.joinpath("cmdline").read_text().split("\0")[:-1]
    words = shlex.split(printed)
    variable, program, line = words[0], words[1], words[2:]
    at = line.index("--api-key")
    assert line.pop(at + 1) == "***"
    running = running[running.index("serve") :]
    assert running.pop(at + 1) not in printed
    assert running == line and Path(program).name == "vllm"
    assert variable in process.joinpath("environ").read_text().split("\0")
    assert variable.startswith("VLLM_PLUGINS=adaspark,adaspark_http")
    assert ARCHITECTURE in printed and "--trust-request-mm-kwargs" in line


def test_it_serves_and_a_request_chooses(viewed: Served, media: Path) -> None:
    for settings, sparse in (({}, True), ("off", False)):
        reply = viewed.client.chat.completions.create(
            model="tiny",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": (media / "clip.mp4").as_uri()}},
                        {"type": "text", "text": "What happens?"},
                    ],
                }
            ],
            max_tokens=4,
            extra_body={"ignore_eos": True, **mm(settings)},
        )
        assert reply.usage.completion_tokens == 4
        account = reply.usage.model_extra["adaspark"]  # --http is on by default
        assert (account["flops_ratio"] < 1) == sparse
