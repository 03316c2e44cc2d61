"""Disks that fill up, folders that cannot be written to, processes that are killed, files that change under a reader.

Each fault happens in a forked child. `--fuzz N` kills each command at 20 random moments in place of 3.
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cli

import huggingface_hub
import pytest
import torch

import evaluate
import generate
import quantize
from scripts import convert_hf_checkpoint, download
from scripts.results import read_results
from tests.helpers import bench, hub

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def start(command: Callable[[], int | None]) -> tuple[int, int]:
    """The process that runs the command, whose status is the command's; and a pipe with its stderr."""
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        return child, reads
    status = 1
    try:
        os.dup2(writes, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        status = command() or 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(command: Callable[[], int | None]) -> tuple[int, list[str]]:
    """Its status, and the lines of its stderr."""
    child, reads = start(command)
    with open(reads) as err:
        lines = err.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


def main_of(main: Callable, *flags: str | Path) -> Callable[[], int | None]:
    """A command's main(), which reads sys.argv."""

    def call():
        sys.argv = ["command", *map(str, flags)]
        return main()

    return call


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory) -> Path:
    return hub.make_qwen_text(tmp_path_factory.mktemp("faults") / "hub", tied=True)[0]


class Case:
    """A command with what it leaves: finals are the names of finished files; done says whether they are."""

    def __init__(self, command: Callable, folder: Path, finals: dict[str, Callable[[Path], object]]):
        self.command, self.folder, self.finals = command, folder, finals

    def check(self, complete: bool) -> None:
        """No final name holds something half-written."""
        for name, read in self.finals.items():
            if complete or (self.folder / name).exists():
                read(self.folder / name)


def read_state(path: Path) -> dict:
    state = torch.load(path, weights_only=True)
    assert all(tensor.float().isfinite().all() for tensor in state.values())
    return state


def convert_case(hub_files: Path, tmp_path: Path, patch) -> Case:
    folder = shutil.copytree(hub_files, tmp_path / "hub")
    main = main_of(convert_hf_checkpoint.main, "--checkpoint_dir", folder)
    finals = {"model.pth": read_state, "params.json": lambda path: json.loads(path.read_text())}
    finals["tokenizer.model"] = lambda path: hub.sentencepiece.SentencePieceProcessor(model_file=str(path))
    return Case(main, folder, finals)


def quantize_case(hub_files: Path, tmp_path: Path, patch) -> Case:
    folder = shutil.copytree(hub_files, tmp_path / "hub")
    model = convert_hf_checkpoint.convert(folder)
    command = lambda: quantize.main(["--checkpoint_path", str(model), "--mode", "int8"])
    return Case(command, folder, {"model_int8.pth": lambda path: generate.load(path)})


def evaluate_case(hub_files: Path, tmp_path: Path, patch) -> Case:
    folder = tmp_path / "run"
    folder.mkdir()
    slowly = lambda *args, **more: time.sleep(0.002) or bench.stub_result("two circles")
    bench.install_stub(patch, folder, slowly)
    flags = ["--num_questions", "40", "--warmup", "0", "--resume", "--output", str(folder / "results.jsonl")]

    def read(path: Path) -> None:
        lines, n_bytes = read_results(path)
        assert path.stat().st_size - n_bytes < 10_000 and len(lines) <= 41

    return Case(lambda: evaluate.main(flags), folder, {"results.jsonl": read})


def download_case(hub_files: Path, tmp_path: Path, patch) -> Case:
    """From a folder in place of the network: huggingface_hub's part is to rename what is complete."""
    folder = tmp_path / "checkpoints/some/body"
    sizes = {path.name: path.stat().st_size for path in hub_files.iterdir() if path.suffix in (".json", ".safetensors")}

    def fetch(repo_id, local_dir, allow_patterns, token):
        for name in allow_patterns:
            part = local_dir / f"{name}.incomplete"
            with open(hub_files / name, "rb") as source, open(part, "wb") as target:
                while block := source.read(20_000):
                    target.write(block)
                    time.sleep(0.001)
            os.replace(part, local_dir / name)

    class Api:
        def __init__(self, token=None):
            pass

        def model_info(self, repo_id, files_metadata):
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=n) for name, n in sizes.items()])

    patch.setattr(huggingface_hub, "HfApi", Api)
    patch.setattr(huggingface_hub, "snapshot_download", fetch)
    main = main_of(download.main, "--repo_id", "some/body", "--download_dir", tmp_path / "checkpoints")
    whole = {name: lambda path, n=n: path.stat().st_size == n or pytest.fail(path.name) for name, n in sizes.items()}
    return Case(main, folder, whole)


CASES = {"download": download_case, "convert": convert_case, "quantize": quantize_case, "evaluate": evaluate_case}


@pytest.fixture
def case(request, hub_files, tmp_path, monkeypatch) -> Case:
    return CASES[request.param](hub_files, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_at_any_moment(case, number, request):
    """Nothing half-written has a final name, and the same command again succeeds."""
    rng, n = random.Random(int(number)), 20 if request.config.getoption("fuzz") else 3
    begin = time.monotonic()
    assert run(case.command)[0] == 0
    seconds = time.monotonic() - begin
    for name in case.finals:
        (case.folder / name).unlink()
    for _ in range(n):
        child, err = start(case.command)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, number)
        os.waitpid(child, 0)
        os.close(err)
        case.check(complete=False)
    status, err = run(case.command)
    assert status == 0, err
    case.check(complete=True)
    assert not list(case.folder.glob("*.part"))


def limit_files(n_bytes: int) -> None:
    """A file of this process becomes no larger: the write that would make it so fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("case", ["convert", "quantize", "evaluate"], indirect=True)
def test_disk_that_fills_up(case):
    """One line; nothing half-written; lines of results are whole or absent; then the same command goes on."""
    assert run(case.command)[0] == 0
    sizes = [(case.folder / name).stat().st_size for name in case.finals]
    for name in case.finals:
        (case.folder / name).unlink()
    for n_bytes in (0, 100, max(sizes) // 2, max(sizes) - 1):
        status, err = run(lambda n=n_bytes: limit_files(n) or case.command())
        lines = [line for line in err if not line.startswith(("loaded", "["))]
        assert status == 2 and len(lines) == 1 and ("File too large" in lines[0] or "disk is full" in lines[0]), err
        case.check(complete=False)
        results = case.folder / "results.jsonl"
        assert not results.exists() or results.read_bytes()[-1:] in (b"", b"\n")
    assert run(case.command)[0] == 0
    case.check(complete=True)


def obey_permissions() -> None:
    """Take from root what lets it write everywhere (capabilities(7))."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_read_only_folder(case):
    case.folder.mkdir(parents=True, exist_ok=True)
    case.folder.chmod(0o555)
    try:
        status, err = run(lambda: obey_permissions() or case.command())
    finally:
        case.folder.chmod(0o755)
    assert status == 2 and len(err) == 1 and ("Permission denied" in err[0] or "cannot be written to" in err[0]), err
    assert not any((case.folder / name).exists() for name in case.finals)


# ---- files that change under a reader ------------------------------------------------------------------------------


@pytest.fixture
def model(hub_files, tmp_path) -> Path:
    return convert_hf_checkpoint.convert(shutil.copytree(hub_files, tmp_path / "hub"))


def answer_after(change: Callable[[Path], object], model: Path, optimize: bool, folder: Path) -> tuple[int, list[str]]:
    """Load the checkpoint, change its file, answer."""

    def command() -> int:
        engine, tokenizer = generate.load(model, dtype=torch.float32, optimize=optimize)
        change(model)
        ids = generate.answer(engine, tokenizer, {"prompt": "Hi"}, max_new_tokens=3)["token_ids"]
        (folder / "ids").write_text(str(ids))
        return 0

    (folder / "ids").unlink(missing_ok=True)
    status, err = run(lambda: cli.run_command("generate.py", command))
    return status, [line for line in err if not line.startswith("loaded")]


@pytest.mark.parametrize("optimize", [True, False])
def test_checkpoint_that_changes_while_it_is_mapped(model, tmp_path, optimize):
    """An error of one line or the answer of the old file, and no bus error."""
    data, other = model.read_bytes(), tmp_path / "other"
    assert answer_after(lambda path: None, model, optimize, tmp_path) == (0, [])
    expected = (tmp_path / "ids").read_text()

    def replace(path: Path) -> None:
        other.write_bytes(data[::-1])
        os.replace(other, path)

    assert answer_after(replace, model, optimize, tmp_path) == (0, [])
    assert (tmp_path / "ids").read_text() == expected
    for change in (lambda path: os.truncate(path, 0), lambda path: path.write_bytes(data[::-1])):
        model.write_bytes(data)
        status, err = answer_after(change, model, optimize, tmp_path)
        assert status == 2 and len(err) == 1 and "while it was in use" in err[0], err
        assert not (tmp_path / "ids").exists()


def test_quantize_refuses_a_checkpoint_that_was_replaced(model, monkeypatch):
    read, n_read = quantize.read_finite, []

    def replace_first(path, name):
        if not n_read:
            shutil.copy(path, path.with_name("copy"))
            os.replace(path.with_name("copy"), path)
        n_read.append(name)
        return read(path, name)

    monkeypatch.setattr(quantize, "read_finite", replace_first)
    with pytest.raises(ValueError, match="was replaced meanwhile"):
        quantize.quantize(model, "int8", 128)
    assert not list(model.parent.glob("model_int8*"))


def test_bus_error_is_a_line(tmp_path):
    def command() -> int:
        path = tmp_path / "mapped"
        path.write_bytes(bytes(1 << 16))
        mapped = torch.from_file(str(path), size=1 << 16, dtype=torch.uint8)
        os.truncate(path, 0)
        return int(mapped.sum())

    status, err = run(lambda: cli.run_command("some.py", command))
    assert status == 2 and len(err) == 1 and err[0].startswith("some.py: a file was cut off"), err
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "mapped").unlink()
