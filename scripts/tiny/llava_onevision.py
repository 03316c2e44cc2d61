"""The tiny Llava-OneVision: how transformers builds it, how it writes conversations, cuts pictures up, its files."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from scripts.tiny.family import HALF, PATCH, Cell, Family, Recipe, Size, grid_cells, normalize, tile_patches
from scripts.tiny.hub import (
    QWEN_TOKENIZER,
    TEXT_FIELDS,
    pick,
    rename,
    rows_of_vocabulary,
    siglip_shape,
    text_shape,
    text_shape_of,
    write_generation,
    write_json,
    write_tokenizer,
    write_weights,
)


class LlavaOneVision(Family):
    ship_name = "tiny-llava-onevision"
    hub_names = {
        "model.image_newline": "image_newline",
        "model.vision_tower.": "vision_tower.vision_model.",  # transformers 5 has a level less
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
    }
    vision = siglip_shape(64, 3, 192)
    recipes = {
        "base": Recipe(
            shape={"text": text_shape(64, 4, 192), "vision": vision},
            steps=3000,
            learning_rate=5e-3,
            naming_steps=500,
        ),
        "target": Recipe(
            shape={"text": text_shape(64, 12, 192), "vision": vision},
            steps=60,
            learning_rate=1e-3,
            warmup=10,
            batch=8,
            first_seed=100_000_000,
            layers=(0, ~0, ~0, ~0, ~0, 1, ~1, ~1, ~1, ~1, 2, 3),
            frozen_encoder=True,
        ),
        "draft": Recipe(
            shape={"text": text_shape(64, 2, 192), "vision": vision},
            steps=900,
            learning_rate=3e-3,
            warmup=50,
            batch=8,
            first_seed=200_000_000,
            layers=(0, 1),
            thoughts=False,
            frozen_encoder=True,
            pruned=0.5,
        ),
    }
    sample_tokens = 176  # of which the prefix takes about 65
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

    def shape_of(self, model: dict) -> dict:
        """build's `shape` of a converted checkpoint, given the "model" of its params.json."""
        vision = siglip_shape(*(model["vision"][name] for name in ("dim", "depth", "hidden")))
        return {"text": text_shape_of(model), "vision": vision}

    def encoder_parameters(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        parts = model.model.vision_tower, model.model.multi_modal_projector
        return [model.model.image_newline, *(weight for part in parts for weight in part.parameters())]

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
        write_weights(hub_dir, rename(model, self.hub_names))
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
