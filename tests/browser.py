"""A real browser for tests: Debian's Chromium without a window, driven through its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-headless-shell", "google-chrome")
SECONDS = 20


def find_browser() -> str:
    """The browser's executable; where CI is set, its lack is a failure."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = "these tests need Chromium: tools/utils/setup.sh --tests installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Browser:
    """A browser with one page. What goes wrong in it, and what it asks for, is kept in lists."""

    def __init__(self, folder: Path) -> None:
        """``folder``: an empty one, for its profile."""
        self.errors: list[str] = []
        """Exceptions of scripts, and what the console says of errors and refusals."""
        self.requests: list[str] = []
        """Addresses that the page has asked for, its own included."""
        options = (
            *("--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run"),
            *("--disable-gpu", "--disable-background-networking", "--disable-component-update"),
            *("--disable-dev-shm-usage", "--disable-sync", "--mute-audio", "--force-device-scale-factor=1"),
            "--no-sandbox",  # root has none, nor have many containers; the pages are the tests' own
        )
        with (folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [find_browser(), *options, "about:blank"], stdout=output, stderr=output
            )
        try:
            self._connect(folder)
        except BaseException:
            self.close()
            raise

    def _connect(self, folder: Path) -> None:
        import websocket

        port = folder / "DevToolsActivePort"  # Chromium writes it when it listens
        end = time.monotonic() + SECONDS
        while not (port.exists() and port.read_text().count("\n") == 1):
            assert self._process.poll() is None, (folder / "output").read_text(errors="replace")
            assert time.monotonic() < end, "Chromium does not listen"
            time.sleep(0.02)
        number, path = port.read_text().split("\n")
        address = f"ws://127.0.0.1:{number}{path}"
        self._socket = websocket.create_connection(address, timeout=SECONDS, suppress_origin=True)
        self._sent = 0
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with suppress(Exception):
            self._socket.close()
        self._process.terminate()
        self._process.wait(SECONDS)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        what, parameters = event.get("method"), event.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif what == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif what == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(parameters["args"]))
        elif what == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, page: Path, width: int = 1280, *, dark: bool = False) -> None:
        """Open a file, in a window of so many pixels' width, and wait until its curves are drawn."""
        self.errors.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.wait_for("document.documentElement?.dataset.drawn")

    def wait_for(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.value(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not within {SECONDS} s: {condition}; {self.errors}"
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON holds it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A real event of the mouse: ``mouseMoved``, ``mousePressed``, ``mouseReleased``."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of the first element, scrolled into view."""
        found = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]; })()"
        )
        left, top, width, height = found
        return left, top, width, height

    def click(self, selector: str, clicks: int = 1) -> None:
        left, top, width, height = self.box(selector)
        for count in range(1, clicks + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.mouse(kind, left + width / 2, top + height / 2, button="left", clickCount=count)

    def picture(self, path: Path) -> None:
        """A picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))
