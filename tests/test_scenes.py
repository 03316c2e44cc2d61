"""The scenes that the tiny models learn and are examined on: scripts/tasks/scenes.py."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from scripts.tasks.scenes import (
    CAPTION_PROMPTS,
    HELD_OUT_SEED,
    SIZES,
    held_out_questions,
    make_scene,
)
from tokenizer import Tokenizer

SCENES = [make_scene(seed) for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 300)]
QUESTIONS = [question for scene in SCENES for question in scene.questions]
TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny-qwen2.5-vl"


@pytest.mark.parametrize("seed", [0, 1, 2, 3, HELD_OUT_SEED + 7])
def test_a_seed_always_gives_the_same_scene(seed):
    first, second = make_scene(seed), make_scene(seed)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.caption, first.questions) == (second.caption, second.questions)


def test_scenes_come_in_all_kinds_and_sizes():
    assert {scene.kind for scene in SCENES} == {"shapes", "text", "bars"}
    assert {scene.image.size for scene in SCENES} == set(SIZES)
    assert all(side % 28 == 0 for size in SIZES for side in size)
    assert all(max(size) > 112 for size in SIZES)  # more than one window of the encoder


def test_regions_lie_in_the_image_and_say_what_the_caption_says():
    for scene in SCENES:
        width, height = scene.image.size
        for (left, top, right, bottom), words in scene.regions:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert all(word in scene.caption for word in words[:2])


def test_long_answers_have_15_to_63_tokens():
    """No more than evaluate.py lets a model say about a scene; most have 20 and more."""
    counts = [count_tokens(question.answer) for scene in SCENES for question in scene.long_questions]
    assert 15 <= min(counts) and max(counts) <= 63
    assert sum(count >= 20 for count in counts) > 0.85 * len(counts)


def test_long_answers_name_everything_in_the_scene():
    """Of the words [what, color, place]: lists of text say no text, descriptions of bars no place, all others all."""
    left_out = {("text", "list"): 0, ("bars", "describe"): 2}
    for scene in SCENES:
        for question in scene.long_questions:
            assert question.reply == question.answer and question.kind in ("describe", "list")
            for _, words in scene.regions:
                named = [word for i, word in enumerate(words) if i != left_out.get((scene.kind, question.kind))]
                assert len(named) >= 2 and all(word in question.answer for word in named)
        assert scene.long_questions[0].answer == scene.caption


def test_two_thirds_of_the_held_out_questions_have_long_answers():
    kinds = Counter(question.kind for _, question in held_out_questions(600))
    assert 350 < kinds["describe"] + kinds["list"] < 450 and kinds["list"] > 100


def count_tokens(text: str) -> int:
    if not (TINY / "tokenizer.model").exists():
        return len(re.findall(r" (?=\d)|\d|[a-z]+|[.,:]", text, re.IGNORECASE))  # how the tokenizer splits, about
    settings = json.loads((TINY / "params.json").read_text())["tokenizer"]
    return len(Tokenizer(TINY / "tokenizer.model", settings).encode(text))


def test_questions_have_answers():
    assert all(scene.questions for scene in SCENES)
    assert all(question.text and question.reply for question in QUESTIONS)
    assert {question.kind for question in QUESTIONS} == {"what", "color", "count", "where", "read", "bar"}
    assert all(scene.long_questions[0].text == CAPTION_PROMPTS[0] for scene in SCENES)


def test_options_hold_the_answer_once():
    chosen = [question for question in QUESTIONS if question.options]
    assert 0.1 < len(chosen) / len(QUESTIONS) < 0.5
    assert all(len(set(q.options)) == len(q.options) and q.options.count(q.answer) == 1 for q in chosen)
    letters = Counter(question.reply for question in chosen if len(question.options) == 4)
    assert set(letters) == set("ABCD") and min(letters.values()) > sum(letters.values()) / 6


def test_the_letter_stands_in_front_of_the_answer():
    question = next(question for question in QUESTIONS if question.options)
    assert f"({question.reply}) {question.answer}\n" in question.prompt
    assert question.prompt.endswith("\n\nAnswer with the option's letter from the given choices directly.")


def test_open_questions_are_asked_bare():
    question = next(question for question in QUESTIONS if not question.options)
    assert question.prompt == question.text and question.reply == question.answer


def test_held_out_questions_need_the_image():
    """No single answer is right often enough to pass for knowledge."""
    asked = list(held_out_questions(500))
    assert len(asked) == 500
    replies = Counter(question.reply for _, question in asked)
    assert replies.most_common(1)[0][1] < 100
