"""How fast a model of the table decodes here, with random weights: no checkpoint is needed.

    python scripts/benchmark.py --model Qwen2.5-0.5B --compare transformers
    python scripts/benchmark.py --model Qwen2.5-0.5B --quantize int8 --compile --compare llama.cpp
    python scripts/benchmark.py --model Qwen2.5-VL-7B-Instruct --compile --out benchmarks/h100.json

Knows how to build and time a model of scripts/published_models.py. Does not know checkpoints; scripts/peers.py knows
other programs.

What is counted. A round does each of these once, so that a machine that is faster now and slower then, as shared ones
are, is so for all of them; what is given are medians over --repeat rounds, and medians of the ratios within a round.
- bandwidth: a large read (the sum of 512 MiB of float32) and a copy of as much (bytes read plus bytes written).
- encoder_s: preprocessing and encoder of one synthetic picture. prefill_s: the prompt, picture included, to the first
  token's logits. time_to_first_token_s: both.
- step_s: one token, waited for, with the prompt in the cache; a round's value is the mean of 4; on a GPU each of these
  is the mean of 20 that are enqueued one after the other, between two events. gb_s: the weights a
  step reads (no embedding table, no caches) by its time; read_share: that by the same round's read bandwidth.
- verify_steps: a step of speculate_k + 1 tokens, as a multiple of a step.
- load_s: making the weights up, in place. quantize_s: rounding them. compile_s: the first step of each kind. n_graphs:
  how many were compiled; n_recompiles: by --n_prompts more prompts of other lengths and picture sizes.
- peak_memory_gb: of the process, Python and libraries included, or of the device, before the large read and a peer.
  memory_needed_gb: all weights and caches.
- draft: with --draft and --accept, what speculation should reach by the times of the two models: a step of it takes k
  draft steps and a verification, and gives 1 + a + ... + a^k tokens if a draft token is accepted with probability a.
Peers run the same shapes, in the same rounds: transformers as a whole, with its image processor and encoder, the better
of eager and static cache with compile; llama.cpp text only. speedup: the peer's time of a step by ours.
"""

import argparse
import json
import platform
import random
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import DTYPES, Parser, check_device, log, number, one_line

import torch
from PIL import Image
from torch import Tensor, nn

import cpu
import gpu
from generate import Engine, compile_layers, compile_steps, generate, weight_bytes
from gpu import mark, now, seconds_between
from model import ModelArgs, Transformer
from quantize import GROUP_SIZES, MODES, quantize_in_place
from scripts.peers import LlamaCpp, Transformers, seconds_of
from scripts.published_models import MODELS, named
from vision import build_encoder

READ_BYTES = 2**29
STEPS = 4  # in a round
REPLAYS = 20  # of a GPU's step, each of these times
LLAMA_CPP = {None: "bf16", "int8": "q8_0", "int4": "q4_0"}


def random_engine(args: ModelArgs, device: str, dtype: torch.dtype) -> Engine:
    """A model with weights as large as a trained one's, made in place: one copy of it in memory, no file."""
    with torch.device("meta"):
        model, encoder = Transformer(args), build_encoder(args.vision) if args.vision else None
    for module in filter(None, (model, encoder)):
        if args.tie_embeddings and module is model:
            model.output.weight = model.embedding.weight
        module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                is_norm = isinstance(child, (nn.RMSNorm, nn.LayerNorm)) and name == "weight"
                parameter.fill_(1) if is_norm else fill_with_noise(parameter)
    return Engine(model, encoder)


def fill_with_noise(parameter: Tensor) -> None:
    """Normal noise of variance 1 / columns: a block of it again and again, since billions of draws take minutes."""
    flat, scale = parameter.view(-1), parameter.shape[-1] ** -0.5
    noise = torch.randn(2**20, device=flat.device) * scale
    for start in range(0, len(flat), len(noise)):
        flat[start : start + len(noise)] = noise[: len(flat) - start]


def make_prompt(args: ModelArgs, n_tokens: int, image_size: int) -> tuple[list[int], list[Image.Image]]:
    """Made-up ids, with a picture in front for a model that sees."""
    ids = torch.randint(1000, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    if not args.vision:
        return ids, []
    picture = Image.effect_noise((image_size, image_size), 64).convert("RGB")
    return [args.image_token_id, *ids], [picture]


class Bandwidth:
    def __init__(self, device: torch.device):
        self.source = torch.ones(READ_BYTES // 4, device=device)
        self.target, self.device = torch.empty_like(self.source), device

    def read(self) -> float:
        return seconds_of(self.source.sum, self.device)

    def copy(self) -> float:
        return seconds_of(lambda: self.target.copy_(self.source), self.device)


class Ours:
    """Our engine after a prompt, as a peer is asked: each method does its thing once and returns its seconds."""

    def __init__(self, engine: Engine, tokens: list[int], images: list[Image.Image], flags: argparse.Namespace):
        self.engine, self.device = engine, engine.device
        self.tokens, self.images, self.n_proposed = tokens, images, flags.speculate_k
        engine.max_cache_size = flags.max_cache_size
        self.encode()
        # Room for the prompt, a step that can be repeated at will, and draft tokens.
        room = 0 if self.device.type == "cpu" else REPLAYS
        engine.reserve(self.prompt, flags.speculate_k + 1 + room, flags.speculate_k)
        self.prefill()
        self.slots = torch.arange(len(self.prompt), len(self.prompt) + flags.speculate_k + 1, device=self.device)
        self.ids = torch.ones_like(self.slots)

    def encode(self) -> float:
        self.engine.forget()
        start = now(self.device)
        self.prompt = self.engine.build_prompt(self.tokens, self.images)
        return now(self.device) - start

    def prefill(self) -> float:
        self.engine.cached.fill([])
        return seconds_of(lambda: self.engine.prefill(self.prompt), self.device)

    def step(self) -> float:
        if not self.engine.greedy:
            return self.forward(1)
        decode, n_tokens = self.engine.greedy.decode, self.engine.model.args.n_tokens
        return mean_seconds(lambda: decode([1], len(self.prompt), REPLAYS, n_tokens), 1, self.device) / REPLAYS

    def verify(self) -> float:
        return self.forward(self.n_proposed + 1)

    def forward(self, n: int) -> float:
        length, ids, slots = self.engine.cache_length(n), self.ids[:n], self.slots[:n]
        return mean_seconds(lambda: self.engine.model(ids, slots, length), REPLAYS, self.device)


def mean_seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Of run(): once on a CPU; on a GPU between two events, as often as given, so that the host runs ahead."""
    if device.type == "cpu":
        return seconds_of(run, device)
    run()
    start = mark(device)
    for _ in range(times):
        run()
    end = mark(device)
    now(device)
    return seconds_between(start, end) / times


def in_turn(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that is not counted."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            times = STEPS if name.endswith(("step_s", "verify_s")) else 1
            seconds[name].append(sum(run() for _ in range(times)) / times)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below))


def build(name: str, flags: argparse.Namespace, n_layer: int | None) -> tuple[Engine, dict]:
    """The engine, the seconds that it took, and how many layers are of which class."""
    args, device, dtype = named(name), torch.device(flags.device), getattr(torch, flags.dtype)
    args = replace(args, n_layer=n_layer or args.n_layer)
    start = now(device)
    engine = random_engine(args, flags.device, dtype)
    seconds, counts = {"load_s": now(device) - start}, {}
    start = now(device)
    if flags.quantize:
        search = {"shrinks": (1.0,), "refits": 0} if flags.quantize == "int4" else {}  # noise has no better rounding
        counts = quantize_in_place(engine.model, flags.quantize, flags.groupsize, dtype, **search)
        seconds["quantize_s"] = now(device) - start
    for part in filter(None, (engine.model, engine.encoder)):
        counts |= (cpu if device.type == "cpu" else gpu).prepare(part)
    if device.type == "cpu":
        counts["cpu"] = cpu.describe()
    if flags.compile:
        compile_steps(engine)
    if flags.compile_prefill:
        compile_layers(engine)
    return engine, seconds | {"layers": counts}


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def memory_needed(engine: Engine) -> int:
    """Bytes of weights and caches."""
    modules = filter(None, (engine.model, engine.encoder))
    tensors = {id(t) if t.is_mkldnn else t.data_ptr(): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def peak_memory(device: torch.device) -> float:
    """GB, of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def try_prompts(engine: Engine, flags: argparse.Namespace) -> dict:
    """Answers to prompts of different lengths and picture sizes, and what they caused."""
    args, shuffled = engine.model.args, random.Random(0)
    graphs, memory, cache = n_graphs(), peak_memory(engine.device), engine.model.cached.n_slots
    for _ in range(flags.n_prompts):
        n, side = shuffled.randint(1, flags.prompt_tokens), shuffled.randint(28, flags.image_size)
        generate(engine, *make_prompt(args, n, side), 8)
    growth = peak_memory(engine.device) - memory
    assert engine.model.cached.n_slots == cache
    return {"n_recompiles": n_graphs() - graphs, "memory_growth_gb": growth}


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [platform.processor() or platform.machine()]
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0]}, {torch.get_num_threads()} threads"


def build_peers(args: ModelArgs, ours: Ours, flags: argparse.Namespace) -> tuple[dict, dict[str, Callable]]:
    """What is known of the peer before it runs, and its contestants."""
    if flags.compare == "llama.cpp":
        peer = LlamaCpp(args, LLAMA_CPP[flags.quantize], len(ours.prompt), torch.get_num_threads())
        return {"type": LLAMA_CPP[flags.quantize]}, {"peer prefill_s": peer.prefill, "peer step_s": peer.step}
    dtype = getattr(torch, flags.dtype)
    peer = Transformers(args, ours.tokens, ours.images, ours.device, dtype, fill_with_noise)
    peer.prefill()
    contestants = {"peer prefill_s": peer.prefill, "peer step_s": peer.step}
    start = now(ours.device)
    peer.compile(len(ours.prompt) + STEPS * (flags.repeat + 2))
    peer.compiled_step()
    contestants["peer compiled_step_s"] = peer.compiled_step
    return {"compile_s": now(ours.device) - start, "prompt_tokens": peer.prompt_tokens}, contestants


@torch.inference_mode()
def measure(flags: argparse.Namespace) -> dict:
    device = torch.device(flags.device)
    engine, result = build(flags.model, flags, flags.n_layer)
    args = engine.model.args
    ours = Ours(engine, *make_prompt(args, flags.prompt_tokens, flags.image_size), flags)
    result |= {"prompt_tokens": len(ours.prompt), "cache_slots": engine.model.cached.n_slots}
    result["n_visual_tokens"] = 0 if ours.prompt.visual is None else len(ours.prompt.visual)
    first = ours.step() + ours.verify()
    if flags.compile:
        result |= {"compile_s": first, "n_graphs": n_graphs()}
    contestants = {"step_s": ours.step, "verify_s": ours.verify}
    if ours.images:
        contestants["encoder_s"] = ours.encode
    contestants["prefill_s"] = ours.prefill
    if flags.draft:
        draft = Ours(build(flags.draft, flags, None)[0], ours.tokens[-flags.prompt_tokens :], [], flags)
        contestants["draft_step_s"] = draft.step
    in_turn(contestants, 1)
    result |= {"memory_needed_gb": memory_needed(engine) / 1e9, "peak_memory_gb": peak_memory(device)}
    if flags.n_prompts:
        result |= try_prompts(engine, flags)
        ours.encode(), ours.prefill()
    bandwidth, peer = Bandwidth(device), {}
    contestants = {"read_s": bandwidth.read, **contestants, "copy_s": bandwidth.copy}
    if flags.compare:
        peer, peers = build_peers(args, ours, flags)
        contestants |= peers
    seconds = in_turn(contestants, flags.repeat)
    if flags.profile:
        with torch.profiler.profile() as profiler:
            ours.step(), ours.verify()
        profiler.export_chrome_trace(str(flags.profile))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    read, copy = READ_BYTES / median.pop("read_s") / 1e9, 2 * READ_BYTES / median.pop("copy_s") / 1e9
    gigabytes = weight_bytes(engine.model) / 1e9
    result |= {name: value for name, value in median.items() if not name.startswith("peer")}
    first = [a + b for a, b in zip(seconds["prefill_s"], seconds.get("encoder_s", [0] * flags.repeat))]
    result |= {"time_to_first_token_s": statistics.median(first), "tokens_per_s": 1 / result["step_s"]}
    result |= {"weights_gb": gigabytes, "gb_s": gigabytes / result["step_s"]}
    result["read_share"] = ratio(seconds["read_s"], seconds["step_s"]) * gigabytes / (READ_BYTES / 1e9)
    result["verify_steps"] = ratio(seconds["verify_s"], seconds["step_s"])
    result["bandwidth"] = {"read_gb_s": read, "copy_gb_s": copy}
    if flags.draft:
        k, accept = flags.speculate_k, flags.accept
        gained = sum(accept**i for i in range(k + 1))
        cost = [k * d + v for d, v in zip(seconds["draft_step_s"], seconds["verify_s"])]
        result["draft"] = {"tokens_a_step": gained, "tokens_per_s": gained / statistics.median(cost)}
        result["draft"]["speedup"] = gained / ratio(cost, seconds["step_s"])
    if flags.compare:
        steps = {name: values for name, values in seconds.items() if name.startswith("peer") and "step_s" in name}
        best = min(steps, key=lambda name: median[name])
        peer |= {name.removeprefix("peer "): value for name, value in median.items() if name.startswith("peer")}
        peer |= {"tokens_per_s": 1 / median[best], "speedup": ratio(steps[best], seconds["step_s"])}
        peer["time_to_first_token_ratio"] = ratio(seconds["peer prefill_s"], first)
        result[flags.compare] = peer
    return result


def run(flags: argparse.Namespace) -> dict:
    check_device(flags.device)
    for name in filter(None, (flags.model, flags.draft)):
        if name not in MODELS:
            raise ValueError(f"no model {name}; there are: {', '.join(sorted(MODELS))}")
    if (flags.draft is None) != (flags.accept is None):
        raise ValueError("--draft and --accept belong together")
    files = ("out", "profile")
    settings = {name: value for name, value in vars(flags).items() if name not in files and value not in (None, False)}
    usual = vars(parse_args(["--model", flags.model]))
    given = {name: value for name, value in settings.items() if name == "model" or value != usual[name]}
    words = (f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())
    result = {"machine": machine(torch.device(flags.device)), "torch": torch.__version__}
    result["command"] = f"python scripts/benchmark.py {' '.join(words)}"
    return result | {"settings": settings} | measure(flags)


def print_table(result: dict) -> None:
    for name, value in result.items():
        inner = value if isinstance(value, dict) and name != "settings" else {} if name == "settings" else {"": value}
        for part, number_ in inner.items():
            shown = f"{number_:.4g}" if isinstance(number_, float) else number_
            print(f"{name + ' ' + part:36} {shown}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a row of scripts/published_models.py")
    parser.add_argument("--n_layer", type=number(int, 1), help="fewer layers, for what does not fit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quantize", choices=MODES, help="the decoder's linear layers")
    parser.add_argument("--groupsize", type=int, choices=GROUP_SIZES, default=64, help="of int4")
    parser.add_argument("--compile", action="store_true", help="the step")
    parser.add_argument("--compile_prefill", action="store_true", help="prefill and the encoder")
    parser.add_argument("--prompt_tokens", type=number(int, 1), default=128)
    parser.add_argument("--image_size", type=number(int, 28), default=448, help="pixels a side")
    parser.add_argument("--max_cache_size", type=number(int, 1), help="tokens; default: as many as needed")
    parser.add_argument("--speculate_k", type=number(int, 1), default=5)
    parser.add_argument("--draft", help="such a row too: its time a step, and what speculation would gain")
    parser.add_argument("--accept", type=number(float, 0, 1), help="the probability that a draft token is accepted")
    parser.add_argument("--n_prompts", type=number(int, 0), default=0, help="that many more; counts recompiles")
    parser.add_argument("--repeat", type=number(int, 1), default=7, help="rounds")
    parser.add_argument("--compare", choices=["transformers", "llama.cpp"], help="the same shapes in another program")
    parser.add_argument("--profile", type=Path, help="write a Chrome trace of a step and a verification to this file")
    parser.add_argument("--out", type=Path, help="append the result to this file, a JSON line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        flags = parse_args(argv)
        result = run(flags)
        print_table(result)
        print(json.dumps(result))
        if flags.out:
            flags.out.parent.mkdir(parents=True, exist_ok=True)
            with flags.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    except (ValueError, OSError) as error:
        log(f"benchmark.py: {one_line(error)}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
