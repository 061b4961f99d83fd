"""Servers started as the image starts them: through the entry script."""

from __future__ import annotations

import sys
from pathlib import Path

import warm
from deploy_tools import ENTRYPOINT
from server import VllmServer  # examples/demo


class EntryServer(VllmServer):
    """The entry script as a child process, on a free loopback port.

    Args:
        log: file that receives what it prints.
        arguments: of the container.
        env: environment variables to add.
    """

    def __init__(self, log: Path, *arguments: str | Path, **env: str):
        super().__init__("", log=log, env=env)
        self.port = self.url.rpartition(":")[2]
        self.env |= {"HOST": "127.0.0.1", "PORT": self.port}
        self.command = [sys.executable, str(ENTRYPOINT), *map(str, arguments), "--enforce-eager"]


class PrintedServer(EntryServer):
    """What the entry script prints that it would become; forked, see tests/warm.py."""

    start = staticmethod(warm.start)

    def __init__(self, log: Path, *arguments: str | Path, **env: str):
        super().__init__(log, *arguments, **env)
        warm.printed(self)
