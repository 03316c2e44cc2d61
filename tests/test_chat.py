"""The chat as a person has it: a terminal, typing, pasting, keys, and where the figures appear."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import chat
import generate

ROOT = Path(__file__).resolve().parent.parent
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
PASTE, END_OF_PASTE = "\x1b[200~", "\x1b[201~"
PATIENCE_S = 120


class Terminal:
    """A program with a terminal of its own: what it shows, and keys for it."""

    def __init__(self, command: list[str]):
        self.master, slave = pty.openpty()

        def control() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # also if the tests run in the background

        environment = os.environ | {"TERM": "xterm", "COLUMNS": "300"}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, "env": environment, "cwd": ROOT}
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=control, **streams)
        os.close(slave)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read_until(self, pattern: str, again: str = "") -> str:
        """What is shown from now on until the pattern is there; again: keys to press after every 5 s of silence."""
        shown, end = "", time.monotonic() + PATIENCE_S
        while not re.search(pattern, shown):
            if select.select([self.master], [], [], 5)[0]:
                shown += os.read(self.master, 4096).decode()
            else:
                assert time.monotonic() < end, shown
                self.press(again)
        return shown.replace("\r\n", "\n")


def test_at_a_terminal(pair, pictures):
    pytest.importorskip("readline")
    flags = ["--checkpoint_path", str(pair("qwen2.5-vl").path), "--max_new_tokens", "4", "--max_cache_size", "500"]
    terminal = Terminal([sys.executable, "generate.py", "--interactive", "--device", "cpu", *flags])
    try:
        terminal.read_until(r"\[0/500\] > ")
        terminal.press("/image nowhere.png\r")
        assert "no such image: nowhere.png\n" in terminal.read_until(r"\[0/500\] > ")
        terminal.press(f"/image '{pictures['small']}'\r")
        assert "30 x 30 pixels" in terminal.read_until(r"\[0/500\] > ")
        terminal.press(f"{PASTE}What\nis it?{END_OF_PASTE}")
        terminal.read_until(r"is it\?")
        terminal.press("\r")
        shown = terminal.read_until(r"\[[1-9]\d*/500\] > ")
        assert shown.count("time to first token") == 1, "the two lines are one message"
        assert "\n\x1b[2mprompt " in shown and "GB/s\x1b[0m\n" in shown, "dimmed, on a line of its own"
        terminal.press(UP)
        terminal.read_until(r"is it\?")
        terminal.press(CTRL_C)
        # Python's readline sees a signal only while it waits for a key: not one that comes while it draws the line.
        assert "Ctrl-D" in terminal.read_until(r"\[[1-9]\d*/500\] > ", again=CTRL_C)
        terminal.press(CTRL_D)
        assert terminal.process.wait(PATIENCE_S) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


def test_figures_follow_on_a_line_of_their_own(pair, monkeypatch):
    """Both streams in one place, as a terminal shows them; a line of a pipe is a message."""
    screen = io.StringIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n/image\n"))
    path = str(pair("qwen2").path)
    flags = ["--checkpoint_path", path, "--interactive", "--device", "cpu", "--max_new_tokens", "4"]
    assert generate.main(flags) == 0
    shown = screen.getvalue()
    assert "\nprompt " in shown and "\x1b" not in shown
    assert re.search(r"\[[1-9]\d*/\d+\] > /image needs", shown), "the prompt counts the conversation's tokens"


@pytest.mark.parametrize("typed", ["my photo.png", "'my photo.png'", r"my\ photo.png", '"my photo.png"'])
def test_paths_as_terminals_paste_them(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my photo.png").touch()
    assert chat.unquote(typed) == "my photo.png"


def test_home_and_missing_paths():
    assert chat.unquote("~/x.png") == str(Path.home() / "x.png")
    assert chat.unquote("it's.png") == "it's.png"
