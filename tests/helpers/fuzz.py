"""Mutated inputs, and what a program makes of one: refused with one line, or answered, in time and in memory.

Knows bytes, JSON and processes. Does not know the program's files: tests/test_fuzz.py has these.
"""

import contextlib
import json
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

SECONDS, MEMORY, STUCK = 2.0, 2**30, 10  # an input's limits: CPU time, resident bytes, when it is given up
ODD = [None, True, False, 0, -1, 1, 2, 3, 7, 255, 65536, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e308, float("nan")]
ODD += [
    float("inf"),
    "",
    "x",
    "1",
    "-1",
    "9" * 50,
    "é\u2581\U0001f600",
    "\ud800",
    "\0",
    "a\nb",
    "x" * 5000,
    "{{",
    "../x",
]
ODD += ["{{", [], {}, [[]], [None], {"": None}, [0, 1], ["x"], {"type": "x"}, [[[[[[[[]]]]]]]]]
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def mutate_bytes(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to eight changes; the ends of a file, where its structure is, are hit as often as all the rest."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        n = len(changed)
        span = rng.choice((n, 64, 1024))
        at = rng.randrange(n + 1) if span >= n else rng.choice((0, n - span)) + rng.randrange(span)
        length = min(rng.choice((1, 1, 2, 4, 8, 32, 200)), n - at)
        match rng.randrange(9):
            case 0 if at < n:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < n:
                changed[at] = rng.choice((0, 255, rng.randrange(256), ord("0"), ord('"'), ord("["), 10))
            case 2:
                width = rng.choice((2, 4, 8))
                number = rng.choice(NUMBERS) % 256**width
                changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                changed[at:at] = rng.randbytes(length)
            case 6 if rng.random() < 0.3:
                del changed[at:]
            case 7:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                changed[at : at + length] = other[begin : begin + rng.choice((4, 50, 1000))]
            case _:
                changed[at : at + length] = bytes(length)
    return bytes(changed)


def mutate_json(rng: random.Random, value, others: list) -> bytes:
    """One to four changes of what a JSON text says, which is then written; seldom also of its bytes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(walk(value))
        if not places:
            break
        container, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1:
                other, name = rng.choice(list(walk(rng.choice(others))))
                container[key] = json.loads(json.dumps(other[name]))
            case 2 if isinstance(container, dict):
                container[rng.choice([str(key) + "x", "", *map(str, container)])] = container.pop(key)
            case 3 if isinstance(container, list):
                container[key:key] = container[key : key + 1] * rng.choice((1, 5, 300))
            case 4 if type(container[key]) in (int, float):
                container[key] = rng.choice((-1, 0, 0.5, 2, 3, 1000, 10**7, 10**12)) * container[key]
            case _:
                container[key] = deepcopy(rng.choice(ODD))  # or a later change would change it for all
    data = json.dumps(value).encode()
    return mutate_bytes(rng, data, [data]) if rng.random() < 0.1 else data


def walk(value):
    """Each place of a JSON value: what contains it, and its key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from walk(value[key])


@dataclass
class Target:
    """A kind of input: valid ones, how they are changed, and who reads them."""

    seeds: list  # bytes, or what JSON says
    run: Callable[[bytes], object]  # raises ValueError or OSError for what it refuses
    mutate: Callable[[random.Random, object, list], bytes] = mutate_bytes


class Stuck(BaseException):
    """No answer within STUCK seconds."""


@dataclass
class Counts:
    """Of the inputs of a target."""

    inputs: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    most_bytes: int = 0
    defects: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)  # of each defect the first

    def add(self, defect: str, seed: str, detail: str) -> None:
        self.defects[defect] += 1
        self.examples.setdefault(defect, f"{seed}: {detail}")


def try_inputs(name: str, target: Target, numbers: range, read_stderr: Callable[[], str]) -> Counts:
    """What became of the inputs of these numbers. read_stderr: all that was printed since it was last called."""
    counts = Counts()
    for number in numbers:
        rng = random.Random(f"{name} {number}")
        data = target.mutate(rng, rng.choice(target.seeds), target.seeds)
        before = forget_peak()
        read_stderr()
        start, error = time.process_time(), watch(target.run, data)
        seconds, used = time.process_time() - start, peak() - before
        printed = [line for line in read_stderr().splitlines() if not line.startswith("loaded ")]
        counts.inputs += 1
        counts.refused += error is not None
        counts.slowest_s, counts.most_bytes = max(counts.slowest_s, seconds), max(counts.most_bytes, used)
        if error is not None and not isinstance(error, ValueError | OSError):
            where = traceback.extract_tb(error.__traceback__)
            last = next((frame for frame in reversed(where) if "site-packages" not in frame.filename), where[-1])
            place = f"{Path(last.filename).name}:{last.name}"
            text = "".join(traceback.format_exception(error))[-1500:]
            counts.add(f"{type(error).__name__} in {place}", f"{name} {number}", text)
        if seconds > SECONDS:
            counts.add("slow", f"{name} {number}", f"{seconds:.1f} s")
        if used > MEMORY:
            counts.add("memory", f"{name} {number}", f"{used / 2**20:.0f} MiB")
        if error is not None and printed:
            counts.add("lines on stderr", f"{name} {number}", printed[0][:300])
    return counts


def watch(run: Callable[[bytes], object], data: bytes) -> BaseException | None:
    """What run raises, if it does, or Stuck."""

    def stop(*_):
        raise Stuck

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, STUCK)
    try:
        run(data)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    return None


def forget_peak() -> int:
    """Resident bytes now, from which the peak counts anew where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/self/status") as file:
            return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
