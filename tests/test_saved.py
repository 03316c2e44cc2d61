"""Checkpoints as transformers 4.5x and 5, mergers of LoRA and users leave them, against transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model import inverse_frequencies
from scripts.convert_hf_checkpoint import QWEN2_DEFAULTS, convert, decoder_args
from tests.helpers import hub
from tests.helpers.checkpoints import Pair

# What the hub's files say -> the names of transformers' modules, which 4.52 and later can save.
MODULES = {
    "qwen2.5-vl": {"visual.": "model.visual.", "model.": "model.language_model."},
    "llava-hf": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    "llama-3.2-vision": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_model.": "model.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


def copy_hub(source: Path, folder: Path) -> Path:
    """The hub's files of a converted folder, to be converted anew."""
    shutil.copytree(source, folder)
    for name in ("model.pth", "params.json"):
        (folder / name).unlink()
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_checkpoint(folder: Path, other: Path) -> bool:
    first, second = (torch.load(path / "model.pth", weights_only=True) for path in (folder, other))
    params = [json.loads((path / "params.json").read_text()) for path in (folder, other)]
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return same and params[0] == params[1]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", MODULES)
def test_keys_of_the_module_tree(pair, tmp_path, family, mixed):
    pair = pair(family)
    folder, names = copy_hub(pair.folder, tmp_path / "hub"), set(pair.reference.state_dict())
    state = {}
    for i, (key, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        start = next(start for start in MODULES[family] if key.startswith(start)) if "lm_head" not in key[:8] else ""
        module = MODULES[family][start] + key.removeprefix(start) if start else key
        assert module in names or "position_ids" in module
        state[key if mixed and i % 2 else module] = tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    convert(folder)
    assert same_checkpoint(folder, pair.folder)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-hf"])
def test_image_processor_inside_processor_config(pair, tmp_path, family):
    pair = pair(family)
    folder = copy_hub(pair.folder, tmp_path / "hub")
    limits = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    nested = limits | {"do_pad": None, "crop_size": None, "image_processor_type": "Qwen2VLImageProcessorFast"}
    if family == "qwen2.5-vl":
        size = {"min_pixels": nested["min_pixels"], "max_pixels": nested["max_pixels"]}
        nested |= {"size": size, "min_pixels": None, "max_pixels": None}
    else:
        nested |= {"image_mean": None}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested, "processor_class": "X"}))
    convert(folder)
    assert same_checkpoint(folder, pair.folder)


def test_size_of_images_as_transformers_reads_it(pair, tmp_path):
    folder = copy_hub(pair("qwen2.5-vl").folder, tmp_path / "hub")
    for content in ({}, {"size": None}, {"size": {"shortest_edge": 784, "longest_edge": 7840}}, {"max_pixels": 9999}):
        content = {"image_processor_type": "Qwen2VLImageProcessor", **content}
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
        convert(folder)
        size = transformers.Qwen2VLImageProcessor.from_pretrained(folder).size
        vision = json.loads((folder / "params.json").read_text())["model"]["vision"]
        assert (vision["min_pixels"], vision["max_pixels"]) == (size["shortest_edge"], size["longest_edge"])


def test_without_an_image_processor(pair, tmp_path):
    folder = copy_hub(pair("qwen2.5-vl").folder, tmp_path / "hub")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        ValueError, match="has no preprocessor_config.json, nor a processor_config.json with an image_pr"
    ):
        convert(folder)


# ---- weights -------------------------------------------------------------------------------------------------------


def logits_of(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = Pair(folder, None).model
    model.setup_caches(len(tokens))
    with torch.inference_mode():
        return model(torch.tensor(tokens), torch.arange(len(tokens)))


@torch.inference_mode()
def reference_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("family", ["llama3.2", "qwen2.5-tied"])
def test_an_output_layer_of_its_own_in_a_tied_model(pair, tmp_path, family):
    """Dropped where it repeats the embedding, kept where it does not, as transformers does."""
    pair = pair(family)
    for name, change in (("equal", lambda head: head), ("other", lambda head: head.flip(0))):
        folder = copy_hub(pair.folder, tmp_path / name)
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = change(state["model.embed_tokens.weight"].clone()).contiguous()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        convert(folder)
        assert ("output.weight" in torch.load(folder / "model.pth", weights_only=True)) == (name == "other")
        tokens = list(range(5, 40))
        torch.testing.assert_close(logits_of(folder, tokens), reference_logits(folder, tokens), atol=1e-4, rtol=0)


def test_parts_of_a_fused_tensor_in_several_dtypes(tmp_path):
    folder, _ = hub.make_llama(tmp_path / "llama", {})
    state = load_file(folder / "model.safetensors")
    narrow = {"q_proj": torch.bfloat16, "gate_proj": torch.float16, "down_proj": torch.bfloat16}
    state |= {key: t.to(narrow.get(key.split(".")[-2], t.dtype)) for key, t in state.items()}
    state["model.layers.1.self_attn.k_proj.weight"] = state["model.layers.1.self_attn.k_proj.weight"].half()
    state["model.layers.1.self_attn.v_proj.weight"] = state["model.layers.1.self_attn.v_proj.weight"].bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    convert(folder)
    found = torch.load(folder / "model.pth", weights_only=True)
    assert (
        found["layers.0.attention.wqkv.weight"].dtype
        == found["layers.0.feed_forward.w13.weight"].dtype
        == torch.float32
    )
    assert found["layers.1.attention.wqkv.weight"].dtype == torch.float32  # bfloat16 and float16
    assert found["layers.0.feed_forward.w2.weight"].dtype == torch.bfloat16
    tokens = list(range(5, 40))
    torch.testing.assert_close(logits_of(folder, tokens), reference_logits(folder, tokens), atol=1e-4, rtol=0)


# ---- longer contexts -----------------------------------------------------------------------------------------------

ORIGINAL = {"original_max_position_embeddings": 64}
RECIPES = [
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},  # Qwen2.5's
    {"rope_type": "yarn", "factor": 16.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 8.0, **ORIGINAL, "mscale": 0.707, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 8.0, **ORIGINAL, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 1.0, **ORIGINAL},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.5},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_rope_scaling(tmp_path, recipe):
    folder, reference = hub.make_llama(tmp_path / "llama", {"rope_scaling": recipe, "rope_theta": 10000.0})
    convert(folder)
    args = Pair(folder, None).model.args
    rotary = reference.model.rotary_emb
    torch.testing.assert_close(inverse_frequencies(args, torch.device("cpu")), rotary.inv_freq, rtol=1e-6, atol=0)
    assert args.rope_scaling.get("attention_factor", 1.0) == pytest.approx(rotary.attention_scaling, rel=1e-12)
    original = recipe.get("original_max_position_embeddings", 1024)
    assert args.max_seq_len == max(1024, recipe["factor"] * original)
    tokens = [5 + i * i % 240 for i in range(300)]
    expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits_of(folder, tokens), expected, atol=2e-4, rtol=0)


def test_yarn_of_a_qwen2_5_config():
    """The numbers of Qwen2.5-7B-Instruct with the recipe of its model card, and of a VL model."""
    config = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0}
    config = QWEN2_DEFAULTS | config | {"rope_scaling": RECIPES[0] | {"original_max_position_embeddings": 32768}}
    args = decoder_args(config)
    rotary = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(transformers.Qwen2Config(**config))
    torch.testing.assert_close(inverse_frequencies(args, torch.device("cpu")), rotary.inv_freq, rtol=1e-6, atol=0)
    assert args.max_seq_len == 131072 and args.rope_scaling["attention_factor"] == rotary.attention_scaling
    sections = {"mrope_section": [16, 24, 24]}
    assert decoder_args(config | {"rope_scaling": config["rope_scaling"] | sections}).mrope_section == (16, 24, 24)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
    ],
)
def test_recipes_that_are_refused_by_name(tmp_path, change, name):
    folder, _ = hub.make_llama(tmp_path / "llama", {})
    edit_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=name):
        convert(folder)
