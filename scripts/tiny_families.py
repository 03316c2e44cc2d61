"""The three families of tiny vision-language models that train_tiny.py trains: shapes, forward passes, files.

Knows, of each family, how `transformers` builds it, how it writes a conversation and cuts a picture up, how to run it
on a batch of pictures of one size, and how its files look on the hub. Does not know the corpus, losses or optimizers.

Letters: B scenes a batch, L tokens a sample, T tiles an image, P patches a tile (Qwen: an image), N visual rows an
image, E encoder width, D decoder width.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, processors
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH = 14  # pixels, in all three families
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and std
SYSTEM = "You are a helpful assistant."  # Qwen's default system prompt
SPLIT = (  # Qwen2's pattern
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Size = tuple[int, int]  # of a picture: width, height
Cell = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; `shape` is what its family's builder needs to know."""

    steps: int
    naming_steps: int  # of the steps, those at the beginning that train the encoder alone
    learning_rate: float
    shape: dict
    decoder: str | None = None  # the folder under checkpoints/ whose decoder is the beginning of this one's


class Family:
    """What the families share: the decoder is Qwen2's, and visual rows stand in the sequence."""

    ship_name: str  # of the target's folder under checkpoints/; the draft's ends in -draft
    recipes: dict[str, Recipe]
    sample_tokens: int  # L: the image's prefix and as many turns as fit
    special_tokens: list[str]
    image_token: str
    pad_token = "<|endoftext|>"
    before_turn = "\n<|im_start|>user\n"  # after the end of an earlier reply
    after_question = "<|im_end|>\n<|im_start|>assistant\n"
    end_of_turn = "<|im_end|>"
    model_class: type
    processor_class: type
    preprocessing: dict

    # A family also has:
    #   build(tokenizer, shape) -> a model with random weights, float32
    #   image_prefix(tokenizer, size) -> tokens in front of the first question, rotary positions [n, 1 or 3]
    #   cells(size) -> a Cell for each of the N rows; None for those that need not name anything
    #   pixels(image) -> what encode takes of a picture, uint8
    #   encode(model, pixels [B, ...], size) -> visual rows [B, N, D]
    #   stock_inputs(processor, image, is_image [1, n]) -> what transformers' own forward takes beside n input_ids
    #   save(model, tokenizer, hub_dir)

    def finish_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """Adds what differs between the families to their common vocabulary: special tokens come last."""
        tokens = [AddedToken(token, special=True, normalized=False) for token in self.special_tokens]
        tokenizer.add_special_tokens(tokens)
        return tokenizer

    def decode(self, model, tokens: Tensor, rows: Tensor, mask: Tensor, rope_pos: Tensor):
        """The decoder's output on tokens [B, L] with rows [B, N, D], a mask [B, 1, L, L] and rope_pos [3, B, L]."""
        embedded = model.get_input_embeddings()(tokens)
        first = self.first_image_token(model, tokens)
        embedded = torch.cat([embedded[:, :first], rows, embedded[:, first + rows.shape[1] :]], 1)
        inputs = {"inputs_embeds": embedded, "attention_mask": mask, "use_cache": False}
        position_ids = rope_pos if rope_pos.shape[0] == 3 else rope_pos[0]
        return model.model.language_model(**inputs, position_ids=position_ids, output_hidden_states=True)

    def first_image_token(self, model, tokens: Tensor) -> int:
        return tokens[0].tolist().index(model.config.image_token_id)  # the same in every sample of the batch

    def n_image_tokens(self, size: Size) -> int:
        return len(self.cells(size))

    def load(self, hub_dir: Path) -> torch.nn.Module:
        return self.model_class.from_pretrained(hub_dir, dtype=torch.bfloat16).eval()


# ---- attention, written out: faster here than the fused kernels ----------------------------------------------------


def attend_tokens(module, query, key, value, mask, scaling, **_):
    """The attention of transformers' modules [B, heads, L, head_dim]; registered by name."""
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = (query * scaling) @ key.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    module.scores = scores  # thought_loss looks at them
    return (scores.softmax(-1) @ value).transpose(1, 2), None


transformers.AttentionInterface.register("written_out", attend_tokens)


def attend_patches(attention: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """Attention among the P patches of an image [B, P, E], of Qwen's encoder."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, P, hd]
    q, k = (t * cos + rotate_half(t) * sin for t in (q * attention.scaling, k))
    scores = q @ k.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def normalize(pixels: Tensor, mean: tuple, std: tuple) -> Tensor:
    """Patches [..., 3 * 14 * 14] from 0..255 to zero mean and unit variance."""
    mean, std = (torch.tensor(x).repeat_interleave(PATCH**2) for x in (mean, std))
    return (pixels / 255 - mean) / std


# ---- beginning from another family's decoder -----------------------------------------------------------------------


SAME_ROLE = {  # special tokens of Llama-3 and those of Qwen that stand in their place
    "<|begin_of_text|>": "<|endoftext|>",
    "<|end_of_text|>": "<|endoftext|>",
    "<|start_header_id|>": "<|im_start|>",
    "<|eot_id|>": "<|im_end|>",
}


def start_decoder(model: torch.nn.Module, tokenizer: Tokenizer, checkpoint_dir: Path) -> set[str]:
    """Copies the decoder of a converted Qwen2.5-VL: text, questions and answers are then known already.

    Biases are left out where the model has none, and layers where it has fewer. A cross-attention layer, which Qwen
    lacks, starts with the attention of the layer behind it. Returns the names of the weights that came from there.
    """
    embedding, state = read_decoder(checkpoint_dir)
    n_layers = 1 + max(number for number, _ in state if number is not None)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint_dir / "tokenizer.model"))
    theirs = {pieces.id_to_piece(i): i for i in range(min(len(embedding), pieces.get_piece_size()))}
    decoder, prefix = model.model.language_model, "model.language_model."
    own, started = dict(model.named_parameters()), {prefix + "embed_tokens.weight"}
    self_layers = [i for i, layer in enumerate(decoder.layers) if hasattr(layer, "self_attn")]
    places = {round(i * (n_layers - 1) / (len(self_layers) - 1)): layer for i, layer in enumerate(self_layers)}
    with torch.no_grad():
        for (number, name), weight in state.items():
            name = prefix + (name if number is None else f"layers.{places.get(number)}.{name}")
            if name in own:
                own[name].copy_(weight)
                started.add(name)
        for token, row in tokenizer.get_vocab(with_added_tokens=True).items():
            if (known := theirs.get(SAME_ROLE.get(token, token))) is not None:
                decoder.embed_tokens.weight[row] = embedding[known].float()
        if "lm_head.weight" in own:
            own["lm_head.weight"].copy_(decoder.embed_tokens.weight[: len(own["lm_head.weight"])])
            started.add("lm_head.weight")
        for layer, behind in zip(decoder.layers, decoder.layers[1:]):
            if hasattr(layer, "cross_attn"):
                for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(layer.cross_attn, part).weight.copy_(getattr(behind.self_attn, part).weight)
                layer.input_layernorm.weight.copy_(behind.input_layernorm.weight)
    return started


def read_decoder(checkpoint_dir: Path) -> tuple[Tensor, dict[tuple[int | None, str], Tensor]]:
    """The embedding of a converted checkpoint, and (layer, the hub's name there) -> weight of the rest."""
    args = json.loads((checkpoint_dir / "params.json").read_text())["model"]
    state = torch.load(checkpoint_dir / "model.pth", weights_only=True)
    q, kv = (args[name] * args["head_dim"] for name in ("n_head", "n_kv_head"))
    parts = {
        "attention.wqkv": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [q, kv, kv]),
        "attention.wo": (["self_attn.o_proj"], [args["dim"]]),
        "feed_forward.w13": (["mlp.gate_proj", "mlp.up_proj"], [args["intermediate_size"]] * 2),
        "feed_forward.w2": (["mlp.down_proj"], [args["dim"]]),
        "attention_norm": (["input_layernorm"], [args["dim"]]),
        "ffn_norm": (["post_attention_layernorm"], [args["dim"]]),
    }
    read = {(None, "norm.weight"): state["norm.weight"]}
    for name, weight in state.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            ours, kind = rest.rsplit(".", 1)
            names, rows = parts[ours]
            read |= {(int(number), f"{hub}.{kind}"): part for hub, part in zip(names, weight.split(rows))}
    return state["embedding.weight"], read


def digest(checkpoint_dir: Path) -> str:
    return hashlib.sha256((checkpoint_dir / "model.pth").read_bytes()).hexdigest()


# ---- the hub's files -----------------------------------------------------------------------------------------------


def grid_cells(box: Cell, rows: int, columns: int) -> list[Cell]:
    """A box cut into rows x columns, row by row."""
    left, top, right, bottom = box
    width, height = (right - left) / columns, (bottom - top) / rows
    corners = [(left + x * width, top + y * height) for y in range(rows) for x in range(columns)]
    return [(x, y, x + width, y + height) for x, y in corners]


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_weights(hub_dir: Path, state: dict[str, Tensor]):
    hub_dir.mkdir(parents=True, exist_ok=True)
    state = {name: weight.detach().bfloat16().contiguous() for name, weight in state.items()}
    save_file(state, hub_dir / "model.safetensors", metadata={"format": "pt"})


def rename(model: torch.nn.Module, starts: dict[str, str]) -> dict[str, Tensor]:
    """The model's weights with the beginnings of their names replaced."""
    state = {}
    for name, weight in model.named_parameters():
        start = next(start for start in starts if name.startswith(start))
        state[starts[start] + name.removeprefix(start)] = weight
    return state


def write_tokenizer(hub_dir: Path, tokenizer: Tokenizer, special_tokens: list[str], more: dict):
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(hub_dir / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, "special": True}
        | dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
        for token in special_tokens
    }
    common = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, "model_max_length": 2048}
    write_json(hub_dir / "tokenizer_config.json", common | more)


def write_generation(hub_dir: Path, bos: int, pad: int, stops: list[int]):
    generation = {"do_sample": False, "bos_token_id": bos, "pad_token_id": pad, "eos_token_id": stops}
    write_json(hub_dir / "generation_config.json", generation)


def pick(config, names: str) -> dict:
    return {name: getattr(config, name) for name in names.split()}


TEXT_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps max_position_embeddings initializer_range"
)
QWEN_TOKENIZER = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def text_shape(width: int, depth: int, mlp: int) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp,
        "num_attention_heads": width // 32,
        "num_key_value_heads": 2,
    }


def siglip_shape(width: int, depth: int, mlp: int) -> dict:
    heads = {"num_attention_heads": width // 32, "vision_use_head": False}
    return {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": mlp} | heads


def mllama_shape(width: int, depth: int, n_global: int, mlp: int, keep: list[int]) -> dict:
    """`keep`: the layers whose inputs are part of a row, as the hub counts."""
    layers = {"num_hidden_layers": depth, "num_global_layers": n_global, "intermediate_layers_indices": keep}
    return {"hidden_size": width, "intermediate_size": mlp, "attention_heads": width // 32} | layers


def rows_of_vocabulary(tokenizer: Tokenizer) -> int:
    return -(-tokenizer.get_vocab_size() // 64) * 64


# ---- Qwen2.5-VL ----------------------------------------------------------------------------------------------------


def qwen_vision(width: int, depth: int, mlp: int, full: list[int], out: int) -> dict:
    return {
        "hidden_size": width,
        "depth": depth,
        "intermediate_size": mlp,
        "num_heads": width // 32,
        "out_hidden_size": out,
        "fullatt_block_indexes": full,
    }


class QwenVL(Family):
    ship_name = "tiny-qwen2.5-vl"
    recipes = {
        "target": Recipe(
            steps=3000,
            naming_steps=500,
            learning_rate=5e-3,
            shape={"text": text_shape(128, 5, 384), "vision": qwen_vision(128, 4, 256, [1, 3], 128)},
        ),
        "draft": Recipe(
            steps=2250,
            naming_steps=750,
            learning_rate=5e-3,
            shape={"text": text_shape(64, 4, 192), "vision": qwen_vision(64, 3, 128, [1], 64)},
        ),
    }
    sample_tokens = 208  # of which the prefix takes about 48
    special_tokens = (  # in Qwen2.5-VL's order
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
        "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
        "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
    ).split()
    image_token = "<|image_pad|>"
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    processor_class = Qwen2VLImageProcessorPil
    merge, window = 2, 112  # Qwen2.5-VL's own, in patches and pixels
    preprocessing = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": merge,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    ids = {
        "bos_token_id": "endoftext",
        "eos_token_id": "im_end",
        "vision_start_token_id": "vision_start",
        "vision_end_token_id": "vision_end",
        "image_token_id": "image_pad",
        "video_token_id": "video_pad",
    }
    vision_fields = (
        "depth hidden_size hidden_act intermediate_size num_heads out_hidden_size patch_size spatial_merge_size "
        "temporal_patch_size window_size fullatt_block_indexes tokens_per_second initializer_range"
    )
    chat_template = (  # as it stands on the hub
        "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
        "{% for content in message['content'] %}"
        "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
        "{% set image_count.value = image_count.value + 1 %}"
        "{% if add_vision_id %}Picture {{ image_count.value }}: "
        "{% endif %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif content['type'] == 'video' or 'video' in content %}"
        "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: "
        "{% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def build(self, tokenizer: Tokenizer, shape: dict) -> torch.nn.Module:
        """`shape` holds the sizes of "text" and "vision"."""
        ids = {name: tokenizer.token_to_id(f"<|{token}|>") for name, token in self.ids.items()}
        vision = {"window_size": self.window, "patch_size": PATCH, "initializer_range": 0.05}
        config = transformers.Qwen2_5_VLConfig(
            vocab_size=rows_of_vocabulary(tokenizer),
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            max_position_embeddings=2048,
            rope_theta=10000.0,
            rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
            initializer_range=0.05,
            **ids,
            **shape["text"],
            vision_config=shape["vision"] | vision,
        )
        config._attn_implementation = "written_out"
        return self.model_class(config)

    def image_prefix(self, tokenizer: Tokenizer, size: Size) -> tuple[list[int], np.ndarray]:
        rows, columns = (n // self.merge for n in self.grid(size))
        system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        before = tokenizer.encode(system + "<|im_start|>user\n<|vision_start|>").ids
        image = [tokenizer.token_to_id(self.image_token)] * (rows * columns)
        start = len(before)
        height, width = np.divmod(np.arange(rows * columns), columns)
        image_pos = start + np.stack([np.zeros_like(height), height, width], axis=1)
        end = np.full((1, 3), start + max(rows, columns))
        rope_pos = np.concatenate([np.repeat(np.arange(start)[:, None], 3, axis=1), image_pos, end])
        return before + image + [tokenizer.token_to_id("<|vision_end|>")], rope_pos

    def grid(self, size: Size) -> tuple[int, int]:
        """Patches: rows, columns."""
        return size[1] // PATCH, size[0] // PATCH

    def cells(self, size: Size) -> list[Cell | None]:
        rows, columns = self.grid(size)
        return grid_cells((0, 0, *size), rows // self.merge, columns // self.merge)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """[P, 3 * 14 * 14] in the encoder's order: the four patches of a visual token follow each other."""
        array = np.asarray(image)  # [H, W, 3]
        rows, columns = (n // (PATCH * self.merge) for n in array.shape[:2])
        array = array.reshape(rows, self.merge, PATCH, columns, self.merge, PATCH, 3)
        return array.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * self.merge**2, -1)

    def encode(self, model: torch.nn.Module, pixels: Tensor, size: Size) -> Tensor:
        """The stock encoder's arithmetic for several images at once: that one loops over windows in Python."""
        visual = model.model.visual
        position, window = self.patch_places(self.grid(size))
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of the kernel see the same image
        x = F.linear(normalize(pixels, CLIP_MEAN, CLIP_STD).to(weight.dtype), weight)  # [B, P, E]
        cos, sin = (table.to(x.dtype) for table in visual.rotary_pos_emb(x, position))  # [P, head_dim]
        mask = torch.zeros(window.shape, dtype=x.dtype).masked_fill(~window, float("-inf"))
        for index, block in enumerate(visual.blocks):
            visible = None if index in visual.fullatt_block_indexes else mask
            x = x + attend_patches(block.attn, block.norm1(x), cos, sin, visible)
            x = x + block.mlp(block.norm2(x))
        return visual.merger(x).view(len(x), -1, visual.merger.mlp[2].out_features)

    def patch_places(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Row and column of each patch in the encoder's order [P, 2], and which patches share a window [P, P]."""
        row, column = (torch.arange(n) for n in grid)
        merge = self.merge
        position = torch.cartesian_prod(row, column).view(grid[0] // merge, merge, grid[1] // merge, merge, 2)
        position = position.transpose(1, 2).reshape(-1, 2)
        window = position // (self.window // PATCH)
        return position, (window[:, None] == window[None]).all(-1)

    def stock_inputs(self, processor, image: Image.Image, is_image: Tensor) -> dict:
        return dict(processor(image, return_tensors="pt")) | {"mm_token_type_ids": is_image.int()}

    def save(self, model: torch.nn.Module, tokenizer: Tokenizer, hub_dir: Path):
        """Tensors under the hub's names: transformers 5 has others."""
        starts = {"model.visual.": "visual.", "model.language_model.": "model."}
        write_weights(hub_dir, rename(model, starts))
        text, vision = model.config.text_config, model.config.vision_config
        ids = {name: getattr(model.config, name, None) or getattr(text, name) for name in self.ids}
        config = {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **ids,
            **pick(text, TEXT_FIELDS + " attention_dropout use_cache"),
            "rope_theta": text.rope_parameters["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": text.rope_parameters["mrope_section"]},
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vision_config": {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": PATCH}
            | pick(vision, self.vision_fields),
        }
        write_json(hub_dir / "config.json", config)
        end, text_end = ids["eos_token_id"], ids["bos_token_id"]
        write_generation(hub_dir, text_end, text_end, [end, text_end])
        processor = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
        write_json(hub_dir / "preprocessor_config.json", self.preprocessing | processor)
        more = {"additional_special_tokens": self.special_tokens[1:14], "chat_template": self.chat_template}
        more |= {"processor_class": "Qwen2_5_VLProcessor"}
        write_tokenizer(hub_dir, tokenizer, self.special_tokens, QWEN_TOKENIZER | more)


# ---- Llava-OneVision -----------------------------------------------------------------------------------------------


class LlavaOneVision(Family):
    ship_name = "tiny-llava-onevision"
    recipes = {
        "target": Recipe(
            steps=1750,
            naming_steps=500,
            learning_rate=5e-3,
            shape={"text": text_shape(64, 4, 192), "vision": siglip_shape(64, 3, 192)},
            decoder="tiny-qwen2.5-vl-draft",
        ),
        "draft": Recipe(
            steps=900,
            naming_steps=300,
            learning_rate=5e-3,
            shape={"text": text_shape(64, 3, 192), "vision": siglip_shape(64, 2, 128)},
            decoder="tiny-qwen2.5-vl-draft",
        ),
    }
    sample_tokens = 216  # of which the prefix takes about 65
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    image_token = "<image>"
    model_class = transformers.LlavaOnevisionForConditionalGeneration
    processor_class = transformers.LlavaOnevisionImageProcessorPil
    # Small tiles: a picture has up to nine, which are shrunk to the worth of three, about as many rows as Qwen's.
    tile, max_tiles = 56, 3
    pinpoints = [(56, 56), (56, 112), (112, 56), (112, 112), (168, 168), (112, 224), (224, 112)]  # height, width
    preprocessing = {
        "size": {"height": tile, "width": tile},
        "image_grid_pinpoints": [list(pair) for pair in pinpoints],
        "image_mean": list(HALF),
        "image_std": list(HALF),
        "resample": 3,
    }
    chat_template = (  # llava-hf's own
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{# Render all text next #}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
        "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def build(self, tokenizer: Tokenizer, shape: dict) -> torch.nn.Module:
        """`shape` holds the sizes of "text" and "vision"."""
        text = transformers.Qwen2Config(
            vocab_size=rows_of_vocabulary(tokenizer),
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            initializer_range=0.05,
            bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
            eos_token_id=tokenizer.token_to_id("<|im_end|>"),
            **shape["text"],
        )
        vision = transformers.SiglipVisionConfig(image_size=self.tile, patch_size=PATCH, **shape["vision"])
        config = transformers.LlavaOnevisionConfig(
            text_config=text,
            vision_config=vision,
            vision_feature_layer=-1,
            image_token_index=tokenizer.token_to_id("<image>"),
            video_token_index=tokenizer.token_to_id("<video>"),
            image_grid_pinpoints=[list(pair) for pair in self.pinpoints],
            vision_aspect_ratio=f"anyres_max_{self.max_tiles}",
            tie_word_embeddings=True,
        )
        config._attn_implementation = "written_out"
        return self.model_class(config)

    def image_prefix(self, tokenizer: Tokenizer, size: Size) -> tuple[list[int], np.ndarray]:
        image = self.image_token * len(self.cells(size))
        tokens = tokenizer.encode(f"<|im_start|>user\n{image}\n").ids
        return tokens, np.arange(len(tokens))[:, None]

    def cells(self, size: Size) -> list[Cell | None]:
        """Of the overview, then line by line of the picture, a newline token at the end of each."""
        side, (rows, columns) = self.tile // PATCH, self.layout(size)[1]
        lines = [grid_cells((0, 0, *size), rows, columns)[i * columns : (i + 1) * columns] for i in range(rows)]
        return grid_cells((0, 0, *size), side, side) + [cell for line in lines for cell in [*line, None]]

    def canvas(self, size: Size) -> tuple[int, int, float]:
        """Height and width in pixels of the pinpoint that keeps most of the picture, and the scale it has there."""
        best = select_best_resolution((size[1], size[0]), self.pinpoints)
        return *best, min(best[1] / size[0], best[0] / size[1])

    def layout(self, size: Size) -> tuple[Tensor, tuple[int, int]]:
        """Which of the (1 + T) * P patches stands where in the unpadded picture [h, w]; that one's shape, shrunk."""
        height, width, _ = self.canvas(size)
        side = self.tile // PATCH
        index = side**2 + torch.arange(height * width // PATCH**2)  # after the overview
        index = index.view(height // self.tile, width // self.tile, side, side).transpose(1, 2)
        index = index.reshape(height // PATCH, width // PATCH)
        scale = min(index.shape[1] / size[0], index.shape[0] / size[1])
        top, left = ((n - int(round(length * scale, 7))) // 2 for n, length in zip(index.shape, reversed(size)))
        index = index[top : len(index) - top, left : index.shape[1] - left]
        ratio = math.sqrt(index.numel() / (self.max_tiles * side**2))
        return index, tuple(int(n // ratio) if ratio > 1.1 else n for n in index.shape)

    def packing(self, size: Size) -> tuple[Tensor, Tensor]:
        """[N, (1 + T) * P] how the rows are made of the patches, and [N] which of them are newline tokens.

        Shrinking is bilinear, and so the whole packing is one matrix.
        """
        (height, width, _), side = self.canvas(size), self.tile // PATCH
        index, (rows, columns) = self.layout(size)
        patches = torch.eye(side**2 + height * width // PATCH**2)
        overview, picture = patches[: side**2], patches[index].movedim(2, 0)[None]  # [1, patches, h, w]
        picture = F.interpolate(picture, (rows, columns), mode="bilinear")[0].movedim(0, 2)
        picture = F.pad(picture, (0, 0, 0, 1)).flatten(0, 1)  # a row of nothing at the end of each line
        matrix = torch.cat([overview, picture])
        return matrix, matrix.sum(1) == 0

    def pixels(self, image: Image.Image) -> np.ndarray:
        """[1 + T, P, 3 * 14 * 14]: the overview and the tiles."""
        height, width, scale = self.canvas(image.size)
        fitted = min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height)
        canvas = Image.new("RGB", (width, height))
        corner = (width - fitted[0]) // 2, (height - fitted[1]) // 2
        canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
        overview = image.resize((self.tile, self.tile), Image.Resampling.BICUBIC)
        return np.concatenate([tile_patches(overview, self.tile), tile_patches(canvas, self.tile)])

    def encode(self, model: torch.nn.Module, pixels: Tensor, size: Size) -> Tensor:
        tower, (matrix, newline) = model.model.vision_tower, self.packing(size)
        embeddings = tower.embeddings
        weight = embeddings.patch_embedding.weight.flatten(1)
        x = F.linear(normalize(pixels, HALF, HALF).to(weight.dtype), weight, embeddings.patch_embedding.bias)
        x = (x + embeddings.position_embedding.weight).flatten(0, 1)  # [B * (1 + T), P, E]
        x = tower.encoder(inputs_embeds=x).last_hidden_state
        x = model.model.multi_modal_projector(x).view(len(pixels), matrix.shape[1], -1)
        return matrix.to(x.dtype) @ x + newline.to(x.dtype)[:, None] * model.model.image_newline

    def stock_inputs(self, processor, image: Image.Image, is_image: Tensor) -> dict:
        inputs = processor([[image]], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}

    def save(self, model: torch.nn.Module, tokenizer: Tokenizer, hub_dir: Path):
        """llava-hf's layout."""
        starts = {
            "model.image_newline": "image_newline",
            "model.vision_tower.": "vision_tower.vision_model.",  # transformers 5 has a level less
            "model.multi_modal_projector.": "multi_modal_projector.",
            "model.language_model.": "language_model.model.",
        }
        write_weights(hub_dir, rename(model, starts))
        text, vision = model.config.text_config, model.config.vision_config
        stops = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
        more = {"rope_theta": text.rope_parameters["rope_theta"], "use_sliding_window": False}
        more |= {"bos_token_id": stops[1], "eos_token_id": stops[0], "tie_word_embeddings": True}
        fields = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
        config = {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "image_token_index": model.config.image_token_id,
            "video_token_index": model.config.video_token_id,
            "image_grid_pinpoints": [list(pair) for pair in self.pinpoints],
            "vision_aspect_ratio": f"anyres_max_{self.max_tiles}",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "use_image_newline_parameter": True,
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "text_config": {"model_type": "qwen2"} | pick(text, TEXT_FIELDS) | more,
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False} | pick(vision, fields),
        }
        write_json(hub_dir / "config.json", config)
        write_generation(hub_dir, stops[1], stops[1], stops)
        processor = {"image_processor_type": "LlavaOnevisionImageProcessor"}
        write_json(hub_dir / "preprocessor_config.json", self.preprocessing | processor)
        more = {"chat_template": self.chat_template, "processor_class": "LlavaOnevisionProcessor"}
        write_tokenizer(hub_dir, tokenizer, self.special_tokens, QWEN_TOKENIZER | more)


def tile_patches(canvas: Image.Image, tile: int) -> np.ndarray:
    """[T, P, 3 * 14 * 14] of a picture that is cut into square tiles."""
    side = tile // PATCH
    array = np.asarray(canvas).reshape(canvas.height // tile, side, PATCH, canvas.width // tile, side, PATCH, 3)
    return array.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, side**2, 3 * PATCH**2)


# ---- Llama-3.2-Vision ----------------------------------------------------------------------------------------------


class LlamaVision(Family):
    ship_name = "tiny-llama-3.2-vision"
    recipes = {
        "target": Recipe(
            steps=2750,
            naming_steps=500,
            learning_rate=5e-3,
            shape={"text": text_shape(64, 6, 192), "cross": [1, 3], "vision": mllama_shape(64, 2, 1, 192, [1])},
            decoder="tiny-qwen2.5-vl-draft",
        ),
        "draft": Recipe(
            steps=900,
            naming_steps=300,
            learning_rate=5e-3,
            shape={"text": text_shape(64, 4, 192), "cross": [1], "vision": mllama_shape(64, 1, 1, 128, [1])},
            decoder="tiny-qwen2.5-vl-draft",
        ),
    }
    sample_tokens = 160  # an image takes one token
    special_tokens = (  # in Llama-3.2's order; reserved ones fill the rows of the vocabulary
        "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
        "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> "
        "<|python_tag|>"
    ).split()
    image_token = "<|image|>"
    pad_token = "<|end_of_text|>"
    before_turn = "<|start_header_id|>user<|end_header_id|>\n\n"
    after_question = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    end_of_turn = "<|eot_id|>"
    model_class = transformers.MllamaForConditionalGeneration
    processor_class = transformers.MllamaImageProcessorPil
    tile, max_tiles = 84, 4
    grids = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]  # tiles: rows, columns
    preprocessing = {
        "size": {"height": tile, "width": tile},
        "max_image_tiles": max_tiles,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 2,
    }
    chat_template = (  # what the hub's says of messages without tools
        '{{- bos_token }}\n{%- if date_string is not defined %}\n    {%- set date_string = "26 Jul 2024" %}\n'
        "{%- endif %}\n{%- set system_message = '' %}\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] | trim %}\n    {%- set messages = messages[1:] %}\n"
        "{%- endif %}\n{%- set images = namespace(n=0) %}\n{%- for message in messages %}\n"
        "    {%- if message['content'] is not string %}\n        {%- for content in message['content'] %}\n"
        "            {%- if content['type'] == 'image' %}{%- set images.n = images.n + 1 %}{%- endif %}\n"
        "        {%- endfor %}\n    {%- endif %}\n{%- endfor %}\n{%- if images.n and system_message %}\n"
        "    {{- raise_exception('Prompting with images is incompatible with system messages.') }}\n{%- endif %}\n"
        "{%- if not images.n %}\n"
        "    {{- '<|start_header_id|>system<|end_header_id|>\n\n' }}\n"
        "    {{- 'Cutting Knowledge Date: December 2023\n' }}\n"
        "    {{- 'Today Date: ' + date_string + '\n\n' + system_message + '<|eot_id|>' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
        "    {%- if message['content'] is string %}\n        {{- message['content'] }}\n    {%- else %}\n"
        "        {%- for content in message['content'] %}\n            {%- if content['type'] == 'image' %}\n"
        "                {{- '<|image|>' }}\n            {%- elif content['type'] == 'text' %}\n"
        "                {{- content['text'] }}\n            {%- endif %}\n        {%- endfor %}\n    {%- endif %}\n"
        "    {{- '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
    )

    def finish_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """Llama-3's rules: nothing normalized, up to three digits a word, BOS in front. <|image|> is only ever read."""
        n = tokenizer.get_vocab_size() + len(self.special_tokens)
        reserved = [f"<|reserved_special_token_{i + 2}|>" for i in range(-n % 64)]
        tokens = [*self.special_tokens, *reserved, self.image_token]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        tokenizer.normalizer = None
        split = pre_tokenizers.Split(Regex(SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        bos = self.special_tokens[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        return tokenizer

    def build(self, tokenizer: Tokenizer, shape: dict) -> torch.nn.Module:
        """`shape` holds the sizes of "text" and "vision", and which layers "cross", that is, look at images."""
        vision = shape["vision"]
        kept = [i - 1 for i in vision["intermediate_layers_indices"]]  # see load()
        width = vision["hidden_size"] * (1 + len(kept))
        vision = MllamaVisionConfig(
            **vision | {"intermediate_layers_indices": kept},
            image_size=self.tile,
            patch_size=PATCH,
            max_num_tiles=self.max_tiles,
            supported_aspect_ratios=self.grids,
            vision_output_dim=width,
            initializer_range=0.05,
        )
        text = MllamaTextConfig(
            vocab_size=tokenizer.token_to_id(self.image_token),
            rms_norm_eps=1e-6,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            initializer_range=0.05,
            cross_attention_layers=shape["cross"],
            bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
            eos_token_id=tokenizer.token_to_id("<|eot_id|>"),
            pad_token_id=tokenizer.token_to_id("<|end_of_text|>"),
            tie_word_embeddings=False,
            **shape["text"],
        )
        image = tokenizer.token_to_id(self.image_token)
        config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=image)
        config._attn_implementation = "written_out"
        model = self.model_class(config)
        with torch.no_grad():  # closed gates, as transformers has them, would take long to open
            for weight in model.parameters():
                if weight.numel() == 1:
                    weight.fill_(0.5)
        return follow_meta(model)

    def first_image_token(self, model, tokens: Tensor) -> int:
        return tokens[0].tolist().index(model.config.image_token_index)

    def n_image_tokens(self, size: Size) -> int:
        return 1

    def image_prefix(self, tokenizer: Tokenizer, size: Size) -> tuple[list[int], np.ndarray]:
        tokens = tokenizer.encode(f"{self.before_turn}{self.image_token}").ids  # with BOS
        return tokens, np.arange(len(tokens))[:, None]

    def grid(self, size: Size) -> tuple[int, int]:
        """Tiles: rows, columns."""
        canvas = get_optimal_tiled_canvas(size[1], size[0], self.max_tiles, self.tile)
        return canvas[0] // self.tile, canvas[1] // self.tile

    def fitted(self, size: Size) -> Size:
        rows, columns = self.grid(size)
        height, width = get_image_size_fit_to_canvas(size[1], size[0], rows * self.tile, columns * self.tile, self.tile)
        return width, height

    def cells(self, size: Size) -> list[Cell | None]:
        """Of each tile the class token's and those of its patches; every other patch is enough to name."""
        (rows, columns), side, scale = self.grid(size), self.tile // PATCH, size[0] / self.fitted(size)[0]
        cells = []
        for y, x in product(range(rows), range(columns)):
            tile = tuple(n * self.tile * scale for n in (x, y, x + 1, y + 1))
            squares = [i % side + i // side for i in range(side**2)]
            named = [cell if n % 2 else None for n, cell in zip(squares, grid_cells(tile, side, side))]
            cells += [None, *named]
        return cells

    def pixels(self, image: Image.Image) -> np.ndarray:
        """[T, P, 3 * 14 * 14] of the tiles in use."""
        rows, columns = self.grid(image.size)
        canvas = Image.new("RGB", (columns * self.tile, rows * self.tile))
        canvas.paste(image.resize(self.fitted(image.size), Image.Resampling.BILINEAR))
        return tile_patches(canvas, self.tile)

    def encode(self, model: torch.nn.Module, pixels: Tensor, size: Size) -> Tensor:
        """The rows of the tiles in use. They see unused tiles and padding too, as in the original."""
        vision, n_tiles = model.model.vision_model, pixels.shape[1]
        aspect = torch.full((len(pixels), 1), 1 + self.grids.index(list(self.grid(size))))
        weight = vision.patch_embedding.weight.flatten(1)
        x = F.linear(normalize(pixels, CLIP_MEAN, CLIP_STD).to(weight.dtype), weight)  # [B, T, P, E]
        x = F.pad(x, (0, 0, 0, 0, 0, self.max_tiles - n_tiles))
        x = vision.pre_tile_positional_embedding(x, aspect)
        x = torch.cat([vision.class_embedding.expand(*x.shape[:2], 1, -1), x], 2)
        x = vision.layernorm_pre(vision.gated_positional_embedding(x, aspect))
        n_rows = x.shape[2]
        x = F.pad(x, (0, 0, 0, -n_rows % 8))
        used = torch.zeros(x.shape[1:3], dtype=torch.bool)
        used[:n_tiles, :n_rows] = True
        seen = used.view(-1, 1) | used.view(-1)  # only padding does not see padding
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, float("-inf"))
        shape, x, states = x.shape, x.flatten(1, 2), []
        for layer in vision.transformer.layers:
            x = layer(x, attention_mask=mask)
            states.append(x)
        x = vision.post_tile_positional_embedding(vision.layernorm_post(x).view(shape), aspect).flatten(1, 2)
        for layer in vision.global_transformer.layers:
            x = layer(x, attention_mask=mask)
        kept = torch.stack([states[i] for i in vision.intermediate_layers_indices], -1).flatten(2)
        rows = torch.cat([x, kept], -1).view(*shape[:3], -1)[:, :n_tiles, :n_rows]
        return model.model.multi_modal_projector(rows).flatten(1, 2)

    def decode(self, model, tokens: Tensor, rows: Tensor, mask: Tensor, rope_pos: Tensor):
        """Tokens from the image's own on see all of its rows, those before it none."""
        sees = torch.arange(tokens.shape[1]) >= self.first_image_token(model, tokens)
        return model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(tokens),
            attention_mask=mask,
            position_ids=rope_pos[0],
            cross_attention_states=rows,
            full_text_row_masked_out_mask=sees[None, None, :, None].to(rows.dtype),
            use_cache=False,
            output_hidden_states=True,
        )

    def stock_inputs(self, processor, image: Image.Image, is_image: Tensor) -> dict:
        inputs = dict(processor([[image]], return_tensors="pt"))
        sees = (is_image.cumsum(1) > 0).long()[:, :, None, None]  # [1, n, 1, 1]
        inputs["cross_attention_mask"] = sees * (torch.arange(self.max_tiles) < inputs.pop("num_tiles")[0][0])
        return inputs

    def load(self, hub_dir: Path) -> torch.nn.Module:
        """Meta's code and the hub's numbers keep the inputs of blocks; this transformers keeps outputs: one less."""
        config = transformers.MllamaConfig.from_pretrained(hub_dir)
        vision = config.vision_config
        vision.intermediate_layers_indices = [i - 1 for i in vision.intermediate_layers_indices]
        return follow_meta(self.model_class.from_pretrained(hub_dir, config=config, dtype=torch.bfloat16).eval())

    def save(self, model: torch.nn.Module, tokenizer: Tokenizer, hub_dir: Path):
        starts = {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_model.": "vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        }
        write_weights(hub_dir, rename(model, starts))
        text, vision = model.config.text_config, model.config.vision_config
        ids = pick(text, "bos_token_id eos_token_id pad_token_id")
        more = {"cross_attention_layers": list(text.cross_attention_layers), "tie_word_embeddings": False}
        fields = (
            "hidden_size hidden_act intermediate_size num_hidden_layers num_global_layers attention_heads num_channels "
            "image_size patch_size norm_eps max_num_tiles supported_aspect_ratios vision_output_dim"
        )
        kept = {"intermediate_layers_indices": [i + 1 for i in vision.intermediate_layers_indices]}
        config = {
            "architectures": ["MllamaForConditionalGeneration"],
            "model_type": "mllama",
            "image_token_index": model.config.image_token_index,
            "torch_dtype": "bfloat16",
            "text_config": {"model_type": "mllama_text_model", "rope_theta": text.rope_parameters["rope_theta"]}
            | pick(text, TEXT_FIELDS)
            | ids
            | more,
            "vision_config": {"model_type": "mllama_vision_model"} | pick(vision, fields) | kept,
        }
        write_json(hub_dir / "config.json", config)
        stops = [ids["eos_token_id"], ids["pad_token_id"], tokenizer.token_to_id("<|eom_id|>")]
        write_generation(hub_dir, ids["bos_token_id"], ids["pad_token_id"], stops)
        processor = {"image_processor_type": "MllamaImageProcessor", "processor_class": "MllamaProcessor"}
        write_json(hub_dir / "preprocessor_config.json", self.preprocessing | processor)
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": self.pad_token}
        names |= {"chat_template": self.chat_template, "tokenizer_class": "PreTrainedTokenizerFast"}
        special = sorted(tokenizer.get_added_tokens_decoder())
        write_tokenizer(hub_dir, tokenizer, [tokenizer.id_to_token(i) for i in special], names)


def follow_meta(model: torch.nn.Module) -> torch.nn.Module:
    """Tokens that see no image leave a cross-attention layer as they came.

    Meta's code has it so; transformers zeroes the MLP only, and such tokens get an average of the image.
    """

    def pass_unchanged(layer, args, kwargs, output):
        seen = kwargs["full_text_row_masked_out_mask"]
        return output if seen is None else torch.where(seen[:, 0] > 0, output, args[0])

    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.register_forward_hook(pass_unchanged, with_kwargs=True)
    return model


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": QwenVL(),
    "llava_onevision": LlavaOneVision(),
    "llama3_2_vision": LlamaVision(),
}
