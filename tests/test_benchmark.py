"""scripts/benchmark.py and scripts/plot.py on a tiny model: what they print and append, and bad input."""

import json
import xml.etree.ElementTree

import pytest

from scripts import benchmark, plot, published_models

TINY = dict(vocab_size=1024, dim=64, n_layer=2, n_head=4, n_kv_head=2, intermediate_size=96, qkv_bias=True)
FLAGS = ["--device", "cpu", "--prompt_tokens", "20", "--repeat", "2", "--speculate_k", "3"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(published_models.MODELS, "tiny", TINY)
    monkeypatch.setitem(published_models.MODELS, "tiny-draft", dict(TINY, n_layer=1))
    vit = dict(published_models.VIT, dim=32, depth=2, n_head=2, hidden=48, full_layers=[1], out_dim=64)
    row = dict(TINY, mrope_section=(2, 3, 3), image_token_id=1023, vision=vit)
    monkeypatch.setitem(published_models.MODELS, "tiny-vl", row)
    vit = dict(published_models.LLAVA_VIT, dim=32, depth=2, n_head=2, hidden=48, tile=28, out_dim=64)
    vit["resolutions"] = [(28 * height, 28 * width) for height in (1, 2, 3) for width in (1, 2, 3)]
    monkeypatch.setitem(published_models.MODELS, "tiny-llava", dict(TINY, image_token_id=1023, vision=vit))
    monkeypatch.setattr(benchmark, "READ_BYTES", 2**20)


def run(capsys, *flags) -> dict:
    assert benchmark.main([*FLAGS, *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name, image", [("tiny", 0), ("tiny-vl", 16), ("tiny-llava", None)])
def test_measures_and_compares_with_transformers(capsys, name, image):
    result = run(capsys, "--model", name, "--compare", "transformers", "--image_size", "112", "--n_prompts", "2")
    if image is not None:
        assert result["n_visual_tokens"] == image
    assert result["prompt_tokens"] == 20 + result["n_visual_tokens"]
    peer = result["transformers"]
    assert result["prompt_tokens"] == peer["prompt_tokens"], "the same prompt"
    for number in ("step_s", "prefill_s", "read_share", "verify_steps", "tokens_per_s", "peak_memory_gb", "load_s"):
        assert result[number] > 0
    assert peer["speedup"] > 0 and peer["time_to_first_token_ratio"] > 0
    assert ("encoder_s" in result) == (name != "tiny")
    assert result["n_recompiles"] == 0


def test_draft_out_and_plot(capsys, tmp_path):
    path, picture = tmp_path / "new" / "this.json", tmp_path / "this.svg"
    flags = ["--model", "tiny", "--draft", "tiny-draft", "--accept", "0.5", "--out", str(path)]
    result = run(capsys, *flags)
    assert result["draft"]["tokens_a_step"] == 1 + 0.5 + 0.25 + 0.125
    run(capsys, "--model", "tiny", "--quantize", "int8", "--out", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["settings"].get("quantize") for line in lines] == [None, "int8"]
    assert "--draft tiny-draft --accept 0.5" in lines[0]["command"] and "--groupsize" not in lines[0]["command"]
    assert plot.main([str(path), "-o", str(picture)]) == 0
    labels = [text.text for text in xml.etree.ElementTree.parse(picture).iter() if text.tag.endswith("text")]
    assert {"bfloat16, eager", "int8, eager", "bfloat16, eager, draft (estimated)"} <= set(labels)
    assert f"{lines[1]['tokens_per_s']:.1f}" in labels
    path.write_text("{}\n")
    assert plot.main([str(path), "-o", str(picture)]) == 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "none"],
        ["--model", "tiny", "--draft", "tiny-draft"],
        ["--model", "tiny", "--repeat", "0"],
        ["--model", "tiny", "--device", "nonsense"],
        ["--model", "tiny-vl", "--compare", "llama.cpp"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(capsys, flags):
    assert benchmark.main([*FLAGS, *flags]) == 2
    streams = capsys.readouterr()
    assert not streams.out and len(streams.err.splitlines()) == 1 and streams.err.startswith("benchmark.py: ")
