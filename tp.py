"""Tensor parallelism: one model on several devices, a process (rank) for each, started by torchrun.

Knows which rows and columns of which layer a rank has, which results are added up and gathered, how ranks agree on
tokens, and how they start and end together. Does not know how a quantized tensor is cut (quantize.py does), how tokens
are drawn, or images: every rank has the whole vision encoder and the whole draft.

Attention is sharded by query heads, the MLP by its intermediate width, the output layer by tokens (Megatron-LM, arXiv
1909.08053): two all-reduces of a row per layer, and one gather at the end. Nothing has to be divisible by the number of
ranks.

A collective, and whatever else ranks do together, takes LIMIT_S at most: an unresponsive rank ends all others then. A
rank that dies ends them at once: its connections break, and torchrun stops the others. Waiting for a user is no
collective, and has no limit.

Shapes: S tokens, D model width, H query heads, G key/value heads, R ranks, W rows of the output layer per rank.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import first_line, load_mapped
from model import ModelArgs, Prompt, Transformer
from quantize import count_groups, cut

UNIT = 64  # the intermediate width and the vocabulary are sharded in multiples of it, which kernels like
LIMIT_S = float(os.environ.get("COLLECTIVE_TIMEOUT_S", 600))  # compiling may take one rank minutes longer than another
GRACE_S = 2.0  # for ranks to report why they end, when the collectives of the others fail

# ---- shards --------------------------------------------------------------------------------------------------------


def pad_heads(first: int, last: int, group: int) -> tuple[list[int], range]:
    """Query heads first to last - 1 as a rank holds them, and the key/value heads that they attend to.

    `group` query heads share a key/value head. Attention needs equally many for each: where the first or last key/value
    head serves fewer than the others, -1 stands for a head of zeros, whose output meets columns of zeros in wo.
    """
    kv_heads = range(first // group, (last - 1) // group + 1)
    groups = [[h for h in range(g * group, (g + 1) * group) if first <= h < last] for g in kv_heads]
    width = max(map(len, groups))
    return [head for heads in groups for head in heads + [-1] * (width - len(heads))], kv_heads


@cache  # each rank's shard is made with all ranks' heads in view
def split_heads(n_head: int, n_kv_head: int, n_ranks: int) -> list[range]:
    """The query heads of each rank: the split whose largest rank is smallest.

    A key/value head that serves heads of several ranks is on each of them. A rank's size is the number of its query and
    key/value heads, padding included.
    """
    group = n_head // n_kv_head

    def size(first: int, last: int) -> int:
        queries, kv_heads = pad_heads(first, last, group)
        return len(queries) + len(kv_heads)

    for largest in range(2, n_head + n_kv_head + 1):
        ends = [0]
        for others in reversed(range(n_ranks)):  # as many as fit, but at least one for each rank that follows
            fitting = (end for end in range(ends[-1] + 1, n_head - others + 1) if size(ends[-1], end) <= largest)
            ends.append(max(fitting))
        if ends[-1] == n_head:
            return [range(*pair) for pair in pairwise(ends)]
    raise ValueError(f"{n_ranks} ranks for {n_head} query heads")


def split_width(args: ModelArgs, n_groups: int, rank: int, n_ranks: int) -> tuple[list[int], int]:
    """A rank's pieces of the intermediate width, and out of how many: groups of int4 in a row of w2, or of UNIT."""
    width = args.intermediate_size
    piece = width // n_groups if n_groups > 1 else math.gcd(UNIT, width)
    while width // piece < n_ranks and piece % 2 == 0:
        piece //= 2
    n = width // piece
    return list(range(n * rank // n_ranks, n * (rank + 1) // n_ranks)), n


def rows_per_rank(args: ModelArgs, n_ranks: int) -> int:
    """W: rows of the output layer on each rank; the last may have fewer. A rank's own args give the same."""
    unit, rows = UNIT, args.vocab_size + args.n_input_only
    while (each := -(-rows // (n_ranks * unit)) * unit) * (n_ranks - 1) >= args.n_tokens and unit > 1:
        unit //= 2  # a vocabulary so small that nothing would be left for the last
    return each


def merge_pieces(pieces: list[int], n: int) -> tuple[list[int], int]:
    """The same columns as fewer, longer pieces if they are consecutive, so that no group of int4 is cut needlessly."""
    if pieces != list(range(pieces[0], pieces[-1] + 1)):
        return pieces, n
    step = math.gcd(pieces[0], len(pieces), n)
    return [i // step for i in pieces[::step]], n // step


def plan(args: ModelArgs, n_groups: int, rank: int, n_ranks: int) -> tuple[ModelArgs, dict[str, tuple], range]:
    """The args of a rank's own Transformer, and its shard: layer -> (dim, pieces, out of how many), see quantize.cut.

    Last the rows of the output layer; to a rank's model the tokens of the others are input-only. n_groups: of int4, in
    a row of w2; 1 if there are none.
    """
    n_head, n_kv_head = args.n_head, args.n_kv_head
    heads = split_heads(n_head, n_kv_head, n_ranks)[rank]
    queries, kv_heads = pad_heads(heads.start, heads.stop, n_head // n_kv_head)
    keys, values = list(kv_heads), [n_kv_head + g for g in kv_heads]
    pieces, n_pieces = split_width(args, n_groups, rank, n_ranks)
    each = rows_per_rank(args, n_ranks)
    own = range(args.vocab_size)[rank * each : (rank + 1) * each]
    layers = {
        "attention.wqkv": (0, queries + [n_head + g for g in keys + values], n_head + 2 * n_kv_head),
        "attention.wq": (0, queries, n_head),
        "attention.wkv": (0, keys + values, 2 * n_kv_head),
        "attention.wo": (1, *merge_pieces(queries, n_head)),
        "feed_forward.w13": (0, pieces + [n_pieces + i for i in pieces], 2 * n_pieces),
        "feed_forward.w2": (1, *merge_pieces(pieces, n_pieces)),
    }
    width, n_others = len(pieces) * args.intermediate_size // n_pieces, args.vocab_size - len(own)
    args = replace(args, n_head=len(queries), n_kv_head=len(kv_heads), intermediate_size=width, vocab_size=len(own))
    return replace(args, n_input_only=args.n_input_only + n_others), layers, own


def cut_shard(state: dict[str, Tensor], path: Path, layers: dict[str, tuple], own: range) -> Iterator[tuple]:
    """The tensors of a plan, by name. state is the mapped checkpoint at path.

    Embedding, norm and vision encoder are whole, and stay in the file until they are used. Columns touch all pages of
    a layer, which leave this process's memory with the mapping that they are in: hence a mapping for each layer.
    """
    for layer, names in groupby(state, lambda name: name.startswith("layers.") and name.split(".")[1]):
        mapped = load_mapped(path) if layer else state
        for name in names:
            part = layers.get(".".join(name.split(".")[2:4]), (0, [0], 1))  # others, norms and gates, are whole
            tensor = mapped[name][own.start : own.stop] if name.startswith("output.") else mapped[name]
            yield name, cut(tensor, *part) if layer else tensor
    if "output.weight" not in state:
        yield "output.weight", state["embedding.weight"][own.start : own.stop]


# ---- collectives ---------------------------------------------------------------------------------------------------


class AllReduce(nn.Module):
    """A layer of which each rank has some columns: its results are added up."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        dist.all_reduce(y)
        return y


class GatherLogits(nn.Module):
    """The output layer, of which each rank has some rows: logits [S, n_tokens] on every rank.

    If nothing but the largest is needed (greedy), each rank sends its largest alone, and the others are -inf.
    """

    def __init__(self, part: nn.Module, args: ModelArgs, rank: int, n_ranks: int, greedy: bool):
        super().__init__()
        self.part, self.n_tokens, self.n_ranks, self.greedy = part, args.n_tokens, n_ranks, greedy
        self.each = rows_per_rank(args, n_ranks)
        self.own = range(args.n_tokens)[rank * self.each : (rank + 1) * self.each]

    def forward(self, x: Tensor) -> Tensor:
        logits = self.part(x)[:, : len(self.own)]  # without padding rows
        logits = F.pad(logits, (0, self.each - len(self.own)), value=float("-inf"))  # [S, W]
        if not self.greedy:
            return torch.cat(all_gather(logits, self.n_ranks), dim=-1)[:, : self.n_tokens]
        value, index = logits.float().max(dim=-1)
        largest = torch.stack((value, (index + self.own.start).float()), dim=-1)  # exact below 2^24
        value, index = torch.stack(all_gather(largest, self.n_ranks), dim=1).unbind(-1)  # [S, R]
        sparse = value.new_full((len(x), self.n_ranks * self.each), float("-inf"))
        return sparse.scatter(1, index.long(), value)[:, : self.n_tokens]


def all_gather(part: Tensor, n_ranks: int) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(n_ranks)]
    dist.all_gather(parts, part)
    return parts


# ---- processes -----------------------------------------------------------------------------------------------------


class OneProcess:
    """What an engine asks of the ranks that run it; of a single one, nothing."""

    rank, n_ranks = 0, 1

    def shard(self, args: ModelArgs, state: dict[str, Tensor], path: Path) -> tuple[ModelArgs, Iterable[tuple]]:
        """The arguments and the tensors, by name, of this rank's part of the model; state is mapped from path."""
        return args, state.items()

    def connect(self, model: Transformer) -> None:
        """Make a loaded part work together with the parts of the other ranks."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank."""
        return tensor

    def check(self, prompt: Prompt) -> None:
        """End the run if another rank was given another prompt."""

    def share(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, on every rank, however long rank 0 takes (it may ask a user)."""
        return value


class Ranks(OneProcess):
    """Several processes. The store, which torchrun serves, carries what is not a tensor."""

    def __init__(self, rank: int, n_ranks: int, store: dist.Store, greedy: bool):
        self.rank, self.n_ranks, self.store, self.greedy = rank, n_ranks, store, greedy
        self.n_exchanged = 0

    def shard(self, args: ModelArgs, state: dict[str, Tensor], path: Path) -> tuple[ModelArgs, Iterable[tuple]]:
        if self.n_ranks > args.n_head:
            raise ValueError(f"{self.n_ranks} ranks, but {path} has {args.n_head} query heads: start at most as many")
        n_groups = count_groups(state, "layers.0.feed_forward.w2")
        small, layers, own = plan(args, n_groups, self.rank, self.n_ranks)
        return small, cut_shard(state, path, layers, own)

    def connect(self, model: Transformer) -> None:
        self.exchange(None)  # a rank that could not load its part says so here
        for name, module in list(model.named_modules()):
            if name.endswith(("attention.wo", "feed_forward.w2")):
                model.set_submodule(name, AllReduce(module))
        model.set_submodule("output", GatherLogits(model.output, model.args, self.rank, self.n_ranks, self.greedy))

    def broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0)
        return tensor

    def check(self, prompt: Prompt) -> None:
        key = torch.tensor([hash(tuple(prompt.keys))], device=prompt.tokens.device)
        keys = torch.cat(all_gather(key, self.n_ranks)).tolist()
        if different := [rank for rank in range(self.n_ranks) if keys[rank] != keys[0]]:
            raise dist.DistError(f"rank {different[0]} was asked something else than rank 0")

    def share(self, value: Any) -> Any:
        return self.exchange(value, patience=math.inf)[0]

    def wait(self, *keys: str, seconds: float = math.inf) -> str | None:
        """Until one of these keys is in the store: which; None after so many seconds."""
        deadline = time.monotonic() + seconds
        while not (found := [key for key in keys if self.store.check([key])]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        return found[0]

    def exchange(self, value: Any, patience: float = LIMIT_S) -> list:
        """Every rank's value, which JSON can hold; rank 0 may take `patience` seconds, the others LIMIT_S.

        Raises dist.DistError for a rank that has failed or takes longer.
        """
        self.n_exchanged += 1
        keys = [f"exchanged {self.n_exchanged} {rank}" for rank in range(self.n_ranks)]
        self.store.set(keys[self.rank], json.dumps(value))
        for rank, key in enumerate(keys):
            if self.wait(key, f"failed {rank}", seconds=LIMIT_S if rank else patience) != key:
                raise dist.DistError(f"rank {rank} does not answer")
        return [json.loads(self.store.get(key)) for key in keys]

    def start(self, args: argparse.Namespace) -> None:
        """Form the process group. Raises ValueError if a rank has other flags or files than rank 0, or no device."""
        gpu = None if torch.device(args.device).type == "cpu" else choose_gpu(args.device)
        settings = self.exchange(describe(args))
        for rank, other in enumerate(settings):
            if different := [name for name, value in settings[0].items() if other.get(name) != value]:
                raise ValueError(f"{different[0]} is not the same on rank {rank} as on rank 0")
        backend, limit = "nccl" if gpu else "gloo", timedelta(seconds=LIMIT_S)
        stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # PyTorch 2.8's gloo greets on stdout, even if it connects lazily
        try:
            dist.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.n_ranks, timeout=limit, device_id=gpu
            )
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            os.close(nowhere)

    def fail(self, error: Exception) -> Exception:
        """What this rank raises after error: if a collective has failed, the mistake that ended another rank.

        Rank 0 ends first: after a failure torchrun stops whoever still runs, and rank 0 is the one that prints.
        """
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost and not isinstance(error, (ValueError, OSError)):
            return error  # a fault of ours, whose traceback must not wait
        try:
            self.store.set(f"failed {self.rank}", "" if lost else str(error))
            if dist.is_initialized():
                dist.destroy_process_group()  # breaks the connections, so that the collectives of the others fail
            error = self.explain_loss(error) if lost else error
            self.leave(GRACE_S if lost else LIMIT_S)
            time.sleep(GRACE_S if self.rank else 0)
            return error
        except RuntimeError:  # rank 0 is gone, and with it the store that it served
            return ConnectionError(first_line(error))

    def explain_loss(self, error: Exception) -> Exception:
        """After a failed collective: the mistake that another rank has reported, or which ranks report nothing."""
        deadline, missing = time.monotonic() + GRACE_S, []
        for rank in range(self.n_ranks):
            if not self.wait(f"failed {rank}", seconds=deadline - time.monotonic()):
                missing.append(str(rank))
            elif mistake := self.store.get(f"failed {rank}").decode():
                return ValueError(f"rank {rank}: {mistake}")
        lost = f"rank {', '.join(missing)} is gone, or has not answered for {LIMIT_S:g} s"
        return ConnectionError(lost if missing else first_line(error))

    def leave(self, seconds: float = LIMIT_S) -> None:
        """Rank 0 says that it has ended; the others wait for it, so long at most."""
        if self.rank == 0:
            self.store.set("ended", "")
        with contextlib.suppress(RuntimeError):
            self.store.wait(["ended"], timedelta(seconds=seconds))


@contextlib.contextmanager
def join_ranks(args: argparse.Namespace) -> Iterator[OneProcess]:
    """This process among those that torchrun started, or alone. args: the flags, which are the same on all ranks.

    Raises ValueError, the same on every rank, for a mistake that any of them finds; ConnectionError for a lost rank.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield OneProcess()
        return
    ranks = Ranks(*meet(), greedy=args.temperature == 0)
    try:
        ranks.start(args)
        yield ranks
    except Exception as error:
        if (raised := ranks.fail(error)) is error:
            raise
        raise raised from None
    ranks.leave()
    dist.destroy_process_group()


def meet() -> tuple[int, int, dist.Store]:
    """This process's rank, the number of ranks, and the store that torchrun serves for them, or rank 0 without it."""
    try:
        store, rank, n_ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=LIMIT_S)))
    except (RuntimeError, ValueError) as error:  # RuntimeError: torch.distributed's own
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(f"rank {os.environ.get('RANK')} cannot use {address} ({first_line(error)})") from None
    return rank, n_ranks, store


def choose_gpu(device: str) -> torch.device:
    """The GPU of this rank's own number, which "cuda" means from here on. Raises ValueError if there is none."""
    n, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device != "cuda":
        raise ValueError(f"--device {device}: say cuda or cpu, each rank uses the GPU of its own number")
    if own >= n:
        raise ValueError(f"no GPU for rank {own}, there are {n}: start fewer ranks")
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def describe(args: argparse.Namespace) -> dict[str, str]:
    """What must be the same on all ranks: flags, and the files that they name."""
    flags = {f"--{name}": str(value) for name, value in vars(args).items() if name not in ("output", "profile")}
    return flags | {str(path): fingerprint(path) for path in (args.checkpoint_path, args.draft_checkpoint_path) if path}


def fingerprint(path: Path) -> str:
    """Of a checkpoint: its size, 65 places in it, its params.json and tokenizer.model."""
    try:
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            for i in range(65):
                file.seek(max(0, size - 4096) * i // 64)
                digest.update(file.read(4096))
        for name in ("params.json", "tokenizer.model"):
            digest.update(path.with_name(name).read_bytes())
        return f"{size} bytes, {digest.hexdigest()}"
    except OSError:
        return "missing"  # loading says so
