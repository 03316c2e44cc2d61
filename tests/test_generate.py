"""The command line: streams, exit status, flags, requests, conversations, and one line for every mistake."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import generate
from images import load_image
from tests.helpers.pictures import draw

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(pair, capsys):
    """Run the program in this process; returns (status, stdout, stderr). The family names the checkpoint."""

    def call(*flags, family: str | None = "qwen2.5-vl") -> tuple[int, str, str]:
        checkpoint = ["--checkpoint_path", str(pair(family).path), "--dtype", "float32"] if family else []
        status = generate.main([*checkpoint, "--device", "cpu", "--max_new_tokens", "8", *map(str, flags)])
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return call


def test_streams(run, pictures):
    """The text and nothing else on stdout, one newline at the end; the rest on stderr."""
    status, out, err = run("--prompt", "Hi", "--image", pictures["small"])
    as_json = json.loads(run("--prompt", "Hi", "--image", pictures["small"], "--json")[1])
    assert status == 0
    assert out == as_json["text"] + "\n"
    assert "tokens/s" in err and "GB/s" in err


def test_json_fields(run, pair, pictures):
    status, out, _ = run("--prompt", "Hi", "--image", pictures["square"], "--json", "--num_samples", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(lines) == 2
    assert lines[0]["token_ids"] == lines[1]["token_ids"], "greedy samples are equal"
    fields = {"text", "token_ids", "prompt_token_ids", "finish_reason", "n_visual_tokens"}
    assert fields | {"time_to_first_token_s", "tokens_per_s"} <= set(lines[0])
    family = pair("qwen2.5-vl")
    assert lines[0]["n_visual_tokens"] == 64 == lines[0]["prompt_token_ids"].count(family.model.args.image_token_id)
    assert lines[0]["text"] == family.tokenizer.decode(lines[0]["token_ids"])


def test_samples_are_separated_by_a_blank_line_and_seeded(run):
    flags = ["--prompt", "Hi", "--num_samples", 2, "--temperature", 1.5, "--json"]
    first, second = (json.loads(line)["token_ids"] for line in run(*flags)[1].splitlines())
    assert first != second
    assert [json.loads(line)["token_ids"] for line in run(*flags)[1].splitlines()] == [first, second]
    other = [json.loads(line)["token_ids"] for line in run(*flags, "--seed", 7)[1].splitlines()]
    assert other != [first, second]
    texts = [json.loads(line)["text"] for line in run(*flags)[1].splitlines()]
    assert run(*flags[:-1])[1] == "\n\n".join(texts) + "\n"


def test_system_raw_and_placeholders(run, pair, pictures):
    tokenizer = pair("qwen2.5-vl").tokenizer

    def prompt_ids(*flags):
        return json.loads(run(*flags, "--json")[1])["prompt_token_ids"]

    assert prompt_ids("--prompt", "Hi there", "--raw") == tokenizer.encode("Hi there")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert prompt_ids("--prompt", "Hi", "--system", "Be brief.") == tokenizer.encode_chat(messages)
    image = {"type": "image"}
    for prompt, parts in {
        "Hi": [image, image, {"type": "text", "text": "Hi"}],
        "A <image> B <image>": [{"type": "text", "text": "A "}, image, {"type": "text", "text": " B "}, image],
    }.items():
        ids = prompt_ids("--prompt", prompt, "--image", pictures["small"], "--image", pictures["small"])
        once = tokenizer.encode_chat([{"role": "user", "content": parts}])
        expected = [x for token in once for x in [token] * (4 if token == tokenizer.image_id else 1)]
        assert ids == expected


def test_placeholder_is_text_for_a_text_model(run, pair):
    ids = json.loads(run("--prompt", "an <image> tag", "--raw", "--json", family="qwen2")[1])["prompt_token_ids"]
    assert ids == pair("qwen2").tokenizer.encode("an <image> tag")


def test_synthetic_prompt(run, pictures):
    result = json.loads(run("--prompt", 40, "--json", "--max_new_tokens", 30)[1])
    assert len(result["prompt_token_ids"]) == 40 and len(result["token_ids"]) == 30
    result = json.loads(run("--prompt", 10, "--image", pictures["small"], "--json")[1])
    assert len(result["prompt_token_ids"]) == 10 + 4 + 2, "the picture's four tokens between their borders, then ten"


def test_requests(run, pair, pictures, tmp_path):
    image = {"type": "image", "path": str(pictures["small"])}
    text = {"type": "text", "text": "What is it?"}
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [image, text]}], "max_new_tokens": 3},
        {"prompt": "What is it?", "images": [str(pictures["small"])]},
        {"prompt": "Hi", "raw": True},
        {"prompt": "What?", "images": ["nowhere.png"]},
        {"messages": [{"role": "nobody", "content": "Hi"}]},
        {"messages": "Hi"},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"prompt": "Hi", "surprise": 1},
        {"prompt": ["Hi"]},
        {"prompt": "Hi", "images": "a.png"},
        {"messages": [{"role": "user", "content": [image | {"path": "nowhere.png", "image": "no picture"}]}]},
        {"prompt": "Hi", "max_new_tokens": "many"},
        {"prompt": "Hi", "max_new_tokens": 0},
        ["Hi"],
        {"prompt": "Hi"},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n{broken\n\n", encoding="utf-8")
    status, out, err = run("--requests", file)
    results = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and len(results) == len(lines) + 1
    assert [i for i, result in enumerate(results) if "error" in result] == [*range(4, 15), 16]
    assert all(set(result) == {"error"} and result["error"] for result in results if "error" in result)
    assert results[0]["token_ids"] == results[15]["token_ids"], "what came between must not matter"
    assert len(results[1]["token_ids"]) == 3
    assert results[1]["prompt_token_ids"] == results[2]["prompt_token_ids"]
    assert results[1]["token_ids"] == results[2]["token_ids"][:3]
    assert run("--prompt", "Hi", "--json")[1].startswith('{"text": ' + json.dumps(results[0]["text"]))
    assert "Traceback" not in err


def converse(run, monkeypatch, lines: list[str], *flags, **more):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run("--interactive", *flags, **more)


def test_interactive(run, pair, pictures, monkeypatch):
    """A question after an image and an answer: as one prompt that holds all of it."""
    lines = [f"/image {pictures['square']}", "What?", "", "And then?", "/reset", "What?", "/quit", "Never read"]
    status, out, err = converse(run, monkeypatch, lines)
    pair = pair("qwen2.5-vl")
    content = [{"type": "image", "path": str(pictures["square"])}, {"type": "text", "text": "What?"}]
    messages, expected = [{"role": "user", "content": content}], []
    for question in ("And then?", None):
        tokens, images = pair.tokenizer.encode_chat(messages), [load_image(pictures["square"])]
        pair.engine.forget()
        ids = generate.generate(pair.engine, tokens, images, 8, pair.tokenizer.stop_ids)["token_ids"]
        expected.append(pair.tokenizer.decode(ids))
        reply = [token for token in ids if token not in pair.tokenizer.stop_ids]
        messages.append({"role": "assistant", "content": [{"type": "tokens", "ids": reply}]})
        messages.append({"role": "user", "content": question})
    expected.append(json.loads(run("--prompt", "What?", "--json")[1])["text"])
    assert status == 0 and out == "".join(text + "\n" for text in expected)


def test_interactive_survives_mistakes(run, monkeypatch):
    lines = ["/image nowhere.png", "What?", "an <image> and <image>", "What?"]
    status, out, err = converse(run, monkeypatch, lines)
    assert status == 0
    assert "no such image: nowhere.png" in err and "2 <image> placeholders" in err
    assert out.count("\n") >= 2


def test_interrupt_stops_the_answer_and_not_the_program(run, monkeypatch):
    """Ctrl-C in the middle of an answer: the generated tokens stay in the conversation, which continues."""
    decode, calls = generate.decode, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(generate, "decode", interrupted)
    status, out, err = converse(run, monkeypatch, ["What?", "And then?", "/quit"])
    assert status == 0 and len(calls) > 4 and out.count("\n") >= 2


def test_growing_conversation_outgrows_the_cache(run, monkeypatch):
    monkeypatch.setattr(generate, "CACHE_BUCKET", 64)
    status, out, err = converse(run, monkeypatch, ["What?"] * 6, family="qwen2")
    assert status == 0 and out.count("\n") >= 6


def test_profile(run, tmp_path):
    assert run("--prompt", "Hi", "--profile", tmp_path / "trace.json")[0] == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def write_bomb(path: Path) -> Path:
    """A PNG of a few hundred bytes that claims to be 60000 pixels on each side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (60000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    return path


def make_bad_images(folder: Path) -> dict[str, Path]:
    draw(300, 300).save(folder / "whole.png")
    (folder / "truncated.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (4100, 20)).save(folder / "long.png")
    write_bomb(folder / "bomb.png")
    return {path.stem: path for path in folder.iterdir()} | {"nowhere": folder / "nowhere.png", "folder": folder}


BAD_IMAGES = ["truncated", "text", "empty", "long", "bomb", "nowhere", "folder"]


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("loaded ")]
    assert (status, out, len(lines)) == (2, "", 1), result
    assert "Traceback" not in err and all(word in err for word in words), err


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image(run, tmp_path, kind):
    path = make_bad_images(tmp_path)[kind]
    assert_refused(run("--prompt", "Hi", "--image", path), "image")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "   "], "empty"),
        (["--prompt", "0"], "0 tokens"),
        (["--prompt", "99999999999999"], "tokens"),
        (["--prompt", "a <image> b <image>"], "placeholder"),
        (["--prompt", "a <image> b <image>", "--image", "{small}"], "placeholder"),
        (["--prompt", "a <image> b", "--image", "{small}", "--image", "{small}"], "placeholder"),
        (["--prompt", "5000"], "context"),
        (["--prompt", "100", "--max_cache_size", "64"], "--max_cache_size"),
        (["--prompt", "100", "--max_cache_size", "9" * 16], "do not fit into memory"),
        (["--prompt", "Hi", "--device", "abacus"], "--device"),
        (["--prompt", "Hi", "--device", "cuda:77"], "--device"),
        (["--prompt", "Hi", "--dtype", "int3"], "--dtype"),
        (["--prompt", "Hi", "--temperature", "-1"], "--temperature"),
        (["--prompt", "Hi", "--temperature", "nan"], "--temperature"),
        (["--prompt", "Hi", "--top_k", "0"], "--top_k"),
        (["--prompt", "Hi", "--max_new_tokens", "0"], "--max_new_tokens"),
        (["--prompt", "Hi", "--num_samples", "0"], "--num_samples"),
        (["--prompt", "Hi", "--mm_prune_ratio", "1.5"], "--mm_prune_ratio"),
        (["--prompt", "Hi", "--mm_prune_method", "nice"], "--mm_prune_method"),
        (["--prompt", "Hi", "--speculate_k", "0"], "--speculate_k"),
        (["--prompt", "Hi", "--draft_checkpoint_path", "nowhere.pth"], "nowhere.pth"),
        (["--prompt", "Hi", "--max_cache_size", "-5"], "--max_cache_size"),
        (["--prompt", "Hi", "--surprise"], "--surprise"),
        (["--requests", "nowhere.jsonl"], "nowhere.jsonl"),
        ([], "nothing to do"),
    ],
)
def test_bad_flags(run, pictures, flags, words):
    assert_refused(run(*(flag.format(**pictures) for flag in flags)), words)


def test_image_for_a_text_model(run, pictures):
    assert_refused(run("--prompt", "Hi", "--image", pictures["small"], family="qwen2"), "image")
    assert_refused(run("--prompt", "Hi", "--raw", "--image", pictures["small"], family="qwen2"), "image")


@pytest.fixture
def broken_copy(pair, tmp_path):
    """A copy of the text checkpoint's folder, for breaking."""
    source = pair("qwen2").folder
    for name in ("model.pth", "params.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-300])


def write_bytes(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def change_params(folder):
    params = json.loads((folder / "params.json").read_text())
    params["model"]["dim"] = 128
    (folder / "params.json").write_text(json.dumps(params))


def drop_tensor(folder):
    state = torch.load(folder / "model.pth")
    del state["layers.1.attention.wo.weight"]
    torch.save(state, folder / "model.pth")


def add_tensor(folder):
    torch.save(torch.load(folder / "model.pth") | {"surprise": torch.zeros(1)}, folder / "model.pth")


class Payload:
    """What a malicious pickle would do."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "damage",
    [
        remove("model.pth"),
        remove("params.json"),
        remove("tokenizer.model"),
        truncate("model.pth"),
        truncate("params.json"),
        truncate("tokenizer.model"),
        write_bytes("model.pth", b""),
        write_bytes("model.pth", b"no checkpoint"),
        write_bytes("params.json", b"{}"),
        write_bytes("params.json", b"[]"),
        write_bytes("tokenizer.model", b""),
        change_params,
        drop_tensor,
        add_tensor,
        lambda folder: torch.save([1, 2], folder / "model.pth"),
        lambda folder: torch.save({"norm.weight": Payload()}, folder / "model.pth"),
    ],
)
def test_damaged_checkpoint(run, broken_copy, damage, monkeypatch):
    monkeypatch.chdir(broken_copy)
    damage(broken_copy)
    assert_refused(run("--prompt", "Hi", "--checkpoint_path", broken_copy / "model.pth", family=None))
    assert not (broken_copy / "executed").exists()


def test_program_is_a_program(pair):
    """In a process of its own: streams apart, the text is streamed piece by piece, and Ctrl-C ends it with 130."""
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint_path", str(pair("qwen2").path)]
    done = subprocess.run([*command, "--prompt", "Hi", "--max_new_tokens", "5"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n") and "tokens/s" in done.stderr
    done = subprocess.run([*command, "--prompt", ""], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 2)
    process = subprocess.Popen(
        [*command, "--prompt", "20", "--max_new_tokens", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell sets it to be ignored
    )
    assert process.stdout.read(1), "the first character comes before the answer is complete"
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(timeout=30) == 130 and time.monotonic() - started < 10
    assert b"Traceback" not in process.stderr.read()
