"""Headless Chromium, driven over a pair of pipes by its own DevTools protocol: no driver, no further package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--disable-lcd-text"),
]
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), " ": (32, " ")}
_SHIFT = 8


class Browser:
    """One page. `problems` has what it wrote into its console as an error, and what was refused by its policy."""

    def __init__(self, sending: int, receiving: int) -> None:
        self._sending, self._receiving = sending, receiving
        self._numbers = itertools.count(1)
        self._rest = b""
        self.problems: list[str] = []
        self.addresses: list[str] = []  # of all that the page asked for
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._sending, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._receiving], [], [], 60)[0], "the browser does not answer"
            more = os.read(self._receiving, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])

    def open(self, url: str) -> None:
        """Go there, and wait until the document is complete."""
        self._call("Page.navigate", url=url)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (script, result["exceptionDetails"])
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 120) -> Any:
        """The first value of an expression that counts as true; the limit is one for two busy cores."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} stays {value!r}; the page says: {self.text('body')[:2000]}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """What is to be read in the first element of this kind; nothing if there is none."""
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, down and up, as the keyboard sends it."""
        code, text = _KEYS[key]
        values = {"key": key, "code": key if key != " " else "Space", "windowsVirtualKeyCode": code}
        values["modifiers"] = _SHIFT if shift else 0
        self._call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **values)
        self._call("Input.dispatchKeyEvent", type="keyUp", **values)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of an element that is visible."""
        box = self.run(f"""(() => {{
          const element = document.querySelector({json.dumps(selector)});
          element.scrollIntoView({{block: "nearest"}});
          const box = element.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2, box.width];
        }})()""")
        assert box[2] > 0, f"{selector} is not there to be clicked"
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def prefer(self, **features: str) -> None:
        """Media features: color_scheme="dark", reduced_motion="reduce"."""
        named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self._call("Emulation.setEmulatedMedia", features=named)

    def resize(self, width: int, height: int) -> None:
        """The window's inside, in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def screenshot(self) -> np.ndarray:
        """What is to be seen: pixels [height, width, RGB]."""
        png = self._call("Page.captureScreenshot", format="png")["data"]
        width, height, data = self.run(f"""(async () => {{
          const bytes = Uint8Array.from(atob("{png}"), (c) => c.charCodeAt(0));
          const image = await createImageBitmap(new Blob([bytes], {{type: "image/png"}}));
          const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
          context.drawImage(image, 0, 0);
          const pixels = context.getImageData(0, 0, image.width, image.height).data;
          let text = "";
          for (let i = 0; i < pixels.length; i += 30000) text += String.fromCharCode(...pixels.subarray(i, i + 30000));
          return [image.width, image.height, btoa(text)];
        }})()""")
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[:, :, :3]

    def accessibility(self) -> list[tuple[str, str]]:
        """(role, name) of everything that assistive technology is told of."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        return [(n.get("role", {}).get("value", ""), n.get("name", {}).get("value", "")) for n in shown]


def write_png(pixels: np.ndarray, path: Path) -> None:
    """Pixels [height, width, RGB] in their 256 most frequent colours: of a page, text's edges lose a little."""
    height, width, _ = pixels.shape
    packed = pixels.astype(np.int32) @ (1 << 16, 1 << 8, 1)
    colours, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    chosen = np.argsort(-counts)[:256]
    split = (colours[:, None] >> (16, 8, 0)) & 255
    nearest = np.square(split[:, None] - split[chosen]).sum(axis=2).argmin(axis=1).astype(np.uint8)
    rows = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = nearest[inverse].reshape(height, width)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        header, palette = (
            struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
            split[chosen].astype(np.uint8).tobytes(),
        )
        for kind, data in zip(
            (b"IHDR", b"PLTE", b"IDAT", b"IEND"), (header, palette, zlib.compress(rows, 9), b""), strict=True
        ):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser of its own, for as long as the context lasts."""
    # Chromium reads its commands from descriptor 3 and answers on 4.
    shell = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', str(CHROMIUM)]
    command = [*shell, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, bufsize=0, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Browser(process.stdin.fileno(), process.stdout.fileno())
        finally:
            process.terminate()
