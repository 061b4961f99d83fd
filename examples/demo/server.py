"""Run `vllm serve` as a child process, on a free loopback port and for a bounded time."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

STOP_SECONDS = 30
# Seconds that a connection stays open without a request, by default 5: as long as a video may take,
# and a client that then asks again would meet a connection that is just being closed.
KEPT_OPEN = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
WORKERS_STOP_SECONDS = 5
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # "first last"


class ServerFailed(RuntimeError):
    """The server ended, or did not get ready in time; the message ends with the tail of its log."""


class VllmServer:
    """A `vllm serve` process that ends with its `with` block.

    Args:
        model: checkpoint folder or model name.
        arguments: further arguments of `vllm serve`.
        log: file that receives what the server prints.
        env: environment variables to add.

    Example:
        >>> with VllmServer("checkpoint", log="server.log") as server:
        ...     server.wait_until_ready(timeout=240)
        ...     print(server.url)
    """

    kept = False  # True: it outlives its `with` block

    def __init__(self, model, *arguments: str, log: str | Path, env: dict[str, str] | None = None):
        go_around_proxies()
        self.log = Path(log)
        self.url = f"http://127.0.0.1:{free_port()}"
        port = self.url.rpartition(":")[2]
        # The module instead of the `vllm` script: it surely belongs to this interpreter.
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        self.command += ["--host", "127.0.0.1", "--port", port, *arguments]
        self.env = {**KEPT_OPEN, **os.environ, **(env or {})}

    def __enter__(self) -> "VllmServer":
        with self.log.open("wb") as log:
            self.process = self.start(self.command, log, self.env)
        return self

    @staticmethod
    def start(command: list[str], log, env: dict[str, str]) -> subprocess.Popen:
        """A process group of its own, so that stopping reaches vLLM's worker processes too."""
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )

    def __exit__(self, *exception) -> None:
        if not self.kept:
            self.stop()

    def wait_until_ready(self, timeout: float) -> None:
        """Return once the server answers `/health`.

        Raises:
            ServerFailed: it ended or took longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            status = self.process.poll()
            if status is not None:
                raise ServerFailed(f"the server ended with status {status}\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise ServerFailed(f"the server was not ready after {timeout:.0f} s\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ask the server to end, and end what is left of its process group."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed below, then
                self.process.wait(STOP_SECONDS)
        # Workers follow their parent, and give back their shared memory, if they are let.
        deadline = time.monotonic() + WORKERS_STOP_SECONDS
        try:
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)  # raises once the group is empty
                time.sleep(0.1)
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def go_around_proxies() -> None:
    """Have clients in this process, and in those it starts, ask loopback servers themselves.

    A proxy that the environment names for the internet (``HTTP_PROXY``) does not know them.
    """
    for name in ("no_proxy", "NO_PROXY"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost"]))


def free_port() -> int:
    """A port of the loopback device that nothing listens on.

    A server binds it only seconds later, after its imports.  So it is no port that the system
    gives to outgoing connections or to a bind to port 0, of which other processes make many.
    """
    taken = 32768
    with contextlib.suppress(OSError):
        taken = int(EPHEMERAL_PORTS.read_text().split()[0])
    candidates = range(min(20000, taken // 2), taken)
    while True:
        port = random.SystemRandom().choice(candidates)  # apart from what a test has seeded
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
