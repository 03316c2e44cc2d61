"""The tiny models that ship: what they were trained for, through this repository's own code."""

import json
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

from cli import DEFAULT_CHECKPOINT, DEFAULT_DRAFT

import pytest
import torch

import cpu
from generate import DEFAULT_IMAGE, generate, load, verify
from quantize import quantize_in_place
from scripts.tasks.scenes import held_out_questions

ROOT = Path(__file__).resolve().parent.parent
N_QUESTIONS = 200  # as many as in training.json, whose figures are those of transformers
OTHERS = {  # of 100 held-out questions, the least number of right answers
    "tiny-llava-onevision": 76,
    "tiny-llava-onevision-draft": 62,
    "tiny-llama-3.2-vision": 76,
    "tiny-llama-3.2-vision-draft": 66,
}


def encode(tokenizer, prompt: str) -> list[int]:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return tokenizer.encode_chat([{"role": "user", "content": content}])


@torch.inference_mode()
def answers(engine, tokenizer, image, prompt: str, reply: str) -> bool:
    """Whether the greedy answer is the reply and then stops, found out in two forward passes: prefill and verify."""
    tokens, n_tokens = tokenizer.encode(reply), engine.model.args.n_tokens
    engine.cached.fill([])  # its image features stay: the next format's engine takes them over
    built = engine.build_prompt(encode(tokenizer, prompt), [image])
    engine.reserve(built, len(tokens) + 1)
    first = engine.prefill(built)[:, :n_tokens].argmax().item()
    rest = verify(engine, torch.tensor(tokens), n_tokens).argmax(-1).tolist()
    return [first, *rest[:-1]] == tokens and rest[-1] in tokenizer.stop_ids


def count_right(engine, tokenizer, n_questions: int) -> int:
    return sum(answers(engine, tokenizer, s.image, q.prompt, q.reply) for s, q in questions(n_questions))


@cache
def questions(n: int) -> list:
    return list(held_out_questions(n))


def test_what_is_counted_is_what_is_generated():
    engine, tokenizer = load(DEFAULT_DRAFT)
    for scene, question in held_out_questions(12):
        engine.forget()
        tokens = encode(tokenizer, question.prompt)
        *ids, last = generate(engine, tokens, [scene.image], 64, tokenizer.stop_ids)["token_ids"]
        ask = partial(answers, engine, tokenizer, scene.image, question.prompt)
        assert last in tokenizer.stop_ids and ask(tokenizer.decode(ids))
        assert not ask(tokenizer.decode(ids) + ".") and not ask(tokenizer.decode(ids[:-1]) or "no")


@pytest.mark.parametrize("path, least", [(DEFAULT_CHECKPOINT, 0.9), (DEFAULT_DRAFT, 0.85)], ids=["target", "draft"])
def test_held_out_questions(path, least, capsys):
    """Exact match on scenes that no training has seen, in the default dtype."""
    right = count_right(*load(path), N_QUESTIONS)
    with capsys.disabled():
        print(f"\n{path.parent.name}: {right} of {N_QUESTIONS} held-out questions")
    assert right >= least * N_QUESTIONS


@pytest.mark.parametrize("name, least", OTHERS.items())
def test_other_families(name, least):
    """Fewer questions: these pairs are here to be measured with, and each has its training.json."""
    assert count_right(*load(ROOT / "checkpoints" / name / "model.pth"), 100) >= least


FORMATS = {("int8", 128): 1, ("fp8", 128): 3, ("int4", 32): 3, ("int4", 128): 3}


def test_quantized_held_out_questions(capsys):
    """Small weights cost no more than so many points of the target's accuracy."""
    original, tokenizer = load(DEFAULT_CHECKPOINT)
    whole = count_right(original, tokenizer, N_QUESTIONS)
    for (mode, group), points in FORMATS.items():
        engine, tokenizer = load(DEFAULT_CHECKPOINT, optimize=False)
        quantize_in_place(engine.model, mode, group, torch.bfloat16)
        cpu.prepare(engine.model)
        engine.encoded = original.encoded
        found = count_right(engine, tokenizer, N_QUESTIONS)
        with capsys.disabled():
            print(f"\n{mode} (groups of {group}): {found} of {N_QUESTIONS} held-out questions, bfloat16: {whole}")
        assert found >= whole - points / 100 * N_QUESTIONS


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-llava-onevision", "tiny-llama-3.2-vision"])
def test_shape_of_the_pairs(name):
    """The target is deep, and its draft has two layers: what a draft is for."""
    files = [ROOT / "checkpoints" / folder / "params.json" for folder in (name, f"{name}-draft")]
    assert [json.loads(file.read_text())["model"]["n_layer"] for file in files] == [12, 2]


def test_shipped_files_are_small():
    """What ships has to stay clonable: the Qwen pair at most 12 MB, all pairs less than 20."""
    pair = [DEFAULT_CHECKPOINT.parent, DEFAULT_DRAFT.parent]
    assert sum(file.stat().st_size for folder in pair for file in folder.iterdir()) <= 12e6
    assert sum(file.stat().st_size for file in (ROOT / "checkpoints").glob("tiny-*/*")) < 20e6
    assert len(list(DEFAULT_IMAGE.parent.glob("*.png"))) == 6


def test_no_arguments(tmp_path):
    """Describes a picture, within 12 seconds on two cores, in any working directory."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "generate.py"], capture_output=True, text=True, cwd=tmp_path)
    seconds = time.monotonic() - started
    assert done.returncode == 0 and len(done.stdout.split()) >= 8 and done.stdout.count("\n") == 1, done
    assert "accepted" in done.stderr and "tokens/s with the draft, " in done.stderr.splitlines()[-1]
    assert seconds < 12


def test_an_answer_on_the_command_line():
    flags = [
        "--image",
        DEFAULT_IMAGE.with_name("four-shapes.png"),
        "--prompt",
        "How many circles are there?",
        "--json",
        "--device",
        "cpu",
    ]
    done = subprocess.run([sys.executable, ROOT / "generate.py", *flags], capture_output=True, text=True)
    assert json.loads(done.stdout)["text"].isdigit()
