"""Picture files: which formats are read, what a broken or hostile one leads to, and what else may name a picture."""

import base64
import io
import json
import os
import struct
import threading
from pathlib import Path

import pytest
from PIL import Image, ImageFile

import generate
from images import FORMATS, load_image
from tests.helpers.pictures import draw

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) print\nshowpage\n"
PSD = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 4, 4, 8, 3)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_every_format_is_read(form, mode):
    """As Pillow converts it; what is transparent lies on white."""
    picture = draw(61, 300).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    try:
        data = encoded(picture, form, **({"sizes": [(61, 256)]} if form == "ICO" else {}))
    except OSError:
        pytest.skip(f"{form} holds no {mode}")
    with Image.open(io.BytesIO(data)) as expected:
        white = Image.new("RGBA", expected.size, "white")
        plain = Image.alpha_composite(white, expected.convert("RGBA")).convert("RGB")
    found = load_image(io.BytesIO(data))
    assert (found.mode, found.size, found.tobytes()) == ("RGB", plain.size, plain.tobytes())
    assert found.copy().resize((9, 9)).size == (9, 9)


def test_several_pictures_in_a_file_are_the_first():
    """MPO, APNG, GIF, TIFF."""
    for form in ("MPO", "PNG", "GIF", "TIFF"):
        data = encoded(draw(40, 30), form, save_all=True, append_images=[draw(40, 30, seed=1)])
        with Image.open(io.BytesIO(data)) as expected:
            assert load_image(io.BytesIO(data)).tobytes() == expected.convert("RGB").tobytes(), form


@pytest.mark.parametrize("data, name", [(EPS, "EPS"), (PSD, "PSD"), (b"DDS " + bytes(200), "DDS")])
def test_other_formats_are_refused_by_name(tmp_path, monkeypatch, data, name):
    monkeypatch.setattr("subprocess.Popen", lambda *args, **more: pytest.fail("a program was started"))
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"picture.png: {name} is not read; these formats are: JPEG, PNG, .*, TGA$"):
        load_image(path)


@pytest.mark.parametrize("data", [b"", b"x", b"<svg/>" * 40, b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_no_picture_at_all(data):
    with pytest.raises(ValueError, match="it is no picture, or a broken one; these formats are|cannot read the image"):
        load_image(io.BytesIO(data))


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), MemoryError(), struct.error("short"), KeyError("x")])
def test_whatever_a_decoder_raises_is_the_line(monkeypatch, pictures, error):
    def fail(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match="cannot read the image .*square.png: "):
        load_image(pictures["square"])


def test_more_pixels_than_anybody_needs():
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    with pytest.raises(ValueError, match="could be decompression bomb"):
        load_image(io.BytesIO(b"P6 20000 10000 255\n"))
    with pytest.raises(ValueError, match="cannot read the image"):
        load_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + bytes(4)))


def test_decoders_print_nothing(capfd):
    """libtiff prints of its own; afterwards descriptor 2 is what it was, in every thread."""
    broken = bytearray(encoded(draw(64, 64), "TIFF", compression="tiff_lzw"))
    broken[8:40] = bytes(32)
    threads = [threading.Thread(target=pytest.raises, args=(ValueError, load_image, io.BytesIO(broken)))]
    threads += [threading.Thread(target=load_image, args=(generate.DEFAULT_IMAGE,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_pipes_and_devices_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="it is not a file$"):
            load_image(path)


# ---- names of pictures ---------------------------------------------------------------------------------------------


def test_data_urls_and_addresses(pictures, monkeypatch):
    data = base64.b64encode(pictures["square"].read_bytes()).decode()
    plain = load_image(pictures["square"]).tobytes()
    assert load_image(f"data:image/png;base64,{data}").tobytes() == plain
    assert load_image(pictures["square"].as_uri()).tobytes() == plain
    with pytest.raises(ValueError, match="data:image/png;base64,.{1,60}: "):  # not all of it
        load_image(f"data:image/png;base64,{data[:400]}")
    with pytest.raises(ValueError, match="a data URL reads data:image/...;base64,"):
        load_image("data:image/svg+xml,<svg/>")
    for url in ("http://a.b/c.png", "https://a.b/c.png"):
        with pytest.raises(ValueError, match="download it first"):
            load_image(url)


def test_image_urls_of_other_programs(tmp_path, capsys, pictures):
    """The same answer by each form of the same picture."""
    path: Path = pictures["square"]
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    parts = [{"type": "image", "path": str(path)}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
    parts += [{"type": "image_url", "image_url": str(path)}, {"type": "image_url", "image_url": {"url": path.as_uri()}}]
    parts += [{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}, {"type": "image_url"}]
    lines = [json.dumps({"messages": [{"role": "user", "content": [part]}]}) for part in parts]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    flags = ["--device", "cpu", "--max_new_tokens", "3", "--requests", str(tmp_path / "requests.jsonl")]
    assert generate.main(flags) == 2
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({str(result["token_ids"]) for result in results[:4]}) == 1
    assert "download it first" in results[4]["error"] and "must be text or an image" in results[5]["error"]
