"""Show that a slow step is alive: a spinner with seconds on a terminal, plain lines elsewhere."""

import contextlib
import itertools
import sys
import threading
import time

PLAIN_LINE_EVERY = 15.0  # seconds between signs of life where there is no terminal


@contextlib.contextmanager
def step(title: str):
    """Show `title` with the seconds gone by while the block runs, and how it ended."""
    start = time.monotonic()
    finished = threading.Event()
    terminal = sys.stdout.isatty()
    show = _spin if terminal else _plain
    thread = threading.Thread(target=show, args=(title, start, finished), daemon=True)
    thread.start()
    outcome = "failed after"
    try:
        yield
        outcome = "done in"
    finally:
        finished.set()
        thread.join()
        erase = "\r\033[K" if terminal else ""
        print(f"{erase}{title}: {outcome} {time.monotonic() - start:.1f} s", flush=True)


def _spin(title: str, start: float, finished: threading.Event) -> None:
    for sign in itertools.cycle("|/-\\"):
        print(f"\r\033[K{sign} {title} {time.monotonic() - start:.0f} s", end="", flush=True)
        if finished.wait(0.2):
            return


def _plain(title: str, start: float, finished: threading.Event) -> None:
    while not finished.wait(PLAIN_LINE_EVERY):
        print(f"{title}: {time.monotonic() - start:.0f} s ...", flush=True)
