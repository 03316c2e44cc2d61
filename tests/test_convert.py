"""The converter: every layout of the hub's files, what it refuses and what it leaves behind then, and its memory."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from scripts import convert_hf_checkpoint
from scripts.convert_hf_checkpoint import convert
from scripts.published_models import MODELS, named
from tests.helpers import hub
from tests.helpers.checkpoints import LLAMA31

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ["single.safetensors", "sharded.safetensors", "single.bin", "sharded.bin"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small Llama in the hub's layout, not converted."""
    folder, _ = hub.make_llama(tmp_path_factory.mktemp("convert") / "llama", LLAMA31)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to be spoilt, in which an earlier conversion stands."""
    copy = shutil.copytree(original, tmp_path / "llama")
    (copy / "model.pth").write_bytes(b"older")
    return copy


def run_main(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit status and stderr of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *map(str, arguments)])
    status = 0
    try:
        convert_hf_checkpoint.main()
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert out == ""
    return status, err


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The line on stderr with which the converter refuses a folder; checks what it leaves behind."""

    def refuse(folder: Path, *flags: str, status: int = 2) -> str:
        found, err = run_main(monkeypatch, capsys, "--checkpoint_dir", folder, *flags)
        assert found == status
        assert err.count("\n") == 1 and err.startswith("convert_hf_checkpoint.py: ")
        assert "Traceback" not in err
        if folder.exists():
            assert not list(folder.glob("*.part"))
            assert (folder / "model.pth").read_bytes() == b"older"
            assert not (folder / "params.json").exists()
        return err

    return refuse


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


# ---- what it reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_checkpoint(original, tmp_path, layout):
    results = []
    for name in ("single.safetensors", layout):
        copy = shutil.copytree(original, tmp_path / f"{len(results)}")
        hub.store(copy, name)
        convert_hf_checkpoint.convert(copy)
        results.append(torch.load(copy / "model.pth", weights_only=True))
    first, second = results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family", ["llama2", "llama3.1", "qwen2.5-tied", "qwen2.5-vl"])
def test_fine_tune_saved_by_transformers(pair, tmp_path, family):
    """The newest config.json (rope_parameters, nested text_config) gives what the hub's own files gave."""
    pair = pair(family)
    for pattern in ("tokenizer*.json", "preprocessor_config.json", "tokenizer.model"):
        for file in pair.folder.glob(pattern):
            shutil.copy(file, tmp_path)
    pair.reference.save_pretrained(tmp_path)
    convert_hf_checkpoint.convert(tmp_path)
    ours, again = (torch.load(folder / "model.pth", weights_only=True) for folder in (pair.folder, tmp_path))
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    first, second = (json.loads((folder / "params.json").read_text()) for folder in (pair.folder, tmp_path))
    assert first["model"] == second["model"]


def test_bin_files_older_than_torch_1_6(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_hf_checkpoint.convert(folder)
    converted = torch.load(folder / "model.pth", weights_only=True)
    assert torch.equal(converted["output.weight"], state["lm_head.weight"])


def test_tied_checkpoint_that_repeats_its_embedding(tmp_path):
    folder, _ = hub.make_llama(tmp_path / "llama", {"tie_word_embeddings": True})
    edit_weights(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    convert_hf_checkpoint.convert(folder)
    assert "output.weight" not in torch.load(folder / "model.pth", weights_only=True)


def test_dtype_is_kept(folder):
    edit_weights(folder, lambda state: state.update({key: t.bfloat16() for key, t in state.items()}))
    convert_hf_checkpoint.convert(folder)
    state = torch.load(folder / "model.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_stop_tokens_and_scaling_reach_params_json(folder):
    convert_hf_checkpoint.convert(folder)
    params = json.loads((folder / "params.json").read_text())
    assert params["model"]["rope_scaling"] == {key: n for key, n in hub.SCALING.items() if key != "rope_type"}
    assert params["model"]["rope_base"] == 500000.0
    assert params["model"]["n_tokens"] == params["model"]["vocab_size"] - hub.PADDING
    special = params["tokenizer"]["special_tokens"]
    stop = {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
    assert set(params["tokenizer"]["stop_ids"]) == {special[name] for name in stop}
    assert params["tokenizer"]["bos_id"] == special["<|begin_of_text|>"]
    assert params["tokenizer"]["chat_template"] == hub.LLAMA3_TEMPLATE


# ---- --model_name --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_row(original, monkeypatch):
    """A row of the table for the small Llama."""
    config = json.loads((original / "config.json").read_text())
    args, *_ = convert_hf_checkpoint.llama(config, original)
    fields = ("dim", "n_layer", "n_head", "n_kv_head", "intermediate_size", "vocab_size", "max_seq_len", "rope_scaling")
    row = {key: getattr(args, key) for key in fields} | {"rope_base": 500000.0}
    monkeypatch.setitem(MODELS, "tiny-llama", row)
    return row


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-Instruct", "tiny-chat-llama"])
def test_model_name_that_agrees(folder, tiny_row, name):
    convert_hf_checkpoint.convert(folder, name)
    assert (folder / "params.json").exists()


def test_model_name_of_another_model(folder, refusal, tiny_row):
    tiny_row["n_layer"] = 4
    assert "config.json is not that of tiny-llama: n_layer is 3, the table has 4" in refusal(
        folder, "--model_name", "tiny-llama"
    )


def test_model_name_that_differs_in_a_nested_number(folder, refusal, tiny_row):
    tiny_row["rope_scaling"] = tiny_row["rope_scaling"] | {"factor": 32.0}
    assert "rope_scaling.factor is 8.0, the table has 32.0" in refusal(folder, "--model_name", "tiny-llama")


def test_model_name_without_a_row(folder, refusal):
    line = refusal(folder, "--model_name", "Llama-4")
    assert "Llama-4 is not in the table" in line and "Llama-3.2-1B" in line


def test_rows_can_be_built():
    """As a benchmark does, with random weights."""
    args = named("AMD-Llama-135m")
    with torch.device("meta"):
        model = convert_hf_checkpoint.Transformer(args)
    assert sum(p.numel() for p in model.parameters()) == 134_105_856


# ---- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sharded.safetensors", "sharded.bin"])
def test_missing_shard(folder, refusal, layout):
    hub.store(folder, layout)
    shard = next(folder.glob("*-00002-of-00003.*"))
    shard.unlink()
    assert shard.name in refusal(folder)


def test_missing_key(folder, refusal):
    edit_weights(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lack model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_key_that_the_index_promises(folder, refusal):
    hub.store(folder, "sharded.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"more.weight": next(iter(weight_map.values()))})
    assert "lacks more.weight" in refusal(folder)


def test_key_too_many(folder, refusal):
    edit_weights(folder, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert "model.layers.0.self_attn.q_proj.bias, unknown" in refusal(folder)


@pytest.mark.parametrize("key", ["model.layers.2.mlp.down_proj.weight", "model.layers.2.self_attn.k_proj.weight"])
def test_wrong_shape(folder, refusal, key):
    edit_weights(folder, lambda state: state.update({key: torch.zeros(5, 7)}))
    line = refusal(folder)
    assert f"{key} [5, 7]" in line and "should be" in line


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_quantized_checkpoint(folder, refusal, method):
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    line = refusal(folder)
    assert method in line and "quantize.py" in line


def test_quantized_checkpoint_that_only_its_tensors_tell_of(folder, refusal):
    """Early GPTQ repositories have a quantize_config.json and say nothing in config.json."""

    def quantize(state):
        del state["model.layers.0.mlp.up_proj.weight"]
        state["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 96, dtype=torch.int32)

    edit_weights(folder, quantize)
    line = refusal(folder)
    assert "quantized" in line and "quantize.py" in line


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Gemma3ForConditionalGeneration"])
def test_another_architecture(folder, refusal, architecture):
    edit_json(folder / "config.json", architectures=[architecture])
    line = refusal(folder)
    assert architecture in line
    assert all(name in line for name in convert_hf_checkpoint.ARCHITECTURES)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
)
def test_what_the_decoder_does_not_compute(folder, refusal, change):
    edit_json(folder / "config.json", **change)
    assert "not supported" in refusal(folder)


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"num_attention_heads": "4"}, {"rope_scaling": "llama3"}])
def test_config_with_nonsense(folder, refusal, change):
    edit_json(folder / "config.json", **change)
    assert "config.json" in refusal(folder)


def test_config_that_lacks_a_number(folder, refusal):
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "intermediate_size" in refusal(folder)


@pytest.mark.parametrize("end", [4, 100, -1000])
@pytest.mark.parametrize("layout", ["single.safetensors", "single.bin"])
def test_truncated_weights(folder, refusal, layout, end):
    hub.store(folder, layout)
    file = next(file for file in folder.iterdir() if file.name.endswith((".safetensors", ".bin")))
    file.write_bytes(file.read_bytes()[:end])
    line = refusal(folder)
    assert file.name in line and "download it again" in line


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointer_of_git_lfs_instead_of_weights(folder, refusal, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9976576152\n")
    assert name in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_corrupt_json(folder, refusal, name):
    (folder / name).write_text((folder / name).read_text()[:40])
    assert name in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_corrupt_index(folder, refusal, content):
    hub.store(folder, "sharded.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    refusal(folder)


def test_missing_weights(folder, refusal):
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


def test_missing_config(folder, refusal):
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_missing_tokenizer(folder, refusal):
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(folder)


def test_missing_folder(tmp_path, refusal):
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_says_where_the_result_is(folder, monkeypatch, capsys):
    """And the next command; where stderr is a terminal, a bar counts the bytes of the tensors."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    status, err = run_main(monkeypatch, capsys, "--checkpoint_dir", folder)
    path = folder / "model.pth"
    assert status == 0 and err.count("\n") == 1 and f"wrote {path}" in err
    assert f"python generate.py --checkpoint_path {path}" in err
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    convert(folder)
    n_bytes = sum(tensor.nbytes for tensor in checkpoint.load_mapped(path).values())
    assert re.search(rf"model.pth: 100%.*{n_bytes / 1000:.0f}k/{n_bytes / 1000:.0f}k .*B/s", screen.getvalue())


def test_no_room(folder, refusal, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "free space" in refusal(folder)


def test_full_disk(folder, refusal, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    line = refusal(folder)
    assert "GB are needed" in line and os.strerror(errno.ENOSPC) in line


def test_interrupted(folder, refusal, monkeypatch):
    """Ctrl-C in the middle of the tensors."""
    read, calls = convert_hf_checkpoint.build_tensor, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(convert_hf_checkpoint, "build_tensor", interrupt)
    assert "interrupted" in refusal(folder, status=130)
    assert len(calls) == 7


# ---- memory --------------------------------------------------------------------------------------------------------


def peak_memory(folder: Path) -> int:
    """Bytes that a process of its own has resident at most while it converts.

    Linux's VmHWM: ru_maxrss would count what the process that started it had resident.
    """
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(open('/proc/self/status').read())"
    )
    script = ROOT / "scripts/convert_hf_checkpoint.py"
    command = [sys.executable, "-c", code, str(script), "--checkpoint_dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(re.search(r"VmHWM:\s*(\d+) kB", result.stdout)[1]) * 1024


@pytest.fixture(scope="module")
def memory_of_the_program(original, tmp_path_factory):
    return peak_memory(shutil.copytree(original, tmp_path_factory.mktemp("memory") / "tiny"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["sharded.safetensors", "single.bin"])
def test_peak_memory(original, tmp_path, memory_of_the_program, layout):
    """Below 1.3 times the size of the checkpoint, on top of what the program itself takes."""
    folder = shutil.copytree(original, tmp_path / "large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    edit_json(folder / "config.json", **sizes, num_attention_heads=8, num_key_value_heads=4)
    make_large_weights(folder)
    hub.store(folder, layout)
    extra = peak_memory(folder) - memory_of_the_program
    size = (folder / "model.pth").stat().st_size
    assert size > 200e6
    assert extra < 1.3 * size


def make_large_weights(folder: Path) -> None:
    """Random weights for config.json."""
    config = json.loads((folder / "config.json").read_text())
    args, plan, _ = convert_hf_checkpoint.llama(config, folder)
    shapes = convert_hf_checkpoint.expected_shapes(args)
    rows = {"q_proj": args.n_head * args.head_dim, "k_proj": args.n_kv_head * args.head_dim}
    rows |= {"v_proj": rows["k_proj"], "gate_proj": args.intermediate_size, "up_proj": args.intermediate_size}
    state = {}
    for name, source in plan.items():
        for key in source.keys:
            n = rows.get(key.split(".")[-2], shapes[name][0])
            state[key] = torch.randn(n, *shapes[name][1:])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
