"""A headless Chromium driven over its own protocol (CDP): load a page, run scripts, take pictures.

No driver package: Chromium and the ``websockets`` that vLLM brings are all it needs.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_SECONDS = 300  # it takes one or two
ANSWER_SECONDS = 120
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,900",
)


def find_browser() -> str | None:
    """Chromium's path; ``$CHROMIUM`` goes first."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab of a browser that ends with its ``with`` block.

    Attributes:
        errors: what the page's console and its scripts complained about.

    Example:
        >>> with Page(find_browser()) as page:
        ...     page.open("http://127.0.0.1:8000/adaspark/")
        ...     page.wait("document.title !== ''")
    """

    def __init__(self, executable: str) -> None:
        self._executable = executable
        self.errors: list[str] = []
        self._id = 0

    def __enter__(self) -> Page:
        self._open = ExitStack()  # closed in reverse order: connection, browser, its profile
        profile = Path(
            self._open.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        )
        self._process = subprocess.Popen(
            [self._executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._open.callback(self._end)
        try:
            port = self._port(profile / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as reply:
                targets = json.load(reply)
            address = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
            self._socket = self._open.enter_context(
                connect(address, max_size=None, open_timeout=60)
            )
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _port(self, file: Path) -> int:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if file.exists() and (lines := file.read_text().split()):
                return int(lines[0])
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._executable} ended: {self._process.returncode}")
            time.sleep(0.05)
        raise RuntimeError(f"{self._executable} did not start in {START_SECONDS} s")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A CDP command's result; events that come in between are looked at."""
        self._id += 1
        self._socket.send(json.dumps({"id": self._id, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=ANSWER_SECONDS))
            if message.get("id") == self._id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"])[:2000])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(json.dumps(params["args"])[:2000])
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                entry = params["entry"]
                self.errors.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def at_start(self, script: str) -> None:
        """Run a script in every page before its own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = ANSWER_SECONDS) -> None:
        """Return once a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > deadline:
                text = self.run("document.body.innerText.slice(0, 500)")
                raise TimeoutError(f"never true: {condition}\npage: {text}\nerrors: {self.errors}")
            time.sleep(0.05)

    def key(self, key: str, code: int) -> None:
        """Press and release a key, as a user would."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Click into an element, at a share of its width and height."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x, b.y, b.width, b.height]; })()"
        )
        x, y = box[0] + box[2] * at[0], box[1] + box[3] * at[1]
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: str | Path | None = None) -> bytes:
        """A PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=True,
            clip={"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1},
        )
        data = base64.b64decode(shot["data"])
        if path is not None:
            Path(path).write_bytes(data)
        return data
