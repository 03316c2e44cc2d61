"""A hub folder -> model.pth, params.json and tokenizer.model, the only files that generate.py reads.

Knows the hub's configurations and the names of its tensors, one function a family. Does not know what the tensors
compute. Tensors are copied one by one into a file that is renamed when it is complete, so that memory stays near the
size of the checkpoint at most and an interrupted conversion leaves no model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/Qwen/Qwen2.5-VL-3B-Instruct
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import command_for, explain_bus_errors, log, one_line

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint import check_args, write_checkpoint, write_whole
from model import ModelArgs, Transformer
from scripts.hf_tokenizer import convert_tokenizer, read_json
from scripts.published_models import MODELS, named
from vision import build_encoder


@dataclass
class Source:
    """Where a tensor of model.pth comes from: hub tensors, stacked along the rows, then changed."""

    keys: list[str]
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor
    dtype: torch.dtype | None = None  # None: as in the hub's file
    join: Callable[[list[Tensor]], Tensor] = lambda parts: torch.cat(parts) if len(parts) > 1 else parts[0]


Plan = dict[str, Source]  # name in model.pth -> where it comes from
Unused = list[str]  # regular expressions: hub keys of which nothing is made


def refuse_others(config: dict, supported: dict, where: str = "config.json") -> None:
    """Raises ValueError for an entry that is there and says something else than the only value that is supported."""
    for name, wanted in supported.items():
        if config.get(name) not in (None, wanted):
            raise ValueError(f"{where}: {name} = {config[name]} is not supported, only {wanted} is")


LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_rope_scaling(rope: dict, base: float, head_dim: int, context: int) -> tuple[dict | None, int]:
    """ModelArgs.rope_scaling, and the context in tokens: the recipe's where it stretches config.json's."""
    rope_type, original = rope.get("rope_type", rope.get("type", "default")), context
    if rope_type in ("default", "mrope"):
        return None, context
    if rope_type == "llama3":
        return {name: rope[name] for name in LLAMA3_SCALING}, context
    if rope_type == "linear":
        return {"factor": rope["factor"]}, max(context, round(rope["factor"] * original))
    if rope_type != "yarn":
        raise ValueError(f"config.json: rope scaling '{rope_type}' is not supported; llama3, yarn, linear, mrope are")
    original = rope.get("original_max_position_embeddings") or context
    scaling = yarn_scaling(rope | {"factor": rope.get("factor") or context / original}, base, head_dim, original)
    return scaling, max(context, round(scaling["factor"] * original))


def yarn_scaling(rope: dict, base: float, head_dim: int, original: int) -> dict:
    """The numbers of YaRN (arXiv 2309.00071, section 3): what is stretched, and what cos and sin are multiplied by.

    first, last: between these two of the head_dim / 2 frequencies the scaling sets in, linearly. They turn beta_fast
    and beta_slow times within the original context.
    """
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    ends = [head_dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns]
    first, last = (math.floor(ends[0]), math.ceil(ends[1])) if rope.get("truncate", True) else ends
    first, last = max(first, 0), min(last, head_dim - 1)
    mscale = lambda weight: 0.1 * weight * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    attention = mscale(1)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    if rope.get("attention_factor") is not None:
        attention = rope["attention_factor"]
    last += 0.001 * (first == last)
    return {"factor": rope["factor"], "first": first, "last": last, "attention_factor": attention}


def decoder_args(config: dict, **more) -> ModelArgs:
    """ModelArgs of a Llama- or Qwen2-style config.json. Raises ValueError for what the decoder does not compute."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    refuse_others(config, {"hidden_act": "silu", "use_sliding_window": False, "mlp_bias": False})
    if config.get("dual_chunk_attention_config"):
        raise ValueError("config.json: dual_chunk_attention_config is not supported: remove it for shorter contexts")
    heads, base = config["num_attention_heads"], float(config.get("rope_theta") or rope.get("rope_theta", 10000.0))
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    scaling, max_seq_len = read_rope_scaling(rope, base, head_dim, config["max_position_embeddings"])
    return ModelArgs(
        dim=config["hidden_size"],
        n_layer=config["num_hidden_layers"],
        n_head=heads,
        n_kv_head=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        n_tokens=config["vocab_size"],
        max_seq_len=max_seq_len,
        norm_eps=config["rms_norm_eps"],
        rope_base=base,
        rope_scaling=scaling,
        mrope_section=tuple(rope["mrope_section"]) if rope.get("mrope_section") else None,
        tie_embeddings=config.get("tie_word_embeddings", False),
        **more,
    )


def decoder_plan(args: ModelArgs, body: str = "model.", head: str = "lm_head.weight") -> Plan:
    """Raises ValueError, before anything is made of them, for args (args.vision included) that no model has."""
    check_args(args)
    plan = {"embedding.weight": Source([body + "embed_tokens.weight"]), "norm.weight": Source([body + "norm.weight"])}
    if not args.tie_embeddings:
        plan["output.weight"] = Source([head])
    for i in range(args.n_layer):
        hub, ours = f"{body}layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias") if args.qkv_bias else ("weight",):
            plan[f"{ours}attention.wqkv.{kind}"] = Source([f"{hub}self_attn.{x}_proj.{kind}" for x in "qkv"])
        plan[f"{ours}attention.wo.weight"] = Source([hub + "self_attn.o_proj.weight"])
        plan[f"{ours}feed_forward.w13.weight"] = Source([hub + "mlp.gate_proj.weight", hub + "mlp.up_proj.weight"])
        plan[f"{ours}feed_forward.w2.weight"] = Source([hub + "mlp.down_proj.weight"])
        plan[f"{ours}attention_norm.weight"] = Source([hub + "input_layernorm.weight"])
        plan[f"{ours}ffn_norm.weight"] = Source([hub + "post_attention_layernorm.weight"])
    return plan


def llama(config: dict, hub_dir: Path) -> tuple[ModelArgs, Plan, Unused]:
    if config.get("attention_bias"):
        raise ValueError("config.json: attention_bias = true is not supported for LlamaForCausalLM")
    args = decoder_args(config)
    return args, decoder_plan(args), []


def qwen2(config: dict, hub_dir: Path) -> tuple[ModelArgs, Plan, Unused]:
    args = decoder_args(config, qkv_bias=True)
    return args, decoder_plan(args), []


QWEN_VISION = {  # what fine-tunes saved by transformers 4.49 leave out of vision_config: the defaults of its class
    "hidden_size": 3584,
    "depth": 32,
    "num_heads": 16,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def read_image_processor(hub_dir: Path) -> dict:
    """What preprocessor_config.json says or, as transformers 5 writes it, processor_config.json; nothing that is null.

    {} where there is neither.
    """
    found = read_json(hub_dir / "preprocessor_config.json", optional=True)
    found = found or read_json(hub_dir / "processor_config.json", optional=True).get("image_processor") or {}
    return {name: value for name, value in found.items() if value is not None}


def qwen2_5_vl(config: dict, hub_dir: Path) -> tuple[ModelArgs, Plan, Unused]:
    vision, limits = QWEN_VISION | config["vision_config"], read_image_processor(hub_dir)
    if not limits:
        raise ValueError(
            f"{hub_dir} has no preprocessor_config.json, nor a processor_config.json with an image_processor: "
            "copy it from the model that this one was tuned from"
        )
    size = limits.get("size", {})
    args = decoder_args(config.get("text_config", config), qkv_bias=True, image_token_id=config["image_token_id"])
    args.tie_embeddings = config.get("tie_word_embeddings", args.tie_embeddings)
    args.vision = {
        "type": "qwen2_5_vl",
        "dim": vision["hidden_size"],
        "depth": vision["depth"],
        "n_head": vision["num_heads"],
        "hidden": vision["intermediate_size"],
        "out_dim": vision["out_hidden_size"],
        "patch": vision["patch_size"],
        "merge": vision["spatial_merge_size"],
        "window": vision["window_size"],
        "full_layers": vision["fullatt_block_indexes"],
        "min_pixels": limits.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or 56 * 56,
        "max_pixels": limits.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or 28 * 28 * 1280,
    }
    plan = decoder_plan(args)
    # A still picture is two equal frames: the kernel's two time steps act as their sum, which bfloat16 would round.
    kernel = Source(["visual.patch_embed.proj.weight"], lambda t: t.float().sum(2).flatten(1), torch.float32)
    plan["vision.patch_embed.weight"] = kernel
    plan["vision.norm.weight"] = Source(["visual.merger.ln_q.weight"])
    for kind in ("weight", "bias"):
        plan[f"vision.merger.0.{kind}"] = Source([f"visual.merger.mlp.0.{kind}"])
        plan[f"vision.merger.2.{kind}"] = Source([f"visual.merger.mlp.2.{kind}"])
    for i in range(vision["depth"]):
        hub, ours = f"visual.blocks.{i}.", f"vision.blocks.{i}."
        plan[f"{ours}norm1.weight"] = Source([hub + "norm1.weight"])
        plan[f"{ours}norm2.weight"] = Source([hub + "norm2.weight"])
        for kind in ("weight", "bias"):
            plan[f"{ours}wqkv.{kind}"] = Source([f"{hub}attn.qkv.{kind}"])
            plan[f"{ours}wo.{kind}"] = Source([f"{hub}attn.proj.{kind}"])
            plan[f"{ours}mlp.w13.{kind}"] = Source([f"{hub}mlp.gate_proj.{kind}", f"{hub}mlp.up_proj.{kind}"])
            plan[f"{ours}mlp.w2.{kind}"] = Source([f"{hub}mlp.down_proj.{kind}"])
    return args, plan, []


# transformers leaves out of config.json what its configuration classes have by default (5.17: Qwen2Config, Siglip...).
QWEN2_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
SO400M_LAYERS, SO400M_HEADS = 27, 16  # google/siglip-so400m-patch14-384, the tower of all Llava-OneVision models


def llava_hf(config: dict, hub_dir: Path) -> tuple[ModelArgs, Plan, Unused]:
    """Llava-OneVision as transformers saves it."""
    head, tower = "language_model.lm_head.weight", "vision_tower.vision_model."
    files = find_tensors(hub_dir, RENAMED["LlavaOnevisionForConditionalGeneration"])
    text, vision = QWEN2_DEFAULTS | config["text_config"], SIGLIP_DEFAULTS | config["vision_config"]
    refuse_others(text, {"model_type": "qwen2"}, "config.json, text_config")
    siglip = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    refuse_others(vision, siglip, "config.json, vision_config")
    full = {"vision_feature_select_strategy": "full", "projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    refuse_others(config, full | {"use_image_newline_parameter": True})
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    refuse_others(read_image_processor(hub_dir), pixels, "the image processor's configuration")
    args = decoder_args(text, qkv_bias=True, image_token_id=config["image_token_index"])
    args.tie_embeddings = is_tied(config, config["text_config"], head in files)
    layer = config.get("vision_feature_layer", -1)  # of the embedding and the layers' outputs
    if not isinstance(layer, int):
        raise ValueError(f"config.json: vision_feature_layer = {layer} is not supported, only one layer is")
    args.vision = {
        "type": "llava",
        "dim": vision["hidden_size"],
        "depth": layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer,
        "n_head": vision["num_attention_heads"],
        "hidden": vision["intermediate_size"],
        "out_dim": args.dim,
        "patch": vision["patch_size"],
        "tile": vision["image_size"],
        "resolutions": read_pinpoints(config.get("image_grid_pinpoints", "(1x1),(6x6)"), vision["image_size"]),
        "max_tiles": read_max_tiles(config.get("vision_aspect_ratio", "anyres_max_9")),
    }
    plan = decoder_plan(args, "language_model.model.", head)
    projector = {0: "multi_modal_projector.linear_1.", 2: "multi_modal_projector.linear_2."}
    plan |= siglip_plan(args.vision, tower, projector, "image_newline")
    return args, plan, siglip_unused(args.vision, tower)


def llava_original(config: dict, hub_dir: Path) -> tuple[ModelArgs, Plan, Unused]:
    """Llava-OneVision as its authors (lmms-lab) saved it. config.json names the tower: its shape is in the weights."""
    flat = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad", "mm_use_im_start_end": False}
    refuse_others(config, flat | {"mm_vision_select_feature": "patch", "mm_use_im_patch_token": False})
    if not (name := re.search(r"siglip.*-(\d+)$", config["mm_vision_tower"])):
        raise ValueError(f"config.json: mm_vision_tower = {config['mm_vision_tower']} is no known SigLIP with its size")
    tile, tower, files = int(name[1]), "model.vision_tower.vision_tower.vision_model.", find_tensors(hub_dir, {})
    stored = {key.removeprefix(tower).split(".")[2] for key in files if key.startswith(tower + "encoder.layers.")}
    args = decoder_args(config, qkv_bias=True)
    args.tie_embeddings = is_tied(config, config, "lm_head.weight" in files)
    args.vision = {
        "type": "llava",
        "dim": config["mm_hidden_size"],
        "depth": min(len(stored), SO400M_LAYERS - 1),  # mm_vision_select_layer is -2: the last but one of 27
        "n_head": SO400M_HEADS,
        "hidden": shape_of(tower + "encoder.layers.0.mlp.fc1.weight", files)[0],
        "out_dim": args.dim,
        "patch": shape_of(tower + "embeddings.patch_embedding.weight", files)[-1],
        "tile": tile,
        "resolutions": [(height, width) for width, height in read_pinpoints(config["image_grid_pinpoints"], tile)],
        "max_tiles": read_max_tiles(config["image_aspect_ratio"]),
    }
    projector = {0: "model.mm_projector.0.", 2: "model.mm_projector.2."}
    plan = decoder_plan(args) | siglip_plan(args.vision, tower, projector, "model.image_newline")
    return args, plan, siglip_unused(args.vision, tower)


def is_tied(config: dict, text: dict, has_head: bool) -> bool:
    """Whether the output layer is the embedding: as config.json says; where it says nothing, if there is no other."""
    return config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", not has_head)


def read_pinpoints(pinpoints: list | str, tile: int) -> list[tuple[int, int]]:
    """Pairs of sides in pixels, from a list, its text, or "(1x1),...,(6x6)": all from first to last, in tiles."""
    if isinstance(pinpoints, str) and (corners := re.findall(r"\((\d+)x(\d+)\)", pinpoints)):
        (a, b), (c, d) = (map(int, corner) for corner in (corners[0], corners[-1]))
        c, d = min(c, 99), min(d, 99)  # too many are refused later, not made
        pinpoints = [(i * tile, j * tile) for i in range(a, c + 1) for j in range(b, d + 1)]
    elif isinstance(pinpoints, str):
        pinpoints = re.findall(r"(\d+)\s*,\s*(\d+)", pinpoints)
    pairs = [(int(a), int(b)) for a, b in pinpoints]
    if not pairs or any(side < tile or side % tile for pair in pairs for side in pair):
        raise ValueError(f"config.json: image_grid_pinpoints must be pairs of multiples of {tile}")
    return pairs


def read_max_tiles(aspect_ratio: str) -> int:
    if not (match := re.fullmatch(r"anyres_max_(\d+)", aspect_ratio)):
        raise ValueError(f"config.json: images are cut up by '{aspect_ratio}'; only anyres_max_<number> is supported")
    return int(match[1])


def siglip_plan(vision: dict, tower: str, projector: dict[int, str], newline: str) -> Plan:
    plan = {
        "vision.patch_embed.weight": Source([tower + "embeddings.patch_embedding.weight"], lambda t: t.flatten(1)),
        "vision.patch_embed.bias": Source([tower + "embeddings.patch_embedding.bias"]),
        "vision.position_embed": Source([tower + "embeddings.position_embedding.weight"]),
        "vision.newline": Source([newline]),
    }
    for kind in ("weight", "bias"):
        for i, hub in projector.items():
            plan[f"vision.projector.{i}.{kind}"] = Source([hub + kind])
        for i in range(vision["depth"]):
            hub, ours = f"{tower}encoder.layers.{i}.", f"vision.blocks.{i}."
            plan[f"{ours}norm1.{kind}"] = Source([f"{hub}layer_norm1.{kind}"])
            plan[f"{ours}norm2.{kind}"] = Source([f"{hub}layer_norm2.{kind}"])
            plan[f"{ours}wqkv.{kind}"] = Source([f"{hub}self_attn.{x}_proj.{kind}" for x in "qkv"])
            plan[f"{ours}wo.{kind}"] = Source([f"{hub}self_attn.out_proj.{kind}"])
            plan[f"{ours}mlp.0.{kind}"] = Source([f"{hub}mlp.fc1.{kind}"])
            plan[f"{ours}mlp.2.{kind}"] = Source([f"{hub}mlp.fc2.{kind}"])
    return plan


def siglip_unused(vision: dict, tower: str) -> Unused:
    """The rows are the output of a layer, as it is: what the tower has behind that layer is not for them."""
    behind = [f"encoder.layers.{i}." for i in range(vision["depth"], SO400M_LAYERS)] + ["post_layernorm.", "head."]
    buffer = "embeddings.position_ids"  # 0, 1, 2, ...
    return ["^" + re.escape(tower + name) for name in (*behind, buffer)]


MLLAMA_TILES = 4
MLLAMA_GRIDS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]  # (height, width) in tiles


def mllama(config: dict, hub_dir: Path) -> tuple[ModelArgs, Plan, Unused]:
    text, vision = config["text_config"], config["vision_config"]
    assumed = {"hidden_act": "gelu", "norm_eps": 1e-5, "num_channels": 3}
    assumed |= {"max_num_tiles": MLLAMA_TILES, "supported_aspect_ratios": MLLAMA_GRIDS}
    for name, wanted in assumed.items():
        if vision.get(name, wanted) != wanted:
            raise ValueError(f"config.json: vision {name} = {vision[name]} is not supported, only {wanted} is")
    args = decoder_args(text, image_token_id=config["image_token_index"])
    args.n_input_only = 8  # by the hub's code, and Meta's (learnable_embedding); the first is the image token
    args.cross_attention_layers = tuple(text["cross_attention_layers"])
    args.vision = {
        "type": "llama3_2_vision",
        "dim": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "n_global": vision["num_global_layers"],
        "n_head": vision["attention_heads"],
        "hidden": vision["intermediate_size"],
        "out_dim": text["hidden_size"],
        "tile": vision["image_size"],
        "patch": vision["patch_size"],
        "max_tiles": MLLAMA_TILES,
        "keep": vision["intermediate_layers_indices"],
    }
    plan = decoder_plan(args, "language_model.model.", "language_model.lm_head.weight")
    for i in args.cross_attention_layers:
        hub, ours = f"language_model.model.layers.{i}.", f"layers.{i}."
        del plan[f"{ours}attention.wqkv.weight"]
        plan[f"{ours}attention.wq.weight"] = Source([hub + "cross_attn.q_proj.weight"])
        plan[f"{ours}attention.wkv.weight"] = Source([f"{hub}cross_attn.{x}_proj.weight" for x in "kv"])
        plan[f"{ours}attention.wo.weight"] = Source([hub + "cross_attn.o_proj.weight"])
        plan[f"{ours}attention.q_norm.weight"] = Source([hub + "cross_attn.q_norm.weight"])
        plan[f"{ours}attention.k_norm.weight"] = Source([hub + "cross_attn.k_norm.weight"])
        plan[f"{ours}gates"] = Source([hub + "cross_attn_attn_gate", hub + "cross_attn_mlp_gate"])
    return args, plan | mllama_encoder_plan(args.vision), []


def mllama_encoder_plan(vision: dict) -> Plan:
    plan = {"vision.patch_embed.weight": Source(["vision_model.patch_embedding.weight"], lambda t: t.flatten(1))}
    plan["vision.place"] = Source(
        [f"vision_model.{name}" for name in PLACE_PARTS], dtype=torch.float32, join=add_places
    )
    parts = [f"vision_model.post_tile_positional_embedding.{name}" for name in ("embedding.weight", "gate")]
    plan["vision.tile_place"] = Source(parts, dtype=torch.float32, join=lambda parts: gated_tiles(*parts))
    for kind in ("weight", "bias"):
        plan[f"vision.norm_pre.{kind}"] = Source([f"vision_model.layernorm_pre.{kind}"])
        plan[f"vision.norm_post.{kind}"] = Source([f"vision_model.layernorm_post.{kind}"])
        plan[f"vision.projector.{kind}"] = Source([f"multi_modal_projector.{kind}"])
    for i in range(vision["depth"] + vision["n_global"]):
        ours, j = f"vision.blocks.{i}.", i - vision["depth"]
        hub = f"vision_model.transformer.layers.{i}." if j < 0 else f"vision_model.global_transformer.layers.{j}."
        plan[f"{ours}wqkv.weight"] = Source([f"{hub}self_attn.{x}_proj.weight" for x in "qkv"])
        plan[f"{ours}wo.weight"] = Source([hub + "self_attn.o_proj.weight"])
        for kind in ("weight", "bias"):
            plan[f"{ours}norm1.{kind}"] = Source([f"{hub}input_layernorm.{kind}"])
            plan[f"{ours}norm2.{kind}"] = Source([f"{hub}post_attention_layernorm.{kind}"])
            plan[f"{ours}mlp.0.{kind}"] = Source([f"{hub}mlp.fc1.{kind}"])
            plan[f"{ours}mlp.2.{kind}"] = Source([f"{hub}mlp.fc2.{kind}"])
        if j >= 0:
            plan[f"{ours}gates"] = Source([hub + "gate_attn", hub + "gate_ffn"])
    return plan


PLACE_PARTS = [
    "gated_positional_embedding.embedding",  # [1 + P, E]
    "gated_positional_embedding.gate",  # [1]
    "gated_positional_embedding.tile_embedding.weight",  # [grids, tiles * (1 + P) * E]
    "pre_tile_positional_embedding.embedding.weight",  # [grids, tiles * E]
    "pre_tile_positional_embedding.gate",  # [1]
    "class_embedding",  # [E]
]


def add_places(parts: list[Tensor]) -> Tensor:
    """[grids, tiles, 1 + P, E] the sum of all that the encoder adds to its patches, in float32.

    It depends on nothing but the grid of tiles, so it is added up once; bfloat16 would round the sums.
    """
    position, gate, tile_position, tile, tile_gate, class_token = (part.float() for part in parts)
    tile_position = tile_position.view(-1, MLLAMA_TILES, *position.shape)
    place = (1 - gate.tanh()) * position + gate.tanh() * tile_position
    place[:, :, 0] += class_token
    place[:, :, 1:] += gated_tiles(tile, tile_gate)
    return place


def gated_tiles(tile: Tensor, gate: Tensor) -> Tensor:
    """[grids, tiles, 1, E] from [grids, tiles * E] and the gate's one number."""
    return tile.float().view(len(tile), MLLAMA_TILES, 1, -1) * gate.float().tanh()


# How a prompt shows an image: its token, between what stands in front of it and behind it. The line break is that of
# LLaVA-NeXT's conversation.py, and of llava-hf's template.
IMAGES = {
    "qwen2_5_vl": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "llava": ("", "<image>", "\n"),
    "llama3_2_vision": ("", "<|image|>", ""),
}
ARCHITECTURES = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": qwen2,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "LlavaOnevisionForConditionalGeneration": llava_hf,
    "LlavaQwenForCausalLM": llava_original,
    "MllamaForConditionalGeneration": mllama,
}


# transformers 4.52 and later can save tensors under the names of its modules: pattern -> what the hub's files say.
RENAMED = {
    "Qwen2_5_VLForConditionalGeneration": {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."},
    "LlavaOnevisionForConditionalGeneration": {
        r"^model\.language_model\.": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)": "",
        r"^vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
    },
    "MllamaForConditionalGeneration": {
        r"^model\.language_model\.": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.(?=vision_model\.|multi_modal_projector\.)": "",
    },
}
Place = tuple[Path, str]  # a file, and the key in it


def find_tensors(hub_dir: Path, renamed: dict[str, str]) -> dict[str, Place]:
    """Where the tensors are, by their keys in the hub's files, of which `renamed` knows other spellings."""
    places = {}
    for key, file in find_files(hub_dir).items():
        name = key
        for pattern, replacement in renamed.items():
            name = re.sub(pattern, replacement, name)
        places[name] = (file, key)
    return places


def find_files(hub_dir: Path) -> dict[str, Path]:
    """Key -> the file that holds it; safetensors if there are any, else pytorch_model.bin."""
    for name, keys_of in (("model.safetensors", safetensors_keys), ("pytorch_model.bin", bin_keys)):
        if (index := hub_dir / f"{name}.index.json").exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} names no weights: download it again")
            if wrong := [file for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]:
                raise ValueError(f"{index} names {wrong[0]!r}, which is no file beside it: download it again")
            files = {key: hub_dir / file for key, file in weight_map.items()}
            if missing := sorted({file.name for file in files.values() if not file.exists()}):
                raise ValueError(f"{hub_dir} lacks {', '.join(missing)}, named in {index.name}: download it again")
            present = {key: file for file in set(files.values()) for key in keys_of(file)}
            if lost := sorted(set(files) - set(present)):
                raise ValueError(f"{files[lost[0]]} lacks {lost[0]}, which {index.name} promises: download it again")
            return present
        if (file := hub_dir / name).exists():
            return dict.fromkeys(keys_of(file), file)
    raise ValueError(f"{hub_dir} holds no weights: neither model.safetensors nor pytorch_model.bin, nor their index")


def safetensors_keys(file: Path) -> list[str]:
    with open_safetensors(file) as tensors:
        return list(tensors.keys())


def bin_keys(file: Path) -> list[str]:
    return list(load_bin(file))


def open_safetensors(file: Path):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {file}: {error}; download it again") from None


def load_bin(file: Path) -> dict[str, Tensor]:
    """Mapped where the file's format allows it: files older than torch 1.6 have to be read as a whole."""
    try:
        return torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}; download it again") from None
        return load_old_bin(file)
    except Exception as error:  # the unpickler's errors have no common class
        raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}; download it again") from None


@lru_cache(maxsize=1)  # a file's tensors are asked for one by one, and mostly one file after the other
def load_old_bin(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # not a checkpoint at all: a page of the hub, or git-lfs' pointer to the real file
        raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}; download it again") from None


def read_tensor(file: Path, key: str) -> Tensor:
    """Opened for every tensor, so that no more than one of them stays mapped."""
    if file.suffix == ".bin":
        return load_bin(file)[key]
    with open_safetensors(file) as tensors:
        return tensors.get_tensor(key)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors'
QUANTIZED = (".qweight", ".SCB", ".bitsandbytes__nf4", ".weight_scale_inv")  # AWQ and GPTQ, bitsandbytes, fp8
CONVERT_THE_ORIGINAL = "convert the original one, then run quantize.py"


def shape_of(key: str, files: dict[str, Place]) -> torch.Size:
    if key not in files:
        raise ValueError(f"the weights lack {key}: the download is incomplete or config.json is another's")
    return read_tensor(*files[key]).shape


def always_unused(args: ModelArgs) -> Unused:
    """Buffers of old files are computed anew; a tied output layer repeats the embedding."""
    return [r"rotary_emb\.inv_freq$", *([r"lm_head\.weight$"] if args.tie_embeddings else [])]


def check_keys(plan: Plan, unused: Unused, files: dict[str, Place]) -> None:
    """Every key of the hub is used, or known to be unused; every key of the plan is there."""
    wanted = {key for source in plan.values() for key in source.keys}
    if any(key.endswith(QUANTIZED) for key in files):
        raise ValueError(f"a quantized checkpoint, by its tensors' names: {CONVERT_THE_ORIGINAL}")
    if missing := sorted(wanted - set(files)):
        raise ValueError(f"the weights lack {some(missing)}: the download is incomplete or config.json is another's")
    if unknown := sorted(files[key][1] for key in set(files) - wanted if not any(re.search(p, key) for p in unused)):
        raise ValueError(f"the weights hold {some(unknown)}, unknown to this architecture: is config.json another's?")


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def expected_shapes(args: ModelArgs) -> dict[str, torch.Size]:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(args).state_dict().items()}
        if args.vision:
            encoder = build_encoder(args.vision).state_dict()
            shapes |= {f"vision.{name}": tensor.shape for name, tensor in encoder.items()}
    if args.tie_embeddings:
        del shapes["output.weight"]
    return shapes


def build_tensor(name: str, source: Source, files: dict[str, Place], shape: torch.Size) -> Tensor:
    parts = [read_tensor(*files[key]) for key in source.keys]
    try:
        tensor = source.change(source.join(parts))
    except (RuntimeError, IndexError):
        tensor = parts[0]  # parts that do not fit together: reported as a wrong shape
    if tensor.shape != shape:
        found = ", ".join(f"{files[key][1]} {list(part.shape)}" for key, part in zip(source.keys, parts, strict=True))
        raise ValueError(f"{name} should be {list(shape)} by config.json, but the weights hold {found}")
    return tensor


def stored_dtype(source: Source, files: dict[str, Place]) -> torch.dtype:
    """Of parts in several dtypes the widest."""
    return source.dtype or reduce(torch.promote_types, (dtype_of(*files[key]) for key in source.keys))


def dtype_of(file: Path, key: str) -> torch.dtype:
    if file.suffix == ".bin":
        return load_bin(file)[key].dtype
    with open_safetensors(file) as tensors:
        return DTYPES.get(tensors.get_slice(key).get_dtype()) or tensors.get_tensor(key).dtype


def keep_other_head(args: ModelArgs, plan: Plan, files: dict[str, Place]) -> None:
    """An output layer that differs from the embedding is kept, whatever config.json says of ties.

    LoRA merges with modules_to_save write such files; transformers does not tie them either.
    """
    head = next((key for key in files if key.endswith("lm_head.weight")), None)
    if args.tie_embeddings and head:
        embedding = read_tensor(*files[plan["embedding.weight"].keys[0]])
        if not torch.equal(read_tensor(*files[head]), embedding):
            args.tie_embeddings, plan["output.weight"] = False, Source([head])


def check_row(name: str, args: ModelArgs) -> None:
    """ValueError where args, made of config.json, are not the row `name` of published_models.MODELS."""
    # An Instruct or chat model without a row of its own has its base model's numbers.
    names = (name, name.removesuffix("-Instruct"), name.replace("-chat", ""))
    row = next((known for known in names if known in MODELS), None)
    if row is None:
        raise ValueError(f"--model_name {name} is not in the table; these are: {', '.join(MODELS)}")
    wanted = asdict(named(row)) | {"n_tokens": args.n_tokens}
    if difference := first_difference(asdict(args), wanted):
        raise ValueError(f"config.json is not that of {name}: {difference}")


def first_difference(found: dict, wanted: dict) -> str | None:
    for key in {**wanted, **found}:
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if difference := first_difference(a, b):
                return f"{key}.{difference}"
        elif a != b:
            return f"{key} is {a}, the table has {b}"
    return None


def convert(hub_dir: Path, model_name: str | None = None) -> Path:
    """Make model.pth, whose path is returned, and params.json beside it.

    Raises ValueError or OSError, one line, for whatever is wrong with the folder; then nothing new is left.
    model_name: a row of published_models.MODELS that config.json has to agree with.
    """
    if not hub_dir.is_dir():
        raise ValueError(f"no such folder: {hub_dir}; download it first (scripts/download.py)")
    config = read_json(hub_dir / "config.json")
    architecture = next(iter(named if isinstance(named := config.get("architectures"), list) else ()), "without a name")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture} is not supported; these are: {', '.join(ARCHITECTURES)}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        method = method or "of an unknown method"
        raise ValueError(f"a quantized checkpoint ({method}): {CONVERT_THE_ORIGINAL}")
    try:
        args, plan, unused = ARCHITECTURES[architecture](config, hub_dir)
    except KeyError as error:
        raise ValueError(f"{hub_dir / 'config.json'} lacks {error}: download it again") from None
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{hub_dir / 'config.json'} is not as {architecture} has it ({error})") from None
    files = find_tensors(hub_dir, RENAMED.get(architecture, {}))
    keep_other_head(args, plan, files)
    check_keys(plan, unused + always_unused(args), files)
    shapes = expected_shapes(args)
    image = IMAGES[args.vision["type"]] if args.vision else None
    settings = convert_tokenizer(hub_dir, hub_dir, image)
    if image and args.image_token_id is None:
        args.image_token_id = settings["special_tokens"][image[1]]
    n_rows = shapes["embedding.weight"][0]  # the decoder looks the token up before a row of the image replaces it
    if args.vision and args.image_token_id >= n_rows:
        raise ValueError(f"the image token is {args.image_token_id}, the embedding has {n_rows} rows only")
    if model_name:
        check_row(model_name, args)
    args.n_tokens = min(args.vocab_size, settings["n_tokens"])
    params = json.dumps({"model": asdict(args), "tokenizer": settings}, indent=1)
    tensors = ((name, build_tensor(name, source, files, shapes[name])) for name, source in plan.items())
    outline = {name: (shapes[name], stored_dtype(source, files)) for name, source in plan.items()}
    result = hub_dir / "model.pth"
    write_checkpoint(result, outline, tensors)
    write_whole(hub_dir / "params.json", params.encode())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="a downloaded folder, and the results'")
    parser.add_argument("--model_name", help="refuse unless config.json is that of this row of published_models.py")
    args = parser.parse_args()
    explain_bus_errors("convert_hf_checkpoint.py")
    try:
        result = convert(args.checkpoint_dir, args.model_name)
    except (ValueError, OSError) as error:
        print(f"convert_hf_checkpoint.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("convert_hf_checkpoint.py: interrupted, nothing was written", file=sys.stderr)
        sys.exit(130)
    log(f"wrote {result}; next: {command_for(result)}")


if __name__ == "__main__":
    main()
