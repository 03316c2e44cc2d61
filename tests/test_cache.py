"""What the caches hold: one token at a time, several at once, continued and afresh must all agree."""

import pytest
import torch

import generate
import vision
from generate import Sampling, draw, probabilities
from tests.helpers import device
from tests.helpers.pictures import draw as draw_picture

VL_FAMILIES = ["qwen2.5-vl", "llava-hf", "llama-3.2-vision"]
FAMILIES = ["qwen2", *VL_FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_prefill_equals_one_by_one_equals_several(pair, family):
    pair = pair(family)
    tokens = pair.tokenizer.encode("The quick brown fox asks how many circles there are.")
    prompt = pair.engine.build_prompt(tokens, [])
    pair.engine.reserve(prompt, 1)
    last = pair.model.prefill(prompt)[0]
    ids, positions = prompt.tokens, torch.arange(len(tokens), device=device.name)
    at_once = pair.model(ids, positions)
    one_by_one = torch.cat([pair.model(ids[i : i + 1], positions[i : i + 1]) for i in range(len(ids))])
    device.assert_close(at_once[-1], last)
    device.assert_close(one_by_one, at_once)
    chunks = [pair.model(ids[i : i + 5], positions[i : i + 5]) for i in range(0, len(ids), 5)]
    device.assert_close(torch.cat(chunks), at_once)


@pytest.mark.parametrize("n_tokens", [1, 6, 30])  # one token, a verification, a continued conversation
@torch.inference_mode()
def test_slots_that_are_not_in_use_are_not_read(pair, n_tokens):
    pair = pair("qwen2")
    pair.model.setup_caches(300)
    input_pos = torch.arange(n_tokens, device=device.name)
    ids = 20 + input_pos
    expected = pair.model(ids, input_pos)
    for layer in pair.model.layers:  # reading them gives NaN, whatever the mask
        layer.attention.k_cache[:, n_tokens:] = layer.attention.v_cache[:, n_tokens:] = float("nan")
    assert pair.model(ids, input_pos).isnan().all()
    torch.testing.assert_close(pair.model(ids, input_pos, n_tokens), expected, atol=1e-5, rtol=0)
    pair.model.setup_caches(300)


@torch.inference_mode()
def test_slots_that_steps_read(pair, monkeypatch):
    """As many as are in use, rounded up; to the last slot of the cache."""
    pair, n_slots = pair("qwen2"), []
    pair.model.setup_caches(300)
    forward = pair.model.forward

    def step(tokens, input_pos, n):
        assert input_pos[-1] < n <= 300, "what the step writes is among what it reads"
        n_slots.append(n)
        return forward(tokens, input_pos, n)

    monkeypatch.setattr(pair.model, "forward", step)
    monkeypatch.setattr(pair.engine, "max_cache_size", 300)
    generate.generate(pair.engine, [20] * 10, [], 500)
    assert [n_slots.count(n) for n in (64, 128, 192, 256, 300)] == [54, 64, 64, 64, 44]


@pytest.mark.parametrize("family", VL_FAMILIES)
@torch.inference_mode()
def test_image_then_several_at_once(pair, family):
    """Text after an image: prefilled with it, or given to the cache later, many tokens at a time."""
    pair = pair(family)
    head = pair.tokenizer.encode_raw([{"type": "image"}])
    tail = pair.tokenizer.encode(" what is it, and how many of them?")
    whole, part = (pair.engine.build_prompt(tokens, [draw_picture(300, 168)]) for tokens in (head + tail, head))
    pair.engine.reserve(whole, 1)
    expected = pair.model.prefill(whole)[-1]
    pair.model.prefill(part)
    logits = pair.model(torch.tensor(tail, device=device.name), torch.arange(len(part), len(whole), device=device.name))
    device.assert_close(logits[-1], expected)


def count_prefills(model, monkeypatch) -> list:
    calls, prefill = [], model.prefill
    monkeypatch.setattr(model, "prefill", lambda prompt: calls.append(len(prompt)) or prefill(prompt))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_continued_equals_afresh(pair, family, monkeypatch):
    """Three turns in one cache, an image in the first: each as if the conversation were prefilled anew."""
    pair = pair(family)
    calls = count_prefills(pair.model, monkeypatch)
    content = [{"type": "text", "text": "How many circles are there?"}]
    images = []
    if pair.encoder:
        images = [draw_picture(200, 150)]
        content.insert(0, {"type": "image"})
    messages = [{"role": "user", "content": content}]
    pair.model.setup_caches(512, 512 if pair.model.args.cross_attention_layers else 0)
    for turn in range(3):
        tokens = pair.tokenizer.encode_chat(messages)
        continued = generate.generate(pair.engine, tokens, images, 12, pair.tokenizer.stop_ids)
        keys = list(pair.engine.cached.keys)
        assert len(calls) == turn + 1, "of the continued turns only the first prefills"
        pair.engine.forget()
        afresh = generate.generate(pair.engine, tokens, images, 12, pair.tokenizer.stop_ids)
        assert continued["token_ids"] == afresh["token_ids"]
        assert keys == pair.engine.cached.keys
        reply = [token for token in continued["token_ids"] if token not in pair.tokenizer.stop_ids]
        messages += [
            {"role": "assistant", "content": [{"type": "tokens", "ids": reply}]},
            {"role": "user", "content": f"And then? {turn}"},
        ]


@pytest.mark.parametrize("family", VL_FAMILIES)
def test_text_after_image_equals_fresh_process(pair, family):
    pair = pair(family)
    fresh, tokenizer = generate.load(pair.path, device=device.name, dtype=torch.float32)
    tokens = tokenizer.encode_chat([{"role": "user", "content": "Say something long."}])
    expected = generate.generate(fresh, tokens, [], 20)
    image = tokenizer.encode_chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])
    generate.generate(pair.engine, image, [draw_picture(120, 300)], 20)
    after = generate.generate(pair.engine, tokens, [], 20)  # without forget()
    assert after["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize("family", VL_FAMILIES)
def test_same_text_with_another_image_is_not_continued(pair, family):
    pair = pair(family)
    tokens = pair.tokenizer.encode_chat([{"role": "user", "content": [{"type": "image"}]}])
    first = generate.generate(pair.engine, tokens, [draw_picture(224, 224, seed=1)], 12)
    second = generate.generate(pair.engine, tokens, [draw_picture(224, 224, seed=2)], 12)
    pair.engine.forget()
    assert (
        second["token_ids"] == generate.generate(pair.engine, tokens, [draw_picture(224, 224, seed=2)], 12)["token_ids"]
    )
    assert first["token_ids"] != second["token_ids"]


def test_images_of_a_conversation_are_encoded_once(pair, monkeypatch):
    pair = pair("qwen2.5-vl")
    calls, preprocess = [], pair.encoder.preprocess
    monkeypatch.setattr(pair.encoder, "preprocess", lambda image: calls.append(image) or preprocess(image))
    images = [draw_picture(100, 100, seed) for seed in (1, 2)]
    tokens = pair.tokenizer.encode_chat([{"role": "user", "content": [{"type": "image"}]}] * 2)
    with torch.inference_mode():
        pair.engine.build_prompt(tokens, images)
        pair.engine.build_prompt(tokens, images)
    assert len(calls) == 2


def test_cache_is_filled_to_the_last_slot(pair, monkeypatch):
    """The last token is never put into the cache: n slots serve n + 1 tokens, and no more are made."""
    pair = pair("qwen2")
    monkeypatch.setattr(pair.engine, "max_cache_size", 20)
    pair.model.setup_caches(20)
    tokens = pair.tokenizer.encode("How many?")
    result = generate.generate(pair.engine, tokens, [], 100)
    assert len(result["token_ids"]) == 20 - len(tokens) + 1
    assert result["finish_reason"] == "length"
    monkeypatch.setattr(pair.engine, "max_cache_size", None)
    pair.engine.forget()
    whole = generate.generate(pair.engine, tokens, [], 100)
    assert len(whole["token_ids"]) == 100
    assert whole["token_ids"][: len(result["token_ids"])] == result["token_ids"]


def test_stop_tokens_end_the_answer(pair):
    """Any token of the list, the very first one too; no later token is in the answer or counted as cached."""
    pair = pair("qwen2")
    tokens = pair.tokenizer.encode("How many circles are there?")
    free = generate.generate(pair.engine, tokens, [], 24)["token_ids"]
    for i in (0, 1, 7, 23):
        stop = free.index(free[i])  # the first place where that token stands
        pair.engine.forget()
        result = generate.generate(pair.engine, tokens, [], 24, stop_ids={free[i], 10**9})
        assert result["token_ids"] == free[: stop + 1]
        assert result["finish_reason"] == "stop"
        assert pair.engine.cached.keys == tokens + free[:stop]


def test_steps_beyond_a_stop_do_not_count(pair, monkeypatch):
    """An accelerator runs ahead of the host: what it did after the stop token must leave no trace."""
    pair = pair("qwen2")
    tokens = pair.tokenizer.encode("How many circles are there?")
    free = generate.generate(pair.engine, tokens, [], 24)["token_ids"]
    stop = free.index(free[10])
    decode = generate.decode
    monkeypatch.setattr(generate, "decode", lambda engine, pending, n, *rest: decode(engine, pending, n + 7, *rest))
    pair.engine.forget()
    result = generate.generate(pair.engine, tokens, [], 100, stop_ids={free[10]})
    assert result["token_ids"] == free[: stop + 1]
    assert pair.engine.cached.keys == tokens + free[:stop]


def test_sampling():
    logits = torch.tensor([[1.0, 3.0, 2.0, 50.0]])  # the last row is padding

    def sample(times: int, **sampling) -> torch.Tensor:
        return draw(probabilities(logits, 3, Sampling(**sampling)).expand(times, -1))

    torch.manual_seed(0)
    assert set(sample(1000).tolist()) == {1}
    drawn = sample(100_000, temperature=1.0).bincount(minlength=3) / 100_000
    assert torch.allclose(drawn, logits[0, :3].softmax(0), atol=0.01)
    assert set(sample(1000, temperature=5.0, top_k=2).tolist()) == {1, 2}
    assert set(sample(1000, temperature=5.0, top_k=1).tolist()) == {1}
    assert set(sample(1000, temperature=5.0, top_k=100).tolist()) == {0, 1, 2}


@torch.inference_mode()
def test_kept_image_features_are_bounded(pair, monkeypatch):
    """In a chat of 200 pictures those of the first stay, which its next prompt begins with."""
    pair, pictures = pair("qwen2.5-vl"), [draw_picture(56, 56, seed) for seed in range(200)]
    size = vision.encode_image(pair.encoder, pictures[0], {}, alone=False).features.nbytes
    monkeypatch.setattr(vision, "ENCODED_BYTES", 20 * size)
    encoded, encode, n_encoded = {}, pair.encoder.forward, []
    monkeypatch.setattr(pair.encoder, "forward", lambda *args: n_encoded.append(1) or encode(*args))
    for _ in range(2):
        for picture in pictures:
            vision.encode_image(pair.encoder, picture, encoded, alone=False)
    assert sum(each.features.nbytes for each in encoded.values()) == 20 * size
    assert len(n_encoded) == 200 + 180
