"""Image files: what a request names becomes an upright RGB image of 8 bits, in the size that was asked for.

Knows file formats, data URLs, bit depths, transparency, orientation, and the sizes that a request may ask for. Does not
know what an encoder makes of an image (vision.py). Nothing in a file is trusted: whatever a decoder raises is one line.
"""

import base64
import io
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from threading import Lock
from typing import IO, cast
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

from vision import Encoder, QwenEncoder

# Pillow's names. No others: its EPS plugin starts Ghostscript on the file, WMF's has Windows draw it, and so on. MPO is
# JPEG's business, APNG is PNG's, DIB a BMP without its file header.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
STRIP = 2**20  # pixels of a picture that are worked on at a time, or a row
STDERR = Lock()  # one decoder at a time has it turned off
SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # what a request may say of an image


def load_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The RGB image of a path, a data URL or an open file: EXIF orientation applied, transparency put onto white.

    An open file is closed. Raises ValueError, one line, for what is not a readable image of FORMATS.
    """
    name = str(source)[:40] + "..." if str(source).startswith("data:") else str(source)
    try:
        with silent_decoders(), open_source(source) as file:
            return to_rgb(open_picture(file))
    except FileNotFoundError:
        raise ValueError(f"no such image: {name}") from None
    except MemoryError:
        raise ValueError(f"cannot read the image {name}: it does not fit into memory") from None
    except Exception as error:  # the decoders' errors have no common class: RuntimeError, struct.error, ...
        raise ValueError(f"cannot read the image {name}: {str(error) or type(error).__name__}") from None


@contextmanager
def silent_decoders() -> Iterator[None]:
    """libtiff and libpng print to descriptor 2 what Pillow raises too, or what does not matter; Pillow itself warns."""
    with STDERR, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kept = os.dup(2)
        except OSError:  # closed: nobody hears them
            kept = None
        if kept is None:
            yield
            return
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(null)


def open_source(source: str | Path | IO[bytes]) -> IO[bytes]:
    """The bytes of an image. A request's path may name anything: reading a pipe or a device would have no end."""
    if not isinstance(source, str | Path):
        return source
    kind, _, rest = str(source).partition(":")
    if kind in ("http", "https"):
        raise ValueError("images are read from files: download it first, and give its path")
    if kind == "data":
        head, comma, data = rest.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("a data URL reads data:image/...;base64,...")
        return io.BytesIO(base64.b64decode(data))
    if kind == "file" and rest.startswith("//"):
        source = unquote(rest.removeprefix("//"))
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is not a file")
    return open(source, "rb")


def open_picture(file: IO[bytes]) -> Image.Image:
    """The picture, not decoded yet. Raises ValueError for a format that is not one of FORMATS."""
    Image.init()  # all plugins, for the name of the format that is refused
    try:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
    refused = [name for name, (_, accepts) in Image.OPEN.items() if name not in FORMATS and accepts and accepts(start)]
    problem = f"{refused[0]} is not read" if refused else "it is no picture, or a broken one"
    raise ValueError(f"{problem}; these formats are: {', '.join(FORMATS)}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, in 8 bits, on white. Of a picture that is so already there is no copy: it may be large."""
    ImageOps.exif_transpose(image, in_place=True)
    image = to_8_bits(image)
    if image.has_transparency_data:
        return in_strips(image, "RGB", put_on_white)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def in_strips(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image of that mode which change makes of strips of the image: what it needs meanwhile stays small."""
    result = Image.new(mode, image.size)
    for top, strip in strips(image):
        result.paste(change(strip), (0, top))
    return result


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    n_rows = max(STRIP // max(image.width, 1), 1)
    for top in range(0, image.height, n_rows):
        yield top, image.crop((0, top, image.width, min(top + n_rows, image.height)))


def put_on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """An image of one wide channel in grey: 65535, of floats 1, is white; what lies beyond 0 or that widens the range.

    PIL's own conversion makes white of all above 255.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    widen = lambda strip: strip.convert("I").convert("F") if image.mode.startswith("I;16") else strip.convert("F")
    found = [value for _, strip in strips(image) for value in cast(tuple[float, float], widen(strip).getextrema())]
    if not all(map(isfinite, found)):
        raise ValueError("it holds numbers that are not finite")
    low, high = min(0.0, *found), max(1.0 if image.mode == "F" else 65535.0, *found)
    scale = 255 / (high - low)
    to_grey = lambda strip: widen(strip).point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
    return in_strips(image, "L", to_grey)


def resize_as_asked(image: Image.Image, part: dict, encoder: Encoder | None) -> Image.Image:
    """The image in the size that its part of a request asks for, as qwen_vl_utils reads it: before preprocess.

    Raises ValueError for sizes that make no sense, and for encoders other than Qwen2.5-VL's.
    """
    sizes = {name: part[name] for name in SIZES if name in part}
    if not sizes:
        return image
    if not isinstance(encoder, QwenEncoder):
        raise ValueError(f"{next(iter(sizes))} of an image: only Qwen2.5-VL takes it")
    if wrong := [name for name, n in sizes.items() if type(n) is not int or n < 1]:
        raise ValueError(f"{wrong[0]} of an image must be a positive whole number, not {str(sizes[wrong[0]])[:20]}")
    height, width = sizes.get("resized_height"), sizes.get("resized_width")
    if height and width:
        return image.resize(encoder.resize_to(width, height), Image.Resampling.BICUBIC)
    if height or width:
        raise ValueError("resized_height and resized_width of an image are given together")
    least, most = sizes.get("min_pixels", encoder.min_pixels), sizes.get("max_pixels", encoder.max_pixels)
    if not least <= min(most, encoder.max_pixels):
        raise ValueError(f"min_pixels of an image is {least}, above max_pixels, {min(most, encoder.max_pixels)}")
    return image.resize(encoder.resize_to(*image.size, least, most), Image.Resampling.BICUBIC)
