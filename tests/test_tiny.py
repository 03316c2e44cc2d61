"""The tiny models that ship: what they were trained for, through this repository's own code."""

import json
import subprocess
import sys
import time
from pathlib import Path

from cli import DEFAULT_CHECKPOINT, DEFAULT_DRAFT

import pytest
import torch

from generate import DEFAULT_IMAGE, generate, load
from quantize import quantize_in_place
from scripts.tasks.scenes import held_out_questions

ROOT = Path(__file__).resolve().parent.parent
N_QUESTIONS = 500
OTHERS = {  # of 100 held-out questions, the least number of right answers
    "tiny-llava-onevision": 80,
    "tiny-llava-onevision-draft": 55,
    "tiny-llama-3.2-vision": 80,
    "tiny-llama-3.2-vision-draft": 55,
}


def ask(engine, tokenizer, text: str, image) -> str:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    tokens = tokenizer.encode_chat([{"role": "user", "content": content}])
    engine.forget()
    return tokenizer.decode(generate(engine, tokens, [image], 48, tokenizer.stop_ids)["token_ids"])


@pytest.mark.parametrize("path, least", [(DEFAULT_CHECKPOINT, 0.9), (DEFAULT_DRAFT, 0.5)], ids=["target", "draft"])
def test_held_out_questions(path, least, capsys):
    """Exact match on scenes that no training has seen, in the default dtype."""
    engine, tokenizer = load(path)
    questions = list(held_out_questions(N_QUESTIONS))
    right = sum(ask(engine, tokenizer, q.prompt, scene.image) == q.reply for scene, q in questions)
    with capsys.disabled():
        print(f"\n{path.parent.name}: {right} of {N_QUESTIONS} held-out questions")
    assert right >= least * N_QUESTIONS


@pytest.mark.parametrize("name, least", OTHERS.items())
def test_other_families(name, least):
    """Fewer questions: these pairs are here to be measured with, and each has its training.json."""
    engine, tokenizer = load(ROOT / "checkpoints" / name / "model.pth")
    questions = list(held_out_questions(100))
    right = sum(ask(engine, tokenizer, q.prompt, scene.image) == q.reply for scene, q in questions)
    assert right >= least


@pytest.fixture(scope="module")
def count_right():
    """How many held-out questions a model in a format answers right; each is asked once."""
    known = {}

    def count(path: Path, mode: str | None, group: int = 128) -> int:
        if (path, mode, group) not in known:
            engine, tokenizer = load(path, optimize=mode is None)
            if mode:
                quantize_in_place(engine.model, mode, group, torch.bfloat16)
            questions = held_out_questions(N_QUESTIONS)
            known[path, mode, group] = sum(ask(engine, tokenizer, q.prompt, s.image) == q.reply for s, q in questions)
        return known[path, mode, group]

    return count


@pytest.mark.parametrize("mode, group, points", [("int8", 128, 1), ("fp8", 128, 3), ("int4", 32, 3), ("int4", 128, 3)])
def test_quantized_held_out_questions(count_right, mode, group, points, capsys):
    """Small weights cost no more than so many points of the target's accuracy."""
    found, whole = count_right(DEFAULT_CHECKPOINT, mode, group), count_right(DEFAULT_CHECKPOINT, None)
    with capsys.disabled():
        print(f"\n{mode} (groups of {group}): {found} of {N_QUESTIONS} held-out questions, bfloat16: {whole}")
    assert found >= whole - points / 100 * N_QUESTIONS


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
    assert "accepted" in done.stderr
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
