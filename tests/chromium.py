"""A Chromium that does what it is told, by DevTools' protocol over two pipes."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

SECONDS = 60
"""How long an answer or an event may take, with much else running."""

LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
"""Chromium reads commands from file descriptor 3 and answers on 4."""


def find_chromium() -> str | None:
    """Where a Chromium is installed, or what CHROMIUM in the environment names."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with one page."""

    def __init__(self, path: str) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (read, self.to), (self.answers, write) = os.pipe(), os.pipe()
        # Above what the browser's own descriptors become.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
        command = [sys.executable, "-c", LAUNCH, *map(str, theirs), path, "--headless=new"]
        command += ["--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--window-size=1280,900"]
        command += [f"--user-data-dir={self.folder.name}"]
        self.process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for end in (read, write, *theirs):
            os.close(end)
        self.rest = b""
        self.sent = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.answers)
        self.folder.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self.sent += 1
        message: dict[str, Any] = {"id": self.sent, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.answers], [], [], SECONDS)[0]:
                raise TimeoutError("Chromium does not answer")
            read = os.read(self.answers, 1 << 20)
            if not read:
                raise RuntimeError("Chromium has ended")
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        """Go to a page, and wait until it is there with all its parts."""
        self.events.clear()
        self.send("Page.navigate", url=address)
        while all(event.get("method") != "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """What an expression in JavaScript gives on the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """What it gives once that counts as true."""
        end = time.monotonic() + SECONDS
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.1)
        return value

    def take_screenshot(self) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])

    def faults(self, origin: str) -> list[str]:
        """What went wrong on the open page: exceptions, and what an origin did not have."""
        entries = [
            event["params"]["entry"]
            for event in self.events
            if event.get("method") == "Log.entryAdded"
        ]
        thrown = [
            event for event in self.events if event.get("method") == "Runtime.exceptionThrown"
        ]
        lost = [
            entry["text"]
            for entry in entries
            if entry["level"] == "error" and entry.get("url", "").startswith(origin)
        ]
        return [str(event["params"]) for event in thrown] + lost
