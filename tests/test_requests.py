"""Requests as users write them: sizes of images, pictures of 16 bits, odd files, ids out of range, odd flags."""

import json
from pathlib import Path

import cli

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import generate
from images import load_image, resize_as_asked
from tests.helpers.pictures import draw

SIZES = [
    {"max_pixels": 50_000},
    {"min_pixels": 200_000},
    {"min_pixels": 60_000, "max_pixels": 70_000},
    {"resized_height": 300, "resized_width": 120},
    {"resized_height": 10, "resized_width": 10},
    {"resized_height": 280, "resized_width": 280, "max_pixels": 784},  # then qwen_vl_utils does not look at limits
]


def as_qwen_vl_utils(image: Image.Image, part: dict) -> Image.Image:
    """fetch_image of qwen_vl_utils, with its default limits, which are also the tiny checkpoint's."""
    limits = {"min_pixels": 4 * 28 * 28, "max_pixels": 16384 * 28 * 28}
    if "resized_height" in part:
        height, width = smart_resize(part["resized_height"], part["resized_width"], 28, **limits)
    else:
        own = {name: part.get(name, limit) for name, limit in limits.items()}
        height, width = smart_resize(image.height, image.width, 28, **own)
    return image.resize((width, height))


@pytest.mark.parametrize("part", SIZES)
@pytest.mark.parametrize("size", [(500, 300), (90, 420), (30, 30)])
def test_sizes_are_those_of_qwen_vl_utils(pair, part, size):
    pair, image = pair("qwen2.5-vl"), draw(*size)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(pair.folder)
    expected = processor(as_qwen_vl_utils(image, part), return_tensors="pt")
    pixels, grid = pair.encoder.preprocess(resize_as_asked(image, part, pair.encoder))
    assert [[1, *grid]] == expected["image_grid_thw"].tolist()
    theirs = expected["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0].flatten(1)
    torch.testing.assert_close(pixels, theirs, atol=1e-5, rtol=0)


WRONG_SIZES = [
    ({"min_pixels": 0}, "min_pixels of an image must be a positive whole number, not 0"),
    ({"max_pixels": "9"}, "max_pixels of an image must be a positive whole number, not 9"),
    ({"max_pixels": True}, "max_pixels of an image must be"),
    ({"resized_height": 28}, "resized_height and resized_width of an image are given together"),
    ({"min_pixels": 9000, "max_pixels": 8000}, "min_pixels of an image is 9000, above max_pixels, 8000"),
    ({"min_pixels": 10**12}, "above max_pixels, 12845056"),
]


@pytest.mark.parametrize("part, mistake", WRONG_SIZES)
def test_sizes_that_make_no_sense(pair, part, mistake):
    with pytest.raises(ValueError, match=mistake):
        resize_as_asked(draw(64, 64), part, pair("qwen2.5-vl").encoder)


@pytest.mark.parametrize("family", ["llava-hf", "llama-3.2-vision"])
def test_sizes_are_for_qwen_alone(pair, family):
    with pytest.raises(ValueError, match="max_pixels of an image: only Qwen2.5-VL takes it"):
        resize_as_asked(draw(64, 64), {"max_pixels": 9000}, pair(family).encoder)


# ---- pictures of wide channels -------------------------------------------------------------------------------------


def ramp() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


WIDE = {
    "16.png": ramp().astype(np.uint16) * 257,
    "16.tiff": ramp().astype(np.uint16) * 257,
    "big-endian.tiff": (ramp().astype(np.uint16) * 257).astype(">u2"),
    "32.tiff": ramp().astype(np.int32) * 257,
    "float.tiff": ramp().astype(np.float32) / 255,
    "float-255.tiff": ramp().astype(np.float32),
    "float-signed.tiff": (ramp().astype(np.float32) - 128) * 1000,
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_channels_are_scaled(tmp_path, name):
    Image.fromarray(WIDE[name]).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - ramp()[..., None]).max() == 0


def test_dark_pictures_of_16_bits_stay_dark_and_infinite_ones_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 512, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert load_image(tmp_path / "dark.png").getpixel((0, 0)) == (2, 2, 2)
    Image.fromarray(np.full((8, 8), np.inf, dtype=np.float32)).save(tmp_path / "inf.tiff")
    with pytest.raises(ValueError, match="cannot read the image .*not finite"):
        load_image(tmp_path / "inf.tiff")


# ---- files and flags -----------------------------------------------------------------------------------------------


def run_lines(path: Path, lines: list[str], capsys, *flags: str, before: str = "") -> tuple[int, list[dict]]:
    path.write_text(before + "\n".join(lines), encoding="utf-8")
    status = generate.main(["--device", "cpu", "--requests", str(path), "--max_new_tokens", "3", *flags])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_lines_that_fail_and_lines_that_do_not(tmp_path, capsys, pictures):
    tokens = lambda ids: json.dumps({"messages": [*asked, {"role": "assistant", "content": reply(ids)}, *asked]})
    asked, reply = [{"role": "user", "content": "Hi"}], lambda ids: [{"type": "tokens", "ids": ids}]
    image = {"type": "image", "path": str(pictures["square"])}
    picture = lambda **more: json.dumps({"messages": [{"role": "user", "content": [image | more]}]})
    good = json.dumps({"prompt": "Hi"})
    lines = [good, "[" * 100_000, tokens([10**6]), tokens([-1]), tokens(["a"]), tokens([5]), picture(max_pixels=3136)]
    lines += [picture(max_pixel=1), picture(detail="low"), '{"prompt": " ", "raw": true}', good]
    status, results = run_lines(tmp_path / "requests.jsonl", lines, capsys, before="\ufeff")
    assert status == 2
    failed = [i for i, result in enumerate(results) if "error" in result]
    assert failed == [1, 2, 3, 4, 7, 8] and len(results) == len(lines)
    assert "recursion" in results[1]["error"] and "an image part has no max_pixel," in results[7]["error"]
    assert all("is not the id of a token" in results[i]["error"] for i in (2, 3, 4))
    assert results[6]["n_visual_tokens"] == 4 and len(results[9]["prompt_token_ids"]) == 1
    assert results[0]["token_ids"] == results[-1]["token_ids"]


def test_token_that_the_model_has_no_embedding_of(pair):
    """A tokenizer with more tokens than the embedding, as fine-tunes that add a padding token leave it."""
    pair = pair("qwen2")
    n = pair.model.args.vocab_size
    for tokens in ([5, n], [-1]):
        with pytest.raises(ValueError, match="which the model does not know"):
            generate.generate(pair.engine, tokens, [], 3)


@pytest.mark.parametrize("seed", ["-5", str(2**64), str(-(2**70)), "9" * 100, str(2**63 - 1)])
def test_any_seed(tmp_path, capsys, seed):
    flags = ["--seed", seed, "--temperature", "1", "--num_samples", "2", "--mm_prune_method", "random"]
    status, results = run_lines(tmp_path / "r.jsonl", ['{"prompt": "Hi"}'], capsys, *flags, "--mm_prune_ratio", "0.5")
    assert status == 0 and len(results) == 2


def test_a_tiny_temperature_is_greedy():
    assert cli.temperature("1e-45") == cli.temperature("0") == cli.temperature("9e-6") == 0
    assert cli.temperature("1e-5") == 1e-5
    logits = torch.tensor([[1e4, 0.0, 9.9e3]])
    probabilities = generate.probabilities(logits, 3, generate.Sampling(1e-5))
    assert probabilities.tolist() == [[1, 0, 0]]
    for text in ("-1", "nan", "inf", "x"):
        with pytest.raises(ValueError):
            cli.temperature(text)
