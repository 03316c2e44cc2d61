"""Llava-OneVision against transformers, in both published layouts: lmms-lab's is llava-hf's under other names."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
from images import load_image
from scripts import convert_hf_checkpoint
from scripts.convert_hf_checkpoint import convert, read_pinpoints
from tests.helpers import device, hub
from tests.helpers.checkpoints import Pair
from tests.helpers.pictures import KINDS, draw, reference_picture
from tests.helpers.reference import greedy
from vision import build_prompt, encode_image

FAMILIES = ["llava-hf", "llava-hf-tied", "llava-lmms", "llava-lmms-tied"]


def reference_inputs(pair, images: list[Image.Image]) -> dict:
    """Images of one prompt, as the published processor prepares them."""
    config = pair.reference.config
    tile = config.vision_config.image_size
    processor = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    inputs = dict(processor([images], return_tensors="pt"))
    return inputs | {"pixel_values": inputs["pixel_values"].to(pair.reference.dtype)}


def to_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """[T, P, 3 * patch * patch] of [T, 3, tile, tile], written otherwise than in vision.py."""
    return torch.nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2)


def check_pixels(pair, images, expected: torch.Tensor) -> None:
    encoder = pair.encoder
    preprocess = encoder.preprocess if len(images) == 1 else encoder.preprocess_several
    for image, pictures in zip(images, expected, strict=True):
        pixels, _ = preprocess(image)
        torch.testing.assert_close(pixels.cpu(), to_patches(pictures, encoder.patch), atol=1e-5, rtol=0)


def reference_rows(pair, inputs: dict) -> torch.Tensor:
    features = pair.reference.model.get_image_features(**inputs, vision_aspect_ratio="anyres_max_9")
    return torch.cat(list(features.pooler_output))


def check(pair, paths, variety: int = 8) -> None:
    inputs = reference_inputs(pair, [reference_picture(path) for path in paths])
    images = [load_image(path) for path in paths]
    check_pixels(pair, images, inputs["pixel_values"])
    image = pair.model.args.image_token_id
    tokens = pair.tokenizer.encode("Look: ") + [image] + pair.tokenizer.encode(" and tell. ")
    tokens += [image] * (len(images) - 1) + pair.tokenizer.encode("What is it?")
    prompt = build_prompt(tokens, images, pair.encoder, image)
    device.assert_close(prompt.visual, reference_rows(pair, inputs))

    assert torch.equal(prompt.rope_pos.cpu(), torch.arange(len(prompt))[:, None].expand(-1, 3))
    inputs |= {"input_ids": prompt.tokens[None], "vision_aspect_ratio": "anyres_max_9"}
    pair.engine.reserve(prompt, 24)
    logits = pair.model.prefill(prompt)
    device.assert_close(logits, pair.reference(**inputs).logits[0, -1:])
    ours = generate.generate(pair.engine, tokens, images, 24)
    assert ours["token_ids"] == greedy(pair.reference, 24, **inputs)
    assert len(set(ours["token_ids"])) > variety, "the text must vary, or equality proves little"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_image(pair, pictures, family, kind):
    if kind not in ("wide", "tall") and family != "llava-hf":
        pytest.skip("the preprocessing is the same")
    check(pair(family), [pictures[kind]])


@pytest.mark.parametrize("family", ["llava-hf", "llava-lmms"])
@torch.inference_mode()
def test_two_images(pair, pictures, family):
    check(pair(family), [pictures["wide"], pictures["rgba"]])
    check(pair(family), [pictures["tall"], pictures["small"]])


@torch.inference_mode()
def test_real_geometry(pair, pictures):
    """384 pixels in patches of 14: 6 pixels are left over, 27 x 27 patches; 12 tiles are shrunk to the worth of 9."""
    pair = pair("llava-384")
    check(pair, [draw_to(pictures, 500, 300)], variety=4)  # over 2000 rows random attention sees little but a mean
    image = load_image(pictures["large"])
    inputs = reference_inputs(pair, [image])
    check_pixels(pair, [image], inputs["pixel_values"])
    encoded = encode_image(pair.encoder, image, {}, alone=True)
    assert len(inputs["pixel_values"][0]) == 13
    assert 729 * 8.5 < len(encoded.features) - 729 < 729 * 9.3
    device.assert_close(encoded.features, reference_rows(pair, inputs))


def draw_to(pictures, width: int, height: int):
    path = pictures["square"].with_name(f"{width}x{height}.png")
    draw(width, height).save(path)
    return path


@torch.inference_mode()
def test_many_shapes(pair):
    """Which tiles, what is padding and where the newlines stand, against transformers, extreme shapes included."""
    pair = pair("llava-lmms")
    shapes = [(1, 1), (1, 7), (7, 1), (60, 60), (61, 60), (120, 60), (119, 61), (360, 240), (241, 1000), (200, 601)]
    shapes += [(1, 240), (360, 1), (3, 700), (1000, 4), (5, 1195), (1795, 5)]
    shapes += [(1, 241), (361, 1), (5000, 2), (2, 5000)]  # a side vanishes: no line is left, or lines of newlines alone
    shapes += [(220, 176), (164, 205)]  # 11.999999 patches
    generator = torch.Generator().manual_seed(0)
    shapes += torch.randint(1, 700, (20, 2), generator=generator).tolist()
    for width, height in shapes:
        image = draw(width, height)
        inputs = reference_inputs(pair, [image])
        check_pixels(pair, [image], inputs["pixel_values"])
        pixels, grid = pair.encoder.preprocess(image)
        rows, expected = pair.encoder(pixels, grid), reference_rows(pair, inputs)
        device.assert_close(rows, expected)
        newlines = (rows == pair.encoder.newline).all(1).nonzero().flatten().tolist()
        assert newlines == list(pair.encoder.newlines(len(rows), grid))


@torch.inference_mode()
def test_newlines_of_an_image_among_others(pair):
    encoder = pair("llava-hf").encoder
    pixels, grid = encoder.preprocess_several(draw(100, 50))
    rows = encoder(pixels, grid)
    assert list(encoder.newlines(len(rows), grid)) == [len(rows) - 1] == [16]
    assert torch.equal(rows[-1], encoder.newline)


@torch.inference_mode()
def test_rows_tell_gelus_and_eps_apart(pair, pictures):
    """The comparisons above would fail with another activation or eps, anywhere."""
    fresh, _ = generate.load(pair("llava-hf").path, device=device.name, dtype=torch.float32)
    encoder = fresh.encoder
    pixels, grid = encoder.preprocess(load_image(pictures["wide"]))
    rows = encoder(pixels, grid)
    for kind, name, wrong in ((torch.nn.LayerNorm, "eps", 1e-5), (torch.nn.GELU, "approximate", "none")):
        modules = [module for module in encoder.blocks.modules() if isinstance(module, kind)]
        right = getattr(modules[0], name)
        for module in modules:
            setattr(module, name, wrong)
        assert (encoder(pixels, grid) - rows).abs().max() > 3e-4
        for module in modules:
            setattr(module, name, right)
    encoder.projector[1].approximate = "tanh"
    assert (encoder(pixels, grid) - rows).abs().max() > 3e-4


@torch.inference_mode()
def test_a_second_image_changes_how_the_first_is_seen(pair):
    """Rows are kept by picture and by treatment: a conversation that gains an image equals a fresh one."""
    pair = pair("llava-hf")
    image, other = draw(200, 150, seed=1), draw(100, 180, seed=2)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    tokens = pair.tokenizer.encode_chat(messages)
    first = generate.generate(pair.engine, tokens, [image], 12, pair.tokenizer.stop_ids)
    reply = [token for token in first["token_ids"] if token not in pair.tokenizer.stop_ids]
    messages += [{"role": "assistant", "content": [{"type": "tokens", "ids": reply}]}]
    messages += [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]}]
    tokens_of_both = pair.tokenizer.encode_chat(messages)
    both = generate.generate(pair.engine, tokens_of_both, [image, other], 12)
    assert first["n_visual_tokens"] > 16 + 1 and both["n_visual_tokens"] == 2 * (16 + 1)
    assert len(pair.engine.encoded) == 3
    again = generate.generate(pair.engine, tokens, [image], 12, pair.tokenizer.stop_ids)
    assert again["token_ids"] == first["token_ids"] and len(pair.engine.encoded) == 3
    pair.engine.forget()
    assert generate.generate(pair.engine, tokens_of_both, [image, other], 12)["token_ids"] == both["token_ids"]


NEAR_TIE = 0.1  # logits in bfloat16, whose steps are 1/32 between 4 and 8


@pytest.mark.parametrize("make", [hub.make_llava_hf, hub.make_llava_lmms])
@torch.inference_mode()
def test_bfloat16(tmp_path, pictures, make):
    """Given our answers, the reference would choose the same token at every place, but for near-ties."""
    folder, reference = make(tmp_path / "hub", tied=False, dtype=torch.bfloat16)
    convert(folder)
    pair = Pair(folder, reference)
    pair.engine, _ = generate.load(pair.path, device=device.name, dtype=torch.bfloat16)
    image = pair.model.args.image_token_id
    equal = 0
    for kind in ("wide", "exif"):
        tokens = [image, *pair.tokenizer.encode("What is it?")]
        pair.engine.forget()
        ours = generate.generate(pair.engine, tokens, [load_image(pictures[kind])], 24)["token_ids"]
        (encoded,) = pair.engine.encoded.values()
        assert encoded.features.dtype == torch.bfloat16 and encoded.features.isfinite().all()
        inputs = reference_inputs(pair, [reference_picture(pictures[kind])])
        ids = torch.tensor([[image] * len(encoded.features) + tokens[1:] + ours])
        logits = pair.reference(**inputs, input_ids=ids, vision_aspect_ratio="anyres_max_9").logits[0]
        for token, row in zip(ours, logits[-len(ours) - 1 : -1].float()):
            assert row.max() - row[token] < NEAR_TIE
            equal += int(token == row.argmax())
    assert equal > 36, "of 48"


def test_every_key_is_used_or_known_to_be_unused(pair, monkeypatch):
    """What is not used is what the converter names; one more key, or one less, is refused."""
    dropped = {}
    for family in FAMILIES:
        folder = pair(family).folder
        config = json.loads((folder / "config.json").read_text())
        _, plan, _ = convert_hf_checkpoint.ARCHITECTURES[config["architectures"][0]](config, folder)
        used = {key for source in plan.values() for key in source.keys}
        dropped[family] = {key for key in load_file(folder / "model.safetensors") if key not in used}
    tower = "vision_tower.vision_model."
    norm = {tower + f"post_layernorm.{kind}" for kind in ("weight", "bias")}
    assert dropped["llava-hf-tied"] == norm
    assert dropped["llava-lmms"] == dropped["llava-lmms-tied"] == {f"model.vision_tower.{key}" for key in norm}
    more = dropped["llava-hf"] - norm
    assert {key.removeprefix(tower).split(".")[0] for key in more} == {"encoder", "head", "embeddings"}
    assert tower + "embeddings.position_ids" in more
    assert all(key.startswith(tower + "encoder.layers.3.") for key in more if "encoder" in key)


def edited(tmp_path, make, edit_state=lambda state: None, edit_config=lambda config: None, **more):
    """A hub folder of which something was changed afterwards."""
    folder, _ = make(tmp_path / "hub", **more)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    edit_state(state)
    edit_config(config)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("key", ["vision_tower.vision_model.encoder.layers.1.extra", "image_newline.more", "a.weight"])
def test_an_unknown_key_is_refused(tmp_path, key):
    def add(state):
        state[key] = torch.zeros(2)

    with pytest.raises(ValueError, match=f"hold {key}, unknown"):
        convert(edited(tmp_path, hub.make_llava_hf, add, tied=True))


@pytest.mark.parametrize("make", [hub.make_llava_hf, hub.make_llava_lmms])
def test_a_lost_key_is_refused(tmp_path, make):
    def remove(state):
        del state[next(key for key in state if "patch_embedding.weight" in key)]

    with pytest.raises(ValueError, match="the weights lack"):
        convert(edited(tmp_path, make, remove, tied=True))


def test_an_output_layer_that_no_one_mentions_is_the_embedding(tmp_path):
    def silence(config):
        del config["text_config"]["tie_word_embeddings"]

    convert(edited(tmp_path / "1", hub.make_llava_hf, edit_config=silence, tied=True))
    convert(edited(tmp_path / "2", hub.make_llava_hf, edit_config=silence, tied=False))
    tied = [json.loads((tmp_path / i / "hub/params.json").read_text())["model"]["tie_embeddings"] for i in "12"]
    assert tied == [True, False]


def test_keys_as_transformers_5_saves_them(tmp_path):
    def rename(state):
        for key in list(state):
            state[key.replace("vision_tower.vision_model.", "vision_tower.")] = state.pop(key)

    convert(edited(tmp_path, hub.make_llava_hf, rename, tied=False))


def test_an_image_token_without_a_row_is_refused(tmp_path):
    """lmms-lab's embedding has padding rows, of which one is the image token's; without them there is no place."""

    def cut(state):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            state[key] = state[key][: -hub.PADDING].clone()

    def shrink(config):
        config["vocab_size"] -= hub.PADDING

    with pytest.raises(ValueError, match="the image token is .* rows only"):
        convert(edited(tmp_path, hub.make_llava_lmms, cut, shrink, tied=False))


def test_image_token(pair):
    for family in FAMILIES:
        params = json.loads((pair(family).folder / "params.json").read_text())
        model, image = params["model"], params["tokenizer"]["special_tokens"]["<image>"]
        assert model["image_token_id"] == image < model["vocab_size"]
        assert (image < model["n_tokens"]) == ("hf" in family), "lmms-lab's is never sampled"


@pytest.mark.parametrize(
    "text",
    [
        [[384, 384], [384, 768], [768, 384], [768, 768]],
        "(1x1),...,(2x2)",
        "[(384, 384), (384, 768), (768, 384), (768, 768)]",
        "[[384,384],[384,768],[768,384],[768,768]]",
    ],
)
def test_pinpoints(text):
    assert read_pinpoints(text, 384) == [(384, 384), (384, 768), (768, 384), (768, 768)]


@pytest.mark.parametrize("text", [[], "", "__import__('os')", [[384, 400]], [[0, 384]]])
def test_bad_pinpoints_are_refused(text):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        read_pinpoints(text, 384)


@pytest.mark.parametrize(
    "make, name, value",
    [
        (hub.make_llava_hf, "vision_feature_select_strategy", "default"),
        (hub.make_llava_hf, "vision_feature_layer", [-1, -2]),
        (hub.make_llava_hf, "vision_aspect_ratio", "pad"),
        (hub.make_llava_lmms, "mm_patch_merge_type", "flat"),
        (hub.make_llava_lmms, "image_aspect_ratio", "pad"),
        (hub.make_llava_lmms, "mm_vision_tower", "openai/clip-vit-large-patch14-336"),
    ],
)
def test_other_llavas_are_refused(tmp_path, make, name, value):
    with pytest.raises(ValueError, match=r"config\.json: .*" + str(value).replace("[", r"\[")):
        convert(edited(tmp_path, make, edit_config=lambda config: config.update({name: value}), tied=True))
