"""What CPUs do faster than PyTorch by itself: cpu.cpp, built on first use, and oneDNN's order of weights.

Knows the CPU's instructions, compilers and operators. Does not know how weights are quantized and packed (quantize.py),
nor what layers are put together to.

Shapes: S tokens, N output features, K input features, T cache slots, H query heads, G key/value heads, d head width.
"""

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, library, nn

import model

# -fno-tree-pre: with that optimization GCC keeps more values than there are registers. -fopenmp is for compiling only:
# linked without it, and with PyTorch's library, the code uses the OpenMP that PyTorch uses, and its threads.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-tree-pre"]
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}  # as /proc/cpuinfo names them
USEFUL = {"avx512_bf16"}
MAX_HEAD_DIM = 256  # of the attention
SLAB = 1024  # tokens that it works on at a time, so that what it needs meanwhile stays small


@cache
def kernels() -> ctypes.CDLL | None:
    """cpu.cpp, built when it or its flags have changed; None where it cannot run or cannot be built."""
    info = Path("/proc/cpuinfo")
    features = set(info.read_text().split()) if info.exists() else set()
    if not NEEDED <= features:
        return None
    try:
        loaded = build_library(sorted((NEEDED | USEFUL) & features))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: no home folder
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else error)
        print(f"cpu.cpp cannot be used, PyTorch's slower kernels are: {reason}", file=sys.stderr)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.block_product.argtypes = [ctypes.c_int] * 3 + [pointer] * 5 + [number] * 4
    loaded.attend.argtypes = [ctypes.c_int, number] + [pointer] * 5 + [number] * 9
    loaded.block_product.restype = loaded.attend.restype = None
    return loaded


def build_library(features: list[str]) -> ctypes.CDLL:
    """From the cache, or else built and put there if it can be written. Raises OSError or CalledProcessError."""
    source, compiler = Path(__file__).with_name("cpu.cpp"), shlex.split(os.environ.get("CXX", "")) or ["g++"]
    flags = FLAGS + [f"-m{feature.replace('_', '')}" for feature in features]
    torch_library = str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")
    key = hashlib.sha256(source.read_bytes() + repr([compiler, flags, torch_library]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multimodal-gpt-fast"
    target = folder / f"cpu-{key}.so"
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory() as scratch:
        built, linked = f"{scratch}/cpu.o", f"{scratch}/cpu.so"
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


def make_operator(schema: str, backend: str, run: Callable, shape: Callable) -> Callable:
    """An operator that compiled code calls as it is. shape: what it returns, without the numbers."""
    name, bracket, rest = schema.partition("(")
    full_name = f"multimodal_gpt_fast::{name}"
    library.define(full_name, bracket + rest)
    library.impl(full_name, backend, run)
    library.register_fake(full_name, shape)
    operator = getattr(torch.ops.multimodal_gpt_fast, name)

    def call(*inputs):
        # The way through the operator takes 2 us longer, all in all a twentieth of an eager step in int4.
        seen = torch.compiler.is_compiling() or torch.autograd._profiler_enabled()
        return (operator if seen else run)(*inputs)

    return call


def multiply_blocks(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """[S, N] of x [S, K], float32 or bfloat16, and the parts of a quantize.BlockLinear. RuntimeError for another K."""
    bits, groups = (8, 1) if scale.dtype == torch.float32 else (4, scale.shape[1])
    if x.shape[1] * bits != weight.shape[1] * 8:
        raise RuntimeError(f"{x.shape[1]} columns times weights of {weight.shape[1] * 8 // bits}")
    x, y = x.contiguous(), x.new_empty(len(x), n)
    offset = None if bias is None else bias.data_ptr()
    pointers = x.data_ptr(), weight.data_ptr(), scale.data_ptr(), offset, y.data_ptr()
    is_float, threads = x.dtype == torch.float32, torch.get_num_threads()
    kernels().block_product(bits, is_float, threads, *pointers, len(x), n, x.shape[1], groups)
    return y


block_product = make_operator(
    "block_product(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int n) -> Tensor",
    "CPU",
    multiply_blocks,
    lambda x, weight, scale, bias, n: x.new_empty(x.shape[0], n),  # len() would fix a size that may vary
)


def run_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """model.attend, for bfloat16 on the CPU.

    Qwen2.5-0.5B's heads, 2 cores of an AMD EPYC (Zen 5): a token looks at 256 slots in 11 us and at 8192 in 130 (31
    GB/s), where PyTorch takes 50 and 606; six tokens in 24 and 450 (94 and 1760); a prompt of 4096 in 71 ms (204).
    """
    q, mask = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, mask))
    (n_head, n_tokens, head_dim), (n_kv_head, n_slots, _) = q.shape, k.shape
    if k.stride() != v.stride() or k.stride(1) != head_dim:  # parts of caches are read where they are
        k, v = k.contiguous(), v.contiguous()
    y = q.new_empty(n_tokens, n_head * head_dim)
    strides = q.stride(0), q.stride(1), k.stride(0), 0 if mask is None else mask.stride(0)
    for i in range(0, n_tokens, SLAB):
        pointers = q.data_ptr() + 2 * i * strides[1], k.data_ptr(), v.data_ptr()  # 2 bytes a number
        pointers += mask if mask is None else mask.data_ptr() + i * strides[3], y.data_ptr() + 2 * i * y.stride(0)
        sizes = n_head, n_kv_head, min(SLAB, n_tokens - i), n_slots, head_dim
        n_seen = i + 1 if mask is None else n_slots
        kernels().attend(torch.get_num_threads(), n_seen, *pointers, *sizes, *strides)
    return y


attend = make_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor",
    "CPU",
    run_attention,
    lambda q, k, v, mask: q.new_empty(q.shape[1], q.shape[0] * q.shape[2]),
)


class Attend(nn.Module):
    """In the place of model.Attend."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask)


# An operator of its own, because Inductor takes oneDNN's for constant weights only.
packed_product = make_operator(
    "packed_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "CompositeExplicitAutograd",  # the weight is oneDNN's
    lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)


class PackedLinear(nn.Module):
    """A layer that was never quantized, on the CPU: its weights in the order in which oneDNN reads them.

    One token on Qwen2.5-0.5B's layers, 2 cores of an AMD EPYC (Zen 5), bfloat16: 42 GB/s, as fast as reading, where
    nn.Linear has 22; six tokens 39 (18); float32 40 (17).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, 1)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self.weight, self.bias)


def pack_whole(module: nn.Module) -> None:
    """Put PackedLinear in the place of layers that are not quantized, where oneDNN takes their device and dtype."""
    for name in [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]:
        with contextlib.suppress(RuntimeError, AttributeError):
            module.set_submodule(name, PackedLinear(module.get_submodule(name)))


def prepare(transformer: model.Transformer) -> None:
    """Make a loaded decoder, quantized or not, fast on the CPU. On another device it stays as it is."""
    pack_whole(transformer)
    weight, head_dim = transformer.norm.weight, transformer.args.head_dim  # the caches have its device and dtype
    fits = (weight.device.type, weight.dtype) == ("cpu", torch.bfloat16)
    if fits and head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM and kernels():
        for layer in transformer.layers:
            layer.attention.attend = Attend()
