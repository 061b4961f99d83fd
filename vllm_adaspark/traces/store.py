"""Traces of running and finished requests, in bounded memory, the same ones on every rank.

Every rank of an engine keeps its own part of each trace, and a trace of which one rank lost its
part is worth nothing.  So ranks must decide alike what to keep, without asking each other.  They
see the same steps in the same order; and they do not count what they hold, which differs from rank
to rank, but what the rank with most layers would hold (:class:`Sizes`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2s

import numpy as np

from ..paged.plan import MAX_TEXT_TILES
from .trace import Trace

MOST_TRACES = 256  # all steps and all readers look through them
CHUNK_BYTES = 1024  # of a chunk's Python objects
TICK = 1e-3  # seconds, at the least, between the starts of two traces
TILE_BYTES = 8 + 8 + 1  # of a tile's start, length and kind


@dataclass(frozen=True)
class Sizes:
    """What parts of a trace take at most, on any rank.

    Attributes:
        layers: of the pipeline stage that has most.
        kv_heads: of each tensor-parallel rank.
        block_size: tokens in a KV block.
        step_tokens: the most that a step computes.
        choices: that a cube's tokens make: one for all, or each its own.
    """

    layers: int
    kv_heads: int
    block_size: int
    step_tokens: int
    choices: int = 1

    def chunk(self, tiles: int, sparse: int, blocks: int, cubes: int) -> int:
        """Bytes of a step: its tiles, those of them that chose among ``blocks``, and FFN cubes."""
        ran = cubes * (8 + self.layers * -(-self.block_size // 8))
        return CHUNK_BYTES + tiles * TILE_BYTES + sparse * self._choice(blocks) + ran

    def _choice(self, blocks: int) -> int:
        """Bytes of one tile's choice among so many."""
        return self.layers * self.kv_heads * -(-blocks // 8)

    def prompt(self, trace: Trace, computed: int) -> int:
        """Bytes that a prompt's steps will take.

        Args:
            trace: the request's.
            computed: tokens that were in the prefix cache.
        """
        end, size = len(trace.prompt_ids), self.block_size
        steps = max(1, -(-(end - computed) // self.step_tokens))
        total = steps * self.chunk(2, 0, 0, 0)  # before the first cube, and at the edge
        cubes = trace.cube_blocks[trace.cube_blocks * size >= computed]
        if not len(cubes):
            return total
        blocks = -(-end // size)
        text = end - max(computed, int(cubes[0]) * size) - len(cubes) * size
        text = min(max(text, 0), MAX_TEXT_TILES)
        tiles = text + len(cubes) * self.choices
        total += self.chunk(tiles, text, blocks, len(cubes)) - CHUNK_BYTES
        # A cube's choice is kept over the blocks of its step, which ends at most so much later.
        upto = np.minimum(cubes + 1 + self.step_tokens // size, blocks)
        return total + self.choices * sum(self._choice(int(last)) for last in upto)


def trace_id(request_id: str) -> str:
    """A name that is safe in a URL, as a client's request id need not be; the same on all ranks."""
    return blake2s(request_id.encode(errors="backslashreplace"), digest_size=8).hexdigest()


class TraceStore:
    """Traces of running and finished requests that count at most ``limit`` bytes.

    A trace that fits beside the running ones takes the place of the oldest finished ones, as many
    as it needs.  One that does not fit takes nobody's place: it stays without what finds no room,
    and says so.  There are never more than ``MOST_TRACES``.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._latest = 0.0  # when the latest trace started
        self.running: dict[str, Trace] = {}  # by request id
        self._finished: dict[str, Trace] = {}  # by trace id, oldest first

    def __iter__(self) -> Iterator[Trace]:
        """All of them, latest first."""
        yield from sorted(
            [*self.running.values(), *self._finished.values()], key=lambda trace: -trace.started
        )

    def __getitem__(self, wanted: str) -> Trace | None:
        return next((trace for trace in self if trace.id == wanted), None)

    def start(self, trace: Trace, expected: int) -> bool:
        """Take a trace in, with room for its whole prompt if possible.

        Args:
            trace: of a request that is about to run.
            expected: bytes its chunks will count by the end of the prompt.

        Returns:
            False if not even its tokens find room, or too many run; then it is not taken in.
        """
        if len(self.running) >= MOST_TRACES:
            return False
        whole = trace.counted + expected
        if self._has_room(trace, whole):
            trace.reserved = whole
        else:
            trace.frames.forget()
            trace.counted -= trace.frames.reserved
            trace.truncated = (
                f"nothing was recorded: it takes about {whole / 2**20:.1f} MiB, and running "
                f"requests' traces left {(self.limit - self._of_others(trace)) / 2**20:.1f} MiB "
                f"of trace_mb={self.limit >> 20}"
            )
            if not self._has_room(trace, trace.counted):
                return False
        # The system's clock may be set back, and the latest trace is to stay the latest.
        self._latest = trace.started = max(trace.started, self._latest + TICK)
        self.running[trace.request_id] = trace
        while self._finished and len(self.running) + len(self._finished) > MOST_TRACES:
            del self._finished[next(iter(self._finished))]
        return True

    def grow(self, trace: Trace, more: int) -> bool:
        """Whether ``trace`` may grow by ``more`` bytes; if not, it is cut here."""
        fits = self._has_room(trace, trace.counted + more)
        if not fits:
            trace.truncated = f"the traces reached trace_mb={self.limit >> 20}"
        return fits

    def _has_room(self, trace: Trace, bytes: int) -> bool:
        """Whether ``trace`` may count so much; then the oldest finished ones make room."""
        used = self._of_others(trace) + max(bytes, trace.reserved)
        if used > self.limit:
            return False
        used += sum(old.counted for old in self._finished.values())
        for oldest in list(self._finished):
            if used <= self.limit:
                break
            used -= self._finished.pop(oldest).counted
        return True

    def _of_others(self, trace: Trace) -> int:
        """What running requests' traces hold, or will, without this one."""
        others = (each for each in self.running.values() if each is not trace)
        return sum(max(each.counted, each.reserved) for each in others)

    def finish(self, request_id: str) -> Trace:
        trace = self.running.pop(request_id)
        trace.finished, trace.reserved = max(time.time(), trace.started), 0
        self._finished[trace.id] = trace
        return trace

    def delete(self, wanted: str) -> bool:
        """Forget a trace, whether finished or running."""
        trace = self[wanted]
        if trace is not None:
            self.running.pop(trace.request_id, None)
            self._finished.pop(wanted, None)
        return trace is not None
