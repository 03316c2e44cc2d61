"""Against transformers, in float32 on the CPU: pixels, encoder rows, positions, logits, greedy text."""

import pytest
import torch
import transformers
from PIL import Image, ImageOps

from generate import generate
from tests.conftest import draw
from vision import build_prompt, load_image

TEXT_FAMILIES = ["qwen2", "qwen2.5-tied"]
VL_FAMILIES = ["qwen2.5-vl", "qwen2.5-vl-untied"]
KINDS = ["square", "wide", "tall", "small", "large", "grey", "palette", "rgba", "exif"]


def greedy(reference, n: int, input_ids, **inputs) -> list[int]:
    """New tokens of transformers, with stop tokens and the repetition penalty of generation_config.json set aside."""
    ids = reference.generate(
        input_ids=input_ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **inputs
    )
    return ids[0, input_ids.shape[1] :].tolist()


def reference_picture(path) -> Image.Image:
    """As transformers sees the file: its load_image turns the picture upright, its processor makes it RGB."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "RGBA" and transformers.__version__ < "5.23":
        pytest.skip("this transformers drops alpha; the current one composites onto white, as we do")
    return image


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
    assert len(set(ours["token_ids"])) > 8, "the text must vary, or equality says little"
    pair.model.setup_caches(64)
    logits = pair.model(torch.tensor(tokens), torch.arange(len(tokens)))
    torch.testing.assert_close(logits, pair.reference(torch.tensor([tokens])).logits[0], atol=1e-4, rtol=0)


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
    pixels = torch.cat([pair.encoder.preprocess(image)[0] for image in images])
    # Two equal frames: ours hold one of them, [patches, colour, frame, side * side] of the reference hold both.
    frames = inputs["pixel_values"].view(len(pixels), 3, 2, -1)
    for frame in frames.unbind(2):
        torch.testing.assert_close(pixels, frame.flatten(1), atol=1e-5, rtol=0)

    image = pair.model.args.image_token_id
    tokens = pair.tokenizer.encode("Look: ") + [image] + pair.tokenizer.encode(" and tell. ")
    tokens += [image] * (len(images) - 1) + pair.tokenizer.encode("What is it?")
    prompt = build_prompt(tokens, images, pair.encoder, image)
    rows = pair.reference.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    torch.testing.assert_close(prompt.visual, rows, atol=1e-4, rtol=0)

    ids = prompt.tokens[None]
    inputs |= {"input_ids": ids, "mm_token_type_ids": (ids == image).int()}
    grid = inputs["image_grid_thw"]
    positions, delta = pair.reference.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grid)
    assert torch.equal(prompt.rope_pos, positions[:, 0].T)
    pair.engine.reserve(len(prompt), 24)
    logits = pair.model.prefill(prompt)
    assert pair.model.rope_delta == delta
    torch.testing.assert_close(logits, pair.reference(**inputs).logits[0, -1:], atol=1e-4, rtol=0)
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
