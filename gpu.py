"""What GPUs do otherwise than CPUs: attention that splits the keys of a compiled step, greedy decoding on the device,
caches that do not grow, weights uploaded through pinned memory, time measured without waiting.

Knows CUDA graphs, what Inductor makes of a step, and how time is measured on a device. Does not know how weights are
quantized (quantize.py), nor requests.

Shapes: S tokens, T cache slots, H query heads, G key/value heads, d head width, C slots of the cross-attention caches,
R = H / G * S rows: the query heads that share a key/value head, with a row for each token.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import model

BLOCK = 128  # slots that flex_attention reads or skips together
PARTS = 256  # of the logits, in argmax
STAGED_BYTES = 2**25  # of a tensor that is uploaded, at a time
CACHE_SIZE = 32768  # slots, of a longer context: caches that grow would have every step compiled anew
STEP_OPTIONS = {
    "triton.cudagraphs": True,
    "coordinate_descent_tuning": True,  # products of one row are Inductor's own (torch/_inductor/decomposition.py)
    "combo_kernels": True,  # rotation and both cache writes in one launch
    "pick_loop_orders": False,  # else the rotated queries of several tokens are copied once more
}


def block_mask(n_blocks: Tensor, blocks: Tensor, mask_mod: Callable, n_rows: int, n_slots: int) -> BlockMask:
    """For every row the first n_blocks [] of the listed blocks [T / BLOCK]; mask_mod says which of their slots.

    n_blocks stays on the device: how many slots a step reads is no part of its graph.
    """
    shape = 1, 1, -(-n_rows // BLOCK)
    counts, indices = n_blocks.int().expand(shape), blocks.int().expand(*shape, -1)
    # Without the rows of each block, which only training needs: from_kv_blocks() computes them before PyTorch 2.13.
    rest = None, None, None, None, None, None, (BLOCK, BLOCK), mask_mod
    return BlockMask((n_rows, n_slots), counts, indices, *rest)


def prefix_mask(input_pos: Tensor, n_rows: int, n_slots: int) -> BlockMask:
    """Row r, of token r % S, attends to the slots up to input_pos [S], which ascends, of that token."""

    def up_to_own(b, h, row, slot):
        return slot <= input_pos[row % len(input_pos)]

    blocks = torch.arange(-(-n_slots // BLOCK), device=input_pos.device)
    return block_mask(input_pos[-1] // BLOCK + 1, blocks, up_to_own, n_rows, n_slots)


def listed_mask(seen: Tensor, n_rows: int) -> BlockMask:
    """Every row attends to the slots that are True in seen [C]; of the others' blocks none is read."""
    used = F.pad(seen, (0, -len(seen) % BLOCK)).view(-1, BLOCK).any(1)
    blocks = used.int().argsort(descending=True, stable=True)
    return block_mask(used.sum(), blocks, lambda b, h, row, slot: seen[slot], n_rows, len(seen))


class StepMasks(model.StepMasks):
    """Of a compiled step: block masks, which let it read only the slots in use, whatever its n_slots."""

    def __init__(self, args: model.ModelArgs):
        super().__init__()
        self.group = args.n_head // args.n_kv_head

    def forward(self, slots: Tensor, input_pos: Tensor, cross_row: Tensor, n_slots: int | None) -> tuple[Any, Any]:
        if not torch.compiler.is_compiling():
            return super().forward(slots, input_pos, cross_row, n_slots)
        n_rows = self.group * len(input_pos)
        cross_mask = listed_mask(cross_row, n_rows) if len(cross_row) else None
        return prefix_mask(input_pos, n_rows, len(slots) - 1), cross_mask


class Attend(model.Attend):
    """In the place of model.Attend."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """[S, H * d] from queries [H, S, d], keys and values [G, T, d]."""
        if isinstance(mask, BlockMask):
            # The group as rows of one head: the kernel that splits the keys takes only groups that are powers of two.
            rows = q.unflatten(0, (len(k), -1)).flatten(1, 2)  # [G, R, d]
            y = flex_attention(rows[None], k[None], v[None], block_mask=mask)
            return y.reshape(q.shape).transpose(0, 1).flatten(1)
        if mask is None:
            q, k, v = q[None], k[None].contiguous(), v[None].contiguous()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return y[0].transpose(0, 1).flatten(1)
        return super().forward(q, k, v, mask)


class BiasedLinear(nn.Module):
    """A layer that Inductor can make a kernel of its own of, for one token: a product with a bias goes to cuBLAS."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight) + self.bias
        return F.linear(x, self.weight, self.bias)


def argmax(row: Tensor) -> Tensor:
    """[1] the index of the largest of row [n]: in two reductions, as a single one would be one thread block's."""
    parts = F.pad(row, (0, -len(row) % PARTS), value=float("-inf")).view(PARTS, -1)
    largest, column = parts.max(dim=1)
    part = largest.argmax(keepdim=True)
    return part * parts.shape[1] + column[part]


class GreedyDecoder(nn.Module):
    """Decoding at temperature 0 that enqueues nothing but replays: token and position stay on the device."""

    ids: Tensor  # [T + 2] of the token in each slot
    position: Tensor  # [1] the slot of the next token

    def __init__(self, transformer: model.Transformer):
        super().__init__()
        self.transformer = transformer
        self.register_buffer("ids", torch.empty(0, dtype=torch.long), persistent=False)
        self.compile(options=dict(STEP_OPTIONS), fullgraph=True, dynamic=False)

    def setup(self) -> None:
        """Make room, of other contents, where graphs read and write it."""
        slots = self.transformer.slots
        self.register_buffer("ids", torch.cat((slots, slots[:1])), persistent=False)
        self.register_buffer("position", slots[:1].clone(), persistent=False)

    def forward(self, n: int, n_tokens: int) -> None:
        """Forward the n ids from the position on, put the most likely of the first n_tokens behind them, and go on."""
        input_pos = self.position + torch.arange(n, device=self.position.device)
        logits = self.transformer.forward(self.ids[input_pos], input_pos)
        self.position += n
        self.ids[self.position] = argmax(logits[-1, :n_tokens])

    def decode(self, pending: list[int], first: int, n: int, n_tokens: int) -> Tensor:
        """[n] ids after the pending ones, which are to stand in the slots from the first on."""
        if len(self.ids) != len(self.transformer.slots) + 1:
            self.setup()
        last = first + len(pending)
        self.ids[first:last] = torch.tensor(pending, device=self.ids.device)
        self.position.fill_(first)
        for i in range(n):
            self(1 if i else len(pending), n_tokens)
        return self.ids[last : last + n].clone()


def first_size(transformer: model.Transformer) -> int:
    """How many slots a cache gets at once."""
    on_gpu = not transformer.norm.weight.is_cpu
    return min(transformer.args.max_seq_len, CACHE_SIZE) if on_gpu else 0


def report_caches(transformer: model.Transformer, log: Callable[[str], None]) -> None:
    """One line about caches that were made, once for all prompts, on a GPU."""
    caches = [buffer for name, buffer in transformer.named_buffers() if name.endswith("_cache")]
    if not caches[0].is_cpu:
        n_bytes = sum(cache.nbytes for cache in caches)
        log(f"caches for {transformer.cached.n_slots} tokens: {n_bytes / 1e9:.2f} GB (--max_cache_size)")


class Upload:
    """Copies tensors from mapped files to a GPU through two pinned buffers, one being filled while the other is read.

    The driver would copy memory that may be paged out by way of a buffer of its own, and wait for each piece (CUDA C++
    Best Practices Guide, 10.1).
    """

    def __init__(self, device: torch.device):
        self.device, on_gpu = device, device.type != "cpu"
        self.buffers = [torch.empty(STAGED_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.ends = [mark(device) for _ in self.buffers]  # of the copies that read them last

    def __call__(self, tensor: Tensor) -> Tensor:
        moved = torch.empty_like(tensor, device=self.device, memory_format=torch.contiguous_format)
        pieces = zip(as_bytes(tensor.contiguous()).split(STAGED_BYTES), as_bytes(moved).split(STAGED_BYTES))
        for source, target in pieces:
            if self.device.type != "cpu":
                self.ends[0].synchronize()
            target.copy_(self.buffers[0][: len(source)].copy_(source), non_blocking=True)
            self.ends[0] = mark(self.device)
            self.buffers.reverse()
            self.ends.reverse()
        return moved


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def mark(device: torch.device) -> Any:
    """A point of time on a device, without waiting for the device."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def now(device: torch.device) -> float:
    """Seconds, after waiting for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def prepare(module: nn.Module) -> dict[str, Counter[str]]:
    """Make a loaded decoder, quantized or not, fast on a GPU; an encoder stays as it is. No counts (cpu.prepare)."""
    if isinstance(module, model.Transformer):
        module.step_masks = StepMasks(module.args)
        for name, child in list(module.named_modules()):
            if isinstance(child, model.Attend):
                module.set_submodule(name, Attend())
            elif isinstance(child, nn.Linear) and child.bias is not None:
                module.set_submodule(name, BiasedLinear(child))
    return {}
