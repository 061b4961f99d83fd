"""``vllm-adaspark serve`` for real: the command it prints is the process it becomes, and serves."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import checkpoint as demo_checkpoint  # examples/demo
import openai
import pytest
from server import VllmServer  # examples/demo
from serving import mm

from vllm_adaspark import ARCHITECTURE

pytestmark = pytest.mark.server

START_SECONDS = 240  # it takes about 20
ANSWER_SECONDS = 60
PROGRAM = [sys.executable, "-c", "import sys; from vllm_adaspark.cli import main; sys.exit(main())"]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def test_serve_prints_the_command_and_becomes_it(media, tmp_path):
    checkpoint = demo_checkpoint.build(tmp_path / "checkpoint", dtype="float32", seed=3)
    arguments = [
        *("--served-model-name", "tiny", "--allowed-local-media-path", str(media)),
        *("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048"),
        *("--gpu-memory-utilization", "0.3"),  # on a CPU: memory that must be free
        *("--enforce-eager", "--request-settings", "--p", "0.6", "--dense-below", "2"),
    ]
    server = VllmServer(checkpoint, *arguments, log=tmp_path / "server.log", env=ENV)
    ours = server.command[server.command.index("serve") :]
    server.command = [*PROGRAM, *ours]
    printed = subprocess.run(
        [*PROGRAM, *ours, "--print"], capture_output=True, text=True, check=True, env=server.env
    ).stdout
    with server:
        server.wait_until_ready(START_SECONDS)
        assert server.log.read_text().startswith(printed)

        # The process that was started is vLLM now, with the arguments and variables printed.
        process = Path(f"/proc/{server.process.pid}")
        running = process.joinpath("cmdline").read_text().split("\0")[:-1]
        words = shlex.split(printed)
        variable, program, line = words[0], words[1], words[2:]
        assert running[running.index("serve") :] == line and Path(program).name == "vllm"
        assert variable in process.joinpath("environ").read_text().split("\0")
        assert variable.startswith("VLLM_PLUGINS=adaspark,adaspark_http")
        assert ARCHITECTURE in printed and "--trust-request-mm-kwargs" in line

        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0
        )
        url = (media / "clip.mp4").as_uri()
        video = {"type": "video_url", "video_url": {"url": url}}
        text = {"type": "text", "text": "What happens?"}
        for settings, sparse in ((None, True), ("off", False)):
            reply = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": [video, text]}],
                max_tokens=4,
                extra_body={"ignore_eos": True, **(mm(settings) if settings else {})},
            )
            assert reply.usage.completion_tokens == 4
            account = reply.usage.model_extra["adaspark"]  # --http is on by default
            assert (account["flops_ratio"] < 1) == sparse
        server.stop()
    assert server.process.returncode in (0, -15)
    with pytest.raises(ProcessLookupError):
        os.kill(server.process.pid, 0)
