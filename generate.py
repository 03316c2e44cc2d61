"""The program: load a converted checkpoint, prefill, decode, print.

Knows sampling, the decode loop, speculation, loading and the command line. Does not know model families: a request
becomes ids (tokenizer), ids and images become a Prompt (vision), a Prompt becomes text here.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cli
from cli import log, one_line, write

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoint
import cpu
import gpu
import quantize
from images import load_image, resize_as_asked
from model import CachedTokens, Prompt, Transformer
from tokenizer import StreamDecoder, Tokenizer
from tp import OneProcess, join_ranks
from vision import Encoder, Pruning, build_encoder, build_prompt

DEFAULT_IMAGE = cli.ROOT / "checkpoints/scenes/four-bars.png"
DEFAULT_PROMPT = "Describe the image."
CACHE_BUCKET = 512  # slots: cache sizes are multiples of it, so that similar prompts share a compiled step
CROSS_BUCKET = 6656  # visual tokens: one image of Llama-3.2-Vision has up to 6404
TOKENS_PER_READ = 8  # an accelerator runs this many steps ahead before the host looks for a stop token


@dataclass
class Sampling:
    temperature: float = 0.0  # 0: the most likely token
    top_k: int | None = None


@dataclass
class Engine:
    """A loaded model, with its encoder, its KV cache, and the draft that was loaded for it."""

    model: Transformer
    encoder: Encoder | None = None
    max_cache_size: int | None = None  # slots; None: as many as the prompts need
    cross_attention_seq_length: int | None = None  # image features under cross-attention; None: likewise
    draft: "Draft | None" = None
    ranks: OneProcess = field(default_factory=OneProcess)
    greedy: gpu.GreedyDecoder | None = None  # what decodes at temperature 0, if not the loop of decode()
    encoded: dict = field(default_factory=dict)  # image features that are kept for the next prompt
    check_file: Callable[[], None] = lambda: None  # raises ValueError once the file of mapped weights was written to

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def cached(self) -> CachedTokens:
        return self.model.cached

    def cache_length(self, n: int) -> int:
        """The KV-cache length that a step on n more tokens reads."""
        return min(round_up(self.cached.position + n, 64), self.cached.n_slots)

    def build_prompt(self, tokens: list[int], images: list[Image.Image], pruning: Pruning | None = None) -> Prompt:
        args = self.model.args
        if unknown := [token for token in tokens if not 0 <= token < args.vocab_size + args.n_input_only]:
            raise ValueError(f"the prompt has the token {unknown[0]}, which the model does not know")
        return build_prompt(tokens, images, self.encoder, args.image_token_id, self.device, self.encoded, pruning)

    def reserve(self, prompt: Prompt, max_new_tokens: int, speculate_k: int = 0) -> int:
        """Make room in the caches; return how many of max_new_tokens fit. Raises ValueError if the prompt does not."""
        context, n_cross = self.model.args.max_seq_len, prompt.cross_mask.shape[1]
        limit = min(self.max_cache_size or context, context)
        if len(prompt) > limit:
            what = "context" if limit == context else "cache (--max_cache_size, --draft_max_cache_size)"
            raise ValueError(f"the prompt has {len(prompt)} tokens, the {what} holds {limit}")
        n_new = min(max_new_tokens, limit - len(prompt) + 1)  # the last token is never put into the cache
        cross_size = n_cross and (self.cross_attention_seq_length or round_up(n_cross, CROSS_BUCKET))
        if n_cross > cross_size:
            raise ValueError(f"the images have {n_cross} visual tokens, --cross_attention_seq_length is {cross_size}")
        n_slots, n_now = min(len(prompt) + n_new - 1 + speculate_k, limit), self.cached.n_slots
        if n_slots > n_now:  # doubled, so that a growing conversation seldom has to be prefilled again
            n_slots = self.max_cache_size or max(round_up(n_slots, CACHE_BUCKET), 2 * n_now, gpu.first_size(self.model))
        if n_slots > n_now or n_cross > self.model.n_cross:
            self.setup_caches(max(n_slots, n_now), max(cross_size, self.model.n_cross))
        return n_new

    def setup_caches(self, n_slots: int, n_cross: int) -> None:
        """The model's; ValueError if they do not fit into memory, unless other ranks wait, who have to learn of it."""
        out_of_memory = RuntimeError if self.device.type == "cpu" else torch.OutOfMemoryError  # CPUs have no own class
        try:
            self.model.setup_caches(n_slots, n_cross)
        except (out_of_memory, MemoryError) as error:
            if self.ranks.n_ranks > 1:
                raise
            what = f"caches for {n_slots} tokens do not fit into memory: give a smaller --max_cache_size"
            raise ValueError(f"{what} ({one_line(error)})") from error
        gpu.report_caches(self.model, log)

    def forget(self) -> None:
        """The next prompt starts afresh, as in a new process."""
        self.cached.fill([])
        self.encoded = {}
        if self.draft:
            self.draft.engine.forget()

    def prefill(self, prompt: Prompt) -> Tensor:
        """Logits [1, V] after the prompt. Of a conversation only what is not cached yet is computed."""
        n = self.cached.reusable_prefix(prompt.keys)
        self.cached.fill([])  # should this be interrupted
        if n:
            input_pos = torch.arange(n, len(prompt), device=self.device)
            # Not model(...): what --compile made of it is for steps of few tokens, and fixed to their number.
            logits = self.model.forward(prompt.tokens[n:], input_pos, len(prompt))[-1:]
        else:
            logits = self.model.prefill(prompt)
        self.cached.fill(prompt.keys)
        return logits


class Draft(NamedTuple):
    """Who proposes tokens for a target to verify, and how."""

    engine: Engine
    pruning: Pruning | None = None  # of its visual tokens
    speculate_k: int = 5  # tokens that it proposes in a step

    def translate(self, tokens: list[int], images: list[Image.Image], image_id: int | None) -> Prompt:
        """The prompt of a target whose image token is image_id, as the draft reads it; a text model gets the text."""
        own_id = self.engine.model.args.image_token_id  # another special token there, perhaps: then any text will do
        if self.engine.encoder is None or own_id is None:
            return self.engine.build_prompt([token for token in tokens if token != image_id], [])
        swapped = {own_id: 0, image_id: own_id}
        return self.engine.build_prompt([swapped.get(token, token) for token in tokens], images, self.pruning)

    def prefill(self, tokens: list[int], images: list[Image.Image], target: Engine, n_new: int) -> dict:
        """Fill the draft's cache; what --json says of it."""
        start = gpu.now(self.engine.device)
        prompt = self.translate(tokens, images, target.model.args.image_token_id)
        self.engine.reserve(prompt, n_new, self.speculate_k)
        self.engine.prefill(prompt)
        seconds = gpu.now(self.engine.device) - start
        return {"draft_n_visual_tokens": n_visual(prompt), "draft_time_to_first_token_s": seconds}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def n_visual(prompt: Prompt) -> int:
    return 0 if prompt.visual is None else len(prompt.visual)


def probabilities(logits: Tensor, n_tokens: int, sampling: Sampling) -> Tensor:
    """[S, n_tokens] from logits [S, V]: the vocabulary's padding excluded; one-hot at temperature 0."""
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
    """Forward the pending ids and generate n more, one at a time, among the first n_tokens of the vocabulary.

    Returns the ids [n] and, if they were sampled, the probabilities [n, n_tokens] of each draw; else [0, n_tokens].
    """
    generated, drawn_from = [], [torch.empty(0, n_tokens, device=engine.device)]
    if engine.greedy and sampling.temperature == 0:
        first = engine.cached.write(len(pending) + n - 1)
        return engine.greedy.decode(pending, first, n, n_tokens), drawn_from[0]
    tokens = torch.tensor(pending, device=engine.device)
    for _ in range(n):
        length, first = engine.cache_length(len(tokens)), engine.cached.write(len(tokens))
        input_pos = torch.arange(first, first + len(tokens), device=engine.device)
        logits = engine.model(tokens, input_pos, length)[-1:, :n_tokens]
        if sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            drawn_from.append(probabilities(logits, n_tokens, sampling))
            tokens = draw(drawn_from[-1])
        tokens = engine.ranks.broadcast(tokens)
        generated.append(tokens)
    return torch.cat(generated), torch.cat(drawn_from)


def verify(engine: Engine, tokens: Tensor, n_tokens: int) -> Tensor:
    """The target's logits [k + 1, n_tokens] after the last id and after each of the proposed: tokens [k + 1]."""
    length, first = engine.cache_length(len(tokens)), engine.cached.write(len(tokens))
    input_pos = torch.arange(first, first + len(tokens), device=engine.device)
    return engine.model(tokens, input_pos, length)[:, :n_tokens]


def accept(proposed: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the ids [k] that the draft drew from q [k, n] stay, by the target's p [k + 1, n].

    Speculative sampling (arXiv 2211.17192): id x stays with probability p(x) / q(x); in place of the first that does
    not, one is drawn from max(p - q, 0), and after the last from p, so that the result is distributed as p. Returns
    ids [k + 1] and the number m [1] of those that stay: the first m + 1 ids count.
    """
    chosen = proposed[:, None]
    stays = torch.rand(len(proposed), device=p.device) < (p[:-1].gather(1, chosen) / q.gather(1, chosen))[:, 0]
    n = stays.long().cumprod(0).sum(0, keepdim=True)
    rest = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0).index_select(0, n)
    return F.pad(proposed, (0, 1)).index_copy(0, n, draw(rest)), n


class Speculated(NamedTuple):
    """One step with a draft."""

    ids: list[int]  # the accepted ones and one more
    n_accepted: int
    marks: tuple  # of time: the draft's start and end, the verification's start and end


def speculate(engine: Engine, draft: Engine, ids: list[int], k: int, sampling: Sampling) -> Speculated:
    """The draft proposes k ids, the target verifies them in one forward pass. ids are all that was generated."""
    n_tokens = engine.model.args.n_tokens
    n_common = min(n_tokens, draft.model.args.n_tokens)
    last = torch.tensor(ids[-1:], device=engine.device)  # now: a copy from the host waits for what a GPU has to do
    start = gpu.mark(draft.device)
    proposed, q = decode(draft, draft.cached.pending(ids), k, n_common, sampling)
    middle = gpu.mark(draft.device), gpu.mark(engine.device)
    proposed = engine.ranks.broadcast(proposed.to(engine.device))
    logits = verify(engine, torch.cat((last, proposed)), n_tokens)
    if sampling.temperature == 0:  # what accept() would do with probabilities of 0 and 1
        tokens = logits.argmax(-1)
        n = (proposed == tokens[:-1]).long().cumprod(0).sum(0, keepdim=True)
    else:
        q = F.pad(q.to(engine.device), (0, n_tokens - n_common))
        tokens, n = accept(proposed, q, probabilities(logits, n_tokens, sampling))
    end = gpu.mark(engine.device)
    *accepted, n_accepted = engine.ranks.broadcast(torch.cat((tokens, n))).tolist()
    return Speculated(accepted[: n_accepted + 1], n_accepted, (start, *middle, end))


def cut_at_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """Tokens up to and with the first stop token."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop_ids), tokens)


def room_to_speculate(engine: Engine, draft: Draft | None, ids: list[int]) -> int:
    """How many tokens the draft may propose now: speculate_k, or what the caches hold; 0 without a draft.

    Never fewer because the answer ends sooner: another number would have to be compiled anew.
    """
    if draft is None:
        return 0
    cached = draft.engine.cached
    return min(draft.speculate_k, engine.cached.free_slots - 1, cached.free_slots - len(cached.pending(ids)) + 1)


@torch.inference_mode()
def generate(
    engine: Engine,
    tokens: list[int],
    images: list[Image.Image],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    draft: Draft | None = None,
    on_tokens: Callable[[list[int]], None] = lambda ids: None,
) -> dict:
    """Answer a prompt: ids with one image token an image. The result has the names of --json.

    on_tokens gets new ids as soon as they are known. The stop token that ends an answer is among the ids.
    Raises ValueError for a prompt that does not fit the model, its context or the cache.
    """
    if not tokens:
        raise ValueError("the prompt is empty")
    sampling, start = sampling or Sampling(), time.perf_counter()
    prompt = engine.build_prompt(tokens, images)
    engine.ranks.check(prompt)
    encoded = gpu.now(engine.device)
    n_new = engine.reserve(prompt, max_new_tokens, draft.speculate_k if draft else 0)
    first = draw(probabilities(engine.prefill(prompt), engine.model.args.n_tokens, sampling))
    ids = engine.ranks.broadcast(first).tolist()
    result = {
        "token_ids": ids,
        "prompt_token_ids": prompt.tokens.tolist(),
        "n_visual_tokens": n_visual(prompt),
        "time_to_first_token_s": time.perf_counter() - start,
        "encoder_s": encoded - start,
    }
    on_tokens(ids)
    if draft:
        result |= draft.prefill(tokens, images, engine, n_new)
    start, steps = time.perf_counter(), []
    while ids[-1] not in stop_ids and len(ids) < n_new:
        new, step = next_tokens(engine, draft, ids, n_new - len(ids), sampling)
        new = cut_at_stop(new, stop_ids)
        steps += [(min(step.n_accepted, len(new)), step.marks)] if step else []
        ids += new
        for each in (engine, draft.engine) if draft else (engine,):
            each.cached.commit(ids)
        on_tokens(new)
    seconds = time.perf_counter() - start
    engine.check_file()
    result["finish_reason"] = "stop" if ids[-1] in stop_ids else "length"
    result["tokens_per_s"] = (len(ids) - 1) / seconds if len(ids) > 1 else 0.0
    return result | (report_speculation(steps, draft.speculate_k, seconds) if draft else {})


def next_tokens(
    engine: Engine, draft: Draft | None, ids: list[int], n: int, sampling: Sampling
) -> tuple[list[int], Speculated | None]:
    """The next ids after those that were generated, at least one and at most n, and the step with the draft."""
    if draft and (k := room_to_speculate(engine, draft, ids)) > 0:
        step = speculate(engine, draft.engine, ids, k, sampling)
        return step.ids[:n], step
    n = min(n, 1 if engine.device.type == "cpu" else TOKENS_PER_READ)
    return decode(engine, ids[-1:], n, engine.model.args.n_tokens, sampling)[0].tolist(), None


def report_speculation(steps: list[tuple[int, tuple]], k: int, seconds: float) -> dict:
    """steps: the number of accepted tokens and the marks of each; seconds: of all decoding."""
    counts = [0] * (k + 1)
    for n_accepted, _ in steps:
        counts[n_accepted] += 1
    draft = sum(gpu.seconds_between(*marks[:2]) for _, marks in steps)
    verify = sum(gpu.seconds_between(*marks[2:]) for _, marks in steps)
    return {
        "mean_accepted": sum(n for n, _ in steps) / max(len(steps), 1),
        "accept_counts": counts,
        "draft_s": draft,
        "verify_s": verify,
        "rest_s": seconds - draft - verify,
    }


def load(
    checkpoint_path: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    draft: Path | None = None,
    draft_device: str | None = None,
    pruning: Pruning | None = None,
    speculate_k: int = 5,
    compile: bool = False,
    compile_prefill: bool = False,
    max_cache_size: int | None = None,
    draft_max_cache_size: int | None = None,
    cross_attention_seq_length: int | None = None,
    optimize: bool = True,
    ranks: OneProcess | None = None,
) -> tuple[Engine, Tokenizer]:
    """A converted checkpoint and its tokenizer, ready to answer; with a draft, engine.draft is one to pass along.

    pruning: of the draft's visual tokens. optimize: replace layers by the device's own (cpu.py, gpu.py); without, the
    plain PyTorch modules stay, whose float32 is bit-exact. ranks: the processes that each load a part of the model.
    Raises ValueError, one line, for a device or a file that cannot be used.
    """
    start = time.perf_counter()
    engine, tokenizer, loaded = load_one(Path(checkpoint_path), device, dtype, optimize, ranks or OneProcess())
    engine.max_cache_size, engine.cross_attention_seq_length = max_cache_size, cross_attention_seq_length
    if draft:
        small, own, line = load_one(Path(draft), draft_device or device, dtype, optimize, OneProcess())
        if not tokenizer.agrees_with(own):
            raise ValueError(f"{draft} has another tokenizer than {checkpoint_path}")
        small.max_cache_size, engine.draft = draft_max_cache_size, Draft(small, pruning, speculate_k)
        loaded += f"; draft {line}"
    for each in (engine, engine.draft.engine) if engine.draft else (engine,):
        if compile:
            compile_steps(each)
        if compile_prefill:
            compile_layers(each)
    log(f"loaded {loaded} in {time.perf_counter() - start:.2f} s")
    return engine, tokenizer


def load_one(
    path: Path, device: str, dtype: torch.dtype, optimize: bool, ranks: OneProcess
) -> tuple[Engine, Tokenizer, str]:
    """One model, or this rank's part of it, its tokenizer, and a line that says what was loaded."""
    cli.check_device(device)
    state = checkpoint.load_mapped(path)
    args, settings = checkpoint.read_params(path)
    tokenizer = Tokenizer(path.with_name("tokenizer.model"), settings)
    args, tensors = ranks.shard(args, state, path)
    with torch.device("meta"):
        model, encoder = Transformer(args), build_encoder(args.vision) if args.vision else None
    quantize.load_weights(path, model, encoder, tensors, device, dtype)
    counts = quantize.pack(model, dtype)
    ranks.connect(model)
    if optimize:
        for part in filter(None, (model, encoder)):
            counts |= (cpu if torch.device(device).type == "cpu" else gpu).prepare(part)
    nn.ModuleList(filter(None, (model, encoder))).requires_grad_(False).eval()
    served = [quantize.describe(counts, dtype), cpu.describe() if torch.device(device).type == "cpu" else device]
    engine = Engine(model, encoder, ranks=ranks, check_file=checkpoint.watch(path))
    return engine, tokenizer, f"{path} ({'; '.join(filter(None, served))})"


def compile_steps(engine: Engine) -> None:
    """One graph per number of tokens (1, 2, k + 1), whatever the KV-cache length; on GPUs replayed as a CUDA graph.

    A CUDA graph's output is overwritten by its next replay: decode and verify keep nothing but what they make of it.
    """
    torch._dynamo.config.recompile_limit = 64  # of all models together
    torch.compiler.config.dynamic_sources = "L['n_slots']"  # of Transformer.forward: one graph serves all lengths
    options = None if engine.device.type == "cpu" else gpu.STEP_OPTIONS
    engine.model.compile(options=options, fullgraph=True, dynamic=False)
    if engine.device.type != "cpu" and type(engine.ranks) is OneProcess:  # ranks have to agree on each token
        engine.greedy = gpu.GreedyDecoder(engine.model)


def compile_layers(engine: Engine) -> None:
    """For prefill and the encoder. Lengths and image sizes are dynamic: one graph serves all of them."""
    for layer in [*engine.model.layers, *(engine.encoder.blocks if engine.encoder else ())]:
        layer.compile(dynamic=True)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads: all but the embedding table, of which it reads a row."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "embedding.weight")


def open_image(part: dict) -> Image.Image:
    """The image of a request's part; a conversation comes back with images that were read before."""
    return part["image"] if isinstance(part.get("image"), Image.Image) else load_image(part["path"])


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    request: dict,
    *,
    max_new_tokens: int = cli.MAX_NEW_TOKENS,
    sampling: Sampling | None = None,
    draft: Draft | None = None,
    show: Callable[[str, list[int]], None] = lambda text, ids: None,
) -> dict:
    """Answer a request of the form that --requests reads: what --json prints. Raises ValueError for a bad one.

    show gets each piece of the answer as it comes: text, which may lag behind by a character, and ids.
    """
    tokens, parts = tokenizer.encode_request(request)
    images = [resize_as_asked(open_image(part), part, engine.encoder) for part in parts]
    stop_ids = frozenset() if isinstance(request.get("prompt"), int) else tokenizer.stop_ids
    decoder = StreamDecoder(tokenizer)
    n_new = cli.number(int, 1)(request.get("max_new_tokens", max_new_tokens))
    on_tokens = lambda ids: show(decoder.push(ids), ids)
    result = generate(engine, tokens, images, n_new, stop_ids, sampling, draft, on_tokens)
    show(decoder.flush(), [])
    return {"text": tokenizer.decode(result["token_ids"]), **result}


def reply_message(tokenizer: Tokenizer, ids: list[int]) -> dict:
    """A generated answer as a message, by its own ids: the next turn's prompt then begins with what is cached."""
    kept = [token for token in ids if token not in tokenizer.stop_ids]
    return {"role": "assistant", "content": [{"type": "tokens", "ids": kept}]}


def report(result: dict, engine: Engine, draft: Draft | None) -> None:
    gigabytes = weight_bytes(engine.model) * result["tokens_per_s"] / 1e9
    log(
        f"prompt {len(result['prompt_token_ids'])} tokens ({result['n_visual_tokens']} visual), "
        f"time to first token {result['time_to_first_token_s']:.3f} s, {len(result['token_ids'])} new tokens "
        f"({result['finish_reason']}), {result['tokens_per_s']:.1f} tokens/s, {gigabytes:.1f} GB/s",
        dim=True,
    )
    if draft:
        log(
            f"draft: {result['draft_n_visual_tokens']} visual tokens, {result['mean_accepted']:.2f} of "
            f"{draft.speculate_k} draft tokens accepted a step {result['accept_counts']}, seconds: draft "
            f"{result['draft_s']:.3f}, verify {result['verify_s']:.3f}, rest {result['rest_s']:.3f}",
            dim=True,
        )


def run_samples(engine: Engine, tokenizer: Tokenizer, request: dict, args: argparse.Namespace) -> None:
    """The text of each sample to stdout, or one JSON line a sample. Nothing of an earlier request is used."""
    show = (lambda text, ids: None) if args.json else (lambda text, ids: write(text))
    for i in range(args.num_samples):
        torch.manual_seed(args.seed + i)
        engine.forget()
        if i and not args.json:
            write("\n")
        result = answer(engine, tokenizer, request, show=show, draft=engine.draft, **answer_options(args))
        write(json.dumps(result) + "\n" if args.json else "\n")
        report(result, engine, engine.draft)


def report_gain(engine: Engine, tokenizer: Tokenizer, request: dict, args: argparse.Namespace) -> None:
    """One line: decoding with the draft and without. Both once more, as the first answer of a process is slower."""
    speeds = []
    for draft in (engine.draft, None):
        engine.forget()
        speeds += [answer(engine, tokenizer, request, draft=draft, **answer_options(args))["tokens_per_s"]]
    with_draft, alone = speeds
    gain = f"{with_draft / alone:.2f} x" if alone else "an answer of one token"
    log(f"again: {with_draft:.0f} tokens/s with the draft, {alone:.0f} without it: {gain}", dim=True)


def run_requests(engine: Engine, tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    """Answer the lines of a file in turn. A request that fails gives an error line; 2 if there was one."""
    status = 0
    for line in filter(str.strip, args.requests.read_text(encoding="utf-8-sig").split("\n")):
        try:
            run_samples(engine, tokenizer, json.loads(line), args)
        except (ValueError, OSError, RecursionError) as error:
            write(json.dumps({"error": one_line(error)}) + "\n")
            status = 2
    return status


def answer_options(args: argparse.Namespace) -> dict:
    """The flags as arguments of answer()."""
    return {"max_new_tokens": args.max_new_tokens, "sampling": Sampling(args.temperature, args.top_k)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="generate.py", description="Very low latency generation from text and images.")
    cli.add_model_flags(parser)
    cli.add_generate_flags(parser)
    args = parser.parse_args(argv)
    args.json |= args.requests is not None
    cli.complete_model_flags(args)
    args.is_tour = False
    if args.prompt is None and not args.interactive and args.requests is None:
        if args.checkpoint_path != cli.DEFAULT_CHECKPOINT and not args.image:
            raise ValueError("nothing to do: give --prompt, --image, --requests or --interactive")
        args.is_tour = not args.image
        args.image, args.prompt = args.image or [str(DEFAULT_IMAGE)], DEFAULT_PROMPT
    return args


def run(args: argparse.Namespace) -> int:
    write_trace = lambda profiler: profiler.export_chrome_trace(str(args.profile))
    with join_ranks(args) as ranks:
        engine, tokenizer = load(args.checkpoint_path, ranks=ranks, **cli.load_options(args))
        traced = args.profile and ranks.rank == 0
        with torch.profiler.profile(on_trace_ready=write_trace) if traced else contextlib.nullcontext():
            return answer_flags(engine, tokenizer, args)


def answer_flags(engine: Engine, tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    """What the flags ask for: a chat, a file of requests, or one request."""
    if args.interactive:
        from chat import Chat

        return Chat(engine, tokenizer, args).run()
    if args.requests:
        return run_requests(engine, tokenizer, args)
    prompt = int(args.prompt) if args.prompt.isdecimal() else args.prompt
    request = {"prompt": prompt, "images": args.image, "raw": args.raw}
    request |= {"system": args.system} if args.system else {}
    run_samples(engine, tokenizer, request, args)
    if args.is_tour:
        report_gain(engine, tokenizer, request, args)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run_command("generate.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
