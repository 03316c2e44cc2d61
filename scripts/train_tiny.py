"""Trains the two tiny vision-language models that come with the repository, from scratch, on a CPU.

Knows the corpus (scenes.py), the training recipe and how a family's files look on the hub. Does not know the
repository's own model: it trains and examines with `transformers` and hands the result to convert_hf_checkpoint.py.

    python scripts/train_tiny.py --out_dir OUT                        # train both, examine, convert, ship
    python scripts/train_tiny.py --out_dir OUT --model draft          # only one of them
    python scripts/train_tiny.py --out_dir OUT --evaluate             # examine what OUT holds already
    torchrun --standalone --nproc_per_node=2 scripts/train_tiny.py --threads 1 --out_dir OUT     # on two cores

What makes minutes on a CPU enough are three auxiliary losses that leave no trace in the checkpoint: visual rows must
name what they show (naming_loss), and in multiple-choice questions the middle of the decoder must know the answer's
content and look at the option that holds it (thought_loss).

Letters: B scenes a batch, L tokens a sample, P patches an image, N visual tokens an image (P / 4), D width.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.data
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.scenes import (
    CAPTION_PROMPTS,
    HELD_OUT_SEED,
    OPEN_INSTRUCTION,
    SIZES,
    VALIDATION_SEED,
    Scene,
    held_out_questions,
    make_scene,
)

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 800  # without the special tokens: enough for every word of the corpus to be one token
SAMPLE_TOKENS = 208  # L: the image's prefix (about 48) and as many turns as fit
BATCH = 32  # scenes a step
NAMING_WEIGHT, THOUGHT_WEIGHT = 0.5, 0.5  # of naming_loss and thought_loss in the loss
REPORT_STEPS = 250
CONVERSATION_SHARE = 0.15  # of samples whose turns see one another; in the others each turn sees the image only
PATCH, MERGE, WINDOW = 14, 2, 112  # Qwen2.5-VL's own, in pixels, patches and pixels
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as Qwen2.5-VL uses them
STD = (0.26862954, 0.26130258, 0.27577711)
SYSTEM = "You are a helpful assistant."
SPECIAL_TOKENS = (  # Qwen2.5-VL's, in its order
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
LINE_STARTS = ["(A", "(B", "(C", "(D", "Answer"]  # first tokens of the lines of a multiple-choice question
SPLIT = (  # Qwen2's pattern
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (  # Qwen2.5-VL's, as it stands on the hub
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
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


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def train_tokenizer(n_scenes: int = 6000) -> Tokenizer:
    """Byte-level BPE over the corpus, with Qwen's normalizer, splitting and decoding; special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(n_scenes), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def corpus(n_scenes: int):
    """Texts as a conversation holds them: the tokenizer sees the line breaks around roles too."""
    yield f"system\n{SYSTEM}"
    for seed in range(n_scenes):
        scene = make_scene(seed)
        for prompt, reply, _ in asked_about(scene, Random(seed)):
            yield f"user\n{prompt}"
            yield f"assistant\n{reply}"
            yield reply


def asked_about(scene: Scene, rng: Random) -> list[tuple[str, str, str]]:
    """All (prompt, reply, content of the answer) of a scene in random order.

    A tenth of the open questions has a benchmark's instruction behind it.
    """
    asked = [(rng.choice(CAPTION_PROMPTS), scene.caption, scene.caption)]
    for question in scene.questions:
        instructed = not question.options and rng.random() < 0.1
        asked.append((question.prompt + f"\n{OPEN_INSTRUCTION}" * instructed, question.reply, question.answer))
    rng.shuffle(asked)
    return asked


# ---- samples -------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Scenes of one size. `turn` is 0 for the prefix with the image, else says which tokens see one another."""

    pixels: Tensor  # [B, P, 3 * 14 * 14] uint8
    tokens: Tensor  # [B, L]
    labels: Tensor  # [B, L] the token that comes next where a reply is learned, else -100
    weight: Tensor  # [B, L] of each label in the loss
    thoughts: Tensor  # [B, L, 3] see Sampler.thoughts, -100 where there are none
    names: Tensor  # [B, N, 4] words for what a visual token shows (red, circle, top, left), -100 where there are none
    turn: Tensor  # [B, L]
    rope_pos: Tensor  # [3, B, L] time, height, width
    grid: tuple[int, int]  # patches: rows, columns


class Sampler(torch.utils.data.Dataset):
    """Batch number -> Batch: a pure function, so that a resumed training sees what an uninterrupted one would."""

    def __init__(
        self, tokenizer: Tokenizer, first_seed: int, n_batches: int, training: bool, part: slice = slice(None)
    ):
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}  # most questions come again and again
        self.first_seed = first_seed
        self.n_batches = n_batches
        self.training = training  # with some samples whose turns see one another
        self.part = part  # of each batch's scenes

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, index: int) -> Batch:
        seeds = batch_seeds(self.first_seed, index)[self.part]
        scenes = [make_scene(seed) for seed in seeds]
        width, height = scenes[0].image.size
        grid = (height // PATCH, width // PATCH)
        samples = [self.sample(scene, Random(f"turns {seed}"), grid) for scene, seed in zip(scenes, seeds)]
        tokens, labels, weight, thoughts, turn, rope_pos = (
            torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples)
        )
        pixels = torch.from_numpy(np.stack([patches(scene) for scene in scenes]))
        names = torch.tensor([[self.name_cell(scene, cell) for cell in cells(grid)] for scene in scenes])
        return Batch(pixels, tokens, labels, weight, thoughts, names, turn, rope_pos.movedim(2, 0), grid)

    def sample(self, scene: Scene, rng: Random, grid: tuple[int, int]):
        """Packs the caption and questions in random order behind one image, as many as fit into L tokens."""
        prefix, rope_pos = image_prefix(self.tokenizer, grid)
        asked = asked_about(scene, rng)
        conversation = self.training and rng.random() < CONVERSATION_SHARE
        tokens, labels, turn = list(prefix), [-100] * len(prefix), [0] * len(prefix)
        weight, thoughts, positions = [0.0] * len(prefix), [[-100] * 3] * len(prefix), []
        for prompt, reply, content in asked:
            question, answer = self.turn_tokens(prompt, reply, opens=not (conversation and positions))
            if len(tokens) + len(question) + len(answer) > SAMPLE_TOKENS:
                continue
            n = len(question) + len(answer)
            labels += [-100] * (len(question) - 1) + answer + [-100]
            weight += [reply_weight(reply, len(answer))] * n
            thoughts += self.thoughts(question, reply, content, len(thoughts)) + [[-100] * 3] * len(answer)
            tokens += question + answer
            turn += [1 if conversation else turn[-1] + 1] * n
            start = len(positions) if conversation else 0
            positions += range(start, start + n)
        padding = SAMPLE_TOKENS - len(tokens)
        tokens += [self.tokenizer.token_to_id("<|endoftext|>")] * padding
        labels += [-100] * padding
        weight += [0.0] * padding
        thoughts += [[-100] * 3] * padding
        turn += [turn[-1] + 1] * padding
        positions += [0] * padding
        text_pos = rope_pos[-1, 0] + 1 + np.array(positions)
        rope_pos = np.concatenate([rope_pos, np.repeat(text_pos[:, None], 3, axis=1)])  # [L, 3]
        weight = np.array(weight, np.float32)
        return np.array(tokens), np.array(labels), weight, np.array(thoughts), np.array(turn), rope_pos

    def thoughts(self, question: list[int], reply: str, content: str, start: int) -> list[list[int]]:
        """What the tokens of a multiple-choice question, the first of them at `start`, should have in mind.

        Two tokens to know in front of the decoder's last two layers: at the end of an option its letter, at the end of
        the question the content of the answer. And a place to look at from there, in the layer that follows: the end
        of the option with that content. Left alone, the choice is still a guess when all open questions are learned.
        """
        thoughts = [[-100] * 3 for _ in question]
        marks = [question.index(mark) for mark in map(self.encode_one, LINE_STARTS) if mark in question]
        for letter, end in zip("ABCD", marks[1:]):
            thoughts[end - 2][0] = self.encode_one(letter)
            if letter == reply:
                known = [token for token in self.encode(f" {content}") if token != self.encode_one(" ")][:2]
                thoughts[-1] = known + [-100] * (2 - len(known)) + [start + end - 2]
        return thoughts

    def encode_one(self, text: str) -> int:
        """The id of a text that is one token. Raises ValueError if it is not."""
        (token,) = self.encode(text)
        return token

    def name_cell(self, scene: Scene, cell: tuple[int, int, int, int]) -> list[int]:
        """Tokens of the words for the region that covers most of a visual token's cell, a fifth of it at least."""
        areas = [(overlap(box, cell), words) for box, words in scene.regions]
        area, words = max(areas, key=lambda entry: entry[0])
        names = [token for word in words for token in self.encode(word)] if area > (PATCH * MERGE) ** 2 / 5 else []
        return names + [-100] * (4 - len(names))

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text).ids
        return self.known[text]

    def turn_tokens(self, prompt: str, reply: str, opens: bool) -> tuple[list[int], list[int]]:
        """Token ids of a question with its markup, and of the reply with its end token."""
        before = "" if opens else "\n<|im_start|>user\n"
        question = f"{before}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        return self.encode(question), self.encode(f"{reply}<|im_end|>")


def reply_weight(reply: str, n_tokens: int) -> float:
    """Weight of each token of a reply: a caption must not drown the answers, and letters are what is learned last."""
    return (2.0 if reply in {*"ABCD"} else 1.0) * n_tokens**-0.5


def cells(grid: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Left, top, right, bottom in pixels of each visual token."""
    side = PATCH * MERGE
    corners = [(x * side, y * side) for y in range(grid[0] // MERGE) for x in range(grid[1] // MERGE)]
    return [(x, y, x + side, y + side) for x, y in corners]


def overlap(a: tuple, b: tuple) -> float:
    """Area that two boxes (left, top, right, bottom) share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def batch_seeds(first_seed: int, index: int) -> range:
    """Seeds of a batch's scenes: equal modulo the number of sizes, and therefore of one size."""
    first = first_seed + index // len(SIZES) * BATCH * len(SIZES) + index % len(SIZES)
    return range(first, first + BATCH * len(SIZES), len(SIZES))


def image_prefix(tokenizer: Tokenizer, grid: tuple[int, int]) -> tuple[list[int], np.ndarray]:
    """Tokens in front of the first question, and their rotary positions [n, 3] (time, height, width)."""
    rows, columns = grid[0] // MERGE, grid[1] // MERGE
    before = tokenizer.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>").ids
    image = [tokenizer.token_to_id("<|image_pad|>")] * (rows * columns)
    start = len(before)
    height, width = np.divmod(np.arange(rows * columns), columns)
    image_pos = start + np.stack([np.zeros_like(height), height, width], axis=1)
    end = np.full((1, 3), start + max(rows, columns))
    rope_pos = np.concatenate([np.repeat(np.arange(start)[:, None], 3, axis=1), image_pos, end])
    return before + image + [tokenizer.token_to_id("<|vision_end|>")], rope_pos


def patches(scene: Scene) -> np.ndarray:
    """Pixels in the encoder's order [P, 3 * 14 * 14], uint8: the four patches of a visual token follow each other."""
    array = np.asarray(scene.image)  # [H, W, 3]
    rows, columns = array.shape[0] // (PATCH * MERGE), array.shape[1] // (PATCH * MERGE)
    array = array.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    return array.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * MERGE**2, -1)


# ---- forward pass --------------------------------------------------------------------------------------------------
# The same arithmetic as the model's own forward, on the model's own modules, but for B images of one size at once: the
# stock encoder loops over windows in Python. check_forward compares the two.


def encode_images(visual: torch.nn.Module, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Visual rows [B, N, D] of B images of one size."""
    position, window = patch_places(grid)
    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of the temporal kernel see the same image
    mean, std = (torch.tensor(x).repeat_interleave(PATCH**2) for x in (MEAN, STD))
    x = F.linear(((pixels / 255 - mean) / std).to(weight.dtype), weight)  # [B, P, D]
    cos, sin = (table.to(x.dtype) for table in visual.rotary_pos_emb(x, position))  # [P, head_dim]
    mask = torch.zeros(window.shape, dtype=x.dtype).masked_fill(~window, float("-inf"))
    for index, block in enumerate(visual.blocks):
        visible = None if index in visual.fullatt_block_indexes else mask
        x = x + attend_patches(block.attn, block.norm1(x), cos, sin, visible)
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).view(len(x), -1, visual.merger.mlp[2].out_features)


def patch_places(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of each patch in the encoder's order [P, 2], and which patches share a window [P, P]."""
    row, column = (torch.arange(n) for n in grid)
    position = torch.cartesian_prod(row, column).view(grid[0] // MERGE, MERGE, grid[1] // MERGE, MERGE, 2)
    position = position.transpose(1, 2).reshape(-1, 2)
    window = position // (WINDOW // PATCH)
    return position, (window[:, None] == window[None]).all(-1)


def attend_patches(attention: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """Attention among the P patches of an image [B, P, D]; written out, as it is faster here than the fused kernel."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, P, hd]
    q, k = (t * cos + rotate_half(t) * sin for t in (q * attention.scaling, k))
    scores = q @ k.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def attend_tokens(module, query, key, value, mask, scaling, **_):
    """The decoder's attention [B, heads, L, head_dim], written out for the same reason; registered by name."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = (query * scaling) @ key.transpose(-1, -2) + mask
    module.scores = scores  # thought_loss looks at them
    return (scores.softmax(-1) @ value).transpose(1, 2), None


transformers.AttentionInterface.register("written_out", attend_tokens)


def reply_logits(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, vocabulary] of the n tokens that a batch's labels name.

    Also the visual rows [B, N, D] and the states [B, L, D] in front of the decoder's last two layers.
    """
    rows = encode_images(model.model.visual, batch.pixels, batch.grid)
    embedded = model.get_input_embeddings()(batch.tokens)
    first = batch.tokens[0].tolist().index(model.config.image_token_id)  # the same in every sample of the batch
    embedded = torch.cat([embedded[:, :first], rows, embedded[:, first + rows.shape[1] :]], 1)
    seen = (batch.turn[:, None, :] == 0) | (batch.turn[:, None, :] == batch.turn[:, :, None])  # [B, L, L]
    seen = seen.tril()[:, None]
    mask = torch.zeros(seen.shape, dtype=embedded.dtype).masked_fill(~seen, float("-inf"))
    decoder = model.model.language_model
    inputs = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": batch.rope_pos, "use_cache": False}
    output = decoder(**inputs, output_hidden_states=True)
    return model.lm_head(output.last_hidden_state[batch.labels >= 0]), rows, output.hidden_states[-3]


# ---- families: what to build and how the hub lays it out -----------------------------------------------------------


def build_qwen2_5_vl(tokenizer: Tokenizer, shape: dict) -> torch.nn.Module:
    """A Qwen2.5-VL with random weights. `shape` holds text_* and vision_* sizes."""
    ids = {name: tokenizer.token_to_id(f"<|{token}|>") for name, token in QWEN_IDS.items()}
    config = transformers.Qwen2_5_VLConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
        initializer_range=0.05,
        **ids,
        **shape["text"],
        vision_config=shape["vision"] | {"window_size": WINDOW, "patch_size": PATCH, "initializer_range": 0.05},
    )
    config._attn_implementation = "written_out"
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


QWEN_IDS = {
    "bos_token_id": "endoftext",
    "eos_token_id": "im_end",
    "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
    "image_token_id": "image_pad",
    "video_token_id": "video_pad",
}


def text_shape(width: int, depth: int, mlp: int) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp,
        "num_attention_heads": width // 32,
        "num_key_value_heads": 2,
    }


def vision_shape(width: int, depth: int, mlp: int, full: list[int], out: int) -> dict:
    return {
        "hidden_size": width,
        "depth": depth,
        "intermediate_size": mlp,
        "num_heads": width // 32,
        "out_hidden_size": out,
        "fullatt_block_indexes": full,
    }


PREPROCESSING = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": MERGE,
    "image_mean": MEAN,
    "image_std": STD,
}


def save_qwen2_5_vl(model: torch.nn.Module, tokenizer: Tokenizer, hub_dir: Path):
    """Writes the files of a Qwen2.5-VL repository, tensors under the hub's names (transformers 5 has others)."""
    hub_dir.mkdir(parents=True, exist_ok=True)
    state = {hub_name(name): weight.detach().bfloat16().contiguous() for name, weight in model.named_parameters()}
    save_file(state, hub_dir / "model.safetensors", metadata={"format": "pt"})
    text, vision = model.config.text_config, model.config.vision_config
    ids = {name: getattr(model.config, name, None) or getattr(text, name) for name in QWEN_IDS}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **ids,
        **{name: getattr(text, name) for name in TEXT_FIELDS},
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": text.rope_parameters["mrope_section"]},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": PATCH}
        | {name: getattr(vision, name) for name in VISION_FIELDS},
    }
    write_json(hub_dir / "config.json", config)
    stops = [ids["eos_token_id"], ids["bos_token_id"]]
    generation = {"do_sample": False, "bos_token_id": stops[1], "pad_token_id": stops[1], "eos_token_id": stops}
    write_json(hub_dir / "generation_config.json", generation)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    write_json(hub_dir / "preprocessor_config.json", PREPROCESSING | processor)
    tokenizer.save(str(hub_dir / "tokenizer.json"))
    write_json(hub_dir / "tokenizer_config.json", tokenizer_config(tokenizer))


TEXT_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps max_position_embeddings initializer_range attention_dropout use_cache"
).split()
VISION_FIELDS = (
    "depth hidden_size hidden_act intermediate_size num_heads out_hidden_size patch_size spatial_merge_size "
    "temporal_patch_size window_size fullatt_block_indexes tokens_per_second initializer_range"
).split()


def hub_name(name: str) -> str:
    return name.removeprefix("model.") if name.startswith("model.visual.") else name.replace("language_model.", "")


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, "special": True}
        | dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
        for token in SPECIAL_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL_TOKENS[1:14],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2_5_VLProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; `shape` is what its family's builder needs to know."""

    steps: int
    naming_steps: int  # of the steps, those at the beginning that train the encoder alone
    learning_rate: float
    shape: dict


@dataclass(frozen=True)
class Family:
    build: Callable[[Tokenizer, dict], torch.nn.Module]
    save: Callable[[torch.nn.Module, Tokenizer, Path], None]  # into a folder, as the hub lays it out
    ship_name: str  # of the target's folder under checkpoints/; the draft's ends in -draft
    recipes: dict[str, Recipe]


FAMILIES = {
    "qwen2_5_vl": Family(
        build_qwen2_5_vl,
        save_qwen2_5_vl,
        "tiny-qwen2.5-vl",
        {
            "target": Recipe(
                steps=3000,
                naming_steps=500,
                learning_rate=5e-3,
                shape={"text": text_shape(128, 5, 384), "vision": vision_shape(128, 4, 256, [1, 3], 128)},
            ),
            "draft": Recipe(
                steps=2250,
                naming_steps=750,
                learning_rate=5e-3,
                shape={"text": text_shape(64, 4, 192), "vision": vision_shape(64, 3, 128, [1], 64)},
            ),
        },
    ),
}


# ---- training ------------------------------------------------------------------------------------------------------


def naming_loss(model: torch.nn.Module, rows: Tensor, names: Tensor) -> Tensor:
    """Asks each visual row for the words of what it shows, through the output layer, before the decoder sees it.

    Without it the encoder learns colours at once, but for tens of minutes neither shapes nor letters.
    """
    named = names[..., 0] >= 0
    return F.cross_entropy(name_logits(model, rows[named]).float().repeat_interleave(4, 0), names[named].flatten())


def thought_loss(model: torch.nn.Module, states: Tensor, thoughts: Tensor) -> Tensor:
    """Asks states [B, L, D] for what they should know, and the first head of the next layer where it looks."""
    decoder = model.model.language_model
    knows, looks = thoughts[..., 0] >= 0, thoughts[..., 2] >= 0
    logits = model.lm_head(decoder.norm(states[knows])).float().repeat_interleave(2, 0)
    scores = decoder.layers[-2].self_attn.scores[:, 0][looks].float()  # [n, L]
    return F.cross_entropy(logits, thoughts[knows][:, :2].flatten()) + F.cross_entropy(scores, thoughts[looks][:, 2])


def name_logits(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Logits [n, vocabulary] of n visual rows taken for the decoder's output."""
    return model.lm_head(F.rms_norm(rows, rows.shape[-1:]))


class Trainer:
    """bfloat16 weights for the arithmetic, float32 copies for the optimizers: Muon for matrices, AdamW for the rest."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe):
        self.model = model.bfloat16()
        self.weights = dict(model.named_parameters())
        self.masters = {name: weight.detach().float().requires_grad_() for name, weight in self.weights.items()}
        matrices = [n for n, w in self.weights.items() if w.ndim == 2 and "embed" not in n]
        rest = [w for n, w in self.masters.items() if n not in matrices]
        shared = {"lr": recipe.learning_rate, "weight_decay": 0.01}
        self.optimizers = [
            torch.optim.AdamW(rest, betas=(0.9, 0.98), **shared),
            torch.optim.Muon([self.masters[n] for n in matrices], adjust_lr_fn="match_rms_adamw", **shared),
        ]
        self.recipe = recipe
        self.steps = 0
        self.log: list[dict] = []

    def step(self, batch: Batch, fraction: float) -> float:
        """One update at `fraction` of the peak learning rate. Returns the loss."""
        loss = self.loss(batch)
        loss.backward()
        learning = [name for name, weight in self.weights.items() if weight.grad is not None]
        gradients = average([self.weights[name].grad.float() for name in learning])
        for name, gradient in zip(learning, gradients):
            self.masters[name].grad = gradient
            self.weights[name].grad = None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = fraction * self.recipe.learning_rate
            optimizer.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.masters[name])
        self.steps += 1
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """First the encoder alone learns to name what it sees, then all of the model to answer too."""
        if self.steps < self.recipe.naming_steps:
            rows = encode_images(self.model.model.visual, batch.pixels, batch.grid)
            return naming_loss(self.model, rows, batch.names)
        logits, rows, states = reply_logits(self.model, batch)
        known = batch.labels >= 0
        losses = F.cross_entropy(logits.float(), batch.labels[known], reduction="none")
        reply_loss = (losses * batch.weight[known]).sum() / batch.weight[known].sum()
        naming = naming_loss(self.model, rows, batch.names)
        return reply_loss + NAMING_WEIGHT * naming + THOUGHT_WEIGHT * thought_loss(self.model, states, batch.thoughts)

    def save(self, path: Path):
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"steps": self.steps, "log": self.log, "masters": self.masters, "optimizers": optimizers}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)  # a crash in between loses nothing

    def load(self, path: Path):
        """Goes on where save() stopped."""
        state = torch.load(path, weights_only=True)
        self.steps, self.log = state["steps"], state["log"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.masters[name].copy_(state["masters"][name])
                weight.copy_(self.masters[name])


def processes() -> tuple[int, int]:
    """This process's number and how many there are: more than one under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors: list[Tensor]) -> list[Tensor]:
    """Means over the processes of a torchrun; the tensors themselves without one."""
    if not dist.is_initialized():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def schedule(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: 200 steps of warmup, constant, a linear descent over the last 30 %."""
    return min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))


@torch.no_grad()
def validate(model: torch.nn.Module, tokenizer: Tokenizer, n_batches: int = 8) -> dict[str, float]:
    """Share of replies to validation scenes that are right in every token, and of visual rows named rightly."""
    sampler = Sampler(tokenizer, VALIDATION_SEED, n_batches, training=False)
    right = defaultdict(list)
    for index in range(n_batches):
        batch = sampler[index]
        known = batch.labels >= 0
        hit = torch.ones_like(known)
        logits, rows, _ = reply_logits(model, batch)
        hit[known] = logits.argmax(-1) == batch.labels[known]
        named = batch.names[..., 0] >= 0
        names, guesses = batch.names[named], name_logits(model, rows[named]).topk(4).indices
        found = (names[:, :, None] == guesses[:, None]).any(-1) | (names < 0)
        right["naming"] += found.all(-1).tolist()
        for row, turn in {(row, batch.turn[row, column].item()) for row, column in known.nonzero().tolist()}:
            here = batch.turn[row] == turn
            n = (known[row] & here).sum().item()
            right["caption" if n > 12 else "answer"].append(hit[row, here].all().item())
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def train(family: Family, recipe: Recipe, tokenizer: Tokenizer, work_dir: Path) -> Trainer:
    """Trains one model to the end of its recipe, from where work_dir/training.pt stands if it does."""
    torch.manual_seed(0)
    model = family.build(tokenizer, recipe.shape)
    check_forward(model, tokenizer)
    trainer = Trainer(model, recipe)
    if (work_dir / "training.pt").exists():
        trainer.load(work_dir / "training.pt")
    minutes = trainer.log[-1]["minutes"] if trainer.log else 0.0
    began, losses = time.time(), []
    rank, n_processes = processes()
    sampler = Sampler(tokenizer, 0, recipe.steps, True, slice(rank, None, n_processes))
    rest = torch.utils.data.Subset(sampler, range(trainer.steps, recipe.steps))
    for batch in torch.utils.data.DataLoader(rest, batch_size=None, num_workers=1, prefetch_factor=4):
        losses.append(trainer.step(batch, schedule(trainer.steps, recipe.steps)))
        if rank == 0 and (trainer.steps % REPORT_STEPS == 0 or trainer.steps == recipe.steps):
            entry = {"step": trainer.steps, "minutes": minutes + (time.time() - began) / 60}
            entry |= {"loss": sum(losses) / len(losses)} | validate(model, tokenizer)
            trainer.log.append({key: round(value, 4) for key, value in entry.items()})
            print(json.dumps(trainer.log[-1]), flush=True)
            trainer.save(work_dir / "training.pt")
            losses.clear()
    return trainer


@torch.no_grad()
def check_forward(model: torch.nn.Module, tokenizer: Tokenizer):
    """The forward pass used here gives the logits of transformers' own: one scene of each size, turn by turn.

    `model` has float32 weights. Raises AssertionError.
    """
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    sampler = Sampler(tokenizer, VALIDATION_SEED, len(SIZES), training=False)
    processor = Qwen2VLImageProcessorPil(**PREPROCESSING)
    for size in range(len(SIZES)):
        batch = sampler[size]
        inputs = processor(make_scene(sampler.first_seed + size).image, return_tensors="pt")
        tokens, labels, turn = batch.tokens[0], batch.labels[0], batch.turn[0]
        expected = []
        for number in turn[labels >= 0].unique():
            seen = (turn == 0) | (turn == number)
            ids = tokens[None, seen]
            types = (ids == model.config.image_token_id).int()
            expected.append(stock(input_ids=ids, mm_token_type_ids=types, **inputs).logits[0, labels[seen] >= 0])
        expected = torch.cat(expected)
        torch.testing.assert_close(reply_logits(model, batch)[0][: len(expected)], expected, atol=1e-4, rtol=1e-4)


# ---- examination ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(hub_dir: Path, n_questions: int) -> dict[str, dict]:
    """Exact match of greedy answers to held-out questions, from the files in hub_dir, by transformers alone.

    Returns kind -> {"right", "asked"}; "total", "open" and "multiple choice" are kinds too.
    """
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(hub_dir, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub_dir)
    processor = Qwen2VLImageProcessorPil.from_pretrained(hub_dir)
    score = defaultdict(lambda: {"right": 0, "asked": 0})
    for scene, question in held_out_questions(n_questions):
        reply = answer(model, tokenizer, processor, scene.image, question.prompt)
        for kind in ("total", question.kind, "multiple choice" if question.options else "open"):
            score[kind]["asked"] += 1
            score[kind]["right"] += reply == question.reply
    return dict(score)


def answer(model, tokenizer, processor, image: Image.Image, prompt: str, max_new_tokens: int = 48) -> str:
    """The model's greedy reply to one prompt about one image."""
    inputs = processor(image, return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    n = inputs["image_grid_thw"].prod() // MERGE**2
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * n), return_tensors="pt").input_ids
    types = (ids == model.config.image_token_id).int()
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


# ---- shipping ------------------------------------------------------------------------------------------------------

EXAMPLES = {  # held-out scenes: file name -> seed
    "star-and-two-circles": HELD_OUT_SEED + 17,
    "four-shapes": HELD_OUT_SEED + 33,
    "eagle-75": HELD_OUT_SEED + 11,
    "bird-lamp": HELD_OUT_SEED + 13,
    "three-bars": HELD_OUT_SEED + 6,
    "four-bars": HELD_OUT_SEED + 24,
}


def report(hub_dir: Path, n_questions: int) -> dict:
    """Examines a model, prints a line a kind of question, returns kind -> {"asked", "exact_match"}."""
    score = examine(hub_dir, n_questions)
    held_out = {
        kind: {"asked": n["asked"], "exact_match": round(n["right"] / n["asked"], 3)} for kind, n in score.items()
    }
    for kind, n in sorted(held_out.items()):
        print(f"{hub_dir.parent.name:24} {kind:16} {n['exact_match']:6.1%} of {n['asked']}")
    return held_out


def summarize(trainer: Trainer) -> dict:
    """What is worth knowing about a training, for log.json and training.json."""
    last = trainer.log[-1]
    return {
        "parameters": sum(weight.numel() for weight in trainer.weights.values()),
        "steps": trainer.steps,
        "scenes": trainer.steps * BATCH,
        "minutes": round(last["minutes"], 1),
        "processes": processes()[1],
        "threads_a_process": torch.get_num_threads(),
        "final_loss": last["loss"],
        "versions": {module.__name__: str(module.__version__) for module in (torch, transformers, PIL)},
    }


def ship(work_dir: Path, destination: Path):
    """Converts the files in the hub's layout and copies what generate.py reads, with a summary, into the repository."""
    converter = REPOSITORY / "scripts" / "convert_hf_checkpoint.py"
    subprocess.run([sys.executable, converter, "--checkpoint_dir", work_dir / "hub"], check=True)
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("model.pth", "params.json", "tokenizer.model"):
        shutil.copyfile(work_dir / "hub" / name, destination / name)
    summary = json.loads((work_dir / "log.json").read_text())
    del summary["log"]
    write_json(destination / "training.json", summary)


def ship_scenes(destination: Path):
    """Six held-out scenes, two of each kind, as files that users can ask about."""
    destination.mkdir(parents=True, exist_ok=True)
    for name, seed in EXAMPLES.items():
        make_scene(seed).image.save(destination / f"{name}.png", optimize=True)


# ---- command line --------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    family = FAMILIES[args.family]
    for name in family.recipes if args.model == "both" else [args.model]:
        work_dir = args.out_dir / f"{args.family}-{name}"
        if not args.evaluate:
            make(family, name, work_dir)
        if processes()[0] > 0:
            continue
        log = json.loads((work_dir / "log.json").read_text())
        write_json(work_dir / "log.json", log | {"held_out": report(work_dir / "hub", args.num_questions)})
        if not args.evaluate:
            ship(work_dir, REPOSITORY / "checkpoints" / (family.ship_name + "-draft" * (name == "draft")))
    if not args.evaluate and processes()[0] == 0:
        ship_scenes(REPOSITORY / "checkpoints" / "scenes")


def make(family: Family, name: str, work_dir: Path):
    """Trains one model; work_dir/hub then holds its files and work_dir/log.json its history."""
    work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    trainer = train(family, family.recipes[name], tokenizer, work_dir)
    if processes()[0] == 0:
        family.save(trainer.model, tokenizer, work_dir / "hub")
        write_json(work_dir / "log.json", summarize(trainer) | {"log": trainer.log})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, required=True, help="hub-layout files, logs and training states")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--model", choices=["target", "draft", "both"], default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--evaluate", action="store_true", help="examine the models in out_dir, train nothing")
    parser.add_argument("--num_questions", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()
