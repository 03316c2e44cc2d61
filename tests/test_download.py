"""Which files of a repository are downloaded, and what prepare.sh runs. No network: the test replaces Hugging Face."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from scripts import download

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
IGNORED = ["README.md", ".gitattributes", "original/consolidated.00.pth", "onnx/model.safetensors", "tf_model.h5"]


def test_one_format_of_the_weights_is_fetched():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    chosen = download.choose_files([*SMALL, *shards, *bins[:1], *IGNORED, "original/tokenizer.model"])
    assert set(chosen) == {*SMALL, *shards, "original/tokenizer.model"}
    assert set(download.choose_files([*SMALL, *bins, *IGNORED])) == {*SMALL, *bins}
    assert "tokenizer.model" in download.choose_files(["tokenizer.model", "pytorch_model.bin"])


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    files = [*SMALL, "model.safetensors", *IGNORED]

    def __init__(self, token=None):
        self.token = token

    def model_info(self, repo_id, files_metadata):
        if repo_id == "no/body":
            raise OSError("Repository Not Found\nfor url: ...")
        names = self.files if repo_id != "no/weights" else SMALL
        size = 10**18 if repo_id == "no/room" else 100
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name in names])


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*flags):
        fetched = {}
        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **more: fetched.update(more))
        monkeypatch.setattr(sys, "argv", ["download.py", *flags])
        try:
            download.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, fetched, capsys.readouterr()

    return call


def test_download(run, tmp_path):
    status, fetched, streams = run("--repo_id", "some/body", "--download_dir", str(tmp_path), "--hf_token", "T")
    assert status == 0 and streams.out.strip() == str(tmp_path / "some/body")
    assert fetched["local_dir"] == tmp_path / "some/body" and fetched["token"] == "T"
    assert set(fetched["allow_patterns"]) == {*SMALL, "model.safetensors"}
    assert f"--checkpoint_dir {tmp_path / 'some/body'}" in streams.err, "the next command"


@pytest.mark.parametrize("repo_id", ["no/body", "no/weights", "no/room"])
def test_what_cannot_be_downloaded_is_one_line(run, repo_id, tmp_path):
    status, fetched, streams = run("--repo_id", repo_id, "--download_dir", str(tmp_path))
    assert status == 2 and not fetched and streams.err.count("\n") == 1 and repo_id in streams.err


@pytest.mark.parametrize("mode", [None, "int8"])
def test_prepare(tmp_path, mode):
    """The two scripts, then quantize.py if asked, in any working directory; an error of one ends it."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$1" in */$FAIL) exit 2;; esac\n')
    python.chmod(0o755)
    command = ["bash", ROOT / "scripts/prepare.sh", "some/body", "folder", *([mode] if mode else [])]

    def prepare(fail: str):
        environment = os.environ | {"PYTHON": str(python), "FAIL": fail}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    lines = prepare("nothing").stdout.splitlines()
    assert lines[0] == f"{ROOT}/scripts/download.py --repo_id some/body --download_dir folder"
    assert lines[1] == f"{ROOT}/scripts/convert_hf_checkpoint.py --checkpoint_dir folder/some/body"
    quantize = f"{ROOT}/quantize.py --checkpoint_path folder/some/body/model.pth --mode int8"
    assert lines[2:] == ([quantize] if mode else [])
    failed = prepare("download.py")
    assert failed.returncode == 2 and len(failed.stdout.splitlines()) == 1
