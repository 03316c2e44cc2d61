"""Converted tiny checkpoints, made once a session, and pictures of every kind that users have."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would cost more than they save

import pytest
import torch
from PIL import Image

from scripts.convert_hf_checkpoint import convert
from tests.helpers import device
from tests.helpers.checkpoints import MAKERS, Pair
from tests.helpers.pictures import draw

torch.set_num_threads(1)  # the models are too small to share


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where models run that are compared with transformers on the CPU")
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="mutated inputs of tests/test_fuzz.py (2000)")


def pytest_configure(config):
    device.name = config.getoption("--device")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    made = {}

    def get(name: str) -> Pair:
        if name not in made:
            family, _, other = name.partition(":")  # "qwen2:other": the same shape, other weights
            folder, reference = MAKERS[family](tmp_path_factory.mktemp("hub") / family, seed=1 if other else 0)
            convert(folder)
            made[name] = Pair(folder, reference)
        made[name].engine.forget()
        return made[name]

    return get


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    sizes = {"square": (224, 224), "wide": (500, 120), "tall": (90, 420), "small": (30, 30), "large": (1500, 1100)}
    paths = {}
    for name, size in sizes.items():
        paths[name] = folder / f"{name}.png"
        draw(*size).save(paths[name])
    base = draw(200, 150)
    paths["grey"], paths["palette"] = folder / "grey.png", folder / "palette.png"
    base.convert("L").save(paths["grey"])
    base.quantize(32).save(paths["palette"])
    transparent = base.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(base.size))
    paths["rgba"] = folder / "rgba.png"
    transparent.save(paths["rgba"])
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to the right
    paths["exif"] = folder / "exif.png"
    base.save(paths["exif"], exif=exif)
    return paths
