"""What each request asked for and where its videos lie: the facts that a step's plan is made from.

vLLM's scheduler tells every worker, on the host, which requests are new, which tokens run and which
KV blocks a request owns.  :class:`RequestTable` keeps what plans need of that, on every tensor- and
pipeline-parallel rank alike: a request's settings, which tokens of its prompt are video, and its
blocks.  Nothing is read back from a device, and token positions stay those of the stock model.

The settings come with the request's videos (and images, for a method that takes them for video), in
two ways.  The processor writes them behind each item's hash (:func:`with_settings`), which is all
that vLLM still tells a worker of a video that the prefix cache holds.  And it attaches them to each
video as a small tensor (:func:`pack_settings`), which is there when the video is encoded; tensors
are all that vLLM carries for an item.  All items of a request share them.  This module needs no
vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .settings import OFF, Settings
from .video.prune import WholePrompt

FIELD = "adaspark_video"  # of a video's multimodal item: the settings of its request
BEHIND_HASH = "#adaspark="


def pack_settings(settings: Any) -> torch.Tensor:
    """A method's ``settings`` as a tensor ``[bytes]`` (uint8, JSON) that travels with a video."""
    return torch.tensor(list(json.dumps(settings.to_dict()).encode()), dtype=torch.uint8)


def unpack_settings(packed: torch.Tensor | None, method: type) -> Any:
    """The settings that :func:`pack_settings` packed.

    A video that came past the processor, preprocessed by somebody else, has none: it runs dense.
    """
    told = OFF if packed is None else json.loads(bytes(packed.tolist()))
    return method().override(told)


def with_settings(mm_hash: str, settings: Any) -> str:
    """The hash of a video or an image, with its request's settings behind it."""
    return mm_hash + BEHIND_HASH + json.dumps(settings.to_dict())


def settings_of(feature: Any, method: type) -> Any:
    """The settings that the processor attached to a video or an image.

    Args:
        feature: vLLM's ``MultiModalFeatureSpec``.
        method: the class of the method's settings.
    """
    _, marked, told = feature.identifier.rpartition(BEHIND_HASH)
    try:
        return method().override(json.loads(told) if marked else OFF)
    except ValueError:  # a hash of somebody else's
        return method().override(OFF)


def media_of(features: Iterable[Any] | None, kinds: Sequence[str]) -> list[Any]:
    """A request's multimodal features of some kinds, in the order of the prompt."""
    return [feature for feature in features or () if feature.modality in kinds]


def videos_of(features: Iterable[Any] | None) -> list[Any]:
    """The videos among a request's multimodal features, in the order of the prompt."""
    return media_of(features, ("video",))


@dataclass(frozen=True)
class Video:
    """One video of a request, in a worker.

    Attributes:
        grid: (T, H, W) its tokens in time, height and width.
        identifier: by which vLLM knows the video when it comes again.
        pictures: gives what the model saw at each place in time, ``[height, width, 3]`` uint8 RGB;
            None if the video came as embeddings.
        encoded: gives what the vision tower made of it, ``[T * H * W, hidden]``, maybe with more
            rows behind; only in the steps that run some of its tokens.
    """

    grid: tuple[int, int, int]
    encoded: Callable[[], torch.Tensor]
    identifier: str = ""
    pictures: Callable[[], list[np.ndarray]] | None = None


@dataclass(frozen=True)
class Prompt:
    """Where a prompt's videos and images lie.

    Attributes:
        places: by kind (``"video"``, ``"image"``), vLLM's ``PlaceholderRange`` of each item.
        tokens: of the prompt.
        after_video: how many tokens at the end of each video's place are no video.
        dropped: tokens that its videos had more (video/prune.py).
        videos: in the order of the prompt; only workers know them.
        wants_all: whether the answer needs the last layer's output of every token, as
            ``prompt_logprobs`` do; only workers know.
        question: gives the text behind the videos, without the chat template's; only in workers.
    """

    tokens: int
    places: Mapping[str, Sequence[Any]]
    after_video: int = 0
    dropped: int = 0
    videos: Sequence[Video] = ()
    wants_all: bool = False
    question: Callable[[], str] = str

    def of(self, kinds: Sequence[str]) -> np.ndarray:
        """``[tokens]`` bool: which tokens belong to items of these kinds."""
        mask = np.zeros(self.tokens, bool)
        for kind in kinds:
            after = self.after_video if kind == "video" else 0
            mask |= mask_of(self.tokens, self.places.get(kind, ()), after)
        return mask

    @classmethod
    def from_features(cls, tokens: int, features: Iterable[Any] | None, **known: Any) -> Prompt:
        """From vLLM's ``MultiModalFeatureSpec`` of a request; ``known``: the other attributes."""
        places: dict[str, list[Any]] = {}
        for feature in features or ():
            places.setdefault(feature.modality, []).append(feature.mm_position)
        return cls(tokens, places, **known)


@dataclass(frozen=True)
class Request:
    """One request with video; a method may know more of it, in a class of its own.

    Attributes:
        config: its settings, of the method's class.
        is_video: ``[prompt tokens]`` bool; images too, for a method that has them in its ``media``.
        positions: ``[prompt tokens]`` int64, where tokens do not stand in the order of their
            positions and the model does not say so itself; else None.
        whole: its prompt before some tokens of its videos were dropped; None if none were.
    """

    config: Settings
    is_video: np.ndarray
    positions: np.ndarray | None = field(default=None, kw_only=True)
    whole: WholePrompt | None = field(default=None, kw_only=True)

    @cached_property
    def video_in_block(self) -> np.ndarray:
        """``[blocks]`` int64: how many video tokens each whole KV block of the prompt holds."""
        size = self.config.cube_volume
        whole = len(self.is_video) // size
        return self.is_video[: whole * size].reshape(whole, size).sum(axis=1)

    @cached_property
    def is_cube(self) -> np.ndarray:
        """``[blocks]`` bool: which whole KV blocks of the prompt hold nothing but video; what else
        is a cube is the method's to say."""
        return self.video_in_block == self.config.cube_volume

    @cached_property
    def opens_block(self) -> np.ndarray:
        """``[prompt tokens]`` bool: which video tokens are the first of their KV block."""
        at = self.is_video.nonzero()[0]
        opens = np.zeros(len(self.is_video), bool)
        opens[at[np.diff(at // self.config.cube_volume, prepend=-1) != 0]] = True
        return opens

    def video_among(self, start: int, stop: int) -> int:
        """How many of its tokens from position ``start`` to before ``stop`` are video."""
        return int(np.count_nonzero(self.is_video[start:stop]))

    def cubes_seen(self, start: int, stop: int) -> int:
        """(Token, cube) pairs of its tokens from position ``start`` to before ``stop``, each with
        the cubes before its own block."""
        return self._cubes_seen_before(stop) - self._cubes_seen_before(start)

    def _cubes_seen_before(self, position: int) -> int:
        before, seen = self._cubes_before
        size = self.config.cube_volume
        block = min(position // size, len(before) - 1)  # behind the prompt there are no more cubes
        return int(seen[block] + (position - block * size) * before[block])

    @cached_property
    def _cubes_before(self) -> tuple[np.ndarray, np.ndarray]:
        """``[blocks + 1]`` each: cubes before a block, and pairs of the tokens before that block
        with the cubes before theirs."""
        before = np.append(0, np.cumsum(self.is_cube))
        seen = np.append(0, np.cumsum(before[:-1])) * self.config.cube_volume
        return before, seen


@dataclass
class _Known:
    """A request the scheduler has told of: its facts, None without video, and its blocks."""

    request: Request | None
    blocks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    number: int = 0  # of blocks; the array has spare places

    def add(self, blocks: Sequence[int]) -> None:
        end = self.number + len(blocks)
        if end > len(self.blocks):
            grown = np.zeros(max(end, 2 * len(self.blocks)), np.int32)
            grown[: self.number] = self.blocks[: self.number]
            self.blocks = grown
        self.blocks[self.number : end] = blocks
        self.number = end


class RequestTable:
    """The requests of a worker, kept up to date by what the scheduler tells before every step.

    Args:
        describe: makes the facts of a new request from vLLM's ``NewRequestData``; None for one
            that is no concern of the method's.
    """

    def __init__(self, describe: Callable[[Any], Request | None]) -> None:
        self._describe = describe
        self._known: dict[str, _Known] = {}

    def update(self, scheduler_output: Any) -> None:
        """Take in a ``SchedulerOutput``, before its step runs."""
        for request_id in scheduler_output.finished_req_ids:
            self._known.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            known = _Known(self._describe(new))
            known.add(new.block_ids[0])
            self._known[new.req_id] = known
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            known = self._known[request_id]
            if request_id in cached.resumed_req_ids:
                known.number = 0  # preempted before, so all of its blocks are new
            if blocks is not None:
                known.add(blocks[0])

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._known

    def __getitem__(self, request_id: str) -> Request | None:
        """The facts of a request; None if it has no video."""
        return self._known[request_id].request

    def rows(self, request_ids: Sequence[str]) -> list[Request | None]:
        """The facts of a step's requests, in row order."""
        return [self._known[request_id].request for request_id in request_ids]

    def block_table(self, request_ids: Sequence[str], padding: int = 0) -> np.ndarray:
        """``[rows + padding, blocks]`` int32 physical blocks; 0 where there is none."""
        known = [self._known[request_id] for request_id in request_ids]
        width = max((k.number for k in known), default=0)
        table = np.zeros((len(known) + padding, width), np.int32)
        for row, k in enumerate(known):
            table[row, : k.number] = k.blocks[: k.number]
        return table


def mask_of(tokens: int, places: Iterable[Any], after: int = 0) -> np.ndarray:
    """``[tokens]`` bool: which tokens of a prompt lie in ``places``.

    Args:
        tokens: of the prompt.
        places: vLLM's ``PlaceholderRange`` of each video; its ``is_embed`` leaves tokens out, so a
            video may lie in several spans.
        after: how many tokens at the end of each place are no video.
    """
    mask = np.zeros(tokens, bool)
    for place in places:
        span = mask[place.offset : place.offset + place.length]
        span[:] = True if place.is_embed is None else np.asarray(place.is_embed, bool)
        span[place.length - after :] = False
    return mask
