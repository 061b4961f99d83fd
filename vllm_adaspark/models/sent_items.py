"""Media that vLLM's sender cache believes to be in the engine: taken back if they never got there.

The API server caches a request's media by their hash while the request is still being checked, and
the next request with the same video goes to the engine without data.  If the first one was refused
after that, or its client left, nothing was ever sent, and the next request is answered with a 500
(vLLM #43941).  Here every item that goes into the cache is noted, and whoever sees a request end
before it reached the engine takes back what was cached meanwhile.  Taking back too much does no
harm: an item is then sent once more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOTED = 10_000  # items; older ones have long been sent


class Preparation:
    """One request's media being prepared.

    Attributes:
        ok: set by who prepares them, if the request may go on.
        given_up: set if nobody waits for them any more.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.ok = self.given_up = False


class SentItems:
    """The items lately put into sender caches, in the order of time."""

    def __init__(self) -> None:
        self._items: deque[tuple[float, Any, str]] = deque(maxlen=NOTED)
        self._running: set[Preparation] = set()

    def add(self, cache: Any, mm_hash: str) -> None:
        """Note an item that goes into ``cache``, a vLLM processor cache."""
        self._items.append((time.monotonic(), cache, mm_hash))

    @contextmanager
    def preparing(self) -> Iterator[Preparation]:
        """While a request's media are prepared; they are taken back unless it ends with ``ok``."""
        prepared = Preparation()
        self._running.add(prepared)
        try:
            yield prepared
        finally:
            self._running.discard(prepared)
            if prepared.given_up or not prepared.ok:
                self._take_back(prepared.began)

    def forget_since(self, moment: float) -> None:
        """Take back what was cached since a ``time.monotonic()``, and what is being prepared.

        A thread goes on preparing media after the request that wanted them was given up.
        """
        for prepared in list(self._running):
            if prepared.began >= moment:
                prepared.given_up = True
        self._take_back(moment)

    def _take_back(self, moment: float) -> None:
        for when, cache, mm_hash in reversed(self._items.copy()):
            if when < moment:
                return
            cache.invalidate(mm_hash)


sent_items = SentItems()  # of this process
