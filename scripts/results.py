"""A results file, a progress bar, and the statistics of its lines: accuracy, speed, the summary, tables.

Knows the figures that evaluate.py measures. Does not know models, benchmarks or torch.

The first line of a file describes the run, every other one is a question answered by a variant: "id",
"variant", "group", "turns" (figures of each answer, see evaluate.figures) or "error", "correct" where it was judged,
"discipline" where the benchmark sorts its groups into such.
"""

import json
import statistics
import sys
import time
from pathlib import Path

ROWS = [  # of the table: name, field of rates(), decimals
    ("decode, tokens/s", "tokens_per_s", 1),
    ("weights read, GB/s", "gb_per_s", 2),
    ("  fraction of bandwidth", "bandwidth_share", 2),
    ("encoder, s", "encoder_s", 3),
    ("prefill, s", "prefill_s", 3),
    ("first token, s", "time_to_first_token_s", 3),
    ("complete answer, s", "answer_s", 3),
    ("visual tokens", "n_visual_tokens", 1),
    ("  seen by draft", "draft_n_visual_tokens", 1),
    ("accepted draft tokens", "mean_accepted", 2),
    ("tokens per verification", "tokens_per_step", 2),
]
DETAILS = {"draft_share", "verify_share", "rest_share", "draft_time_to_first_token_s", "n_prompt_tokens"}


# ---- lines and their file ------------------------------------------------------------------------------------------


def read_results(path: Path) -> tuple[list[dict], int]:
    """The complete lines of a file, and their size in bytes: a killed process leaves at most one incomplete line.

    Raises ValueError for a line of another program, OSError where the file cannot be read.
    """
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    lines = [read_line(path, i, line) for i, line in enumerate(complete.split(b"\n")[:-1], 1)]
    for i, line in enumerate(lines[1:], 2):
        if line["variant"] not in lines[0]["variants"]:
            raise ValueError(f"{path}, line {i} is of a variant that the first line does not name")
    return lines, len(complete)


def read_line(path: Path, i: int, line: bytes) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not (is_header(value) if i == 1 else is_answer(value)):
        raise ValueError(f"{path}, line {i} is not a line of evaluate.py's results")
    return value


def is_figure(value: object) -> bool:
    """A number that can be added up; NaN and infinity cannot."""
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value < 1e15


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_header(line: dict) -> bool:
    """What the first line has to be: all that is read of it."""
    match line:
        case {
            "settings": {"bench_name": str()},
            "variants": [str(), *_] as variants,
            "n_questions": int(),
            "judged": bool(),
            "device": str(),
            "versions": dict(),
            "bandwidth_gb_per_s": bandwidth,
        }:
            return is_texts(variants) and is_figure(bandwidth) and bandwidth > 1e-6
    return False


def is_answer(line: dict) -> bool:
    """What every other line has to be."""
    names, lists = ("id", "variant", "group"), ("pictures", "question", "response", "all_choices")
    answer = line.get("answer")
    others = [line.get(name) for name in ("discipline", "error", "program_error")]
    figures = [line.get(name) for name in ("tokens_per_s", "n_visual_tokens")]
    given = is_figure(line.get("answer_s")) and line["answer_s"] > 0 and line.keys() >= {"tokens_per_s", "response"}
    return (
        (given or "error" in line and "turns" not in line)
        and all(isinstance(line.get(name), str) for name in names)
        and all(text is None or isinstance(text, str) for text in others)
        and all(isinstance(line.get(name, ""), str) or is_texts(line[name]) for name in lists)
        and (answer is None or isinstance(answer, str) or is_texts(answer))
        and all(number is None or is_figure(number) for number in figures)
        and isinstance(line.get("correct", True), bool)
        and isinstance(line.get("index2ans", {}), dict)
        and isinstance(turns := line.get("turns", []), list)
        and all(map(is_turn, turns))
        and bool(line.get("all_choices") or not line.get("guessed"))
    )


def is_turn(turn: object) -> bool:
    """The figures of one answer: see evaluate.figures."""
    if not isinstance(turn, dict) or not {"n_decoded", "decode_s"} <= turn.keys():
        return False
    counts = turn.get("accept_counts", [])
    # rest_s is what other times leave of the whole: with two devices they may overlap, and it is below 0.
    others = [value for name, value in turn.items() if name not in ("accept_counts", "finish_reason", "rest_s")]
    rest = turn.get("rest_s", 0.0)
    others += [abs(rest) if isinstance(rest, float) else rest]
    return isinstance(counts, list) and all(map(is_figure, [*counts, *others]))


class Results:
    """The lines of a run, each written to the file, if there is one, at once."""

    def __init__(self, path: Path | None, header: dict, resume: bool):
        """Raises ValueError for a file that holds something else, OSError where it cannot be written."""
        self.header, self.lines, self.file = header, [], None
        if path is None:
            return
        old, n_bytes = read_results(path) if path.exists() else ([], 0)
        if not resume and path.exists() and (len(old) > 1 or path.stat().st_size > n_bytes):
            raise ValueError(f"{path} exists and is not empty: --resume continues it, or name another file")
        if old and resume:
            check_same(path, old[0], header)
            self.header, self.lines = old[0], old[1:]
        self.file = path.open("r+b" if self.lines else "wb", buffering=0)
        if self.lines:
            self.file.seek(self.file.truncate(n_bytes))
        else:
            self.write(self.header)

    def write(self, line: dict) -> None:
        """All of the line or, if the disk is full, nothing of it. Raises OSError."""
        if not self.file:
            return
        data, start = json.dumps(line).encode() + b"\n", self.file.tell()
        try:
            if self.file.write(data) == len(data):
                return
            raise OSError("the disk is full")
        except OSError as error:
            self.file.truncate(start)
            raise OSError(f"cannot write {self.file.name}: {error}; --resume goes on when there is room") from None

    def add(self, line: dict) -> None:
        self.write(line)
        self.lines.append(line)


def check_same(path: Path, old: dict, new: dict) -> None:
    """Raises ValueError that names the first difference. The measured bandwidth may differ."""
    new = json.loads(json.dumps(new))
    pairs = {f"--{name}": (old["settings"].get(name), value) for name, value in new["settings"].items()}
    pairs |= {name: (old.get(name), new[name]) for name in new.keys() - {"settings", "bandwidth_gb_per_s"}}
    for name, (before, after) in pairs.items():
        if before != after:
            raise ValueError(f"{path} was made with other settings: {name} was {before}, is {after}")


class Progress:
    """A bar on stderr with accuracy and speed so far; where stderr is no terminal, a line at every tenth."""

    def __init__(self, total: int, lines: list[dict]):
        self.total, self.start, self.terminal = total, time.perf_counter(), sys.stderr.isatty()
        self.done = self.correct = self.judged = self.n_decoded = 0
        self.decode_s = 0.0
        for line in lines:
            self.count(line)
        self.before = self.done

    def count(self, line: dict) -> None:
        self.done += 1
        self.judged += "correct" in line
        self.correct += line.get("correct", False)
        for turn in line.get("turns", []):
            self.n_decoded += turn["n_decoded"]
            self.decode_s += turn["decode_s"]

    def show(self, line: dict) -> None:
        self.count(line)
        if not self.terminal and self.done * 10 // self.total == (self.done - 1) * 10 // self.total:
            return
        left = (time.perf_counter() - self.start) / (self.done - self.before) * (self.total - self.done)
        correct = f"{self.correct / self.judged:.3f} correct, " if self.judged else ""
        speed = f"{self.n_decoded / self.decode_s:.1f} tokens/s, " if self.decode_s else ""
        bar = "#" * (20 * self.done // self.total)
        text = f"[{bar:.<20}] {self.done}/{self.total}  {correct}{speed}{left:.0f} s left"
        if self.terminal:
            print(f"\r{text:<78}", end="" if self.done < self.total else "\n", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


# ---- statistics -----------------------------------------------------------------------------------------------------


def rates(turns: list[dict], bandwidth_gb_per_s: float) -> dict:
    """Means and rates of any number of answers: those of a question, or of all. None where there is nothing."""

    def total(*names: str) -> float:
        return sum(turn.get(name, 0) for turn in turns for name in names)

    def ratio(above: float, below: float) -> float | None:
        return above / below if below else None

    names = ["time_to_first_token_s", "encoder_s", "prefill_s", "n_prompt_tokens", "n_visual_tokens"]
    result = {name: ratio(total(name), len(turns)) for name in names}
    waited = total("time_to_first_token_s", "draft_time_to_first_token_s", "decode_s")
    gb_per_s = ratio(total("bytes_read") / 1e9, total("decode_s"))
    result |= {
        "answer_s": ratio(waited, len(turns)),
        "n_new_tokens": total("n_decoded") + len(turns),
        "tokens_per_s": ratio(total("n_decoded"), total("decode_s")),
        "tokens_per_step": ratio(total("n_decoded"), total("n_steps")),
        "gb_per_s": gb_per_s,
        "bandwidth_share": gb_per_s and gb_per_s / bandwidth_gb_per_s,
    }
    drafted = [turn for turn in turns if "accept_counts" in turn]
    counts = [sum(column) for column in zip(*(turn["accept_counts"] for turn in drafted))]
    result["mean_accepted"] = ratio(sum(n * count for n, count in enumerate(counts)), sum(counts))
    if drafted:
        names = ["draft_n_visual_tokens", "draft_time_to_first_token_s"]
        result |= {"accept_counts": counts} | {name: ratio(total(name), len(drafted)) for name in names}
        result |= {
            f"{phase}_share": ratio(total(f"{phase}_s"), total("decode_s")) for phase in ("draft", "verify", "rest")
        }
    return result


def accuracy(lines: list[dict], judged: bool = True) -> dict:
    """Failed questions count as wrong. Of a benchmark that judges nothing, accuracy and correct are None."""
    correct = sum(line.get("correct", False) for line in lines) if judged else None
    return {"accuracy": correct / len(lines) if judged and lines else None, "correct": correct, "total": len(lines)}


def group_accuracy(lines: list[dict], judged: bool = True) -> dict:
    """Per subject (the group of a question), and per discipline where the benchmark has disciplines."""
    disciplines, subjects = group_by(lines, "discipline"), group_by(lines, "group")
    return {
        "disciplines": {name: accuracy(members, judged) for name, members in disciplines.items()},
        "subjects": {name: accuracy(members, judged) for name, members in subjects.items()},
    }


def group_by(lines: list[dict], field: str) -> dict[str, list[dict]]:
    """The lines that have the field, under its values, in the order in which these first occur."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        if field in line:
            groups.setdefault(line[field], []).append(line)
    return groups


def summarize(header: dict, lines: list[dict]) -> dict:
    """What a run found: the figures of each variant, and per subject those of the first."""
    names, judged = header["variants"], header["judged"]
    of = {name: [line for line in lines if line["variant"] == name] for name in names}
    variants = {}
    for name in names:
        turns = [turn for line in of[name] for turn in line.get("turns", [])]
        variants[name] = accuracy(of[name], judged) | {"failed": sum("error" in line for line in of[name])}
        variants[name] |= rates(turns, header["bandwidth_gb_per_s"])
        if name != names[0]:
            variants[name] |= speed_up(of[names[0]], of[name])
    complete = all(len(each) == header["n_questions"] for each in of.values())
    summary = {"name": header["settings"]["bench_name"], "complete": complete, "variants": variants}
    return summary | group_accuracy(of[names[0]], judged)


def speed_up(base: list[dict], lines: list[dict]) -> dict:
    """How much faster than `base`, question by question: the median, and the quartiles as its spread.

    speed_up is of decoding, answer_speed_up of all from the request to the last token, the draft's prefill included.
    same_answers: the fraction of answers that are the same text.
    """
    base_of = {line["id"]: line for line in base if "turns" in line}
    pairs = [(base_of[line["id"]], line) for line in lines if "turns" in line and line["id"] in base_of]
    decode = quartiles(
        [b["tokens_per_s"] / a["tokens_per_s"] for a, b in pairs if a["tokens_per_s"] and b["tokens_per_s"]]
    )
    answer = quartiles([a["answer_s"] / b["answer_s"] for a, b in pairs])
    return {
        "speed_up": decode[1],
        "speed_up_quartiles": [decode[0], decode[2]],
        "answer_speed_up": answer[1],
        "answer_speed_up_quartiles": [answer[0], answer[2]],
        "same_answers": sum(a["response"] == b["response"] for a, b in pairs) / len(pairs) if pairs else None,
    }


def quartiles(values: list[float]) -> list[float | None]:
    if len(values) < 2:
        return (values or [None]) * 3
    return statistics.quantiles(values, n=4, method="inclusive")


# ---- tables --------------------------------------------------------------------------------------------------------


def show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_range(ends: list[float | None] | None) -> str:
    return "-" if not ends else "-".join(show(end, 2) for end in ends)


def show_histogram(each: dict) -> str:
    counts = each.get("accept_counts", [])
    return " ".join(f"{100 * count / sum(counts):.0f}" for count in counts) if sum(counts) else "-"


def show_correct(each: dict) -> str:
    return "-" if each["correct"] is None else f"{each['correct']}/{each['total']}"


def print_table(rows: list[list[str]]) -> None:
    """Align the first column left and the others right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:])), sep="  ")
    print()


def print_summary(summary: dict, header: dict | None = None) -> None:
    """Tables for people, then the summary as one line of JSON. header: the run's; None: responses made elsewhere."""
    if header:
        print_speed(summary["variants"], header)
    first = next(iter(summary["variants"].values()))
    if first["accuracy"] is not None:
        groups = summary["disciplines"] | summary["subjects"] | {"all": first}
        rows = [[name, show(each["accuracy"]), show_correct(each)] for name, each in groups.items()]
        print_table([["", "accuracy", "correct"], *rows])
    print(json.dumps(summary | {"variants": shorten(summary["variants"])}), flush=True)


def shorten(value):
    """Figures for a line of JSON: six digits of each number, and none of DETAILS."""
    if isinstance(value, dict):
        return {name: shorten(each) for name, each in value.items() if name not in DETAILS}
    if isinstance(value, list):
        return [shorten(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def print_speed(named: dict[str, dict], header: dict) -> None:
    """named: the figures of each variant."""
    settings, variants = header["settings"], named.values()
    print(f"{settings['bench_name']} with {settings['checkpoint_path']}, {settings['dtype']}, {header['device']}")
    print(f"memory bandwidth {header['bandwidth_gb_per_s']:.1f} GB/s measured; seconds are means of an answer\n")
    table = [["", *named], ["correct", *map(show_correct, variants)]]
    table += [[name, *(show(each.get(field), digits) for each in variants)] for name, field, digits in ROWS]
    for name, field in {"decode speed-up": "speed_up", "answer speed-up": "answer_speed_up"}.items():
        table.append([name, *(show(each.get(field), 2) for each in variants)])
        table.append(["  quartiles", *(show_range(each.get(f"{field}_quartiles")) for each in variants)])
    table.append(["verifications that accept 0, 1, ... draft tokens, %", *(show_histogram(each) for each in variants)])
    print_table([row for row in table if set(row[1:]) != {"-"}])
