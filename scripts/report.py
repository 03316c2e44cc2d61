"""One HTML page of one or several results files of evaluate.py: numbers, bars, and every question with its images.

python scripts/report.py RESULTS.jsonl [MORE.jsonl ...] -o report.html

Knows results files, HTML and CSS, which filters the questions. Does not know models or benchmarks. The page needs no
network and no JavaScript.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from scripts.results import ROWS, group_accuracy, read_results, show, show_correct, speed_up, summarize  # noqa: E402

COLORS = [
    "#2f6fde",
    "#d9622b",
    "#2a9d5c",
    "#9b4fc4",
    "#c2a100",
    "#c7365f",
    "#3aa6b9",
    "#7a6a58",
]  # of the runs, in their order
SHAPES = [
    "m-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "m-3.5,-3.5h7v7h-7z",  # square
    "m0,-4.5l4.5,8h-9z",  # triangle
    "m-4,0h8m-4,-4v8",  # plus
    "m0,-5l4,5l-4,5l-4,-5z",  # diamond
    "m-3.5,-3.5l7,7m0,-7l-7,7",  # cross
    "m0,4.5l4.5,-8h-9z",  # triangle on its tip
    "m-4.5,0h9m-6.75,-4l4.5,8m0,-8l-4.5,8",  # star
]  # of the runs' marks, so that they differ in black and white: relative SVG paths around the mark's centre
PLOT = (640, 300, 64, 44)  # width, height, left and bottom margin, in SVG units
LABELS = {
    "checkpoint_path": "model",
    "draft_checkpoint_path": "draft",
    "bench_name": "questions of",
    "num_questions": "number of questions",
    "speculate_k": "tokens proposed in a step",
    "mm_prune_ratio": "visual tokens removed from the draft",
    "mm_prune_method": "how they are chosen",
}  # of settings; the others have the name of their flag
VERDICTS = ("right", "wrong", "failed")
OF_DRAFTS = ("draft_", "speculate_", "mm_prune_")  # settings that mean nothing without a draft
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 0 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 1.2rem 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.note { opacity: .75; font-size: .85rem; margin: .2rem 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; border-top: 4px solid var(--run); }
.card dl { display: grid; grid-template-columns: 1fr auto; margin: .4rem 0 0; gap: .1rem .6rem; font-size: .9rem; }
.card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.card h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.big { font-size: 1.9rem; font-weight: 650; } .big small { font-size: .85rem; font-weight: 400; opacity: .75; }
.bar { display: grid; grid-template-columns: minmax(6rem, 16rem) 1fr 6.5rem; gap: .6rem; align-items: center; }
.bar span:first-child { overflow-wrap: anywhere; font-size: .9rem; }
.bar span:last-child { font-variant-numeric: tabular-nums; font-size: .85rem; }
.track { background: var(--soft); height: .8rem; border-radius: 4px; }
.track i { display: block; height: 100%; background: var(--run); border-radius: 4px; }
.group { margin: .35rem 0; } .total { font-weight: 650; }
.mark { fill: var(--run); fill-opacity: .5; stroke: var(--run); stroke-width: 1.5; }
.key { width: .8rem; height: .8rem; margin-right: .3rem; } .legend span { margin-right: 1.2rem; white-space: nowrap; }
.plot { width: 100%; height: auto; max-width: 45rem; } .plot text { font-size: 12px; fill: currentColor; }
table { border-collapse: collapse; font-size: .85rem; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: 400; opacity: .75; white-space: nowrap; } td { overflow-wrap: anywhere; min-width: 8rem; }
.filter { position: sticky; top: 0; z-index: 1; background: Canvas; padding: .5rem 0; }
.filter label { margin-right: 1rem; } .filter select { font: inherit; max-width: 14rem; }
.questions { display: flex; flex-direction: column; counter-reset: shown; } .count { order: -1; }
.count::before { content: counter(shown); } article { counter-increment: shown; }
article {
  border-top: 1px solid var(--line); padding: .9rem 0; content-visibility: auto; contain-intrinsic-size: auto 14rem;
  display: grid; gap: 1rem; grid-template-columns: minmax(0, 14rem) minmax(0, 1fr);
}
article.plain { grid-template-columns: minmax(0, 1fr); }
article img { max-width: 100%; border: 1px solid var(--line); margin-bottom: .3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .2rem 0; }
.reply { border-left: 4px solid var(--run); padding-left: .6rem; margin: .5rem 0; }
.right { color: #1d9a4c; font-weight: 650; } .wrong { color: #d23b3b; font-weight: 650; }
@media (max-width: 40rem) {
  article { grid-template-columns: minmax(0, 1fr); }
  .bar { grid-template-columns: 7rem 1fr 5.5rem; }
}
"""


@dataclass
class Run:
    """One variant of one results file."""

    name: str
    number: int
    file: str
    header: dict
    lines: dict[str, dict]  # by the question's id, in their order
    summary: dict

    @property
    def css(self) -> str:
        """The class of what is this run's: it sets the color."""
        return f"v{self.number}"

    @property
    def shape(self) -> str:
        return SHAPES[self.number % len(SHAPES)]

    @property
    def key(self) -> str:
        """The run's mark as a picture in a line of text."""
        path = f'<path class="mark" d="M6,6{self.shape}"/>'
        return f'<svg class="key {self.css}" viewBox="0 0 12 12" aria-hidden="true">{path}</svg>'


def load_runs(paths: list[Path]) -> list[Run]:
    """Raises ValueError or OSError, one line, for a file that holds no results."""
    runs: list[Run] = []
    for path in paths:
        header, *lines = read_results(path)[0] or [{}]
        if not lines:
            raise ValueError(f"{path} holds no answers")
        variants = summarize(header, lines)["variants"]
        for variant, summary in variants.items():
            name = variant if len(paths) == 1 else f"{path.stem}: {variant}"
            own = {line["id"]: line for line in lines if line["variant"] == variant}
            if runs:
                summary |= speed_up(list(runs[0].lines.values()), list(own.values()))
            runs.append(Run(name, len(runs), path.stem, header, own, summary))
    return runs


# ---- numbers -------------------------------------------------------------------------------------------------------


def draw_cards(runs: list[Run]) -> str:
    return '<div class="cards">' + "".join(map(draw_card, runs)) + "</div>"


def draw_card(run: Run) -> str:
    """The headline numbers of a run."""
    each = run.summary
    big = f"{each['total']} <small>answers, not judged</small>"
    if each["accuracy"] is not None:
        big = f"{each['accuracy']:.1%} <small>{show_correct(each)} correct</small>"
    rows = [(name.strip(), show(each.get(field), digits)) for name, field, digits in ROWS]
    for name, field in {"decode speed-up": "speed_up", "answer speed-up": "answer_speed_up"}.items():
        if each.get(field):
            low, high = each[f"{field}_quartiles"]
            rows.append((name, f"{each[field]:.2f} ({low:.2f} to {high:.2f})"))
    rows += [("failed questions", str(each["failed"]))] if each["failed"] else []
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows if value != "-")
    name = f"<h3>{run.key}{escape(run.name)}</h3>"
    return f'<div class="card {run.css}">{name}<div class="big">{big}</div><dl>{terms}</dl></div>'


def draw_settings(runs: list[Run]) -> str:
    """What was run: a column for every file, and a row for each setting that one of them has."""
    files = {run.file: run.header for run in runs}
    names = dict.fromkeys([*LABELS, *(name for header in files.values() for name in header["settings"])])
    machine = {
        "machine": lambda header: header["device"],
        "memory bandwidth": lambda header: f"{header['bandwidth_gb_per_s']:.0f} GB/s measured",
        "versions": lambda header: ", ".join(f"{name} {value}" for name, value in header["versions"].items()),
    }
    rows = [(LABELS.get(name, name), [show_setting(header, name) for header in files.values()]) for name in names]
    rows += [(name, [say(header) for header in files.values()]) for name, say in machine.items()]
    heading = [("", list(files))] if len(files) > 1 else []
    table = "".join(draw_row(name, values) for name, values in heading + [row for row in rows if any(row[1])])
    return f'<h2>Settings</h2><div class="wide"><table>{table}</table></div>'


def show_setting(header: dict, name: str) -> str:
    """As text; empty for what was not set, or plays no part."""
    value = header["settings"].get(name)
    if name.startswith(OF_DRAFTS) and not header["settings"].get("draft_checkpoint_path"):
        return ""
    if value is None or value is False:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else "yes" if value is True else str(value)


def draw_row(name: str, values: list[str]) -> str:
    cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f"<tr><th>{escape(name)}</th>{cells}</tr>"


def draw_bar(label: str, fraction: float | None, value: str, run: Run) -> str:
    track = f'<span class="track"><i style="width: {100 * (fraction or 0):.1f}%"></i></span>'
    label = f"{run.key}{escape(label)}"
    return f'<div class="bar {run.css}"><span>{label}</span>{track}<span>{escape(value)}</span></div>'


def draw_subjects(runs: list[Run]) -> str:
    """A bar for each run: per discipline if there are any, per subject, and all."""
    if all(run.summary["accuracy"] is None for run in runs):
        return ""
    groups: dict[str, list[str]] = {}
    for run in runs:
        parts = group_accuracy(list(run.lines.values()), run.header["judged"])
        everything = parts["disciplines"] | parts["subjects"] | {"all": run.summary}
        for name, each in everything.items():
            label = name.replace("_", " ") if name not in groups else ""
            bar = draw_bar(label, each["accuracy"], f"{show(each['accuracy'], 2)}  {show_correct(each)}", run)
            groups.setdefault(name, []).append(bar)
    order = sorted(groups, key=lambda name: (name == "all", list(groups).index(name)))
    bars = "".join(f'<div class="group">{"".join(groups[name])}</div>' for name in order)
    return f"<h2>Accuracy per subject</h2>{bars}"


def draw_histograms(runs: list[Run]) -> str:
    """The fractions of verifications by the number of draft tokens accepted."""
    parts = []
    for run in runs:
        counts = run.summary.get("accept_counts")
        if counts and sum(counts):
            fractions = [count / sum(counts) for count in counts]
            bars = [draw_bar(f"{n} accepted", fraction, f"{fraction:.1%}", run) for n, fraction in enumerate(fractions)]
            parts.append(f'<div class="group"><b>{escape(run.name)}</b>{"".join(bars)}</div>')
    return f"<h2>Draft tokens accepted per verification</h2>{''.join(parts)}" if parts else ""


def round_up(value: float) -> float:
    """The next round number: 1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10, 15, ..."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if step * power >= value)


def draw_speed(runs: list[Run]) -> str:
    """tokens/s of every question over its number of visual tokens."""
    points = {run.number: speed_points(run) for run in runs}
    every = [point for own in points.values() for point in own]
    if not every:
        return ""
    x_most, y_most = (round_up(max(column)) for column in zip(*every))
    width, height, left, bottom = PLOT
    x = lambda value: left + (width - left - 20) * value / x_most
    y = lambda value: 10 + (height - bottom - 10) * (1 - value / y_most)
    marks = []  # one path for all of a run
    for run in runs:
        path = "".join(f"M{x(n):.1f},{y(speed):.1f}{run.shape}" for n, speed in points[run.number])
        marks.append(f'<path class="mark {run.css}" d="{path}"/>')
    legend = "".join(f"<span>{run.key}{escape(run.name)}</span>" for run in runs if points[run.number])
    svg = "".join([*draw_axes(x, y, x_most, y_most), *marks])
    plot = f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="speed">{svg}</svg>'
    return f'<h2>Decode speed of each question</h2><p class="note legend">{legend}</p>{plot}'


def speed_points(run: Run) -> list[tuple[float, float]]:
    """Visual tokens and tokens/s of the questions that have both."""
    lines = [line for line in run.lines.values() if line.get("tokens_per_s") and line.get("n_visual_tokens")]
    return [(line["n_visual_tokens"], line["tokens_per_s"]) for line in lines]


def draw_axes(x: Callable, y: Callable, x_most: float, y_most: float) -> list[str]:
    """Grid lines, numbers, and what they count; x and y give the place of a value."""
    width, height, left, bottom = PLOT
    parts = []
    for i in range(6):
        at, of = x_most * i / 5, y_most * i / 5
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(of):.1f}" y2="{y(of):.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{left - 6}" y="{y(of) + 4:.1f}" text-anchor="end">{of:g}</text>')
        parts.append(f'<text x="{x(at):.1f}" y="{height - bottom + 16}" text-anchor="middle">{at:g}</text>')
    middle = (height - bottom + 10) / 2
    parts.append(f'<text x="{(width + left) / 2}" y="{height - 6}" text-anchor="middle">visual tokens</text>')
    turned = f'transform="rotate(-90 14 {middle})" text-anchor="middle"'
    return [*parts, f'<text x="14" y="{middle}" {turned}>decode speed, tokens/s</text>']


# ---- questions -----------------------------------------------------------------------------------------------------


def draw_questions(runs: list[Run], subjects: list[str]) -> str:
    ids = list(dict.fromkeys(question_id for run in runs for question_id in run.lines))
    articles = "".join(draw_question(question_id, runs, subjects) for question_id in ids)
    count = f'<p class="note count"> of {len(ids)} questions</p>'  # counted by the style sheet, hence after them
    return f'<h2>Questions</h2>{draw_filter(runs, subjects)}<div class="questions">{articles}{count}</div>'


def draw_filter(runs: list[Run], subjects: list[str]) -> str:
    """Three lists to choose from; the style sheet hides what was not chosen (filter_style)."""
    choices = {
        "Subject": {f"s{i}": subject.replace("_", " ") for i, subject in enumerate(subjects)},
        "Variant": {run.css: run.name for run in runs},
        "Verdict": {verdict: verdict for verdict in VERDICTS},
    }
    lists = [
        f'<label>{title} <select id="{title.lower()}"><option value="">all</option>'
        + "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options.items())
        + "</select></label>"
        for title, options in choices.items()
    ]
    return f'<form class="filter" autocomplete="off">{"".join(lists)}<input type="reset" value="Show all"></form>'


def filter_style(runs: list[Run], subjects: list[str]) -> str:
    """Rules that hide the questions that are not chosen. With a variant chosen, verdicts are its own.

    They look into the lists, whose content never changes: with body:has() each new question made Chromium match all of
    them again, and 900 took half a minute to open.
    """
    chosen = lambda title, value: f':has(#{title} [value="{value}"]:checked)'
    hidden = [(chosen("subject", f"s{i}"), f"article:not(.s{i})") for i in range(len(subjects))]
    for run in runs:
        hidden += [(chosen("variant", run.css), f"{what}:not(.{run.css})") for what in ("article", ".reply")]
    for verdict in VERDICTS:
        for css in ("any", *(run.css for run in runs)):
            variant = chosen("variant", css if css != "any" else "")
            hidden.append((variant + chosen("verdict", verdict), f"article:not(.{css}-{verdict})"))
    colors = [f".{run.css} {{ --run: {COLORS[run.number % len(COLORS)]}; }}" for run in runs]
    rules = [f".filter{choice} + .questions {others} {{ display: none; }}" for choice, others in hidden]
    return "\n".join(colors + rules)


def verdict_of(line: dict) -> str | None:
    """None of VERDICTS: the benchmark judges nothing."""
    return "failed" if "error" in line else {True: "right", False: "wrong", None: None}[line.get("correct")]


def draw_question(question_id: str, runs: list[Run], subjects: list[str]) -> str:
    """Images beside the question, its right answer and the reply of each run."""
    lines = [(run, run.lines[question_id]) for run in runs if question_id in run.lines]
    pictures = next((line["pictures"] for _, line in lines if line.get("pictures")), [])
    images = "".join(f'<img loading="lazy" alt="picture {i}" src="{escape(p)}">' for i, p in enumerate(pictures, 1))
    asked = next((line["question"] for _, line in lines if "question" in line), [])
    answer = right_answer(lines[0][1])
    parts = [f'<p class="note">{escape(question_id)} ({escape(lines[0][1]["group"])})</p>']
    parts += [f"<pre>{escape(text)}</pre>" for text in asked]
    parts += [f"<p>Right answer: <b>{escape(answer)}</b></p>"] if answer else []
    parts += [draw_reply(run, line) for run, line in lines]
    images = f"<div>{images}</div>" if images else ""
    verdicts = {run.css: verdict_of(line) for run, line in lines}
    classes = [f"s{subjects.index(lines[0][1]['group'])}", *verdicts, *([] if images else ["plain"])]
    classes += [f"{css}-{verdict}" for own, verdict in verdicts.items() if verdict for css in ("any", own)]
    return f'<article class="{" ".join(dict.fromkeys(classes))}">{images}<div>{"".join(parts)}</div></article>'


def right_answer(line: dict) -> str:
    """The right answer as text; for a letter, the option's text too."""
    answers = line.get("answer", [])
    answers = answers if isinstance(answers, list) else [answers]
    options = line.get("index2ans", {})
    return " or ".join(f"{answer}: {options[answer]}" if answer in options else str(answer) for answer in answers)


def draw_reply(run: Run, line: dict) -> str:
    verdict = {True: '<span class="right">✓ right</span>', False: '<span class="wrong">✗ wrong</span>'}
    marks = [verdict[line["correct"]]] if "correct" in line else []
    marks += ['<span class="wrong">failed</span>'] if "error" in line else []
    marks += [f"read as {escape(str(line['parsed']))}"] if "parsed" in line else []
    marks += ["guessed"] if line.get("guessed") else []
    marks += [f"{line['tokens_per_s']:.1f} tokens/s"] if line.get("tokens_per_s") else []
    replies = line.get("response", line.get("error", ""))
    texts = [*(replies if isinstance(replies, list) else [replies]), line.get("program_error", "")]
    body = "".join(f"<pre>{escape(text)}</pre>" for text in texts if text)
    note = f'<span class="note">{escape(run.name)}: {", ".join(marks)}</span>'
    return f'<div class="reply {run.css}">{note}{body}</div>'


# ---- the page ------------------------------------------------------------------------------------------------------


def draw_page(runs: list[Run]) -> str:
    title = " and ".join(dict.fromkeys(run.header["settings"]["bench_name"] for run in runs))
    body = [draw_cards(runs), draw_settings(runs), draw_subjects(runs), draw_histograms(runs), draw_speed(runs)]
    subjects = sorted({line["group"] for run in runs for line in run.lines.values()})
    body.append(draw_questions(runs, subjects))
    style = STYLE + filter_style(runs, subjects)
    # The policy forbids whatever the page does not need, the network and scripts above all.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}: accuracy and speed</title><style>{style}</style></head>
<body><h1>{escape(title)}: accuracy and speed</h1>{"".join(body)}</body></html>
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files that evaluate.py --output wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    args = parser.parse_args(argv)
    try:
        args.output.write_text(draw_page(load_runs(args.results)), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
