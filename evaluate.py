"""The benchmark: questions in, accuracy and speed out, from one command.

Knows what is compared with what, how an answer is timed, and how a run is written down so that it can go on. Does not
know models (generate.answer() answers), benchmarks (scripts/tasks/) or how figures add up (scripts/results.py).
"""

import argparse
import base64
import hashlib
import io
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import cli
from cli import log, number, one_line

import torch
from PIL import Image

from generate import Draft, Engine, answer, answer_options, load, reply_message, weight_bytes
from gpu import now
from images import load_image
from scripts.results import Progress, Results, accuracy, group_accuracy, print_summary, rates, summarize
from scripts.tasks import human_eval, mmmu
from scripts.tasks.questions import BENCHMARKS, Benchmark, Question
from tokenizer import Tokenizer
from tp import OneProcess, join_ranks
from vision import Pruning

THUMBNAIL = 320  # pixels, the longer side of the pictures kept for scripts/report.py
NOT_FIGURES = {"text", "token_ids", "prompt_token_ids", "tokens_per_s", "mean_accepted"}  # what a line has otherwise
NOT_SETTINGS = {"output", "resume", "streaming", "score"}  # flags that change nothing in the results
BANDWIDTH_BYTES = 1 << 29  # more than any cache holds

# ---- what is compared ----------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """One way to answer the questions."""

    name: str
    engine: Engine
    draft: Draft | None = None


def plan_variants(args: argparse.Namespace, engine: Engine) -> list[Variant]:
    """What the flags describe; with --compare the target alone first, then the draft and what is listed."""
    target, draft = Variant("target", engine), engine.draft
    drafted = [Variant(draft_name(draft), engine, draft)] if draft else []
    if args.compare is None:
        return drafted or [target]
    ratios = [item for item in args.compare if not item.endswith(".pth")]
    if not draft and (ratios or not args.compare):
        raise ValueError("--compare needs a --draft_checkpoint_path, or other weights (model.pth) to compare with")
    listed = [
        load_variant(item, args, engine.ranks) if item.endswith(".pth") else prune(item, args, engine)
        for item in args.compare
    ]
    variants = [target, *([] if ratios else drafted), *listed]
    if len({variant.name for variant in variants}) < len(variants):
        raise ValueError("--compare names something twice")
    return variants


def load_variant(path: str, args: argparse.Namespace, ranks: OneProcess) -> Variant:
    """Other weights, without a draft."""
    name = Path(path).stem if Path(path).stem != "model" else Path(path).parent.name
    return Variant(name, load(Path(path), ranks=ranks, **cli.load_options(args) | {"draft": None})[0])


def prune(item: str, args: argparse.Namespace, engine: Engine) -> Variant:
    """The draft with fewer visual tokens: RATIO or METHOD:RATIO. Raises ValueError for anything else."""
    method, _, ratio = item.rpartition(":")
    try:
        if method not in ("", "random", "structured"):
            raise ValueError
        pruning = Pruning(method or args.mm_prune_method, number(float, 0, 1)(ratio), args.seed)
    except ValueError:
        problem = "is none of RATIO, random:RATIO, structured:RATIO (0 to 1) and a model.pth"
        raise ValueError(f"--compare {item} {problem}") from None
    assert engine.draft is not None  # plan_variants asks only where there is one
    draft = engine.draft._replace(pruning=pruning)
    return Variant(draft_name(draft), engine, draft)


def draft_name(draft: Draft) -> str:
    pruning = draft.pruning
    return f"draft {pruning.method}:{pruning.ratio:g}" if pruning and pruning.ratio else "draft"


# ---- asking and measuring ------------------------------------------------------------------------------------------


def measure_bandwidth(device: str) -> float:
    """GB/s that this device's memory gives: the faster of a copy (counted twice: read, written) and a sum."""
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    copy = torch.empty_like(source)
    best = 0.0
    for work, n_bytes in ((partial(copy.copy_, source), 2 * BANDWIDTH_BYTES), (source.sum, BANDWIDTH_BYTES)):
        for _ in range(5):
            start = now(source.device)
            work()
            best = max(best, n_bytes / 1e9 / (now(source.device) - start))
    return best


def count_graphs(args: argparse.Namespace) -> int:
    """How often something was compiled in this process."""
    if not (args.compile or args.compile_prefill):
        return 0  # asking would load the compiler
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def ask(
    variant: Variant, tokenizer: Tokenizer, benchmark: Benchmark, question: Question, args: argparse.Namespace
) -> dict:
    """What a results line holds of an answer, apart from its verdict. Raises ValueError for a question that is bad."""
    turns = [decode_images(content) for content in benchmark.ask(question)]
    parts = [part for content in turns if isinstance(content, list) for part in content if part["type"] == "image"]
    shown = {"question": [as_text(content) for content in turns], "pictures": [thumbnail(p["image"]) for p in parts]}
    return shown | converse(variant, tokenizer, turns, question.get("completion"), args)


def converse(
    variant: Variant, tokenizer: Tokenizer, turns: list, completion: str | None, args: argparse.Namespace
) -> dict:
    """Ask one turn after the other, each with the replies before it: the replies, and what they took.

    A model without a chat template continues `completion`, if the question has one, or the whole conversation.
    """
    engine, draft = variant.engine, variant.draft
    engine.forget()
    if draft:
        draft.engine.forget()
    torch.manual_seed(args.seed)  # an answer depends on no other question, nor on where a run was resumed
    show = partial(print, end="", file=sys.stderr, flush=True) if args.streaming else lambda text: None
    messages, replies, measured = [], [], []
    for content in turns:
        messages.append({"role": "user", "content": content})
        request: dict = {"messages": messages}
        if not tokenizer.chat_template:
            request = {"prompt": completion or "\n\n".join(m["content"] for m in messages) + "\n\n", "raw": True}
        options = {"draft": draft, "show": lambda text, ids: show(text), **answer_options(args)}
        result = answer(engine, tokenizer, request, **options)
        show("\n")
        reply = {"role": "assistant", "content": result["text"]}
        messages.append(reply_message(tokenizer, result["token_ids"]) if tokenizer.chat_template else reply)
        replies.append(result["text"])
        measured.append(figures(result, engine, draft))
    return {"response": replies[0] if len(replies) == 1 else replies, "turns": measured}


def decode_images(content: str | list[dict]) -> str | list[dict]:
    """A turn whose image parts hold decoded images. Raises ValueError, one line, for bytes that are no image."""
    return content if isinstance(content, str) else [decode_image(part) for part in content]


def decode_image(part: dict) -> dict:
    if "bytes" not in part:
        return part
    try:
        return {"type": "image", "path": part["path"], "image": load_image(io.BytesIO(part["bytes"]))}
    except ValueError as error:
        raise ValueError(f"{part['path']} cannot be decoded ({str(error).rpartition(': ')[2]})") from None


def as_text(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


def thumbnail(image: Image.Image) -> str:
    """A small copy as a data URL, so that a report needs nothing but the results."""
    image, buffer = image.copy(), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def figures(result: dict, engine: Engine, draft: Draft | None) -> dict:
    """What one answer took: times in seconds; bytes_read of weights (target and draft; no embeddings, no caches)."""
    n_decoded = len(result["token_ids"]) - 1  # the first token comes from prefill
    counts = result.get("accept_counts", [])
    n_drafted = sum(counts)
    # Steps of one token: there is no draft, or no room for its tokens was left in the caches.
    n_plain = max(0, n_decoded - sum((n + 1) * count for n, count in enumerate(counts)))
    n_bytes = weight_bytes(engine.model) * (n_drafted + n_plain)
    if draft:
        n_bytes += weight_bytes(draft.engine.model) * n_drafted * draft.speculate_k
    return {name: value for name, value in result.items() if name not in NOT_FIGURES} | {
        "prefill_s": result["time_to_first_token_s"] - result["encoder_s"],
        "decode_s": n_decoded / result["tokens_per_s"] if result["tokens_per_s"] else 0.0,
        "n_prompt_tokens": len(result["prompt_token_ids"]),
        "n_decoded": n_decoded,
        "n_steps": n_drafted + n_plain,
        "bytes_read": n_bytes,
    }


# ---- a run and its results file ------------------------------------------------------------------------------------


def describe_run(args: argparse.Namespace, n_ranks: int = 1, **more: object) -> dict:
    """The first line of a results file: every setting, versions, device, the checkpoints' hashes."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    name = f"{n_ranks} ranks, each {name}" if n_ranks > 1 else name
    listed = [Path(item) for item in args.compare or [] if item.endswith(".pth")]
    paths = [path for path in (args.checkpoint_path, args.draft_checkpoint_path, *listed) if path]
    files = [
        file for path in paths for file in (path, path.with_name("params.json"), path.with_name("tokenizer.model"))
    ]
    return {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": name + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""),
        "sha256": {str(file): hash_file(file) for file in files if args.output},  # nobody resumes without a file
        **more,
    }


def hash_file(path: Path) -> str:
    """What sha256sum says; of 16 GB of weights in about ten seconds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Examination:
    """Questions, who answers them, and where the results go."""

    args: argparse.Namespace
    benchmark: Benchmark
    questions: list[Question]
    variants: list[Variant]
    tokenizer: Tokenizer
    results: Results
    ranks: OneProcess
    n_graphs: int = 0  # compiled so far

    def run(self) -> None:
        """Ask what has no line yet. The variants take turns, and go first in turn: no one has the better machine."""
        done = {(line["variant"], line["id"]) for line in self.results.lines}
        done = set(map(tuple, self.ranks.share(sorted(done))))  # the file is rank 0's
        n_lines = len(self.variants) * len(self.questions)
        if len(done) == n_lines:
            return
        guesses = {variant.name: self.replay_generator(variant) for variant in self.variants}
        for question in self.questions[: self.args.warmup]:
            for variant in self.variants:
                self.answer(variant, question)
        progress = Progress(n_lines, self.results.lines)
        for i, question in enumerate(self.questions):
            for variant in self.variants[i % len(self.variants) :] + self.variants[: i % len(self.variants)]:
                if (variant.name, question["id"]) not in done:
                    line = self.judge(self.answer(variant, question), question, guesses[variant.name])
                    self.results.add(line)
                    progress.show(line)

    def answer(self, variant: Variant, question: Question) -> dict:
        """A line of results without a verdict: the answer and its figures, or "error"."""
        line = {"id": question["id"], "variant": variant.name, "group": question["group"]}
        line |= {name: question[name] for name in self.benchmark.kept if name in question}
        try:
            line |= self.ask_steadily(variant, question)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            if self.ranks.n_ranks > 1 and isinstance(error, torch.OutOfMemoryError):
                raise  # the other ranks are waiting for this one's part of a layer
            log(f"{question['id']}: {one_line(error)[:300]}")
            return line | {"error": one_line(error)[:300]}
        if variant is not self.variants[0]:
            del line["pictures"]  # one copy will do
        return line | rates(line["turns"], self.results.header["bandwidth_gb_per_s"])

    def ask_steadily(self, variant: Variant, question: Question) -> dict:
        """The answer of a machine that has warmed up.

        A question during which something was compiled is asked twice more, and the last time counts: the first time
        compiles, the second records CUDA graphs.
        """
        result = ask(variant, self.tokenizer, self.benchmark, question, self.args)
        while (n_graphs := count_graphs(self.args)) > self.n_graphs:
            self.n_graphs = n_graphs
            for _ in range(2):
                result = ask(variant, self.tokenizer, self.benchmark, question, self.args)
        return result

    def judge(self, line: dict, question: Question, rng: Random) -> dict:
        if "error" in line or not self.results.header["judged"] or not self.benchmark.score:
            return line
        replies = line["response"] if isinstance(line["response"], list) else [line["response"]]
        return line | self.benchmark.score(question, replies, rng)

    def replay_generator(self, variant: Variant) -> Random:
        """The generator of MMMU's guesses, where an interrupted run left it."""
        rng = Random(mmmu.SEED)
        for line in self.results.lines:
            if line["variant"] == variant.name and line.get("guessed"):
                rng.choice(line["all_choices"])
        return rng


# ---- command line --------------------------------------------------------------------------------------------------


def add_flags(add: Callable) -> None:
    """The flags of evaluate.py alone."""
    add("--bench_name", choices=list(BENCHMARKS), default="scenes", help="the questions; scenes needs no download")
    count_help = "ask the first N only (default: all; of scenes 200)"
    add("--num_questions", type=number(int, 1), metavar="N", help=count_help)
    add("--subjects", nargs="+", metavar="SUBJECT", help="subjects of MMMU, such as Math (default: all)")
    add("--split", default="validation", help="part of MMMU: dev or validation")
    add("--data_dir", type=Path, metavar="DIR", help="the benchmark's files (default: downloaded from Hugging Face)")
    compare_help = (
        "answer each question in several ways, in turn: by the target alone, with the draft pruned by each RATIO or "
        "METHOD:RATIO (0: all visual tokens), and by each other model.pth"
    )
    add("--compare", nargs="*", metavar="VARIANT", help=compare_help)
    add("--output", type=Path, metavar="FILE", help="write a JSON line for each answer, for scripts/report.py")
    add("--resume", action="store_true", help="ask only the questions that the --output file does not answer yet")
    warmup_help = "questions asked first and not counted, as the first answers of a process are slow"
    add("--warmup", type=number(int, 0), default=1, metavar="N", help=warmup_help)
    add("--streaming", action="store_true", help="show the answers on stderr as they are generated")
    add(
        "--allow_code_execution",
        action="store_true",
        help="run the programs that human_eval asks for, to judge them",
    )
    score_help = "judge the MMMU responses in FILE, made elsewhere, a JSON object a line; no model is loaded"
    add("--score", type=Path, metavar="FILE", help=score_help)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="evaluate.py", description="Accuracy and speed of a model, with and without its draft.")
    cli.add_model_flags(parser, max_new_tokens=None)
    add_flags(parser.add_argument_group("input and output").add_argument)
    args = parser.parse_args(argv)
    cli.complete_model_flags(args)
    args.max_new_tokens = args.max_new_tokens or BENCHMARKS[args.bench_name].max_new_tokens
    if args.score and args.bench_name != "MMMU":
        raise ValueError("--score judges by MMMU's rules: add --bench_name MMMU")
    if args.resume and not args.output:
        raise ValueError("--resume needs --output, the file to go on with")
    return args


def check_images(benchmark: Benchmark, engine: Engine, args: argparse.Namespace) -> None:
    if benchmark.has_images and engine.encoder is None:
        text_only = " and ".join(name for name, other in BENCHMARKS.items() if not other.has_images)
        raise ValueError(f"{args.checkpoint_path} reads text only, and {args.bench_name} has pictures: try {text_only}")


def run(args: argparse.Namespace) -> int:
    if args.score:
        lines = mmmu.score_responses(mmmu.read_responses(args.score))
        print_summary({"name": "MMMU", "variants": {"responses": accuracy(lines)}} | group_accuracy(lines))
        return 0
    with join_ranks(args) as ranks:
        return examine(args, ranks)


def examine(args: argparse.Namespace, ranks: OneProcess) -> int:
    """Ask the questions; 130 if Ctrl-C stopped it. Rank 0 alone writes, judges and prints."""
    benchmark = BENCHMARKS[args.bench_name]
    questions = benchmark.load(args)
    if len({question["id"] for question in questions}) < len(questions):
        raise ValueError(f"two questions of {args.bench_name} have the same id")
    output = args.output if ranks.rank == 0 else None
    if output:
        output.open("ab").close()  # a name that cannot be written shows before the model is loaded
    cli.check_device(args.device)
    bandwidth = measure_bandwidth(args.device)
    engine, tokenizer = load(args.checkpoint_path, ranks=ranks, **cli.load_options(args))
    check_images(benchmark, engine, args)
    judged = ranks.rank == 0 and will_judge(benchmark, args)
    variants = plan_variants(args, engine)
    names = [variant.name for variant in variants]
    more = {"variants": names, "n_questions": len(questions), "judged": judged, "bandwidth_gb_per_s": bandwidth}
    results = Results(output, describe_run(args, ranks.n_ranks, **more), args.resume)
    status = 0
    try:
        Examination(args, benchmark, questions, variants, tokenizer, results, ranks).run()
    except KeyboardInterrupt:
        log("\ninterrupted; the summary so far:")
        status = 130
    if ranks.rank == 0:
        print_summary(summarize(results.header, results.lines), results.header)
    return status


def will_judge(benchmark: Benchmark, args: argparse.Namespace) -> bool:
    """Whether answers are scored; programs are only run if that was allowed."""
    if benchmark.executes_code and args.allow_code_execution:
        log(f"programs run {human_eval.network_guard()}")
    return benchmark.score is not None and (args.allow_code_execution or not benchmark.executes_code)


def main(argv: list[str] | None = None) -> int:
    """The exit status; after Ctrl-C it is 130, with the summary so far."""
    return cli.run_command("evaluate.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
