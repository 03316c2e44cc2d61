"""The benchmarks by name: the source of their questions, their prompts, and the scoring of answers.

Knows files, Hugging Face, and the embedded benchmark, whose pictures scenes.py draws. Does not know models, timing or
results. A question is a dict with "id", "group" (its subject, for a table) and what its benchmark needs.
"""

import argparse
import gzip
import json
import sys
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from scripts.tasks import human_eval, mmmu, scenes

Question = dict


@dataclass(frozen=True)
class Benchmark:
    load: Callable[[argparse.Namespace], list[Question]]
    ask: Callable[[Question], list]  # the user's turns, text or parts; ValueError for a question that cannot be asked
    score: Callable[[Question, list[str], Random], dict] | None = None  # question, replies: "correct" and more
    max_new_tokens: int = 512  # without the flag
    has_images: bool = False
    executes_code: bool = False
    kept: tuple[str, ...] = ()  # fields of a question that its results line repeats


def load_scenes(args: argparse.Namespace) -> list[Question]:
    """Questions about pictures that are drawn here. Seven of ten ask for a description or a list: a longer answer."""
    return [
        {"id": f"scene_{i}", "image": scene.image, "group": asked.kind, "prompt": asked.prompt, "answer": asked.reply}
        for i, (scene, asked) in enumerate(scenes.held_out_questions(args.num_questions or 200))
    ]


def ask_scene(question: Question) -> list[list[dict]]:
    image = {"type": "image", "path": question["id"], "image": question["image"]}
    return [[image, {"type": "text", "text": question["prompt"]}]]


def score_scene(question: Question, replies: list[str], rng: Random) -> dict:
    """A reply is right if it equals the answer up to case, white space and a full stop."""
    given, right = (" ".join(text.lower().split()).removesuffix(".") for text in (replies[0], question["answer"]))
    return {"correct": given == right}


def load_mmmu(args: argparse.Namespace) -> list[Question]:
    if unknown := set(args.subjects or ()) - set(mmmu.SUBJECTS):
        raise ValueError(f"no subject of MMMU: {' '.join(sorted(unknown))}; known are {' '.join(mmmu.SUBJECTS)}")
    subjects = args.subjects or mmmu.SUBJECTS
    folder = find_data(args, mmmu.HUB_REPO, [f"{subject}/{args.split}-*.parquet" for subject in subjects])
    if not args.subjects:
        subjects = [subject for subject in subjects if list((folder / subject).glob(f"{args.split}-*.parquet"))]
    if not subjects:
        raise ValueError(f"{folder} holds no file such as {mmmu.SUBJECTS[0]}/{args.split}-00000-of-00001.parquet")
    if not args.subjects and (missing := len(mmmu.SUBJECTS) - len(subjects)):
        print(f"{len(subjects)} of MMMU's subjects; {missing} are not in {folder}", file=sys.stderr)
    questions = mmmu.load(folder, subjects, args.split)
    return mmmu.spread(questions, min(args.num_questions or len(questions), len(questions)))


def load_mt_bench(args: argparse.Namespace) -> list[Question]:
    names = ["raw/question.jsonl", "question.jsonl", "mt_bench_question.jsonl"]
    rows = read_jsonl(find_file(args, "HuggingFaceH4/mt_bench_prompts", names, hub_file=names[0]))
    ids = [str(row.get("question_id", f"line {i}")) for i, row in enumerate(rows, 1)]
    questions = [{"id": i, "group": str(row.get("category")), "turns": row.get("turns")} for i, row in zip(ids, rows)]
    return questions[: args.num_questions]


def ask_mt_bench(question: Question) -> list[str]:
    turns = question["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(text, str) and text.strip() for text in turns):
        raise ValueError("turns must be a list of texts")
    return turns


def load_human_eval(args: argparse.Namespace) -> list[Question]:
    path = find_file(args, human_eval.HUB_REPO, human_eval.FILES, human_eval.HUB_FILE)
    rows = mmmu.read_parquet(path, human_eval.FIELDS) if path.suffix == ".parquet" else read_jsonl(path)
    return [human_eval.prepare(row, i) for i, row in enumerate(rows, 1)][: args.num_questions]


BENCHMARKS = {
    "scenes": Benchmark(load_scenes, ask_scene, score_scene, max_new_tokens=64, has_images=True, kept=("answer",)),
    "MMMU": Benchmark(
        load_mmmu,
        mmmu.ask,
        mmmu.score,
        max_new_tokens=128,
        has_images=True,
        kept=("discipline", "question_type", "answer", "all_choices", "index2ans"),
    ),
    "mt_bench": Benchmark(load_mt_bench, ask_mt_bench, max_new_tokens=1024),
    "human_eval": Benchmark(load_human_eval, human_eval.ask, human_eval.score, executes_code=True),
}


def find_data(args: argparse.Namespace, repo: str, patterns: list[str]) -> Path:
    """The folder of a benchmark's files: --data_dir, or a download. ValueError, one line, if there is none."""
    if args.data_dir:
        if not args.data_dir.is_dir():
            raise ValueError(f"--data_dir {args.data_dir} is not a folder")
        return args.data_dir
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # errors of network, server and disk have no common class
        reason = textwrap.shorten(str(error), 160, placeholder="...")
        raise ValueError(f"cannot download {repo}; --data_dir takes files on disk ({reason})") from None


def find_file(args: argparse.Namespace, repo: str, names: list[str], hub_file: str) -> Path:
    folder = find_data(args, repo, [hub_file])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds none of {', '.join(names)}")


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, gzipped or not. Raises ValueError, one line, for anything else."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a file of JSON objects, one a line")
    return rows
