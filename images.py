"""Image files: what a request names becomes an upright RGB image of 8 bits, in the size that was asked for.

Knows file formats, bit depths, transparency, orientation, and the sizes that a request may ask for. Does not know what
an encoder makes of an image (vision.py).
"""

from math import isfinite
from pathlib import Path
from typing import IO, cast

from PIL import Image, ImageOps

from vision import Encoder, QwenEncoder

SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # what a request may say of an image


def load_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The RGB image of a path or an open file: EXIF orientation applied, transparency composited onto white.

    Raises ValueError, one line, for what is not a readable image.
    """
    try:
        with Image.open(source) as file:
            image = to_8_bits(ImageOps.exif_transpose(file))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such image: {source}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL raises all of these for files that are broken in one way or another.
        raise ValueError(f"cannot read the image {source}: {error}") from None


def to_8_bits(image: Image.Image) -> Image.Image:
    """An image of one wide channel in grey: 65535, of floats 1, is white; what lies beyond 0 or that widens the range.

    PIL's own conversion makes white of all above 255.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    wide = image.convert("I").convert("F") if image.mode.startswith("I;16") else image.convert("F")
    least, most = cast(tuple[float, float], wide.getextrema())
    if not isfinite(least) or not isfinite(most):
        raise ValueError("it holds numbers that are not finite")
    low, high = min(0.0, least), max(1.0 if image.mode == "F" else 65535.0, most)
    scale = 255 / (high - low)
    grey = wide.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
    grey.info.pop("transparency", None)  # of one grey level of the wide channel
    return grey


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
