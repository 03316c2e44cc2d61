"""The tiny Llama-3.2-Vision: how transformers builds it, how it writes conversations, cuts pictures up, its files."""

from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, processors
from torch import Tensor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from scripts.tiny.family import (
    CLIP_MEAN,
    CLIP_STD,
    PATCH,
    SPLIT,
    Cell,
    Family,
    Recipe,
    Size,
    every_other,
    grid_cells,
    normalize,
    tile_patches,
)
from scripts.tiny.hub import (
    TEXT_FIELDS,
    mllama_shape,
    pick,
    rename,
    text_shape,
    text_shape_of,
    write_generation,
    write_json,
    write_tokenizer,
    write_weights,
)


class LlamaVision(Family):
    ship_name = "tiny-llama-3.2-vision"
    hub_names = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_model.": "vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    vision = mllama_shape(64, 2, 1, 192, [1])
    recipes = {
        "base": Recipe(
            shape={"text": text_shape(64, 6, 192), "cross": [1, 3], "vision": vision},
            steps=3000,
            learning_rate=5e-3,
            naming_steps=500,
        ),
        "target": Recipe(
            shape={"text": text_shape(64, 12, 192), "cross": [2, 6], "vision": vision},
            steps=60,
            learning_rate=1e-3,
            warmup=10,
            batch=8,
            first_seed=100_000_000,
            layers=(0, ~0, 1, 2, ~2, ~2, 3, ~4, ~4, ~4, 4, 5),
            frozen_encoder=True,
        ),
        "draft": Recipe(
            shape={"text": text_shape(64, 2, 192), "cross": [1], "vision": vision},
            steps=600,
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
    tuning = Family.tuning | {"steps": 500}
    sample_tokens = 120  # an image takes one token
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

    def shape_of(self, model: dict) -> dict:
        """build's `shape` of a converted checkpoint, given the "model" of its params.json."""
        vision = mllama_shape(*(model["vision"][name] for name in ("dim", "depth", "n_global", "hidden", "keep")))
        return {"text": text_shape_of(model), "cross": list(model["cross_attention_layers"]), "vision": vision}

    def encoder_parameters(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        parts = model.model.vision_model, model.model.multi_modal_projector
        return [weight for part in parts for weight in part.parameters()]

    def prune(self, model, batch, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, every_other(rows.shape[1])], seen

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
        write_weights(hub_dir, rename(model, self.hub_names))
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
