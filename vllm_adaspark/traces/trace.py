"""What one request selected, as one worker recorded it: cubes kept, and tokens that ran the FFN.

Kept bit-packed, as the layers left it: a bit per layer, KV head, sparse tile and KV block, and a
bit per layer and video token for the FFN.  Tiles that attend to everything are only their extent.
All positions are token positions in the request; cubes are counted over all its videos.
NumPy only, so that everything here can be tested, and read, without vLLM.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..video.order import encode_order
from .dropping import Dropping, attended, pairs_before
from .frames import Frames

SOURCES = "question, answer, token:N or cube:N"
_SOURCE = re.compile(r"(?:(question|answer)|(token|cube):([0-9]{1,8}))\Z")


@dataclass(frozen=True)
class Video:
    """A video's place in the prompt."""

    offset: int  # first token
    grid: tuple[int, int, int]  # merged tokens: frame pairs, rows, columns
    cube: tuple[int, int, int]
    order: str
    seconds: float | None = None  # of a frame pair
    kept: int | None = None  # tokens that are left of a pruned video
    name: str | None = None  # of its entry in the encoder cache

    @property
    def length(self) -> int:
        """Its tokens in the prompt."""
        return int(np.prod(self.grid)) if self.kept is None else self.kept

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass
class Chunk:
    """One step of the request.  Tiles in token order; *sparse* tiles are those that may leave out.

    ``kept`` has a bit for every block up to a tile's own, in which blocks that no one chooses
    (text, the own block) are set.
    """

    start: int
    end: int  # tokens past it are recorded again by a later chunk
    tile_start: np.ndarray  # [tiles]
    tile_length: np.ndarray  # [tiles]
    sparse: np.ndarray  # [tiles] bool
    kept: np.ndarray  # [layers, sparse, kv_heads, bytes] uint8
    ffn_start: np.ndarray  # [cubes] first token of each cube whose tokens could skip the FFN
    ffn: np.ndarray  # [layers, cubes, bytes] uint8, set where a token ran
    counted: int = 0  # bytes that every rank counts for it, see store.py

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def tokens_per_tile(self, ranges: list[tuple[int, int]]) -> np.ndarray:
        """How many tokens of ``ranges`` each tile has, ``[tiles]``."""
        first, last = self.tile_start, np.minimum(self.tile_start + self.tile_length, self.end)
        count = np.zeros(len(first), np.int64)
        for low, high in ranges:
            count += np.maximum(np.minimum(last, high) - np.maximum(first, low), 0)
        return count


def pack_bits(bits: np.ndarray) -> np.ndarray:
    """``[..., n]`` bool to ``[..., ceil(n / 8)]`` uint8, the first bit lowest."""
    return np.packbits(bits, axis=-1, bitorder="little")


def unpack_bits(packed: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` bits of ``[..., bytes]``; bits past the end are 0."""
    if packed.shape[-1] * 8 < count:
        missing = -(-count // 8) - packed.shape[-1]
        packed = np.concatenate([packed, np.zeros((*packed.shape[:-1], missing), np.uint8)], -1)
    return np.unpackbits(packed, axis=-1, count=count, bitorder="little")


def parse_source(source: str) -> tuple[str, int | None]:
    """``"question"``, ``"answer"``, ``"token:N"`` or ``"cube:N"`` taken apart.

    Raises:
        ValueError: it is none of these.
    """
    match = _SOURCE.match(source)
    if match is None:
        raise ValueError(f"source={source[:40]!r}: expected {SOURCES}, with N from 0 on")
    whole, kind, number = match.groups()
    return (whole, None) if whole else (kind, int(number))


@dataclass
class Trace:
    """One request's trace on one worker, which has some layers and some KV heads."""

    id: str
    request_id: str
    started: float  # Unix time
    prompt_ids: np.ndarray  # [prompt tokens] int32
    videos: list[Video]
    settings: dict[str, Any]
    block_size: int
    layers: range
    cubes: np.ndarray | None = None  # [cubes] logical KV block of each; None: see cube_blocks
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer
    cached: int = 0  # prompt tokens that came from the prefix cache: they have no tiles here
    finished: float | None = None
    truncated: str | None = None  # why recording stopped early
    answer_ids: MutableSequence[int] = field(default_factory=lambda: array("i"))
    usage: dict[str, Any] | None = None  # the request's counts, once it is finished
    chunks: list[Chunk] = field(default_factory=list)
    survivors: dict[int, np.ndarray] = field(default_factory=dict)  # of pruned videos: [kept]
    dropping: Dropping | None = None  # where video tokens left between the layers
    dropping_bytes: int = 0  # bytes it may take
    frames: Frames = field(default_factory=Frames)
    counted: int = 0  # bytes that every rank counts for it, see store.py
    reserved: int = 0  # bytes kept free for it until its request ends, those counted included
    chunk_bytes: int = 0  # that this rank's chunks hold

    def __post_init__(self) -> None:
        kept = sum(self.videos[number].kept for number in self.pruned)
        self.counted = (
            self.prompt_ids.nbytes + self.frames.reserved + 4 * kept + self.dropping_bytes
        )
        self.counted += 4 * len(self.request_id)  # a client may choose it, of any length

    @property
    def pruned(self) -> list[int]:
        """The numbers of its pruned videos."""
        return [number for number, video in enumerate(self.videos) if video.kept is not None]

    @property
    def nbytes(self) -> int:
        """What this rank holds of it."""
        kept = sum(each.nbytes for each in self.survivors.values())
        held = self.prompt_ids.nbytes + self.frames.nbytes + self.chunk_bytes + kept
        return held + (self.dropping_bytes if self.dropping is not None else 0)

    @property
    def end(self) -> int:
        """Tokens so far.  Only the rank that samples knows the answer's ids; all know its tiles."""
        known = len(self.prompt_ids) + len(self.answer_ids)
        return max([known, *(chunk.end for chunk in self.chunks)])

    @cached_property
    def cube_blocks(self) -> np.ndarray:
        """``[cubes]`` logical KV block of each cube: as its method says, or blocks that are video
        throughout."""
        if self.cubes is not None:
            return self.cubes
        size = self.block_size
        blocks = [np.arange(-(-video.offset // size), video.end // size) for video in self.videos]
        return np.concatenate(blocks)

    def add(self, chunk: Chunk) -> None:
        """Add a step.  Tokens recorded before (the request was preempted) count as it has them."""
        while self.chunks and self.chunks[-1].start >= chunk.start:
            again = self.chunks.pop()
            self.counted -= again.counted
            self.chunk_bytes -= again.nbytes
        if self.chunks:
            self.chunks[-1].end = min(self.chunks[-1].end, chunk.start)
        self.chunks.append(chunk)
        self.counted += chunk.counted
        self.chunk_bytes += chunk.nbytes

    def add_answer(self, tokens: list[int]) -> None:
        """Add sampled tokens.  Async scheduling may sample one more after the last: not counted."""
        for token in tokens:
            if not self.answer_ids or self.answer_ids[-1] not in self.stop_ids:
                self.answer_ids.append(token)

    # -- what can be asked ------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """One line of the list of traces."""
        return {
            "id": self.id,
            "request_id": self.request_id,
            "started": self.started,
            "finished": self.finished,
            "prompt_tokens": len(self.prompt_ids),
            "video_tokens": sum(video.length for video in self.videos),
            "answer_tokens": len(self.answer_ids),
            "cached_tokens": self.cached,
            "bytes": self.nbytes,
            "truncated": self.truncated,
        }

    def meta(self) -> dict[str, Any]:
        """Everything but the selection itself, JSON-ready."""
        size = self.block_size
        return self.summary() | {
            "settings": self.settings,
            "block_size": size,
            "layers": list(self.layers),
            "videos": [
                {
                    "offset": video.offset,
                    "grid": list(video.grid),
                    "cube": list(video.cube),
                    "order": video.order,
                    "tokens": video.length,
                    "token_order": encode_order(self.survivors.get(number)),
                    "seconds_per_frame": video.seconds,
                    "frames": self.frames.number(number),
                }
                for number, video in enumerate(self.videos)
            ],
            "cube_starts": self._cube_starts.tolist(),
            "spans": self._spans(),
            "dropping": None if self.dropping is None else self.dropping.facts,
            "density": self._density(),
        }

    def heat(self, source: str) -> dict[str, Any]:
        """Which cubes ``source`` attended.

        Returns:
            ``heat``: ``[layers][cubes]`` share of (KV head, source token) pairs that attended, None
            where no source token comes after the cube; ``tokens``: source tokens recorded;
            ``wanted``: source tokens there are.
        """
        ranges = self._ranges(source)
        wanted = sum(high - low for low, high in ranges)
        if self.dropping is not None:
            where = self._where(ranges)
            seen, there = attended(self._alive(), self._cube_starts, self.block_size, where)
            return self._heat(seen, there, int(where.sum()), wanted)
        blocks, size = self.cube_blocks, self.block_size
        seen = np.zeros(len(blocks))
        there = np.zeros((len(self.layers), len(blocks)))
        tokens = 0
        kept, weights = [], []  # of the sparse tiles, over all chunks
        for chunk in self.chunks:
            count = chunk.tokens_per_tile(ranges)
            tokens += int(count.sum())
            last = chunk.tile_start + chunk.tile_length - 1
            sparse = np.flatnonzero(chunk.sparse & (count > 0))
            if len(sparse):
                upto = blocks <= (last[sparse] // size)[:, None]  # [sparse, cubes]
                weights.append(count[sparse][:, None] * upto)
                kept.append(chunk.kept[:, np.cumsum(chunk.sparse)[sparse] - 1])
            for tile in np.flatnonzero(~chunk.sparse & (count > 0)):
                begin, end = chunk.tile_start[tile], min(last[tile] + 1, chunk.end)
                for low, high in ranges:
                    first = np.maximum(blocks * size, max(begin, low))
                    after = np.maximum(min(end, high) - first, 0)  # [cubes] tokens from it on
                    seen += after
                    there += after
        if kept:
            weight = np.concatenate(weights)
            seen += weight.sum(0)
            widest = max(part.shape[-1] for part in kept)
            pad = [[(0, 0)] * 3 + [(0, widest - part.shape[-1])] for part in kept]
            together = np.concatenate([np.pad(part, p) for part, p in zip(kept, pad)], axis=1)
            for layer, packed in enumerate(together):
                bits = unpack_bits(packed, int(blocks[-1]) + 1)[..., blocks]
                there[layer] += (bits.mean(1) * weight).sum(0)
        return self._heat(seen, there, tokens, wanted)

    def _heat(
        self, seen: np.ndarray, there: np.ndarray, tokens: int, wanted: int
    ) -> dict[str, Any]:
        """From (KV head, source token) pairs ``[cubes]``, and those that attended."""
        share = there / np.maximum(seen, 1)
        unseen = seen == 0
        heat = [
            [None if missing else round(float(x), 4) for x, missing in zip(row, unseen)]
            for row in share
        ]
        return {"layers": list(self.layers), "heat": heat, "tokens": tokens, "wanted": wanted}

    def ffn(self) -> dict[str, Any]:
        """Which video tokens ran the FFN, in prompt order over all videos.

        Where tokens left between the layers, these are the ones that a layer saw.

        Returns:
            ``ran``: per layer, packed bits, one per video token; ``recorded``: the same for which
            tokens this trace knows; ``share``: per layer, of the recorded ones.
        """
        place = np.full(max(self.videos[-1].end, 1), -1)
        position = np.concatenate([np.arange(v.offset, v.end) for v in self.videos])
        place[position] = np.arange(len(position))
        ran = np.ones((len(self.layers), len(position)), np.uint8)
        if self.dropping is not None:
            ran[:] = self.dropping.alive(self.layers)
        recorded = np.zeros(len(position), bool)
        for chunk in self.chunks:
            recorded |= (position >= chunk.start) & (position < chunk.end)
            known = chunk.ffn_start < chunk.end
            if known.any():
                tokens = place[chunk.ffn_start[known][:, None] + np.arange(self.block_size)]
                ran[:, tokens] = unpack_bits(chunk.ffn[:, known], self.block_size)
        share = ran[:, recorded].mean(1) if recorded.any() else np.ones(len(self.layers))
        return {
            "layers": list(self.layers),
            "ran": [pack_bits(row).tobytes() for row in ran],
            "recorded": pack_bits(recorded).tobytes(),
            "share": [round(float(x), 4) for x in share],
        }

    # -- helpers ----------------------------------------------------------------------------------

    @property
    def _cube_starts(self) -> np.ndarray:
        return self.cube_blocks * self.block_size

    def _where(self, ranges: list[tuple[int, int]]) -> np.ndarray:
        """``[tokens]`` bool: which recorded tokens lie in ``ranges``."""
        where = np.zeros(max(chunk.end for chunk in self.chunks), bool)
        for low, high in ranges:
            where[low:high] = True
        return where

    def _alive(self) -> np.ndarray:
        """``[layers, tokens]`` bool: which recorded tokens a layer saw."""
        alive = np.ones((len(self.layers), len(self._where([]))), bool)
        position = np.concatenate([np.arange(v.offset, v.end) for v in self.videos])
        alive[:, position] = self.dropping.alive(self.layers)
        return alive

    def _spans(self) -> list[dict[str, Any]]:
        """The request's tokens in runs of one kind; text runs with their token ids.

        Text before the first video is ``before``, other prompt text ``question``.
        """
        spans, position = [], 0

        def text(kind: str, start: int, ids: list[int]) -> None:
            if ids:
                spans.append({"kind": kind, "start": start, "end": start + len(ids), "ids": ids})

        ids = self.prompt_ids.tolist()
        for number, video in enumerate(self.videos):
            text("question" if number else "before", position, ids[position : video.offset])
            span = {"kind": "video", "start": video.offset, "end": video.end, "video": number}
            spans.append(span)
            position = video.end
        text("question", position, ids[position:])
        text("answer", len(ids), list(self.answer_ids))
        return spans

    def _ranges(self, source: str) -> list[tuple[int, int]]:
        """Token positions ``source`` stands for, as ``[low, high)`` pairs."""
        kind, number = parse_source(source)
        if kind == "cube":
            if number >= len(self.cube_blocks):
                raise ValueError(
                    f"source={source!r}: the request has {len(self.cube_blocks)} cubes"
                )
            start = int(self.cube_blocks[number]) * self.block_size
            return [(start, start + self.block_size)]
        if kind == "token":
            if number >= self.end:
                raise ValueError(f"source={source!r}: the request has {self.end} tokens")
            return [(number, number + 1)]
        return self._kind(kind)

    def _kind(self, kind: str) -> list[tuple[int, int]]:
        """Where tokens of a kind are: video, question or answer."""
        if kind == "answer":  # the last token is never read, so nothing attends as it
            start = len(self.prompt_ids)
            ends = [start, start + len(self.answer_ids) - 1, *(chunk.end for chunk in self.chunks)]
            return [(start, max(ends))]
        return [(span["start"], span["end"]) for span in self._spans() if span["kind"] == kind]

    def _density(self) -> dict[str, list[float | None]]:
        """Per kind of token and layer: the share of the preceding cubes attended; None: no data."""
        kinds = {kind: self._kind(kind) for kind in ("video", "question", "answer")}
        if self.dropping is not None:
            alive = self._alive()
            pairs = {
                kind: pairs_before(alive, self._cube_starts, self.block_size, self._where(ranges))
                for kind, ranges in kinds.items()
            }
            return self._shares(
                {kind: seen for kind, (seen, _) in pairs.items()},
                {kind: kept for kind, (_, kept) in pairs.items()},
            )
        end = max(self.end, self.videos[-1].end) + 1
        token_block = np.arange(end) // self.block_size
        is_cube = np.zeros(token_block[-1] + 1, bool)
        is_cube[self.cube_blocks] = True
        # Preceding cubes of all tokens up to each, so that a sum over a run is one difference.
        before = np.append(0, np.cumsum((np.cumsum(is_cube) - is_cube)[token_block]))
        seen = dict.fromkeys(kinds, 0.0)
        kept = {kind: np.zeros(len(self.layers)) for kind in kinds}
        for chunk in self.chunks:
            last = chunk.tile_start + chunk.tile_length
            own = (last[chunk.sparse] - 1) // self.block_size
            cubes = pack_bits(is_cube & (np.arange(len(is_cube)) < own[:, None]))
            width = min(cubes.shape[1], chunk.kept.shape[-1])
            chosen = chunk.kept[..., :width] & cubes[None, :, None, :width]
            # [layers, sparse], averaged over KV heads
            number_kept = np.bitwise_count(chosen).sum(-1, dtype=np.int64).mean(2)
            for kind, ranges in kinds.items():
                tokens = chunk.tokens_per_tile(ranges)
                pairs = np.zeros(len(last))
                for low, high in ranges:
                    first = np.clip(chunk.tile_start, low, high)
                    pairs += before[np.clip(np.minimum(last, chunk.end), first, high)]
                    pairs -= before[first]
                seen[kind] += pairs.sum()
                kept[kind] += pairs[~chunk.sparse].sum() + number_kept @ tokens[chunk.sparse]
        return self._shares(seen, kept)

    @staticmethod
    def _shares(
        seen: dict[str, float], kept: dict[str, np.ndarray]
    ) -> dict[str, list[float | None]]:
        return {
            kind: [round(float(x / seen[kind]), 4) if seen[kind] else None for x in kept[kind]]
            for kind in kept
        }
