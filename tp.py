"""Tensor parallelism: one model on several devices, a process (rank) for each, started by torchrun.

Knows which rows and columns of which layer a rank holds, where partial results are added up and gathered, how ranks
agree on tokens, and how they end together. Does not know how numbers are quantized, how tokens are drawn, or images:
the vision encoder and the draft run whole on every rank.

Attention is split by query heads, the MLP by its inner width, the output layer by tokens (Megatron-LM, arXiv
1909.08053): two sums of a row a layer, and one exchange at the end. Nothing has to be divisible by the number of ranks.

Shapes: S tokens, D model width, H query heads, G key/value heads, R ranks, W rows of the output layer a rank.
"""

import hashlib
import io
import json
import math
import os
import select
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelArgs, Prompt, Transformer

UNIT = 64  # the MLP's width, or int4's groups of it, and the vocabulary are dealt out in stretches that kernels like
BEAT_S = 1.0  # how often a rank says that it is alive
SILENT_S = 20.0  # after which it is taken for dead
START_S = 25.0  # for all ranks to come
FOREVER = timedelta(days=365)  # of a collective: a user may think for long, and a dead rank is noticed by its silence


# ---- who holds what ------------------------------------------------------------------------------------------------


def share(n: int, rank: int, n_ranks: int) -> range:
    """A rank's part of n things, as even as can be."""
    return range(n * rank // n_ranks, n * (rank + 1) // n_ranks)


def pad_heads(first: int, last: int, group: int) -> tuple[list[int], range]:
    """Query heads first to last - 1 as a rank holds them, and the key/value heads that they look at.

    `group` query heads share a key/value head. Attention wants as many for each: where the first or last key/value head
    serves fewer than the others, -1 stands for a head of zeros, whose output meets columns of zeros in wo.
    """
    kv_heads = range(first // group, (last - 1) // group + 1)
    groups = [[h for h in range(g * group, (g + 1) * group) if first <= h < last] for g in kv_heads]
    width = max(map(len, groups))
    return [head for heads in groups for head in heads + [-1] * (width - len(heads))], kv_heads


def deal_heads(n_head: int, n_kv_head: int, n_ranks: int) -> list[range]:
    """The query heads of each rank: the dealing that makes the largest rank as small as can be.

    A key/value head that serves heads of several ranks is on each of them. Counted as rows of wqkv and columns of wo.
    """
    group = n_head // n_kv_head

    def size(first: int, last: int) -> int:
        queries, kv_heads = pad_heads(first, last, group)
        return len(queries) + len(kv_heads)

    for largest in range(2, n_head + n_kv_head + 1):
        ranges, last = [], 0
        for others in reversed(range(n_ranks)):  # as many as fit, but one at least for each of the others
            first = last
            last = max(end for end in range(first + 1, n_head - others + 1) if size(first, end) <= largest)
            ranges.append(range(first, last))
        if last == n_head:
            return ranges
    raise ValueError(f"{n_ranks} ranks for {n_head} query heads")


def take(tensor: Tensor, dim: int, stretches: list[int], n: int) -> Tensor:
    """Some of n equal stretches of a dimension, in this order, copied; -1 is a stretch of zeros.

    Where tensor has fewer entries than that there (int4's groups), each is repeated until they can be divided.
    """
    size = tensor.shape[dim]
    tensor = tensor.repeat_interleave(math.lcm(size, n) // size, dim) if size % n else tensor
    numbers = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # fp8 knows no indexing
    index = torch.tensor(stretches)
    taken = numbers.unflatten(dim, (n, -1)).index_select(dim, index.clamp(min=0))
    if -1 in stretches:
        taken.movedim(dim, 0)[index < 0] = 0
    return taken.flatten(dim, dim + 1).view(tensor.dtype)


def coarsen(stretches: list[int], n: int) -> tuple[list[int], int]:
    """The same as few long stretches: neighbours stay together, so that no group of int4 is cut without need."""
    if stretches != list(range(stretches[0], stretches[-1] + 1)):
        return stretches, n
    step = math.gcd(stretches[0], len(stretches), n)
    return [i // step for i in stretches[::step]], n // step


def plan(args: ModelArgs, n_groups: int, rank: int, n_ranks: int) -> tuple[ModelArgs, dict[str, tuple], range]:
    """What a rank's own Transformer looks like, and where its weights are: layer -> (dim, stretches, out of how many).

    Last the rows of the output layer; to a rank's model the tokens of the others are unspoken. n_groups: of int4, in a
    row of w2; 1 if there are none.
    """
    n_head, n_kv_head = args.n_head, args.n_kv_head
    heads = deal_heads(n_head, n_kv_head, n_ranks)[rank]
    queries, kv_heads = pad_heads(heads.start, heads.stop, n_head // n_kv_head)
    keys, values = list(kv_heads), [n_kv_head + g for g in kv_heads]
    unit = args.intermediate_size // n_groups if n_groups > 1 else math.gcd(UNIT, args.intermediate_size)
    while args.intermediate_size // unit < n_ranks and unit % 2 == 0:
        unit //= 2
    n_units = args.intermediate_size // unit
    units = list(share(n_units, rank, n_ranks))
    each, rows = rows_each(args, n_ranks), args.vocab_size + args.n_input_only
    own = range(args.vocab_size)[rank * each : (rank + 1) * each]
    layers = {
        "attention.wqkv": (0, queries + [n_head + g for g in keys + values], n_head + 2 * n_kv_head),
        "attention.wq": (0, queries, n_head),
        "attention.wkv": (0, keys + values, 2 * n_kv_head),
        "attention.wo": (1, *coarsen(queries, n_head)),
        "feed_forward.w13": (0, units + [n_units + i for i in units], 2 * n_units),
        "feed_forward.w2": (1, *coarsen(units, n_units)),
    }
    small = dict(n_head=len(queries), n_kv_head=len(kv_heads), intermediate_size=len(units) * unit)
    return replace(args, **small, vocab_size=len(own), n_input_only=rows - len(own)), layers, own


def rows_each(args: ModelArgs, n_ranks: int) -> int:
    """W: rows of the output layer a rank, but for the last, which may have fewer. The same of a rank's own args."""
    unit, rows = UNIT, args.vocab_size + args.n_input_only
    while (each := -(-rows // (n_ranks * unit)) * unit) * (n_ranks - 1) >= args.n_tokens and unit > 1:
        unit //= 2  # a vocabulary so small that nothing would be left for the last
    return each


def read_shard(path: Path, args: ModelArgs, rank: int, n_ranks: int) -> tuple[ModelArgs, Iterator[tuple[str, Tensor]]]:
    """The arguments of a rank's Transformer, and its tensors, one after the other."""
    whole = open_mapped(path)
    groups = whole.get("layers.0.feed_forward.w2.scale", torch.empty(0)).shape[1:]
    small, layers, own = plan(args, *(groups or (1,)), rank, n_ranks)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for layer, names in groupby(whole, lambda name: name.startswith("layers.") and name.split(".")[1]):
            # Columns touch all pages of a layer. They leave this process's memory with the mapping that they are in.
            part = open_mapped(path) if layer else whole
            for name in names:
                yield name, cut(name, part[name])
        if "output.weight" not in whole:
            yield "output.weight", whole["embedding.weight"][own.start : own.stop]

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("output."):
            return tensor[own.start : own.stop]
        if not name.startswith("layers."):
            return tensor  # embedding, norm and the vision encoder: whole, and in the file until they are used
        dim, *stretches = layers.get(".".join(name.split(".")[2:4]), (0, [0], 1))  # others: norms, gates, whole
        return take(tensor, dim, *stretches) if dim < tensor.dim() else tensor.clone()  # scales of rows, of columns

    return small, tensors()


def open_mapped(path: Path) -> dict[str, Tensor]:
    return torch.load(path, mmap=True, weights_only=True, map_location="cpu")


# ---- what ranks say to one another ---------------------------------------------------------------------------------


class Summed(nn.Module):
    """A layer of which each rank has some columns: its results are added up."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        dist.all_reduce(y)
        return y


class Gathered(nn.Module):
    """The output layer, of which each rank has some rows: logits [S, n_tokens] on every rank.

    If nothing but the largest is asked for (greedy), each rank sends its largest alone, and the others are -inf.
    """

    def __init__(self, part: nn.Module, n_tokens: int, each: int, rank: int, n_ranks: int, greedy: bool):
        super().__init__()
        self.part, self.n_tokens, self.each, self.n_ranks, self.greedy = part, n_tokens, each, n_ranks, greedy
        self.first = rank * each
        self.n_own = min(max(0, n_tokens - self.first), each)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.part(x)[:, : self.n_own]  # without padding rows
        logits = F.pad(logits, (0, self.each - self.n_own), value=float("-inf"))  # [S, W]
        if not self.greedy:
            return torch.cat(self.gather(logits), dim=-1)[:, : self.n_tokens]
        value, index = logits.float().max(dim=-1)
        best = self.gather(torch.stack((value, (index + self.first).float()), dim=-1))  # exact below 2^24
        value, index = torch.stack(best, dim=1).unbind(-1)  # [S, R]
        sparse = value.new_full((len(x), self.n_ranks * self.each), float("-inf"))
        return sparse.scatter(1, index.long(), value)[:, : self.n_tokens]

    def gather(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.n_ranks)]
        dist.all_gather(parts, part)
        return parts


def connect(model: Transformer, rank: int, n_ranks: int, greedy: bool) -> None:
    """Make a rank's own model its part of the whole one."""
    for layer in model.layers:
        layer.attention.wo = Summed(layer.attention.wo)
        layer.feed_forward.w2 = Summed(layer.feed_forward.w2)
    each = rows_each(model.args, n_ranks)
    model.output = Gathered(model.output, model.args.n_tokens, each, rank, n_ranks, greedy)


def agree(tokens: Tensor) -> Tensor:
    """Rank 0's tokens on every rank."""
    dist.broadcast(tokens, 0)
    return tokens


class OneProcess:
    """What an engine asks of the ranks that run it; of a single one, nothing. tp.Ranks is the same for several."""

    rank, n_ranks = 0, 1

    def shard(self, args: ModelArgs, state: dict[str, Tensor]) -> tuple[ModelArgs, Iterable[tuple[str, Tensor]]]:
        """The arguments and the tensors of this rank's part of a model."""
        return args, state.items()

    def connect(self, model: Transformer) -> None:
        """Make a loaded part work together with the parts of the other ranks."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank."""
        return tensor

    def check(self, prompt: Prompt) -> None:
        """End the run if another rank was given another prompt."""

    def share(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, on every rank."""
        return value


def join_ranks(args) -> OneProcess:
    """This process among those that torchrun started, or alone. args: the flags, which are the same on all ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return OneProcess()
    return Ranks(args)


# ---- starting and ending together ----------------------------------------------------------------------------------


class Ranks:
    """This process among the others: main(ranks=...) gets it, load() makes its part of a model.

    A thread tells the others through a store (torchrun's) that this process lives, and ends it when another is dead.
    """

    def __init__(self, program: str):
        self.program, self.ended, self.n_shared = program, False, 0
        self.rank, self.n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.store = self.watch_store = None
        self.stderr = os.dup(2)
        if self.rank:  # only rank 0 prints; what another says last is kept, should it have to be told
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            sys.stderr = LastLine()
        sys.stdin = SharedInput(sys.stdin, self)

    def meet(self) -> None:
        """Find the others. Raises ValueError, one line, if there is no way to."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        start = timedelta(seconds=START_S)
        late = threading.Timer(START_S, self.fail, [f"rank {self.rank} cannot reach {host}:{port}", 2])
        late.start()  # who answers there may be somebody else, and say nothing
        try:
            serve = self.rank == 0 and not torchrun
            self.store = dist.TCPStore(host, port, self.n_ranks, serve, start, wait_for_workers=False)
            self.store.set_timeout(FOREVER)
            # Another connection, on which nothing waits.
            self.watch_store = dist.TCPStore(host, port, self.n_ranks, False, start, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:  # RuntimeError: torch.distributed's own
            raise ValueError(f"rank {self.rank} cannot use {host}:{port} ({first_line(error)})") from None
        late.cancel()
        if self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)  # what "cuda" stands for from here on
        pipe, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the thread acts: this one may be waiting for another rank
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        self.count("beat")  # the first at once: who falls silent now has started
        self.watcher = threading.Thread(target=self.watch, args=(pipe,), daemon=True)
        self.watcher.start()

    def watch(self, pipe: int) -> None:
        """To the end: beat, and see that the others do."""
        start = time.monotonic()
        beats, looked = {rank: (0, start + START_S) for rank in range(self.n_ranks) if rank != self.rank}, start
        while True:
            if select.select([pipe], [], [], BEAT_S)[0]:
                number = os.read(pipe, 1)[0]
                if number == 0:  # from end()
                    return
                if number == signal.SIGINT:
                    os._exit(130)
                self.fail("ended from outside, perhaps because another rank has died")
            try:
                self.count("beat")
                if self.count("failed", add=0):
                    os._exit(1)
                now = time.monotonic()
                slept, looked = now - looked > SILENT_S / 2, now  # so may the others have, with the whole machine
                for rank, (beat, until) in beats.items():
                    new = self.count("beat", rank, add=0)
                    if new != beat or slept:
                        beats[rank] = new, now + SILENT_S
                    elif now > until and not self.count("ended", rank, add=0):
                        self.fail(f"rank {rank} {'does not answer' if new else 'has not started'}")
            except RuntimeError:
                if self.ended:
                    return
                self.fail("rank 0 is gone")

    def count(self, what: str, rank: int | None = None, add: int = 1) -> int:
        key = what if what == "failed" else f"{what} {self.rank if rank is None else rank}"
        return self.watch_store.add(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {key}", add)

    def fail(self, line: str, status: int = 1) -> None:
        """End this process, and with it all others. The first to fail says why: stderr gets one line."""
        try:
            first = self.count("failed") == 1 if self.watch_store else True
        except RuntimeError:  # without torchrun it is rank 0 that serves the store
            first = self.rank == 1
        if first and not self.ended:
            os.write(self.stderr, f"{self.program}: {line}\n".encode())
        if self.rank == 0:
            time.sleep(2 * BEAT_S)  # the others see it in the store that this rank may be serving
        os._exit(status)

    def run(self, main: Callable) -> int:
        """What the process exits with: main's status, or 1 after a fault."""
        try:
            self.meet()
            status = main(ranks=self)
        except SystemExit as done:  # --help
            status = done.code or 0
        except ValueError as error:
            self.fail(str(error), 2)
        except BaseException as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                time.sleep(2 * BEAT_S)  # another rank broke off: if it still can, it says why
                self.fail(f"another rank is gone ({first_line(error)})")
            self.fail(f"rank {self.rank} failed: {type(error).__name__}: {first_line(error)}")
        return self.end(status)

    def end(self, status: int) -> int:
        """A mistake that all ranks have found is told by rank 0 alone, one that others have not by its rank."""
        self.count("ended")
        self.ended = not status
        deadline = time.monotonic() + (2 * BEAT_S if status else START_S)
        others = range(1, self.n_ranks) if self.rank == 0 else [0] if status else []
        while not (together := all(self.count("ended", rank, add=0) for rank in others)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if not together and self.rank == 0:  # it has told already
            self.count("failed")
            time.sleep(2 * BEAT_S)
        elif not together:
            self.fail(f"rank {self.rank}: {sys.stderr.line.removeprefix(self.program + ': ')}", status)
        self.ended = True
        os.write(self.wakeup, b"\0")
        self.watcher.join()  # a thread that is in the middle of a call when the interpreter ends is an abort
        if dist.is_initialized():
            dist.destroy_process_group()
        return status

    def share(self, value):
        """Rank 0's value, which JSON can hold, on every rank."""
        self.n_shared += 1
        key = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} shared {self.n_shared}"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        return json.loads(self.store.get(key))

    def load(self, load: Callable, args) -> tuple:
        """What generate.load says, of a model of which this rank has its part. Raises ValueError if that cannot be."""
        self.check_heads(args.checkpoint_path)
        self.compare(args)
        self.join(torch.device(args.device))
        if self.rank:
            args.profile = None  # a file for one
        engine, tokenizer = load(args.checkpoint_path, args.device, getattr(torch, args.dtype), self)
        connect(engine.model, self.rank, self.n_ranks, greedy=args.temperature == 0)
        engine.agree, prompt = agree, engine.prompt
        engine.prompt = lambda *request: self.check_request(prompt(*request))
        return engine, tokenizer

    def read(self, path: Path, args: ModelArgs) -> tuple[ModelArgs, Iterator[tuple[str, Tensor]]]:
        return read_shard(path, args, self.rank, self.n_ranks)

    def check_heads(self, path: Path) -> None:
        try:
            n_head = json.loads(path.with_name("params.json").read_text())["model"]["n_head"]
        except (OSError, ValueError, LookupError, TypeError):
            return  # loading says what is wrong
        if self.n_ranks > n_head:
            raise ValueError(f"{self.n_ranks} ranks, but {path} has {n_head} query heads: start at most as many")

    def check_request(self, prompt: Prompt) -> Prompt:
        """A rank that could not read its copy of a picture, and went on, would wait forever for the others."""
        mine = zlib.crc32(str(prompt.key).encode())
        if int(agree(torch.tensor([mine], device=prompt.tokens.device))) != mine:
            self.fail(f"rank {self.rank} was asked something else than rank 0")
        return prompt

    def compare(self, args) -> None:
        """Raises ValueError where a rank was given other flags or other files than rank 0."""
        flags = {name: str(value) for name, value in vars(args).items() if name not in ("output", "profile")}
        paths = [path for path in (args.checkpoint_path, args.draft_checkpoint_path) if path]
        mine = flags | {str(path): fingerprint(path) for path in paths}
        for name, value in self.share(mine).items():
            if mine[name] != value:
                what = name if name in map(str, paths) else f"--{name}"
                raise ValueError(f"{what} is not the same here as on rank 0")

    def join(self, device: torch.device) -> None:
        """The process group. Raises ValueError for a rank without a device."""
        if dist.is_initialized():
            return
        backend, group = ("gloo", None) if device.type == "cpu" else ("nccl", device)
        if device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"--device {device}: say cuda, each rank takes the GPU of its own number")
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"no GPU for rank {self.rank}, there are {torch.cuda.device_count()}: start fewer ranks"
                )
            group = torch.device("cuda", self.local_rank)
        prefix = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), self.store)
        stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # PyTorch 2.8's gloo greets on stdout, where nothing but text may go
        try:
            dist.init_process_group(
                backend, store=prefix, rank=self.rank, world_size=self.n_ranks, timeout=FOREVER, device_id=group
            )
        except RuntimeError as error:
            raise ValueError(f"rank {self.rank} cannot reach the others ({first_line(error)})") from None
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            os.close(nowhere)


class LastLine(io.TextIOBase):
    """A stderr that keeps the last line alone."""

    line = ""

    def write(self, text: str) -> int:
        self.line = next((line for line in reversed(text.splitlines()) if line.strip()), self.line)
        return len(text)


class SharedInput:
    """A stdin of which rank 0 reads a line and all ranks get it."""

    def __init__(self, stdin, ranks: Ranks):
        self.stdin, self.ranks = stdin, ranks

    def readline(self) -> str:
        return self.ranks.share(self.stdin.readline() if self.ranks.rank == 0 else None)


def fingerprint(path: Path) -> str:
    """Of a checkpoint: its size and 64 places in it, its params.json and tokenizer.model."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for i in range(65):
                file.seek(max(0, size - 4096) * i // 64)
                digest.update(file.read(4096))
        for name in ("params.json", "tokenizer.model"):
            digest.update(path.with_name(name).read_bytes())
    except OSError:
        return "missing"  # loading it says so
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:120]
