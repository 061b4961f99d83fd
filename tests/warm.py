"""Processes of vLLM that start in a second: forked from one that has imported vLLM already.

Importing vLLM takes some ten seconds of a core, and a server does it three times: in its API
server, its engine and its worker.  On two cores that was the greater part of all that the tests
took.  Python's fork server imports it once for each process that runs tests; what is forked from it
is vLLM's own program with the arguments and the environment that it was given.

Not everything starts here: tests/deploy, the examples and test_isolation.py start servers as users
do, whose every process loads this package through vLLM's entry point.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from multiprocessing import context, forkserver

from server import VllmServer  # examples/demo

start_cold = VllmServer.start
SEVERAL = ("--data-parallel", "-dp", "--api-server-count", "-asc")
SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
# What a server's processes import; nothing of this package, and nothing that reads its settings.
PRELOADED = [
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.qwen2_5_vl",
]


class Process(context.ForkServerProcess):
    """As of a spawned process, its environment is that of the process that starts it."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._environment = dict(os.environ)

    def run(self) -> None:
        gc.freeze()  # of what was imported nothing is garbage, now or later
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class WarmContext(context.ForkServerContext):
    """Stands in for the context of spawned processes."""

    Process = Process


@contextmanager
def forked_from_the_warm():
    """In here this process forks from the fork server what vLLM asks to be spawned: ranks."""
    given, warm = multiprocessing.get_context, warm_context()
    multiprocessing.get_context = lambda method=None: warm if method == "spawn" else given(method)
    try:
        yield
    finally:
        multiprocessing.get_context = given


def warm_context() -> WarmContext:
    """Its fork server runs until this process ends."""
    forkserver.set_forkserver_preload(PRELOADED)
    # An engine in this process has its own idea of what is worth logging.
    level = os.environ.pop("VLLM_LOGGING_LEVEL", None)
    try:
        forkserver.ensure_running()
    finally:
        if level is not None:
            os.environ["VLLM_LOGGING_LEVEL"] = level
    return WarmContext()


def start(command: list[str], log, env: dict[str, str]):
    """Stands in for ``VllmServer.start``; a ``command`` that is not vLLM's own starts as ever."""
    if command[: len(SERVE)] != SERVE:
        return start_cold(command, log, env)
    process = warm_context().Process(target=serve, args=(command[len(SERVE) :], log.name, env))
    process.start()
    return Started(process)


def printed(server: VllmServer) -> VllmServer:
    """Have a server of our own command start as what that prints that it becomes."""
    done = subprocess.run(
        [*server.command, "--print"], env=server.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    plugins, _, *words = shlex.split(done.stdout)
    server.env |= [plugins.split("=", 1)]
    server.command = [*SERVE, *words]
    return server


def serve(arguments: list[str], log: str, env: dict[str, str]) -> None:
    """What the forked process does: become a leader of its group, and run vLLM's command line."""
    os.setsid()
    threading.Thread(target=end_with_the_tests, daemon=True).start()
    for file, number in ((os.devnull, 0), (log, 1), (log, 2)):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["vllm", *arguments]
    # Its engine, and that one's worker, are forked from it; spawned ones would not have its port.
    # Several API servers do: they share it.
    if not any(word.startswith(SEVERAL) for word in arguments):
        os.register_at_fork(after_in_child=close_listening)
    given = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: given("fork" if method == "spawn" else method)
    from vllm.entrypoints.cli.main import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without


def end_with_the_tests() -> None:
    """A test run that is killed leaves no server behind."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def close_listening() -> None:
    """Close the sockets on which this process accepts connections, or will (vLLM binds early).

    At its end vLLM names whoever else has its port, and fails where that is a process just ended.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    if listens or is_bound(found):
                        os.close(int(name))
        except OSError:
            pass  # the list's own


def is_bound(found: socket.socket) -> bool:
    """Whether a TCP socket has a port of its own and no peer."""
    if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
        return False
    try:
        found.getpeername()
    except OSError:
        return found.getsockname()[1] != 0
    return False


class Started:
    """The part of ``subprocess.Popen`` that a server's owner uses."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("vllm serve", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
