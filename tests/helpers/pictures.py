"""Pictures of every kind that users have, and how transformers sees them."""

import pytest
import torch
import transformers
from PIL import Image, ImageDraw, ImageOps

KINDS = ["square", "wide", "tall", "small", "large", "grey", "palette", "rgba", "exif"]  # of the fixture `pictures`


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with smooth areas, edges and fine detail."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    image = Image.frombytes("RGB", (width, height), bytes(noise.flatten().tolist()))
    image = Image.blend(image, Image.linear_gradient("L").resize(image.size).convert("RGB"), 0.7)
    ImageDraw.Draw(image).ellipse((width * 0.2, height * 0.1, width * 0.7, height * 0.8), fill=(200, 30, 40 + seed))
    return image


def reference_picture(path) -> Image.Image:
    """The image as transformers loads it: load_image applies the EXIF orientation, the processor converts to RGB."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "RGBA" and transformers.__version__ < "5.23":
        pytest.skip("this transformers drops alpha; the current one composites onto white, as we do")
    return image
