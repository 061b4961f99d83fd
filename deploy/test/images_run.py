"""The second half of `make image-test`: the CPU image serves, is watched, and ends.

What is asked of it is what an operator would notice: the answer about a real mp4 is right, a health
check tells the truth, every panel of the dashboard has data in a real Prometheus, an alert of ours
fires, and SIGTERM ends it with exit code 0.  And what only a test looks for: that the server is
user 2000, and writes nowhere but in /cache, its home and /tmp, so that a read-only root would do.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples" / "demo"))

from server import free_port  # noqa: E402

ENTRY = ("python3", "/opt/vllm-adaspark/entrypoint.py")
HEALTH = ("python3", "/opt/vllm-adaspark/health.py")
USER_ID = "2000"
KEY = "a-key-of-the-test"
MODEL = "needle"
SETTINGS = {"p_attn": 0.5, "p_ffn": 0.5}
OF_OTHER_METHODS = ("Means that the method tells",)  # panels that AdaSpark leaves empty
ALERT, DOWN = "AdaSparkRefusals", "AdaSparkServerDown"
# Where a server may leave files; all else could be read-only.
WRITABLE = ("/cache/", "/home/vllm/", "/tmp/", "/dev/", "/proc/", "/sys/", "/run/")
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS, ALERT_SECONDS = 600, 300, 120, 120


class Failed(Exception):
    """Something is not as it should be; the message says what."""


@dataclass
class Took:
    """How long a step took, and what was seen."""

    seconds: float = 0.0
    note: str = ""


@contextlib.contextmanager
def say(what: str) -> Iterator[Took]:
    """Print a step and its time."""
    print(f"{what} ...", end=" ", flush=True)
    took, started = Took(), time.monotonic()
    yield took
    took.seconds = time.monotonic() - started
    print(f"{took.seconds:.0f} s", flush=True)


def call(command: list[str]) -> str:
    """What a program prints.

    Raises:
        Failed: it failed; with the end of what it said.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu() -> str:
    names = re.findall(r"(?m)^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text())
    return names[0] if names else "unknown CPU"


def prometheus() -> str | None:
    """Where the program is: beside this Python, or on the path."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which("prometheus", path=os.pathsep.join(places))


def get(url: str, body: dict | None = None) -> dict:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
        text = reply.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else {"text": text}


def wait_for(what: str, seconds: float, there) -> object:
    """The first true value of `there()`.

    Raises:
        Failed: there was none in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, OSError):
            if value := there():
                return value
        time.sleep(1)
    raise Failed(f"{what}: not within {seconds:.0f} s")


# -- the container ---------------------------------------------------------------------------------


class Container:
    """The CPU image, started by its own entry point as its own user."""

    def __init__(self, buildah, image: str, folder: Path) -> None:
        self.buildah, self.folder, self.port = buildah, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.name = buildah("from", "--pull-never", image)
        self.root = Path(buildah("mount", self.name))
        entry = json.loads(buildah("inspect", "--type", "image", image))
        self.entry = entry["Docker"]["config"]["Entrypoint"]
        self.env = {
            "MODEL": "/model",
            "ADASPARK": json.dumps(SETTINGS),
            "VLLM_ARGS": f"--served-model-name {MODEL} --allowed-local-media-path /media",
            "VLLM_API_KEY_FILE": "/media/key",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # chroot isolation shares the machine's network: nobody outside is to reach it.
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
        }

    def command(self, *command: str, **env: str) -> list[str]:
        """How to run a command in the container."""
        pairs = [f"--env={key}={value}" for key, value in (self.env | env).items()]
        mounts = [
            f"--volume={ROOT / 'examples' / 'needle' / 'checkpoint'}:/model:ro",
            f"--volume={self.folder / 'media'}:/media:ro",
        ]
        words = [*self.buildah.command, "run", self.buildah.mount, *pairs, *mounts, self.name, "--"]
        return [*map(str, words), *command]

    def status(self, *command: str, **env: str) -> tuple[int, str]:
        """Exit code and output of a command in the container."""
        done = subprocess.run(
            self.command(*command, **env), env=self.buildah.env, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    def start(self, *arguments: str) -> None:
        self.log = (self.folder / "server.log").open("w")
        self.process = subprocess.Popen(
            self.command(*self.entry, *arguments),
            env=self.buildah.env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def healthy(self) -> bool:
        if self.process.poll() is not None:
            raise Failed(f"the server ended with {self.process.returncode}\n{self.log_tail()}")
        return bool(get(f"{self.url}/health"))

    def log_tail(self) -> str:
        return "\n".join((self.folder / "server.log").read_text().splitlines()[-40:])

    def server_pid(self) -> int:
        """The process that the entry script became, whose number the machine knows too."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                text = stat.read_text()
                parent = int(text.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(stat.parent.name))
        queue = [self.process.pid]
        while queue:
            pid = queue.pop(0)
            status = Path(f"/proc/{pid}/status").read_text()
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
            # buildah's own process, which becomes that user too, answers a SIGTERM by a SIGKILL.
            theirs = re.search(r"(?m)^Uid:\s+(\d+)", status)[1] == USER_ID
            if theirs and not program.startswith(b"buildah"):
                return pid
            queue += children.get(pid, [])
        raise Failed(f"the server does not run as user {USER_ID}")

    def stop(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()


def written(root: Path, since: float) -> list[str]:
    """Files of the container that were changed since, outside of the places meant for that."""
    found = []
    for folder, folders, files in os.walk(root):
        inside = f"/{Path(folder).relative_to(root)}/".replace("/./", "/")
        folders[:] = [name for name in folders if f"{inside}{name}/" not in WRITABLE]
        for name in files:
            path = Path(folder) / name
            if path.lstat().st_ctime > since:
                found.append(f"{inside}{name}")
    return found


# -- Prometheus ------------------------------------------------------------------------------------


class Watcher:
    """A real Prometheus with this project's configuration and rules, on loopback.

    Two things of theirs are changed: the server's address and, so that nobody waits a quarter of an
    hour, an alert's `for` is as many seconds as it has minutes.
    """

    def __init__(self, folder: Path, target: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        source = ROOT / "deploy" / "prometheus"
        config = (source / "prometheus.yml").read_text()
        assert "server:8000" in config
        config = config.replace("server:8000", target).replace("_interval: 15s", "_interval: 2s")
        rules, changed = re.subn(r"for: (\d+)m", r"for: \1s", (source / "rules.yml").read_text())
        assert changed
        folder.mkdir()
        (folder / "prometheus.yml").write_text(config)
        (folder / "rules.yml").write_text(rules)
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [
                prometheus(),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def query(self, text: str) -> list[dict]:
        text = urllib.parse.quote(text)
        return get(f"{self.url}/api/v1/query?query={text}")["data"]["result"]

    def firing(self) -> list[str]:
        alerts = get(f"{self.url}/api/v1/alerts")["data"]["alerts"]
        return [one["labels"]["alertname"] for one in alerts if one["state"] == "firing"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def panels() -> dict[str, list[str]]:
    """The dashboard's queries by panel, with what Grafana fills in filled in."""
    found: dict[str, list[str]] = {}
    board = json.loads((ROOT / "deploy" / "grafana" / "adaspark.json").read_text())
    for panel in board["panels"]:
        if panel["title"] in OF_OTHER_METHODS:
            continue
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "2m").replace("$model_name", ".*")
            found.setdefault(panel["title"], []).append(text)
    return found


# -- the run ---------------------------------------------------------------------------------------


def write_media(folder: Path) -> tuple[str, str]:
    """An mp4 with cards in it, a file that is none, and the key; a question and its answer."""
    sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT / "examples" / "needle")]
    from demo import write_needle_video

    folder.mkdir()
    question, answer = write_needle_video(folder / "video.mp4", 240, 0)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "key").write_text(f"{KEY}\n")
    folder.chmod(0o755)
    return question, answer


def about(video: str, question: str, salt: str = "") -> dict:
    content = [
        {"type": "video_url", "video_url": {"url": f"file:///media/{video}"}},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": content}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0}
    return body | ({"cache_salt": salt} if salt else {})


def serve(buildah, image: str, work: Path) -> dict[str, Took]:
    """Start the image, use it, watch it, end it.

    Raises:
        Failed: something was not as it should be.
    """
    folder = work / "served"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    question, answer = write_media(folder / "media")
    container, result = Container(buildah, image, folder), {}
    watcher = None
    try:
        with say("a wrong setting") as took:
            code, text = container.status(*container.entry, ADASPARK='{"p_atn": 1}')
            if code != 2 or "did you mean 'p_attn'" not in text:
                raise Failed(f"a wrong setting: exit code {code}\n{text}")
        took.note = "exit code 2, the variable is named"
        result["a wrong setting"] = took

        with say("start") as took:
            started = time.time()
            container.start("--max-num-batched-tokens=8192", "--max-model-len=8192")
            wait_for("healthy", START_SECONDS, container.healthy)
        pid = container.server_pid()
        if (code := container.status(*HEALTH)[0]) != 0:
            raise Failed(f"the health check of a healthy server: exit code {code}")
        took.note = f"user {USER_ID}, compiled, the health check says 0"
        result["started"] = took

        watcher = Watcher(folder / "prometheus", container.url.removeprefix("http://"))
        with say("questions") as took:
            chat = f"{container.url}/v1/chat/completions"
            reply = get(chat, about("video.mp4", question))
            said, cost = reply["choices"][0]["message"]["content"], reply["usage"]["adaspark"]
            if said.strip() != answer or cost["mode"] != "sparse" or cost["flops_ratio"] >= 1:
                raise Failed(f"{question} {answer!r}, it said {said!r}; {cost}")
        share = f"{cost['flops_ratio']:.0%} of the dense FLOPs"
        took.note = f"the right answer about {cost['video_tokens']:,} video tokens, {share}"
        result["asked about an mp4"] = took

        with say("Prometheus") as took:
            wait_for("a scrape", 60, lambda: watcher.query("vllm_adaspark:up == 1"))
            ask_wrongly(chat, watcher)
            empty = wait_for_panels(watcher, chat, question)
            if empty:
                raise Failed(f"panels without data: {empty}")
        took.note = f"every panel of the dashboard has data; `{ALERT}` fires"
        result["scraped by Prometheus"] = took

        with say("SIGTERM") as took:
            os.kill(pid, signal.SIGTERM)
            try:
                code = container.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                raise Failed(f"still there {STOP_SECONDS} s after SIGTERM") from None
            if code:
                raise Failed(f"after SIGTERM: exit code {code}\n{container.log_tail()}")
            wait_for(f"alert {DOWN}", ALERT_SECONDS, lambda: DOWN in watcher.firing())
            if (late := container.status(*HEALTH)[0]) != 1:
                raise Failed(f"the health check of no server: exit code {late}")
        if KEY in (folder / "server.log").read_text():
            raise Failed("the API key stands in the log")
        if elsewhere := written(container.root, started):
            raise Failed(f"the server wrote {elsewhere[:10]}")
        took.note = f"exit code 0; `{DOWN}` fires; it wrote to /cache, its home and /tmp alone"
        result["ended by SIGTERM"] = took
    finally:
        if watcher:
            watcher.stop()
        if hasattr(container, "process"):
            container.stop()
        buildah("umount", container.name)
        buildah("rm", container.name)
    return result


def ask_wrongly(chat: str, watcher: Watcher) -> None:
    """Requests that are refused, until the alert about them fires."""

    def refused() -> bool:
        try:
            get(chat, about("broken.mp4", "What?"))
        except urllib.error.HTTPError as error:
            assert error.code == 400, error
        else:
            raise Failed("a file that is no video was accepted")
        return ALERT in watcher.firing()

    wait_for(f"alert {ALERT}", ALERT_SECONDS, refused)


def wait_for_panels(watcher: Watcher, chat: str, question: str) -> list[str]:
    """Panels that stay without data, whatever is asked of the server meanwhile."""
    empty: list[str] = list(panels())
    for number in range(10):
        get(chat, about("video.mp4", question, salt=f"question {number}"))
        time.sleep(3)
        empty = [
            title
            for title, queries in panels().items()
            if not all(numbers(watcher.query(query)) for query in queries)
        ]
        if not empty:
            break
    return empty


def numbers(found: list[dict]) -> list[float]:
    """The values that are numbers: 0/0 is a panel without data, too."""
    values = [float(one["value"][1]) for one in found]
    return [value for value in values if value == value]
