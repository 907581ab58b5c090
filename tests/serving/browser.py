"""Chromium without a window, driven by its DevTools protocol over a pair of pipes."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_SECONDS = 20.0  # that the page gets for what is waited for


class Browser:
    """One tab, and for a while another one. folder: for the profile and downloads."""

    def __init__(self, folder: Path, *, width: int = 1200, height: int = 800):
        own_read, its_write = os.pipe()
        its_read, own_write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{its_read} 4>&{its_write}', str(PROGRAM), *options, "about:blank"],
            pass_fds=(its_read, its_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        self._in, self._out = os.fdopen(own_write, "wb"), os.fdopen(own_read, "rb")
        self._rest, self._numbers, self._session = b"", itertools.count(1), ""
        self.messages: list[str] = []  # errors that the page has told
        targets = self.call("Target.getTargets")["targetInfos"]
        self._attach(next(target["targetId"] for target in targets if target["type"] == "page"))
        self.size(width, height)

    def _attach(self, target: str) -> None:
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    @contextmanager
    def another_tab(self) -> Iterator[None]:
        """Inside, everything is done in a new tab."""
        before, self._session = self._session, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._attach(target)
        try:
            yield
        finally:
            self._session = ""
            self.call("Target.closeTarget", targetId=target)
            self._session = before

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": params}
        if self._session:
            request["sessionId"] = self._session
        self._in.write(json.dumps(request).encode() + b"\0")
        self._in.flush()
        while (message := self._next()).get("id") != number:
            self._note(message)
        assert "error" not in message, message["error"]
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = self._out.read1(1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] == "security":
            self.messages.append(message["params"]["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def until(self, condition: str, seconds: float = _SECONDS) -> Any:
        """Waits for an expression to be true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"never: {condition}\n{self.run('document.body.innerText')[:2000]}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, **more: Any) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], **more}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **fields, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def choose_files(self, selector: str, *paths: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def drop(self, *paths: Path) -> None:
        """Files from outside, let go over the middle of the page."""
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def dark(self, on: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._in.close()
        self._out.close()
