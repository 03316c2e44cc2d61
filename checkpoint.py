"""A converted checkpoint's folder: model.pth, mapped or written tensor by tensor, and params.json beside it.

Knows files. Does not know what the tensors are for, how they are quantized, or how they get into modules.
"""

import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import ModelArgs

CONVERT = "convert it (again) with scripts/convert_hf_checkpoint.py"


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def read_params(path: Path) -> tuple[ModelArgs, dict]:
    """The shape and the tokenizer settings of a checkpoint, from params.json beside it. Raises ValueError, one line."""
    params = path.with_name("params.json")
    try:
        read = json.loads(params.read_text())
        return ModelArgs(**read["model"]), dict(read["tokenizer"])
    except FileNotFoundError:
        raise ValueError(f"{params} is missing: {CONVERT}") from None
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"cannot use {params} ({first_line(error)}): {CONVERT}") from error


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
    part = path.with_name(path.name + ".part")
    outline = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}  # never touched
    n_bytes = sum(tensor.nbytes for tensor in outline.values())
    check_space(path.parent, n_bytes)
    try:
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
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises OSError, one line, if the disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB of free space, {n_bytes / 1e9:.1f} GB are needed")


def show_progress(label: str, tensors: Iterable[tuple[str, Tensor]], n_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors; a bar on stderr, if that is a terminal, shows bytes, their rate, and the time that is left."""
    from huggingface_hub.utils import tqdm  # only who writes a checkpoint needs it

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
