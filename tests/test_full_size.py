"""Real dimensions with random weights in bfloat16: one small picture and 16 tokens. Slow and large: FULL_SIZE=1 asks.

Models of up to about 20 GB run completely. Of the others a few layers run, with the complete encoder: every layer of a
decoder has the same shapes, and tests/test_published.py compares all of them with transformers on the meta device.
"""

import os
from dataclasses import replace

import pytest
import torch

from generate import generate
from scripts.benchmark import make_prompt, random_engine
from scripts.published_models import named

WHOLE = None
N_LAYER = {
    "Llama-3.1-8B": WHOLE,
    "llava-onevision-qwen2-0.5b-si": WHOLE,
    "Qwen2.5-VL-3B-Instruct": WHOLE,
    "Qwen2.5-VL-7B-Instruct": WHOLE,
    "llava-onevision-qwen2-7b-si": WHOLE,
    "Llama-3.2-11B-Vision": 10,
    "Qwen2.5-VL-72B-Instruct": 2,
    "llava-onevision-qwen2-72b-si": 2,
    "Llama-3.2-90B-Vision": 4,
}


@pytest.mark.skipif("FULL_SIZE" not in os.environ, reason="FULL_SIZE is not set: needs 20 GB and minutes")
@pytest.mark.parametrize("name", N_LAYER)
@torch.inference_mode()
def test_forward_at_full_size(name):
    args = named(name)
    if layers := N_LAYER[name]:
        cross = tuple(i for i in args.cross_attention_layers if i < layers)
        args = replace(args, n_layer=layers, cross_attention_layers=cross)
    torch.set_num_threads(os.cpu_count())
    engine = random_engine(args, "cpu", torch.bfloat16)
    tokens, images = make_prompt(args, 8, 112)
    result = generate(engine, tokens, images, 16)
    assert len(result["token_ids"]) == 16
    logits = engine.model(torch.tensor([1]), torch.tensor([len(engine.cached.keys)]))
    assert logits.isfinite().all()
    assert bool(args.vision) == bool(result["n_visual_tokens"])
