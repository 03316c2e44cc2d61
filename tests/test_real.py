"""Real weights, if any: REAL_CHECKPOINT names the folder of a converted text model (Qwen2.5 0.5B, say)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from generate import generate, load

ROOT = Path(__file__).resolve().parent.parent
FOLDER = os.environ.get("REAL_CHECKPOINT")
NEAR_TIE = 1e-3  # logits
N_TOKENS = 64
PROMPTS = [
    "Write a Python function that reverses a linked list.",
    "Explain the difference between a list and a tuple.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Translate to French: The weather is nice today, let us go for a walk.",
    "def fibonacci(n):",
    "List five prime numbers larger than 100.",
    "用中文介绍一下快速排序算法。",
    "Write a haiku about graphics processors.",
    "SELECT name, COUNT(*) FROM orders -- what is missing in this query?",
    "If a train leaves at 9:40 and travels for 2 hours 35 minutes, when does it arrive?",
]


@pytest.mark.skipif(FOLDER is None, reason="REAL_CHECKPOINT is not set")
@torch.inference_mode()
def test_greedy_answers_equal_transformers(capsys):
    """Given our answer, the reference must choose the same token at every place, up to the first near-tie."""
    engine, tokenizer = load(Path(FOLDER) / "model.pth", dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    reference_tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    compared, ties = 0, 0
    for text in PROMPTS:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.encode_chat(messages)
        theirs = reference_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert prompt == theirs["input_ids"]
        engine.forget()
        ours = generate(engine, prompt, [], N_TOKENS, tokenizer.stop_ids)["token_ids"]
        logits = reference(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
        for token, row in zip(ours, logits):
            first, second = row.topk(2).values.tolist()
            if first - second < NEAR_TIE:
                ties += 1
                break
            assert token == row.argmax()
            compared += 1
    with capsys.disabled():
        print(f"\n{compared} tokens of {len(PROMPTS)} answers equal transformers'; {ties} answers ended at a near-tie")
    assert compared > 300


@pytest.mark.skipif(FOLDER is None, reason="REAL_CHECKPOINT is not set")
def test_perplexity_of_small_weights(tmp_path):
    """The limits that a format keeps, in percent of bfloat16's perplexity; about 20 minutes on two quiet cores."""
    limits = {"int8": 0.5, "int4.g32": 6, "int4.g128": 10}
    formats = ["none", *limits, "int4.g32.minmax", "int4.g128.minmax"]
    out = tmp_path / "perplexity.jsonl"
    flags = ["--checkpoint_path", Path(FOLDER) / "model.pth", "--dequantize", "--out", out, "--formats", *formats]
    subprocess.run([sys.executable, ROOT / "scripts" / "perplexity.py", *flags], check=True)
    found = {line["format"]: line["perplexity"] for line in map(json.loads, out.read_text().splitlines())}
    for name, limit in limits.items():
        assert 100 * (found[name] / found["none"] - 1) < limit
    for group in ("g32", "g128"):
        assert found[f"int4.{group}"] < found[f"int4.{group}.minmax"]
