"""A converted checkpoint's folder: model.pth, mapped or written tensor by tensor, and params.json beside it.

Knows files, and which numbers a model's shape can have: nothing in a file is trusted. Does not know what the tensors
are for, how they are quantized, or how they get into modules.
"""

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from model import ModelArgs

CONVERT = "convert it (again) with scripts/convert_hf_checkpoint.py"
# The least and the most that a whole number may be, of the decoder and of `vision`: far beyond all published models.
LIMITS = {
    **dict.fromkeys(("dim", "intermediate_size", "hidden", "out_dim"), (1, 2**20)),
    **dict.fromkeys(("n_layer", "n_head", "n_kv_head", "head_dim", "patch"), (1, 1024)),
    **dict.fromkeys(("depth", "n_global", "n_input_only"), (0, 1024)),
    **dict.fromkeys(("vocab_size", "n_tokens", "min_pixels"), (1, 2**22)),
    **{"max_seq_len": (1, 2**24), "max_pixels": (1, 2**28), "window": (1, 2**14), "merge": (1, 64)},
    **{"tile": (1, 4096), "max_tiles": (1, 64)},
}
VISION = {  # type -> what build_encoder takes
    "qwen2_5_vl": "dim depth n_head hidden out_dim patch merge window full_layers min_pixels max_pixels",
    "llava": "dim depth n_head hidden out_dim patch tile resolutions max_tiles",
    "llama3_2_vision": "dim depth n_global n_head hidden out_dim tile patch max_tiles keep",
}


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def read_params(path: Path) -> tuple[ModelArgs, dict]:
    """The shape and the tokenizer settings of a checkpoint, from params.json beside it. Raises ValueError, one line."""
    params = path.with_name("params.json")
    try:
        read = json.loads(params.read_text(encoding="utf-8"))
        args = ModelArgs(**read["model"])
        check_args(args)
        return args, dict(read["tokenizer"])
    except FileNotFoundError:
        raise ValueError(f"{params} is missing: {CONVERT}") from None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"cannot use {params} ({first_line(error)}): {CONVERT}") from error


def check_args(args: ModelArgs) -> None:
    """Raises ValueError for a shape that no model has: of wrong types, too large, or of parts that do not fit."""
    vision = args.vision
    check_numbers(vars(args), args.n_layer)
    section, head = args.mrope_section, args.head_dim
    require(args.n_head % args.n_kv_head == 0 and head % 2 == 0, "n_kv_head or head_dim", args)
    require(args.n_tokens <= args.vocab_size, "n_tokens", args)
    require(is_number(args.norm_eps, 0, 1) and is_number(args.rope_base, 1e-3, 1e12), "norm_eps or rope_base", args)
    require(type(args.qkv_bias) is bool and type(args.tie_embeddings) is bool, "qkv_bias or tie_embeddings", args)
    require(section is None or is_list(section, 1024) and len(section) == 3 and 2 * sum(section) == head, "mrope", args)
    require(args.rope_scaling is None or is_scaling(args.rope_scaling), "rope_scaling", args)
    image = args.image_token_id
    require(image is None or is_list([image], args.vocab_size + args.n_input_only), "image_token_id", args)
    if vision is None:
        return
    require(isinstance(vision, dict) and isinstance(vision.get("type"), str), "vision", args)
    names = VISION.get(vision["type"], "of another type").split()
    require(vision.keys() == {"type", *names}, "vision", vision)
    check_numbers(vision, vision["depth"])
    quarter = 4 if vision["type"] == "qwen2_5_vl" else 1  # rotary positions of two axes
    require(vision["dim"] % (vision["n_head"] * quarter) == 0 and vision["out_dim"] == args.dim, "dim", vision)
    if "tile" in vision:
        require(vision["tile"] >= vision["patch"], "tile or patch", vision)
        require(is_grid(vision.get("resolutions", [[vision["tile"]] * 2]), vision["tile"]), "resolutions", vision)
    else:
        side = vision["patch"] * vision["merge"]
        require(vision["window"] >= side and vision["max_pixels"] >= side**2, "window or max_pixels", vision)


def require(holds: bool, what: str, where: ModelArgs | dict) -> None:
    if not holds:
        raise ValueError(f"no model has such {what}: {str(where)[:200]}")


def check_numbers(values: dict, n_layer: object) -> None:
    """Of the decoder or of `vision`, which have n_layer layers, those that LIMITS names, and lists of layers."""
    for name, value in values.items():
        least, most = LIMITS.get(name, (0, 0))
        if most and not (type(value) is int and least <= value <= most):
            raise ValueError(f"{name} is {str(value)[:40]}, not a whole number from {least} to {most}")
        if name in ("full_layers", "keep", "cross_attention_layers"):
            in_order = type(n_layer) is int and is_list(value, n_layer) and sorted({*value}) == [*value]
            if not in_order:
                raise ValueError(f"{name} is {str(value)[:40]}, not a list of layers in their order")


def is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and least <= value <= most  # NaN is not


def is_list(value: object, most: int) -> bool:
    """Whole numbers below most."""
    return isinstance(value, list | tuple) and all(type(i) is int and 0 <= i < most for i in value)


def is_scaling(value: object) -> bool:
    """What inverse_frequencies takes."""
    llama3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    yarn = {"factor", "first", "last", "attention_factor"}
    return (
        isinstance(value, dict)
        and value.keys() in ({"factor"}, llama3, yarn)
        and all(is_number(number, 0, 1e9) for number in value.values())
    )


def is_grid(value: object, tile: int) -> bool:
    """Pairs of sides of a canvas, of whole tiles, twelve at most."""
    pairs = value if isinstance(value, list | tuple) and len(value) <= 1000 else []
    right = lambda pair: is_list(pair, 12 * tile + 1) and len(pair) == 2 and all(n and n % tile == 0 for n in pair)
    return bool(pairs) and all(map(right, pairs))


def load_mapped(path: Path) -> dict[str, Tensor]:
    """The tensors stay in the file until they are used, and in memory as long as the mapping lives."""
    try:
        state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}; {CONVERT}") from None
    except Exception as error:  # the unpickler and the zip reader share no class of errors
        raise ValueError(f"cannot read {path} ({first_line(error)}): {CONVERT}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} does not hold tensors by name: {CONVERT}")
    return state


def write_checkpoint(path: Path, shapes: dict[str, tuple], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a state dict that is never in memory as a whole: first its outline, then tensor after tensor.

    shapes: name -> (shape, dtype). The file appears under its name when it is complete. Raises OSError (disk full).
    """
    n_bytes = sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for shape, dtype in shapes.values())
    check_space(path.parent, n_bytes)  # before memory is asked for
    outline = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}  # never touched
    with replacing(path) as part:
        try:
            with torch.serialization.skip_data():
                torch.save(outline, part)
        except RuntimeError:  # how the zip writer says that a write failed: not which, nor why
            raise OSError(f"cannot write {path.parent}: the disk is full, or the folder cannot be written to") from None
        reserve_space(part)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(part, mmap=True, weights_only=True)
        for name, tensor in show_progress(path.name, tensors, n_bytes):
            mapped[name].copy_(tensor)
        del mapped


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, which appears under its name when it is complete."""
    with replacing(path) as part:
        part.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the name path when it is complete. After an error nothing is left."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def stamp(file: Path | int) -> tuple[int, int, int]:
    """Of a path, or of a descriptor: another one after the file was replaced (a path only) or written to."""
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def watch(path: Path) -> Callable[[], None]:
    """A function that raises ValueError once the file, which may be mapped, was written to.

    A file that takes its name does not matter: the mapped one lives on.
    """
    file = path.open("rb")
    before = stamp(file.fileno())

    def check() -> None:
        if stamp(file.fileno()) != before:
            raise ValueError(f"{path} was written to while it was in use: start again")

    return check


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises OSError, one line, if the disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB of free space, {n_bytes / 1e9:.1f} GB are needed")


def show_progress(label: str, tensors: Iterable[tuple[str, Tensor]], n_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors; a bar on stderr, if that is a terminal, shows bytes, their rate, and the time that is left."""
    try:
        from huggingface_hub.utils import tqdm
    except ImportError:  # only downloads cannot do without it
        yield from tensors
        return
    with tqdm(desc=label, total=n_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.nbytes)


def reserve_space(path: Path) -> None:
    """A full disk must be an error here, not a bus error in the mapped file."""
    size = path.stat().st_size
    try:
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise OSError(f"cannot write {path.parent}, {size / 1e9:.1f} GB are needed: {error.strerror}") from None
