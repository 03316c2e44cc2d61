"""The code that Inductor writes for an H100 that is not there, on a CPU build of PyTorch 2.13 with triton beside it.

FakeTensorMode has tensors without memory on "cuda"; what Inductor asks the driver is answered here; the code that it
writes is caught before anything would be loaded or run.
"""

import contextlib
import ctypes
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


@dataclass
class Written:
    """What Inductor wrote for one compiled call."""

    code: str
    moving: list[str]  # inputs that a replay copies first: all but parameters and buffers
    mutated: list[str]  # inputs that the call writes to

    @property
    def launches(self) -> Counter:
        """Kernels and calls of libraries, by name."""
        body = self.code[self.code.index("def partition_0" if "def partition_0" in self.code else "def call(") :]
        kernel = r"(triton_\w+)\.run|(extern_kernels\.\w+)\(|(torch\.ops\.[\w.]+)\(|(aten\.\w+)"
        found = re.findall(rf"^\s+(?:\w+ = )?(?:{kernel})", body, re.M)
        return Counter(next(filter(None, groups)) for groups in found)


class Caught(Exception):
    pass


def load_device_guard() -> None:
    source, library = Path(__file__).with_name("no_gpu.cpp"), Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/guard.so"
        paths = [f"-I{library}/include", str(source), f"-L{library}/lib", "-lc10", "-o", target]
        subprocess.run(["g++", "-std=c++20", "-fPIC", "-shared", *paths], check=True)
        ctypes.CDLL(target)


def patches() -> Iterator:
    """What takes the place of the driver."""
    import torch._inductor.codecache
    from torch._dynamo import device_interface
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch.utils import _triton

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "synchronize": None,
        "is_bf16_supported": True,
        "get_device_name": H100.name,
        "_is_compiled": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_device": None,
        "set_rng_state": None,
        "is_initialized": False,
        "get_arch_list": ["sm_90"],
        "current_stream": SimpleNamespace(cuda_stream=0),
    }
    answer = lambda value: lambda *args, **rest: value
    yield from (mock.patch.object(torch.cuda, name, answer(value)) for name, value in answers.items())
    yield mock.patch.object(torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8))
    cuda = device_interface.CudaInterface
    own = {"get_compute_capability": 90, "is_triton_capable": True, "get_raw_stream": 0}
    own |= {"exchange_device": 0, "maybe_exchange_device": 0}
    shared = "get_device_properties current_device device_count synchronize is_bf16_supported set_device is_available"
    own |= {name: answers[name] for name in shared.split()}
    for name, value in own.items():
        yield mock.patch.object(cuda, name, staticmethod(answer(value)), create=True)
    for name in ("get_device_properties", "current_device"):
        yield mock.patch.object(cuda.Worker, name, staticmethod(answer(answers[name])))
    on_cpu = lambda init: lambda *args: init(torch.device("cpu"))  # constants there are real tensors
    inits = {fuse_attention: "_sfdp_init", pad_mm: "_pad_mm_init", misc_patterns: "_misc_patterns_init"}
    yield from (mock.patch.object(module, name, on_cpu(getattr(module, name))) for module, name in inits.items())
    yield mock.patch.object(_triton, "triton_hash_with_backend", answer("0"))
    settings = {"compile_threads": 1, "shape_padding": False, "joint_graph_constant_folding": False}
    yield torch._inductor.config.patch(settings | {"fx_graph_cache": False, "force_disable_caches": True})


def on_cuda(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A module on meta, with fake tensors on cuda in the place of its own."""
    for child in module.modules():
        for store in (child._parameters, child._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    device = torch.device("cuda:0")
                    fake = mode.fake_tensor_converter.from_meta_and_device(mode, tensor.detach(), device)
                    is_parameter = store is child._parameters
                    store[name] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    return module


def compile_for_h100(build: Callable[[], nn.Module], make_inputs: Callable[[], tuple], options: dict) -> Written:
    """build() on meta makes a module; compiled with options, it is called with make_inputs()."""
    import torch._inductor.compile_fx as compile_fx
    from torch._dynamo import device_interface
    from torch._inductor.graph import GraphLowering

    caught = Written("", [], [])
    codegen = compile_fx.fx_codegen_and_compile

    def look(graph_module, example_inputs, inputs_to_check, **rest):
        nodes, static = graph_module.graph.nodes, rest.get("static_input_idxs", ())
        inputs = [node.name for node in nodes if node.op == "placeholder"]
        caught.moving = [name for i, name in enumerate(inputs) if i not in static]
        writes = ("copy_.default", "index_put_.default")
        caught.mutated = [node.args[0].name for node in nodes if str(node.target).endswith(writes)]
        return codegen(graph_module, example_inputs, inputs_to_check, **rest)

    def stop(graph, value):
        caught.code = value.value
        raise Caught

    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        for patch in patches():
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(compile_fx, "fx_codegen_and_compile", look))
        stack.enter_context(mock.patch.object(GraphLowering, "_compile_to_module_lines", stop))
        device_interface.get_interface_for_device("cuda")
        interfaces = {name: device_interface.CudaInterface for name in ("cuda", "cuda:0")}
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        with torch.device("meta"):
            module = build()
        with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            compiled = torch.compile(on_cuda(module, mode), fullgraph=True, options=options, dynamic=False)
            try:
                compiled(*make_inputs())
            except Exception:
                if not caught.code:
                    raise
    torch._dynamo.reset()
    return caught
