"""The examples run as they are, and stay short."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/describe.py"


def test_describe(tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    description, reply = done.stdout.splitlines()
    assert len(description.split()) >= 8 and reply
