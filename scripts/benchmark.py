"""How fast a model of the table decodes here, with random weights: no checkpoint is needed.

    python scripts/benchmark.py --model Qwen2.5-0.5B --compare transformers
    python scripts/benchmark.py --model Qwen2.5-0.5B --quantize int8
    python scripts/benchmark.py --model Qwen2.5-VL-7B-Instruct --compile --out benchmarks/h100.json

Knows how to build and time a model of model.MODELS, and the same shapes in transformers. Does not know checkpoints.

What is counted. Bandwidth: the best of several passes over 1 GiB, read once (a sum), or copied (bytes read plus bytes
written). encoder_s: preprocessing and encoder of one synthetic picture. prefill_s: the prompt, picture included, up to
the first token. Decoding: the median of single steps, each waited for, at a cache of --prompt_tokens; its bytes are the
weights that a step reads (no embeddings, no caches), and read_share is their part of the read bandwidth measured in the
same run. verify: a step of k + 1 tokens as a multiple of a decode step. Peak memory: of the process, or of the device.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generate import (
    Engine,
    Parser,
    check_device,
    compile_prefill,
    compile_step,
    log,
    now,
    number,
    one_line,
    weight_bytes,
)
from model import MODELS, ModelArgs, Transformer
from quantize import GROUP_SIZES, MODES, quantize_in_place
from vision import build_encoder

GIB = 2**30


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
    return Engine(model, encoder, step=model)


def fill_with_noise(parameter: Tensor) -> None:
    """Normal noise of variance 1 / columns: a block of it again and again, since billions of draws take minutes."""
    flat, scale = parameter.view(-1), parameter.shape[-1] ** -0.5
    noise = torch.randn(2**20, device=flat.device) * scale
    for start in range(0, len(flat), len(noise)):
        flat[start : start + len(noise)] = noise[: len(flat) - start]


def median_seconds(run, device: torch.device, repeat: int) -> float:
    """The median of `repeat` timed runs after two that are not counted."""
    seconds = []
    for _ in range(repeat + 2):
        start = now(device)
        run()
        seconds.append(now(device) - start)
    return statistics.median(seconds[2:])


def measure_bandwidth(device: torch.device) -> dict:
    """GB/s of reading and of copying 1 GiB."""
    source = torch.ones(GIB // 4, device=device)
    target = torch.empty_like(source)
    read = min(median_seconds(source.sum, device, 1) for _ in range(5))
    copy = min(median_seconds(lambda: target.copy_(source), device, 1) for _ in range(5))
    return {"read_gb_s": GIB / read / 1e9, "copy_gb_s": 2 * GIB / copy / 1e9}


def make_prompt(args: ModelArgs, n_tokens: int, image_size: int) -> tuple[list[int], list[Image.Image]]:
    """Made-up ids, with a picture in front for a model that sees."""
    ids = torch.randint(1000, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    if not args.vision:
        return ids, []
    picture = Image.effect_noise((image_size, image_size), 64).convert("RGB")
    return [args.image_token_id, *ids], [picture]


@torch.inference_mode()
def measure(engine: Engine, flags: argparse.Namespace) -> dict:
    args, device = engine.model.args, engine.device
    tokens, images = make_prompt(args, flags.prompt_tokens, flags.image_size)

    def encode():
        engine.forget()
        return engine.prompt(tokens, images)

    result = {"encoder_s": median_seconds(encode, device, flags.repeat)} if images else {}
    prompt = encode()
    engine.max_cache_size = flags.max_cache_size
    engine.reserve(len(prompt), flags.speculate_k + 1, prompt.cross_mask.shape[1])
    result["prefill_s"] = median_seconds(lambda: engine.model.prefill(prompt), device, flags.repeat)
    slots = torch.arange(len(prompt), len(prompt) + flags.speculate_k + 1, device=device)
    ids = torch.ones_like(slots)
    start = now(device)
    engine.step(ids[:1], slots[:1])
    engine.step(ids, slots)
    result["first_steps_s"] = now(device) - start  # compilation, if any
    step = median_seconds(lambda: engine.step(ids[:1], slots[:1]), device, 4 * flags.repeat)
    verify = median_seconds(lambda: engine.step(ids, slots), device, 2 * flags.repeat)
    gigabytes = weight_bytes(engine.model) / 1e9
    result |= {"prompt_tokens": len(prompt), "n_visual_tokens": 0 if prompt.visual is None else len(prompt.visual)}
    result |= {"time_to_first_token_s": result.get("encoder_s", 0) + result["prefill_s"], "step_s": step}
    result |= {"tokens_per_s": 1 / step, "gb_s": gigabytes / step, "verify_steps": verify / step}
    return result


@torch.inference_mode()
def measure_transformers(args: ModelArgs, flags: argparse.Namespace, dtype: torch.dtype) -> dict:
    """transformers on the decoder's shapes, text only: its default (eager, growing cache), without a draft."""
    import transformers

    names = {"LlamaForCausalLM": transformers.LlamaConfig, "Qwen2ForCausalLM": transformers.Qwen2Config}
    kind = "Qwen2ForCausalLM" if args.qkv_bias else "LlamaForCausalLM"
    config = names[kind](
        hidden_size=args.dim,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.n_layer,
        num_attention_heads=args.n_head,
        num_key_value_heads=args.n_kv_head,
        vocab_size=args.vocab_size,
        tie_word_embeddings=args.tie_embeddings,
        max_position_embeddings=args.max_seq_len,
    )
    with torch.device("meta"):
        model = getattr(transformers, kind)(config).to(dtype)
    model = model.to_empty(device=flags.device).eval()
    if args.tie_embeddings:
        model.tie_weights()
    for parameter in model.parameters():
        fill_with_noise(parameter) if parameter.ndim > 1 else parameter.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(flags.device)  # its buffer was emptied too
    device = torch.device(flags.device)
    ids = torch.randint(1000, (1, flags.prompt_tokens), device=device)
    prefill = median_seconds(lambda: model(ids, logits_to_keep=1), device, flags.repeat)
    # What generate() does for a token, without its own overhead: to the peer's advantage.
    cache, seconds = model(ids, logits_to_keep=1).past_key_values, []
    for _ in range(4 * flags.repeat + 2):
        start = now(device)
        model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        seconds.append(now(device) - start)
    step = statistics.median(seconds[2:])
    return {"prefill_s": prefill, "step_s": step, "tokens_per_s": 1 / step}


def peak_memory(device: torch.device) -> float:
    """GB, of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def run(flags: argparse.Namespace) -> dict:
    check_device(flags.device)
    if flags.model not in MODELS:
        raise ValueError(f"no model {flags.model}; there are: {', '.join(sorted(MODELS))}")
    args, device, dtype = ModelArgs.named(flags.model), torch.device(flags.device), getattr(torch, flags.dtype)
    args = replace(args, n_layer=flags.n_layer or args.n_layer)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()}
    result = {"settings": settings, "machine": describe(device), "torch": torch.__version__}
    result["bandwidth"] = measure_bandwidth(device)
    start = now(device)
    engine = random_engine(args, flags.device, dtype)
    if flags.quantize:
        quantize_in_place(engine.model, flags.quantize, flags.groupsize, dtype)
    result["build_s"] = now(device) - start
    if flags.compile:
        compile_step(engine)
        compile_prefill(engine)
    result |= measure(engine, flags)
    result["read_share"] = result["gb_s"] / result["bandwidth"]["read_gb_s"]
    result["peak_memory_gb"] = peak_memory(device)
    if flags.compare:
        del engine
        peer = measure_transformers(args, flags, dtype)
        result["transformers"] = peer | {"speedup": result["tokens_per_s"] / peer["tokens_per_s"]}
    return result


def print_table(result: dict) -> None:
    for name, value in result.items():
        inner = value if isinstance(value, dict) and name != "settings" else {} if name == "settings" else {"": value}
        for part, number_ in inner.items():
            shown = f"{number_:.4g}" if isinstance(number_, float) else number_
            print(f"{name + ' ' + part:32} {shown}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a row of model.MODELS")
    parser.add_argument("--n_layer", type=number(int, 1), help="fewer layers, for what does not fit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--quantize", choices=MODES, help="the decoder's linear layers")
    parser.add_argument("--groupsize", type=int, choices=GROUP_SIZES, default=128, help="of int4")
    parser.add_argument("--compile", action="store_true", help="the step, prefill and the encoder")
    parser.add_argument("--prompt_tokens", type=number(int, 1), default=128)
    parser.add_argument("--image_size", type=number(int, 1), default=448, help="pixels a side")
    parser.add_argument("--max_cache_size", type=number(int, 1), help="tokens; default: as many as needed")
    parser.add_argument("--speculate_k", type=number(int, 1), default=5)
    parser.add_argument("--repeat", type=number(int, 1), default=5, help="timed runs of prefill; more of a step")
    parser.add_argument("--compare", choices=["transformers"], help="the same decoder shapes in transformers")
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
