"""README.md, CONTRIBUTING.md, SECURITY.md, docs/: what they name exists, their figures are those of benchmarks/."""

import importlib
import json
import re
from pathlib import Path

import pytest

import evaluate
import generate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST_COMMAND = next(line.strip() for line in README.splitlines() if "pytest" in line and line.startswith("    pip"))
# Flags of other programs.
FOREIGN = {"--standalone", "--nproc_per_node", "--check", "--help", "--fuzz"}


def help_of(main, capsys) -> str:
    with pytest.raises(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


def table(text: str) -> list[list[str]]:
    """The cells of every line of a table."""
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have as targets of links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(README.split()) <= 1500


def test_readme_leads_to_every_page():
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT)})" in README


def test_readme_lists_every_file():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.cpp")]:
        assert f"`{file.name}`" in README, file.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Those in a folder of ours; checkpoints/ is also where downloads go, so there only the tiny ones."""
    folders = r"(?:(?:scripts|tests|docs|benchmarks|examples)/|checkpoints/(?:tiny-|scenes))[\w./-]*"
    for name in re.findall(rf"(?<![\w/.]){folders}", page.read_text()):
        assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_flags_exist(page, capsys):
    known = help_of(generate.main, capsys) + help_of(evaluate.main, capsys)
    for file in [ROOT / "quantize.py", *(ROOT / "scripts").rglob("*.py")]:
        known += "".join(re.findall(r'add_argument\(\s*(?:"-\w",\s*)?"(--\w+)"', file.read_text()))
    flags = set(re.findall(r"(?<![\w-])--[a-z]\w+", page.read_text()))
    assert flags - FOREIGN <= set(re.findall(r"--\w+", known))


def test_every_flag_is_in_the_docs(capsys):
    flags = set(re.findall(r"--[a-z]\w+", help_of(generate.main, capsys) + help_of(evaluate.main, capsys)))
    assert flags <= set(re.findall(r"--[a-z]\w+", "".join(page.read_text() for page in PAGES)))


def test_walk_names_what_exists():
    """CONTRIBUTING.md leads newcomers to functions and classes, as `module.name`."""
    names = re.findall(r"`(\w+)\.(\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    named = [(module, name) for module, name in names if name not in ("py", "md", "json")]
    assert len(named) >= 5
    assert all(hasattr(importlib.import_module(module), name) for module, name in named)


def test_one_test_command():
    for name in ("CONTRIBUTING.md", ".ci/run"):
        assert TEST_COMMAND.replace("pip install ", "") in (ROOT / name).read_text().replace("pip install -q ", "")


def test_figures_of_the_benchmark():
    """Each tokens/s of the tables was measured, and the README's table is a part of the other."""
    files = (ROOT / "benchmarks").glob("*.json")
    runs = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    measured = {(run["settings"]["model"], f"{run['tokens_per_s']:.1f}") for run in runs}
    shown = {}
    for name in ("README.md", "docs/performance.md"):
        shown[name], model = set(), ""
        for row in table((ROOT / name).read_text()):
            model = row[0] or model
            if len(row) >= 6 and re.fullmatch(r"[\d.]+", row[2]):
                shown[name].add((model, row[2]))
    assert shown["README.md"] < shown["docs/performance.md"] == measured


def test_figures_of_perplexity():
    lines = (ROOT / "benchmarks/perplexity.jsonl").read_text().splitlines()
    measured = {f"{json.loads(line)['perplexity']:.3f}" for line in lines}
    page = (ROOT / "docs/quantization.md").read_text()
    shown = set(re.findall(r"\b\d\.\d{3}\b", page))
    assert shown and shown <= measured
