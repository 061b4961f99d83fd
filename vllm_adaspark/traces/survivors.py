"""Which tokens were kept of the pruned videos that a worker encoded lately, for traces.

Which tokens of a video stay (video/prune.py) is known on the device alone, once the video is
encoded, and stands in the encoder cache's entry.  A traced request may find its video in the prefix
cache, long after that entry has gone.  So the tokens of every pruned video are remembered here, on
the device and without waiting for it, a few bytes each.  All ranks see the same videos in the same
order, so they remember the same ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..video.prune import DIGITS

LIMIT = 16 << 20  # bytes: some thousand videos


class Survivors:
    """The last pruned videos, by the name that the encoder cache has for them."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._bytes = limit, 0
        self._digits: OrderedDict[str, torch.Tensor] = OrderedDict()  # [kept, DIGITS] uint8
        self._awaited: dict[str, list[str]] = {}  # by request: its videos that are not known yet

    def expect(self, request_id: str, videos: Iterable[str]) -> None:
        """A new request has these pruned videos."""
        awaited = [name for name in videos if name not in self._digits]
        if awaited:
            self._awaited[request_id] = awaited

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._awaited.pop(request_id, None)

    def note(self, encoder_cache: Mapping[str, torch.Tensor]) -> None:
        """Remember what was encoded in the last step; no wait for the device."""
        for request_id, videos in list(self._awaited.items()):
            for name in videos:
                if name in encoder_cache and name not in self._digits:
                    self._digits[name] = encoder_cache[name][:, -DIGITS:].to(torch.uint8)
                    self._bytes += self._digits[name].nbytes
            if all(name in self._digits for name in videos):
                del self._awaited[request_id]
        while self._bytes > self._limit:
            self._bytes -= self._digits.popitem(last=False)[1].nbytes

    def get(self, video: str) -> np.ndarray | None:
        """``[kept]`` int32 raster tokens in the order of the prompt; None if they are not known."""
        digits = self._digits.get(video)
        if digits is None:
            return None
        return digits.cpu().numpy().astype(np.int32) @ (256 ** np.arange(DIGITS)).astype(np.int32)
