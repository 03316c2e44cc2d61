"""What gpu.py does, on the CPU: block masks against model.attend, greedy decoding against the loop of decode()."""

import pytest
import torch

import generate
import gpu
import model
import quantize
from generate import Sampling
from tests.helpers.pictures import draw

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture
def flex_on_the_cpu(monkeypatch):
    """Inductor's template for CPUs reads the shape of a query that is a view off the tensor behind it."""
    flex_attention = gpu.flex_attention
    monkeypatch.setattr(gpu, "flex_attention", lambda q, k, v, **rest: flex_attention((q + q) / 2, k, v, **rest))
    torch._dynamo.reset()


def attend_to_prefix(q, k, v, input_pos):
    return gpu.Attend()(q, k, v, gpu.prefix_mask(input_pos, len(q) // len(k) * len(input_pos), k.shape[1]))


def attend_to_listed(q, k, v, seen):
    return gpu.Attend()(q, k, v, gpu.listed_mask(seen, len(q) // len(k) * q.shape[1]))


@pytest.mark.parametrize("n_tokens, n_slots", [(1, 300), (6, 512)])
@torch.inference_mode()
def test_block_masks(flex_on_the_cpu, n_tokens, n_slots):
    """Groups of seven, as Qwen2.5-7B has; one graph, from a nearly empty cache to a full one."""
    generator = torch.Generator().manual_seed(n_tokens)
    q, k, v = (torch.randn(n, length, 64, generator=generator) for n, length in ((28, n_tokens), *[(4, n_slots)] * 2))
    prefix, listed = (torch.compile(f, fullgraph=True, dynamic=False) for f in (attend_to_prefix, attend_to_listed))
    for last in (n_tokens - 1, 100, 127, 128, n_slots - 1):
        input_pos = torch.arange(last - n_tokens + 1, last + 1)
        expected = model.attend(q, k, v, torch.arange(n_slots) <= input_pos[:, None])
        torch.testing.assert_close(prefix(q, k, v, input_pos), expected, atol=2e-6, rtol=0)
    seen = torch.zeros(n_slots, dtype=torch.bool)
    seen[130:200] = seen[260:290] = True
    for row in (seen, ~seen, torch.ones_like(seen)):
        expected = model.attend(q, k, v, row.expand(n_tokens, -1))
        torch.testing.assert_close(listed(q, k, v, row), expected, atol=2e-6, rtol=0)


def test_only_blocks_in_use_are_listed():
    mask = gpu.prefix_mask(torch.tensor([250, 255]), 8, 1000)
    assert mask.kv_num_blocks.item() == 2 and mask.kv_indices[0, 0, 0, :2].tolist() == [0, 1]
    seen = torch.zeros(1000, dtype=torch.bool)
    seen[[0, 300, 999]] = True
    mask = gpu.listed_mask(seen, 8)
    assert mask.kv_num_blocks.item() == 3 and mask.kv_indices[0, 0, 0, :3].tolist() == [0, 2, 7]


def test_upload(monkeypatch):
    """Piece by piece, whatever the shape and the type of a tensor, an empty one too."""
    monkeypatch.setattr(gpu, "STAGED_BYTES", 1000)
    upload = gpu.Upload(torch.device("cpu"))
    tensors = [torch.randn(shape).to(dtype) for shape in ((7, 501), (250,), (0, 3), (2, 3, 4), ()) for dtype in DTYPES]
    for tensor in [*tensors, torch.randn(40, 50).t()]:
        moved = upload(tensor)
        assert torch.equal(moved, tensor) and moved.dtype == tensor.dtype
        assert moved.is_contiguous() and moved.data_ptr() != tensor.data_ptr() or not moved.numel()


def test_argmax():
    for n in (5, 256, 1000, 151936):
        row = torch.randn(n, generator=torch.Generator().manual_seed(n)).bfloat16()  # many are equal
        assert gpu.argmax(row).tolist() == [row.argmax().item()]


def answers(engine, tokenizer, draft=None) -> list[list[int]]:
    """A text, then, where the model sees, a picture twice."""
    results = []
    for size in [None, (200, 150), (60, 200)][: 3 if engine.encoder else 1]:
        parts = [{"type": "image"}] * bool(size) + [{"type": "text", "text": "How many circles are there?"}]
        tokens = tokenizer.encode_chat([{"role": "user", "content": parts}])
        results.append(generate.generate(engine, tokens, [draw(*size)] if size else [], 20, draft=draft)["token_ids"])
    return results


def attend_densely(q, k, v, block_mask):
    """flex_attention, by the definition of a block mask."""
    rows, slots = torch.meshgrid(torch.arange(q.shape[2]), torch.arange(k.shape[2]), indexing="ij")
    listed = block_mask.kv_indices[0, 0, 0, : block_mask.kv_num_blocks[0, 0, 0]]
    mask = block_mask.mask_mod(0, 0, rows, slots) & torch.isin(slots // gpu.BLOCK, listed)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5-vl", "llama-3.2-vision"])
def test_prepared_model(pair, monkeypatch, family):
    """A model as it is made ready for a GPU, its steps as if compiled, answers as before, alone and with a draft."""
    options = {"device": "cpu", "dtype": torch.float32}
    plain, tokenizer = generate.load(pair(family).path, **options)
    expected = answers(plain, tokenizer)
    monkeypatch.setattr(generate.cpu, "prepare", gpu.prepare)
    engine, _ = generate.load(pair(family).path, draft=pair(family).path, **options)
    monkeypatch.setattr(gpu, "flex_attention", attend_densely)
    monkeypatch.setattr(gpu.GreedyDecoder, "compile", lambda decoder, **options: None)
    forward = model.Transformer.forward

    def step(transformer, tokens, *rest):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: len(tokens) <= 16)
        return forward(transformer, tokens, *rest)

    monkeypatch.setattr(model.Transformer, "forward", step)
    for each in (engine, engine.draft.engine):
        each.greedy = gpu.GreedyDecoder(each.model)
    assert answers(engine, tokenizer) == expected
    engine.forget()
    assert answers(engine, tokenizer, engine.draft) == expected
    with torch.inference_mode():
        several = [decode_after(engine, [5, 6]) for engine.greedy in (engine.greedy, None)]
    assert several[0] == several[1]


def decode_after(engine, pending: list[int]) -> list[int]:
    engine.cached.n_written = 0
    return generate.decode(engine, pending, 7, engine.model.args.n_tokens, Sampling())[0].tolist()


@pytest.mark.parametrize("n_tokens", [1, 6])
@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_fused_product(mode, n_tokens):
    """What steps of few tokens compile of a quantized layer."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize.quantize_rows(torch.randn(48, 80, generator=generator), mode)
    x = torch.randn(7, 80, generator=generator)[7 - n_tokens :]
    bias = torch.randn(48, generator=generator)
    expected = x @ quantize.dequantize(weight, scale).t() + bias
    torch.testing.assert_close(quantize.fused_product(x, weight, scale, bias), expected, atol=1e-5, rtol=1e-5)
