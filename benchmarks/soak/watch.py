"""What a process and its children take, sampled while they run: memory, files, threads."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

NAMED = {"rss": "together"}  # heads of the table
COUNTS = ("rss", "anonymous", "shared", "files", "threads")


GONE = (FileNotFoundError, ProcessLookupError)  # a thread or process that has ended meanwhile


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found, children = [], [pid]
    while children:
        pid = children.pop()
        found.append(pid)
        with contextlib.suppress(*GONE):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(*GONE):
                    children += [int(child) for child in (task / "children").read_text().split()]
    return found


def sample(pid: int) -> dict[str, float] | None:
    """Memory in MiB, open files and threads of one process; None if it is gone."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except GONE:
        return None
    memory = {
        name: int(status.get(key, "0 kB").split()[0]) / 1024
        for name, key in (("rss", "VmRSS"), ("anonymous", "RssAnon"), ("shared", "RssShmem"))
    }
    return {**memory, "files": files, "threads": int(status["Threads"])}


def name_of(pid: int) -> str:
    """What a process calls itself: vLLM gives its processes titles."""
    title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    return title.removeprefix("VLLM::") if "python" not in title else "APIServer"


@dataclass
class Watch:
    """Samples of a server's processes.

    Attributes:
        pid: of the server.
        seconds: since the start, of each sample.
        processes: by name, each count's samples.
    """

    pid: int
    began: float = field(default_factory=time.monotonic)
    seconds: list[float] = field(default_factory=list)
    processes: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _labels: dict[int, str] = field(default_factory=dict)  # of the processes, by their id

    def take(self) -> None:
        self.seconds.append(time.monotonic() - self.began)
        for pid in descendants(self.pid):
            counts = sample(pid)
            if counts is None or counts["rss"] < 50:  # resource trackers and the like
                continue
            with contextlib.suppress(*GONE):
                held = self.processes.setdefault(self._label(pid), {c: [] for c in COUNTS})
                for count, value in counts.items():
                    held[count] += [0.0] * (len(self.seconds) - 1 - len(held[count])) + [value]
        for held in self.processes.values():  # those that have ended
            for values in held.values():
                values += [0.0] * (len(self.seconds) - len(values))

    def _label(self, pid: int) -> str:
        """A process's name, numbered where there are several of it."""
        if pid not in self._labels:
            name = name_of(pid)
            number = sum(label.startswith(name) for label in self._labels.values())
            self._labels[pid] = f"{name} {number + 1}" if number else name
        return self._labels[pid]

    async def every(self, seconds: float) -> None:
        while True:
            self.take()
            await asyncio.sleep(seconds)

    def total(self, count: str) -> list[float]:
        return [sum(values) for values in zip(*(p[count] for p in self.processes.values()))]

    def growth(self, count: str) -> float:
        """How much more the last quarter has than the second: on average, threads at the least.

        Threads come and go with the traffic, by dozens; those that leak raise the floor.
        """
        values = self.total(count)
        quarter = max(1, len(values) // 4)
        second, last = values[quarter : 2 * quarter] or values, values[-quarter:]
        return min(last) - min(second) if count == "threads" else mean(last) - mean(second)

    def rows(self) -> list[dict[str, float]]:
        """A sample each: minutes, resident MiB of each process, files and threads of all."""
        columns = {"minute": [seconds / 60 for seconds in self.seconds]}
        columns |= {name: counts["rss"] for name, counts in self.processes.items()}
        columns |= {count: self.total(count) for count in ("rss", "files", "threads")}
        return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]

    def table(self, most: int = 10) -> str:
        """Some of the rows, in Markdown: the first, the last, and what lies between evenly."""
        rows = self.rows()
        step = max(1, -(-(len(rows) - 1) // (most - 1)))
        shown = [*rows[:-1:step], rows[-1]]
        heads = [*shown[0]]
        lines = ["| " + " | ".join(NAMED.get(head, head) for head in heads) + " |"]
        lines.append("|" + "---|" * len(heads))
        for row in shown:
            numbers = (f"{row[head]:,.{head == 'minute':d}f}" for head in heads)
            lines.append("| " + " | ".join(numbers) + " |")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """A curve of memory for each process, and of files and threads together."""
        from matplotlib import pyplot

        figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 6))
        minutes = [seconds / 60 for seconds in self.seconds]
        for name, counts in self.processes.items():
            above.plot(minutes, counts["rss"], label=name)
        above.plot(minutes, self.total("rss"), label="together", color="black")
        above.set(ylabel="resident memory, MiB", ylim=(0, None))
        for count in ("files", "threads"):
            below.plot(minutes, self.total(count), label=count)
        below.set(xlabel="minutes", ylabel="of all processes", ylim=(0, None))
        for axes in (above, below):
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
