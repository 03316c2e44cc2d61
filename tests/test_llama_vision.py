"""Llama-3.2-Vision against transformers: pixels, encoder rows, who sees which image, logits, greedy text."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

import generate
from images import load_image
from scripts.convert_hf_checkpoint import MLLAMA_GRIDS, convert, mllama
from tests.helpers import device, hub
from tests.helpers.checkpoints import Pair
from tests.helpers.pictures import KINDS, draw, reference_picture
from tests.helpers.reference import greedy
from vision import CLIP_MEAN, CLIP_STD, LlamaEncoder, Pruning, build_prompt, cross_attention_mask

FAMILY = "llama-3.2-vision"


def pass_unchanged(layer, args, kwargs, output):
    seen = kwargs["full_text_row_masked_out_mask"]
    return output if seen is None else torch.where(seen[:, 0] > 0, output, args[0])


@pytest.fixture
def vlm(pair):
    """The pair, its reference mended for the time of a test.

    transformers zeroes only the MLP of a cross layer for tokens that see no image: their attention averages all images,
    padding tiles too, so that even BOS depends on an image after it. Meta's code (llama-models, CrossAttention.forward)
    zeroes the output of the attention as well. Such a token then leaves the layer as it came: the hook does just this.
    """
    pair = pair(FAMILY)
    layers = pair.reference.model.language_model.layers
    hooks = [
        layers[i].register_forward_hook(pass_unchanged, with_kwargs=True)
        for i in pair.model.args.cross_attention_layers
    ]
    yield pair
    for hook in hooks:
        hook.remove()


def process(images, tile: int = 56) -> dict:
    size = {"height": tile, "width": tile}
    processor = transformers.MllamaImageProcessorPil(size=size, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    return dict(processor([images], return_tensors="pt"))


def patches(tiles: torch.Tensor, patch: int = 14) -> torch.Tensor:
    """[tiles, P, 3 * patch * patch] of the reference's [tiles, 3, height, width]."""
    return tiles.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def reference_inputs(images, tokens: list[int], image: int) -> dict:
    inputs = process(images)
    spans, n_tiles = get_cross_attention_token_mask(tokens, image), inputs.pop("num_tiles")
    mask = convert_sparse_cross_attention_mask_to_dense([spans], n_tiles, 4, len(tokens))
    inputs |= {"cross_attention_mask": torch.from_numpy(mask), "input_ids": torch.tensor([tokens])}
    return inputs | {"attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}  # else it is inferred from id 0


def reference_rows(pair, inputs: dict) -> torch.Tensor:
    """[N, D] the image features of the tiles in use."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    states = pair.reference.model.vision_model(**{name: inputs[name] for name in names}).last_hidden_state
    rows = pair.reference.model.multi_modal_projector(states)[0]  # [images, tiles, 1 + P, D]
    return rows[inputs["aspect_ratio_mask"][0].bool()].flatten(0, 1)


def check(pair, paths, tokens: list[int]) -> None:
    image_id = pair.model.args.image_token_id
    reference_pictures = [reference_picture(path) for path in paths]
    images = [load_image(path) for path in paths]
    inputs = reference_inputs(reference_pictures, tokens, image_id)
    for image, pixels in zip(images, inputs["pixel_values"][0]):
        ours = pair.encoder.preprocess(image)[0].cpu()
        torch.testing.assert_close(ours, patches(pixels)[: len(ours)], atol=1e-5, rtol=0)

    prompt = build_prompt(tokens, images, pair.encoder, image_id, device.name)
    assert prompt.tokens.tolist() == tokens, "an image takes one token"
    assert torch.equal(prompt.rope_pos.cpu(), torch.arange(len(tokens))[:, None].expand(-1, 3))
    device.assert_close(prompt.visual, reference_rows(pair, inputs))

    pair.engine.reserve(prompt, 24)
    logits = pair.model.prefill(prompt)
    expected = pair.reference(**inputs).logits[0]
    device.assert_close(logits, expected[-1:])
    ours = generate.generate(pair.engine, tokens, images, 24)
    assert ours["token_ids"] == greedy(pair.reference, 24, **inputs)
    assert len(set(ours["token_ids"])) > 8, "the text must vary, or equality proves little"
    assert ours["n_visual_tokens"] == len(prompt.visual)


def compose(pair, *parts: str | int) -> list[int]:
    """BOS and the parts: text, or a number of images in a row."""
    tokens = pair.tokenizer.encode_raw("")
    for part in parts:
        is_text = isinstance(part, str)
        tokens += pair.tokenizer.encode(part) if is_text else [pair.model.args.image_token_id] * part
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_image(vlm, pictures, kind):
    check(vlm, [pictures[kind]], compose(vlm, "Look: ", 1, "What is it?"))


@pytest.mark.parametrize(
    "size, grid", [((56, 56), (1, 1)), ((30, 20), (1, 1)), ((100, 40), (1, 2)), ((40, 100), (2, 1))]
)
@torch.inference_mode()
def test_few_tiles(vlm, tmp_path, size, grid):
    """Unused tiles are part of what the encoder sees, and of nothing that it returns."""
    draw(*size).save(tmp_path / "image.png")
    assert vlm.encoder.preprocess(draw(*size))[1] == grid
    check(vlm, [tmp_path / "image.png"], compose(vlm, 1, "What is it?"))


@pytest.mark.parametrize(
    "parts",
    [
        (1, 1, "How many are there?"),
        (2, "How many are there?"),
        ("One: ", 1, " and two: ", 1, " differ how?"),
        ("These: ", 2, " and that: ", 1),
        (1, "It says ", 2, "Three. Which?"),
    ],
)
@torch.inference_mode()
def test_several_images(vlm, pictures, parts):
    kinds = ["wide", "small", "rgba"][: sum(part for part in parts if isinstance(part, int))]
    check(vlm, [pictures[kind] for kind in kinds], compose(vlm, *parts))


@torch.inference_mode()
def test_text_only(vlm):
    """Skipped layers: before the cross-attention caches exist, and after they held an image."""
    tokens = compose(vlm, "How many circles are there? 12 or 7.")
    expected = greedy(vlm.reference, 24, torch.tensor([tokens]))
    fresh, _ = generate.load(vlm.path, device=device.name, dtype=torch.float32)
    assert generate.generate(fresh, tokens, [], 24)["token_ids"] == expected
    assert fresh.model.n_cross == 0 and len(set(expected)) > 8
    generate.generate(fresh, compose(vlm, 1, "What?"), [draw(300, 200)], 4)
    assert fresh.model.n_cross > 0
    assert generate.generate(fresh, tokens, [], 24)["token_ids"] == expected
    inputs = torch.tensor(tokens), torch.arange(len(tokens))
    logits = fresh.model(*(t.to(device.name) for t in inputs))
    device.assert_close(logits, vlm.reference(torch.tensor([tokens])).logits[0])


@torch.inference_mode()
def test_tokens_before_the_image_do_not_depend_on_it(pair):
    """What the hook on the reference stands for, by our model alone: keys of the last layer, with two images."""
    pair, keys = pair(FAMILY), []
    tokens = compose(pair, "Look: ", 1, " Yes.")
    place = tokens.index(pair.model.args.image_token_id)
    for size in ((200, 100), (50, 50)):
        prompt = pair.engine.build_prompt(tokens, [draw(*size)])
        pair.engine.reserve(prompt, 1)
        pair.model.prefill(prompt)
        keys.append(pair.model.layers[-1].attention.k_cache[:, : len(tokens)].clone())
    difference = (keys[0] - keys[1]).abs().amax(dim=(0, 2))
    assert difference[:place].max() < 1e-6 and difference[place:].min() > 1e-2


def test_images_come_into_a_conversation(pair):
    """Text, an image, text, two images, text: each turn as if the conversation were prefilled anew."""
    pair = pair(FAMILY)
    messages, images = [], []
    for turn, n_images in enumerate((0, 1, 0, 2, 0)):
        images += [draw(60 + 40 * i, 50, seed=turn + i) for i in range(n_images)]
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": f"And {turn}?"}]
        messages.append({"role": "user", "content": content})
        tokens = pair.tokenizer.encode_chat(messages, date_string="1 May 2025")
        continued = generate.generate(pair.engine, tokens, images, 6, pair.tokenizer.stop_ids)
        fresh, _ = generate.load(pair.path, device=device.name, dtype=torch.float32)
        assert (
            continued["token_ids"] == generate.generate(fresh, tokens, images, 6, pair.tokenizer.stop_ids)["token_ids"]
        )
        reply = [token for token in continued["token_ids"] if token not in pair.tokenizer.stop_ids]
        messages.append({"role": "assistant", "content": [{"type": "tokens", "ids": reply}]})


@pytest.mark.parametrize(
    "tokens, seen",
    [
        ("..1..", ["", "", "0", "0", "0"]),
        ("1.2.", ["0", "0", "1", "1"]),
        ("12.3.", ["0", "01", "01", "2", "2"]),
        (".1.23", ["", "0", "0", "1", "12"]),
    ],
)
def test_cross_attention_mask(tokens, seen):
    """Digits are images; by Meta's rule, which transformers' processor has too."""
    is_image = torch.tensor([token.isdigit() for token in tokens])
    n_rows = [2, 1, 3][: int(is_image.sum())]
    mask = cross_attention_mask(is_image, n_rows)
    owner = "".join(str(i) * n for i, n in enumerate(n_rows))
    assert ["".join(sorted({o for o, s in zip(owner, row) if s})) for row in mask.tolist()] == seen
    spans = get_cross_attention_token_mask(is_image.long().tolist(), 1)
    dense = convert_sparse_cross_attention_mask_to_dense([spans], [[1] * len(n_rows)], 1, len(tokens))
    assert torch.equal(mask, torch.from_numpy(dense)[0, :, :, 0].bool().repeat_interleave(torch.tensor(n_rows), dim=1))


@pytest.mark.parametrize("size", [(560, 560), (400, 300), (561, 200), (1500, 1100), (300, 2400), (7, 1300), (2000, 3)])
def test_preprocessing_of_the_real_size(size):
    """Tiles of 560 pixels; picture sizes at and beyond the limits."""
    numbers = dict(dim=8, depth=1, n_global=1, n_head=2, hidden=8, out_dim=8, keep=[])
    encoder = LlamaEncoder(tile=560, patch=14, max_tiles=4, **numbers)
    pixels, grid = encoder.preprocess(draw(*size))
    expected = process([draw(*size)], tile=560)
    assert pixels.shape == (grid[0] * grid[1], 1600, 588)
    assert expected["aspect_ratio_ids"].tolist() == [[1 + encoder.grids.index(grid)]]
    torch.testing.assert_close(pixels, patches(expected["pixel_values"][0, 0])[: len(pixels)], atol=1e-5, rtol=0)
    assert not expected["pixel_values"][0, 0, len(pixels) :].any()


def test_grid_of_every_shape_of_picture():
    with torch.device("meta"):
        numbers = dict(dim=8, depth=1, n_global=1, n_head=2, hidden=8, out_dim=8, keep=[])
        encoder = LlamaEncoder(tile=56, patch=14, max_tiles=4, **numbers)
    assert [list(grid) for grid in encoder.grids] == MLLAMA_GRIDS
    for width in range(10, 300, 17):
        for height in range(10, 300, 13):
            canvas = get_optimal_tiled_canvas(height, width, 4, 56)
            fit = get_image_size_fit_to_canvas(height, width, *canvas, 56)
            grid = encoder.choose_grid(width, height)
            assert (grid[0] * 56, grid[1] * 56) == canvas
            assert encoder.resize_to(width, height, grid) == fit[::-1]


def test_every_key_of_the_layout_is_used(pair):
    """Each published tensor is used once in the checkpoint; none is dropped."""
    folder = pair(FAMILY).folder
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        stored = set(tensors.keys())
    _, plan, _ = mllama(json.loads((folder / "config.json").read_text()), folder)
    used = [key for source in plan.values() for key in source.keys]
    assert sorted(used) == sorted(stored)
    names = {".".join(part for part in key.split(".") if not part.isdigit()) for key in stored}
    assert names == LAYOUT


LAYOUT = {  # of meta-llama/Llama-3.2-11B-Vision-Instruct, layer numbers left out
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    *(f"language_model.model.layers.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"language_model.model.layers.cross_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"language_model.model.layers.cross_attn.{x}_norm.weight" for x in "qk"),
    *(f"language_model.model.layers.cross_attn_{x}_gate" for x in ("attn", "mlp")),
    *(f"language_model.model.layers.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(f"language_model.model.layers.{x}_layernorm.weight" for x in ("input", "post_attention")),
    *(f"multi_modal_projector.{x}" for x in ("weight", "bias")),
    "vision_model.class_embedding",
    "vision_model.patch_embedding.weight",
    *(f"vision_model.layernorm_{x}.{y}" for x in ("pre", "post") for y in ("weight", "bias")),
    *(f"vision_model.gated_positional_embedding.{x}" for x in ("embedding", "gate", "tile_embedding.weight")),
    *(f"vision_model.{x}_tile_positional_embedding.{y}" for x in ("pre", "post") for y in ("embedding.weight", "gate")),
    *(
        f"vision_model.{x}.layers.self_attn.{y}_proj.weight"
        for x in ("transformer", "global_transformer")
        for y in "qkvo"
    ),
    *(
        f"vision_model.{x}.layers.{y}.{z}"
        for x in ("transformer", "global_transformer")
        for y in ("input_layernorm", "post_attention_layernorm", "mlp.fc1", "mlp.fc2")
        for z in ("weight", "bias")
    ),
    *(f"vision_model.global_transformer.layers.gate_{x}" for x in ("attn", "ffn")),
}


@pytest.mark.parametrize("name, value", [("max_num_tiles", 9), ("hidden_act", "quick_gelu"), ("norm_eps", 1e-6)])
def test_other_encoders_are_refused(pair, name, value):
    config = json.loads((pair(FAMILY).folder / "config.json").read_text())
    config["vision_config"][name] = value
    with pytest.raises(ValueError, match=f"vision {name} = "):
        mllama(config, pair(FAMILY).folder)


def test_size_of_the_cross_cache(pair, monkeypatch):
    """By the flag, or by need; more rows than the flag allows are a mistake of the user's."""
    engine, _ = generate.load(pair(FAMILY).path, device=device.name, dtype=torch.float32)
    tokens = compose(pair(FAMILY), 1, "What?")
    images = [draw(200, 200)]  # four tiles of 17 rows
    engine.cross_attention_seq_length = 67
    with pytest.raises(ValueError, match="have 68 visual tokens.*--cross_attention_seq_length"):
        generate.generate(engine, tokens, images, 8)
    engine.cross_attention_seq_length = 68
    exact = generate.generate(engine, tokens, images, 8)
    assert engine.model.n_cross == 68
    engine.cross_attention_seq_length = None
    engine.model.setup_caches(512)
    engine.forget()
    assert generate.generate(engine, tokens, images, 8)["token_ids"] == exact["token_ids"]
    assert engine.model.n_cross == generate.CROSS_BUCKET


@torch.inference_mode()
def test_one_graph_serves_every_step(pair):
    """With and without an image: nothing in a step depends on data, so nothing is compiled twice."""
    pair, graphs = pair(FAMILY), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    engine, _ = generate.load(pair.path, device=device.name, dtype=torch.float32)
    engine.cross_attention_seq_length = 100
    generate.generate(engine, compose(pair, 1, "What?"), [draw(100, 100)], 2)
    engine.model.compile(backend=count, fullgraph=True, dynamic=False)
    for parts, images in (((1, "What?"), [draw(200, 100)]), (("Text.",), []), ((1, "What?"), [draw(50, 50)])):
        tokens = compose(pair, *parts)
        compiled = generate.generate(engine, tokens, images, 12)
        pair.engine.forget()
        assert compiled["token_ids"] == generate.generate(pair.engine, tokens, images, 12)["token_ids"]
    assert len(graphs) == 1


@torch.inference_mode()
def test_draft_that_looks_at_fewer_rows(pair):
    """Image features are pruned, the image's one token stays; the target's output does not change."""
    pair = pair(FAMILY)
    tokens, images = compose(pair, "Look: ", 2, "What?"), [draw(200, 200), draw(40, 40)]
    plain = generate.generate(pair.engine, tokens, images, 16)
    engine, _ = generate.load(pair.path, draft=pair.path, device=device.name, dtype=torch.float32)
    for ratio, rows in ((0.0, 68 + 17), (0.5, 34 + 9), (0.99, 2)):
        draft = engine.draft._replace(pruning=Pruning("random", ratio))
        engine.forget()
        drafted = generate.generate(engine, tokens, images, 16, draft=draft)
        assert drafted["token_ids"] == plain["token_ids"]
        assert drafted["draft_n_visual_tokens"] == rows
        assert draft.engine.cached.keys[: len(tokens)] == engine.cached.keys[: len(tokens)]


@torch.inference_mode()
def test_bfloat16(tmp_path):
    """Greedy text agrees with transformers in bfloat16 up to the first near-tie, and the rows do within rounding."""
    folder, reference = hub.make_llama_vision(tmp_path / "hub", dtype=torch.bfloat16)
    convert(folder)
    pair = Pair(folder, reference)
    pair.engine, _ = generate.load(pair.path, device=device.name, dtype=torch.bfloat16)
    for i in pair.model.args.cross_attention_layers:
        reference.model.language_model.layers[i].register_forward_hook(pass_unchanged, with_kwargs=True)
    images, tokens = [draw(200, 100)], compose(pair, 1, "What is it?")
    inputs = reference_inputs(images, tokens, pair.model.args.image_token_id)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    rows, expected = pair.engine.build_prompt(tokens, images).visual.float(), reference_rows(pair, inputs).float()
    assert rows.isfinite().all() and (rows - expected).norm() / expected.norm() < 0.02
    ours = generate.generate(pair.engine, tokens, images, 24)["token_ids"]
    theirs = greedy(reference, 24, **inputs)
    n = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), 24)
    if n < 24:
        prefix = reference_inputs(images, tokens + theirs[:n], pair.model.args.image_token_id)
        prefix["pixel_values"] = prefix["pixel_values"].bfloat16()
        best = reference(**prefix).logits[0, -1].float().topk(2)
        assert {ours[n], theirs[n]} == set(best.indices.tolist()) and best.values[0] - best.values[1] < 0.1
