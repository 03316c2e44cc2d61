"""Compiled and eager must say the same, with a draft and pruning too, and one set of graphs must serve all prompts."""

import pytest
import torch

import generate
from tests.conftest import draw
from vision import Pruning

SIZES = [(200, 150), (100, 300), (56, 56)]


@pytest.mark.parametrize("prefill", [False, True])
def test_compiled_equals_eager(pair, prefill):
    target, other = pair("qwen2.5-vl"), pair("qwen2.5-vl:other")
    answers = []
    for compiled in (False, True):
        engine, tokenizer = generate.load(target.path, "cpu", torch.float32)
        engine.draft = generate.load(other.path, "cpu", torch.float32)[0]
        engine.draft.pruning = Pruning("structured", 0.5)
        for each in (engine, engine.draft):
            each.model.setup_caches(512)
            if compiled:
                generate.compile_step(each)
            if compiled and prefill:
                generate.compile_prefill(each)
        parts = [{"type": "image"}, {"type": "text", "text": "How many circles are there?"}]
        tokens = tokenizer.encode_chat([{"role": "user", "content": parts}])
        for size in SIZES:
            engine.forget()
            answers.append(generate.generate(engine, tokens, [draw(*size)], 20)["token_ids"])
        if compiled:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            engine.forget()
            generate.generate(engine, tokens, [draw(150, 220)], 17)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "a new prompt compiles nothing"
    assert answers[: len(SIZES)] == answers[len(SIZES) :]
