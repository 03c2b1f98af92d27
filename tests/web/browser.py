# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A real Chromium without a window, driven through its remote debugging protocol.

The browser listens on a pipe, so nothing else has to be installed.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
)
# The protocol's fixed descriptors; another process is the simplest way of getting something there.
_START = """
import os, sys
for number, place in zip(sys.argv[1:3], (3, 4)):
    os.dup2(int(number), place)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """The path of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """A running Chromium; closed at the end of the `with` block.

    Args:
        profile: an empty folder for its files.
        timeout: seconds after which an answer is missed.
    """

    def __init__(self, profile: Path, timeout: float = 180.0):
        program = find()
        assert program is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium's sandbox refuses to run as root, as containers do.
        options = [*_OPTIONS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        # High numbers, so that neither is overwritten by the other's move to 3 or 4.
        pair = [os.dup(fd) for fd in (theirs_in, theirs_out)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, pair), program, *options],
            pass_fds=pair,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(profile)},
        )
        for fd in (theirs_in, theirs_out, *pair):
            os.close(fd)
        self._timeout = timeout
        self._number = 0
        self._lock = threading.Lock()
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.tabs: dict[str, Tab] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._out)  # Chromium ends when its pipe does
        try:
            self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, url: str, *, width: int = 1280, height: int = 900, features: dict[str, str] | None = None) -> Tab:
        """A new tab that shows a page.

        Args:
            features: media features such as {"prefers-color-scheme": "dark"}.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self.tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        chosen = [{"name": name, "value": value} for name, value in (features or {}).items()]
        tab.call("Emulation.setEmulatedMedia", features=chosen)
        tab.call("Page.navigate", url=url)
        return tab

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command of the protocol."""
        with self._lock:
            self._number += 1
            number = self._number
            answer = self._answers[number] = queue.Queue()
            message = {"id": number, "method": method, "params": parameters}
            if session is not None:
                message["sessionId"] = session
            data = memoryview(json.dumps(message).encode() + b"\0")
            while data:
                data = data[os.write(self._out, data) :]
        reply = answer.get(timeout=self._timeout)
        del self._answers[number]
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._in, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]].put(message)
                elif (tab := self.tabs.get(message.get("sessionId", ""))) is not None:
                    tab.notice(message["method"], message["params"])
        os.close(self._in)


class Tab:
    """A page in a browser.

    Attributes:
        complaints: errors and warnings of its console, its scripts and its requests.
        requests: the URLs that it asked for.
    """

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command of the protocol about this page."""
        return self._browser.call(method, self._session, **parameters)

    def notice(self, method: str, content: dict[str, Any]) -> None:
        """Take a message of the browser about this page."""
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(content["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(content["args"]))
        elif method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(content["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, a promise's when it is kept."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {json.dumps(result['exceptionDetails'])}")
        return result["result"].get("value")

    def wait(self, condition: str, timeout: float = 90.0) -> Any:
        """The value of a JavaScript expression as soon as it is true; it is looked at in every animation frame."""
        found = self.evaluate(
            f"""new Promise((resolve) => {{
                const until = performance.now() + {1000 * timeout};
                const look = () => {{
                    let value = false;
                    try {{ value = ({condition}); }} catch (error) {{ /* not there yet */ }}
                    if (value || performance.now() > until) resolve(value);
                    else requestAnimationFrame(look);
                }};
                look();
            }})"""
        )
        assert found, (
            f"not within {timeout} s: {condition}; the page says {self.evaluate('document.body.innerText')!r}"
        )
        return found

    def press(self, key: str, code: str, text: str = "") -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, **extra)

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        place = self.evaluate(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{block: "center", behavior: "instant"}});
                const box = element.getBoundingClientRect();
                return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text: str) -> None:
        """Write into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Write what the page looks like as a PNG."""
        self.call("Page.bringToFront")  # pages behind others aren't drawn
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))
