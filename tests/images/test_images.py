"""Everything that holds images becomes the batches that the model's own processor makes; what is broken is skipped."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BatchFeature, CLIPImageProcessor, Siglip2ImageProcessor, ViTImageProcessor

from testreg.images.processors import processor_for
from testreg.images.streaming import stream
from testreg.runtime.errors import BadImages

SIZE = 8
VIT = ViTImageProcessor(size={"height": SIZE, "width": SIZE})


def pixels(image):
    """A processor that changes nothing: the pixels that it was given, (3, height, width) in 0..255."""
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def read(images, processor=pixels, **options):
    """The whole stream, and its images one by one as (channels, height, width)."""
    made = stream(images, processor, **options)
    return made, [row for batch in made for row in batch.inputs["pixel_values"]]


def only(images, processor=pixels):
    _, rows = read(images, processor)
    assert len(rows) == 1
    return rows[0]


def noise(seed, height=6, width=5):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Five pictures, in two folders."""
    (tmp_path / "b").mkdir()
    for seed, name in enumerate(["c.png", "a.png", "b/z.png", "b/A.PNG", "d.bmp"]):
        Image.fromarray(noise(seed)).save(tmp_path / name)
    return tmp_path


def names_of(folder):
    return ["a.png", "b/A.PNG", "b/z.png", "c.png", "d.bmp"]


# --- Sources


def test_a_folder_is_searched_in_the_order_of_names(folder):
    made, rows = read(folder, batch_size=2)
    assert torch.equal(torch.stack(rows), torch.stack([only(folder / name) for name in names_of(folder)]))
    assert (made.count, made.skipped, made.ignored, made.expected) == (5, [], 0, 5)
    assert [len(batch) for batch in made] == [2, 2, 1]  # and it can be read again
    assert made.count == 5


def test_other_and_hidden_files_are_counted_and_passed_over(folder):
    (folder / "notes.txt").write_text("no image")
    (folder / "labels").write_text("no suffix")
    (folder / "._a.png").write_bytes(b"a resource fork")
    (folder / ".hidden").mkdir()
    Image.fromarray(noise(9)).save(folder / ".hidden" / "a.png")
    made, rows = read(str(folder))
    assert (len(rows), made.skipped, made.ignored, made.expected) == (5, [], 4, 5)
    assert sum(len(batch) for batch in made) == 5
    assert made.ignored == 4  # of the last iteration


def test_links_are_followed_but_not_in_circles(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.fromarray(noise(9)).save(elsewhere / "e.png")
    (folder / "link").symlink_to(elsewhere)
    (folder / "b" / "up").symlink_to(folder)
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    made, rows = read(folder)
    assert len(rows) == 6
    assert [name for name, _ in made.skipped] == [str(folder / "dangling.png")]


def test_every_form_of_an_image_gives_the_same(tmp_path):
    array = noise(0, 6, 7)
    path = saved(tmp_path / "image.png", Image.fromarray(array))
    forms = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "picture": Image.fromarray(array),
        "opened": Image.open(path),
        "array": array,
        "channels first": array.transpose(2, 0, 1),
        "floats": (array / 255).astype(np.float32),
        "16 bits": array.astype(np.uint16) * 257,
        "uint8 tensor": torch.from_numpy(array).permute(2, 0, 1),
        "opaque": np.concatenate([array, np.full((6, 7, 1), 255, np.uint8)], -1),
        "row": {"image": Image.fromarray(array), "label": 3},
        "row with a name of its own": {"photo": Image.fromarray(array), "id": "x"},
        "undecoded row": {"image": {"bytes": path.read_bytes(), "path": None}},
        "undecoded path": {"image": {"bytes": None, "path": str(path)}},
        "pair": (Image.fromarray(array), 3),
        "nested": [[[path]]],
        "generator": (image for image in [array]),
        "array of images": array[None],
    }
    expected = torch.from_numpy(array).permute(2, 0, 1).float()
    for form, images in forms.items():
        made = stream(images, pixels)
        (batch,) = made
        assert torch.equal(batch.inputs["pixel_values"][0], expected), form
        assert batch.digests == (hashlib.sha256(b"RGB 7x6 " + array.tobytes()).hexdigest(),), form


def test_mixed_and_nested_lists(folder):
    gray = np.arange(30, dtype=np.uint8).reshape(6, 5)
    mixed = [folder, [folder / "a.png", (Image.fromarray(noise(7)), 1)], gray, (noise(s) for s in (1, 2))]
    made, rows = read(mixed)
    assert len(rows) == made.count == 5 + 2 + 1 + 2
    assert torch.equal(rows[7], torch.from_numpy(gray).float().expand(3, -1, -1))
    assert made.ignored == 1  # the label
    assert made.expected is None
    assert stream(mixed[:3], pixels).expected == 8


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (1, 6, 5)])
def test_gray_arrays(shape):
    gray = np.arange(30, dtype=np.uint8)
    assert torch.equal(only(gray.reshape(shape)), torch.from_numpy(gray.reshape(6, 5)).float().expand(3, -1, -1))


def test_boolean_arrays_are_black_and_white():
    assert only(np.eye(4, dtype=bool)).unique().tolist() == [0, 255]


def test_the_last_axis_is_channels_wherever_it_can_be():
    array = noise(0, 3, 3)
    assert torch.equal(only(array), torch.from_numpy(array).permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((4, 4), 200.0), "from 200.0 to 200.0"),
        (np.full((4, 4), -0.5), "floats from 0 to 1"),
        (np.full((4, 4), np.nan), "nan"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((6, 4, 5), np.uint8), r"\(6, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros((1, 1, 2, 4, 4), np.uint8), r"\(1, 1, 2, 4, 4\)"),
    ],
)
def test_arrays_without_a_known_meaning_are_refused(array, says):
    with pytest.raises(BadImages, match=rf"images\[1\].*{says}"):
        read([noise(0), array])


def test_processed_tensors_need_no_processor():
    values = torch.randn(5, 3, 4, 4)
    made = stream(values, batch_size=2)
    batches = list(made)
    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in batches]), values)
    assert [list(batch.inputs) for batch in batches] == [["pixel_values"]] * 3
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert made.expected == 5
    for other in ([*values], [values[:2], values[2:]], {"pixel_values": values}, [{"pixel_values": v} for v in values]):
        again = list(stream(other, batch_size=2))
        assert torch.equal(again[2].inputs["pixel_values"], values[4:])
        assert [batch.digests for batch in again] == [batch.digests for batch in batches]


def test_processed_tensors_keep_their_dtype_and_leave_their_graph():
    values = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    (batch,) = stream(values)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert not batch.inputs["pixel_values"].requires_grad
    assert torch.equal(batch.inputs["pixel_values"], values)


def test_dicts_of_inputs_keep_every_key_and_axis():
    inputs = {
        "pixel_values": torch.randn(3, 6, 12),  # packed patches, as SigLIP2's
        "pixel_attention_mask": torch.tensor([[1, 1, 0]] * 3),
        "spatial_shapes": np.array([[1, 2], [2, 1], [1, 2]]),
        "labels": torch.tensor([0, 1, 2]),
    }
    first, second = stream(inputs, batch_size=2)
    assert set(first.inputs) == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    for key, value in first.inputs.items():
        assert torch.equal(torch.cat([value, second.inputs[key]]), torch.as_tensor(inputs[key])), key
    assert len({*first.digests, *second.digests}) == 3


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.full((1, 3, 4, 4), float("nan")), "NaN or infinity"),
        ([torch.zeros(3, 4, 4), torch.full((3, 4, 4), float("inf"))], r"images\[1\] holds NaN or infinity"),
        ({"pixel_values": torch.zeros(2, 3, 4, 4), "mask": torch.zeros(3, 4)}, "same axis of images"),
        ({"pixel_values": [[1.0], [1.0, 2.0]]}, "make no tensor"),
        ({"pixel_values": None}, "make no tensor"),
        (torch.zeros(2, 8, 8, 3), r"permute\(0, 3, 1, 2\)"),
        ({"train": [1], "test": [2]}, "'train', 'test'"),
        ({"left": Image.new("RGB", (2, 2)), "right": Image.new("RGB", (2, 2))}, "'left', 'right'"),
        (nn.Linear(1, 1), "is a Linear"),
        (None, "is a NoneType"),
        ([], "the list given: 0 broken"),
        ([1, 2.0, torch.zeros(3)], "3 passed over"),
    ],
)
def test_values_that_are_no_images_are_refused(images, says):
    with pytest.raises(BadImages, match=says):
        list(stream(images, pixels))


def test_a_path_that_does_not_exist_is_refused_before_any_work(tmp_path):
    for images in ("", str(tmp_path / "gone"), tmp_path / "gone.jpg", [noise(0), tmp_path / "gone.jpg"], "\0"):
        with pytest.raises(BadImages, match="no file or folder"):
            stream(images, pixels)
    with pytest.raises(BadImages, match="no file or folder"):  # only the iteration can see this one
        list(stream((path for path in [tmp_path / "gone.jpg"]), pixels))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2.0}, {"batch_size": True}, {"workers": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(BadImages, match="must be a whole number"):
        stream(noise(0), pixels, **options)


def test_data_sets_and_loaders():
    class Photos(Dataset):  # has no __iter__ and does not say where it ends
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Image.fromarray(noise(index)), index

    expected = [torch.from_numpy(noise(index)).permute(2, 0, 1).float() for index in range(4)]
    made, rows = read(Photos())
    assert torch.equal(torch.stack(rows), torch.stack(expected))
    assert (made.expected, made.ignored) == (4, 4)
    values = torch.stack(expected)
    for loader in (
        DataLoader(TensorDataset(values), batch_size=3),
        DataLoader(TensorDataset(values, torch.arange(4)), batch_size=3),
        DataLoader([{"pixel_values": value, "labels": 1} for value in values], batch_size=3),
    ):
        made, rows = read(loader, None, batch_size=4)
        assert torch.equal(torch.stack(rows), values)
        assert made.expected is None


def test_an_iterator_is_read_once_and_says_so():
    made, rows = read(noise(seed) for seed in range(3))
    assert len(rows) == 3
    with pytest.raises(BadImages, match=r"generator.*list\(images\)"):
        list(made)
    nested, _ = read([noise(0), iter([noise(1)])])
    with pytest.raises(BadImages, match="used up"):  # never fewer images in silence
        list(nested)


# --- Decoding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = noise(0, 4, 6)
    # What a camera stores, from the EXIF standard: which edge of the scene the first row and the first column are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    path = saved(tmp_path / "turned.png", image, exif=exif)
    assert torch.equal(only(path), torch.from_numpy(upright).permute(2, 0, 1).float())
    turned = only(saved(tmp_path / "turned.jpg", image, exif=exif, quality=100, subsampling=0))
    assert (turned - only(path)).abs().mean() < 4  # JPEG's own loss


@pytest.mark.parametrize(("suffix", "mode"), [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B"), ("pgm", "I")])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix, mode):
    values = np.array([[0, 128, 129, 257], [25700, 32768, 65406, 65535]], np.uint16)
    image = Image.fromarray(values).convert("I") if mode == "I" else Image.fromarray(values)
    if mode == "I;16B":
        image = Image.frombytes(mode, image.size, values.astype(">u2").tobytes())
    path = saved(tmp_path / f"deep.{suffix}", image)
    assert Image.open(path).mode in (mode, "I")  # older releases of Pillow read PNG as I
    expected = torch.tensor([[0, 0, 1, 1], [100, 128, 254, 255]]).float()  # value / 257, rounded
    assert torch.equal(only(path), expected.expand(3, -1, -1))


def test_values_of_unknown_range_are_skipped_with_the_range(tmp_path):
    wide = saved(tmp_path / "wide.tif", Image.fromarray(np.full((2, 2), 70000, np.int32)))
    floats = saved(tmp_path / "floats.tif", Image.fromarray(np.full((2, 2), 0.2, np.float32)))
    beyond = saved(tmp_path / "beyond.tif", Image.fromarray(np.full((2, 2), 3.0, np.float32)))
    made, rows = read([wide, floats, beyond])
    assert torch.equal(rows[0], torch.full((3, 2, 2), 51.0))
    assert [name for name, _ in made.skipped] == [str(wide), str(beyond)]
    assert "int32 from 70000" in made.skipped[0][1]


def test_transparency_shows_white(tmp_path):
    red, clear, half = (255, 0, 0, 255), (9, 9, 9, 0), (0, 0, 0, 128)
    rgba = np.array([[red, clear, half]], np.uint8)
    white = torch.tensor([[[255.0, 255, 127]], [[0, 255, 127]], [[0, 255, 127]]])
    assert torch.equal(only(saved(tmp_path / "rgba.png", Image.fromarray(rgba))), white)
    assert torch.equal(only(rgba), white)
    gray = Image.new("LA", (2, 1), (7, 255))
    gray.putpixel((1, 0), (7, 0))
    assert only(saved(tmp_path / "la.png", gray))[:, 0].tolist() == [[7, 255]] * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert only(saved(tmp_path / "p.png", palette))[:, 0].tolist() == [[10, 40], [20, 50], [30, 60]]
    for options in ({"transparency": 0}, {"transparency": bytes([0, 255])}):
        path = saved(tmp_path / "clear.png", palette, **options)
        assert only(path)[:, 0].tolist() == [[255, 40], [255, 50], [255, 60]]
    key = saved(tmp_path / "key.png", Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert only(key).unique().tolist() == [255]


def test_other_modes_and_formats(tmp_path):
    cyan = saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), quality=100)
    assert Image.open(cyan).mode == "CMYK"
    assert (only(cyan)[:, 0, 0] - torch.tensor([0.0, 255, 255])).abs().max() <= 2
    ycck = Image.new("YCbCr", (8, 8), (255, 128, 128))
    assert only(ycck).unique().tolist() == [255]
    bits = saved(tmp_path / "bits.png", Image.fromarray(np.eye(3, dtype=bool)))
    assert torch.equal(only(bits)[0], torch.eye(3) * 255)
    gray = saved(tmp_path / "gray.png", Image.new("L", (2, 2), 77))
    assert only(gray).unique().tolist() == [77]
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    moving = saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    assert Image.open(moving).n_frames == 3
    assert only(moving)[:, 0, 0].tolist() == [255, 0, 0]
    for suffix in ("webp", "tif", "bmp", "ppm", "jp2", "jpeg"):
        path = saved(tmp_path / f"image.{suffix}", Image.new("RGB", (16, 16), (200, 100, 50)))
        assert (only(path)[:, 8, 8] - torch.tensor([200.0, 100, 50])).abs().max() <= 4, suffix


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (1, 50), (50, 1)])
def test_tiny_and_thin_images_are_seen_in_their_colours(tmp_path, size):
    path = saved(tmp_path / "thin.png", Image.new("RGB", size, (255, 0, 51)))
    row = only(path, VIT)
    assert row.shape == (3, SIZE, SIZE)
    assert row.flatten(1).std(1).max() < 1e-6
    assert row[:, 0, 0].tolist() == pytest.approx([1, -1, -0.6], abs=1e-5)


def broken_files(folder):
    whole = io.BytesIO()
    Image.fromarray(noise(0, 64, 64)).save(whole, "JPEG", quality=95)
    content = whole.getvalue()
    files = {
        "cut.jpg": content[: len(content) // 2],
        "head.jpg": content[:100],
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "zeros.png": bytes(1000),
    }
    Image.init()
    for kind in {"PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"} & set(Image.SAVE):
        whole = io.BytesIO()
        Image.fromarray(noise(0, 64, 64)).save(whole, kind)
        suffix = {"JPEG2000": "jp2", "TIFF": "tif"}.get(kind, kind.lower())
        files[f"cut.{suffix}"] = whole.getvalue()[: len(whole.getvalue()) * 2 // 3]
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sorted(files)


@pytest.mark.parametrize("lenient", [False, True])
def test_broken_files_are_skipped_with_a_reason(folder, monkeypatch, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as training scripts do; half gray otherwise
    broken = broken_files(folder)
    (folder / "folder.jpg").mkdir()
    made, rows = read(folder)
    assert [name for name, _ in made.skipped] == [str(folder / name) for name in broken]
    assert len(rows) == made.count == 5
    reasons = {os.path.basename(name): reason for name, reason in made.skipped}
    assert "truncated" in reasons["cut.jpg"]
    assert "empty" in reasons["empty.jpg"]
    assert "not an image" in reasons["text.jpg"]
    assert all("\n" not in reason and " " in reason for reason in reasons.values())
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
    assert made.expected == 5 + len(broken)


def test_a_picture_opened_from_a_broken_file_is_skipped(folder):
    broken_files(folder)
    made, rows = read([Image.open(folder / "cut.jpg"), (folder / "cut.jpg").read_bytes(), b"", noise(0)])
    assert len(rows) == 1
    assert [name for name, _ in made.skipped] == ["images[0]", "images[1]", "images[2]"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(folder):
    os.mkfifo(folder / "pipe.jpg")
    made, _ = read(folder)
    assert made.skipped == [(str(folder / "pipe.jpg"), "not a regular file")]


@pytest.mark.parametrize("factor", [1.5, 0.4])
def test_a_decompression_bomb_is_an_error_by_pillows_own_limit(folder, monkeypatch, factor):
    bomb = saved(folder / "bomb.png", Image.new("1", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10000 / factor))  # Pillow only warns up to twice the limit
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        made, rows = read(folder)
    assert len(rows) == (5 if factor > 1 else 6)
    assert warned == []
    assert [name for name, _ in made.skipped] == ([str(bomb)] if factor > 1 else [])
    assert all("exceeds limit" in reason for _, reason in made.skipped)


def test_nothing_but_broken_files_is_an_error_that_counts_them(tmp_path):
    broken = broken_files(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadImages, match=rf"{len(broken)} broken \(.*cut.*: .*; \.\.\.\), 1 passed over.*Expected"):
        read(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(BadImages, match="none: 0 broken, 0 passed over"):
        read(tmp_path / "none")


def test_formats_that_start_programs_are_no_images(tmp_path):
    script = tmp_path / "image.jpg"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert Image.open(script).format == "EPS"  # Pillow would hand it to Ghostscript
    with pytest.raises(BadImages, match="not an image"):
        read(script)


MAGIC = [
    b"",
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"II*\0",
    b"P6\n9 9\n255\n",
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=200))
def test_any_bytes_are_skipped_or_seen_and_nothing_else(magic, content):
    made = stream([magic + content, noise(0)], pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = sum(len(batch) for batch in made)
    assert count + len(made.skipped) == 2
    assert all(reason for _, reason in made.skipped)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), st.data())
def test_any_damage_to_a_file_is_skipped_or_seen_and_nothing_else(kind, data):
    whole = io.BytesIO()
    Image.fromarray(noise(0, 16, 16)).save(whole, kind)
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    made = stream([bytes(content), noise(0)], pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = sum(len(batch) for batch in made)
    assert count + len(made.skipped) == 2


# --- Processing


def test_the_processor_sees_what_it_always_saw(folder):
    _, rows = read(folder, VIT, batch_size=3)
    expected = VIT([Image.open(folder / name).convert("RGB") for name in names_of(folder)], return_tensors="pt")
    assert torch.equal(torch.stack(rows), expected["pixel_values"])


def test_a_full_processor_lends_its_image_processor():
    class Full:  # stands for CLIPProcessor, whose tokenizer needs files
        image_processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        tokenizer = None

    assert torch.equal(only(noise(0), Full()), only(noise(0), Full.image_processor))


class Ragged:
    """Keeps the aspect ratio and returns further keys, as transformers' processors for NaFlex models do."""

    model_input_names = ("pixel_values", "spatial_shapes")

    def __call__(self, images, return_tensors):
        values = pixels(images)[None]
        return BatchFeature({"pixel_values": values, "spatial_shapes": torch.tensor([values.shape[2:]]), "name": "x"})


def test_images_of_several_shapes_come_in_batches_of_one_shape():
    shapes = [(4, 4), (4, 6), (6, 4), (4, 4), (5, 5), (4, 4), (7, 7), (4, 6), (8, 8), (9, 9), (4, 4), (6, 4)]
    arrays = [noise(seed, *shape) for seed, shape in enumerate(shapes)]
    waiting, largest = 0, 0

    def source():
        nonlocal waiting, largest
        for array in arrays:
            waiting += 1
            largest = max(largest, waiting)
            yield array

    seen = {}
    for batch in stream(source(), Ragged(), batch_size=3):
        waiting -= len(batch)
        assert 1 <= len(batch) <= 3
        for row, shape, digest in zip(*batch.inputs.values(), batch.digests, strict=True):
            assert tuple(row.shape[1:]) == tuple(shape.tolist())
            seen[digest] = row
    assert len(seen) == len(arrays)  # none is lost
    assert largest <= 6  # two batches
    for array in arrays:
        digest = hashlib.sha256(f"RGB {array.shape[1]}x{array.shape[0]} ".encode() + array.tobytes()).hexdigest()
        assert torch.equal(seen[digest], torch.from_numpy(array).permute(2, 0, 1).float())


def test_packed_patches_keep_their_masks_and_shapes():
    processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    arrays = [noise(seed, *shape) for seed, shape in enumerate([(16, 16), (8, 30), (30, 8)])]
    (batch,) = stream(arrays, processor)
    expected = processor([Image.fromarray(array) for array in arrays], return_tensors="pt")
    assert batch.inputs.keys() == expected.keys() == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    for key, value in expected.items():
        assert torch.equal(batch.inputs[key], value), key


def test_an_image_that_the_processor_refuses_is_skipped():
    def picky(image):
        if image.width == 1:
            raise ValueError("the aspect ratio is too extreme")
        return pixels(image) / (0.0 if image.width == 2 else 1.0)

    made, rows = read([noise(0, 4, 1), noise(1, 4, 2), noise(2, 4, 4)], picky)
    assert len(rows) == 1
    assert made.skipped[0] == ("images[0]", "the aspect ratio is too extreme")
    assert "NaN or infinity" in made.skipped[1][1]


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        (lambda image: image, "makes a Image"),
        (lambda image: {"input_ids": torch.zeros(1, 3)}, "same axis of images"),
        (lambda image: torch.zeros(2, 3, 4, 4), "several images"),
    ],
)
def test_a_processor_that_makes_no_images_is_named_as_the_reason(processor, says):
    with pytest.raises(BadImages, match=says):
        read(noise(0), processor)


def test_raw_images_without_a_processor_are_refused(tmp_path):
    made = stream([torch.zeros(3, 4, 4), noise(0)])
    with pytest.raises(BadImages, match=r"images\[1\] needs an image processor.*processor="):
        list(made)
    with pytest.raises(BadImages, match="Linear was not loaded from a checkpoint"):
        list(stream(noise(0), model=nn.Linear(1, 1)))
    assert len(list(stream(torch.zeros(3, 4, 4), model=nn.Linear(1, 1)))) == 1
    with pytest.raises(BadImages, match="int is no image processor"):
        stream(noise(0), 3)


def test_the_processor_of_a_model(tmp_path):
    model = nn.Linear(1, 1)
    with pytest.raises(BadImages, match=r"not loaded from a checkpoint.*processor="):
        processor_for(model)
    model.name_or_path = str(tmp_path)
    with pytest.raises(BadImages, match=r"no usable image processor with .*processor="):
        processor_for(model)
    for content in ("", "[]", "{}", '{"image_processor_type": "NoSuchProcessor"}'):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(BadImages, match="no usable image processor"):
            processor_for(model)
    VIT.save_pretrained(tmp_path)
    assert processor_for(model).size == VIT.size
    assert torch.equal(next(iter(stream(noise(0), model=model))).inputs["pixel_values"][0], only(noise(0), VIT))
    model.image_processor = VIT  # as a pipeline has it
    assert processor_for(model) is VIT


# --- Streaming


def test_never_more_than_two_batches_are_alive():
    photos, processed, most = [], [], 0

    def count(kind, value):
        nonlocal most
        kind.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in kind))
        return value

    source = (count(photos, Image.fromarray(noise(seed))) for seed in range(60))
    made = stream(source, lambda image: count(processed, pixels(image)), batch_size=4)
    assert sum(len(batch) for batch in made) == len(photos) == len(processed) == 60
    assert most <= 8


def test_digests_do_not_depend_on_batch_size_or_order(folder):
    def digests(images, processor, **options):
        return [digest for batch in stream(images, processor, **options) for digest in batch.digests]

    files = [folder / name for name in names_of(folder)]
    expected = digests(folder, pixels, batch_size=16)
    assert len(set(expected)) == 5
    assert digests(folder, VIT, batch_size=2) == expected
    assert digests(files[::-1], VIT, batch_size=1) == expected[::-1]
    assert digests([Image.open(file) for file in files], pixels, batch_size=3) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches(folder, workers):
    broken_files(folder)
    images = [folder, Image.open(folder / "cut.jpg"), torch.zeros(2, 3, SIZE, SIZE)]

    def source():
        yield from images
        yield from (noise(seed) for seed in range(9))

    state = torch.random.get_rng_state()
    alone, shared = stream(source(), VIT, batch_size=4), stream(source(), VIT, batch_size=4, workers=workers)
    for one, other in zip(alone, shared, strict=True):
        assert one.digests == other.digests
        assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
    assert (alone.count, alone.skipped, alone.ignored) == (shared.count, shared.skipped, shared.ignored)
    assert alone.count == 16
    assert not images[2].is_shared()  # the user's tensors stay where they are
    assert torch.equal(torch.random.get_rng_state(), state)  # the user's random numbers are the user's


class Noted:
    """A processor that leaves a file for every image."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, image):
        tempfile.NamedTemporaryFile(dir=self.folder, delete=False).close()
        return pixels(image)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_prepare_the_next_batch_while_this_one_is_looked_at(tmp_path, workers):
    batches = iter(stream((noise(seed) for seed in range(32)), Noted(tmp_path), batch_size=8, workers=workers))
    next(batches)
    end = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 16:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(os.listdir(tmp_path)) <= 3 * 8 + workers  # and no more than two batches wait
    assert len(list(batches)) == 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_workers_hold_no_files_open():
    counts = []

    def source():
        for seed in range(60):
            counts.append(len(os.listdir("/proc/self/fd")))
            yield noise(seed)

    (batch,) = stream(source(), VIT, batch_size=64, workers=1)
    assert len(batch) == 60
    assert max(counts[10:]) - counts[0] < 30


def test_errors_with_workers_are_the_same_errors(tmp_path):
    with pytest.raises(BadImages, match=r"images\[1\] holds NaN"):
        list(stream([noise(0), torch.full((3, 4, 4), float("nan"))], pixels, workers=1))
    broken_files(tmp_path)
    with pytest.raises(BadImages, match=r"broken \(.*cut"):
        list(stream(tmp_path, pixels, workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_at_once(workers):
    program = f"""
        import signal, time, numpy as np, torch
        from testreg.images import stream
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        def slow(image):
            print("going", flush=True)
            time.sleep(60)
            return torch.zeros(3, 4, 4)
        for batch in stream([np.zeros((4, 4), np.uint8)] * 8, slow, workers={workers}):
            pass
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "going\n"
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - start < 10
        assert process.returncode != 0
        assert "KeyboardInterrupt" in errors
    finally:
        process.kill()


# --- The real thing


def test_real_photos_through_the_real_processors(assets):
    from transformers import AutoModel

    photos = assets / "images" / "coco_cc" / "images"
    for name, size, limit in (("vit-tiny-augreg", 224, None), ("dinov2-small-depth", 518, 4)):
        model = AutoModel.from_pretrained(assets / "checkpoints" / name)
        processor = processor_for(model)
        chosen = photos if limit is None else sorted(photos.iterdir())[:limit]
        made = stream(chosen, processor, batch_size=64)
        shapes = [batch.inputs["pixel_values"].shape for batch in made]
        assert all(shape[1:] == (3, size, size) for shape in shapes)
        assert sum(shape[0] for shape in shapes) == made.count == made.expected == (limit or 214)
        assert made.skipped == []
        with Image.open(sorted(photos.iterdir())[0]) as image:
            expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        assert torch.equal(next(iter(made)).inputs["pixel_values"][:1], expected)
