"""The program: load a converted checkpoint, prefill, decode, print.

Knows sampling, the decode loop, what the caches hold, and the command line. Does not know model families: a request
becomes token ids (tokenizer), ids and pictures become a Prompt (vision), a Prompt becomes text here.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model import ModelArgs, Prompt, Transformer
from tokenizer import StreamDecoder, Tokenizer
from vision import Pruning, build_encoder, build_prompt, load_image

ROOT = Path(__file__).resolve().parent
DEFAULT_CHECKPOINT = ROOT / "checkpoints/tiny-qwen2.5-vl/model.pth"
DEFAULT_DRAFT = ROOT / "checkpoints/tiny-qwen2.5-vl-draft/model.pth"
DEFAULT_IMAGE = ROOT / "checkpoints/scenes/four-bars.png"
DEFAULT_PROMPT = "Describe the image."
CACHE_BUCKET = 512  # slots: cache sizes are multiples of it, so that similar prompts share a compiled step
CROSS_BUCKET = 6656  # rows: one image of Llama-3.2-Vision has up to 6404
TOKENS_PER_READ = 8  # an accelerator runs this many steps ahead before the host looks for a stop token


@dataclass
class Sampling:
    temperature: float = 0.0  # 0: the most likely token
    top_k: int | None = None


@dataclass
class Engine:
    """A loaded model, what its caches hold at the moment, and the draft that guesses for it."""

    model: Transformer
    encoder: nn.Module | None
    step: Callable[[Tensor, Tensor, int], Tensor]  # model.forward, compiled or not
    max_cache_size: int | None = None  # slots; None: as many as the prompts turn out to need
    cross_attention_seq_length: int | None = None  # rows of images in the cross caches; None: likewise
    pruning: Pruning | None = None  # of visual tokens
    draft: "Engine | None" = None
    speculate_k: int = 5  # guesses a step
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens  # several ranks: on rank 0's
    held: list[int] = field(default_factory=list)  # the keys (Prompt.key) of the cached tokens, slot by slot
    encoded: dict = field(default_factory=dict)  # images whose rows are kept for the next prompt

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def free_slots(self) -> int:
        return self.model.n_slots - len(self.held)

    def n_read(self, n: int) -> int:
        """Slots that a step on n tokens more reads; on GPUs few different numbers, each has a CUDA graph of its own."""
        grain = 64 if self.device.type == "cpu" else max(64, 1 << (len(self.held) + n - 1).bit_length())
        return min(-(-(len(self.held) + n) // grain) * grain, self.model.n_slots)

    def prompt(self, tokens: list[int], images: list[Image.Image]) -> Prompt:
        image_id = self.model.args.image_token_id
        return build_prompt(tokens, images, self.encoder, image_id, self.device, self.encoded, self.pruning)

    def follow(self, tokens: list[int], images: list[Image.Image], image_id: int | None) -> Prompt:
        """As a draft: the prompt of another model, whose image token is image_id. A text model reads the text alone."""
        if self.encoder is None:
            return self.prompt([token for token in tokens if token != image_id], [])
        own_id = self.model.args.image_token_id  # perhaps another special token there: then any text will do
        same = {own_id: 0, image_id: own_id}
        return self.prompt([same.get(token, token) for token in tokens], images)

    def reserve(self, n_prompt: int, max_new_tokens: int, n_cross: int = 0) -> int:
        """Make room in the caches; return how many of max_new_tokens fit. Raises ValueError if the prompt does not."""
        context = self.model.args.max_seq_len
        limit = min(self.max_cache_size or context, context)
        if n_prompt > limit:
            what = "context" if limit == context else "cache (--max_cache_size, --draft_max_cache_size)"
            raise ValueError(f"the prompt has {n_prompt} tokens, the {what} holds {limit}")
        n_new = min(max_new_tokens, limit - n_prompt + 1)  # the last token is never put into the cache
        rows = n_cross and (self.cross_attention_seq_length or -(-n_cross // CROSS_BUCKET) * CROSS_BUCKET)
        if n_cross > rows:
            raise ValueError(f"the images have {n_cross} rows, the cache (--cross_attention_seq_length) holds {rows}")
        n_slots = min(n_prompt + n_new - 1 + self.speculate_k, limit)  # the last step may guess past the end
        if n_slots > self.model.n_slots:
            # Doubled, so that a growing conversation seldom has to be prefilled again.
            n_slots = self.max_cache_size or max(-(-n_slots // CACHE_BUCKET) * CACHE_BUCKET, 2 * self.model.n_slots)
        if n_slots > self.model.n_slots or n_cross > self.model.n_cross:
            self.model.setup_caches(max(n_slots, self.model.n_slots), max(rows, self.model.n_cross))
            self.held = []
        return n_new

    def forget(self) -> None:
        """The next prompt starts afresh, as in a new process."""
        self.held, self.encoded = [], {}
        if self.draft:
            self.draft.forget()

    def prefill(self, prompt: Prompt) -> Tensor:
        """Logits [1, V] after the prompt. Of a conversation only what the cache does not hold yet is computed."""
        n = common_prefix(self.held, prompt.key[:-1])
        # Rows of an image leave more behind than their slots (rotary offset): past them, begin anew.
        text_only = min(self.held[n:] + prompt.key[n:]) >= 0
        self.held = []
        if n and text_only:
            input_pos = torch.arange(n, len(prompt), device=self.device)
            logits = self.model(prompt.tokens[n:], input_pos, len(prompt))[-1:]
        else:
            logits = self.model.prefill(prompt)
        self.held = list(prompt.key)
        return logits


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def probabilities(logits: Tensor, n_tokens: int, sampling: Sampling) -> Tensor:
    """[S, n_tokens] from logits [S, V]: padding rows of the vocabulary excluded; one-hot at temperature 0."""
    logits = logits[:, :n_tokens].float()
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), n_tokens).float()
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, n_tokens)).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return (logits / sampling.temperature).softmax(dim=-1)


def draw(weights: Tensor) -> Tensor:
    """[S] a sample of each row of weights [S, n], which need not add up to 1.

    argmax(w / Exponential(1)) is such a draw, and needs no synchronization with the host as multinomial does.
    """
    exponential = -torch.rand_like(weights).log()
    return (weights / exponential.clamp(min=1e-30)).argmax(-1)


def decode(engine: Engine, pending: list[int], n: int, n_tokens: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Put the pending tokens into the cache and go on: n new tokens [n], and the logits [n, n_tokens] behind them.

    The last of the new tokens is not in the cache afterwards.
    """
    tokens = torch.tensor(pending, device=engine.device)
    input_pos = torch.arange(len(engine.held), len(engine.held) + len(pending), device=engine.device)
    new, rows = [], []
    for i in range(n):
        logits = engine.step(tokens, input_pos, engine.n_read(len(pending) + i))[-1:, :n_tokens]
        tokens = logits.argmax(-1) if sampling.temperature == 0 else draw(probabilities(logits, n_tokens, sampling))
        tokens = engine.agree(tokens)
        input_pos = input_pos[-1:] + 1
        new.append(tokens)
        rows.append(logits)
    return torch.cat(new), torch.cat(rows)


def accept(guesses: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Guesses [k] drawn from q [k, n], judged by the target's p [k + 1, n]: tokens [k + 1], the number accepted [1].

    Speculative sampling (arXiv 2211.17192): guess x stays with probability p(x) / q(x); in place of the first that does
    not, a token is drawn from max(p - q, 0), and after the last from p: what comes out is distributed as p. Tokens
    after that one mean nothing.
    """
    chosen = guesses[:, None]
    stays = torch.rand(len(guesses), device=p.device) < (p[:-1].gather(1, chosen) / q.gather(1, chosen))[:, 0]
    n = stays.long().cumprod(0).sum(0, keepdim=True)
    rest = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0).index_select(0, n)
    return F.pad(guesses, (0, 1)).index_copy(0, n, draw(rest)), n


def speculate(engine: Engine, pending: list[int], k: int, sampling: Sampling, laps: list) -> tuple[list[int], int]:
    """One step: k guesses of the draft, one look of the target. Up to k + 1 new tokens, and how many were guesses.

    pending is not yet in the draft's cache, nor its last token in the target's. laps collects times (mark) of the two.
    """
    draft, n_tokens = engine.draft, engine.model.args.n_tokens
    n_common = min(n_tokens, draft.model.args.n_tokens)
    laps.append(mark(draft.device))
    guesses, rows = decode(draft, pending, k, n_common, sampling)
    laps += [mark(draft.device), mark(engine.device)]
    guesses = engine.agree(guesses.to(engine.device))
    tokens = torch.cat((torch.tensor(pending[-1:], device=engine.device), guesses))
    input_pos = torch.arange(len(engine.held), len(engine.held) + k + 1, device=engine.device)
    p = probabilities(engine.step(tokens, input_pos, engine.n_read(k + 1)), n_tokens, sampling)
    if sampling.temperature == 0:
        q = F.one_hot(guesses, n_tokens).float()
    else:
        q = F.pad(probabilities(rows, n_common, sampling).to(engine.device), (0, n_tokens - n_common))
    tokens, n = accept(guesses, q, p)
    laps.append(mark(engine.device))
    *tokens, n = engine.agree(torch.cat((tokens, n))).tolist()
    return tokens[: n + 1], n


def mark(device: torch.device):
    """A point of time on a device, which is not waited for."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def cut_at_stop(tokens: list[int], stop_ids) -> list[int]:
    """Tokens up to and with the first stop token."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop_ids), tokens)


@torch.inference_mode()
def generate(
    engine: Engine,
    tokens: list[int],
    images: list[Image.Image],
    max_new_tokens: int,
    stop_ids=frozenset(),
    sampling: Sampling | None = None,
    on_tokens: Callable[[list[int]], None] = lambda tokens: None,
) -> dict:
    """Answer a prompt: ids with one image token an image. The result's names are those of --json.

    on_tokens gets new ids as soon as they are known. The stop token that ends an answer is among the ids.
    Raises ValueError for a prompt that does not fit the model, its context or the cache.
    """
    if not tokens:
        raise ValueError("the prompt is empty")
    sampling, draft, device = sampling or Sampling(), engine.draft, engine.device
    start = time.perf_counter()
    prompt = engine.prompt(tokens, images)
    encoded = now(device)
    n_new = engine.reserve(len(prompt), max_new_tokens, prompt.cross_mask.shape[1])
    n_tokens = engine.model.args.n_tokens
    ids = engine.agree(draw(probabilities(engine.prefill(prompt), n_tokens, sampling))).tolist()
    first = time.perf_counter()
    on_tokens(ids)
    result = {
        "token_ids": ids,
        "prompt_token_ids": prompt.tokens.tolist(),
        "n_visual_tokens": 0 if prompt.visual is None else len(prompt.visual),
        "time_to_first_token_s": first - start,
        "encoder_s": encoded - start,
    }
    if draft:
        draft_prompt = draft.follow(tokens, images, engine.model.args.image_token_id)
        draft.reserve(len(draft_prompt), n_new, draft_prompt.cross_mask.shape[1])
        draft.prefill(draft_prompt)
        result["draft_n_visual_tokens"] = 0 if draft_prompt.visual is None else len(draft_prompt.visual)
        result["draft_time_to_first_token_s"] = now(draft.device) - first
    begin, counts, laps = time.perf_counter(), [0] * (engine.speculate_k + 1), []
    per_read = 1 if device.type == "cpu" else TOKENS_PER_READ
    while ids[-1] not in stop_ids and len(ids) < n_new:
        room, k = n_new - len(ids), 0
        if draft:  # always k guesses, also where fewer would do: another number would have to be compiled anew
            pending = ids[len(draft.held) - len(draft_prompt) :]
            k = min(engine.speculate_k, engine.free_slots - 1, draft.free_slots - len(pending) + 1)
        if k > 0:
            new, n = speculate(engine, pending, k, sampling, laps)
            new = cut_at_stop(new[:room], stop_ids)
            counts[min(n, len(new))] += 1
            draft.held += (pending + new[:-1])[: len(pending) + k - 1]
        else:
            new = decode(engine, ids[-1:], min(per_read, room), n_tokens, sampling)[0].tolist()
            new = cut_at_stop(new, stop_ids)
        engine.held += [ids[-1], *new[:-1]]
        ids += new
        on_tokens(new)
    seconds = time.perf_counter() - begin
    result["finish_reason"] = "stop" if ids[-1] in stop_ids else "length"
    result["tokens_per_s"] = (len(ids) - 1) / seconds if len(ids) > 1 else 0.0
    return result | (speculation_report(counts, laps, seconds) if draft else {})


def speculation_report(counts: list[int], laps: list, seconds: float) -> dict:
    """counts: steps by the number of accepted guesses; laps: four marks a step (draft, draft, target, target)."""
    steps = max(sum(counts), 1)
    accepted = sum(n * count for n, count in enumerate(counts))
    draft = sum(map(seconds_between, laps[::4], laps[1::4]))
    verify = sum(map(seconds_between, laps[2::4], laps[3::4]))
    return {
        "mean_accepted": accepted / steps,
        "accept_counts": counts,
        "draft_s": draft,
        "verify_s": verify,
        "rest_s": seconds - draft - verify,
    }


def load(checkpoint_path: Path, device: str, dtype: torch.dtype, ranks=None) -> tuple[Engine, Tokenizer]:
    """A converted checkpoint, or the part of it that this of several ranks has, and its tokenizer.

    Raises ValueError, one line, if it cannot be used.
    """
    check_device(device)
    folder = checkpoint_path.parent
    try:
        params = json.loads((folder / "params.json").read_text())
        args, tokenizer = ModelArgs(**params["model"]), Tokenizer(folder / "tokenizer.model", params["tokenizer"])
        weights = torch.load(checkpoint_path, mmap=True, weights_only=True, map_location="cpu").items()
        if ranks:
            args, weights = ranks.read(checkpoint_path, args)
        with torch.device("meta"):
            model, encoder = Transformer(args), build_encoder(args.vision) if args.vision else None
        weights = {name: t.to(device, t.dtype if is_quantized(name, t) else dtype) for name, t in weights}
        if quantized := "output.scale" in weights:
            import quantize

            quantize.expect_quantized(model, weights)
        if args.tie_embeddings:
            weights.setdefault("output.weight", weights["embedding.weight"])
        parts = nn.ModuleDict({"vision": encoder} if encoder else {})
        parts.load_state_dict({n: weights.pop(n) for n in list(weights) if n.startswith("vision.")}, assign=True)
        model.load_state_dict(weights, assign=True)
        if quantized:
            weights.clear()  # a layer's are freed as soon as it is packed
            quantize.pack(model, dtype)
    except Exception as error:  # what unpickler, zip reader and load_state_dict raise has no common class
        no_room = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        mend = "it needs more memory" if no_room else "convert it (again) with scripts/convert_hf_checkpoint.py"
        raise ValueError(f"cannot load {checkpoint_path} ({one_line(error)[:200]}): {mend}") from error
    nn.ModuleList(filter(None, (model, encoder))).requires_grad_(False).eval()
    return Engine(model, encoder, step=model), tokenizer


def is_quantized(name: str, tensor: Tensor) -> bool:
    """Part of a quantized layer, and not to be rounded."""
    return tensor.element_size() == 1 or name.endswith((".scale", ".zero"))


def compile_step(engine: Engine) -> None:
    """One graph per number of tokens (1, 2, k + 1); on GPUs replayed as a CUDA graph, one per number of slots too."""
    torch._dynamo.config.recompile_limit = 64  # of all models together
    torch.compiler.config.dynamic_sources = "L['n_slots']"  # of Transformer.forward: one graph serves all
    # On GPUs: tuned, products of one row are kernels of Inductor's own (torch/_inductor/decomposition.py says why).
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    compiled = torch.compile(engine.model, options=options, fullgraph=True, dynamic=False)
    # A CUDA graph writes the next step's output over this one's.
    engine.step = lambda *inputs: compiled(*inputs).clone()


def compile_prefill(engine: Engine) -> None:
    """Lengths and image sizes are dynamic: one graph serves all of them."""
    engine.model.run_layers = torch.compile(engine.model.run_layers, dynamic=True)
    for block in engine.encoder.blocks if engine.encoder else ():
        block.compile(dynamic=True)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads: all but the embedding table, of which it reads a row."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "embedding.weight")


def answer(engine: Engine, tokenizer: Tokenizer, request: dict, args, show, said: list[int] | None = None) -> dict:
    """Answer a request as --requests has them: show() gets the text as it comes, said the ids. Raises ValueError."""
    tokens, parts = tokenizer.encode_request(request)
    for part in parts:  # a conversation comes back with pictures that were read before
        if not isinstance(part.get("image"), Image.Image):
            part["image"] = load_image(part["path"])
    stop_ids = frozenset() if isinstance(request.get("prompt"), int) else tokenizer.stop_ids
    decoder, said = StreamDecoder(tokenizer), [] if said is None else said

    def on_tokens(ids: list[int]) -> None:
        said.extend(ids)
        show(decoder.push(ids))

    max_new_tokens = number(int, 1)(request.get("max_new_tokens", args.max_new_tokens))
    sampling = Sampling(args.temperature, args.top_k)
    result = generate(engine, tokens, [part["image"] for part in parts], max_new_tokens, stop_ids, sampling, on_tokens)
    show(decoder.flush())
    return {"text": tokenizer.decode(said), **result}


def report(result: dict, engine: Engine) -> None:
    gigabytes = weight_bytes(engine.model) * result["tokens_per_s"] / 1e9
    log(
        f"prompt {len(result['prompt_token_ids'])} tokens ({result['n_visual_tokens']} visual), "
        f"time to first token {result['time_to_first_token_s']:.3f} s, {len(result['token_ids'])} new tokens "
        f"({result['finish_reason']}), {result['tokens_per_s']:.1f} tokens/s, {gigabytes:.1f} GB/s"
    )
    if engine.draft:
        log(
            f"draft: {result['draft_n_visual_tokens']} visual tokens, {result['mean_accepted']:.2f} of "
            f"{engine.speculate_k} guesses accepted a step {result['accept_counts']}, seconds: draft "
            f"{result['draft_s']:.3f}, verify {result['verify_s']:.3f}, rest {result['rest_s']:.3f}"
        )


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    print(text, end="", flush=True)


def run_samples(engine: Engine, tokenizer: Tokenizer, request: dict, args) -> None:
    """The text of each sample to stdout, or one JSON line a sample. Nothing of an earlier request is used."""
    for i in range(args.num_samples):
        torch.manual_seed(args.seed + i)
        engine.forget()
        if i and not args.json:
            write("\n")
        result = answer(engine, tokenizer, request, args, (lambda text: None) if args.json else write)
        write(json.dumps(result) + "\n" if args.json else "\n")
        report(result, engine)


def run_requests(engine: Engine, tokenizer: Tokenizer, args) -> int:
    """Answer the lines of a file in turn. A request that fails gives an error line; 2 if there was one."""
    status = 0
    for line in filter(str.strip, args.requests.read_text(encoding="utf-8").split("\n")):
        try:
            run_samples(engine, tokenizer, json.loads(line), args)
        except (ValueError, OSError) as error:
            write(json.dumps({"error": one_line(error)}) + "\n")
            status = 2
    return status


def read_line() -> str:
    """A line of the user's; empty at the end of the input."""
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def chat(engine: Engine, tokenizer: Tokenizer, args) -> None:
    """A conversation on stdin and stdout; the caches keep what was said, of an answer that Ctrl-C stopped too."""
    log("/image PATH adds an image to the next message, /reset forgets, /quit leaves, Ctrl-C stops an answer")
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages, images, said = list(system), [{"type": "image", "path": path} for path in args.image], []
    torch.manual_seed(args.seed)
    while line := args.prompt or read_line():
        args.prompt = None
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                break
            elif command == "/reset":
                messages, images = list(system), []
                engine.forget()
            elif command == "/image":
                images.append({"type": "image", "path": rest.strip(), "image": load_image(rest.strip())})
            elif command:
                content = tokenizer.place_images(line.rstrip("\n"), images)
                asked, said = [*messages, {"role": "user", "content": content}], []
                with contextlib.suppress(KeyboardInterrupt):
                    report(answer(engine, tokenizer, {"messages": asked}, args, write, said), engine)
                write("\n")
                ids = [token for token in said if token not in tokenizer.stop_ids]
                messages = [*asked, {"role": "assistant", "content": [{"type": "tokens", "ids": ids}]}]
                images = []
        except (ValueError, OSError) as error:
            log(one_line(error))


def number(kind: type, least, most=float("inf")) -> Callable:
    """For flags: reads a number of that kind, within these bounds; ValueError for others."""

    def read(text):
        if not least <= kind(text) <= most or kind(text) == float("inf"):
            raise ValueError(f"{text} is not a number from {least} to {most}")
        return kind(text)

    read.__name__ = f"number from {least} to {most}"  # what argparse calls it
    return read


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the flags)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that generate.py and evaluate.py share."""
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, help="a converted model.pth")
    parser.add_argument("--draft_checkpoint_path", type=Path, help="a smaller model of the same tokenizer that guesses")
    parser.add_argument("--speculate_k", type=number(int, 1), default=5, help="guesses of the draft a step")
    parser.add_argument("--mm_prune_method", choices=["random", "structured"], default="structured")
    parser.add_argument("--mm_prune_ratio", type=number(float, 0, 1), default=0.0, help="what the draft does not see")
    parser.add_argument("--draft_device", help="default: --device")
    parser.add_argument("--draft_max_cache_size", type=number(int, 1), help="tokens; default: as many as needed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--compile_prefill", action="store_true", help="compile the encoder and prefill too")
    parser.add_argument("--max_cache_size", type=number(int, 1), help="tokens; default: as many as needed")
    parser.add_argument("--cross_attention_seq_length", type=number(int, 1), help="rows of images; default: as needed")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=200)
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0: always the most likely token")
    parser.add_argument("--top_k", type=number(int, 1), help="sample among the k most likely tokens only")
    parser.add_argument("--seed", type=int, default=1234)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", description="Very low latency generation from text and images.")
    add_model_flags(parser)
    parser.add_argument("--prompt", help="text; a number N: a made-up prompt of N tokens")
    parser.add_argument("--image", action="append", default=[], help="a picture; repeatable; see <image> in the README")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--raw", action="store_true", help="the prompt goes in verbatim, without a chat template")
    parser.add_argument("--interactive", action="store_true", help="a chat with memory")
    parser.add_argument("--num_samples", type=number(int, 1), default=1)
    parser.add_argument("--json", action="store_true", help="one JSON line a sample instead of text")
    parser.add_argument("--requests", type=Path, help="a file of requests, one JSON object a line; implies --json")
    parser.add_argument("--profile", type=Path, help="write a Chrome trace of the run to this file")
    args = parser.parse_args(argv)
    args.json |= args.requests is not None
    if args.prompt is None and not args.interactive and args.requests is None:
        if args.checkpoint_path != DEFAULT_CHECKPOINT and not args.image:
            raise ValueError("nothing to do: give --prompt, --image, --requests or --interactive")
        args.image, args.prompt = args.image or [str(DEFAULT_IMAGE)], DEFAULT_PROMPT
    return args


def check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {one_line(error)[:200]}") from None


def load_engine(args: argparse.Namespace, ranks=None) -> tuple[Engine, Tokenizer]:
    """The model of the flags, with its draft if there is one, compiled if asked."""
    start, dtype = time.perf_counter(), getattr(torch, args.dtype)
    engine, tokenizer = ranks.load(load, args) if ranks else load(args.checkpoint_path, args.device, dtype)
    engine.max_cache_size = args.max_cache_size
    engine.cross_attention_seq_length = args.cross_attention_seq_length
    if args.checkpoint_path == DEFAULT_CHECKPOINT and args.draft_checkpoint_path is None:
        args.draft_checkpoint_path = DEFAULT_DRAFT
    if args.draft_checkpoint_path:
        draft, draft_tokenizer = load(args.draft_checkpoint_path, args.draft_device or args.device, dtype)
        if not tokenizer.agrees_with(draft_tokenizer):
            raise ValueError(f"{args.draft_checkpoint_path} has another tokenizer than {args.checkpoint_path}")
        draft.max_cache_size = args.draft_max_cache_size
        draft.pruning = Pruning(args.mm_prune_method, args.mm_prune_ratio, args.seed)
        engine.draft, engine.speculate_k, draft.speculate_k = draft, args.speculate_k, args.speculate_k
    import cpu

    for each in filter(None, (engine, engine.draft)):
        cpu.prepare(each.model)
        if args.compile:
            compile_step(each)
        if args.compile_prefill:
            compile_prefill(each)
    log(f"loaded {args.checkpoint_path} in {time.perf_counter() - start:.2f} s")
    return engine, tokenizer


def run(args: argparse.Namespace, ranks=None) -> int:
    engine, tokenizer = load_engine(args, ranks)
    write_trace = lambda profiler: profiler.export_chrome_trace(str(args.profile))
    with torch.profiler.profile(on_trace_ready=write_trace) if args.profile else contextlib.nullcontext():
        if args.interactive:
            return chat(engine, tokenizer, args) or 0
        if args.requests:
            return run_requests(engine, tokenizer, args)
        prompt = int(args.prompt) if args.prompt.isdecimal() else args.prompt
        request = {"prompt": prompt, "images": args.image, "raw": args.raw}
        request |= {"system": args.system} if args.system else {}
        return run_samples(engine, tokenizer, request, args) or 0


def main(argv: list[str] | None = None, ranks=None) -> int:
    """0, or 2 for a mistake of the user's: one line on stderr says what is wrong."""
    try:
        return run(parse_args(argv), ranks)
    except (ValueError, OSError) as error:
        log(f"generate.py: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from tp import Ranks

        sys.exit(Ranks("generate.py").run(main))
    sys.exit(main())
