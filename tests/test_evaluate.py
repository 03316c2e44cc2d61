"""The benchmark program: measuring, comparing, results that survive a kill, programs that are run, bad input."""

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
from scripts import results
from scripts.tasks import human_eval
from scripts.tasks.questions import BENCHMARKS
from tests.helpers import bench
from tests.helpers.processes import heed_interrupts
from vision import Pruning

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_DATA = ROOT.parent / "shared/data/benchmarks"  # of whoever keeps it there


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the program in this process; returns status, summary (see bench), the lines of stderr."""
    monkeypatch.setattr(evaluate, "BANDWIDTH_BYTES", 1 << 20)

    def call(*flags) -> tuple[int, dict, list[str]]:
        status = evaluate.main(["--device", "cpu", *map(str, flags)])
        out, err = capsys.readouterr()
        return status, bench.read_summary(out) if out else {}, err.splitlines()

    return call


@pytest.fixture
def tiny(pair):
    def flags(family: str = "qwen2.5-vl", draft: str | None = None) -> list:
        drafted = ["--draft_checkpoint_path", pair(draft).path] if draft else []
        return ["--checkpoint_path", pair(family).path, "--dtype", "float32", "--max_new_tokens", 6, *drafted]

    return flags


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path) -> Path:
    """mt_bench and human_eval, two questions each."""
    folder = tmp_path / "data"
    folder.mkdir()
    bench.write_jsonl(folder / "question.jsonl", bench.CONVERSATIONS)
    problems = "".join(json.dumps(problem) + "\n" for problem in bench.PROBLEMS)
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(problems.encode()))
    return folder


# ---- the four benchmarks -------------------------------------------------------------------------------------------


def test_scenes(run, tiny, tmp_path):
    """The embedded benchmark needs nothing but a model; its summary has what the table promises."""
    output = tmp_path / "out.jsonl"
    status, summary, err = run(*tiny(), "--num_questions", 8, "--output", output)
    assert status == 0 and (summary["total"], summary["failed"], summary["complete"]) == (8, 0, True)
    assert {"accuracy", "correct", "tokens_per_s", "time_to_first_token_s", "bandwidth_share", "mean_accepted"} <= set(
        summary
    )
    header, *lines = read(output)
    assert summary["name"] == header["settings"]["bench_name"] == "scenes" and summary["mean_accepted"] is None
    first_token_s = pytest.approx(summary["encoder_s"] + summary["prefill_s"], rel=1e-5)  # six digits are printed
    assert summary["time_to_first_token_s"] == first_token_s
    assert all(line["time_to_first_token_s"] == pytest.approx(line["encoder_s"] + line["prefill_s"]) for line in lines)
    assert len(lines) == 8 and all(len(digest) == 64 for digest in header["sha256"].values())
    assert lines[0]["pictures"][0].startswith("data:image/jpeg;base64,") and "<image>" in lines[0]["question"][0]
    assert sum(line["group"] in ("describe", "list") for line in lines) >= 4  # two thirds, on average
    assert summary["n_visual_tokens"] == sum(line["n_visual_tokens"] for line in lines) / 8


def test_scenes_are_judged_by_the_exact_answer():
    score = BENCHMARKS["scenes"].score
    for reply in ("red", " Red. ", "RED"):
        assert score({"answer": "red"}, [reply], None) == {"correct": True}
    for reply in ("a red one", "", "blue"):
        assert score({"answer": "red"}, [reply], None) == {"correct": False}


def test_mt_bench_has_two_turns_in_one_conversation(run, tiny, pair, data, tmp_path):
    output = tmp_path / "out.jsonl"
    status, summary, _ = run(*tiny("qwen2"), "--bench_name", "mt_bench", "--data_dir", data, "--output", output)
    assert status == 0 and (summary["accuracy"], summary["total"]) == (None, 2)
    line, (first, second) = read(output)[1], bench.CONVERSATIONS[0]["turns"]
    assert len(line["response"]) == 2 and [turn["n_decoded"] for turn in line["turns"]] == [5, 5]
    tokenizer = pair("qwen2").tokenizer
    alone = len(tokenizer.encode_chat([{"role": "user", "content": first}]))
    assert line["turns"][0]["n_prompt_tokens"] == alone
    assert line["turns"][1]["n_prompt_tokens"] > alone + 5 + len(tokenizer.encode(second))


@pytest.mark.parametrize("name", ["mt_bench", "human_eval"])
def test_a_vision_model_runs_the_benchmarks_of_text(run, tiny, data, name):
    status, summary, _ = run(*tiny(), "--bench_name", name, "--data_dir", data)
    assert status == 0 and summary["total"] == 2 and summary["accuracy"] is None


@pytest.mark.parametrize("name", ["mt_bench", "human_eval"])
def test_a_model_without_a_chat_format_runs_them_too(run, tiny, data, name, monkeypatch):
    load, prompts = evaluate.load, []

    def load_base(path, **options):
        engine, tokenizer = load(path, **options)
        tokenizer.chat_template = None
        return engine, tokenizer

    answer = evaluate.answer
    monkeypatch.setattr(evaluate, "load", load_base)
    monkeypatch.setattr(
        evaluate, "answer", lambda e, t, request, **more: prompts.append(request) or answer(e, t, request, **more)
    )
    status, summary, _ = run(*tiny("qwen2"), "--bench_name", name, "--data_dir", data, "--warmup", 0)
    assert status == 0 and summary["failed"] == 0 and all(prompt["raw"] for prompt in prompts)
    first = bench.PROBLEMS[0]["prompt"] if name == "human_eval" else "Write a line.\n\n"
    assert prompts[0]["prompt"] == first


@pytest.mark.parametrize("name", ["scenes", "MMMU"])
def test_a_text_model_is_told_what_it_can_run(run, tiny, tmp_path, name):
    pytest.importorskip("pyarrow")
    flags = ["--data_dir", bench.write_mmmu(tmp_path)] if name == "MMMU" else []
    status, summary, err = run(*tiny("qwen2"), "--bench_name", name, *flags)
    assert status == 2 and not summary and "mt_bench and human_eval" in err[-1]


@pytest.mark.skipif(not PUBLIC_DATA.exists(), reason="the public files are not here")
def test_public_files(run, tiny):
    for name, total in {"mt_bench": 80, "human_eval": 164}.items():
        args = evaluate.parse_args(["--bench_name", name, "--data_dir", str(PUBLIC_DATA)])
        questions = BENCHMARKS[name].load(args)
        assert len(questions) == total and all(BENCHMARKS[name].ask(question) for question in questions)


# ---- comparing and measuring ---------------------------------------------------------------------------------------


def test_compare_takes_turns(run, tiny, tmp_path):
    """Each question by every variant before the next; the draft changes no answer; a speed-up with its spread."""
    output = tmp_path / "out.jsonl"
    flags = [*tiny(draft="qwen2.5-vl:other"), "--num_questions", 4, "--output", output]
    status, summary, _ = run(*flags, "--compare", "structured:0.5", "random:0.5")
    names = ["target", "draft structured:0.5", "draft random:0.5"]
    assert status == 0 and list(summary["variants"]) == names
    lines = read(output)[1:]
    assert [line["id"] for line in lines] == [f"scene_{i}" for i in range(4) for _ in range(3)]
    assert [line["variant"] for line in lines[:6]] == names + names[1:] + names[:1], "each goes first in its turn"
    for name in names[1:]:
        each = summary["variants"][name]
        low, high = each["speed_up_quartiles"]
        assert low <= each["speed_up"] <= high and each["same_answers"] == 1.0
        assert each["draft_n_visual_tokens"] == pytest.approx(each["n_visual_tokens"] / 2, abs=1)
        assert sum(each["accept_counts"]) > 0
    assert "pictures" in lines[0] and "pictures" not in lines[1]


def test_last_line_is_small(tiny, capsys, monkeypatch):
    """Each figure once: what a script reads. The settings are in the results file."""
    monkeypatch.setattr(evaluate, "BANDWIDTH_BYTES", 1 << 20)
    flags = [*tiny(draft="qwen2.5-vl:other"), "--device", "cpu", "--num_questions", 3, "--compare", "0"]
    assert evaluate.main([*map(str, flags)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    summary = json.loads(line)
    assert set(summary) == {"name", "complete", "variants", "disciplines", "subjects"} and len(line) < 2000
    figures = {"accuracy", "correct", "total", "failed", "tokens_per_s", "time_to_first_token_s", "answer_s"}
    assert all(figures <= set(variant) for variant in summary["variants"].values())
    assert {"speed_up", "answer_speed_up", "same_answers"} <= set(summary["variants"]["draft"])


def test_compare_without_a_list(run, tiny):
    summary = run(*tiny(draft="qwen2.5-vl"), "--num_questions", 3, "--compare")[1]
    assert list(summary["variants"]) == ["target", "draft"]
    drafted = summary["variants"]["draft"]
    assert drafted["mean_accepted"] > 3, "the target as its own draft"
    assert drafted["tokens_per_step"] > 3


def test_compare_other_weights(run, tiny, pair):
    other = pair("qwen2.5-vl:other").path
    summary = run(*tiny(), "--num_questions", 2, "--compare", other)[1]
    assert list(summary["variants"]) == ["target", other.parent.name]


@pytest.mark.parametrize("item", ["0.5", "nice:0.5", "1.5", "random", "nowhere.pth"])
def test_compare_with_what_is_not_there(run, tiny, item):
    draft = None if item == "0.5" else "qwen2.5-vl"
    status, summary, err = run(*tiny(draft=draft), "--num_questions", 2, "--compare", item)
    assert status == 2 and not summary and err[-1].startswith("evaluate.py: ")


def test_figures_count_the_weights_that_were_read():
    """By hand: 8 x 8 float32 weights are 256 bytes. 6 tokens from 2 verifications of 2 draft tokens each."""
    engine = bench.stub_engine(draft=True)
    result = bench.stub_result("") | {"token_ids": [1] * 7, "accept_counts": [0, 0, 2], "tokens_per_s": 3.0}
    figures = evaluate.figures(result, engine, engine.draft)
    assert (figures["n_decoded"], figures["n_steps"], figures["decode_s"]) == (6, 2, 2.0)
    assert figures["bytes_read"] == 2 * 256 + 2 * 2 * 256
    alone = evaluate.figures(bench.stub_result("") | {"token_ids": [1] * 7}, bench.stub_engine(), None)
    assert (alone["n_steps"], alone["bytes_read"]) == (6, 6 * 256)
    cut = evaluate.figures(result | {"token_ids": [1] * 9}, engine, engine.draft)
    assert cut["n_steps"] == 2 + 2, "two tokens were decoded without a draft"


def test_rates_and_speed_up():
    turns = [evaluate.figures(bench.stub_result("", speed), bench.stub_engine(), None) for speed in (100.0, 200.0)]
    rates = results.rates(turns, bandwidth_gb_per_s=2.0)
    assert rates["tokens_per_s"] == pytest.approx(4 / 0.03) and rates["tokens_per_step"] == 1.0
    assert rates["gb_per_s"] == pytest.approx(4 * 256 / 0.03 / 1e9)
    assert rates["bandwidth_share"] == pytest.approx(rates["gb_per_s"] / 2)
    line = {"turns": [], "response": "", "answer_s": 1.0, "tokens_per_s": 10.0}
    base = [line | {"id": i} for i in range(5)]
    fast = [line | {"id": i, "tokens_per_s": 10.0 * speed, "answer_s": 0.5} for i, speed in enumerate([1, 2, 3, 4, 5])]
    faster = results.speed_up(base, fast)
    assert faster["speed_up"] == 3.0 and faster["speed_up_quartiles"] == [2.0, 4.0]
    assert faster["answer_speed_up"] == 2.0
    assert results.rates([], 1.0)["tokens_per_s"] is None and results.speed_up([], [])["speed_up"] is None


def test_bandwidth_is_measured(monkeypatch):
    monkeypatch.setattr(evaluate, "BANDWIDTH_BYTES", 1 << 24)
    assert 0.1 < evaluate.measure_bandwidth("cpu") < 5000


def test_variants_prune_the_draft_they_enter_with():
    engine = bench.stub_engine(draft=True)
    args = evaluate.parse_args(["--compare", "0", "0.25", "random:0.75", "--mm_prune_method", "structured"])
    variants = evaluate.plan_variants(args, engine)
    assert [v.name for v in variants] == ["target", "draft", "draft structured:0.25", "draft random:0.75"]
    assert variants[0].draft is None
    assert variants[3].draft.pruning == Pruning("random", 0.75, args.seed)


def test_what_compiles_is_asked_again(run, monkeypatch, data, tmp_path):
    """The second of two questions compiles something at its first try, and again at its second: it is not counted."""
    (tmp_path / "checkpoint").mkdir()
    graphs, speeds = iter([0, 1, 2, 2]), iter(range(1, 100))
    bench.install_stub(
        monkeypatch, tmp_path / "checkpoint", lambda *args, **options: bench.stub_result("", next(speeds))
    )
    monkeypatch.setattr(evaluate, "count_graphs", lambda args: next(graphs))
    output = tmp_path / "out.jsonl"
    run("--bench_name", "human_eval", "--data_dir", data, "--warmup", 0, "--output", output)
    assert [line["tokens_per_s"] for line in read(output)[1:]] == [1, 6], "asked 1 + 2 + 2 times"


def test_streaming_goes_to_stderr(run, tiny, capsys):
    streamed = run(*tiny(), "--num_questions", 2, "--streaming")[2]
    assert len(streamed) > len(run(*tiny(), "--num_questions", 2)[2])


def test_importing_it_needs_no_gpu():
    code = "import evaluate, sys, torch; assert not torch.cuda.is_initialized() and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


# ---- results that survive ------------------------------------------------------------------------------------------


@pytest.fixture
def slow_mmmu(monkeypatch, tmp_path):
    """A run of 30 questions that takes a tenth of a second; its replies name no letter, so that one is drawn."""
    pytest.importorskip("pyarrow")

    def answer(engine, tokenizer, request, **options):
        time.sleep(0.003)
        return bench.stub_result("who knows")

    (tmp_path / "checkpoint").mkdir()
    bench.install_stub(monkeypatch, tmp_path / "checkpoint", answer)
    return ["--bench_name", "MMMU", "--data_dir", bench.write_mmmu(tmp_path / "data")]


LASTING = ("accuracy", "correct", "total", "failed", "subjects", "disciplines", "complete", "n_visual_tokens")


def lasting(summary: dict) -> dict:
    return {name: summary[name] for name in LASTING}


def start_and_kill(flags: list, seconds: float) -> None:
    """The program in a process of its own (a fork of this one, which has torch in memory already), killed -9."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            evaluate.main([*map(str, flags)])
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_kill_and_resume(run, slow_mmmu, tmp_path):
    """Twenty times, at random moments: one line a question, in order, and the summary of an undisturbed run."""
    whole = tmp_path / "whole.jsonl"
    expected = lasting(run(*slow_mmmu, "--output", whole)[1])
    undisturbed = [(line["id"], line.get("parsed")) for line in read(whole)[1:]]
    assert len(undisturbed) == 30 and len({parsed for _, parsed in undisturbed if isinstance(parsed, str)}) > 2
    rng, lengths = random.Random(0), set()
    for i in range(20):
        output = tmp_path / f"{i}.jsonl"
        start_and_kill(["--device", "cpu", *slow_mmmu, "--output", output], rng.uniform(0, 0.3))
        lengths.add(output.read_bytes().count(b"\n") if output.exists() else -1)
        status, summary, _ = run(*slow_mmmu, "--output", output, "--resume")
        assert status == 0 and lasting(summary) == expected
        assert [(line["id"], line.get("parsed")) for line in read(output)[1:]] == undisturbed
    assert len(lengths) > 3, "the moments differ"


def test_half_a_line_is_written_again(run, slow_mmmu, tmp_path):
    """A file cut anywhere, also within its first line."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = lasting(run(*slow_mmmu, "--output", whole)[1])
    data, rng = whole.read_bytes(), random.Random(1)
    first = data.index(b"\n")
    for cut in [0, 5, first, first + 1, first + 9, len(data) - 1, len(data)] + rng.sample(range(len(data)), 4):
        output.write_bytes(data[:cut])
        status, summary, _ = run(*slow_mmmu, "--output", output, "--resume")
        assert status == 0 and lasting(summary) == expected and len(read(output)) == 31


@pytest.mark.parametrize("sign, expected", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_program_with_a_real_model(tiny, run, tmp_path, sign, expected):
    """The program itself, stopped when some lines are there; greedy answers are those of an undisturbed run."""
    flags, output = [*tiny(), "--num_questions", 40], tmp_path / "out.jsonl"
    command = [sys.executable, "evaluate.py", "--device", "cpu", *map(str, flags), "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_interrupts}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while (not output.exists() or output.read_bytes().count(b"\n") < 4) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    out, err = process.communicate()
    n_before = len(output.read_text().splitlines())
    assert process.returncode == expected and 4 <= n_before < 41 and "Traceback" not in err
    if sign == signal.SIGINT:
        summary = bench.read_summary(out)
        assert (summary["total"], summary["complete"]) == (n_before - 1, False)
    status, summary, _ = run(*flags, "--output", output, "--resume")
    assert status == 0 and summary["complete"] and summary["total"] == 40
    undisturbed = tmp_path / "whole.jsonl"
    run(*flags, "--output", undisturbed)
    assert [line["response"] for line in read(output)[1:]] == [line["response"] for line in read(undisturbed)[1:]]


def test_resume_of_a_comparison(run, tiny, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = [*tiny(draft="qwen2.5-vl:other"), "--num_questions", 3, "--compare", "0.5", "--output", output]
    run(*flags)
    data = output.read_bytes()
    output.write_bytes(b"\n".join(data.split(b"\n")[:4]) + b"\n")
    status, summary, _ = run(*flags, "--resume")
    assert status == 0 and summary["complete"] and len(read(output)) == 7


@pytest.mark.parametrize("change", [["--max_new_tokens", 7], ["--seed", 1], ["--num_questions", 3], ["--compare"]])
def test_resume_with_other_settings(run, slow_mmmu, tmp_path, change):
    output = tmp_path / "out.jsonl"
    run(*slow_mmmu, "--num_questions", 2, "--output", output)
    before = output.read_bytes()
    flags = [*slow_mmmu, "--num_questions", 2, "--output", output, "--resume", *change]
    status, summary, err = run(*flags)
    assert status == 2 and not summary and str(change[0]) in err[-1]
    assert output.read_bytes() == before


def test_resume_with_another_checkpoint(run, slow_mmmu, tmp_path):
    output = tmp_path / "out.jsonl"
    run(*slow_mmmu, "--num_questions", 2, "--output", output)
    (tmp_path / "checkpoint/model.pth").write_bytes(b"other weights")
    status, _, err = run(*slow_mmmu, "--num_questions", 2, "--output", output, "--resume")
    assert status == 2 and "sha256" in err[-1]


def test_results_are_not_overwritten(run, slow_mmmu, tmp_path):
    for text in ("notes of mine", "notes\nof mine\n"):
        output = tmp_path / "out.jsonl"
        output.write_text(text)
        status, _, err = run(*slow_mmmu, "--num_questions", 2, "--output", output)
        assert status == 2 and str(output) in err[-1] and output.read_text() == text
    output.unlink()
    assert run(*slow_mmmu, "--num_questions", 2, "--output", output)[0] == 0
    status, _, err = run(*slow_mmmu, "--num_questions", 2, "--output", output)
    assert status == 2 and "--resume" in err[-1]


def test_interrupt_ends_with_the_summary_so_far(run, slow_mmmu, tmp_path, monkeypatch):
    answer, calls = evaluate.answer, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answer(*args, **options)

    monkeypatch.setattr(evaluate, "answer", interrupted)
    output = tmp_path / "out.jsonl"
    status, summary, err = run(*slow_mmmu, "--output", output, "--warmup", 1)
    assert status == 130 and (summary["total"], summary["complete"]) == (6, False)
    assert len(read(output)) == 7 and any("interrupted" in line for line in err)
    monkeypatch.setattr(evaluate, "answer", answer)
    assert run(*slow_mmmu, "--output", output, "--warmup", 1, "--resume")[1]["complete"]


def test_progress(capsys, monkeypatch):
    line = {"correct": True, "turns": [{"n_decoded": 10, "decode_s": 0.5}]}
    progress = results.Progress(20, [])
    for _ in range(20):
        progress.show(line)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].startswith("[####################] 20/20  1.000 correct, 20.0 tokens/s")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = results.Progress(2, [line])
    progress.show(line)
    assert capsys.readouterr().err.startswith("\r[####################] 2/2")


# ---- programs ------------------------------------------------------------------------------------------------------


def test_pass_at_1(run, data, tmp_path, monkeypatch):
    """One program that passes and one that does not; without the flag nothing is executed."""
    replies = iter(["```python\ndef add_all(x):\n    return sum(x)\n```", "def four_times(x):\n    return 3 * x"] * 2)
    (tmp_path / "checkpoint").mkdir()
    bench.install_stub(monkeypatch, tmp_path / "checkpoint", lambda *args, **more: bench.stub_result(next(replies)))
    flags = ["--bench_name", "human_eval", "--data_dir", data, "--warmup", 0]
    status, summary, err = run(*flags, "--allow_code_execution")
    assert status == 0 and (summary["accuracy"], summary["correct"]) == (0.5, 1)
    assert any(line.startswith("programs run ") for line in err)
    monkeypatch.setattr(human_eval, "run_program", None)
    assert run(*flags)[1]["accuracy"] is None


@pytest.mark.parametrize("problem", bench.PROBLEMS)
def test_every_way_to_reply_with_a_program(problem):
    body = problem["canonical_solution"]
    function = f"def {problem['entry_point']}(x):\n{body}"
    replies = [
        body,
        body + "\nprint('an example')\ndef other(:",  # how a base model continues
        function,
        f"Here it is:\n```python\n{problem['prompt']}{body}```\nIt adds.",
        f"First:\n```\nno code\n```\nthen\n```py\n{function}\n```",
        f"```python\n{function}",  # cut off by max_new_tokens
    ]
    for reply in replies:
        assert human_eval.score(problem, [reply])["correct"], reply
    for reply in ("", "    return 0", "no idea", function.replace("return", "return 1 +")):
        assert not human_eval.score(problem, [reply])["correct"], reply


@pytest.mark.parametrize(
    "program, why",
    [
        ("while True: pass", "more than 1 s"),
        ("x = [0] * 10**10", "MemoryError"),
        ("assert 1 == 2", "AssertionError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended before"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended before"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("import urllib.request as u; u.urlopen('http://example.com')", "not allowed"),
        ("import subprocess; subprocess.run(['sleep', '100'])", "not allowed"),
        ("import os; os.system('sleep 100')", "not allowed"),
        ("import os; os.fork()", "not allowed"),
        ("open('big', 'w').write('x' * (1 << 21))", "too large"),
        ("import os; assert 'PATH' not in os.environ and not os.listdir('.')", None),
        ("print('x' * 10**6)", None),
        ("input()", "EOFError"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(50,)).start()", None),
    ],
)
def test_limits_of_a_program(program, why):
    start = time.monotonic()
    error = human_eval.run_program(program, timeout_s=1)["error"]
    assert (error is None) if why is None else (why in error), error
    assert time.monotonic() - start < 5


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--bench_name", "riddles"], "--bench_name"),
        (["--num_questions", "0"], "--num_questions"),
        (["--warmup", "-1"], "--warmup"),
        (["--resume"], "--output"),
        (["--score", "x.jsonl"], "--bench_name MMMU"),
        (["--bench_name", "MMMU", "--data_dir", "nowhere"], "nowhere"),
        (["--bench_name", "MMMU", "--data_dir", "."], "parquet"),
        (["--bench_name", "MMMU", "--data_dir", ".", "--subjects", "Magic"], "Magic"),
        (["--bench_name", "MMMU", "--data_dir", ".", "--subjects", "Math", "--split", "dev"], "dev-*.parquet"),
        (["--bench_name", "mt_bench", "--data_dir", "."], "question.jsonl"),
        (["--bench_name", "human_eval", "--data_dir", "."], "HumanEval.jsonl"),
        (["--output", "no/such/folder/out.jsonl"], "no/such/folder"),
        (["--output", "."], "'.'"),
        (["--device", "abacus"], "abacus"),
        (["--checkpoint_path", "nowhere.pth"], "nowhere.pth"),
        (["--prompt", "Hi"], "--prompt"),
    ],
)
def test_bad_flags(run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    status, summary, err = run("--num_questions", 2, *flags)
    assert status == 2 and not summary and len(err) == 1 and words in err[0], err


@pytest.mark.parametrize("name", ["MMMU", "mt_bench", "human_eval"])
def test_no_network(run, name, tmp_path, monkeypatch):
    """Without --data_dir the files are downloaded (the tests are offline): one line with the remedy."""
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **more):
        raise hub.errors.LocalEntryNotFoundError("cannot find the snapshot,\nand no connection")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    status, summary, err = run("--bench_name", name)
    assert status == 2 and not summary and len(err) == 1 and "--data_dir" in err[0]


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08 broken", b"[1]\n", b'{"task_id"', b"\xff\xfe"])
def test_damaged_data(run, tmp_path, content):
    for name, file in {"human_eval": "HumanEval.jsonl.gz", "mt_bench": "question.jsonl"}.items():
        (tmp_path / file).write_bytes(content)
        status, summary, err = run("--bench_name", name, "--data_dir", tmp_path)
        assert status == 2 and not summary and len(err) == 1 and file in err[0]


def test_bad_questions_are_counted(run, tiny, tmp_path):
    good, bad = bench.CONVERSATIONS[0], {"question_id": 83, "category": "math", "turns": []}
    bench.write_jsonl(tmp_path / "question.jsonl", [bad, good, {"question_id": 84}])
    status, summary, _ = run(*tiny("qwen2"), "--bench_name", "mt_bench", "--data_dir", tmp_path)
    assert status == 0 and (summary["total"], summary["failed"]) == (3, 2)
    bench.write_jsonl(tmp_path / "HumanEval.jsonl", [{"task_id": "HumanEval/7"}, bench.PROBLEMS[0]])
    flags = ["--bench_name", "human_eval", "--data_dir", tmp_path, "--allow_code_execution"]
    status, summary, _ = run(*tiny("qwen2"), *flags)
    assert status == 0 and (summary["total"], summary["failed"], summary["correct"]) == (2, 1, 0)
    bench.write_jsonl(tmp_path / "question.jsonl", [good, good])
    status, _, err = run(*tiny("qwen2"), "--bench_name", "mt_bench", "--data_dir", tmp_path)
    assert status == 2 and "same id" in err[-1]


def test_prompt_that_does_not_fit_is_counted(run, tiny, tmp_path):
    long = {"question_id": 1, "category": "math", "turns": ["word " * 3000]}
    bench.write_jsonl(tmp_path / "question.jsonl", [long, bench.CONVERSATIONS[1]])
    output = tmp_path / "out.jsonl"
    flags = ["--bench_name", "mt_bench", "--data_dir", tmp_path, "--output", output]
    summary = run(*tiny("qwen2"), *flags)[1]
    assert summary["failed"] == 1 and "context" in read(output)[1]["error"]
