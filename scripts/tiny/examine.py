"""How well a tiny model answers questions about scenes that it has never seen, by transformers alone.

Knows files of Hugging Face checkpoints and the corpus. Does not know training nor the repository's own model.
"""

from collections import defaultdict
from pathlib import Path

import torch
import transformers
from PIL import Image

from scripts.tasks.scenes import held_out_questions
from scripts.tiny.family import Family


@torch.no_grad()
def examine(family: Family, hub_dir: Path, n_questions: int) -> dict[str, dict]:
    """Exact match of greedy answers to held-out questions, from the files in hub_dir.

    Returns kind -> {"right", "asked"}; "total", "open" and "multiple choice" are kinds too.
    """
    model = family.load(hub_dir).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub_dir)
    processor = family.processor_class.from_pretrained(hub_dir)
    score = defaultdict(lambda: {"right": 0, "asked": 0})
    for scene, question in held_out_questions(n_questions):
        inputs = model_inputs(family, tokenizer, processor, scene.image, question.prompt, question.reply)
        reply = tokenizer(question.reply + family.end_of_turn, add_special_tokens=False).input_ids
        likely = model(**inputs).logits[0, -len(reply) - 1 : -1].argmax(-1).tolist()
        for kind in ("total", question.kind, "multiple choice" if question.options else "open"):
            score[kind]["asked"] += 1
            score[kind]["right"] += likely == reply  # then the greedy answer is the reply
    return dict(score)


def model_inputs(family: Family, tokenizer, processor, image: Image.Image, prompt: str, reply: str | None) -> dict:
    """What a model takes for a prompt about an image, with the reply and its end behind it if there is one."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace(family.image_token, family.image_token * family.n_image_tokens(image.size))
    text += "" if reply is None else reply + family.end_of_turn
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    is_image = ids == tokenizer.convert_tokens_to_ids(family.image_token)
    return {"input_ids": ids, **family.stock_inputs(processor, image, is_image)}


def report(family: Family, hub_dir: Path, n_questions: int) -> dict:
    """Examines a model, prints a line a kind of question, returns kind -> {"asked", "exact_match"}."""
    score = examine(family, hub_dir, n_questions)
    held_out = {
        kind: {"asked": n["asked"], "exact_match": round(n["right"] / n["asked"], 3)} for kind, n in score.items()
    }
    for kind, n in sorted(held_out.items()):
        print(f"{hub_dir.parent.name:24} {kind:16} {n['exact_match']:6.1%} of {n['asked']}")
    return held_out
