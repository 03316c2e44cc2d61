"""Against transformers, in float32 on the CPU: pixels, image features, positions, logits, greedy text."""

import pytest
import torch
import transformers
from PIL import Image

from generate import generate, load
from images import load_image
from tests.helpers import device
from tests.helpers.pictures import KINDS, draw, reference_picture
from tests.helpers.reference import NEAR_TIE, agree_up_to_near_tie, greedy, in_bfloat16
from vision import build_prompt

TEXT_FAMILIES = ["qwen2", "qwen2.5-tied", "llama2", "llama3.1", "llama3.2", "llama-head-dim"]
VL_FAMILIES = ["qwen2.5-vl", "qwen2.5-vl-untied"]


def reference_inputs(pair, images: list[Image.Image]) -> dict:
    processor = transformers.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    return dict(processor(images, return_tensors="pt"))


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@torch.inference_mode()
def test_text(pair, family):
    pair = pair(family)
    tokens = pair.tokenizer.encode("How many circles are there? 12 or 7.")
    ours = generate(pair.engine, tokens, [], 24)
    assert ours["token_ids"] == greedy(pair.reference, 24, torch.tensor([tokens]))
    assert len(set(ours["token_ids"])) > 8, "the text must vary, or equality proves little"
    pair.model.setup_caches(64)
    logits = pair.model(torch.tensor(tokens, device=device.name), torch.arange(len(tokens), device=device.name))
    device.assert_close(logits, pair.reference(torch.tensor([tokens])).logits[0])


@torch.inference_mode()
def test_long_text_and_rope_scaling(pair):
    """Positions beyond the original context: at 300 tokens another factor would not go unnoticed."""
    pair = pair("llama3.1")
    tokens = pair.tokenizer.encode("How many circles are there? 12 or 7, says the quick brown dog. " * 20)[:300]
    ours = generate(pair.engine, tokens, [], 24)
    assert ours["token_ids"] == greedy(pair.reference, 24, torch.tensor([tokens]))
    assert len(set(ours["token_ids"])) > 8
    pair.model.setup_caches(300)
    expected = pair.reference(torch.tensor([tokens])).logits[0]
    logits = pair.model(torch.tensor(tokens, device=device.name), torch.arange(300, device=device.name))
    device.assert_close(logits, expected)
    scaling = pair.model.args.rope_scaling
    factor = scaling["factor"]
    assert factor == 8
    try:
        scaling["factor"] = 32
        pair.model.setup_caches(300)
        other = pair.model(torch.tensor(tokens, device=device.name), torch.arange(300, device=device.name))
    finally:
        scaling["factor"] = factor
        pair.model.setup_caches(300)
    assert (other - expected)[-1].abs().max() > 0.01


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@torch.inference_mode()
def test_text_in_bfloat16(pair, family):
    """The same text up to near-ties, and logits no further from those in float32 than the reference's own are."""
    pair = pair(family)
    engine, _ = load(pair.path, device=device.name, dtype=torch.bfloat16)
    reference = in_bfloat16(pair.reference)
    agreed = 0
    for text in ("How many circles are there? 12 or 7.", "The lazy dog", "It doesn't lie.", "Three says the fox: 7"):
        tokens = pair.tokenizer.encode(text)
        ours = generate(engine, tokens, [], 24)["token_ids"]
        agreed += agree_up_to_near_tie(ours, reference, torch.tensor([tokens]))
    assert agreed >= 24, "texts that differ at once prove little"
    tokens = pair.tokenizer.encode("How many circles are there? 12 or 7, says the quick brown dog. " * 2)
    exact = pair.reference(torch.tensor([tokens])).logits[0]
    theirs = reference(torch.tensor([tokens])).logits[0]
    ours = engine.model(torch.tensor(tokens, device=device.name), torch.arange(len(tokens), device=device.name))
    ours = ours.cpu()
    assert (ours - exact).square().mean().sqrt() < 1.2 * (theirs - exact).square().mean().sqrt()


@pytest.mark.parametrize("family", VL_FAMILIES)
@torch.inference_mode()
def test_image_in_bfloat16(pair, pictures, family):
    """Given our answers, the reference would choose the same token at every place, but for near-ties."""
    pair = pair(family)
    engine, _ = load(pair.path, device=device.name, dtype=torch.bfloat16)
    reference, image = in_bfloat16(pair.reference), pair.model.args.image_token_id
    equal = 0
    for kind in ("wide", "tall", "exif"):
        picture = load_image(pictures[kind])
        tokens = [*pair.tokenizer.encode("Look: "), image, *pair.tokenizer.encode("What is it?")]
        rows = engine.build_prompt(tokens, [picture]).visual
        assert rows.dtype == torch.bfloat16 and rows.isfinite().all()
        answer = generate(engine, tokens, [picture], 24)
        ids = torch.tensor([answer["prompt_token_ids"] + answer["token_ids"]])
        inputs = reference_inputs(pair, [reference_picture(pictures[kind])])
        inputs |= {"input_ids": ids, "mm_token_type_ids": (ids == image).int()}
        logits = reference(**inputs).logits[0, -25:-1].float()
        chosen = logits.gather(1, ids[0, -24:, None])[:, 0]
        assert (logits.amax(1) - chosen <= NEAR_TIE * logits.abs().amax(1)).all()
        equal += int((logits.argmax(1) == ids[0, -24:]).sum())
    assert equal > 60, "of 72"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", VL_FAMILIES)
@torch.inference_mode()
def test_image(pair, pictures, family, kind):
    if kind == "large" and family != VL_FAMILIES[0]:
        pytest.skip("one family is enough for the slow one")
    check(pair(family), [pictures[kind]])


@torch.inference_mode()
def test_two_images(pair, pictures):
    check(pair(VL_FAMILIES[0]), [pictures["wide"], pictures["rgba"]])


def check(pair, paths) -> None:
    inputs = reference_inputs(pair, [reference_picture(path) for path in paths])
    images = [load_image(path) for path in paths]
    pixels = torch.cat([pair.encoder.preprocess(image)[0] for image in images]).cpu()
    # Two equal frames: ours hold one of them, [patches, colour, frame, side * side] of the reference hold both.
    frames = inputs["pixel_values"].view(len(pixels), 3, 2, -1)
    for frame in frames.unbind(2):
        torch.testing.assert_close(pixels, frame.flatten(1), atol=1e-5, rtol=0)

    image = pair.model.args.image_token_id
    tokens = pair.tokenizer.encode("Look: ") + [image] + pair.tokenizer.encode(" and tell. ")
    tokens += [image] * (len(images) - 1) + pair.tokenizer.encode("What is it?")
    prompt = build_prompt(tokens, images, pair.encoder, image)
    rows = pair.reference.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    device.assert_close(prompt.visual, rows)

    ids = prompt.tokens[None]
    inputs |= {"input_ids": ids, "mm_token_type_ids": (ids == image).int()}
    grid = inputs["image_grid_thw"]
    positions, delta = pair.reference.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grid)
    assert torch.equal(prompt.rope_pos, positions[:, 0].T)
    pair.engine.reserve(prompt, 24)
    logits = pair.model.prefill(prompt)
    assert pair.model.rope_delta == delta
    device.assert_close(logits, pair.reference(**inputs).logits[0, -1:])
    ours = generate(pair.engine, tokens, images, 24)
    assert ours["token_ids"] == greedy(pair.reference, 24, **inputs)
    assert len(set(ours["token_ids"])) > 8


def test_windows_are_partly_filled_in_both_directions(pair):
    """The images above do exercise what they are for."""
    encoder = pair("qwen2.5-vl").encoder
    _, grid = encoder.preprocess(draw(500, 300))
    index = encoder.window_index(grid)
    assert grid[0] * 14 % 112 and grid[1] * 14 % 112
    assert (index < 0).any() and sorted(index[index >= 0].tolist()) == list(range(grid[0] * grid[1]))
