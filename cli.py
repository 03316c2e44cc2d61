"""What the commands share: flags, the one line about a mistake, exit statuses, and who prints.

Knows argparse, the standard streams and the checkpoints that come with the repository. Does not know what a flag does.
"""

import argparse
import ctypes
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# PyTorch needs no NumPy, but where there is none it says so in two lines. The filter has to stand before its import.
warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch  # noqa: E402

from vision import Pruning  # noqa: E402

ROOT = Path(__file__).resolve().parent
DEFAULT_CHECKPOINT = ROOT / "checkpoints/tiny-qwen2.5-vl/model.pth"
DEFAULT_DRAFT = ROOT / "checkpoints/tiny-qwen2.5-vl-draft/model.pth"
MAX_NEW_TOKENS = 200
DTYPES = ["bfloat16", "float32", "float16"]
Group = argparse._ArgumentGroup  # what add_argument_group() returns
IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts one alone prints


class Help(argparse.HelpFormatter):
    """Puts the default behind what a flag does, where there is one and the text does not say it itself."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        has_none = default is None or default is False or default == [] or default == argparse.SUPPRESS
        text = action.help or ""
        return text if has_none or "default" in text else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong flags, where argparse prints its usage and exits."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the flags)")


def number(kind: type, least: float, most: float = float("inf")) -> Callable:
    """For flags: a function that reads a number of that kind within these bounds, or raises ValueError."""

    def read(text):
        if not least <= kind(text) <= most or kind(text) == float("inf"):
            raise ValueError(f"{text} is not a number from {least} to {most}")
        return kind(text)

    read.__name__ = f"number from {least} to {most}"  # what argparse calls it
    return read


def temperature(text: str) -> float:
    """Below 1e-5, where logits / temperature would leave float32, it is 0: always the most likely token."""
    value = number(float, 0)(text)
    return value if value >= 1e-5 else 0.0


def seed(text: str) -> int:
    """Any integer, as one that PyTorch's generators take; small numbers can be added to it."""
    return int(text) % 2**63


def one_line(error: BaseException) -> str:
    """Whatever a file made of the message: one line, of at most 700 characters, which a terminal can print."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    return text if len(text) <= 700 else f"{text[:400]} ... {text[-290:]}"


def log(line: str, dim: bool = False) -> None:
    """A line about the run, to stderr; dim: figures, which a terminal shows less brightly than what matters."""
    if IS_FIRST_RANK:
        dim = dim and sys.stderr.isatty() and "NO_COLOR" not in os.environ
        print(f"\x1b[2m{line}\x1b[0m" if dim else line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """What was asked for, to stdout, at once."""
    if IS_FIRST_RANK:
        print(text, end="", flush=True)


def command_for(checkpoint: Path) -> str:
    """The command that answers with a checkpoint that was just made."""
    return f"python generate.py --checkpoint_path {shlex.quote(str(checkpoint))} --prompt 'What is a cache?'"


def run_command(name: str, command: Callable[[], int]) -> int:
    """The exit status: command's own; 2 after a mistake of the user's, with one line that says what is wrong; 130 after
    Ctrl-C. A fault of ours keeps its traceback."""
    explain_bus_errors(name)
    try:
        return command()
    except (ValueError, OSError) as error:
        log(f"{name}: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        return 130


def explain_bus_errors(name: str) -> None:
    """From now on, a line and status 2 where the file behind a mapped tensor is cut off, instead of a bus error.

    Python's own handlers run later, but the instruction that failed would come first, again and again.
    """
    if not hasattr(signal, "SIGBUS"):  # Windows
        return
    line = f"{name}: a file was cut off while it was in use, or its disk failed: start again with the whole file\n"

    def explain(number: int) -> None:
        try:
            os.write(2, line.encode())
        finally:
            os._exit(2)

    explain_bus_errors.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)  # type: ignore[attr-defined]  # kept
    ctypes.CDLL(None).signal(signal.SIGBUS, explain_bus_errors.handler)  # type: ignore[attr-defined]


def add_model_flags(parser: Parser, max_new_tokens: int | None = MAX_NEW_TOKENS) -> None:
    """The flags that generate.py and evaluate.py share. max_new_tokens: the default; None: the benchmark's own."""
    parser.usage = "%(prog)s [flags]"
    add = parser.add_argument_group("model").add_argument
    add(
        "--checkpoint_path",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        metavar="FILE",
        help="a model.pth of scripts/convert_hf_checkpoint.py or quantize.py (default: a tiny model that is included)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where the model runs: cpu, cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="bfloat16", help="number format of all that is not quantized")
    draft_is = "speculative decoding: a small model proposes tokens, the large one verifies them"
    add_draft_flags(parser.add_argument_group("draft", draft_is))
    add_sampling_flags(parser.add_argument_group("sampling"), max_new_tokens)
    add_speed_flags(parser.add_argument_group("speed and memory"))


def add_draft_flags(group: Group) -> None:
    add, draft_help = group.add_argument, "a model.pth with the same tokenizer (default: the tiny model has a draft)"
    add("--draft_checkpoint_path", type=Path, metavar="FILE", help=draft_help)
    add("--speculate_k", type=number(int, 1), default=5, metavar="K", help="tokens that the draft proposes in a step")
    ratio, ratio_help = number(float, 0, 1), "fraction of its visual tokens, 0 to 1, removed from the draft's prompt"
    add("--mm_prune_ratio", type=ratio, default=0.0, metavar="RATIO", help=ratio_help)
    method_help = "which visual tokens stay: evenly spaced ones (structured) or random ones"
    add("--mm_prune_method", choices=["random", "structured"], default="structured", help=method_help)
    add("--draft_device", metavar="DEVICE", help="where the draft runs (default: --device)")
    cache_help = "tokens that the draft's KV cache holds (default: as many as needed)"
    add("--draft_max_cache_size", type=number(int, 1), metavar="N", help=cache_help)


def add_sampling_flags(group: Group, max_new_tokens: int | None) -> None:
    add, own = group.add_argument, "" if max_new_tokens else " (default: the benchmark's own)"
    length_help = f"tokens after which an answer ends, should the model not end it before{own}"
    add("--max_new_tokens", type=number(int, 1), default=max_new_tokens, metavar="N", help=length_help)
    heat = "0: always the most likely token; 1: as the model's probabilities say; above: more varied"
    add("--temperature", type=temperature, default=0.0, metavar="T", help=heat)
    top_help = "draw from the K most likely tokens only (default: from all)"
    add("--top_k", type=number(int, 1), metavar="K", help=top_help)
    add("--seed", type=seed, default=1234, metavar="N", help="for random draws: the same seed gives the same answer")


def add_speed_flags(group: Group) -> None:
    add = group.add_argument
    add("--compile", action="store_true", help="compile the decode step: the first answers wait, later ones are faster")
    add(
        "--compile_prefill",
        action="store_true",
        help="compile prefill (the reading of a prompt) and the image encoder",
    )
    cache_help = "tokens that the KV cache holds, fixed (default: as many as needed)"
    add("--max_cache_size", type=number(int, 1), metavar="N", help=cache_help)
    cross_help = "visual tokens that the cache of Llama-3.2-Vision holds, fixed (default: as many as needed)"
    add("--cross_attention_seq_length", type=number(int, 1), metavar="N", help=cross_help)


def add_generate_flags(parser: Parser) -> None:
    """The flags of generate.py alone."""
    add = parser.add_argument_group("input and output").add_argument
    add("--prompt", metavar="TEXT", help="the question; a number N: a made-up prompt of N tokens, to measure speed")
    image_help = "a picture for the prompt, repeatable; <image> in the prompt says where it stands (default: in front)"
    add("--image", action="append", default=[], metavar="FILE", help=image_help)
    add("--system", metavar="TEXT", help="the system prompt (default: the model's own)")
    add("--raw", action="store_true", help="continue the prompt as it is, without the model's chat template")
    add("--interactive", action="store_true", help="chat: each question follows the conversation before it")
    requests_help = "answer a file of requests, a JSON object a line (docs/usage.md), with --json"
    add("--requests", type=Path, metavar="FILE", help=requests_help)
    add("--num_samples", type=number(int, 1), default=1, metavar="N", help="answers to the same prompt")
    add("--json", action="store_true", help="print a JSON object for each answer: text, token ids, timings")
    add("--profile", type=Path, metavar="FILE", help="write a trace of the run, for chrome://tracing or Perfetto")


def complete_model_flags(args: argparse.Namespace) -> None:
    """The embedded target comes with its draft."""
    if args.checkpoint_path == DEFAULT_CHECKPOINT and args.draft_checkpoint_path is None:
        args.draft_checkpoint_path = DEFAULT_DRAFT


def load_options(args: argparse.Namespace) -> dict:
    """The flags as arguments of load()."""
    names = "device draft_device speculate_k compile compile_prefill".split()
    names += "max_cache_size draft_max_cache_size cross_attention_seq_length".split()
    return {
        "dtype": getattr(torch, args.dtype),
        "draft": args.draft_checkpoint_path,
        "pruning": Pruning(args.mm_prune_method, args.mm_prune_ratio, args.seed),
        **{name: getattr(args, name) for name in names},
    }


def check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {one_line(error)[:200]}") from None
