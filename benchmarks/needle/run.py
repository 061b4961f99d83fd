"""The loop: contender by contender, cell by cell, on one server at a time.

Contenders are taken in an order in which servers change rarely and a contender that others must
match comes before them.  What the work file already has is not asked again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_adaspark.accounts.cost import Model, read_model

from . import evs
from .ask import Answers, Client
from .gates import forced
from .grid import Contender, Grid
from .offline import Engine
from .servers import Server, started
from .videos import Cell, Video, choose, write
from .work import Record, Work, file_hash

KINDS = ("stock", "adaspark", "adatp", "videonsa", "evs")
MOST_TEXT = 128  # tokens of a prompt besides the video; it is about 20


class Fleet:
    """Starts a server when another one is asked for; only one runs at a time.

    Args:
        offline: whether engines without a server take their place.
        checkpoint: the dense one.
        videonsa: the one that VideoNSA's servers have, if there are any.
        folder: of videos and logs.
        tokens: the longest video.
    """

    def __init__(
        self,
        checkpoint: Path,
        videonsa: Path | None,
        folder: Path,
        tokens: int,
        offline: bool = False,
    ) -> None:
        self._offline = offline
        self._checkpoint, self._videonsa = checkpoint, videonsa
        self._folder, self._tokens = folder, tokens
        self._running: tuple[Server, Client | Engine] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def client(self, server: Server) -> Client | Engine:
        """Whom to ask what ``server`` says."""
        if self._running is None or self._running[0] != server:
            self._stack.close()  # the one before
            self._running = None
            start = time.monotonic()
            where = (server, self._checkpoint_of(server), self._folder / "videos", self._tokens)
            if self._offline:
                client = self._stack.enter_context(Engine(*where))
            else:
                logs = self._folder / "logs"
                client = Client(self._stack.enter_context(started(*where, logs)))
            self._running = server, client
            print(f"-- {server.name}: up after {time.monotonic() - start:.0f} s", flush=True)
        return self._running[1]

    def _checkpoint_of(self, server: Server) -> Path:
        if server.kind != "videonsa":
            return self._checkpoint
        if server.gates is None:
            return self._videonsa
        return forced(self._videonsa, server.gates, self._folder / server.name)


@dataclass
class Run:
    """One grid over one checkpoint; its folder holds videos, logs and the work file."""

    grid: Grid
    checkpoint: Path
    folder: Path
    work: Work
    videonsa: Path | None = None
    dtype: str = "auto"
    offline: bool = False

    def measure(self) -> list[Record]:
        """Ask what has not been asked; returns the grid's records.

        Raises:
            ServerFailed: a server did not start.
            openai.OpenAIError: a request failed.
            RuntimeError: a server did not take all frames of a video.
        """
        most = max([self.grid.videos, *(c.more or 0 for c in self.grid.contenders)])
        chosen = {cell: choose(cell, most) for cell in self._cells()}
        (self.folder / "videos").mkdir(parents=True, exist_ok=True)
        records: dict[tuple[str, Cell], list[Record]] = {}
        jobs = [(c, cell) for c in ordered(self.grid.contenders) for cell in self.grid.cells(c)]
        asked, begun = 0, time.monotonic()
        total = sum(len(chosen[cell][self.grid.numbers(c)]) for c, cell in jobs)
        where = (self.checkpoint, self.videonsa, self.folder, self.grid.longest)
        with Fleet(*where, self.offline) as fleet:
            for contender, cell in jobs:
                videos = chosen[cell][self.grid.numbers(contender)]
                server, settings = self._resolved(contender, cell, records)
                missing = [
                    video
                    for video in videos
                    if not self.work.find(contender.name, server.name, settings, video.key)
                ]
                if missing:
                    self._ask(fleet.client(server), contender, server, settings, missing)
                records[contender.name, cell] = [
                    self.work.find(contender.name, server.name, settings, video.key)
                    for video in videos
                ]
                asked += len(videos)
                minutes = (time.monotonic() - begun) / 60
                print(
                    f"{asked}/{total} {minutes:5.1f} min  "
                    f"{summary(contender, cell, records[contender.name, cell])}",
                    flush=True,
                )
        return [record for some in records.values() for record in some]

    def _cells(self) -> list[Cell]:
        return list(
            dict.fromkeys(cell for c in self.grid.contenders for cell in self.grid.cells(c))
        )

    @cached_property
    def model(self) -> Model:
        """Sizes of the language model, for FLOPs."""
        found = {path.name: path for path in self.checkpoint.iterdir()}
        return read_model(str(self.checkpoint), found.get)

    @cached_property
    def _weights(self) -> str:
        return file_hash(self.videonsa / "model.safetensors")[:8]

    def _resolved(
        self, contender: Contender, cell: Cell, records: dict[tuple[str, Cell], list[Record]]
    ) -> tuple[Server, dict[str, Any] | None]:
        """The server and the settings, with what `like` leaves open filled in."""
        settings, rate = contender.settings, contender.rate
        if contender.like is not None:
            model = records[contender.like, cell]
            if contender.kind == "evs":
                text = round(mean(record["text_tokens"] for record in model))
                rate = evs.rate_for(self.model, mean_of(model, "flops_ratio"), cell, text)
            elif contender.kind == "adatp":
                settings = settings | {"flops": round(mean_of(model, "flops_ratio"), 3)}
            else:
                keep = max(0.001, round(mean_of(model, "attention_density"), 3))
                settings = settings | {"keep": min(keep, 0.999)}
        if contender.kind == "videonsa":
            server = Server(contender.kind, gates=contender.gates, weights=self._weights)
        else:
            server = Server(contender.kind, contender.block, rate, score=contender.score)
        return replace(server, dtype=self.dtype), settings

    def _ask(
        self, client: Client | Engine, contender, server, settings, videos: Iterable[Video]
    ) -> None:
        def one(video: Video) -> Record:
            files = write(video, self.folder / "videos")
            answers = client.ask(video, files, settings)
            return self._record(contender, server, settings, video, answers)

        with ThreadPoolExecutor(client.at_once) as pool:
            futures = [pool.submit(one, video) for video in videos]
            try:
                for future in futures:
                    self.work.add(future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _record(self, contender, server, settings, video: Video, answers: Answers) -> Record:
        cell = video.cell
        rate = server.rate if server.kind == "evs" else (settings or {}).get("prune")
        kept = cell.tokens if rate is None else evs.kept_tokens(cell, rate)
        text = answers.prompt_tokens[0] - kept
        if not 0 < text <= MOST_TEXT:
            raise RuntimeError(
                f"{server.name}, {video.key}: a prompt of {answers.prompt_tokens[0]} tokens cannot "
                f"hold {kept} video tokens and a question; the server did not take every frame"
            )
        if server.kind == "evs":
            ratio = evs.flops_ratio(self.model, kept, cell.tokens, text)
            cost = {
                "flops_ratio": ratio,
                "attention_density": kept / cell.tokens,
                "ffn_density": None,
            }
        elif server.kind == "stock":
            cost = {"flops_ratio": 1.0, "attention_density": 1.0, "ffn_density": 1.0}
        else:
            # Null where the server did not tell in time.
            usage = answers.usage or {}
            names = ("flops_ratio", "attention_density", "ffn_density")
            cost = {name: usage.get(name) for name in names}
        cost["attention_flops"] = attention_share(answers.usage)
        return {
            "contender": contender.name,
            "server": server.name,
            "settings": settings,
            "video": video.key,
            "seed": video.seed,
            "haystack": video.motion,
            "tokens": cell.tokens,
            "frame": cell.frame,
            "parts": cell.parts,
            "text_tokens": text,
            **cost,
            "seconds": [round(seconds, 3) for seconds in answers.seconds],
            "answers": [
                {
                    "skill": question.skill,
                    "depth": round(video.depth(question), 4),
                    "question": question.text,
                    "expected": question.answer,
                    "answer": said,
                }
                for question, said in zip(video.asked, answers.texts, strict=True)
            ],
        }


def attention_share(usage: dict[str, Any] | None) -> float | None:
    """Attention's FLOPs and all that serves it, over dense attention's; None from stock servers."""
    flops = (usage or {}).get("flops")
    if flops is None:
        return None
    done = flops["executed"]
    return (done["total"] - done["qkvo"] - done["ffn"]) / flops["dense"]["attention"]


def ordered(contenders: Iterable[Contender]) -> list[Contender]:
    """Server by server, and those that others are `like` before the others."""
    return sorted(contenders, key=lambda c: (KINDS.index(c.kind), c.block, c.like is not None))


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def mean_of(records: list[Record], name: str) -> float:
    """Mean of what servers told of ``name``.

    Raises:
        RuntimeError: no server told.
    """
    values = [record[name] for record in records if record[name] is not None]
    if not values:
        raise RuntimeError(f"{records[0]['contender']}: no answer has usage.adaspark.{name}")
    return mean(values)


def summary(contender: Contender, cell: Cell, records: list[Record]) -> str:
    """One line of progress."""
    right = [a["answer"] == a["expected"] for record in records for a in record["answers"]]
    seconds = mean(record["seconds"][1] for record in records)
    return (
        f"{contender.name:34} {cell.tokens:6,} tokens: {sum(right)}/{len(right)} right, "
        f"{mean_of(records, 'flops_ratio'):.0%} of the FLOPs, {seconds:.1f} s a video"
    )
