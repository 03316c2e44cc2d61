"""The child of human_eval.py: limits itself, then runs the program that stands on stdin.

Usage: python -I run_program.py SECONDS BYTES < JSON {"program", "secret"}. Writes JSON to stdout: "error" (None if the
program ran to its end), "isolated" (whether the kernel cuts it off from the network) and the secret, which a program
that ends early (os._exit in the middle, say) has not written.

Knows the operating system's limits. Does not know models or benchmarks.
"""

import ctypes
import json
import os
import resource
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
MAX_FILE_BYTES = 1 << 20


def leave_network() -> bool:
    """Into a network namespace without any device: whatever the program calls, there is nothing to talk to.

    False where the system does not allow it.
    """
    try:
        return ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    except (OSError, AttributeError):
        return False


def forbid_sockets(event: str, args) -> None:
    """An audit hook, which cannot be removed: Python's own ways to the network and to other programs are closed."""
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.")):
        raise PermissionError(f"{event} is not allowed here")


def limit(seconds: int, n_bytes: int) -> None:
    """Processor time, memory, file size; no core files. A hard limit cannot be raised again."""
    for kind, most in {
        resource.RLIMIT_CPU: seconds + 1,  # whoever started this has a clock, which comes first and says why
        resource.RLIMIT_AS: n_bytes,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(kind, (most, most))


def main() -> None:
    request = json.load(sys.stdin)
    report = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    isolated = leave_network()
    limit(int(sys.argv[1]), int(sys.argv[2]))
    sys.addaudithook(forbid_sockets)
    error = None
    try:
        exec(compile(request["program"], "program", "exec"), {"__name__": "__main__"})
    except BaseException as failure:  # SystemExit too: a program that leaves early has not passed its test
        error = f"{type(failure).__name__}: {failure}"[:200]
    json.dump({"error": error, "isolated": isolated, "secret": request["secret"]}, report)
    report.flush()
    os._exit(0)  # neither threads nor exit handlers of the program run after this


if __name__ == "__main__":
    main()
