"""Quantized checkpoints and layers: against their dequantized weights, compiled and not, with drafts, and bad input."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
import cpu
import generate
import quantize
from model import ModelArgs, Transformer
from quantize import MODES, QuantizedLinear, dequantize, group_for, pack_layer, quantize_groups, quantize_layer
from scripts.published_models import MODELS, named
from tests.helpers.checkpoints import MAKERS
from tests.helpers.layers import make_layer, relative
from tests.helpers.pictures import draw

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
DTYPES = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # and the relative error that each is allowed
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_layer(mode, dtype, device, compiled):
    """Any number of tokens, with sizes and groups that kernels take and that they do not."""
    torch._dynamo.reset()
    sizes = [(320, 896, 64, True), (70, 96, 128, False), (256, 256, 128, True), (48, 80, 128, False)]
    sizes += [(16, 18944, 128, True), (320, 224, 128, False)]  # the widest of a 7B; a fourth of 896: groups of 32
    sizes += [(64, 72, 128, True)]  # groups of 8
    for n, k, group, bias in sizes[: 2 if compiled else None]:
        layer, reference = make_layer(mode, n, k, group, bias)
        if bias:
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)  # as generate.load does
        packed = pack_layer(layer.to(device), dtype)
        run = torch.compile(packed, dynamic=False, fullgraph=True) if compiled else packed
        for s in (1, 2, 6, 16, 40) if not compiled else (1, 6):
            x = torch.randn(s, k, generator=torch.Generator().manual_seed(s)).to(dtype)
            x[0, 3] = 30.0  # an outlier, as activations have
            y = run(x.to(device))
            assert y.dtype == dtype and y.shape == (s, n)
            assert relative(y.cpu(), reference(x.float())) < DTYPES[dtype], (n, k, s)


@pytest.mark.parametrize(
    "mode, dtype, kernel",
    [
        ("int8", torch.bfloat16, "BlockLinear"),
        ("int8", torch.float32, "BlockLinear"),
        ("int4", torch.bfloat16, "BlockLinear"),
        ("int4", torch.float16, "BlockLinear"),
        ("int4", torch.float32, "Linear"),
        ("fp8", torch.bfloat16, "Linear"),
    ],
)
def test_kernels_of_the_cpu(mode, dtype, kernel):
    """Were a kernel refused everywhere, everything would still be right, and slow."""
    if kernel == "BlockLinear" and cpu.kernels() is None:
        pytest.skip("no C++ compiler")
    assert type(pack_layer(make_layer(mode, 256, 896)[0], dtype)).__name__ == kernel


@pytest.fixture(params=["no-such-compiler", "false"])
def without_compiler(request, monkeypatch, tmp_path):
    cpu.kernels.cache_clear()
    monkeypatch.setenv("CXX", request.param)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    cpu.kernels.cache_clear()


@pytest.mark.parametrize("mode, kernel", [("int8", quantize.Int8Pack), ("int4", quantize.Int4Cpu)])
def test_without_a_compiler(without_compiler, capsys, mode, kernel):
    """What the CPU uses where cpu.cpp cannot be built: PyTorch's products, for bfloat16."""
    layer, reference = make_layer(mode, 256, 896, bias=False)
    x = torch.randn(6, 896).bfloat16()
    packed = pack_layer(layer, torch.bfloat16)
    assert isinstance(packed, kernel)
    assert relative(packed(x), reference(x.float())) < 1e-2
    assert type(pack_layer(layer, torch.float32)) is nn.Linear
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpu.cpp cannot be used")
    assert not list(without_compiler.rglob("*.*")), "nothing half-built stays"


@torch.inference_mode()
@pytest.mark.parametrize("mode, dtype", [("int8", torch.float32), ("int4", torch.float16)])
def test_a_token_does_not_depend_on_its_neighbours(mode, dtype):
    packed = pack_layer(make_layer(mode, 256, 896)[0], dtype)
    if not isinstance(packed, cpu.BlockLinear):
        pytest.skip("no C++ compiler")
    for s in (0, 1, 2, 3, 4, 5, 6, 7, 13):
        x = torch.randn(s, 896).to(dtype) * 10.0 ** torch.randint(-6, 4, (s, 1))
        rows = [packed(row[None]) for row in x.to(dtype)]
        assert torch.equal(packed(x.to(dtype)), torch.cat([packed(x[:0].to(dtype)), *rows]))
    x = torch.randn(20, 896).to(dtype)
    x[7] = float("nan")
    x[9, 5] = float("inf")
    y = packed(x)
    assert torch.equal(y.nan_to_num(), torch.cat([packed(row[None]) for row in x]).nan_to_num())
    assert y[7].isnan().all() and not y[9].isfinite().any(), "what is wrong with a token is seen"
    assert y[[i for i in range(20) if i not in (7, 9)]].isfinite().all()
    torch.set_num_threads(2)
    assert torch.equal(packed(x).nan_to_num(), y.nan_to_num())
    torch.set_num_threads(1)
    with pytest.raises(RuntimeError, match="897 columns"):
        packed(torch.zeros(1, 897, dtype=dtype))
    every_other = torch.randn(3, 1792).to(dtype)[:, ::2]
    assert torch.equal(packed(every_other), packed(every_other.contiguous()))


@pytest.mark.parametrize("group, most", [(32, 0.87), (64, 0.91), (128, 0.93)])
def test_search_beats_minimum_and_maximum(group, most):
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    w[:, ::100] *= 3
    plain = dequantize(*quantize_groups(w, group, shrinks=(1.0,), refits=0))
    found = dequantize(*quantize_groups(w, group))
    squared = [(each - w).square().unflatten(1, (-1, group)).sum(-1) for each in (found, plain)]
    assert (squared[0] <= squared[1]).all(), "of every group"
    assert squared[0].sum() < most * squared[1].sum()


def test_search_heeds_large_weights():
    """The largest of a group is not clipped away, and rounding makes nothing shorter: their sums say what w's say."""
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    w[:, ::128] = 6.0
    found = dequantize(*quantize_groups(w, 128))
    assert (found[:, ::128] - 6).square().mean() < (found - w).square().mean()
    assert abs((found * w).sum() / w.square().sum() - 1) < 2e-3


def test_odd_weights():
    """Rows of zeros, constant groups, tiny and huge numbers."""
    w = torch.zeros(5, 128)
    w[1], w[2], w[3], w[4] = 0.7, 1e-12, 1e4, torch.linspace(-3, 5, 128)
    for mode in MODES:
        parts, *_ = quantize_layer(w, mode, 64)
        found = dequantize(*parts)
        assert found[0].abs().max() == 0 and relative(found, w) < 0.05
        assert all(part.float().isfinite().all() for part in parts)


def test_slices():
    """What tensor parallelism does: rows, and columns, also where a slice cuts a group."""
    for mode in MODES:
        layer, reference = make_layer(mode, 64, 384, bias=False)
        tensors = [t.data for t in (layer.weight, layer.scale, layer.zero) if t is not None]
        assert torch.equal(dequantize(*(t[16:32] for t in tensors)), reference.weight[16:32])
        if layer.zero is not None:  # 3 groups of 128, 2 slices: 6 groups of 64
            tensors[1:] = [t.repeat_interleave(2, 1) for t in tensors[1:]]
        columns = [t.chunk(2, 1)[1] if t.ndim == 2 else t for t in tensors]
        assert torch.equal(dequantize(*columns), reference.weight[:, 192:])


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes(name):
    """Every group divides every layer, and the quantized layers are as small as they should be."""
    args = named(name)
    with torch.device("meta"):
        layers = quantize.linears(Transformer(args))
    for mode, most in {"int8": 0.53, "int4": 0.28, "fp8": 0.53}.items():
        before = after = 0
        for layer in layers.values():
            assert all(group_for(layer.in_features, group) == group for group in quantize.GROUP_SIZES)
            small = QuantizedLinear(layer, mode, layer.in_features // 128)
            before += layer.weight.numel() * 2
            after += sum(p.numel() * p.element_size() for part, p in small.named_parameters() if part != "bias")
        assert after <= most * before


@pytest.fixture(scope="module")
def quantized(pair, tmp_path_factory):
    """The path of a family's quantized checkpoint. Called with a family and a mode."""
    made = {}

    def get(family: str, mode: str) -> Path:
        if (family, mode) not in made:
            folder = tmp_path_factory.mktemp("quantized") / "model"
            shutil.copytree(pair(family).folder, folder)
            flags = ["--checkpoint_path", str(folder / "model.pth"), "--mode", mode, "--groupsize", "32"]
            assert quantize.main(flags) == 0
            made[family, mode] = folder / ("model_int4.g32.pth" if mode == "int4" else f"model_{mode}.pth")
        return made[family, mode]

    return get


@torch.inference_mode()
def logits_of(engine, tokenizer) -> torch.Tensor:
    """Of a prompt, and of tokens after it, one and several."""
    images = [draw(200, 150)] if engine.encoder else []
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "How many circles?"}]
    prompt = engine.build_prompt(tokenizer.encode_chat([{"role": "user", "content": parts}]), images)
    engine.reserve(prompt, 32)
    logits = [engine.model.prefill(prompt)]
    for start, n in ((0, 1), (1, 6)):
        input_pos = torch.arange(len(prompt) + start, len(prompt) + start + n, device=engine.device)
        logits.append(engine.model(prompt.tokens[:n], input_pos).clone())
    return torch.cat(logits).cpu()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", MAKERS)
def test_model_equals_dequantized_model(pair, quantized, family, mode):
    """Quantized, saved, loaded and packed, against the original with rounded weights, in float32."""
    path = quantized(family, mode)
    engine, tokenizer = generate.load(path, device="cpu", dtype=torch.float32)
    reference, _ = generate.load(pair(family).path, device="cpu", dtype=torch.float32, optimize=False)
    names = quantize.linears(reference.model)
    assert {"output", "layers.0.attention.wqkv", "layers.2.feed_forward.w2"} <= set(names)
    for linear in names.values():
        parts, *_ = quantize_layer(linear.weight.data, mode, 32)
        linear.weight = nn.Parameter(dequantize(*parts), requires_grad=False)
    expected = logits_of(reference, tokenizer)
    found = logits_of(engine, tokenizer)
    assert relative(found, expected) < 1e-3
    assert relative(found, logits_of(pair(family).engine, tokenizer)) > 1e-3, "quantized weights are in use"
    again, _ = generate.load(path, device="cpu", dtype=torch.float32)
    assert torch.equal(logits_of(again, tokenizer), found)
    assert torch.equal(engine.model.embedding.weight, pair(family).model.embedding.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_equals_eager(quantized, mode, device, dtype):
    torch._dynamo.reset()
    logits = []
    for compiled in (False, True):
        engine, tokenizer = generate.load(quantized("qwen2", mode), device=device, dtype=dtype)
        if compiled:
            generate.compile_steps(engine)
            if (mode, dtype) == ("int4", torch.float32):  # one is enough for the slowest to compile
                generate.compile_layers(engine)
        logits.append(logits_of(engine, tokenizer))
    assert relative(*logits) < (1e-4 if dtype == torch.float32 else 0.05)


PAIRINGS = [(mode, None) for mode in MODES] + [(None, mode) for mode in MODES] + [("int8", "int4"), ("int4", "int8")]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("target, draft", PAIRINGS)
def test_drafts(pair, quantized, target, draft, compiled):
    """Any pairing says what the target alone says."""
    if compiled and (target, draft) not in [("int8", None), (None, "int8"), ("int4", "int8")]:
        pytest.skip("three are enough for the slow ones")
    torch._dynamo.reset()
    paths = [quantized("qwen2.5-vl", mode) if mode else pair("qwen2.5-vl").path for mode in (target, draft)]
    (engine, tokenizer), (drafter, _) = (generate.load(path, device="cpu", dtype=torch.float32) for path in paths)
    parts = [{"type": "image"}, {"type": "text", "text": "How many circles are there?"}]
    question = tokenizer.encode_chat([{"role": "user", "content": parts}]), [draw(200, 150)], 24
    expected = generate.generate(engine, *question)["token_ids"]
    for each in (engine, drafter):
        if compiled:
            generate.compile_steps(each)
    engine.forget()
    result = generate.generate(engine, *question, draft=generate.Draft(drafter))
    assert result["token_ids"] == expected
    assert result["mean_accepted"] > 0


def test_bandwidth_counts_quantized_weights(pair, quantized):
    whole = generate.weight_bytes(pair("qwen2").model)
    small = generate.weight_bytes(
        generate.load(quantized("qwen2", "int8"), device="cpu", dtype=torch.bfloat16)[0].model
    )
    assert 0.25 * whole < small < 0.4 * whole


def test_in_place_equals_the_file(pair, quantized):
    """What scripts/perplexity.py and scripts/benchmark.py measure is what is loaded."""
    for mode in MODES:
        loaded, tokenizer = generate.load(quantized("qwen2", mode), device="cpu", dtype=torch.float32)
        engine, _ = generate.load(pair("qwen2").path, device="cpu", dtype=torch.float32, optimize=False)
        quantize.quantize_in_place(engine.model, mode, 32, torch.float32)
        cpu.prepare(engine.model)
        assert torch.equal(logits_of(engine, tokenizer), logits_of(loaded, tokenizer))


def test_command_prints_errors_and_sizes(quantized, pair, capsys):
    path = quantized("qwen2", "int8").with_name("model.pth")
    before = path.read_bytes()
    assert quantize.main(["--checkpoint_path", str(path), "--mode", "int8"]) == 0
    out = capsys.readouterr().out
    for kind in ("layers.attention.wqkv", "layers.attention.wo", "layers.feed_forward.w13", "layers.feed_forward.w2"):
        assert kind in out
    assert "output" in out and "GB" in out and "model_int8.pth" in out
    assert path.read_bytes() == before


def test_tied_model_keeps_its_embedding(quantized, pair):
    state = torch.load(quantized("qwen2.5-tied", "int8"), weights_only=True)
    original = torch.load(pair("qwen2.5-tied").path, weights_only=True)
    assert "output.weight" not in original and state["output.weight"].dtype == torch.int8
    assert torch.equal(state["embedding.weight"], original["embedding.weight"])
    assert torch.equal(state["layers.0.attention.wqkv.bias"], original["layers.0.attention.wqkv.bias"])


def test_vision_encoder_is_left_alone(quantized, pair):
    state = torch.load(quantized("qwen2.5-vl", "int4"), weights_only=True)
    original = torch.load(pair("qwen2.5-vl").path, weights_only=True)
    vision = [name for name in original if name.startswith("vision.")]
    assert vision and all(torch.equal(state[name], original[name]) for name in vision)


def test_memory(tmp_path):
    """Peak memory beyond PyTorch's own stays below 1.3 times the larger file."""
    args = {"dim": 1024, "n_layer": 6, "n_head": 16, "n_kv_head": 4, "head_dim": 64, "intermediate_size": 4096}
    args |= {"vocab_size": 32000, "n_tokens": 32000}
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Transformer(ModelArgs(**args)).state_dict().items()}
    path = tmp_path / "model.pth"
    noise = torch.randn(2**20).bfloat16()
    tensors = (
        (name, noise.repeat(shape.numel() // 2**20 + 1)[: shape.numel()].view(shape)) for name, shape in shapes.items()
    )
    checkpoint.write_checkpoint(path, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, tensors)
    (tmp_path / "params.json").write_text(json.dumps({"model": args}))
    code = (
        "import quantize, resource as r, sys; before = r.getrusage(r.RUSAGE_SELF).ru_maxrss;"
        "quantize.main(sys.argv[1:]); print(r.getrusage(r.RUSAGE_SELF).ru_maxrss - before)"
    )
    for mode in MODES:
        flags = ["--checkpoint_path", str(path), "--mode", mode]
        run = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(run.stdout.splitlines()[-1]) * 1024 < 1.3 * path.stat().st_size


def test_bad_input(quantized, tmp_path, capsys, monkeypatch):
    """One line, exit status 2, the original untouched and nothing half-written."""
    folder = tmp_path / "model"
    small = quantized("qwen2", "int8")
    capsys.readouterr()
    shutil.copytree(small.parent, folder, ignore=shutil.ignore_patterns("model_*"))
    path = folder / "model.pth"

    def refuses(*expected: str, mode: str = "int8", flags: tuple = (), checkpoint: Path = path) -> None:
        names, content = sorted(os.listdir(folder)), path.read_bytes()
        assert quantize.main(["--checkpoint_path", str(checkpoint), "--mode", mode, *flags]) == 2
        streams = capsys.readouterr()
        assert streams.out == "" and streams.err.count("\n") == 1 and streams.err.startswith("quantize.py: ")
        assert all(text in streams.err for text in expected), streams.err
        assert sorted(os.listdir(folder)) == names and path.read_bytes() == content

    refuses("missing.pth", checkpoint=folder / "missing.pth")
    refuses("--groupsize 128", "64, 96", mode="int4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
        refuses("disk full")
    shutil.copy(small, folder / "small.pth")
    refuses("small.pth", "already", checkpoint=folder / "small.pth")
    (folder / "broken.pth").write_bytes(path.read_bytes()[:5000])
    refuses("broken.pth", checkpoint=folder / "broken.pth")
    for bad in (float("nan"), float("inf")):
        for name in ("layers.1.feed_forward.w2.weight", "embedding.weight", "layers.0.attention.wqkv.bias"):
            state = torch.load(path, weights_only=True)
            state[name].view(-1)[7] = bad
            torch.save(state, folder / "bad.pth")
            refuses(name, "bad.pth", checkpoint=folder / "bad.pth")
    params = (folder / "params.json").read_text()
    for text in ("{", params.replace('"intermediate_size": 96', '"intermediate_size": 128')):
        (folder / "params.json").write_text(text)
        refuses("params.json")
    (folder / "params.json").unlink()
    refuses("params.json")


@pytest.mark.parametrize("room", [0, 100, 5000, 40_000, None])
def test_full_disk(pair, tmp_path, room):
    """Wherever in the file the disk ends: a process that may not write files beyond `room` bytes."""
    folder = tmp_path / "model"
    shutil.copytree(pair("qwen2").folder, folder)
    before = {file: (folder / file).read_bytes() for file in sorted(os.listdir(folder))}
    code = (
        "import quantize, resource as r, sys; room = int(sys.argv.pop()); r.setrlimit(r.RLIMIT_FSIZE, (room, room));"
        "sys.exit(quantize.main(sys.argv[1:]))"
    )
    flags = ["--checkpoint_path", str(folder / "model.pth"), "--mode", "int8", str(10**9 if room is None else room)]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    if room is None:
        assert done.returncode == 0 and "model_int8.pth" in os.listdir(folder)
        assert (folder / "model_int8.pth").stat().st_size > 40_000, "the others are too small for it"
        return
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "cannot write" in done.stderr, done.stderr
    assert {file: (folder / file).read_bytes() for file in sorted(os.listdir(folder))} == before


def test_flags(capsys):
    mistakes = {"--mode int8": "--checkpoint_path", "--checkpoint_path x --mode int3": "int3"}
    mistakes["--checkpoint_path x --mode int4 --groupsize 48"] = "48"
    for flags, expected in mistakes.items():
        assert quantize.main(flags.split()) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("quantize.py: ") and expected in error


def test_damaged_quantized_checkpoint(quantized, tmp_path):
    """Loading says which tensor does not fit."""
    path = quantized("qwen2", "int8")
    folder = tmp_path / "model"
    shutil.copytree(path.parent, folder)
    state = torch.load(path, weights_only=True)
    for name in ("layers.0.attention.wo.weight", "layers.0.attention.wo.scale", "output.weight"):
        torch.save({key: t for key, t in state.items() if key != name}, folder / path.name)
        with pytest.raises(ValueError, match=name.removesuffix(".scale")):
            generate.load(folder / path.name, device="cpu", dtype=torch.float32)
