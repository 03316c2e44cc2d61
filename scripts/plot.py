"""Draw benchmarks/*.json as an SVG: the decode speed of each configuration against the limit of the memory bandwidth.

    python scripts/plot.py benchmarks/amd-epyc.json -o benchmarks/amd-epyc.svg

Knows the lines that scripts/benchmark.py appends; the last of several lines for one configuration counts. A bar is a
line's tokens/s, its tick the limit: the read bandwidth of the same run divided by the bytes of weights per token.
"""

import argparse
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, LEFT, ROW, GAP = 860, 250, 26, 34
COLORS = {"eager": "#9db4c8", "compile": "#4f81a8", "int8": "#3f9b7a", "int4": "#d08a2e", "draft": "#a8506b"}


def bars_of(line: dict) -> list[tuple[str, str, float, float | None, str]]:
    """Label, kind, tokens/s, limit and command of a line's bars: our speed, with a draft, and the peer's."""
    settings = line["settings"]
    how = [settings.get("quantize") or settings["dtype"], "compiled" if settings.get("compile") else "eager"]
    kind = settings.get("quantize") or ("compile" if settings.get("compile") else "eager")
    limit = line["bandwidth"]["read_gb_s"] / line["weights_gb"]
    bars = [(", ".join(how), kind, line["tokens_per_s"], limit, line["command"])]
    if "draft" in line:
        name = f"{', '.join(how)}, draft (estimated)"
        bars.append((name, "draft", line["draft"]["tokens_per_s"], None, line["command"]))
    for peer in ("transformers", "llama.cpp"):
        if peer in line:
            what = line[peer].get("type") or f"{settings['dtype']}, best of two"
            bars.append((f"{peer} {what}", "peer", line[peer]["tokens_per_s"], None, line["command"]))
    return bars


def read(paths: list[Path]) -> dict[tuple[str, str], dict]:
    """(model, machine) -> label -> bar. Raises ValueError for a file of anything else."""
    groups: dict = {}
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                group = groups.setdefault((line["settings"]["model"], line["machine"]), {})
                for bar in bars_of(line):
                    group[bar[0]] = bar
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path} has a line that scripts/benchmark.py did not write") from None
    if not groups:
        raise ValueError("nothing to draw")
    return groups


def draw(groups: dict[tuple[str, str], dict]) -> str:
    order = [*COLORS, "peer"]
    parts, y = [], 10
    for (model, machine), group in groups.items():
        bars = sorted(group.values(), key=lambda bar: order.index(bar[1]))
        scale = (WIDTH - LEFT - 90) / max(max(speed, limit or 0) for _, _, speed, limit, _ in bars)
        y += GAP
        parts.append(
            f'<text x="10" y="{y - 12}" font-weight="bold">{escape(model)} on {escape(machine)}: tokens/s</text>'
        )
        for label, kind, speed, limit, command in bars:
            color = COLORS.get(kind, "#c4c4c4")
            parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
            parts.append(
                f'<rect x="{LEFT}" y="{y + 2}" width="{speed * scale:.1f}" height="{ROW - 8}" fill="{color}">'
                f"<title>{escape(command)}</title></rect>"
            )
            end = speed * scale
            if limit:
                x = LEFT + limit * scale
                parts.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + ROW - 4}" stroke="#b00" stroke-width="2"/>'
                )
                end = max(end, limit * scale) if abs(end - limit * scale) < 60 else end
            parts.append(f'<text x="{LEFT + end + 5:.1f}" y="{y + 15}">{speed:.1f}</text>')
            y += ROW
    y += 24
    note = "red: the read bandwidth measured in the same run, divided by the bytes of weights per token"
    parts.append(f'<text x="10" y="{y}" fill="#666">{note}</text>')
    size = f'width="{WIDTH}" height="{y + 12}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return "\n".join((head, f'<rect {size} fill="white"/>', *parts, "</svg>", ""))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="files that scripts/benchmark.py --out wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the SVG")
    args = parser.parse_args(argv)
    try:
        args.output.write_text(draw(read(args.files)), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
