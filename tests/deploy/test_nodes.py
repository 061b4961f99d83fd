"""Several nodes, as deploy/kubernetes/multi-node starts them: here two process groups on loopback.

Tensor parallel over the nodes, since stock vLLM has no pipeline parallel on the CPU.
"""

from __future__ import annotations

import checkpoint as demo_checkpoint  # examples/demo
import openai
import pytest
import video as demo_video  # examples/demo
from deploy_servers import PrintedServer
from server import free_port  # examples/demo

START_SECONDS = 600


@pytest.mark.server
def test_two_nodes_serve_one_model(tmp_path):
    model = demo_checkpoint.build(tmp_path / "checkpoint")
    clip = demo_video.write_mp4(tmp_path / "clip.mp4", seconds=10, width=168, height=140)
    shared = [
        *("--tensor-parallel-size=2", "--distributed-executor-backend=mp"),
        *("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"),
        *("--max-model-len=4096", "--max-num-batched-tokens=2048", "--served-model-name=tiny"),
        f"--allowed-local-media-path={tmp_path}",
    ]
    env = {
        "ADASPARK": '{"p_attn": 0.6, "min_cubes": 1, "dense_below": 2}',
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # both would bind to the same cores
        "OMP_NUM_THREADS": "1",
    }
    leader = PrintedServer(tmp_path / "leader.log", model, *shared, "--node-rank=0", **env)
    worker = PrintedServer(
        tmp_path / "worker.log", model, *shared, "--node-rank=1", "--headless", **env
    )
    with worker, leader:
        leader.wait_until_ready(START_SECONDS)
        client = openai.OpenAI(base_url=f"{leader.url}/v1", api_key="none", timeout=120)
        content = [
            {"type": "video_url", "video_url": {"url": clip.as_uri()}},
            {"type": "text", "text": "What happens?"},
        ]
        reply = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4
        )
        cost = reply.usage.model_dump()["adaspark"]
        assert reply.usage.completion_tokens > 0 and cost["mode"] == "sparse"
        assert 0 < cost["attention_density"] < 1 and cost["video_tokens"] > 64
        assert worker.process.poll() is None
