"""cpu.cpp's attention and how it is built, and oneDNN's order of weights; its products are in test_quantize.py."""

import copy

import pytest
import torch
from torch import nn

import cpu
import generate
import model

WITHOUT_BF16 = sorted(cpu.NEEDED)
HEADS = [(14, 2, 64), (16, 2, 128), (4, 4, 80), (16, 16, 72), (6, 2, 96), (2, 1, 16), (3, 3, 34), (8, 1, 256)]
SIZES = [(1, 1), (1, 700), (6, 64), (6, 1111), (20, 150), (70, 70), (130, 300), (1100, 1100), (1, 5000)]


@pytest.fixture
def can_build():
    if cpu.kernels() is None:
        pytest.skip("no C++ compiler, or a CPU without AVX-512 VNNI")


@pytest.fixture(params=["whole", "without AVX512_BF16"])
def each_build(can_build, request, monkeypatch):
    if request.param != "whole":
        monkeypatch.setattr(cpu, "USEFUL", set())
    cpu.kernels.cache_clear()
    assert cpu.kernels()
    yield
    cpu.kernels.cache_clear()


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
        tokens = tokenizer.encode_request({"prompt": "How many circles are there?"})[0]
        prompt = engine.build_prompt(tokens, [])
        engine.model.setup_caches(512, 64 if engine.model.args.cross_attention_layers else 0)
        following = torch.arange(6), torch.arange(6) + len(prompt)
        logits[name] = torch.cat((engine.model.prefill(prompt), engine.model(*following, 128))).float()
    plain, prepared = ((logits[name] - logits["exact"]).norm() for name in ("plain", "prepared"))
    assert prepared < 1.5 * plain
    cpu.prepare(engine.model)
    assert all(type(layer.attention.attend) is model.Attend for layer in engine.model.layers), "float32 stays exact"


@torch.inference_mode()
def test_a_profile_shows_the_operators(can_build):
    """Eager code goes past PyTorch's dispatcher, but not where somebody looks."""
    q, k, v, mask = draw_inputs(4, 2, 32, 1, 64)
    with torch.profiler.profile() as profiler:
        seen = cpu.attend(q, k, v, mask)
    assert "multimodal_gpt_fast::attention" in {event.key for event in profiler.key_averages()}
    assert torch.equal(seen, cpu.attend(q, k, v, mask))


def test_the_library_is_built_anew(can_build, monkeypatch, tmp_path):
    """With no cache, with a broken one, and where none can be written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu.build_library(WITHOUT_BF16)
    (library,) = tmp_path.rglob("*.*")
    library.unlink()
    library.write_bytes(b"broken")
    assert cpu.build_library(WITHOUT_BF16)
    assert library.stat().st_size > 1000, "put in its place"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu.build_library(WITHOUT_BF16)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@torch.inference_mode()
def test_layers_that_are_not_quantized_are_laid_out_for_the_cpu(dtype, tolerance):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 64, bias=False)).to(dtype)
    packed = copy.deepcopy(plain).requires_grad_(False)
    cpu.pack_whole(packed)
    if not isinstance(packed[0], cpu.PackedLinear):
        pytest.skip("oneDNN does not take this dtype here: the layers stay as they are")
    assert not any(isinstance(child, nn.Linear) for child in packed)
    assert generate.weight_bytes(packed) == generate.weight_bytes(plain)
    compiled = torch.compile(packed, fullgraph=True, dynamic=False)
    for rows in (1, 6, 100):
        x = torch.randn(rows, 96, dtype=dtype)
        torch.testing.assert_close(packed(x), plain(x), atol=tolerance, rtol=0)
        torch.testing.assert_close(compiled(x), packed(x), atol=0, rtol=0)
