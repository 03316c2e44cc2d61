"""The decoder: layers, KV caches and what they hold, rotary positions, and the Prompt that prefill consumes.

Knows tokens, positions and image features. Does not know images, files, tokenizers or sampling.

Shapes: S tokens of this call, T cache slots, D model width, H query heads, G key/value heads, d head width,
V vocabulary size, N visual tokens, C slots of the cross-attention caches. There is no batch dimension.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelArgs:
    """The shape of a decoder, as params.json holds it. `vision` is handed to the encoder and not read here."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # of the output layer, padding included
    n_tokens: int  # ids that the tokenizer knows: those after them are padding and are never sampled
    max_seq_len: int = 4096  # the context that the model was trained for, in tokens
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # factor and what inverse_frequencies needs; YaRN's attention_factor
    mrope_section: tuple[int, int, int] | None = None  # frequencies that follow (time, height, width)
    qkv_bias: bool = False
    tie_embeddings: bool = False  # the output layer is the embedding table
    n_input_only: int = 0  # ids after vocab_size that have an embedding and no logit
    cross_attention_layers: tuple[int, ...] = ()  # those that attend to image features instead of to earlier tokens
    image_token_id: int | None = None
    vision: dict | None = None


@dataclass
class Prompt:
    """What prefill consumes: text, or text with images already encoded and placed.

    keys tells whether a cache already holds a token: equal keys stand for equal cache contents. A key is the token's id
    or, of a visual token, a negative number made of the image's content and the token's index in it.
    """

    tokens: Tensor  # [S] ids; the image token stands for each visual token, or once an image under cross-attention
    rope_pos: Tensor  # [S, 3] (time, height, width); three equal columns for text
    keys: list[int]  # S of them
    next_pos: int  # the rotary position of the token after the prompt
    cross_mask: Tensor  # [S, N] bool: which image features a token may attend to; [S, 0] without cross-attention
    visual: Tensor | None = None  # [N, D] image features, in image order
    image_mask: Tensor | None = None  # [S] bool: the N tokens whose embeddings the image features replace

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class CachedTokens:
    """Which tokens a KV cache holds, slot by slot: the owner of the cache position.

    A step first writes slots (write), then learns which of its tokens the answer keeps, and rolls back the others
    (commit). The last generated token is never cached: it is the next step's input.
    """

    n_slots: int
    keys: list[int] = field(default_factory=list)  # Prompt.keys of the cached tokens
    n_prompt: int = 0  # how many of them are the prompt's
    n_written: int = 0  # slots after them that a step has written since the last commit

    @property
    def position(self) -> int:
        """The slot of the next token."""
        return len(self.keys) + self.n_written

    @property
    def free_slots(self) -> int:
        return self.n_slots - self.position

    def reusable_prefix(self, keys: list[int]) -> int:
        """How many tokens of a prompt are cached, at most all but its last; 0 where a visual token follows them.

        An image leaves more behind than its slots (the rotary offset): past it the cache cannot be rolled back.
        """
        n = next(
            (i for i, (a, b) in enumerate(zip(self.keys, keys[:-1])) if a != b), min(len(self.keys), len(keys) - 1)
        )
        return n if min(self.keys[n:] + keys[n:]) >= 0 else 0

    def fill(self, keys: list[int]) -> None:
        """The cache holds this prompt and nothing else."""
        self.keys, self.n_prompt, self.n_written = list(keys), len(keys), 0

    def pending(self, ids: list[int]) -> list[int]:
        """The generated ids that are not cached yet."""
        return ids[len(self.keys) - self.n_prompt :]

    def write(self, n: int) -> int:
        """Take n more slots, and return the first."""
        first = self.position
        self.n_written += n
        return first

    def commit(self, ids: list[int]) -> None:
        """ids are all that was generated: keep the slots that hold them, roll back those of rejected tokens."""
        self.keys += self.pending(ids)[:-1][: self.n_written]
        self.n_written = 0


class Step(NamedTuple):
    """What every layer needs to know of one forward call."""

    cos: Tensor  # [S, d] float32
    sin: Tensor  # [S, d] float32
    input_pos: Tensor  # [S] the cache slot of each token
    mask: Any  # [S, T or fewer], for Attend: the slots a token attends to; None: causally to the tokens of this call
    cross_mask: Any  # [S, C or fewer], likewise: cross-attention slots
    sees_image: Tensor | None  # [S, 1] bool: whether a token attends to any of these; None: there are no images


def inverse_frequencies(args: ModelArgs, device: torch.device) -> Tensor:
    """[d/2] float32 radians per position (RoFormer, arXiv 2104.09864), stretched by rope_scaling if there is one.

    Some stay, others are divided by factor, between them the two are blended linearly. Llama 3.1 (its model card's
    code): wavelengths below original/high_freq_factor stay, those beyond original/low_freq_factor are stretched. YaRN
    (arXiv 2309.00071): frequencies up to the first stay, from the last on they are stretched. Linear: all are.
    """
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device=device) / args.head_dim
    inv_freq = 1.0 / (args.rope_base**exponent)
    if (scaling := args.rope_scaling) is None:
        return inv_freq
    keep = torch.zeros_like(inv_freq)
    if "low_freq_factor" in scaling:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelengths_in_context = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        keep = ((wavelengths_in_context - low) / (high - low)).clamp(0, 1)
    elif "first" in scaling:
        place = torch.arange(len(inv_freq), device=device)
        keep = 1 - ((place - scaling["first"]) / (scaling["last"] - scaling["first"])).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / scaling["factor"])


def rope_table(angles: Tensor) -> tuple[Tensor, Tensor]:
    """For rotate: cos and sin [..., d] of angles [..., d/2]; sin carries the sign of the other half's term."""
    return torch.cat((angles, angles), dim=-1).cos(), torch.cat((-angles, angles), dim=-1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., S, d] rotated; the two halves are paired, as in the Hugging Face checkpoint's layout."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((second, first), dim=-1) * sin).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[S, H * d] from queries [H, S, d], keys and values [G, T, d], mask [S, T] bool; causal without a mask."""
    rows = q.unflatten(0, (len(k), -1))  # [G, H/G, S, d]: a group of query heads shares one key/value head
    if mask is not None and len(mask) <= 16:  # a decode step: the group as rows of one head, which reads them once
        rows, mask = rows.flatten(1, 2)[:, None], mask.repeat(rows.shape[1], 1)  # [G, 1, H/G * S, d]
    k, v = (t[:, None].expand(-1, rows.shape[1], -1, -1) for t in (k, v))  # views, nothing is repeated in memory
    y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, is_causal=mask is None)
    return y.reshape(q.shape).transpose(0, 1).flatten(1)


class Attend(nn.Module):
    """The attention kernel, a submodule so that a device's own can take its place (cpu.py, gpu.py)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask)


class StepMasks(nn.Module):
    """The masks of tokens that follow a prompt, as Attend takes them; a submodule for the same reason."""

    def forward(self, slots: Tensor, input_pos: Tensor, cross_row: Tensor, n_slots: int | None) -> tuple[Any, Any]:
        """[S, n_slots] and [S, C] bool: a token in the slot input_pos [S] attends to the slots [T] up to its own."""
        return slots[:n_slots] <= input_pos[:, None], cross_row.expand(len(input_pos), -1)


class CachedAttention(nn.Module):
    """Attention with a KV cache, to earlier tokens or to image features."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attend = Attend()
        self.n_head, self.n_kv_head, self.head_dim = args.n_head, args.n_kv_head, args.head_dim
        self.wo = nn.Linear(args.n_head * args.head_dim, args.dim, bias=False)

    def setup_cache(self, n_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = self.n_kv_head, n_slots, self.head_dim  # [G, T, d]
        self.k_cache = nn.Buffer(torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.v_cache = nn.Buffer(torch.zeros(shape, device=device, dtype=dtype), persistent=False)


class Attention(CachedAttention):
    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim, bias=args.qkv_bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)  # [H + 2G, S, d]
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head))
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        self.k_cache[:, step.input_pos] = k
        self.v_cache[:, step.input_pos] = v
        if step.mask is not None:
            k, v = (cache[:, : step.mask.shape[-1]] for cache in (self.k_cache, self.v_cache))
        return self.wo(self.attend(q, k, v, step.mask))


class CrossAttention(CachedAttention):
    """Tokens attend to image features. There are no positions: queries and keys are normalized, not rotated."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.wq = nn.Linear(args.dim, args.n_head * args.head_dim, bias=False)
        self.wkv = nn.Linear(args.dim, 2 * args.n_kv_head * args.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(args.head_dim, args.norm_eps)
        self.k_norm = nn.RMSNorm(args.head_dim, args.norm_eps)

    def cache_images(self, visual: Tensor) -> None:
        """Write keys and values of the image features [N, D] into the first slots, once for all later tokens."""
        k, v = self.wkv(visual).unflatten(-1, (2, self.n_kv_head, self.head_dim)).permute(1, 2, 0, 3)  # [G, N, d]
        self.k_cache[:, : len(visual)] = self.k_norm(k)
        self.v_cache[:, : len(visual)] = v

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q = self.q_norm(self.wq(x).unflatten(-1, (-1, self.head_dim))).transpose(0, 1)  # [H, S, d]
        n = step.cross_mask.shape[-1]
        return self.wo(self.attend(q, self.k_cache[:, :n], self.v_cache[:, :n], step.cross_mask))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool = False):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=bias)  # gate and up in one product
        self.w2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention: CachedAttention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args.dim, args.intermediate_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = x + self.attention(self.attention_norm(x), step)
        return x + self.feed_forward(self.ffn_norm(x))


class CrossBlock(Block):
    """A cross-attention layer of Llama 3.2 Vision (arXiv 2407.21783, section 7).

    A token that may attend to no image passes unchanged: Meta's code zeroes its attention output and its MLP.
    """

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.attention = CrossAttention(args)
        self.gates = nn.Parameter(torch.zeros(2))  # tanh of them scales what attention and MLP add

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if step.sees_image is None:
            return x
        attention_gate, ffn_gate = self.gates.tanh()
        y = x + attention_gate * self.attention(self.attention_norm(x), step)
        y = y + ffn_gate * self.feed_forward(self.ffn_norm(y))
        return torch.where(step.sees_image, y, x)  # y may be NaN where the mask is all false


class Transformer(nn.Module):
    """Call setup_caches once, prefill for each prompt, then forward for whatever follows."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # Not initialized: drawing numbers on the meta device would import torch._dynamo, two seconds for nothing.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(args.vocab_size + args.n_input_only, args.dim))
        blocks = [CrossBlock if i in args.cross_attention_layers else Block for i in range(args.n_layer)]
        self.layers = nn.ModuleList(block(args) for block in blocks)
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.step_masks = StepMasks()
        self.cached, self.n_cross = CachedTokens(0), 0

    def setup_caches(self, n_slots: int, n_cross: int = 0) -> None:
        """Room for n_slots tokens, and for n_cross image features under cross-attention. Cached tokens are lost."""
        device, dtype = self.norm.weight.device, self.norm.weight.dtype
        self.cached = CachedTokens(0)  # also if there is no room for all of it
        for module in self.modules():
            if isinstance(module, CachedAttention):  # one more than n_slots: see self.slots
                module.setup_cache(n_cross if isinstance(module, CrossAttention) else n_slots + 1, device, dtype)
        section = torch.tensor(self.args.mrope_section or (self.args.head_dim // 2, 0, 0))
        axis = torch.arange(3).repeat_interleave(section).to(device)
        self.rope_axis = nn.Buffer(axis, persistent=False)  # [d/2] the column of rope_pos for each frequency
        self.inv_freq = nn.Buffer(inverse_frequencies(self.args, device), persistent=False)
        # Rotary position minus cache slot after the prompt: an image takes fewer positions than tokens.
        self.rope_delta = nn.Buffer(torch.zeros((), dtype=torch.long, device=device), persistent=False)
        # One more than are ever read, so that a step compiled for a part of the cache serves the whole cache too.
        self.slots = nn.Buffer(torch.arange(n_slots + 1, device=device), persistent=False)
        # The image features that the prompt's last token may attend to, and so may all tokens after it.
        self.cross_row = nn.Buffer(torch.zeros(n_cross, dtype=torch.bool, device=device), persistent=False)
        self.cached, self.n_cross = CachedTokens(n_slots), n_cross

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """rope_table [S, d] of rotary positions [S, d/2 or 1], of each frequency or of all.

        YaRN's are multiplied by its attention_factor.
        """
        cos, sin = rope_table(positions.float() * self.inv_freq)
        scale = (self.args.rope_scaling or {}).get("attention_factor", 1.0)
        return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)

    def forward(self, tokens: Tensor, input_pos: Tensor, n_slots: int | None = None) -> Tensor:
        """Logits [S, V] of tokens [S] written into the slots input_pos [S]; each attends to the slots up to its own.

        n_slots: the KV-cache length to read, at least all slots in use. None: all of the cache.
        """
        positions = (input_pos + self.rope_delta)[:, None]
        sees_image = self.cross_row.any(dim=0, keepdim=True).expand(len(tokens), 1) if self.n_cross else None
        masks = self.step_masks(self.slots, input_pos, self.cross_row, n_slots)
        step = Step(*self.angles(positions), input_pos, masks[0], masks[1], sees_image)
        return self.run_layers(self.embedding(tokens), step)

    def prefill(self, prompt: Prompt) -> Tensor:
        """Logits [1, V] of the prompt's last token. Afterwards the caches hold this prompt and nothing else."""
        x = self.embedding(prompt.tokens)
        if prompt.visual is not None and prompt.image_mask is not None:
            x = x.masked_scatter(prompt.image_mask[:, None], prompt.visual.to(x.dtype))
        self.rope_delta.fill_(prompt.next_pos - len(prompt))
        self.cross_row.zero_()
        if prompt.visual is not None and (n_cross := prompt.cross_mask.shape[1]):
            self.cross_row[:n_cross] = prompt.cross_mask[-1]
            for module in self.modules():
                if isinstance(module, CrossAttention):
                    module.cache_images(prompt.visual.to(x.dtype))
        sees_image = prompt.cross_mask.any(dim=1, keepdim=True) if prompt.cross_mask.shape[1] else None
        positions = prompt.rope_pos[:, self.rope_axis]
        step = Step(*self.angles(positions), self.slots[: len(prompt)], None, prompt.cross_mask, sees_image)
        return self.run_layers(x, step, last_only=True)

    def run_layers(self, x: Tensor, step: Step, last_only: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x, step)
        return self.output(self.norm(x[-1:] if last_only else x))
