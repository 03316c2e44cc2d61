"""A process that answers for long: memory and speed stay what they were. With `--fuzz` only, as it takes minutes."""

import json
import statistics
from pathlib import Path

import cli

import pytest

import generate
from tests.helpers.pictures import draw

N_REQUESTS, PERIOD, N_TOKENS = 1000, 100, 10_000


@pytest.fixture(autouse=True)
def only_if_asked(request):
    if not request.config.getoption("fuzz"):
        pytest.skip("--fuzz N runs it")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def write_requests(folder: Path) -> Path:
    """A hundred requests with one or two pictures of a hundred sizes, ten times over."""
    lines = []
    for i in range(PERIOD):
        paths = [folder / f"{i}-{j}.png" for j in range(1 + i % 2)]
        for j, path in enumerate(paths):
            draw(60 + 3 * i, 360 - 3 * i, seed=j).save(path)
        lines.append(json.dumps({"prompt": "Describe the image.", "images": [*map(str, paths)], "max_new_tokens": 30}))
    (folder / "requests.jsonl").write_text("\n".join(lines * (N_REQUESTS // PERIOD)))
    return folder / "requests.jsonl"


def test_a_thousand_requests_with_pictures(tmp_path, monkeypatch, capsys):
    path, memory, speed = write_requests(tmp_path), [], []

    def note(result, engine, draft) -> None:
        memory.append(resident_bytes())
        speed.append(result["tokens_per_s"])

    monkeypatch.setattr(generate, "report", note)
    assert generate.main(["--device", "cpu", "--requests", str(path)]) == 0
    first, last = (statistics.median(speed[i : i + PERIOD]) for i in (0, N_REQUESTS - PERIOD))
    growth = max(memory[50:]) / memory[49] - 1
    with capsys.disabled():
        print(f"\n{N_REQUESTS} requests: memory {memory[49] / 2**20:.0f} MiB, then {growth:+.2%}; tokens/s {first:.1f}")
        print(f"(median of the first {PERIOD}), {last:.1f} (of the last): {last / first - 1:+.1%}")
    assert growth < 0.01
    assert last > 0.95 * first


def test_ten_thousand_tokens_in_an_answer(capsys):
    """Beyond the context that the tiny model was trained for: what it says does not matter here."""
    engine, tokenizer = generate.load(cli.DEFAULT_CHECKPOINT)
    engine.model.args.max_seq_len = 2 * N_TOKENS
    memory = []
    show = lambda text, ids: memory.append(resident_bytes())
    result = generate.answer(engine, tokenizer, {"prompt": 20}, max_new_tokens=N_TOKENS, show=show)
    assert len(result["token_ids"]) == N_TOKENS
    growth = max(memory[50:]) / memory[49] - 1
    with capsys.disabled():
        print(f"\n{N_TOKENS} tokens: {memory[49] / 2**20:.0f} MiB after 50, then {growth:+.2%}")
    assert growth < 0.01
