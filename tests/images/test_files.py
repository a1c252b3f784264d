"""Files that need a plugin, open files, used-up iterators, black pictures: nothing is passed over in silence."""

import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from testreg.images import decode
from testreg.images.labels import photos
from testreg.images.streaming import stream
from testreg.runtime.errors import BadImages, ImagesDark, ImagesSkipped


def noise(seed, height=16, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def read(images):
    made = stream(images, pixels)
    return made, [row for batch in made for row in batch.inputs["pixel_values"]]


def encoded(kind, seed=0):
    file = io.BytesIO()
    Image.fromarray(noise(seed)).save(file, kind)
    return file.getvalue()


def warned(made):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made.warn()
    return [(warning.category, str(warning.message)) for warning in said]


@pytest.fixture
def plain_pillow(monkeypatch):
    """Pillow as it is where no plugin is installed, and without AVIF of its own, as some builds are."""
    Image.init()
    for name in ("HEIF", "AVIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    for module, _ in decode.PLUGINS.values():
        monkeypatch.setitem(sys.modules, module, None)
    decode.formats.cache_clear()
    decode._suffixes.cache_clear()
    yield
    monkeypatch.undo()
    decode.formats.cache_clear()
    decode._suffixes.cache_clear()


PHOTO = """
import sys, numpy as np
from testreg.images.streaming import stream
batch, = stream(sys.argv[1], lambda picture: __import__("torch").from_numpy(np.array(picture)).permute(2, 0, 1))
print(len(batch), batch.inputs["pixel_values"].float().mean((0, 2, 3)).round().tolist())
"""


def test_heic_is_read_beside_jpeg_where_its_plugin_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    heic = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 100, 50)))
    heic.save(tmp_path / "a.heic", quality=-1)
    Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "b.JPG", quality=100)
    (tmp_path / "C.HEIC").write_bytes((tmp_path / "a.heic").read_bytes())
    seen = subprocess.run(  # a process in which nobody has registered it
        [sys.executable, "-c", PHOTO, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert seen.stdout.split("\n")[0] in {f"3 [{red}.0, 100.0, 50.0]" for red in (199, 200, 201)}


def test_what_needs_a_plugin_is_counted_and_named_with_the_line_that_installs_it(tmp_path, plain_pillow):
    for name in ("a.heic", "b.HEIC", "c.avif", "d.jxl", "e.dng", "f.dcm"):
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / ".g.heic").write_bytes(b"x")
    (tmp_path / "h.jpg").write_bytes(encoded("JPEG"))
    made, rows = read(tmp_path)
    assert (len(rows), made.ignored, made.expected) == (1, 1, 7)
    reasons = {os.path.basename(name): reason for name, reason in made.skipped}
    assert list(reasons) == ["a.heic", "b.HEIC", "c.avif", "d.jxl", "e.dng", "f.dcm"]
    assert reasons["a.heic"] == reasons["b.HEIC"] == "HEIF, which is not read here: pip install testreg[heif]"
    assert "pip install -U pillow" in reasons["c.avif"]
    assert "pip install pillow-jxl-plugin" in reasons["d.jxl"]
    assert "developed" in reasons["e.dng"]
    assert "medical" in reasons["f.dcm"]
    ((category, message),) = warned(made)
    assert category is ImagesSkipped
    assert message.startswith(f"skipped 6 of 7 image files, and 1 of other kinds: {tmp_path}/a.heic: HEIF")
    assert "c.avif" in message  # one of each kind before a second one
    assert "d.jxl" in message
    assert "b.HEIC" not in message
    assert [sample.path.name for sample in photos(tmp_path)][:2] == ["a.heic", "b.HEIC"]  # for `evaluate` too


def test_nothing_but_heic_says_how_to_read_it(tmp_path, plain_pillow):
    (tmp_path / "a.heic").write_bytes(b"x" * 100)
    for images in (tmp_path, tmp_path / "a.heic"):
        with pytest.raises(BadImages, match=r"1 broken .*a.heic: HEIF, which is not read here: pip install testreg\[h"):
            read(images)


def test_open_files_are_read_whole_from_their_beginning(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(0)).save(path)
    buffer = io.BytesIO()
    Image.fromarray(noise(0)).save(buffer, "PNG")  # and stands at its end now
    with path.open("rb") as file, path.open("rb", buffering=0) as raw:
        for form in (file, raw, buffer, [file, buffer], {"image": buffer}, (open_file for open_file in [file])):
            made, rows = read(form)
            assert all(torch.equal(row, pixels(noise(0))) for row in rows)
            assert made.count == (2 if isinstance(form, list) else 1)
        assert stream([file, buffer], pixels).expected == 2
        made, _ = read(file)
        assert sum(map(len, made)) == 1  # and again


def test_a_file_that_is_open_as_text_or_used_up_says_so(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(0)).save(path)
    with path.open(errors="replace") as file, pytest.raises(BadImages, match=r"open as text.*open\(path, 'rb'\)"):
        read([file])

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    made, rows = read(Pipe(path.read_bytes()))
    assert len(rows) == 1
    with pytest.raises(BadImages, match="Pipe, which an earlier iteration used up"):
        list(made)


@pytest.mark.parametrize("nested", [False, True])
def test_a_generator_that_is_given_twice_says_so(nested):
    generator = (noise(seed) for seed in range(3))
    images = [generator] if nested else generator
    assert len(read(images)[1]) == 3
    with pytest.raises(BadImages, match=r"0 broken.*generator yielded nothing: it is empty, or was read before.*list"):
        read(images)


def test_pictures_of_12_bits_in_16_are_called_nearly_black(tmp_path):
    deep = np.random.default_rng(0).integers(0, 4096, (16, 16)).astype(np.uint16)
    deep[0, 0] = 4095
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep * 16).save(tmp_path / "b.png")
    made, rows = read([tmp_path, deep, np.full((4, 4), 0.06), np.full((4, 4), 0.07)])
    assert [int(row.max()) for row in rows] == [16, 255, 16, 15, 18]
    assert made.dark == [str(tmp_path / "a.png"), "images[1]", "images[2]"]
    ((category, message),) = warned(made)
    assert category is ImagesDark
    assert message.startswith(f"3 of 5 images are nearly only black ({tmp_path}/a.png, images[1], images[2]): no value")
    assert "times 16" in message
    assert warned(read([deep * 16])[0]) == []
