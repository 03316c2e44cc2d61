"""What the commands share: flags, the one line about a mistake, exit statuses, and who prints.

Knows argparse, the standard streams and the checkpoints that come with the repository. Does not know what a flag does.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from vision import Pruning

ROOT = Path(__file__).resolve().parent
DEFAULT_CHECKPOINT = ROOT / "checkpoints/tiny-qwen2.5-vl/model.pth"
DEFAULT_DRAFT = ROOT / "checkpoints/tiny-qwen2.5-vl-draft/model.pth"
MAX_NEW_TOKENS = 200
IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts one alone prints


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong flags, where argparse prints its usage and exits."""

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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def log(line: str) -> None:
    """A line about the run, to stderr."""
    if IS_FIRST_RANK:
        print(line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """What was asked for, to stdout, at once."""
    if IS_FIRST_RANK:
        print(text, end="", flush=True)


def run_command(name: str, command: Callable[[], int]) -> int:
    """The exit status: command's own; 2 after a mistake of the user's, with one line that says what is wrong; 130 after
    Ctrl-C. A fault of ours keeps its traceback."""
    try:
        return command()
    except (ValueError, OSError) as error:
        log(f"{name}: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        return 130


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that generate.py and evaluate.py share."""
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, help="a converted model.pth")
    parser.add_argument(
        "--draft_checkpoint_path", type=Path, help="a smaller model of the same tokenizer, which proposes tokens"
    )
    parser.add_argument("--speculate_k", type=number(int, 1), default=5, help="tokens that the draft proposes a step")
    parser.add_argument("--mm_prune_method", choices=["random", "structured"], default="structured")
    parser.add_argument(
        "--mm_prune_ratio",
        type=number(float, 0, 1),
        default=0.0,
        help="fraction of visual tokens removed from the draft",
    )
    parser.add_argument("--draft_device", help="default: --device")
    parser.add_argument("--draft_max_cache_size", type=number(int, 1), help="tokens; default: as many as needed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--compile_prefill", action="store_true", help="compile the encoder and prefill too")
    parser.add_argument("--max_cache_size", type=number(int, 1), help="tokens; default: as many as needed")
    parser.add_argument(
        "--cross_attention_seq_length",
        type=number(int, 1),
        help="visual tokens under cross-attention; default: as many as needed",
    )
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=MAX_NEW_TOKENS)
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0: always the most likely token")
    parser.add_argument("--top_k", type=number(int, 1), help="sample among the k most likely tokens only")
    parser.add_argument("--seed", type=int, default=1234)


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
