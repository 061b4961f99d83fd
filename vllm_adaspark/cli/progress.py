"""Progress of a step: tqdm's bar on a terminal, one plain line elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

PLAIN_EVERY = 15.0  # seconds between signs of life where there is no terminal


class Progress:
    """A bar that is moved to an absolute position.

    Args:
        title: what is being done.
        total: the last position; None while it is unknown.
        unit: what positions count; "" where there is nothing to count, and so no bar.
        quiet: show nothing.
    """

    def __init__(self, title: str, total: int | None, unit: str, *, quiet: bool = False) -> None:
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.at = 0
        self.seconds = 0.0
        self.reached: float | None = None  # seconds until the total was reached
        self._bar = None

    def __enter__(self) -> Progress:
        self._start = self._spoke = time.monotonic()
        if not self.unit:
            if not self.quiet:
                self._say("...")
        elif not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, desc=f"{self.title:<15}", unit=f" {self.unit}", leave=True
            )
        return self

    def to(self, position: int, total: int | None = None) -> None:
        """Move to ``position``; never backwards."""
        self.total = total or self.total
        position = max(position, self.at)
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(position - self.at)
        elif not self.quiet and time.monotonic() - self._spoke > PLAIN_EVERY:
            self._spoke = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            self._say(f"{position:,}{of} {self.unit} ...")
        self.at = position
        if self.reached is None and self.total is not None and position >= self.total:
            self.reached = time.monotonic() - self._start

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and kind is None:
            seconds = self.seconds if self.reached is None else self.reached
            what = f"{self.at:,} {self.unit} in " if self.unit else ""
            self._say(f"{what}{seconds:.1f} s")

    def _say(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)
