"""The page of results: complete, self-contained, and readable in a real browser, on a phone, without JavaScript."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import evaluate
from scripts import report
from tests.helpers import bench

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<script>alert(1)</script> & "quotes" <img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text = [], ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def results(monkeypatch, tmp_path, capsys) -> list[Path]:
    """Two runs of MMMU with scripted replies, the second with a hostile one, and a failed question in both."""
    pytest.importorskip("pyarrow")
    items = bench.make_subject("Math")
    items[9]["options"] = "[]"
    bench.write_parquet(tmp_path / "data/Math/validation-00000-of-00001.parquet", items)
    (tmp_path / "checkpoint").mkdir()
    paths = []
    for name, reply in {"first": "(B) it is", "second": HOSTILE}.items():
        answer = lambda *args, reply=reply, **options: bench.stub_result(reply) | {"accept_counts": [1, 0, 3]}
        bench.install_stub(monkeypatch, tmp_path / "checkpoint", answer)
        paths.append(tmp_path / f"{name}.jsonl")
        flags = ["--bench_name", "MMMU", "--data_dir", tmp_path / "data", "--device", "cpu", "--output", paths[-1]]
        assert evaluate.main([*map(str, flags)]) == 0
    capsys.readouterr()
    return paths


def make_page(paths: list[Path]) -> Path:
    output = paths[0].with_name("report.html")
    assert report.main([*map(str, paths), "-o", str(output)]) == 0
    return output


def test_page_of_two_runs(results):
    page = Page(make_page(results))
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == sum((1, 1, 3, 3, 4, 1, 1, 7, 1)), "every picture of every question that could be asked"
    assert sum(tag == "article" for tag, _ in page.tags) == 10
    assert page.text.count("✓ right") + page.text.count("✗ wrong") == 18 and page.text.count("failed") >= 2
    for text in (
        "first: target",
        "second: target",
        "Math",
        "Science",
        "2 accepted",
        "75.0%",
        "B: $300",
        "without options",
    ):
        assert text in page.text, text
    assert page.html.count("<circle") == 18


def test_page_needs_nothing_else(results):
    """No script, no link, no picture from elsewhere; a model's reply is text and never markup."""
    page = Page(make_page(results))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "a"}
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert "<script>alert(1)</script>" in page.text, "shown as it is"


def test_bad_files(results, tmp_path, capsys):
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("")
    other.write_text('{"id": "validation_Math_1"}\n')
    header_only = tmp_path / "header.jsonl"
    header_only.write_text(results[0].read_text().split("\n")[0] + "\n")
    for path in (empty, other, header_only, tmp_path / "nowhere.jsonl", tmp_path):
        assert report.main([str(path), "-o", str(tmp_path / "x.html")]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x.html").exists()
    assert report.main([str(results[0]), "-o", str(tmp_path / "no/such/x.html")]) == 2


def test_answers_without_verdicts_or_pictures(monkeypatch, tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    bench.write_jsonl(tmp_path / "question.jsonl", bench.CONVERSATIONS)
    bench.install_stub(monkeypatch, tmp_path / "checkpoint", lambda *args, **options: bench.stub_result("well, four"))
    output = tmp_path / "out.jsonl"
    flags = ["--bench_name", "mt_bench", "--data_dir", tmp_path, "--device", "cpu", "--output", output]
    assert evaluate.main([*map(str, flags)]) == 0
    page = Page(make_page([output]))
    assert "not judged" in page.text and page.text.count("well, four") == 4 and "Accuracy per subject" not in page.text


def browse(*flags: str) -> str:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here")
def test_in_a_browser(results, tmp_path):
    """Both runs' bars are painted. There is no script to switch off: the page's own policy forbids them."""
    picture = tmp_path / "page.png"
    browse(f"--screenshot={picture}", "--window-size=1000,1600", f"file://{make_page(results)}")
    with Image.open(picture) as shot:
        colors = {color for _, color in shot.convert("RGB").getcolors(1 << 24)}
    assert all(tuple(bytes.fromhex(color[1:])) in colors for color in report.COLORS[:2])


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here")
def test_on_a_phone_nothing_sticks_out(results, tmp_path):
    """In a frame as wide as a phone the page is not wider than the frame."""
    page, frame = make_page(results), tmp_path / "frame.html"
    script = "document.title = 'w' + f.contentDocument.documentElement.scrollWidth"
    frame.write_text(f'<iframe id="f" src="{page.name}" style="width: 360px; border: 0" onload="{script}"></iframe>')
    shown = browse("--allow-file-access-from-files", "--dump-dom", "--virtual-time-budget=3000", f"file://{frame}")
    assert "<title>w360</title>" in shown
