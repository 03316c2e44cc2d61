"""The tiny Qwen2.5-VL: how transformers builds it, how it writes conversations, cuts pictures up, its files."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from scripts.tiny.family import (
    CLIP_MEAN,
    CLIP_STD,
    PATCH,
    SYSTEM,
    Cell,
    Family,
    Recipe,
    Size,
    attend_patches,
    grid_cells,
    normalize,
)
from scripts.tiny.hub import (
    QWEN_TOKENIZER,
    TEXT_FIELDS,
    pick,
    rename,
    rows_of_vocabulary,
    text_shape,
    text_shape_of,
    write_generation,
    write_json,
    write_tokenizer,
    write_weights,
)


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
    hub_names = {"model.visual.": "visual.", "model.language_model.": "model."}
    vision = qwen_vision(128, 4, 256, [1, 3], 128)
    recipes = {
        "base": Recipe(
            shape={"text": text_shape(128, 5, 384), "vision": vision},
            steps=3000,
            learning_rate=5e-3,
            naming_steps=500,
        ),
        "target": Recipe(
            shape={"text": text_shape(128, 12, 384), "vision": vision},
            steps=120,
            learning_rate=1e-3,
            warmup=10,
            batch=8,
            first_seed=100_000_000,
            layers=(0, ~0, ~0, 1, ~1, ~1, ~1, 2, ~2, ~2, 3, 4),
        ),
        "draft": Recipe(
            shape={"text": text_shape(128, 2, 384), "vision": vision},
            steps=1550,
            learning_rate=3e-3,
            warmup=50,
            batch=8,
            first_seed=200_000_000,
            layers=(0, 2),
            thoughts=False,
            pruned=0.5,
        ),
    }
    tuning = Family.tuning | {"steps": 900, "frozen_encoder": True}
    sample_tokens = 160  # of which the prefix takes about 48
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

    def shape_of(self, model: dict) -> dict:
        """build's `shape` of a converted checkpoint, given the "model" of its params.json."""
        vision = model["vision"]
        sizes = vision["dim"], vision["depth"], vision["hidden"], vision["full_layers"], vision["out_dim"]
        return {"text": text_shape_of(model), "vision": qwen_vision(*sizes)}

    def encoder_parameters(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        return list(model.model.visual.parameters())

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
        write_weights(hub_dir, rename(model, self.hub_names))
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
