"""The tiny random checkpoints that tests convert: a maker for each layout, and ours beside the reference.

Knows which layouts are tested. Does not know their files: tests/helpers/hub.py writes these.
"""

from pathlib import Path

import torch

import generate
from tests.helpers import device, hub

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
        self.engine, self.tokenizer = generate.load(self.path, device=device.name, dtype=torch.float32)
        self.model, self.encoder = self.engine.model, self.engine.encoder
