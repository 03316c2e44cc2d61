"""Made-up benchmark files in the official formats, and an engine that answers from a script."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import cli

import torch
from PIL import Image

import evaluate
from generate import Draft
from tp import OneProcess
from vision import Pruning

SUBJECTS = ["Accounting", "Art_Theory", "Math"]  # of Business, Art and Design, Science
EXPLANATION = "The explanation, which nobody may see."
N_IMAGES = 7


def read_summary(out: str) -> dict:
    """The last line of evaluate.py's stdout, with the first variant's figures at its top too, for short."""
    summary = json.loads(out.splitlines()[-1])
    return summary | next(iter(summary["variants"].values()))


def png(color: tuple[int, int, int], size: tuple[int, int] = (56, 56)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def color_of(number: int) -> tuple[int, int, int]:
    """What image_NUMBER is painted with."""
    return (30 * number, 255 - 30 * number, 10)


def make_item(subject: str, i: int, question: str, options: list[str], answer: str, images: int = 1) -> dict:
    """A row of MMMU's parquet files: lists are texts, images are structs."""
    row = {
        "id": f"validation_{subject}_{i}",
        "question": question,
        "options": repr(options),
        "explanation": EXPLANATION,
        "img_type": "['Plots and Charts']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if options else "open",
        "subfield": "Made up",
    }
    for number in range(1, N_IMAGES + 1):
        data = {"bytes": png(color_of(number)), "path": f"{row['id']}_{number}.png"}
        row[f"image_{number}"] = data if number <= images else None
    return row


def make_subject(subject: str) -> list[dict]:
    """Ten items: what MMMU's questions have in them."""
    items = [
        ("What is in <image 1>?", ["$1,200", "$300", "$45", "$6"], "B", 1),
        ("<image 1> What is the color?", ["red", "green"], "A", 1),
        ("Which is larger?", ["<image 1>", "<image 2>", "<image 3>"], "C", 3),
        ("Compare <image 2> with <image 1>, and <image 2> with itself.", ["same", "other"], "A", 2),
        ("See <image 1>. Which follows?", ["<image 2>", "<image 3>", "<image 1>", "none", "all"], "E", 3),
        ("How much is it? <image 1>", [], "12.5", 1),
        ("Name it: <image 1>", [], "['Red fox', 'fox']", 1),
        ("All of <image 1><image 2><image 3><image 4><image 5><image 6><image 7>", ["a", "b"], "B", 7),
        ("What is the total of <image 1>?", [], "1,234", 1),
        ("A 'quoted' option in <image 1>?", ["it's", 'a "b"', "back\\slash"], "B", 1),
    ]
    return [make_item(subject, i, *item) for i, item in enumerate(items, 1)]


def write_parquet(path: Path, rows: list[dict]) -> None:
    """In the schema of the published files."""
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    names = ["id", "question", "options", "explanation", *(f"image_{i}" for i in range(1, N_IMAGES + 1))]
    names += ["img_type", "answer", "topic_difficulty", "question_type", "subfield"]
    schema = pyarrow.schema([(name, image if name.startswith("image_") else pyarrow.string()) for name in names])
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)


def write_mmmu(folder: Path) -> Path:
    """30 items of three subjects, in folders as they are published."""
    for subject in SUBJECTS:
        write_parquet(folder / subject / "validation-00000-of-00001.parquet", make_subject(subject))
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PROBLEMS = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef add_all(x: List[int]) -> int:\n    """ The sum.\n    """\n',
        "entry_point": "add_all",
        "canonical_solution": "    return sum(x)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'def twice(x):\n    return 2 * x\n\n\ndef four_times(x):\n    """ Four times x.\n    """\n',
        "entry_point": "four_times",
        "canonical_solution": "    return twice(twice(x))\n",
        "test": "def check(candidate):\n    assert candidate(2) == 8\n",
    },
]
CONVERSATIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now another."]},
    {"question_id": 82, "category": "math", "turns": ["What is 2 + 2?", "And twice that?"]},
]


def stub_engine(draft: bool = False) -> SimpleNamespace:
    """What evaluate.py sees of an engine."""
    engine = SimpleNamespace(model=torch.nn.Linear(8, 8, bias=False), encoder=True, draft=None, ranks=OneProcess())
    engine.forget = lambda: None
    if draft:
        engine.draft = Draft(stub_engine(), Pruning("structured", 0.0), speculate_k=2)
    return engine


def stub_result(text: str, tokens_per_s: float = 100.0) -> dict:
    """A result of generate.answer(): three tokens."""
    return {
        "text": text,
        "token_ids": [1, 2, 3],
        "prompt_token_ids": [4] * 10,
        "finish_reason": "stop",
        "n_visual_tokens": 4,
        "time_to_first_token_s": 0.02,
        "encoder_s": 0.005,
        "tokens_per_s": tokens_per_s,
    }


def install_stub(monkeypatch, folder: Path, answer, draft: bool = False) -> None:
    """evaluate.py loads a checkpoint of empty files, and asks answer() in place of generate.answer()."""
    for name in ("model.pth", "params.json", "tokenizer.model"):
        (folder / name).write_bytes(b"")

    def load(path, **options):
        return stub_engine(draft), SimpleNamespace(chat_template="...", stop_ids=frozenset())

    monkeypatch.setattr(evaluate, "measure_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(cli, "DEFAULT_CHECKPOINT", folder / "model.pth")
    monkeypatch.setattr(cli, "DEFAULT_DRAFT", None)
    monkeypatch.setattr(evaluate, "load", load)
    monkeypatch.setattr(evaluate, "answer", answer)
