"""The loop: one engine at a time, each in a process of its own, until everything is answered.

The journal has every answer as soon as it is there, so whatever ends this process, the same command
goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import Job, serve
from .grid import Contender, by_engine
from .journal import Journal
from .questions import Question

LOG = "engine.log"
LOG_LINES = 12  # shown of an engine that did not start
STOP_SECONDS = 20
SAY_EVERY = 30.0  # seconds between lines of progress where there is no terminal
PEAK = 0.25  # share of its speed at products of matrices that a machine reaches, as a first guess
START_SECONDS = 45  # an engine's, as a first guess


@dataclass
class Work:
    """All that is to be answered.

    Attributes:
        contenders: the grid, the reference first.
        videos: the questions of each video.
        flops: dense FLOPs of a prompt about each video, by its name: what its time goes with.
        journal: what was answered.
        out: folder of the journal and the log.
    """

    contenders: Sequence[Contender]
    videos: Sequence[Sequence[Question]]
    flops: dict[str, float]
    journal: Journal
    out: Path

    def missing(self, contender: Contender) -> list[list[Question]]:
        """The videos that a contender has not answered about."""
        return [
            list(questions)
            for questions in self.videos
            if self.journal.find(contender.name, questions[0].name) is None
        ]

    def jobs(self) -> list[tuple[list[Contender], dict[str, list[list[Question]]]]]:
        """For each engine that still has something to do, its contenders and their videos."""
        found = []
        for contenders in by_engine(self.contenders).values():
            left = {each.name: self.missing(each) for each in contenders}
            if any(left.values()):
                found.append(([each for each in contenders if left[each.name]], left))
        return found

    @property
    def total(self) -> int:
        """Contenders times videos."""
        return len(self.contenders) * len(self.videos)


def run(work: Work, make_job: Callable[..., Job], say: Callable[[str], None]) -> dict[str, str]:
    """Have everything answered that is missing.

    Args:
        work: all there is.
        make_job: makes the job of some contenders and their videos.
        say: told what is being done.

    Returns:
        Why contenders did not run whose engine did not start, by their names.
    """
    failed: dict[str, str] = {}
    jobs = work.jobs()
    progress = Progress(work, len(jobs), say)
    for number, (contenders, videos) in enumerate(jobs, start=1):
        names = ", ".join(each.name for each in contenders[:3])
        more = f" and {len(contenders) - 3} more" if len(contenders) > 3 else ""
        progress.starting(f"engine {number} of {len(jobs)}, for {names}{more}")
        why = _one_engine(make_job(contenders, videos), work, progress)
        if why is not None:
            progress.say(f"  it failed: {why}")
            failed |= {each.name: why for each in contenders if work.missing(each)}
    progress.end()
    return failed


def _one_engine(job: Job, work: Work, progress: Progress) -> str | None:
    """Run a job; returns why it ended early, None if it did not."""
    with process(job) as (pipe, child):
        while True:
            try:
                kind, what = _receive(pipe, progress)
            except (EOFError, ConnectionResetError):
                child.join()
                return None if child.exitcode == 0 else _ended(child.exitcode, job.log)
            if kind == "failed":
                return what
            if kind == "speed":
                progress.speed(what)
            elif kind == "up":
                progress.up(what)
            else:
                work.journal.add(what)
                progress.answered(what)


def _receive(pipe: Any, progress: Progress) -> tuple[str, Any]:
    while not pipe.poll(1.0):
        progress.tick()
    return pipe.recv()


def _ended(code: int | None, log: Path) -> str:
    """Why a process may have ended that did not say so."""
    killed = "; it was killed: was there memory enough?" if code == -signal.SIGKILL else ""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    shown = "".join(f"\n    {line}" for line in lines[-LOG_LINES:])
    return f"the engine's process ended with {code}{killed}; {log} ends with:{shown}"


@contextlib.contextmanager
def process(job: Job) -> Iterator[tuple[Any, Any]]:
    """A process that runs a job: the pipe that it sends through, and itself.  It ends with the
    block, and so do its children.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=serve, args=(job, theirs), name="engine")
    # The child begins in this process's group: a Ctrl-C in its first moments is not for it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, before)
    theirs.close()
    try:
        yield ours, child
    finally:
        ours.close()
        _stop(child)


def _stop(child: Any) -> None:
    """Ask a process to end, then end it and what it has started."""
    if child.is_alive():
        child.terminate()
        child.join(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # it leads a group of its own
    child.join()


class Progress:
    """Says how far a run has come, and how long it will take.

    Time goes with the dense FLOPs of a video's prompt: at first as this machine's speed suggests,
    then as it went so far.
    """

    def __init__(self, work: Work, engines: int, say: Callable[[str], None]) -> None:
        self._work, self._engines, self._say = work, engines, say
        self._terminal = sys.stderr.isatty()
        self._done = self._seconds = 0.0  # FLOPs answered in this run, and the time they took
        self._last = self._said = time.monotonic()
        self._guessed = False
        self._refused: set[str] = set()  # contenders of which it was said
        self._starting = False

    def starting(self, what: str) -> None:
        """An engine starts, which is no time of answering."""
        self._starting = True
        self.say(what)

    def up(self, seconds: float) -> None:
        """It has started."""
        self._starting = False
        self.say(f"  it is up after {seconds:.0f} s")

    def say(self, what: str) -> None:
        """A line of its own."""
        self._erase()
        self._say(what)
        self._last = self._said = time.monotonic()

    def speed(self, flops_per_second: float) -> None:
        """The machine's speed is known: guess, once."""
        if not self._guessed and self._left():
            self._guessed = True
            seconds = self._left() / (PEAK * flops_per_second) + START_SECONDS * self._engines
            self.say(f"  a first guess at the time it takes: {span(seconds)}; a better one follows")

    def answered(self, line: dict[str, Any]) -> None:
        """A contender has answered about a video."""
        now = time.monotonic()
        self._done += self._work.flops[line["video"]]
        self._seconds += now - self._last
        self._last = now
        if "refused" in line and line["contender"] not in self._refused:
            self._refused.add(line["contender"])
            self.say(f"  {line['contender']} refused {line['video']}: {line['refused']}")
        contender = next(c for c in self._work.contenders if c.name == line["contender"])
        if not self._work.missing(contender):
            self.say(f"  {self._how_far()}: {contender.name} is done")
        else:
            self.tick()

    def tick(self) -> None:
        """Show that it goes on."""
        if self._terminal:
            shown = f"starting, {self._since():.0f} s" if self._starting else self._how_far()
            sys.stderr.write(f"\r\033[K  {shown}")
            sys.stderr.flush()
        elif self._since() > SAY_EVERY and not self._starting and self._seconds:
            self._said = time.monotonic()
            self._say(f"  {self._how_far()}")

    def end(self) -> None:
        """Nothing is left."""
        self._erase()

    def _erase(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def _since(self) -> float:
        """Seconds since the last line."""
        return time.monotonic() - self._said

    def _left(self) -> float:
        """FLOPs of what is missing."""
        return sum(
            self._work.flops[questions[0].name]
            for contender in self._work.contenders
            for questions in self._work.missing(contender)
        )

    def _how_far(self) -> str:
        done = f"{len(self._work.journal)} of {self._work.total}"
        left = self._left()
        if not self._done or not left:
            return done
        return f"{done}, about {span(left * self._seconds / self._done)} left"


def span(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
