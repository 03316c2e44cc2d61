"""Compiled and eager give the same tokens, with a draft and pruning too, and one set of graphs serves all prompts."""

import gc
import random

import pytest
import torch

import generate
from cpu import prepare
from quantize import quantize_in_place
from tests.helpers import device
from tests.helpers.pictures import draw
from vision import Pruning

SIZES = [(200, 150), (100, 300), (56, 56)]


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def load_pair(pair, family: str, modes=(None, None), compiled=False, prefill=False):
    """A target, its pruned draft and the tokenizer, as generate.load() prepares them."""
    torch._dynamo.reset()
    paths = [pair(name).path for name in family]
    options = {"draft": paths[1], "pruning": Pruning("structured", 0.5), "optimize": False}  # layers to be quantized
    engine, tokenizer = generate.load(paths[0], device=device.name, dtype=torch.float32, **options)
    draft = engine.draft.engine
    for each, mode in zip((engine, draft), modes):
        if mode:
            quantize_in_place(each.model, mode, 32, torch.float32)
        prepare(each.model)
        each.model.setup_caches(512, 300 if each.model.args.cross_attention_layers else 0)
        if compiled:
            generate.compile_steps(each)
        if prefill:
            generate.compile_layers(each)
    return engine, tokenizer


def ask(engine, tokenizer, size=None, n: int = 20, text: str = "How many circles are there?") -> dict:
    parts = [{"type": "image"}] * bool(size) + [{"type": "text", "text": text}]
    tokens = tokenizer.encode_chat([{"role": "user", "content": parts}])
    engine.forget()
    return generate.generate(engine, tokens, [draw(*size)] if size else [], n, draft=engine.draft)


# Family of the target and of the draft, and how their weights are quantized.
CASES = {
    "whole": (("qwen2.5-vl", "qwen2.5-vl:other"), (None, None)),
    "qwen2.5-vl": (("qwen2.5-vl", "qwen2.5-vl:other"), ("int8", "int4")),
    "llava": (("llava-hf", "llava-hf:other"), ("int4", "int8")),
    "llama-3.2-vision": (("llama-3.2-vision", "llama-3.2-vision:other"), ("int8", "int4")),
    "text": (("qwen2", "qwen2:other"), ("int4", "int8")),
    "llama": (("llama3.1", "llama3.1:other"), (None, "int8")),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(pair, case):
    family, modes = CASES[case]
    sizes = SIZES if pair(family[0]).encoder else [None]
    eager = load_pair(pair, family, modes)
    expected = [ask(*eager, size)["token_ids"] for size in sizes]
    compiled = load_pair(pair, family, modes, compiled=True)
    assert [ask(*compiled, size)["token_ids"] for size in sizes] == expected
    graphs = n_graphs()
    ask(*compiled, sizes[0] and (150, 220), 17)
    assert n_graphs() == graphs, "a new prompt compiles nothing"


def living_bytes() -> int:
    gc.collect()
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor}
    return sum(tensors.values())


def test_20_prompts_after_warm_up(pair):
    """Other lengths, other picture sizes, across several numbers of slots that are read; prefill is compiled too."""
    family = ("qwen2.5-vl", "qwen2.5-vl:other")
    words, shuffled = "How many red circles and how many blue squares are there? ", random.Random(0)

    def warm_up(engine, tokenizer) -> list[list[int]]:
        # The encoder's graphs: one window of attention or several, full or not.
        sizes = [(56, 84), (112, 112), (224, 224), (200, 150)]
        return [ask(engine, tokenizer, size, 20, words * 2 * i)["token_ids"] for i, size in enumerate(sizes, 1)]

    expected = warm_up(*load_pair(pair, family))
    engine, tokenizer = load_pair(pair, family, compiled=True, prefill=True)
    assert warm_up(engine, tokenizer) == expected
    graphs, size = n_graphs(), living_bytes()
    n_prompts = set()
    for _ in range(20):
        picture = (shuffled.randint(28, 250), shuffled.randint(28, 250))
        result = ask(engine, tokenizer, picture, shuffled.randint(5, 20), words * shuffled.randint(1, 8))
        n_prompts.add(len(result["prompt_token_ids"]))
    assert n_graphs() == graphs
    engine.forget()
    assert living_bytes() <= 1.02 * size
    assert min(n_prompts) < 128 and max(n_prompts) > 256 and len(n_prompts) > 10
    assert engine.model.cached.n_slots == 512, "all fitted into one cache"
