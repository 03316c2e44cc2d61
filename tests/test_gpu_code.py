"""The code of compiled steps for an H100 that is not there: what a CUDA graph holds, and how many launches."""

import importlib.util
import shutil
from dataclasses import replace

import pytest
import torch

import gpu
import quantize
from model import Transformer
from quantize import QuantizedLinear
from scripts.published_models import named
from tests.helpers.fake_cuda import Written, compile_for_h100, load_device_guard

N_LAYER = 3
CACHE_SIZE = 4096
MODELS = ["Qwen2.5-7B-Instruct", "Llama-3.1-8B", "Llama-3.2-11B-Vision"]
LAUNCHES = {None: (10, 12), "int8": (10, 12), "int4": (11, 12), "fp8": (10, 12)}  # a layer, of one token and of six

has_tools = importlib.util.find_spec("triton") and shutil.which("g++")
pytestmark = pytest.mark.skipif(
    not has_tools or torch.version.cuda or not torch.__version__.startswith("2.13."),
    reason="for PyTorch 2.13 for CPUs, triton and g++",
)


@pytest.fixture(scope="module", autouse=True)
def device_guard():
    load_device_guard()


@pytest.fixture(autouse=True)
def no_kernel_is_run(monkeypatch):
    monkeypatch.setattr(quantize.TorchLinear, "try_once", lambda layer, dtype: None)


def build(name: str, mode: str | None) -> Transformer:
    """A few layers of a model, ready for a GPU; of Llama-3.2-Vision one of them attends to images."""
    args = replace(named(name), n_layer=N_LAYER)
    args = replace(args, cross_attention_layers=args.cross_attention_layers and (1,))
    model = Transformer(args).to(torch.bfloat16).requires_grad_(False).eval()
    kernels = {"int8": quantize.Int8Cuda, "int4": quantize.Int4Cuda, "fp8": quantize.Fp8Cuda}
    for layer, linear in quantize.linears(model).items() if mode else ():
        small = QuantizedLinear(linear, mode, linear.in_features // 128)
        model.set_submodule(layer, kernels[mode](small, torch.bfloat16))
    with torch.device("cpu"):  # what it computes; the buffers are where the weights are
        model.setup_caches(CACHE_SIZE, 6656 if args.cross_attention_layers else 0)
    gpu.prepare(model)
    return model


def decoder(name: str, mode: str | None) -> gpu.GreedyDecoder:
    module = gpu.GreedyDecoder(build(name, mode))
    module._compiled_call_impl = None  # compiled here
    module.setup()
    return module


def check(written: Written, n_moving: int, n_launches: int) -> None:
    assert not set(written.mutated) & set(written.moving), "a graph cannot write this input where it is"
    assert len(written.moving) <= n_moving, "copied before each replay"
    assert written.launches.total() <= n_launches * N_LAYER + 8, dict(written.launches)


@pytest.mark.parametrize("mode", LAUNCHES)
@pytest.mark.parametrize("name", MODELS)
def test_one_token(name, mode):
    """A replay is all that decoding a token at temperature 0 enqueues."""
    n_tokens = named(name).n_tokens
    written = compile_for_h100(lambda: decoder(name, mode), lambda: (1, n_tokens), gpu.STEP_OPTIONS)
    check(written, 0, LAUNCHES[mode][0])
    assert len(written.mutated) >= 2 * N_LAYER - 1
    assert not {"extern_kernels.mm", "extern_kernels.addmm"} & set(written.launches), "products are Inductor's own"
    n_cross = len(named(name).cross_attention_layers) and 1
    assert sum(n for kernel, n in written.launches.items() if kernel.startswith("triton_tem")) == N_LAYER
    assert n_cross == ("sort_with_index" in written.code)


@pytest.mark.parametrize("name, mode", [(MODELS[0], mode) for mode in LAUNCHES] + [(name, None) for name in MODELS[1:]])
def test_six_tokens(name, mode):
    """A verification."""

    def make_inputs():
        ids = torch.zeros(6, dtype=torch.long, device="cuda")
        return ids, ids.clone(), 512

    torch.compiler.config.dynamic_sources = "L['n_slots']"
    written = compile_for_h100(lambda: build(name, mode), make_inputs, gpu.STEP_OPTIONS)
    check(written, 2, LAUNCHES[mode][1])
