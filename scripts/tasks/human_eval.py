"""HumanEval (arXiv 2107.03374): its problems, its prompts, and whether a program passes its tests.

Knows the files of Hugging Face and of the authors, and how to run a program outside this process. Does not know models.

What is guaranteed of a program that is run: at most TIMEOUT_S seconds, MEMORY_BYTES of memory, files of at most 1 MiB,
an empty working directory, an empty environment (no access tokens), its process group killed at the end. No
network: by a namespace of the kernel where the system allows one, otherwise only Python's sockets are closed, and code
that calls the C library directly is not stopped; `network_guard` tells which. The file system is that of the user: run
this in a container if you do not trust the model.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HUB_REPO, HUB_FILE = "openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet"
FILES = ["HumanEval.jsonl.gz", "HumanEval.jsonl", HUB_FILE, "test-00000-of-00001.parquet"]  # any of them will do
FIELDS = ["task_id", "prompt", "entry_point", "test"]
TIMEOUT_S = 10  # the authors' 3 s are short for a machine that is busy
MEMORY_BYTES = 4 << 30
CHILD = Path(__file__).with_name("run_program.py")
INSTRUCTION = "Complete this Python function. Reply with the whole function in one code block."
FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# Where a completion of a base model has left the function (the paper's stop sequences).
AFTER_FUNCTION = re.compile(r"\n(?=class |def |#|if |print|@|assert )")


def prepare(row: dict, i: int) -> dict:
    """A problem, the i-th of its file."""
    problem = {name: row.get(name) for name in FIELDS}
    return problem | {"id": str(row.get("task_id", f"line {i}")), "group": "all", "completion": row.get("prompt")}


def ask(problem: dict) -> list[str]:
    """Raises ValueError if a field is missing."""
    if missing := [name for name in FIELDS if not isinstance(problem[name], str)]:
        raise ValueError(f"a HumanEval problem without {', '.join(missing)}")
    return [f"{INSTRUCTION}\n\n```python\n{problem['prompt'].strip()}\n```"]


def build_program(problem: dict, reply: str) -> str:
    """The program that a reply stands for: the prompt, what was written, the tests.

    A reply is a text with a code block, the whole function, or the continuation of the prompt.
    """
    blocks = FENCE.findall(reply)
    name = rf"^(?:async )?def {re.escape(problem['entry_point'])}\b"
    code = next((block for block in blocks if re.search(name, block, re.MULTILINE)), blocks[0] if blocks else reply)
    if re.search(name, code, re.MULTILINE):
        # The prompt's function has a docstring for a body; its imports and helpers are needed, it is replaced.
        code = f"{problem['prompt']}\n    pass\n\n{code}"
    else:
        code = problem["prompt"] + AFTER_FUNCTION.split(code, maxsplit=1)[0]
    return f"{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def score(problem: dict, replies: list[str], rng=None) -> dict:
    """Whether the reply's program passes the tests: it is executed."""
    error = run_program(build_program(problem, replies[0]))["error"]
    return {"correct": error is None} | ({"program_error": error} if error else {})


def run_program(program: str, timeout_s: int = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> dict:
    """{"error": None or why the program did not run to its end, "isolated": whether it was cut off by the kernel}."""
    secret = secrets.token_hex(16)
    command = [sys.executable, "-I", str(CHILD), str(timeout_s), str(memory_bytes)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,  # so that its children die with it
        )
        try:
            output = process.communicate(json.dumps({"program": program, "secret": secret}).encode(), timeout_s)[0]
        except subprocess.TimeoutExpired:
            return {"error": f"more than {timeout_s} s", "isolated": None}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        report = json.loads(output)
        if report["secret"] == secret:
            return {"error": report["error"], "isolated": report["isolated"]}
    return {"error": "ended before its tests did", "isolated": None}


def network_guard() -> str:
    """How programs are kept off the network on this machine."""
    if run_program("")["isolated"]:
        return "in a network namespace of their own, which has no devices"
    return "with Python's sockets closed only: code that calls the C library directly could reach the network"
