"""What quantization costs in quality: perplexity on Python's own library and documentation, formats side by side.

Knows where a Python installation keeps text. Quantizes in memory, so that formats can be compared that no file holds
(int4.g128.minmax is plain rounding, without the search).

    python scripts/perplexity.py --checkpoint_path checkpoints/Qwen/Qwen2.5-0.5B/model.pth
"""

import argparse
import math
import pydoc_data.topics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate
from quantize import quantize_in_place

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
WINDOW = 512  # tokens that are read together; the first of them only as context


def read_windows(tokenizer, n_tokens: int) -> list[list[int]]:
    """Half code, half documentation: windows from all over, in turn."""
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
def perplexity(model: nn.Module, windows: list[list[int]]) -> float:
    total, input_pos = 0.0, torch.arange(WINDOW, device=model.norm.weight.device)
    for window in windows:
        tokens = torch.tensor(window, device=input_pos.device)
        logits = model(tokens, input_pos)[:-1, : model.args.n_tokens].float()
        total += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
    return math.exp(total / (len(windows) * (WINDOW - 1)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="a converted model.pth")
    parser.add_argument(
        "--formats", nargs="+", default=FORMATS.split(), help=f"some of {FORMATS}; the first is compared"
    )
    parser.add_argument("--n_tokens", type=int, default=20000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    args = parser.parse_args()
    dtype, first = getattr(torch, args.dtype), None
    for kind in args.formats:
        start = time.perf_counter()
        engine, tokenizer = generate.load(args.checkpoint_path, args.device, dtype)
        mode, *details = kind.split(".")
        if mode != "none":
            group = int(details[0][1:]) if details else 128
            search = {"shrinks": (1.0,), "refits": 0} if "minmax" in details else {}
            quantize_in_place(engine.model, mode, group, dtype, **search)
        engine.model.setup_caches(WINDOW)
        windows = read_windows(tokenizer, args.n_tokens)
        found = perplexity(engine.model, windows)
        first = first or found
        seconds = time.perf_counter() - start
        print(f"{kind:18} perplexity {found:8.4f} {100 * (found / first - 1):+7.2f} %   {seconds:.0f} s", flush=True)
    print(f"{len(windows) * (WINDOW - 1)} tokens, {args.dtype}, {args.checkpoint_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
