"""A headless Chromium, spoken to in its own protocol over two pipes (chromedevtools.github.io/devtools-protocol)."""

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
PATIENCE_S = 60


class Browser:
    """One tab. The protocol's messages are JSON, each with a zero byte behind it."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1000, 1600)):
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()

        def connect() -> None:
            """The browser reads descriptor 3 and writes 4; first out of the way, should one of ours be 3 or 4."""
            reads, writes = os.dup(to_browser), os.dup(from_browser)
            os.dup2(reads, 103), os.dup2(writes, 104)
            os.dup2(103, 3), os.dup2(104, 4)

        window = f"--window-size={size[0]},{size[1]}"
        command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", window, "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, close_fds=False, preexec_fn=connect, **quiet)
        os.close(to_browser), os.close(from_browser)
        self.number, self.session, self.received = 0, {}, b""
        self.events: list[str] = []  # of the protocol, since the last page was asked for
        tabs = self.call("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Page.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write_end), os.close(self.read_end)

    def receive(self) -> dict:
        while b"\0" not in self.received:
            assert select.select([self.read_end], [], [], PATIENCE_S)[0], "the browser says nothing"
            data = os.read(self.read_end, 1 << 20)
            assert data, "the browser ended"
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer["method"])
        assert "result" in answer, answer
        return answer["result"]

    def open(self, page: Path) -> None:
        """Returns when all of the page is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=f"file://{page}")
        while "Page.loadEventFired" not in self.events:
            self.events.append(self.receive()["method"])

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)

    def screenshot(self) -> io.BytesIO:
        return io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def cpu_seconds(self) -> float:
        """What all of its processes have computed so far."""
        pids, ticks = [self.process.pid], 0
        for pid in pids:  # grows
            with contextlib.suppress(OSError):  # it may have ended
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return ticks / os.sysconf("SC_CLK_TCK")

    def evaluate(self, script: str):
        """What a script's last expression is; it runs beside the page, which may forbid its own scripts."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")
