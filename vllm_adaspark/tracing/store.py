"""Traces of running and finished requests, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from hashlib import blake2s

from .trace import Trace


def trace_id(request_id: str) -> str:
    """A name that is safe in a URL, as a client's request id need not be; the same on all ranks."""
    return blake2s(request_id.encode(), digest_size=8).hexdigest()


class TraceStore:
    """Traces of running and finished requests in at most ``limit`` bytes.

    The oldest finished traces make room; where that is not enough, the growing one stops, and says
    so.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running: dict[str, Trace] = {}  # by request id
        self._finished: dict[str, Trace] = {}  # by trace id, oldest first

    def __iter__(self) -> Iterator[Trace]:
        """All of them, latest first."""
        yield from sorted(
            [*self.running.values(), *self._finished.values()], key=lambda trace: -trace.started
        )

    def __getitem__(self, wanted: str) -> Trace | None:
        return next((trace for trace in self if trace.id == wanted), None)

    def make_room(self, trace: Trace, more: int) -> bool:
        """Whether ``trace`` may grow by ``more`` bytes."""
        used = sum(each.nbytes for each in self) + more
        for old in list(self._finished):
            if used <= self.limit:
                return True
            used -= self._finished.pop(old).nbytes
        if used > self.limit:
            trace.truncated = f"the traces reached trace_mb={self.limit >> 20}"
        return used <= self.limit

    def finish(self, request_id: str) -> Trace:
        trace = self.running.pop(request_id)
        trace.finished = time.time()
        self._finished[trace.id] = trace
        return trace

    def delete(self, wanted: str) -> bool:
        """Forget a trace, whether finished or running."""
        trace = self[wanted]
        if trace is not None:
            self.running.pop(trace.request_id, None)
            self._finished.pop(wanted, None)
        return trace is not None
