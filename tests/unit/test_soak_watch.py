"""What the soak counts of a server's processes, which come and go while it looks."""

from __future__ import annotations

import os

import pytest

from benchmarks.soak import watch


@pytest.fixture
def watched() -> watch.Watch:
    """This process, looked at once."""
    watched = watch.Watch(os.getpid())
    watched.take()
    return watched


def test_a_thread_that_ends_meanwhile_ends_no_sampling(watched, monkeypatch) -> None:
    read = watch.Path.read_text

    def gone(path, *args):
        if path.name == "children":
            raise FileNotFoundError(path)
        return read(path, *args)

    monkeypatch.setattr(watch.Path, "read_text", gone)
    watched.take()
    assert len(watched.rows()) == 2 and watched.total("rss")[1] > 50


def test_a_process_that_ends_meanwhile_is_left_out(watched, monkeypatch) -> None:
    def gone(pid: int) -> str:
        raise ProcessLookupError(pid)

    watched._labels.clear()
    monkeypatch.setattr(watch, "name_of", gone)
    watched.take()
    assert [row["rss"] > 50 for row in watched.rows()] == [True, False]
    assert "together" in watched.table()


def test_threads_leak_when_their_floor_rises(watched, monkeypatch) -> None:
    """The number of a storm goes up and down; memory counts on average."""
    quarters = ([90, 90], [95, 140], [95, 99], [96, 150])
    samples = [count for quarter in quarters for count in quarter]
    monkeypatch.setattr(watched, "total", lambda count: samples)
    assert watched.growth("threads") == 96 - 95
    assert watched.growth("rss") == (96 + 150) / 2 - (95 + 140) / 2
