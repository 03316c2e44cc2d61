"""From an image to image features for the decoder: preprocessing with PIL, three encoders, pruning, build_prompt.

Knows images, the encoders' weights and which token stands for an image. Does not know sampling, checkpoints or the
command line.

Shapes: P patches, E encoder width, N image features, D decoder width, W windows, L patches a window, T tiles.
"""

import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, floor, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model import FeedForward, Prompt, rope_table, rotate

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and std
GREY = (127, 127, 127)  # SigLIP's mean as a color, rounded as transformers' processor does
ENCODED_BYTES = 2**29  # of image features that are kept from one prompt to the next


def to_pixels(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, height, width] float32, from 0..255 to zero mean and unit variance. Bytes go to the device, not floats."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).to(device)
    pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def center(image: Image.Image, size: tuple[int, int], color: str | tuple[int, int, int]) -> Image.Image:
    """The image in the center of a canvas of (width, height)."""
    canvas = Image.new("RGB", size, color)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


class VisionBlock(nn.Module):
    """A transformer layer on x [B, L, E], for every encoder; its arguments are what differs between the families."""

    def __init__(self, dim: int, n_head: int, norm: Callable, mlp: nn.Module, bias: bool = True, gated: bool = False):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.wo = nn.Linear(dim, dim, bias=bias)
        self.mlp = mlp
        # tanh of them scales what attention and MLP add
        self.gates = nn.Parameter(torch.zeros(2)) if gated else None

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """mask [B, 1, 1 or L, L]: the patches attended to, bool or 0 / -inf; rope: rope_table [B, 1, L, E / n_head]."""
        q, k, v = self.wqkv(self.norm1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.gate(0, self.wo(y.transpose(1, 2).flatten(2)))
        return x + self.gate(1, self.mlp(self.norm2(x)))

    def gate(self, i: int, x: Tensor) -> Tensor:
        return x if self.gates is None else x * self.gates[i].tanh()


class Encoder(nn.Module):
    """What build_prompt asks of an encoder: pixels of an image, and from forward(pixels, grid) its features [N, D]."""

    # The image features stay beside the sequence, and one token stands for the image; else they are tokens themselves.
    uses_cross_attention = False
    blocks: nn.ModuleList

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def preprocess(self, image: Image.Image) -> tuple[Tensor, Any]:
        """pixels, on the encoder's device, and the grid of patches or tiles that they are."""

    def preprocess_several(self, image: Image.Image) -> tuple[Tensor, Any] | None:
        """The same for an image among others; None where that makes no difference."""

    def newlines(self, n: int, grid: Any) -> range:
        """Which of the N features end a row of the image."""
        return range(0)

    def positions(self, n: int, grid: Any) -> Tensor:
        """[N, 3] the features' rotary positions, counted from the place where the image stands: one after the other."""
        return torch.arange(n)[:, None].expand(-1, 3)


class QwenEncoder(Encoder):
    """Qwen2.5-VL (arXiv 2502.13923): native resolution, windowed attention, 2x2 patches merged into a feature.

    Patches are numbered as transformers' processor numbers them: the merge x merge patches of a feature are neighbors.
    """

    def __init__(
        self, *, dim, depth, n_head, hidden, out_dim, patch, merge, window, full_layers, min_pixels, max_pixels
    ):
        super().__init__()
        self.patch, self.merge, self.window = patch, merge, window  # in pixels, patches, pixels
        self.n_head, self.full_layers, self.min_pixels, self.max_pixels = n_head, full_layers, min_pixels, max_pixels
        self.patch_embed = nn.Linear(3 * patch * patch, dim, bias=False)
        norm = lambda width: nn.RMSNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(
            VisionBlock(dim, n_head, norm, FeedForward(dim, hidden, bias=True)) for _ in range(depth)
        )
        merged = dim * merge * merge
        self.norm = norm(dim)
        self.merger = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out_dim))

    def resize_to(self, width: int, height: int, least: int | None = None, most: int | None = None) -> tuple[int, int]:
        """(width, height) in multiples of a feature's side, of nearly the same ratio.

        least, most: pixels; None: the checkpoint's limits.
        """
        least, most = least or self.min_pixels, most or self.max_pixels
        if max(width, height) > 200 * min(width, height):
            raise ValueError(f"the image is {width}x{height}: one side is more than 200 times the other")
        side = self.patch * self.merge
        new_width, new_height = round(width / side) * side, round(height / side) * side
        if new_width * new_height > most:
            shrink = sqrt(width * height / most)
            new_width, new_height = (max(side, floor(n / shrink / side) * side) for n in (width, height))
        elif new_width * new_height < least:
            grow = sqrt(least / (width * height))
            new_width, new_height = (ceil(n * grow / side) * side for n in (width, height))
        return new_width, new_height

    def preprocess(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """pixels [P, 3 * patch * patch] and the grid (height, width) in patches."""
        image = image.resize(self.resize_to(*image.size), Image.Resampling.BICUBIC)
        grid = image.height // self.patch, image.width // self.patch
        pixels = to_pixels(image, CLIP_MEAN, CLIP_STD, self.device).unflatten(2, (-1, self.merge, self.patch))
        pixels = pixels.unflatten(1, (-1, self.merge, self.patch))  # [3, h, merge, patch, w, merge, patch]
        return pixels.permute(1, 4, 2, 5, 0, 3, 6).reshape(grid[0] * grid[1], -1), grid

    def window_index(self, grid: tuple[int, int]) -> Tensor:
        """[W, L] the patches of each window, row by row; windows cut off by the border are padded with -1."""
        side = self.window // self.patch // self.merge
        height, width = grid[0] // self.merge, grid[1] // self.merge
        rows = torch.arange(height * width).view(height, width)
        rows = F.pad(rows, (0, -width % side, 0, -height % side), value=-1)
        rows = rows.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(2).flatten(0, 1)
        patches = rows[..., None] * self.merge**2 + torch.arange(self.merge**2)
        index = torch.where(rows[..., None] < 0, -1, patches).flatten(1)
        # Where no window is full, as in a narrow image: real patches first, then the common padding is cut off.
        index = index.gather(1, (index < 0).sort(dim=1, stable=True).indices)
        return index[:, : (index >= 0).sum(dim=1).max()]

    def patch_angles(self, grid: tuple[int, int]) -> Tensor:
        """[P, E / n_head / 2] rotary angles: half of them of the patch's row, half of its column."""
        height, width = grid
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack((row, column), dim=-1).float()  # [height, width, 2]
        place = place.view(height // self.merge, self.merge, width // self.merge, self.merge, 2).transpose(1, 2)
        quarter = self.patch_embed.out_features // self.n_head // 4
        inv_freq = 10000.0 ** -(torch.arange(quarter) / quarter)
        return (place.reshape(-1, 2, 1) * inv_freq).flatten(1)

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, D] from pixels [P, 3 * patch * patch]. Full layers take all windows as one sequence of patches."""
        index = self.window_index(grid)  # [W, L]
        real = index >= 0
        window_mask = None if real.all() else real[:, None, None].to(pixels.device)  # [W, 1, 1, L]
        full_mask = None if window_mask is None else window_mask.reshape(1, 1, 1, -1)
        window_rope = rope_table(self.patch_angles(grid)[index][:, None].to(pixels.device))  # [W, 1, L, E / n_head]
        full_rope = tuple(t.reshape(1, 1, -1, t.shape[-1]) for t in window_rope)
        x = self.patch_embed(pixels)[index.to(pixels.device)]  # [W, L, E]
        for i, block in enumerate(self.blocks):
            if i in self.full_layers:
                x = block(x.view(1, -1, x.shape[-1]), full_mask, full_rope).view_as(x)
            else:
                x = block(x, window_mask, window_rope)
        order = index[real].argsort().to(pixels.device)  # back to the order of preprocess
        patches = x[real.to(pixels.device)][order]  # [P, E]
        return self.merger(self.norm(patches).view(-1, self.merger[0].in_features))

    def positions(self, n: int, grid: tuple[int, int]) -> Tensor:
        """[N, 3]: an image is one moment; its features have their row and column in it."""
        height, width = grid[0] // self.merge, grid[1] // self.merge
        row = torch.arange(height).repeat_interleave(width)
        return torch.stack((torch.zeros(n, dtype=torch.long), row, torch.arange(width).repeat(height)), dim=1)


class LlavaEncoder(Encoder):
    """Llava-OneVision (arXiv 2408.03326): SigLIP on an overview of the image and on tiles of it; an MLP to the decoder.

    The features: the overview's, then those of the image that the tiles make up, row by row, a newline token at the end
    of each row. An image among others has no tiles: its overview and one newline token.
    """

    def __init__(self, *, dim, depth, n_head, hidden, out_dim, patch, tile, resolutions, max_tiles):
        super().__init__()
        self.patch, self.tile, self.side = patch, tile, tile // patch  # a tile's sides in pixels and in patches
        self.resolutions, self.max_tiles = resolutions, max_tiles  # [(height, width)] in pixels
        self.patch_embed = nn.Linear(3 * patch * patch, dim)
        self.position_embed = nn.Parameter(torch.empty(self.side**2, dim))
        norm = lambda width: nn.LayerNorm(width, eps=1e-6)
        mlp = lambda: nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.blocks = nn.ModuleList(VisionBlock(dim, n_head, norm, mlp()) for _ in range(depth))
        self.projector = nn.Sequential(nn.Linear(dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
        self.newline = nn.Parameter(torch.empty(out_dim))

    def best_resolution(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the canvas that keeps most of the image's pixels; of several the smallest."""

        def kept(canvas: tuple[int, int]) -> int:
            scale = min(canvas[1] / width, canvas[0] / height)
            return min(int(width * scale) * int(height * scale), width * height)

        return max(self.resolutions, key=lambda canvas: (kept(canvas), -canvas[0] * canvas[1]))

    def preprocess(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """pixels [1 + T, P, 3 * patch * patch] of the overview and the tiles, and the grid of tile_index."""
        height, width = self.best_resolution(*image.size)
        scale = min(width / image.width, height / image.height)
        fitted = min(ceil(image.width * scale), width), min(ceil(image.height * scale), height)
        canvas = center(image.resize(fitted, Image.Resampling.BICUBIC), (width, height), "black")
        corners = [(x, y) for y in range(0, height, self.tile) for x in range(0, width, self.tile)]
        tiles = [canvas.crop((x, y, x + self.tile, y + self.tile)) for x, y in corners]
        return self.patches([image, *tiles]), self.tile_index(height // self.tile, width // self.tile, *image.size)

    def preprocess_several(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """The same for an image among others: no tiles, so that after the overview there is one empty row."""
        square = center(image, (max(image.size), max(image.size)), GREY)
        return self.patches([square]), torch.empty(1, 0, dtype=torch.long)

    def patches(self, images: list[Image.Image]) -> Tensor:
        """[images, P, 3 * patch * patch], each image stretched to a tile; pixels that fill no patch are cut off."""
        size, whole = (self.tile, self.tile), self.side * self.patch
        images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
        pixels = torch.stack([to_pixels(image, HALF, HALF, self.device) for image in images])[..., :whole, :whole]
        pixels = pixels.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # [..., 3, h, patch, w, patch]
        return pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def tile_index(self, rows: int, columns: int, width: int, height: int) -> Tensor:
        """[h, w] the patches, numbered as in [1 + T, P], of the image of rows x columns tiles, without its padding.

        width, height: of the image, in pixels.
        """
        tiles = torch.arange(self.side**2, (1 + rows * columns) * self.side**2)  # after the overview
        index = tiles.view(rows, columns, self.side, self.side).transpose(1, 2).flatten(2).flatten(0, 1)
        scale = min(index.shape[1] / width, index.shape[0] / height)
        # Rounded as transformers does: 26.99999999 patches are 27.
        top, left = ((n - int(round(side * scale, 7))) // 2 for n, side in zip(index.shape, (height, width)))
        return index[top : len(index) - top, left : index.shape[1] - left]

    def feature_grid(self, grid: Tensor) -> tuple[int, int]:
        """(rows, columns) of features after the overview: scaled down where they exceed max_tiles by far."""
        height, width = grid.shape
        ratio = sqrt(height * width / (self.max_tiles * self.side**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)

    def newlines(self, n: int, grid: Tensor) -> range:
        _, width = self.feature_grid(grid)
        return range(self.side**2 + width, n, width + 1)

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """[N, D] from pixels [1 + T, P, 3 * patch * patch]."""
        x = self.patch_embed(pixels) + self.position_embed  # [1 + T, P, E]
        for block in self.blocks:
            x = block(x)
        x = self.projector(x)
        picture = x.flatten(0, 1)[grid.to(x.device)]  # [h, w, D]
        if (size := self.feature_grid(grid)) != grid.shape:
            picture = F.interpolate(picture.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
        newlines = self.newline.expand(len(picture), 1, -1)
        return torch.cat((x[0], torch.cat((picture, newlines), dim=1).flatten(0, 1)))


class LlamaEncoder(Encoder):
    """Llama 3.2 Vision (arXiv 2407.21783, section 7): up to four tiles, local blocks, then gated global ones.

    A feature is the output and the inputs of the blocks in `keep`, side by side, projected to the decoder's width.
    """

    uses_cross_attention = True

    def __init__(self, *, dim, depth, n_global, n_head, hidden, out_dim, tile, patch, max_tiles, keep):
        super().__init__()
        self.tile, self.patch, self.max_tiles, self.keep, self.depth = tile, patch, max_tiles, keep, depth
        sides = range(1, max_tiles + 1)
        self.grids = [(height, width) for height in sides for width in sides if height * width <= max_tiles]
        n_patches = (tile // patch) ** 2
        self.patch_embed = nn.Linear(3 * patch * patch, dim, bias=False)
        # All that is added to the class token and the patches of each tile; index 0 of the first dimension is unused.
        self.place = nn.Parameter(torch.empty(1 + len(self.grids), max_tiles, 1 + n_patches, dim))
        self.tile_place = nn.Parameter(torch.empty(1 + len(self.grids), max_tiles, 1, dim))
        self.norm_pre, self.norm_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        mlp = lambda: nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        gated = [False] * depth + [True] * n_global
        self.blocks = nn.ModuleList(VisionBlock(dim, n_head, nn.LayerNorm, mlp(), bias=False, gated=g) for g in gated)
        self.projector = nn.Linear(dim * (1 + len(keep)), out_dim)

    def choose_grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tiles: the least upscaling, else the least downscaling; of equals the fewest tiles."""

        def badness(grid: tuple[int, int]) -> tuple:
            scale = min(grid[0] * self.tile / height, grid[1] * self.tile / width)
            return scale < 1, scale if scale >= 1 else -scale, grid[0] * grid[1]

        return min(self.grids, key=badness)

    def resize_to(self, width: int, height: int, grid: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that fits the tiles; an image is not enlarged beyond one tile's side."""
        most = min(max(width, self.tile), grid[1] * self.tile), min(max(height, self.tile), grid[0] * self.tile)
        if most[0] / width < most[1] / height:
            return most[0], min(floor(height * (most[0] / width)) or 1, most[1])
        return min(floor(width * (most[1] / height)) or 1, most[0]), most[1]

    def preprocess(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """pixels [tiles, P, 3 * patch * patch] and the grid (height, width) in tiles."""
        grid = self.choose_grid(*image.size)
        canvas = Image.new("RGB", (grid[1] * self.tile, grid[0] * self.tile))
        canvas.paste(image.resize(self.resize_to(*image.size, grid), Image.Resampling.BILINEAR))
        pixels = to_pixels(canvas, CLIP_MEAN, CLIP_STD, self.device).unflatten(2, (grid[1], -1, self.patch))
        pixels = pixels.unflatten(1, (grid[0], -1, self.patch))  # [3, tiles, P, patch, tiles, P, patch]: down, across
        return pixels.permute(1, 4, 2, 5, 0, 3, 6).flatten(4).flatten(2, 3).flatten(0, 1), grid

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, D] from pixels [tiles, P, 3 * patch * patch]; N counts the tiles in use, and their class tokens.

        Patches attend to unused tiles and to padding up to a multiple of 8, as in training; padding does not attend to
        padding. So both are dropped at the end, not before.
        """
        aspect, n_tiles = 1 + self.grids.index(grid), len(pixels)
        patches = self.patch_embed(pixels)  # [tiles, P, E]
        x = F.pad(patches, (0, 0, 1, 0, 0, self.max_tiles - n_tiles)) + self.place[aspect]
        n_places = x.shape[1]
        x = F.pad(self.norm_pre(x), (0, 0, 0, -n_places % 8))  # [max_tiles, L / max_tiles, E]
        used = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        used[:n_tiles, :n_places] = True
        mask = torch.where(used.view(-1, 1) | used.view(-1), 0.0, -torch.inf).to(x.dtype)  # [L, L], added once
        kept = []
        for i, block in enumerate(self.blocks):
            if i in self.keep:
                kept.append(x[:n_tiles, :n_places])
            if i == self.depth:
                x = self.norm_post(x) + self.tile_place[aspect]
            x = block(x.view(1, -1, x.shape[-1]), mask).view_as(x)
        # The checkpoint's column order: the output, then for each dimension its values in the kept states.
        states = torch.cat((x[:n_tiles, :n_places], torch.stack(kept, dim=-1).flatten(-2)), dim=-1)
        return self.projector(states.flatten(0, 1))

    def positions(self, n: int, grid: tuple[int, int]) -> Tensor:
        """[1, 3]: one token stands for the image, however many features it has."""
        return torch.zeros(1, 3, dtype=torch.long)


ENCODERS = {"qwen2_5_vl": QwenEncoder, "llava": LlavaEncoder, "llama3_2_vision": LlamaEncoder}


def build_encoder(vision: dict) -> Encoder:
    """The encoder that `vision` of params.json describes: its "type" and the arguments of that class."""
    return ENCODERS[vision["type"]](**{name: value for name, value in vision.items() if name != "type"})


class Encoded(NamedTuple):
    """What is kept of an image: all that a later prompt needs to place it again."""

    features: Tensor  # [N, D]
    positions: Tensor  # [N, 3] of the tokens that stand for the image
    key: int  # of the image's content
    newlines: range  # the features that end a row of the image: they are never pruned


def encode_image(encoder: Encoder, image: Image.Image, encoded: dict[int, Encoded], alone: bool) -> Encoded:
    """The image's features; from `encoded` if the same image was encoded before, in the way that is needed now.

    Those that come when ENCODED_BYTES are taken are not kept: a conversation's next prompt begins with the first ones.
    """
    several = None if alone else encoder.preprocess_several(image)
    key = zlib.crc32(image.tobytes(), image.width | (several is not None) << 31)
    if key in encoded:
        return encoded[key]
    pixels, grid = several or encoder.preprocess(image)
    features = encoder(pixels.to(next(encoder.parameters()).dtype), grid)
    n = len(features)
    found = Encoded(features, encoder.positions(n, grid), key, encoder.newlines(n, grid))
    if features.nbytes + sum(each.features.nbytes for each in encoded.values()) <= ENCODED_BYTES:
        encoded[key] = found
    return found


class Pruning(NamedTuple):
    """Which visual tokens are removed from a draft's prompt."""

    method: str  # "structured": the kept ones are evenly spaced; "random"
    ratio: float  # the fraction that is removed
    seed: int = 0


def kept_indices(n: int, pruning: Pruning | None, image: int = 0, newlines: range = range(0)) -> Tensor:
    """The ascending indices of the visual tokens that are kept: max(1, N - round(N * ratio)) of N, and the newlines.

    N counts the n tokens of the image without its newlines; image is the image's number in the prompt.
    """
    if pruning is None:
        return torch.arange(n)
    candidates = torch.tensor([i for i in range(n) if i not in newlines])
    kept = max(1, len(candidates) - round(len(candidates) * pruning.ratio))
    index = (2 * torch.arange(kept) + 1) * len(candidates) // (2 * kept)  # the centers of `kept` equal intervals
    if pruning.method == "random":
        generator = torch.Generator().manual_seed(pruning.seed + image)
        index = torch.randperm(len(candidates), generator=generator)[:kept]
    return torch.cat((candidates[index], torch.tensor(newlines))).sort().values.long()


def cross_attention_mask(is_image: Tensor, n_features: list[int]) -> Tensor:
    """[S, N] bool: a token attends to the last image at or before it, and to the images directly in front of that one.

    The rule of Meta's create_vision_mask (llama-models). is_image [S]: the image tokens; n_features: of each image.
    """
    place = is_image.nonzero().flatten()  # [images]
    begins = is_image & ~F.pad(is_image[:-1], (1, 0))
    group = begins.cumsum(0)  # [S] consecutive images are one group; text belongs to the group before it
    token = torch.arange(len(is_image), device=is_image.device)
    mask = (group[:, None] == group[place]) & (token[:, None] >= place)  # [S, images]
    return mask.repeat_interleave(torch.tensor(n_features, dtype=torch.long, device=is_image.device), dim=1)


def build_prompt(
    tokens: list[int],
    images: Sequence[Image.Image] = (),
    encoder: Encoder | None = None,
    image_token_id: int | None = None,
    device: torch.device | str = "cpu",
    encoded: dict[int, Encoded] | None = None,
    pruning: Pruning | None = None,
) -> Prompt:
    """The Prompt of tokens in which one image token stands for each of the images, in order.

    Pruning removes visual tokens; the others keep their positions, and so does the text after them.
    `encoded` keeps what was computed of an image from one call to the next. Raises ValueError if the number of images
    is not the number of image tokens, or if an image is not one that the encoder takes.
    """
    places = [i for i, token in enumerate(tokens) if encoder and token == image_token_id]
    if images and not encoder:
        raise ValueError("this model reads text only: it takes no image")
    if len(places) != len(images):
        raise ValueError(f"the prompt has {len(places)} places for images, and {len(images)} images were given")
    encoded, inline = {} if encoded is None else encoded, encoder is not None and not encoder.uses_cross_attention
    ids: list[int] = []
    keys: list[int] = []
    rope_pos, visual, next_pos = [], [], 0
    for i, (first, last) in enumerate(pairwise((-1, *places, len(tokens)))):
        if encoder and i:
            image = encode_image(encoder, images[i - 1], encoded, len(images) == 1)
            kept = kept_indices(len(image.features), pruning, i - 1, image.newlines)
            visual.append(image.features[kept.to(image.features.device)])
            kept = kept if inline else kept[:1] * 0  # one token for the image
            ids += tokens[first : first + 1] * len(kept)
            keys += [-1 - (image.key << 20) - j for j in kept.tolist()]
            rope_pos.append(next_pos + image.positions[kept])
            next_pos += int(image.positions.max()) + 1
        text = tokens[first + 1 : last]
        ids += text
        keys += text
        rope_pos.append(torch.arange(next_pos, next_pos + len(text))[:, None].expand(-1, 3))
        next_pos += len(text)
    is_image = torch.tensor([key < 0 for key in keys], device=device)
    crossed = [] if inline else [len(features) for features in visual]
    return Prompt(
        tokens=torch.tensor(ids, device=device),
        rope_pos=torch.cat(rope_pos).to(device),
        keys=keys,
        next_pos=next_pos,
        cross_mask=cross_attention_mask(is_image, crossed) if crossed else is_image.new_zeros(len(keys), 0),
        visual=torch.cat(visual) if visual else None,
        image_mask=is_image if visual and inline else None,
    )
