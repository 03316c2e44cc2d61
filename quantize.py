"""Small weights: int8, int4 and fp8 linear layers, and a checkpoint rewritten to hold them.

Knows how numbers are rounded, what a quantized checkpoint holds and which kernel multiplies by it on which device. Does
not know images, requests, or how a checkpoint is loaded and sharded.

A quantized layer is plain tensors whose rows are output features, so that it can be sliced like any other:
    int8  weight [N, K] int8,            scale [N] float32              w = weight * scale
    fp8   weight [N, K] float8_e4m3fn,   scale [N] float32              w = weight * scale
    int4  weight [N, K/2] uint8,         scale, zero [N, G] bfloat16    w = (code - 8) * scale + zero
and its bias. A byte of int4 holds column 2j in its upper half and 2j + 1 in the lower; a group is K/G columns. pack()
turns these into what the device's kernel wants. Scales are never rounded: bfloat16 kernels get int4's as they are.

    python quantize.py --checkpoint_path checkpoints/Qwen/Qwen2.5-0.5B/model.pth --mode int4 --groupsize 64

Shapes: N output features, K input features, G groups of a row, S tokens.
"""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from cli import Parser, command_for, log, run_command

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpu
import gpu
from checkpoint import CONVERT, first_line, load_mapped, read_params, stamp, write_checkpoint
from cpu import UnsupportedByKernel, frozen
from model import Transformer

Layer = TypeVar("Layer", bound=nn.Module)
MODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}  # and the dtype of their weights
LARGEST = {"int8": 127.0, "fp8": 448.0}
GROUP_SIZES = (32, 64, 128)
SHRINKS = (1.0, 0.9, 0.8, 0.7)  # of the range of a group; more of them gain less than 1 % of the squared error
REFITS = 2
BLOCK = 2**20  # weights that are worked on at a time
INT8_ROWS = 32  # CUDA's int8 product takes more than 16 rows, in steps of 8
FP8_ROWS = 16
FUSED_TOKENS = 8  # more of them would take longer to multiply than the weights to read


def by_rows(change: Callable[..., tuple], *tensors: Tensor) -> list[Tensor]:
    """What change makes of the tensors, a block of rows at a time, so that what it needs meanwhile stays small."""
    n, rows = len(tensors[0]), max(64, BLOCK // tensors[0].shape[1] // 64 * 64)
    results: list[Tensor] = []
    for start in range(0, n, rows):
        parts = change(*(tensor[start : start + rows] for tensor in tensors))
        results = results or [part.new_empty((n, *part.shape[1:])) for part in parts]
        for result, part in zip(results, parts):
            result[start : start + rows] = part
    return results


def quantize_rows(w: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """w [N, K] as int8 or fp8, symmetric, a scale a row: weight [N, K], scale [N]."""
    w = w.float()
    scale = (w.abs().amax(1) / LARGEST[mode]).clamp(min=torch.finfo(torch.float32).tiny)
    w = w / scale[:, None]
    return (w.round() if mode == "int8" else w).to(MODES[mode]), scale


def quantize_groups(
    w: Tensor, group: int, shrinks: Sequence[float] = SHRINKS, refits: int = REFITS
) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, K] as int4: weight [N, K/2], scale and zero [N, G].

    Scale and zero are those of least weighted squared error among some: the group's range clipped by each of shrinks
    (the search of Choukroun et al., arXiv 1902.06822, also AWQ's, 2306.00978), each followed by refits times the least
    squares line through the weights over their codes and new codes for that line (Lloyd's iteration, as in LQ-Nets,
    1807.10029). A weight counts 1 + w^2 / mean(w^2) times: without, the search clips the few large ones, and perplexity
    suffers (docs/quantization.md). The idea is that of llama.cpp's k-quants, whose factor is rms(w) + |w|
    (make_qkx2_quants). In no group is the plain squared error larger than that of shrinks=(1,), refits=0: rounding
    between minimum and maximum.
    """
    w = w.float().unflatten(1, (-1, group))  # [N, G, g]
    square = w.square()
    importance = 1 + square / square.mean(-1, keepdim=True).clamp(min=1e-30)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)  # [N, G, 1], like all that follow but codes
    limit = torch.full_like(low, torch.inf)  # the first's plain squared error
    best: tuple[Tensor, ...] = limit, low, low  # the best's weighted squared error, scale, zero
    for shrink in shrinks:
        scale = (high - low) * shrink / 15
        zero = (high + low + scale) / 2  # the codes -8 to 7 lie around -1/2
        for _ in range(refits + 1):
            scale, zero = representable(scale, zero)
            codes = encode(w, scale, zero)
            squared = (codes * scale + zero - w).square()
            plain, error = squared.sum(-1, keepdim=True), (squared * importance).sum(-1, keepdim=True)
            limit = torch.where(limit.isinf(), plain, limit)
            better = (error < best[0]) & (plain <= limit)
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best))
            scale, zero = fit_line(codes, w, importance)
    _, scale, zero = best
    codes = encode(w, scale, zero)
    if refits:
        wider = representable(*keep_spread(codes, w))
        better = (codes * wider[0] + wider[1] - w).square().sum(-1, keepdim=True) <= limit
        scale, zero = (torch.where(better, new, old) for new, old in zip(wider, (scale, zero)))
    codes = (codes + 8).flatten(1).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale[..., 0].bfloat16(), zero[..., 0].bfloat16()


def representable(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """As they are stored."""
    return scale.clamp(min=1e-20).bfloat16().float(), zero.bfloat16().float()


def encode(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of the codes -8 to 7."""
    return ((w - zero) / scale).round().clamp(-8, 7)


def fit_line(codes: Tensor, w: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset [N, G, 1] of the least squares line through w over codes."""
    total = importance.sum(-1, keepdim=True)
    mean_code, mean = ((importance * t).sum(-1, keepdim=True) / total for t in (codes, w))
    centred = importance * (codes - mean_code)
    slope = (centred * w).sum(-1, keepdim=True) / (centred * codes).sum(-1, keepdim=True).clamp(min=1e-9)
    return slope, mean - slope * mean_code


def keep_spread(codes: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset with which the codes, projected onto w, are as long as w: fit_line's line makes them shorter."""
    mean_code, mean = codes.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
    product = ((codes - mean_code) * w).sum(-1, keepdim=True)
    slope = (w - mean).square().sum(-1, keepdim=True) / product.clamp(min=1e-30)
    return slope, mean - slope * mean_code


def unpack_codes(weight: Tensor) -> Tensor:
    """[N, K] codes 0 to 15 from bytes [N, K/2]."""
    return torch.stack((weight >> 4, weight & 15), dim=-1).flatten(1)


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The float32 weights [N, K] that a quantized layer stands for."""
    if zero is None:
        return weight.float() * scale[:, None]
    codes = unpack_codes(weight).float().unflatten(1, (scale.shape[1], -1)) - 8
    return (codes * scale.float()[..., None] + zero.float()[..., None]).flatten(1)


class QuantizedLinear(nn.Module):
    """What a checkpoint holds of a quantized layer, to be filled, moved, sliced and packed. It computes nothing.

    cut() slices its rows or columns. The group's size is not stored: it is K/G of what is left.
    """

    def __init__(self, linear: nn.Linear, mode: str, groups: int):
        super().__init__()
        n, k = linear.weight.shape
        self.mode = mode
        lines = ((n, groups), torch.bfloat16) if mode == "int4" else ((n,), torch.float32)
        self.weight = empty((n, k // 2 if mode == "int4" else k), MODES[mode])
        self.scale = empty(*lines)
        self.zero = empty(*lines) if mode == "int4" else None
        self.bias = linear.bias


def empty(shape: tuple, dtype: torch.dtype) -> nn.Parameter:
    return frozen(torch.empty(shape, dtype=dtype, device="meta"))


def is_quantized(name: str, tensor: Tensor) -> bool:
    """Part of a quantized layer, and not to be rounded to the compute dtype."""
    return tensor.element_size() == 1 or name.endswith((".scale", ".zero"))


def count_groups(state: dict[str, Tensor], layer: str) -> int:
    """Groups of int4 in a row of a layer; 1 of any other."""
    scale = state.get(f"{layer}.scale")
    return 1 if scale is None or scale.dim() == 1 else scale.shape[1]


def cut(tensor: Tensor, dim: int, pieces: list[int], n: int) -> Tensor:
    """A weight, scale, zero or bias of part of a layer: some of n equal pieces of its rows (dim 0) or columns (dim 1).

    A copy, in the order of pieces; -1 is a piece of zeros. A scale or bias of rows has no columns. Where int4 has no
    multiple of n groups, each is repeated until they can be divided.
    """
    if dim == tensor.dim():
        return tensor.clone()
    size = tensor.shape[dim]
    tensor = tensor.repeat_interleave(math.lcm(size, n) // size, dim) if size % n else tensor
    plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # fp8 tensors cannot be indexed
    index = torch.tensor(pieces)
    taken = plain.unflatten(dim, (n, -1)).index_select(dim, index.clamp(min=0))
    if -1 in pieces:
        taken.movedim(dim, 0)[index < 0] = 0
    return taken.flatten(dim, dim + 1).view(tensor.dtype)


def expect_quantized(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Replace the linear layers that are quantized in state by layers that it can be loaded into.

    state's names are the model's. The mode is read off the weights' dtype.
    """
    modes = {dtype: mode for mode, dtype in MODES.items()}
    for name, linear in linears(model).items():
        scale, weight = state.get(f"{name}.scale"), state.get(f"{name}.weight")
        if scale is not None and weight is not None and weight.dtype in modes:
            layer = QuantizedLinear(linear, modes[weight.dtype], scale.shape[-1])
            model.set_submodule(name, layer)


def load_weights(
    path: Path,
    model: Transformer,
    encoder: nn.Module | None,
    tensors: Iterable[tuple[str, Tensor]],
    device: str,
    dtype: torch.dtype,
) -> None:
    """Put the tensors of a checkpoint, moved to the device, in the place of the model's and the encoder's (vision.*).

    All but those of quantized layers are rounded to dtype. Raises ValueError, one line, if they are not the modules'.
    """
    try:
        place = torch.device(device)
        upload = gpu.Upload(place) if place.type == "cuda" else partial(Tensor.to, device=place)
        state = {name: upload(t).to(t.dtype if is_quantized(name, t) else dtype) for name, t in tensors}
        expect_quantized(model, state)
        if model.args.tie_embeddings:
            state.setdefault("output.weight", state["embedding.weight"])
        vision = {name.removeprefix("vision."): state.pop(name) for name in list(state) if name.startswith("vision.")}
        (encoder or nn.Module()).load_state_dict(vision, assign=True)
        model.load_state_dict(state, assign=True)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(f"{path} needs more memory than {device} has ({first_line(error)})") from error
    except (RuntimeError, KeyError) as error:  # missing, surplus or misshapen tensors
        problem = f"is not what its params.json says ({' '.join(str(error).split())[:200]})"
        raise ValueError(f"{path} {problem}: {CONVERT}") from error


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return layers_of(model, nn.Linear)


def pack(model: nn.Module, dtype: torch.dtype) -> dict[str, Counter[str]]:
    """Replace the quantized layers by the fastest that their device has for activations of dtype.

    Returns how many layers of each mode are of which class then; nn.Linear is a layer that was dequantized to dtype.
    """
    counts: dict[str, Counter[str]] = {}
    for name in list(layers_of(model, QuantizedLinear)):  # names alone, so that a layer is freed when it is packed
        layer = cast(QuantizedLinear, model.get_submodule(name))
        packed = pack_layer(layer, dtype)
        counts.setdefault(layer.mode, Counter())[type(packed).__name__] += 1
        model.set_submodule(name, packed)
    return counts


def describe(counts: dict[str, Counter[str]], dtype: torch.dtype) -> str:
    """One line about the counts of pack and cpu.prepare."""
    lines = []
    for kind, classes in counts.items():
        served = [f"{n} layers by {name}" for name, n in sorted(classes.items()) if name != "Linear"]
        dense = "dequantized to dense" if kind in MODES else "layers by nn.Linear in"
        if kind in MODES or classes["Linear"]:
            served.append(f"{classes['Linear']} {dense} {str(dtype).removeprefix('torch.')}")
        lines.append(f"{kind}: {', '.join(served)}")
    return "; ".join(lines)


def pack_layer(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    """The first of the device's kernels that serves the layer; without one a dense layer of dequantized weights."""
    for kernel in KERNELS.get((layer.weight.dtype, layer.weight.device.type), ()):
        with contextlib.suppress(UnsupportedByKernel):
            return kernel(layer, dtype)
    linear = nn.Linear(1, 1, device="meta")
    tensors = (t for t in (layer.weight, layer.scale, layer.zero) if t is not None)
    (weight,) = by_rows(lambda *block: (dequantize(*block).to(dtype),), *tensors)
    linear.weight, linear.bias = frozen(weight), layer.bias
    linear.out_features, linear.in_features = weight.shape
    return linear


@contextlib.contextmanager
def refusals_of_torch() -> Iterator[None]:
    """PyTorch's operators refuse sizes, dtypes and devices by RuntimeError: they differ by version and driver."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedByKernel from error


class TorchLinear(nn.Module):
    """A layer whose product is an operator of PyTorch's."""

    in_features: int
    weight: nn.Parameter

    def try_once(self, dtype: torch.dtype) -> None:
        """On one token. Raises UnsupportedByKernel."""
        with refusals_of_torch():
            self(torch.zeros(1, self.in_features, dtype=dtype, device=self.weight.device))


def split_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [S, K] as 16-bit numbers, in two int8 rows each: [2S, K], first the upper halves; and their step [S, 1].

    The product of the rows is exact, so that a token's result does not depend on the tokens beside it, and x is rounded
    to 2^-16 of its row's range: less than bfloat16 and float16 do to all but the smallest of its values.
    """
    step = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / (127 * 256)
    whole = (x.float() / step).round().to(torch.int32)
    high = (whole + 128) >> 8
    return torch.cat((high, whole - (high << 8))).to(torch.int8), step


class Int8Pack(TorchLinear):
    """The CPU's weight-only product, where cpu.cpp cannot be built; bfloat16 only, the others are not vectorized."""

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype):
        super().__init__()
        self.in_features = layer.weight.shape[1]
        if dtype != torch.bfloat16 or self.in_features % 16:  # of other widths it reads past the end
            raise UnsupportedByKernel
        self.weight, self.scale, self.bias = layer.weight, layer.scale, layer.bias
        self.ones = frozen(torch.ones_like(layer.scale, dtype=dtype))
        self.try_once(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return add_bias(torch._weight_int8pack_mm(x, self.weight, self.ones) * self.scale, self.bias, x.dtype)


class Int8Cuda(TorchLinear):
    """The tensor cores' product of 8-bit integers, with 16-bit activations; compiled for few tokens fused_product."""

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype):
        super().__init__()
        self.in_features = layer.weight.shape[1]
        self.weight, self.scale, self.bias = layer.weight, layer.scale, layer.bias
        self.try_once(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= FUSED_TOKENS and torch.compiler.is_compiling():
            return fused_product(x, self.weight, self.scale, self.bias)
        rows, step = split_int8(x)
        product = torch._int_mm(pad_rows(rows, INT8_ROWS), self.weight.t())[: len(rows)].float()
        high, low = product.chunk(2)
        return add_bias((high * 256 + low) * step * self.scale, self.bias, x.dtype)


def fused_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[S, N] for Inductor: the sums of all tokens, over the same weights, become one kernel that reads these once."""
    sums = ((weight.float() * row.float()).sum(-1) for row in x)
    return torch.stack([add_bias(each * scale, bias, x.dtype) for each in sums])


def pad_rows(rows: Tensor, multiple: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, -len(rows) % multiple))


class Int4(TorchLinear):
    """The weight-only products that PyTorch has for bfloat16: tinygemm on CUDA, its sibling on the CPU."""

    multiply: Callable
    pack: Callable[[Tensor], Tensor]

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype):
        super().__init__()
        if dtype != torch.bfloat16 or layer.zero is None:
            raise UnsupportedByKernel
        self.in_features = 2 * layer.weight.shape[1]
        self.group = self.in_features // layer.scale.shape[1]
        lines = torch.stack((layer.scale, layer.zero), dim=-1)  # [N, G, 2]
        self.scale_zero = frozen(lines.transpose(0, 1).contiguous().to(dtype))  # [G, N, 2]
        with refusals_of_torch():
            self.weight, self.bias = frozen(self.pack(layer.weight.data)), layer.bias
        self.try_once(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return add_bias(self.multiply(x, self.weight, self.group, self.scale_zero), self.bias, x.dtype)


class Int4Cpu(Int4):
    multiply = staticmethod(torch.ops.aten._weight_int4pack_mm_for_cpu)

    def pack(self, weight: Tensor) -> Tensor:
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        (packed,) = by_rows(lambda block: (convert(unpack_codes(block).int(), 1),), weight)
        return packed


class Int4Cuda(Int4):
    multiply = staticmethod(torch.ops.aten._weight_int4pack_mm)

    def pack(self, weight: Tensor) -> Tensor:
        tiles = next(n for n in (8, 4, 2, 1) if self.in_features % (16 * n) == 0 or n == 1)  # 1: refused, expanded
        return torch.ops.aten._convert_weight_to_int4pack(weight, tiles)


class Fp8Cuda(TorchLinear):
    """The tensor cores' product of fp8 numbers (compute capability 8.9 or more).

    An activation is the sum of two of them: four significant bits each, together as many as bfloat16's. Under compile
    fused_product, of few tokens.
    """

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype):
        super().__init__()
        self.in_features = layer.weight.shape[1]
        self.weight, self.scale, self.bias = layer.weight, layer.scale, layer.bias
        self.one = frozen(torch.ones((), device=layer.weight.device))
        self.try_once(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= FUSED_TOKENS and torch.compiler.is_compiling():
            return fused_product(x, self.weight, self.scale, self.bias)
        step = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST["fp8"]
        whole = x.float() / step
        high = whole.to(self.weight.dtype).float()
        rows = pad_rows(torch.cat((high, (whole - high) * 16)), FP8_ROWS).to(self.weight.dtype)
        product = torch._scaled_mm(rows, self.weight.t(), self.one, self.one, out_dtype=torch.float32)
        high, low = product[: 2 * len(x)].chunk(2)
        return add_bias((high + low / 16) * step * self.scale, self.bias, x.dtype)


def add_bias(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias).to(dtype)


KERNELS = {
    (torch.int8, "cpu"): (cpu.BlockLinear, Int8Pack),
    (torch.int8, "cuda"): (Int8Cuda,),
    (torch.uint8, "cpu"): (cpu.BlockLinear, Int4Cpu),
    (torch.uint8, "cuda"): (Int4Cuda,),
    (torch.float8_e4m3fn, "cuda"): (Fp8Cuda,),
}


def find_linears(path: Path, state: dict[str, Tensor]) -> dict[str, nn.Linear]:
    """The linear layers of the decoder whose checkpoint this is, by name, without memory."""
    if any(name.endswith(".scale") for name in state):
        raise ValueError(f"{path} is quantized already: quantize the original, model.pth")
    with torch.device("meta"):
        layers = linears(Transformer(read_params(path)[0]))
    for name, linear in layers.items():
        if getattr(state.get(source_of(name, state)), "shape", None) != linear.weight.shape:
            raise ValueError(f"{path} is not what its params.json says ({name}); convert the checkpoint again")
    return layers


def source_of(layer: str, state: dict[str, Tensor]) -> str:
    """Where a layer's weights are: a tied model's output layer is the embedding, which stays as it is beside it."""
    return "embedding.weight" if layer == "output" and "output.weight" not in state else f"{layer}.weight"


def group_for(in_features: int, group: int) -> int:
    """The largest half, quarter, ... of group that divides in_features."""
    while in_features % group:
        group //= 2
    return group


def read_finite(path: Path, name: str) -> Tensor:
    """A tensor of a checkpoint, mapped anew each time, so that no more than one of them stays in memory."""
    tensor = load_mapped(path)[name]
    if not all(block.isfinite().all() for block in tensor.split(2**10)):
        raise ValueError(f"{name} in {path} holds NaN or infinite numbers: download and convert it again")
    return tensor


def quantize_layer(w: Tensor, mode: str, group: int, **search: Any) -> tuple[list[Tensor], float, float]:
    """weight, scale and for int4 zero; the squared error, and the sum of the squared weights.

    search: other numbers for quantize_groups.
    """
    sums = torch.zeros(2, dtype=torch.float64)

    def change(block: Tensor) -> tuple:
        parts = quantize_groups(block, group, **search) if mode == "int4" else quantize_rows(block, mode)
        for i, tensor in enumerate((dequantize(*parts) - block.float(), block.float())):
            sums[i] += tensor.square().sum(dtype=torch.float64).cpu()
        return parts

    return by_rows(change, w), *sums.tolist()


def quantize_in_place(
    model: nn.Module, mode: str, group: int, dtype: torch.dtype, **search: Any
) -> dict[str, Counter[str]]:
    """Quantize and pack the linear layers of a model that is in memory. Returns pack's counts."""
    for name in list(linears(model)):
        linear = cast(nn.Linear, model.get_submodule(name))
        layer = QuantizedLinear(linear, mode, linear.in_features // group_for(linear.in_features, group))
        parts, *_ = quantize_layer(linear.weight.data, mode, group_for(linear.in_features, group), **search)
        state = dict(zip(("weight", "scale", "zero"), parts))
        layer.load_state_dict(state if linear.bias is None else state | {"bias": linear.bias}, assign=True)
        model.set_submodule(name, layer)
    return pack(model, dtype)


def quantize(path: Path, mode: str, group: int) -> tuple[Path, dict[str, float]]:
    """Write the quantized checkpoint beside the original: its path, and the relative RMS error of each kind of layer.

    Raises ValueError or OSError, one line, for what is wrong with the checkpoint or the disk; then nothing is left.
    """
    state, before = load_mapped(path), stamp(path)
    layers = find_linears(path, state)
    groups = {name: group_for(linear.in_features, group) for name, linear in layers.items()}
    if mode == "int4" and (group not in groups.values() or min(groups.values()) < 2):
        sizes = sorted({linear.in_features for linear in layers.values()})
        raise ValueError(f"--groupsize {group} does not divide the layers of {path}: they are {sizes} wide")
    kept = [name for name in state if name.removesuffix(".weight") not in layers]
    sources = {name: source_of(name, state) for name in layers}
    outline = {name: (state[name].shape, state[name].dtype) for name in kept}
    for name, linear in layers.items():
        plain = QuantizedLinear(linear, mode, linear.in_features // groups[name])
        tensors = plain.named_parameters()
        outline |= {f"{name}.{part}": (t.shape, t.dtype) for part, t in tensors if part != "bias"}
    del state
    sums: dict[str, list[float]] = {}  # of a kind of layer: squared error, squared weights

    def tensors_in_turn() -> Iterator[tuple[str, Tensor]]:
        for name in kept:
            yield name, read_finite(path, name)
        for name, source in sources.items():
            parts, *squares = quantize_layer(read_finite(path, source), mode, groups[name])
            kind = ".".join(word for word in name.split(".") if not word.isdecimal())
            sums[kind] = [a + b for a, b in zip(sums.get(kind, (0.0, 0.0)), squares)]
            yield from zip((f"{name}.weight", f"{name}.scale", f"{name}.zero"), parts)
        if stamp(path) != before:
            raise ValueError(f"{path} was replaced meanwhile: quantize it again")

    suffix = f"{mode}.g{group}" if mode == "int4" else mode
    result = path.with_name(f"{path.stem}_{suffix}.pth")
    write_checkpoint(result, outline, tensors_in_turn())
    return result, {kind: (error / max(square, 1e-300)) ** 0.5 for kind, (error, square) in sums.items()}


def run(argv: list[str] | None) -> int:
    parser = Parser(prog="quantize.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="a converted model.pth")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--groupsize", type=int, choices=GROUP_SIZES, default=128, help="of int4")
    args = parser.parse_args(argv)
    result, errors = quantize(args.checkpoint_path, args.mode, args.groupsize)
    before, after = args.checkpoint_path.stat().st_size, result.stat().st_size
    print("\n".join(f"{kind:32} relative error {error:.5f} (RMS)" for kind, error in errors.items()))
    print(f"{before / 1e9:.3f} GB -> {after / 1e9:.3f} GB ({after / before:.2f}): {result}")
    log(f"next: {command_for(result)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command("quantize.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
