"""Accounts and traces only observe: where they fail, requests are answered all the same.

An exception in a worker's step ends the engine for everybody.  So whatever a worker does beside
the model's own work, it does inside :func:`observing`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.adaspark")

_told: set[str] = set()


@contextmanager
def observing(what: str) -> Iterator[None]:
    """Run something that may fail without harm; the first failure is logged with its traceback.

    Args:
        what: named in the log, and logged once per process.
    """
    try:
        yield
    except Exception:
        if what not in _told:
            _told.add(what)
            logger.exception(
                "AdaSpark: %s failed.  Requests are answered as ever; later failures of this kind "
                "are not logged.",
                what,
            )
