"""What the families of tiny models share: recipes, the batched forward pass of a decoder, attention written out.

Knows how a family looks to the training (class Family). Does not know the corpus, losses or optimizers, nor any one
family: each has a file of its own.

Letters: B scenes a batch, L tokens a sample, T tiles an image, P patches a tile (Qwen: an image), N visual tokens an
image, E encoder width, D decoder width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

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

    shape: dict
    steps: int
    learning_rate: float  # the peak
    naming_steps: int = 0  # of the steps, those at the beginning that train the encoder alone
    warmup: int = 200  # steps
    batch: int = 32  # scenes a step
    first_seed: int = 0  # of the scenes
    layers: tuple[int, ...] = ()  # which of the base's each layer begins with; ~i: a copy of i that adds nothing yet
    thoughts: bool = True  # trained with thought_loss, for which a decoder of two layers is too small
    frozen_encoder: bool = False  # as it is in the base
    pruned: float = 0.0  # of the batches, those in which half of the visual tokens are left out

    @property
    def depth(self) -> int:
        """How many layers the decoder has."""
        return self.shape["text"]["num_hidden_layers"]


class Family:
    """What the families share: the decoder is Qwen2's, and visual tokens stand in the sequence."""

    ship_name: str  # of the target's folder under checkpoints/; the draft's ends in -draft
    recipes: dict[str, Recipe]  # "base", "target", "draft", in the order in which they are made
    # What differs in a recipe if its model begins with a trained one of the same depth, which has learned to see:
    tuning = dict(steps=700, learning_rate=2e-3, warmup=20, batch=8, first_seed=50_000_000)
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
    #   cells(size) -> a Cell for each of the N visual tokens; None for those that need not name anything
    #   pixels(image) -> what encode takes of a picture, uint8
    #   encode(model, pixels [B, ...], size) -> visual tokens [B, N, D]
    #   stock_inputs(processor, image, is_image [1, n]) -> what transformers' own forward takes beside n input_ids
    #   encoder_parameters(model) -> the encoder's weights, its projection to the decoder's width included
    #   save(model, tokenizer, hub_dir) writes a Hugging Face checkpoint

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

    def prune(self, model, batch, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """rows [B, N, D] and who sees what [B, L, L] when every other visual token is left out (but no line ends)."""
        first = self.first_image_token(model, batch.tokens)
        candidates = [i for i, cell in enumerate(self.cells(batch.size)) if cell is not None]
        dropped = sorted(set(candidates) - {candidates[i] for i in every_other(len(candidates))})
        seen = seen.clone()
        seen[:, :, [first + i for i in dropped]] = False
        seen.diagonal(dim1=1, dim2=2)[:] = True  # what sees nothing at all would be NaN
        return rows, seen

    def n_image_tokens(self, size: Size) -> int:
        return len(self.cells(size))

    def load(self, hub_dir: Path) -> torch.nn.Module:
        return self.model_class.from_pretrained(hub_dir, dtype=torch.bfloat16).eval()


def every_other(n: int) -> list[int]:
    """The indices that "structured" pruning by half keeps of n visual tokens (vision.py)."""
    kept = max(1, n - round(n / 2))
    return [(2 * i + 1) * n // (2 * kept) for i in range(kept)]


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


def grid_cells(box: Cell, rows: int, columns: int) -> list[Cell]:
    """A box cut into rows x columns, row by row."""
    left, top, right, bottom = box
    width, height = (right - left) / columns, (bottom - top) / rows
    corners = [(left + x * width, top + y * height) for y in range(rows) for x in range(columns)]
    return [(x, y, x + width, y + height) for x, y in corners]


def tile_patches(canvas: Image.Image, tile: int) -> np.ndarray:
    """[T, P, 3 * 14 * 14] of a picture that is cut into square tiles."""
    side = tile // PATCH
    array = np.asarray(canvas).reshape(canvas.height // tile, side, PATCH, canvas.width // tile, side, PATCH, 3)
    return array.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, side**2, 3 * PATCH**2)
