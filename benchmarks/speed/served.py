"""End to end: real OpenAI servers, real mp4 files, one contender after the other.

Three servers are alive: stock vLLM, stock with EVS, and ours, whose settings come with each
request.  Only the one that is asked works.  Every contender sees the same videos, in turn; a round
has videos of its own, so that nothing is found in a cache.

EVS drops video tokens before the language model sees them; its rate is such that at the longest
length it costs the FLOPs that ours spends.  At other lengths the FLOPs differ, and rows say so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from server import VllmServer  # examples/demo

from vllm_adaspark import ARCHITECTURE

from . import instrument
from .client import Answer, Client
from .model import SHAPES, Videos, flops, pruning_rate, write_checkpoint
from .record import DENSE, Cell, Record, in_turn, progress

BENCHMARKS = Path(__file__).resolve().parent.parent
START_SECONDS = 600  # it takes about 25, alone on two cores
ROOM = 512  # tokens for the text around a video
CHUNK = 8192  # tokens of a step
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
WARM_UP = 256  # tokens of the first video a server sees
COMPILED = "compiled, ttft"
EVS, SPARSE = "EVS", "top_k 0.2, p_ffn 0.5"
# Dummy weights attend evenly: top_k sets the cubes' share, and p_ffn is about the active share.
OURS: dict[str, dict[str, Any]] = {
    "p=1": {"p_attn": 1.0, "p_ffn": 1.0},
    "p=0.9/0.8": {"p_attn": 0.9, "p_ffn": 0.8},
    "p=0.5/0.5": {"p_attn": 0.5, "p_ffn": 0.5},
    SPARSE: {"selection": "top_k", "keep": 0.2, "p_ffn": 0.5},
    "flops=0.5": {"flops": 0.5},
}
# For decoding only attention matters: a prefill that skips the FFN fills the cache sooner.
DECODING = {
    "p=1": {"p_attn": 1.0, "p_ffn": 0.05},
    "p=0.9": {"p_attn": 0.9, "p_ffn": 0.05},
    "top_k 0.2": {"selection": "top_k", "keep": 0.2, "p_ffn": 0.05},
}


@dataclass(frozen=True)
class Single:
    """Time to first token of lone requests; ``compiled``: of servers with vLLM's torch.compile."""

    tokens: int
    contenders: tuple[str, ...] = (DENSE, EVS, *OURS)
    rounds: int = 3
    compiled: bool = False

    @property
    def name(self) -> str:
        return COMPILED if self.compiled else "ttft"


@dataclass(frozen=True)
class AtOnce:
    """Requests per second with so many at a time."""

    compiled: ClassVar[bool] = False
    requests: int
    tokens: int = 1024
    contenders: tuple[str, ...] = (DENSE, EVS, "p=1", SPARSE)
    rounds: int = 3
    answer_tokens: int = 8

    @property
    def name(self) -> str:
        return f"{self.requests} at once"


@dataclass(frozen=True)
class Decoding:
    """Time per output token after a long video."""

    name: ClassVar[str] = "tpot"
    compiled: ClassVar[bool] = False
    tokens: int
    contenders: tuple[str, ...] = (DENSE, *DECODING)
    rounds: int = 5
    answer_tokens: int = 33


Plan = Single | AtOnce | Decoding


def measure(record: Record, plans: list[Plan], folder: Path, shape: str = "3B") -> None:
    """All samples of all plans, which are all of compiled servers or none is.

    Args:
        record: gets the samples.
        plans: what to measure.
        folder: for the checkpoint, videos and logs.
        shape: of the language model, a key of model.SHAPES.
    """
    if all(record.count(cell) >= plan.rounds for plan in plans for cell in _cells(plan)):
        return
    longest = max(plan.tokens for plan in plans)
    names = {_server_of(contender) for plan in plans for contender in plan.contenders}
    with _servers(folder, names, shape, longest, record, plans[0].compiled) as clients:
        bench = _Bench(record, clients, Videos(folder / "videos"), shape)
        bench.warm_up()
        sampler = {Single: bench.single, AtOnce: bench.at_once, Decoding: bench.decoding}
        for plan in plans:
            contenders = {cell: sampler[type(plan)](plan, cell) for cell in _cells(plan)}
            in_turn(record, contenders, dict.fromkeys(contenders, plan.rounds))


def _cells(plan: Plan) -> list[Cell]:
    return [Cell(plan.name, contender, plan.tokens) for contender in plan.contenders]


def _server_of(contender: str) -> str:
    return contender if contender in (DENSE, EVS) else "adaspark"


class _Bench:
    """Takes samples from running servers."""

    def __init__(
        self, record: Record, clients: dict[str, Client], videos: Videos, shape: str
    ) -> None:
        self._record, self._clients, self._videos = record, clients, videos
        self._shape = SHAPES[shape]

    def warm_up(self) -> None:
        """One short request each; tells, too, how many tokens a prompt has beside its video."""
        for name, client in self._clients.items():
            answer = client.ask(self._videos.url(WARM_UP, 0), None, max_tokens=4)
            client.parts()
            if name != EVS:
                self._text = answer.prompt_tokens - WARM_UP

    def single(self, plan: Single, cell: Cell) -> Callable[[], dict]:
        client = self._clients[_server_of(cell.contender)]
        language = Cell(f"{cell.name}, language model", cell.contender, cell.tokens)

        def sample() -> dict:
            number = 1 + self._record.count(cell)  # of the round: 0 has warmed up
            client.parts()
            video = self._videos.url(plan.tokens, number)
            answer = client.ask(video, OURS.get(cell.contender))
            spent = client.parts()
            parts = {
                "media decode": spent["decode"],
                "processor": spent["processor"],
                "vision tower": spent["vision"],
                "language model": spent["language"],
            }
            parts["other"] = answer.first - sum(parts.values())
            work = self._work(answer, plan.tokens)
            self._record.add(language, parts["language model"], work=work)
            return {"time_s": answer.first, "work": work, "parts": parts}

        return sample

    def at_once(self, plan: AtOnce, cell: Cell) -> Callable[[], dict]:
        client = self._clients[_server_of(cell.contender)]

        def sample() -> dict:
            # Numbers that no other cell of this length uses.
            first = 1000 * plan.requests + plan.requests * self._record.count(cell)
            numbers = range(first, first + plan.requests)
            urls = [self._videos.url(plan.tokens, number) for number in numbers]
            seconds, answers = client.ask_at_once(
                urls, OURS.get(cell.contender), plan.answer_tokens
            )
            client.parts()
            return {
                "time_s": seconds,
                "work": median(self._work(answer, plan.tokens) for answer in answers),
                "requests_per_s": plan.requests / seconds,
                "ttft_s": median(answer.first for answer in answers),
            }

        return sample

    def decoding(self, plan: Decoding, cell: Cell) -> Callable[[], dict]:
        client = self._clients[_server_of(cell.contender)]
        settings = DECODING.get(cell.contender)
        video = self._videos.url(plan.tokens, 1)  # of the first round of TTFT
        cached = False

        def sample() -> dict:
            nonlocal cached
            if not cached:  # the first fills the prefix cache
                progress(f"tpot, {plan.tokens} tokens, {cell.contender}: prefill")
                client.ask(video, settings)
                cached = True
            answer = client.ask(video, settings, plan.answer_tokens)
            client.parts()
            return {"time_s": answer.per_token}

        return sample

    def _work(self, answer: Answer, tokens: int) -> float:
        """Executed FLOPs over dense; stock servers do not say, so from the prompt's length."""
        if answer.flops_ratio is not None:
            return answer.flops_ratio
        return flops(self._shape, answer.prompt_tokens) / flops(self._shape, tokens + self._text)


@contextmanager
def _servers(
    folder: Path, names: set[str], shape: str, longest: int, record: Record, compiled: bool
) -> Iterator[dict[str, Client]]:
    """Clients of one running server for each of ``names``."""
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    model = write_checkpoint(folder / "checkpoint", SHAPES[shape])
    plugins = instrument.install(folder / "plugins")
    ours = flops(SHAPES[shape], longest, attention=0.2, ffn=0.5) / flops(SHAPES[shape], longest)
    rate = pruning_rate(SHAPES[shape], longest, ours)
    record.note("EVS", {"video_pruning_rate": rate, "matched_at": longest})
    extra = {
        DENSE: [],
        EVS: ["--video-pruning-rate", str(rate)],
        "adaspark": [
            *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
            "--trust-request-mm-kwargs",
        ],
    }
    length = longest + ROOM
    common = [
        *("--served-model-name", "speed", "--load-format", "dummy", "--dtype", "bfloat16"),
        *("--block-size", "64", "--max-model-len", str(length), "--max-num-seqs", "32"),
        *("--max-num-batched-tokens", str(length)),  # the encoder cache: a video must fit
        *("--max-num-scheduled-tokens", str(min(length, CHUNK))),
        *([] if compiled else ["--enforce-eager"]),  # compiling takes minutes at the start
        *("--mm-processor-cache-gb", "0", "--skip-mm-profiling"),
        *("--limit-mm-per-prompt", json.dumps({"video": 1, "image": 0})),
        *("--media-io-kwargs", json.dumps({"video": {"video_backend": instrument.PLUGIN}})),
        *("--allowed-local-media-path", str(videos)),
        *("--worker-extension-cls", instrument.EXTENSION),
    ]
    paths = [str(plugins), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # By default vLLM keeps a core for the process that waits for the worker, and which sleeps
        # in a long step.  Threads that wait shall not spin where another could compute.
        RESERVED: os.environ.get(RESERVED, "0"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    with ExitStack() as stack:
        clients = {}
        for name in sorted(names):  # one after the other: each start uses all cores
            own = "adaspark,adaspark_http," if name == "adaspark" else ""
            progress(f"server {name}: start")
            server = VllmServer(
                model,
                *common,
                *extra[name],
                log=folder / f"{name}{' compiled' if compiled else ''}.log",
                env=env | {"VLLM_PLUGINS": f"{own}{instrument.PLUGIN}"},
            )
            stack.enter_context(server)
            server.wait_until_ready(START_SECONDS)
            clients[name] = Client(server.url, "speed")
        yield clients
