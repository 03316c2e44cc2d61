"""cpu.cpp's attention and products, for every CPU that it is built for here, and oneDNN's order of weights."""

import copy
import platform
import shutil

import pytest
import torch
from torch import nn

import cpu
import generate
import model
import quantize
from tests.helpers.layers import make_layer, relative
from tests.helpers.pictures import draw

# What CPU_MARCH is set to; "" is the CPU at hand, which runs the others too.
LEVELS = ["", "x86-64-v3"] if "avx512bw" in cpu.cpu_features() else [""]
OTHERS = ["x86-64-v2", "x86-64-v3"] if "avx2" in cpu.cpu_features() else []
HEADS = [(14, 2, 64), (16, 2, 128), (4, 4, 80), (16, 16, 72), (6, 2, 96), (2, 1, 16), (3, 3, 34), (8, 1, 256)]
SIZES = [(1, 1), (1, 700), (6, 64), (6, 1111), (20, 150), (70, 70), (130, 300), (1100, 1100), (1, 5000)]


@pytest.fixture
def can_build():
    if cpu.kernels() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def build(can_build, monkeypatch):
    """Called with a level: cpu.cpp built for it serves from then on."""

    def change(level: str) -> None:
        monkeypatch.setenv("CPU_MARCH", level)
        cpu.kernels.cache_clear()
        assert cpu.kernels()

    yield change
    cpu.kernels.cache_clear()


@pytest.fixture(params=LEVELS, ids=lambda level: level or platform.machine())
def each_build(build, request):
    build(request.param)


def draw_inputs(n_head, n_kv_head, head_dim, n_tokens, n_slots):
    """Queries and values as they lie in a model's wide products and caches: with gaps."""
    generator = torch.Generator().manual_seed(n_head + n_tokens + n_slots)
    normal = lambda *shape: torch.randn(shape, generator=generator).bfloat16()
    q = normal(n_tokens, n_head + 3, head_dim)[:, :n_head].transpose(0, 1) * 2
    k, v = (normal(n_kv_head, n_slots + 5, head_dim)[:, :n_slots] for _ in range(2))
    return q, k, v, torch.rand(n_tokens, n_slots, generator=generator) < 0.4


def error(y, q, k, v, mask) -> float:
    expected = model.attend(q.double(), k.double(), v.double(), mask)
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@torch.inference_mode()
def test_attention(each_build, heads, n_threads):
    """A token and several, few slots and many, whole blocks and not, every kind of mask, one part and several."""
    torch.set_num_threads(n_threads)
    for n_tokens, n_slots in SIZES:
        q, k, v, mask = draw_inputs(*heads, n_tokens, n_slots)
        mask[:, n_slots // 2] = True  # no row sees nothing
        ones = torch.ones_like(mask)
        assert error(cpu.attend(q, k, v, mask), q, k, v, mask) < 5e-3
        assert error(cpu.attend(q, k, v, mask[:1].expand(n_tokens, -1)), q, k, v, mask[:1].expand(n_tokens, -1)) < 5e-3
        assert error(cpu.attend(q, k, v, ones), q, k, v, ones) < 5e-3
        if n_tokens == n_slots:
            assert error(cpu.attend(q, k, v, None), q, k, v, ones.tril()) < 5e-3
            rows = torch.stack((k, v), dim=2).transpose(0, 1).contiguous()  # [T, G, 2, d]
            assert error(cpu.attend(q, *rows.permute(2, 1, 0, 3), None), q, k, v, ones.tril()) < 5e-3
    torch.set_num_threads(1)


@torch.inference_mode()
def test_attention_keeps_tokens_apart(each_build):
    """A token depends on those beside it as little as on slots that it does not see; what is broken is seen."""
    q, k, v, mask = draw_inputs(14, 2, 64, 9, 333)
    mask[:, 0], mask[:, 300:] = True, False
    y = cpu.attend(q, k, v, mask)
    for i in range(9):
        assert torch.equal(cpu.attend(q[:, i : i + 1], k, v, mask[i : i + 1]), y[i : i + 1])
    k[:, 300:], v[:, 300:] = 1e30, -1e30
    assert torch.equal(cpu.attend(q, k, v, mask), y)
    q[3, 4], v[1, 0, 7] = float("nan"), float("inf")
    broken = cpu.attend(q, k, v, mask).unflatten(1, (14, 64))
    assert broken[4, 3].isnan().all() and broken[:, 7:, 7].isinf().all()
    assert torch.equal(broken[:4, :7], y.unflatten(1, (14, 64))[:4, :7])
    mask[2] = False
    assert cpu.attend(q, k, v, mask)[2].isnan().all(), "as PyTorch's, where there is nothing to see"


@torch.inference_mode()
def test_extreme_scores(each_build):
    """Weights that differ by more than float32 holds, and a largest score that comes late."""
    q, k, v, _ = draw_inputs(2, 1, 64, 1, 1000)
    for scale in (0.0, 1e3, 1e15):
        late = k.clone()
        late[0, 990] = q[0, 0] * 2
        mask = torch.ones(1, 1000, dtype=torch.bool)
        assert error(cpu.attend(q * scale, late, v, mask), q * scale, late, v, mask) < 5e-3


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-hf", "llama-3.2-vision", "qwen2", "llama3.1"])
@torch.inference_mode()
def test_the_models_use_it(can_build, pair, family):
    """In bfloat16 it is in the place of PyTorch's, and says the same but for rounding."""
    logits = {}
    for dtype, name in ((torch.bfloat16, "plain"), (torch.bfloat16, "prepared"), (torch.float32, "exact")):
        engine, tokenizer = generate.load(pair(family).path, device="cpu", dtype=dtype, optimize=name == "prepared")
        if name == "prepared":
            assert all(type(layer.attention.attend) is cpu.Attend for layer in engine.model.layers)
            assert {type(layer.feed_forward) for layer in engine.model.layers} == {cpu.FeedForward}
            kinds = {type(layer.attention) for layer in engine.model.layers}
            assert kinds == {cpu.Attention} or kinds == {cpu.Attention, model.CrossAttention}
        tokens = tokenizer.encode_request({"prompt": "How many circles are there?"})[0]
        prompt = engine.build_prompt(tokens, [])
        engine.model.setup_caches(512, 64 if engine.model.args.cross_attention_layers else 0)
        following = torch.arange(6), torch.arange(6) + len(prompt)
        logits[name] = torch.cat((engine.model.prefill(prompt), engine.model(*following, 128))).float()
    plain, prepared = ((logits[name] - logits["exact"]).norm() for name in ("plain", "prepared"))
    assert prepared < 1.5 * plain
    cpu.prepare(engine.model)
    assert all(type(layer.attention.attend) is model.Attend for layer in engine.model.layers), "float32 stays exact"


@pytest.mark.parametrize("heads", [(14, 2, 64), (4, 4, 34)], ids=str)
@torch.inference_mode()
def test_self_attention(each_build, heads):
    """Queries and keys are rotated, keys and values cached, and nothing else in the caches changes."""
    n_head, n_kv_head, head_dim = heads
    args = model.ModelArgs(32, 1, n_head, n_kv_head, head_dim, 32, vocab_size=32, n_tokens=32)
    exact, ours = model.Attention(args).double(), model.Attention(args).bfloat16()
    ours.load_state_dict(exact.state_dict())
    exact.load_state_dict(ours.state_dict())  # as rounded
    ours.attend, ours.__class__ = cpu.Attend(), cpu.Attention
    for attention, dtype in ((exact, torch.double), (ours, torch.bfloat16)):
        attention.setup_cache(200, torch.device("cpu"), dtype)
    cos, sin = model.rope_table(torch.randn(70, head_dim // 2))
    for first, n, length in ((0, 70, None), (70, 6, 90), (76, 1, 200)):
        slots = torch.arange(first, first + n)
        mask = length and torch.arange(length) <= slots[:, None]
        x, step = torch.randn(n, 32).bfloat16(), model.Step(cos[:n], sin[:n], slots, mask, None, None)
        assert relative(ours(x, step), exact(x.double(), step)) < 0.01
        for cache, same in ((ours.k_cache, exact.k_cache), (ours.v_cache, exact.v_cache)):
            assert relative(cache[:, slots], same[:, slots]) < 0.01 and not cache[:, first + n :].any()
    for slot in (-1, 200):
        with pytest.raises(RuntimeError, match="no such slot"):
            ours(x, step._replace(input_pos=torch.tensor([slot])))


@torch.inference_mode()
def test_a_profile_shows_the_operators(can_build):
    q, k, v, mask = draw_inputs(4, 2, 32, 1, 64)
    with torch.profiler.profile() as profiler:
        cpu.attend(q, k, v, mask)
    assert "multimodal_gpt_fast::attention" in {event.key for event in profiler.key_averages()}


def test_the_library_is_built_anew(can_build, monkeypatch, tmp_path):
    """With no cache, with a broken one, for another CPU, and where none can be written."""
    monkeypatch.setattr(cpu, "FLAGS", ["-O0", "-std=c++17", "-fPIC"])  # faster to build
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu.build_library()
    (library,) = tmp_path.rglob("*.*")
    library.unlink()
    library.write_bytes(b"broken")
    assert cpu.build_library()
    assert library.stat().st_size > 1000, "put in its place"
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "cpu_features", lambda: {"another"})
        assert cpu.build_library()
    assert len(list(tmp_path.rglob("*.so"))) == 2, "machines may share the cache"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu.build_library()


@pytest.mark.parametrize("n, k", [(320, 896), (70, 96), (33, 50), (5, 7), (16, 5000)])
@torch.inference_mode()
def test_bfloat16_rows(each_build, monkeypatch, n, k):
    """Any number of tokens and any size, whole registers or not, also weights that are a part of others."""
    torch.manual_seed(n)
    monkeypatch.setattr(cpu, "onednn_has_bfloat16", lambda: False)
    plain = nn.Linear(k, n).bfloat16().requires_grad_(False)
    plain.weight.data = torch.randn(n + 3, k).bfloat16()[2:-1]
    packed = cpu.RowLinear(plain)
    assert packed.weight.data_ptr() == plain.weight.data_ptr(), "no second copy"
    exact = copy.deepcopy(plain).double()
    for s in (0, 1, 2, 3, 4, 5, 6, 7, 13, 100):
        x = torch.randn(s, k).bfloat16()
        y = packed(x)
        assert y.dtype == torch.bfloat16 and y.shape == (s, n)
        assert s == 0 or relative(y, exact(x.double())) < 3e-3
        assert torch.equal(packed(x.view(1, s, k)), y[None]), "an encoder's shape"
        assert s == 0 or relative(cpu.product(x.float(), packed.weight, None, packed.bias, n), exact(x.double())) < 1e-6
    x = torch.randn(8, k).bfloat16()
    y = packed(x)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    broken = packed(x)
    assert broken[1].isnan().all() and not broken[2].isfinite().any()
    assert torch.equal(broken[3:], y[3:]) and torch.equal(broken[0], y[0])
    torch.set_num_threads(2)
    assert torch.equal(packed(x).nan_to_num(), broken.nan_to_num())
    torch.set_num_threads(1)


@pytest.mark.parametrize("k", [896, 37])
@torch.inference_mode()
def test_norm(each_build, k):
    plain = nn.RMSNorm(k, 1e-6).bfloat16().requires_grad_(False)
    plain.weight.data.copy_(torch.randn(k))
    packed = cpu.RMSNorm(plain)
    for s in (0, 1, 6, 40):
        x = torch.randn(s, k).bfloat16() * 10
        exact = nn.functional.rms_norm(x.double(), (k,), plain.weight.double(), 1e-6)
        assert s == 0 or relative(packed(x), exact) < 3e-3
    x[2, 1], x[3] = float("nan"), 0.0
    assert packed(x)[2].isnan().all() and packed(x)[3].eq(0).all()
    assert packed(x[None]).shape == (1, 40, k), "several dimensions are PyTorch's"


@pytest.mark.parametrize("k", [4864, 37, 1])
@torch.inference_mode()
def test_activation(each_build, k):
    for s in (0, 1, 6, 40):
        x = torch.randn(s, 2 * k).bfloat16() * 10
        gate, up = x.double().chunk(2, dim=-1)
        assert s == 0 or relative(cpu.silu_product(x), nn.functional.silu(gate) * up) < 3e-3
    x[:, k:], x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 2.0, float("nan"), float("inf"), 1e30, -1e30
    x[4, 0] = -3e38
    y = cpu.silu_product(x)
    assert y[0, 0].isnan() and y[1, 0] == float("inf") and 1.9e30 < y[2, 0] < 2.1e30 and y[3:5, 0].abs().max() < 1e-6
    assert y[:, 1:].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize("mode", ["int8", "int4"])
@torch.inference_mode()
def test_largest_sums(each_build, mode):
    """Weights and activations that are as large as they can be, all of one sign: no sum of integers overflows."""
    for k, group in ((18944, 128), (4096, 4096)):
        layer, _ = make_layer(mode, 40, k, group, bias=False)
        code = 127 if mode == "int8" else 0xFF
        for sign in (1, -1):
            layer.weight.data.fill_(code if sign > 0 or mode == "int4" else -code)
            if mode == "int4":
                layer.weight.data[1::2] = 0
                layer.scale.data.fill_(1.0), layer.zero.data.fill_(0.0)
            expected = quantize.dequantize(*(t.data for t in (layer.weight, layer.scale, layer.zero) if t is not None))
            packed = quantize.pack_layer(layer, torch.bfloat16)
            assert isinstance(packed, cpu.BlockLinear)
            x = torch.full((7, k), 3.0)
            x[1], x[2, ::2] = -3.0, -3.0
            y = cpu.product(x, packed.weight, packed.scale, None, 40)
            torch.testing.assert_close(y.double(), x.double() @ expected.double().t(), rtol=1e-5, atol=0.5)


@torch.inference_mode()
def test_clang_builds_it_too(build, monkeypatch):
    """With PyTorch's threads, and with the same integers as GCC's."""
    if not (clang := shutil.which("clang++") or shutil.which("clang++-19")):
        pytest.skip("no clang")
    layer, _ = make_layer("int4", 100, 960, 64)
    x, results = torch.randn(9, 960), []
    for compiler in ("", clang):
        monkeypatch.setenv("CXX", compiler)
        build("")
        packed = cpu.BlockLinear(layer, torch.bfloat16)
        torch.set_num_threads(2)
        results.append(cpu.product(x, packed.weight, packed.scale, packed.bias, 100))
        q, k, v, mask = draw_inputs(14, 2, 64, 9, 333)
        mask[:, 0] = True
        assert error(cpu.attend(q, k, v, mask), q, k, v, mask) < 5e-3
        torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize("mode, group", [("int8", 0), ("int4", 64), ("int4", 24)])
@torch.inference_mode()
def test_integers_are_the_same_on_every_cpu(build, mode, group):
    """Not one bit differs."""
    if not OTHERS:
        pytest.skip("x86 alone has several levels")
    layer, _ = make_layer(mode, 100, 960, group or 64)
    x = torch.randn(9, 960) * 10.0 ** torch.randint(-6, 4, (9, 1))
    x[3, 5] = 1e4
    results = []
    for level in ("", *OTHERS):
        build(level)
        packed = cpu.BlockLinear(layer, torch.bfloat16)
        results.append(cpu.product(x, packed.weight, packed.scale, packed.bias, 100))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@torch.inference_mode()
def test_unquantized_layers_are_replaced(dtype, tolerance):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 64, bias=False)).to(dtype)
    packed = copy.deepcopy(plain).requires_grad_(False)
    counts = cpu.replace_linears(packed, (cpu.PackedLinear, cpu.RowLinear))
    ((kind, classes),) = counts.items()
    assert kind == str(dtype).removeprefix("torch.") and classes == {type(packed[0]).__name__: 2}
    if isinstance(packed[0], nn.Linear):
        pytest.skip("neither oneDNN nor cpu.cpp takes this dtype here: the layers stay as they are")
    wider = 2 * 160 * isinstance(packed[0], cpu.RowLinear)  # its bias is float32
    assert generate.weight_bytes(packed) == generate.weight_bytes(plain) + wider
    compiled = torch.compile(packed, fullgraph=True, dynamic=False)
    for rows in (1, 6, 100):
        x = torch.randn(rows, 96, dtype=dtype)
        torch.testing.assert_close(packed(x), plain(x), atol=tolerance, rtol=0)
        torch.testing.assert_close(compiled(x), packed(x), atol=0, rtol=0)


@torch.inference_mode()
def test_encoders_are_prepared(can_build, pair, monkeypatch):
    """In bfloat16 the encoder's layers are cpu.cpp's, and it says the same but for rounding."""
    monkeypatch.setattr(cpu, "onednn_has_bfloat16", lambda: False)
    encoders = {}
    for dtype, optimize in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        engine, _ = generate.load(pair("qwen2.5-vl").path, device="cpu", dtype=dtype, optimize=optimize)
        encoders[dtype, optimize] = engine.encoder
    assert isinstance(encoders[torch.bfloat16, True].blocks[0].wo, cpu.RowLinear)
    assert type(encoders[torch.float32, True].blocks[0].wo) is nn.Linear
    pixels, grid = engine.encoder.preprocess(draw(200, 150))
    plain, prepared, exact = (encoder(pixels.to(dtype), grid).float() for (dtype, _), encoder in encoders.items())
    assert (prepared - exact).norm() < 1.5 * (plain - exact).norm()
