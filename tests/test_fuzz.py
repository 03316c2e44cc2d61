"""Nothing that a file holds can hurt: mutated inputs give an answer or one line, soon, and in little memory.

The inputs are the same in every run: the number of one, "TARGET N", is the seed that made it. `--fuzz N` runs N of
them, and prints what became of them.
"""

import io
import json
from functools import cache, partial
from pathlib import Path

import cli

import pytest
from PIL import Image

import evaluate
import generate
import quantize
from images import FORMATS, load_image
from scripts import report
from scripts.convert_hf_checkpoint import convert
from tests.helpers import bench, hub
from tests.helpers.fuzz import Target, mutate_bytes, mutate_json, try_inputs
from tests.helpers.pictures import draw

# What each target gets of 1000 inputs: those that are quick get more.
SHARES = {
    "pictures": 600,
    "requests": 80,
    "requests, bytes": 80,
    "params.json": 24,
    "tokenizer.model": 20,
    "model.pth": 16,
    "quantized": 20,
    "config.json": 40,
    "tokenizer.json": 16,
    "tokenizer_config.json": 8,
    "template": 12,
    "generation_config.json": 4,
    "safetensors": 12,
    "index": 8,
    "bin": 8,
    "sentencepiece": 8,
    "results, resumed": 22,
    "results, report": 22,
}


# ---- pictures ------------------------------------------------------------------------------------------------------


def make_pictures() -> list[bytes]:
    """Small ones of every format, in several of their kinds."""
    small, exif = draw(24, 18), Image.Exif()
    exif[0x0112] = 6
    transparent = small.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(small.size))
    kinds = [(small, form, {}) for form in (*FORMATS, "MPO")]
    kinds += [(transparent, form, {}) for form in ("PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "ICO")]
    kinds += [(small.convert("P"), form, {}) for form in ("PNG", "GIF", "BMP", "TIFF", "TGA")]
    kinds += [(small.convert("L"), form, {}) for form in ("JPEG", "PPM", "TIFF", "JPEG2000", "TGA")]
    kinds += [(small.convert("1"), form, {}) for form in ("PNG", "PPM", "TIFF", "BMP")]
    kinds += [(small.convert("I"), "TIFF", {}), (small.convert("F"), "TIFF", {}), (small.convert("CMYK"), "JPEG", {})]
    kinds += [(small.convert("I;16"), form, {}) for form in ("PNG", "TIFF", "PPM")]
    kinds += [(small, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    kinds += [(small.convert("1"), "TIFF", {"compression": "group4"}), (small, "JPEG", {"progressive": True})]
    kinds += [(small, form, {"exif": exif}) for form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")]
    kinds += [(small, "WEBP", {"lossless": True}), (small, "TGA", {"compression": "tga_rle"})]
    animated = {"save_all": True, "append_images": [draw(24, 18, seed=1), small]}
    kinds += [(small.copy(), form, animated) for form in ("PNG", "GIF", "WEBP", "AVIF", "TIFF", "MPO")]
    made = []
    for image, form, options in kinds:
        image.copy().save(file := io.BytesIO(), form, **options)
        made.append(file.getvalue())
    return made


@cache
def picture_target() -> Target:
    return Target(make_pictures(), lambda data: load_image(io.BytesIO(data)))


# ---- requests ------------------------------------------------------------------------------------------------------


def make_requests() -> list[dict]:
    image = str(generate.DEFAULT_IMAGE)
    part, text = {"type": "image", "path": image}, {"type": "text", "text": "How many <image> circles?"}
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
    reply = [{"type": "tokens", "ids": [20, 21, 22]}]
    user = lambda *parts: {"role": "user", "content": list(parts)}
    talk = [{"role": "system", "content": "Be brief."}, user(part, text), {"role": "assistant", "content": "Two."}]
    return [
        {"prompt": "Describe the image.", "images": [image], "max_new_tokens": 2},
        {"prompt": "<image> and <image>?", "images": [image, image], "system": "Be brief."},
        {"prompt": "a <|im_start|> b", "raw": True},
        {"prompt": 20, "images": [image]},
        {"messages": [*talk, {"role": "user", "content": "And squares?"}], "date_string": "26 Jul 2024"},
        {"messages": [user(part), {"role": "assistant", "content": reply}, user(text)], "max_new_tokens": 1},
        {"messages": [user(part | {"min_pixels": 3136, "max_pixels": 9000}, text)]},
        {"messages": [user(part | {"resized_height": 56, "resized_width": 84}, url, text)]},
    ]


def request_target(tmp_path: Path, in_bytes: bool) -> Target:
    path = tmp_path / "requests.jsonl"
    engine, tokenizer = generate.load(cli.DEFAULT_CHECKPOINT)
    engine.max_cache_size = 300
    args = generate.parse_args(["--requests", str(path), "--max_new_tokens", "2", "--device", "cpu"])

    def run(data: bytes) -> None:
        path.write_bytes(b"\n".join(data.split(b"\n")[:3]))  # no more: each is answered
        errors = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "write", errors.append)
            patch.setattr(generate, "report", lambda *_: None)
            status = generate.run_requests(engine, tokenizer, args)
        results = [json.loads(line) for line in errors]
        assert (status == 2) == any("error" in result for result in results)
        assert all(line.count("\n") == 1 for line in errors)
        if found := [result["error"] for result in results if "error" in result]:
            raise ValueError(found[0])

    seeds = make_requests()
    if in_bytes:
        lines = [json.dumps(seed).encode() for seed in seeds]
        return Target([*lines, b"\n".join(lines[:3])], run)
    return Target(seeds, run, mutate_json)


# ---- checkpoints ---------------------------------------------------------------------------------------------------

MAKERS = {
    "qwen": lambda folder: hub.make_qwen_text(folder, tied=True),
    "qwen-vl": hub.make_qwen_vl,
    "llava": lambda folder: hub.make_llava_hf(folder, tied=True),
    "llava-lmms": lambda folder: hub.make_llava_lmms(folder, tied=True),
    "llama-vision": hub.make_llama_vision,
    "llama2": hub.make_llama2,
    "llama": lambda folder: hub.make_llama(folder, {"rope_scaling": hub.SCALING}, "sharded.safetensors"),
}


def answer(path: Path) -> None:
    """Load the checkpoint and answer a request, with an image if it reads images."""
    engine, tokenizer = generate.load(path)
    engine.max_cache_size = 300
    images = [str(generate.DEFAULT_IMAGE)] if engine.encoder else []
    request = {"prompt": "Hi", "images": images, "raw": not tokenizer.chat_template}
    generate.answer(engine, tokenizer, request, max_new_tokens=2)


class Folder:
    """A checkpoint's folder in which one file at a time is mutated."""

    def __init__(self, folder: Path, family: str):
        self.folder, _ = MAKERS[family](folder / family)
        self.n_converted = 0
        self.hub = {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def read(self, name: str):
        return json.loads((self.folder / name).read_text())

    def convert(self, name: str, data: bytes) -> None:
        for path in self.folder.iterdir():
            if path.name not in self.hub:
                path.unlink()
        (self.folder / name).write_bytes(data)
        try:
            model = convert(self.folder)
            self.n_converted += 1
            if self.n_converted % 3 == 1:  # most of the time would go there
                answer(model)
        finally:
            for written in {name, "tokenizer.model"} & self.hub.keys():
                (self.folder / written).write_bytes(self.hub[written])

    def load(self, name: str, model: str, data: bytes) -> None:
        kept = (self.folder / name).read_bytes()
        (self.folder / name).write_bytes(data)
        try:
            answer(self.folder / model)
        finally:
            (self.folder / name).write_bytes(kept)


def choose(folders: dict[str, Target]) -> Target:
    """Several targets as one: each seed with its folder's name in front."""
    seeds = [(name, seed) for name, target in folders.items() for seed in target.seeds]

    def mutate(rng, seed, seeds) -> tuple[str, bytes]:
        name, own = seed
        return name, folders[name].mutate(rng, own, folders[name].seeds)

    return Target(seeds, lambda data: folders[data[0]].run(data[1]), mutate)


def convert_target(tmp_path: Path, file: str, families: list[str], mutate=mutate_json) -> Target:
    made = {}
    for family in families:
        folder = Folder(tmp_path, family)
        name = next(name for name in sorted(folder.hub) if name.endswith(file))
        seed = folder.hub[name] if mutate is mutate_bytes else folder.read(name)
        made[family] = Target([seed], partial(folder.convert, name), mutate)
    return choose(made)


def mutate_template(rng, config: dict, seeds: list) -> bytes:
    template = mutate_bytes(rng, config["chat_template"].encode(), [TEMPLATES]).decode(errors="replace")
    return json.dumps(config | {"chat_template": template}).encode()


TEMPLATES = (
    hub.LLAVA_TEMPLATE + hub.LLAMA2_TEMPLATE + "{% for i in range(10**9) %}{{ messages.x }}{% endfor %}"
).encode()


def load_target(tmp_path: Path, file: str, families: list[str], mutate=mutate_bytes, mode: str = "") -> Target:
    made = {}
    for family in families:
        folder = Folder(tmp_path, family)
        model = convert(folder.folder)
        model = quantize.quantize(model, mode, 32)[0] if mode else model
        name = file or model.name
        seed = folder.read(name) if mutate is mutate_json else (folder.folder / name).read_bytes()
        made[family] = Target([seed], partial(folder.load, name, model.name), mutate)
    return choose(made)


# ---- results files -------------------------------------------------------------------------------------------------


def make_results(tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """The flags of a run of three questions, with a draft, and its results file."""
    reply = lambda *args, **more: bench.stub_result("two circles") | {"accept_counts": [1, 1, 0]}
    bench.install_stub(patch, tmp_path, reply, draft=True)
    path = tmp_path / "results.jsonl"
    flags = ["--num_questions", "3", "--warmup", "0", "--compare", "0.5", "--output", str(path)]
    assert evaluate.main(flags) == 0
    return flags, path


def mutate_lines(rng, seed: list, seeds: list) -> bytes:
    """One line or two changed, the others whole."""
    lines = [json.dumps(line).encode() for line in seed]
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(seed))
        lines[i] = mutate_json(rng, seed[i], seed) if rng.random() < 0.8 else mutate_bytes(rng, lines[i], lines)
    return b"\n".join(lines) + b"\n" * (rng.random() < 0.9)


def results_target(tmp_path: Path, patch: pytest.MonkeyPatch, resumed: bool, stderr) -> Target:
    flags, path = make_results(tmp_path, patch)
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        page = ["-o", str(tmp_path / "report.html"), str(path)]
        status = evaluate.main([*flags, "--resume"]) if resumed else report.main(page)
        printed = stderr()
        assert status in (0, 2)
        if status:
            assert printed.count("\n") == 1, printed
            raise ValueError(printed)

    return Target([lines, lines[:4]], run, mutate_lines)


# ---- the test ------------------------------------------------------------------------------------------------------


def make_target(name: str, tmp_path: Path, patch: pytest.MonkeyPatch, stderr) -> Target:
    vision = ["qwen-vl", "llava", "llama-vision"]
    match name:
        case "pictures":
            return picture_target()
        case "requests" | "requests, bytes":
            return request_target(tmp_path, name != "requests")
        case "params.json":
            return load_target(tmp_path, name, ["qwen", *vision], mutate_json)
        case "tokenizer.model":
            return load_target(tmp_path, name, ["qwen", "llama2"])
        case "model.pth":
            return load_target(tmp_path, "", ["qwen", "llama-vision"])
        case "quantized":
            int8, int4 = (load_target(tmp_path / mode, "", ["qwen"], mutate_bytes, mode) for mode in ("int8", "int4"))
            return choose({"int8": int8, "int4": int4})
        case "config.json":
            return convert_target(tmp_path, name, ["qwen", "llama", "llava-lmms", *vision])
        case "tokenizer.json":
            return convert_target(tmp_path, name, ["qwen", "llama", "llava"])
        case "tokenizer_config.json":
            return convert_target(tmp_path, name, ["qwen", "llama2"])
        case "template":
            return convert_target(
                tmp_path, "tokenizer_config.json", ["qwen", "llama2", "llama-vision"], mutate_template
            )
        case "generation_config.json":
            return convert_target(tmp_path, name, ["qwen"])
        case "safetensors":
            return convert_target(tmp_path, ".safetensors", ["qwen", "llama"], mutate_bytes)
        case "index":
            return convert_target(tmp_path, ".index.json", ["llama", "llama2"])
        case "bin":
            return convert_target(tmp_path, ".bin", ["llama2"], mutate_bytes)
        case "sentencepiece":
            return convert_target(tmp_path, "tokenizer.model", ["llama2"], mutate_bytes)
        case "results, resumed" | "results, report":
            return results_target(tmp_path, patch, name == "results, resumed", stderr)


@pytest.mark.parametrize("name", SHARES)
def test_mutated_inputs(name, tmp_path, monkeypatch, capfd, request):
    n = request.config.getoption("fuzz")
    numbers = range(max(1, (n or 2000) * SHARES[name] // sum(SHARES.values())))
    target = make_target(name, tmp_path, monkeypatch, lambda: capfd.readouterr().err)
    counts = try_inputs(name, target, numbers, lambda: capfd.readouterr().err)
    if n:
        with capfd.disabled():
            figures = f"{counts.inputs} inputs, {counts.refused} refused, slowest {counts.slowest_s:.2f} s"
            print(f"\n{name}: {figures}, most memory {counts.most_bytes / 2**20:.0f} MiB, {dict(counts.defects)}")
    assert not counts.defects, "\n\n".join(f"{n} x {counts.examples[what]}" for what, n in counts.defects.items())
