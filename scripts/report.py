"""One HTML page of one or several results files of evaluate.py: numbers, bars, and every question with its images.

python scripts/report.py RESULTS.jsonl [MORE.jsonl ...] -o report.html

Knows results files and HTML. Does not know models or benchmarks. The page needs no network and no JavaScript.
"""

import argparse
import math
import sys
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
PLOT = (640, 300, 52, 40)  # width, height, left and bottom margin, in SVG units
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 0 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 1.2rem 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.note { opacity: .75; font-size: .85rem; margin: .2rem 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-top: 4px solid var(--run); border-radius: 8px; padding: .6rem .8rem; }
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
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; background: var(--run); }
svg { width: 100%; height: auto; max-width: 45rem; } svg text { font-size: 12px; fill: currentColor; }
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
    color: str
    header: dict
    lines: dict[str, dict]  # by the question's id, in their order
    summary: dict

    @property
    def style(self) -> str:
        return f'style="--run: {self.color}"'


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
            runs.append(Run(name, COLORS[len(runs) % len(COLORS)], header, own, summary))
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
    return (
        f'<div class="card" {run.style}><h3>{escape(run.name)}</h3><div class="big">{big}</div><dl>{terms}</dl></div>'
    )


def draw_settings(runs: list[Run]) -> str:
    """What was run, once for every file."""
    notes = []
    for header in {id(run.header): run.header for run in runs}.values():
        settings = {name: value for name, value in header["settings"].items() if value not in (None, False)}
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
        versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
        machine = f"{header['device']}, {header['bandwidth_gb_per_s']:.0f} GB/s measured, {versions}"
        notes.append(f'<p class="note">{escape(machine)}. {escape(text)}</p>')
    return "".join(notes)


def draw_bar(label: str, fraction: float | None, value: str, run: Run) -> str:
    track = f'<span class="track"><i style="width: {100 * (fraction or 0):.1f}%"></i></span>'
    return f'<div class="bar" {run.style}><span>{escape(label)}</span>{track}<span>{escape(value)}</span></div>'


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
    points = [
        (line["n_visual_tokens"], line["tokens_per_s"], run)
        for run in runs
        for line in run.lines.values()
        if line.get("tokens_per_s") and line.get("n_visual_tokens")
    ]
    if not points:
        return ""
    width, height, left, bottom = PLOT
    x_most, y_most = (round_up(max(point[i] for point in points)) for i in (0, 1))
    x = lambda value: left + (width - left - 20) * value / x_most
    y = lambda value: 10 + (height - bottom - 10) * (1 - value / y_most)
    marks = []
    for i in range(6):
        at, of = x_most * i / 5, y_most * i / 5
        marks.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(of):.1f}" y2="{y(of):.1f}" stroke="#8884"/>')
        marks.append(f'<text x="{left - 6}" y="{y(of) + 4:.1f}" text-anchor="end">{of:g}</text>')
        marks.append(f'<text x="{x(at):.1f}" y="{height - bottom + 16}" text-anchor="middle">{at:g}</text>')
    marks.append(f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">visual tokens of a question</text>')
    marks += [
        f'<circle cx="{x(n):.1f}" cy="{y(speed):.1f}" r="3.5" fill="{run.color}" fill-opacity="0.6"/>'
        for n, speed, run in points
    ]
    legend = " ".join(f'<span {run.style}><i class="dot"></i> {escape(run.name)}</span>' for run in runs)
    plot = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="speed">{"".join(marks)}</svg>'
    return f'<h2>Decode speed (tokens/s) against visual tokens</h2><p class="note">{legend}</p>{plot}'


# ---- questions -----------------------------------------------------------------------------------------------------


def draw_questions(runs: list[Run]) -> str:
    ids = list(dict.fromkeys(question_id for run in runs for question_id in run.lines))
    return f"<h2>{len(ids)} questions</h2>" + "".join(draw_question(question_id, runs) for question_id in ids)


def draw_question(question_id: str, runs: list[Run]) -> str:
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
    return f"<article{'' if images else ' class=plain'}>{images}<div>{''.join(parts)}</div></article>"


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
    return (
        f'<div class="reply" {run.style}><span class="note">{escape(run.name)}: {", ".join(marks)}</span>{body}</div>'
    )


# ---- the page ------------------------------------------------------------------------------------------------------


def draw_page(runs: list[Run]) -> str:
    title = " and ".join(dict.fromkeys(run.header["settings"]["bench_name"] for run in runs))
    body = [draw_cards(runs), draw_settings(runs), draw_subjects(runs), draw_histograms(runs), draw_speed(runs)]
    # The policy forbids whatever the page does not need, the network and scripts above all.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}: accuracy and speed</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}: accuracy and speed</h1>{"".join(body)}{draw_questions(runs)}</body></html>
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
