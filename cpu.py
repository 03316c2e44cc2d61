"""What CPUs do faster than PyTorch by itself: cpu.cpp, built on first use, and oneDNN's order of weights.

Knows the CPU's instructions, compilers and operators, and in which order cpu.cpp reads weights. Does not know how
weights are quantized (quantize.py), nor what layers are put together to.

Shapes: S tokens, N output features, K input features, G groups of a row, T cache slots, H query heads, G key/value
heads of attention, d head width.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library, nn

import model

FLAGS = ["-O3", "-std=c++17", "-fPIC"]
MAX_HEAD_DIM = 256  # of the attention
TURN = 8  # inputs of int8 and int4 that cpu.cpp reads at a time
MAX_GROUP = 4096  # inputs of a group of int4 whose sums fit 32 bits


class UnsupportedByKernel(Exception):
    """A kernel does not serve this layer, dtype or machine: the next one is tried."""


def cpu_features() -> set[str]:
    """The instruction sets of this CPU as /proc/cpuinfo names them; none where there is no such file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


def target_flag() -> str:
    """What the compiler builds for: CPU_MARCH, a value of its -march (x86-64-v3), or else the CPU at hand."""
    if level := os.environ.get("CPU_MARCH"):
        return f"-march={level}"
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


@cache
def kernels() -> Any:  # a ctypes.CDLL, whose functions have no types
    """cpu.cpp, built when it, its flags or the CPU have changed; None where it cannot be built."""
    try:
        loaded = build_library()
        loaded.register_operators.restype = ctypes.c_bool
        if not loaded.register_operators():
            raise RuntimeError("PyTorch does not take its operators")
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: also no home folder
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else error)
        print(f"cpu.cpp cannot be used, PyTorch's slower kernels are: {reason}", file=sys.stderr)
        return None
    loaded.instruction_set.restype = ctypes.c_char_p
    return loaded


def build_library() -> ctypes.CDLL:
    """From the cache, or else built and put there if it can be written. Raises OSError or CalledProcessError."""
    source, compiler = Path(__file__).with_name("cpu.cpp"), shlex.split(os.environ.get("CXX", "")) or ["g++"]
    pytorch = Path(torch.__file__).parent
    flags, torch_library = [*FLAGS, f"-I{pytorch}/include", target_flag()], f"{pytorch}/lib/libtorch_cpu.so"
    parts = compiler, flags, torch_library, sorted(cpu_features())  # machines may share the cache
    key = hashlib.sha256(source.read_bytes() + repr(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multimodal-gpt-fast"
    target = folder / f"cpu-{key}.so"
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory() as scratch:
        built, linked = f"{scratch}/cpu.o", f"{scratch}/cpu.so"
        # Linked with PyTorch's library, the code uses PyTorch's OpenMP and its threads.
        link = ["-shared", built, "-Wl,--no-as-needed", torch_library, "-o", linked]
        for step in ([*flags, "-c", str(source), "-o", built], link):
            subprocess.run([*compiler, *step], check=True, capture_output=True, text=True)
        loaded = ctypes.CDLL(linked)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}")  # others may do the same at this moment
            shutil.copy(linked, part)
            os.replace(part, target)
    return loaded


def onednn_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products, which oneDNN uses and cpu.cpp does not."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_features()) and not os.environ.get("CPU_MARCH")


def describe() -> str:
    """Which build of cpu.cpp serves."""
    return f"cpu.cpp for {kernels().instruction_set().decode()}" if kernels() else "PyTorch's CPU kernels"


def define(schema: str, shape: Callable | None = None) -> Callable:
    """An operator of ours. shape: what it returns, without the numbers, if compiled code calls it."""
    name, bracket, rest = schema.partition("(")
    library.define(f"multimodal_gpt_fast::{name}", bracket + rest)
    if shape:
        library.register_fake(f"multimodal_gpt_fast::{name}", shape)
    return getattr(torch.ops.multimodal_gpt_fast, name).default


# cpu.cpp's, which serve once kernels() was called. They raise RuntimeError for dtypes and sizes that do not fit.

# [S, N] of x [S, K], float32 or bfloat16, and the parts of a RowLinear or BlockLinear.
product = define(
    "product(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int n) -> Tensor",
    lambda x, weight, scale, bias, n: x.new_empty(x.shape[0], n),  # len() would fix a size that may vary
)
# model.attend, in bfloat16.
attend = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor",
    lambda q, k, v, mask: q.new_empty(q.shape[1], q.shape[0] * q.shape[2]),
)
# The others are for eager code: Inductor merges what they do with what stands around it.
# What model.Attention does between its two products, in bfloat16.
self_attention = define(
    "self_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor input_pos, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor? mask) -> Tensor"
)
# F.rms_norm of x [S, K] and weight [K], both bfloat16, computed in float32 and rounded once.
rms_norm = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
# F.silu(gate) * up of [gate, up] [S, 2 * K], likewise.
silu_product = define("silu_product(Tensor x) -> Tensor")


class Attend(nn.Module):
    """cpu.cpp's attention, in the place of model.Attend."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask)


class Attention(model.Attention):
    """In one call what model.Attention does between its products."""

    def setup_cache(self, n_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        super().setup_cache(n_slots, device, dtype)
        shorten_lookups(self)

    def forward(self, x: Tensor, step: model.Step) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x, step)
        caches = self.k_cache, self.v_cache
        return self.wo(self_attention(self.wqkv(x), step.cos, step.sin, step.input_pos, *caches, step.mask))


class FeedForward(model.FeedForward):
    """With the activation in one call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.compiler.is_compiling() else self.w2(silu_product(self.w13(x)))


class RMSNorm(nn.RMSNorm):
    """A decoder's norm in one call. A token of 896 numbers: 19 us, PyTorch's eight take 58 (AMD EPYC, Zen 1)."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        kind = norm.weight.device.type, norm.weight.dtype
        if kind != ("cpu", torch.bfloat16) or norm.eps is None or kernels() is None:
            raise UnsupportedByKernel
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or torch.compiler.is_compiling():
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class RowLinear(nn.Module):
    """cpu.cpp's product of bfloat16 weights where they are, row after row, for any number of tokens."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        device, dtype = linear.weight.device.type, linear.weight.dtype
        if (device, dtype) != ("cpu", torch.bfloat16) or onednn_has_bfloat16() or kernels() is None:
            raise UnsupportedByKernel
        self.weight = frozen(linear.weight.data.contiguous())
        self.bias = None if linear.bias is None else frozen(linear.bias.data.float())
        self.out_features, self.in_features = linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            return self(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return product(x, self.weight, None, self.bias, self.out_features)


class BlockLinear(nn.Module):
    """cpu.cpp's product of int8 and int4 weights, for any number of tokens.

    layer: a quantize.QuantizedLinear: weight, scale, zero (None of int8) and bias as its docstring has them.
    """

    def __init__(self, layer: Any, dtype: torch.dtype):
        super().__init__()
        int4, groups = layer.zero is not None, layer.scale[0].numel()
        self.out_features = layer.weight.shape[0]
        self.in_features = layer.weight.shape[1] * (2 if int4 else 1)
        exact = int4 and dtype == torch.float32  # which is asked for where results must be exact
        width = self.in_features // groups
        if exact or self.in_features % (groups * TURN) or int4 and width > MAX_GROUP or kernels() is None:
            raise UnsupportedByKernel
        block, order = kernels().block_outputs(), order_int4 if int4 else order_int8
        rows = whole_blocks(layer.weight.data, block).split(2048)
        scale = whole_blocks(layer.scale.data, block)
        if int4:  # [N / block, G, block, 2]
            lines = torch.stack((scale, whole_blocks(layer.zero.data, block)), dim=-1)
            scale = lines.unflatten(0, (-1, block)).transpose(1, 2).contiguous()
        self.weight, self.scale = frozen(torch.cat([order(part, block) for part in rows])), frozen(scale)
        self.bias = None if layer.bias is None else frozen(layer.bias.data.float())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float() if x.dtype == torch.float16 else x
        return product(rows, self.weight, self.scale, self.bias, self.out_features).to(x.dtype)


def whole_blocks(rows: Tensor, block: int) -> Tensor:
    """Filled up with rows of zeros."""
    missing = -len(rows) % block
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows.contiguous()


def order_int8(weight: Tensor, block: int) -> Tensor:
    """[N, K] as [N / block, K / 4, block, 4] codes, w + 128; of four, the second and the third change places."""
    codes = (weight.view(torch.uint8) ^ 128).view(-1, block, weight.shape[1] // 4, 2, 2)
    return codes.transpose(3, 4).transpose(1, 2).reshape(weight.shape)


def order_int4(weight: Tensor, block: int) -> Tensor:
    """[N, K/2] as [N / block, K / 8, block] numbers of 32 bits: column 2j at bit 4j, column 2j + 1 at bit 16 + 4j."""
    codes = weight.view(-1, block, weight.shape[1] // 4, 4).transpose(1, 2).int()
    lanes = [(codes[..., j] >> 4) << 4 * j | (codes[..., j] & 15) << 16 + 4 * j for j in range(4)]
    return (lanes[0] | lanes[1] | lanes[2] | lanes[3]).contiguous().view(torch.uint8).reshape(weight.shape)


def multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# An operator of its own, because Inductor takes oneDNN's for constant weights only.
packed_product = define(
    "packed_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
library.impl("multimodal_gpt_fast::packed_product", "CompositeExplicitAutograd", multiply_packed)  # weight: oneDNN's


class PackedLinear(nn.Module):
    """An unquantized layer of a decoder whose weights lie in the order in which oneDNN reads them.

    For float32, and for bfloat16 on CPUs that have instructions for it. One token on Qwen2.5-0.5B's layers, 2 cores of
    an AMD EPYC (Zen 5), bfloat16: 42 GB/s, as fast as reading (nn.Linear 22); six tokens 39 (18); float32 40 (17).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if linear.weight.dtype == torch.bfloat16 and not onednn_has_bfloat16():
            raise UnsupportedByKernel
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, 1)
        except (RuntimeError, AttributeError) as error:  # another device or dtype; a PyTorch without oneDNN
            raise UnsupportedByKernel from error
        self.weight, self.bias = frozen(packed), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        multiply = packed_product if torch.compiler.is_compiling() else multiply_packed  # which is 10 us faster
        return multiply(x, self.weight, self.bias)


def replace_linears(module: nn.Module, kinds: tuple[type, ...], label: str = "") -> dict[str, Counter[str]]:
    """Put the first of the kinds that serves a layer in its place; returns prepare's counts, under label + dtype."""
    counts: dict[str, Counter[str]] = {}
    for name in [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]:
        layer = module.get_submodule(name)
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        for kind in kinds:
            with contextlib.suppress(UnsupportedByKernel):
                layer = kind(layer)
                break
        module.set_submodule(name, layer)
        counts.setdefault(label + dtype, Counter())[type(layer).__name__] += 1
    return counts


def replace_attention(decoder: model.Transformer) -> None:
    weight, head_dim = decoder.norm.weight, decoder.args.head_dim  # the caches have its device and dtype
    fits = (weight.device.type, weight.dtype) == ("cpu", torch.bfloat16)
    if not fits or head_dim % 2 or head_dim > MAX_HEAD_DIM or kernels() is None:
        return
    for name, module in list(decoder.named_modules()):
        if isinstance(module, model.Attend):
            decoder.set_submodule(name, Attend())
        for kind in (Attention, FeedForward):
            if type(module) is kind.__base__:
                module.__class__ = kind  # of the same parts


def replace_norms(decoder: model.Transformer) -> None:
    for name, norm in [item for item in decoder.named_modules() if isinstance(item[1], nn.RMSNorm)]:
        with contextlib.suppress(UnsupportedByKernel):
            decoder.set_submodule(name, RMSNorm(norm))


def shorten_lookups(module: nn.Module) -> None:
    """Let modules find their parts like any attribute, in 0.1 us; nn.Module.__getattr__ takes 4 us, and a layer has 20.

    Assigning another part to a module removes the short cut. For modules that stay on this device.
    """
    for part in module.modules():
        part.__dict__.update(part._modules | part._parameters | part._buffers)


def prepare(module: nn.Module) -> dict[str, Counter[str]]:
    """Make a loaded decoder, quantized or not, or an encoder fast on the CPU. On another device it stays as it is.

    Returns for each dtype (of an encoder: "encoder " and the dtype) how many of its linear layers, those not quantized,
    are of which class then.
    """
    if not isinstance(module, model.Transformer):
        return replace_linears(module, (RowLinear,), "encoder ")  # where oneDNN is fast, nn.Linear uses it
    replace_attention(module)
    replace_norms(module)
    counts = replace_linears(module, (PackedLinear, RowLinear))
    shorten_lookups(module)
    return counts
