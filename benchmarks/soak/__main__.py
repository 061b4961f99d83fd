"""A real server under mixed traffic: is every answer the one it gives alone, and does memory stay?

    python -m benchmarks.soak                 # ten minutes
    python -m benchmarks.soak --minutes 60

Thirty-two clients at once ask about videos in eight settings, read slowly, go away, send what is no
video and settings that are none, trace, and scrape, on a server with short steps and a small KV
cache.  Every answer is compared with the one that the idle server gave to the same request.
Memory, open files and threads of every process are sampled all the time.  At the end the server
must be healthy and answer as at first, and no trace may be left of a request that still runs.
Writes a JSON, a CSV of the samples and a picture, puts the table into docs/operations.md unless it
is to write elsewhere (``--out``), and returns 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("benchmarks", "examples/demo")]

import checkpoint as demo_checkpoint  # noqa: E402  examples/demo
import pages  # noqa: E402  benchmarks
import video as demo_video  # noqa: E402
from server import VllmServer  # noqa: E402

from benchmarks.soak.traffic import Traffic  # noqa: E402
from benchmarks.soak.watch import Watch  # noqa: E402

START_SECONDS = 600
IDLE_SECONDS = 60  # what is under way ends, and what was aborted is cleared
# A plateau: what the last quarter may have more than the second, over all processes.
GROWTH = {"rss": 64, "files": 8, "threads": 4}
RESULT = ROOT / "benchmarks/results/soak.json"
PAGE = ROOT / "docs/operations.md"
# oneDNN, which multiplies stock vLLM's matrices on CPUs, keeps a program of about 0.4 MiB for each
# number of tokens that it met, a thousand by default: an hour's growth beside which no leak of
# ours could be seen.
KEPT_PROGRAMS = "64"


def server_of(folder: Path, options: list[str]) -> VllmServer:
    """A small float32 model, steps of an odd size, and a KV cache that is too small for all."""
    path = demo_checkpoint.build(folder / "checkpoint", dtype="float32", seed=3)
    settings = {"p_attn": 0.6, "p_ffn": 0.5, "min_cubes": 1, "dense_below": 2}
    arguments = [
        *("--served-model-name", "soak", "--dtype", "float32", "--enforce-eager"),
        *("--hf-overrides", '{"architectures": ["AdaSparkQwen2_5_VLForConditionalGeneration"]}'),
        *("--additional-config", json.dumps({"adaspark": settings})),
        *("--trust-request-mm-kwargs", "--allowed-local-media-path", str(folder)),
        *("--max-model-len", "4096", "--max-num-batched-tokens", "2048"),
        *("--max-num-scheduled-tokens", "640", "--num-gpu-blocks-override", "150"),
        *("--max-num-seqs", "32", "--disable-log-stats"),
    ]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "adaspark,adaspark_http"}
    env["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = KEPT_PROGRAMS
    return VllmServer(path, *arguments, *options, log=folder / "server.log", env=env)


def videos_of(folder: Path, rng: random.Random) -> tuple[list[str], list[str]]:
    """URLs of good videos and of bad ones."""
    good = [
        demo_video.write_mp4(
            folder / f"video{i}.mp4", seconds=4 + 3 * i, width=168, height=140, seed=i
        )
        for i in range(5)
    ]
    data = good[0].read_bytes()
    (folder / "garbage.mp4").write_bytes(rng.randbytes(4096))
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    bad = [folder / name for name in ("garbage.mp4", "empty.mp4", "cut.mp4", "absent.mp4")]
    urls = [[path.as_uri() for path in paths] for paths in (good, bad)]
    return urls[0], [*urls[1], "http://127.0.0.1:9/none.mp4", "data:video/mp4;base64,AAAA"]


async def soak(server: VllmServer, traffic: Traffic, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that happens to a server that is ready."""
    watch = Watch(server.process.pid)
    async with traffic:
        await traffic.ask_alone()
        sampling = asyncio.create_task(watch.every(args.every))
        began = time.monotonic()
        await traffic.storm(args.clients, began + 60 * args.minutes)
        minutes = (time.monotonic() - began) / 60
        growth = {count: watch.growth(count) for count in GROWTH}
        deadline = time.monotonic() + IDLE_SECONDS
        while await traffic.metric("vllm:num_requests_running") and time.monotonic() < deadline:
            await asyncio.sleep(1)
        left, running = await traffic.traces_left()
        held = await traffic.metric("vllm_adaspark:trace_bytes")
        await traffic.ask_alone_again()
        sampling.cancel()
    wrong = [*traffic.wrong]
    wrong += [
        f"{count} grew by {grown:.0f}" for count, grown in growth.items() if grown > GROWTH[count]
    ]
    wrong += [f"{running} traces of requests that ended still run"] if running else []
    wrong += [f"{held:.0f} bytes of traces are left"] if held else []
    wrong += [] if server.process.poll() is None else ["the server has ended"]
    report = {
        "seed": args.seed,
        "minutes": round(minutes, 1),
        "clients": args.clients,
        "ended well": dict(traffic.kinds),
        "ended badly": len(traffic.wrong),
        "wrong": wrong,
        "ended traces of requests that were left": left,
        "grown from the second to the last quarter": {k: round(v, 1) for k, v in growth.items()},
    }
    write(report, watch, args.out)
    return report


def write(report: dict[str, Any], watch: Watch, out: Path) -> None:
    """The report, every sample, a picture of them, and some of them in the documentation."""
    out.write_text(json.dumps(report, indent=1) + "\n")
    watch.draw(out.with_suffix(".png"))
    rows = watch.rows()
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: round(value, 2) for name, value in row.items()} for row in rows)
    if out == RESULT:
        ended, grown = report["ended well"], report["grown from the second to the last quarter"]
        said = (
            f"{report['minutes']:.0f} minutes, {report['clients']} clients, seed {report['seed']}: "
            f"{sum(ended.values()):,} requests ended as they should ("
            + ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in ended.items())
            + f"), {report['ended badly']} did not.  From the second quarter to the last the "
            f"server grew by {grown['rss']:.0f} MiB.  Resident memory in MiB:"
        )
        pages.refill(PAGE, "soak", {"memory": f"\n{said}\n\n{watch.table()}\n"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--out", type=Path, default=RESULT)
    args, options = parser.parse_known_args()  # the rest goes to the server
    rng = random.Random(args.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is ended, too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos, bad = videos_of(folder, rng)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with server_of(folder, options) as server:
            server.wait_until_ready(START_SECONDS)
            report = asyncio.run(soak(server, Traffic(server.url, videos, bad, rng), args))
            if report["wrong"]:
                print(server.log_tail(20))
    for name in ("minutes", "ended well", "wrong"):
        print(f"{name}: {report[name]}")
    print(f"grown: {report['grown from the second to the last quarter']}; see {args.out}")
    return bool(report["wrong"])


if __name__ == "__main__":
    sys.exit(main())
