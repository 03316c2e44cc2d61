"""What quantization costs in quality: perplexity on Python's own library and documentation, for several formats.

Knows where a Python installation keeps text. Quantizes in memory, so that formats can be compared that no file holds
(int4.g128.minmax rounds between minimum and maximum, without the search).

    python scripts/perplexity.py --checkpoint_path checkpoints/Qwen/Qwen2.5-0.5B/model.pth --out perplexity.jsonl

The text depends only on the Python version: an interrupted run continues with the formats that --out lacks.
"""

import argparse
import json
import math
import platform
import pydoc_data.topics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import DTYPES

import torch
import torch.nn.functional as F
from torch import nn

import generate
from quantize import dequantize, group_for, linears, quantize_in_place, quantize_layer

FORMATS = "none int8 fp8 int4.g32 int4.g32.minmax int4.g64 int4.g64.minmax int4.g128 int4.g128.minmax"
MODULES = (
    "argparse",
    "ast",
    "asyncio/base_events",
    "difflib",
    "fractions",
    "heapq",
    "pathlib",
    "statistics",
    "textwrap",
)
WINDOW = 512  # tokens in a forward pass; the first is context only


def read_windows(tokenizer, n_tokens: int) -> list[list[int]]:
    """Windows of WINDOW tokens at even distances: half of them code, half documentation."""
    library = Path(argparse.__file__).parent
    code = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    documentation = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    windows = []
    for text in (code, documentation):
        tokens, n = tokenizer.encode(text), n_tokens // 2 // WINDOW + 1
        if len(tokens) < n * WINDOW:
            raise ValueError(f"this Python has too little text for {n_tokens} tokens")
        windows += [tokens[i * len(tokens) // n :][:WINDOW] for i in range(n)]
    return windows


@torch.inference_mode()
def mean_loss(model: nn.Module, windows: list[list[int]]) -> float:
    """Cross-entropy in nats per token."""
    total, input_pos = 0.0, torch.arange(WINDOW, device=model.norm.weight.device)
    for window in windows:
        tokens = torch.tensor(window, device=input_pos.device)
        logits = model(tokens, input_pos)[:-1, : model.args.n_tokens].float()
        total += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
    return total / (len(windows) * (WINDOW - 1))


def change_weights(model: nn.Module, kind: str, dtype: torch.dtype, dense: bool) -> None:
    """Quantize to one of FORMATS. dense: dequantize the result, so that no quantized kernel is needed."""
    mode, *details = kind.split(".")
    group = int(details[0][1:]) if details else 128
    search = {"shrinks": (1.0,), "refits": 0} if "minmax" in details else {}
    if not dense:
        return quantize_in_place(model, mode, group, dtype, **search)
    for linear in linears(model).values():
        tensors, *_ = quantize_layer(linear.weight.data, mode, group_for(linear.in_features, group), **search)
        linear.weight = nn.Parameter(dequantize(*tensors).to(dtype), requires_grad=False)


def measure(kind: str, args: argparse.Namespace) -> float:
    dtype = getattr(torch, args.dtype)
    engine, tokenizer = generate.load(args.checkpoint_path, device=args.device, dtype=dtype, optimize=False)
    if kind != "none":
        change_weights(engine.model, kind, dtype, args.dequantize)
    engine.model.setup_caches(WINDOW)
    return math.exp(mean_loss(engine.model, read_windows(tokenizer, args.n_tokens)))


def describe(kind: str, args: argparse.Namespace) -> dict:
    """The fields of a line of --out that describe a run; equal for equal runs."""
    return {
        "model": args.checkpoint_path.parent.name,
        "format": kind,
        "n_tokens": (args.n_tokens // 2 // WINDOW + 1) * 2 * (WINDOW - 1),
        "dtype": args.dtype,
        "device": args.device,
        "expanded": args.dequantize,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_results(path: Path | None) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="a converted model.pth")
    parser.add_argument(
        "--formats", nargs="+", default=FORMATS.split(), help=f"some of {FORMATS}; the first is compared"
    )
    parser.add_argument("--n_tokens", type=int, default=20000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="use dequantized dense weights: faster for long texts",
    )
    parser.add_argument("--out", type=Path, help="append a JSON line a format to this file; skip what it holds")
    args = parser.parse_args()
    first = None
    for kind in args.formats:
        start, run = time.perf_counter(), describe(kind, args)
        known = [line["perplexity"] for line in read_results(args.out) if run.items() <= line.items()]
        found = known[0] if known else measure(kind, args)
        first = first or found
        seconds = round(time.perf_counter() - start)
        print(f"{kind:18} perplexity {found:8.4f} {100 * (found / first - 1):+7.2f} %   {seconds} s", flush=True)
        if args.out and not known:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(run | {"perplexity": round(found, 5), "seconds": seconds}) + "\n")
    print(f"{run['n_tokens']} tokens, {args.dtype}, {args.checkpoint_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
