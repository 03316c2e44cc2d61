"""Converted tiny checkpoints, made once a session, and pictures of every kind that users have."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would cost more than they save

import pytest
import torch
from PIL import Image, ImageDraw

import generate
from scripts.convert_hf_checkpoint import convert
from tests.helpers import hub

torch.set_num_threads(1)  # the models are too small to share

LLAMA31 = {"rope_theta": 500000.0, "rope_scaling": hub.SCALING}
HEAD_DIM = {"head_dim": 24, "rope_theta": 1e6}  # wider than hidden_size / heads; CodeLlama's base
MAKERS = {
    "llama2": lambda folder, seed: hub.make_llama2(folder, "sharded.bin", seed),
    "llama3.1": lambda folder, seed: hub.make_llama(folder, LLAMA31, "sharded.safetensors", seed),
    "llama3.2": lambda folder, seed: hub.make_llama(folder, LLAMA31 | {"tie_word_embeddings": True}, seed=seed),
    "llama-head-dim": lambda folder, seed: hub.make_llama(folder, HEAD_DIM, "single.bin", seed),
    "qwen2": lambda folder, seed: hub.make_qwen_text(folder, tied=False, seed=seed),
    "qwen2.5-tied": lambda folder, seed: hub.make_qwen_text(folder, tied=True, seed=seed),
    "qwen2.5-vl": lambda folder, seed: hub.make_qwen_vl(folder, tied=True, seed=seed),
    "qwen2.5-vl-untied": lambda folder, seed: hub.make_qwen_vl(folder, tied=False, seed=seed),
    "llava-hf": lambda folder, seed: hub.make_llava_hf(folder, tied=False, seed=seed),
    "llava-hf-tied": lambda folder, seed: hub.make_llava_hf(folder, tied=True, seed=seed),
    "llava-lmms": lambda folder, seed: hub.make_llava_lmms(folder, tied=False, seed=seed),
    "llava-lmms-tied": lambda folder, seed: hub.make_llava_lmms(folder, tied=True, seed=seed),
    "llava-384": lambda folder, seed: hub.make_llava_hf(folder, tied=True, tile=384, tall=6, wide=6, seed=seed),
    "llama-3.2-vision": lambda folder, seed: hub.make_llama_vision(folder, seed=seed),
}


class Pair:
    """A checkpoint of ours and the transformers model that it was made of."""

    def __init__(self, folder: Path, reference: torch.nn.Module):
        self.folder, self.reference = folder, reference
        self.path = folder / "model.pth"
        self.engine, self.tokenizer = generate.load(self.path, "cpu", torch.float32)
        self.model, self.encoder = self.engine.model, self.engine.encoder


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


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with smooth areas, edges and fine detail."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    image = Image.frombytes("RGB", (width, height), bytes(noise.flatten().tolist()))
    image = Image.blend(image, Image.linear_gradient("L").resize(image.size).convert("RGB"), 0.7)
    ImageDraw.Draw(image).ellipse((width * 0.2, height * 0.1, width * 0.7, height * 0.8), fill=(200, 30, 40 + seed))
    return image


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
