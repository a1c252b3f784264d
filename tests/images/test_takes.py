"""Images follow the model: one channel, many channels, clips; and what is given to the wrong kind of model is told."""

import hashlib
import io
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
import zoo
from PIL import Image

import testreg
from testreg.images.streaming import stream
from testreg.images.takes import Takes, taken_by
from testreg.runtime.errors import BadImages
from testreg.runtime.paths import reach
from testreg.runtime.towers import find_tower

SIZE = zoo.SIZE
SQUARE = {"height": SIZE, "width": SIZE}


def noise(seed, shape=(SIZE, SIZE, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def vit(channels):
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**zoo.VISION, num_channels=channels)).eval()


def rows(images, processor, model):
    made = stream(images, processor, model=model)
    return made, [row for batch in made for value in batch.inputs.values() for row in value]


# --- Channels


@pytest.mark.parametrize(
    "processor",
    [
        ViT := transformers.ViTImageProcessor(size=SQUARE, image_mean=[0.25], image_std=[0.5]),
        transformers.ViTImageProcessor(size=SQUARE, image_mean=0.25, image_std=0.5),
        transformers.ViTImageProcessor(size=SQUARE, image_mean=[0.25] * 3, image_std=[0.5] * 3),
        transformers.CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.25] * 3, image_std=[0.5] * 3
        ),  # makes RGB of everything, if it is let
        f"{SIZE}:0.25:0.5",
        lambda picture: torch.from_numpy(np.array(picture) / 255 - 0.25)[None].float() / 0.5,
    ],
    ids=["list", "number", "three alike", "clip", "numbers", "function"],
)
def test_a_model_of_one_channel_gets_gray_pictures(processor):
    picture = Image.fromarray(noise(0))
    gray = np.array(picture.convert("L"))
    made, (row,) = rows(picture, processor, vit(1))
    assert torch.allclose(row, torch.from_numpy(gray / 255 - 0.25)[None].float() / 0.5, atol=1e-6)
    (batch,) = made
    assert batch.digests == (hashlib.sha256(f"L {SIZE}x{SIZE} ".encode() + gray.tobytes()).hexdigest(),)


def test_gray_pictures_of_any_depth_reach_a_model_of_one_channel(tmp_path):
    gray = noise(1, (SIZE, SIZE))
    Image.fromarray(gray).save(tmp_path / "8.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(gray).convert("LA").save(tmp_path / "opaque.png")
    made, found = rows([tmp_path, gray, gray[None]], ViT, vit(1))
    assert made.count == 5
    assert all(torch.equal(row, found[0]) for row in found)
    assert len({digest for batch in made for digest in batch.digests}) == 1


def test_means_of_colours_do_not_fit_one_channel():
    processor = transformers.ViTImageProcessor(size=SQUARE, image_mean=[0.48, 0.45, 0.4], image_std=[0.2] * 3)
    with pytest.raises(BadImages, match=r"takes images of 1 channel, .*0.48, 0.45, 0.4.*as in 224:0.5:0.5"):
        list(stream(noise(0), processor, model=vit(1)))


def test_pictures_are_refused_where_they_have_too_few_channels_and_a_function_may_make_more():
    for processor in (None, f"{SIZE}:0.5:0.5", transformers.ViTImageProcessor(size=SQUARE)):
        with pytest.raises(BadImages, match=r"takes images of 6 channels, which no picture has: .*\(images, 6, height"):
            list(stream(noise(0), processor, model=vit(6)))
    values = torch.randn(6, SIZE, SIZE)
    _, (row,) = rows(noise(0), lambda picture: values, vit(6))
    assert torch.equal(row, values)
    assert len(rows(values[None].expand(3, -1, -1, -1), None, vit(6))[1]) == 3


def test_tensors_of_another_number_of_channels_are_refused():
    with pytest.raises(BadImages, match=r"images\[0\] has 3 channels, .*ViTModel takes 1\."):
        testreg.inspect(vit(1), torch.randn(2, 3, SIZE, SIZE))
    with pytest.raises(BadImages, match=r"what|has 1 channel, .*ViTModel takes 3\."):
        testreg.inspect(vit(3), noise(0), processor=lambda picture: torch.zeros(1, SIZE, SIZE))
    assert testreg.inspect(vit(1), torch.randn(2, 1, SIZE, SIZE)).images == 2


@pytest.mark.parametrize("name", [name for name in zoo.ROWS if "text" not in name and "vjepa2." not in name])
def test_what_every_family_takes_is_what_its_example_has(name):
    model, inputs = zoo.build(name)  # but for V-JEPA 2's own code, whose frames come after its channels
    shape = next(value.shape for key, value in inputs.items() if value.ndim in (3, 4, 5) and value.is_floating_point())
    takes = taken_by(model)
    assert takes.channels == 3
    assert (takes.frames is not None) == (len(shape) == 5)
    if len(shape) == 5:
        assert takes.frames == shape[1]


def test_without_a_model_pictures_are_in_colour():
    assert taken_by(None) == Takes() == taken_by(torch.nn.Linear(2, 2))


# --- Clips


def clip_model(name):
    return zoo.build(name)[0]


def frames(clip, count=12):
    return [Image.fromarray(noise(100 * clip + index, (40, 48, 3))) for index in range(count)]


VIDEOMAE = transformers.VideoMAEImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of folders of frames 0.png ... 11.png, beside what is no clip."""
    folder = tmp_path_factory.mktemp("clips")
    for clip in range(3):
        (folder / f"{clip}").mkdir()
        for index, frame in enumerate(frames(clip)):
            frame.save(folder / f"{clip}" / f"{index}.png")
    (folder / "0" / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize("name", ["VideoMAEModel", "VJEPA2Model"])
def test_a_folder_of_folders_of_frames_are_clips_with_their_frames_in_order(clips, name):
    made, found = rows(clips, VIDEOMAE, clip_model(name))
    assert (made.count, made.ignored, made.skipped, made.expected) == (3, 1, [], 3)
    for clip, row in enumerate(found):
        seen = [frames(clip)[index] for index in (0, 3, 6, 9)]  # the model takes 4 of 12: evenly spaced, 9 before 10
        assert torch.equal(row, VIDEOMAE(seen, return_tensors="pt")["pixel_values"][0])


def test_sampling_is_that_of_transformers():
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    from testreg.images.clips import spaced

    for total in range(4, 70):
        expected = default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=4)
        assert spaced(total, 4) == expected.tolist()


def test_every_form_of_a_clip_gives_the_same(clips):
    model, given = clip_model("VideoMAEModel"), frames(0)
    array = np.stack([np.array(frame) for frame in given])
    paths = sorted((clips / "0").glob("*.png"), key=lambda path: int(path.stem))
    forms = {
        "folder": [clips / "0"],
        "paths": [paths],
        "strings": [[str(path) for path in paths]],
        "bytes": [[path.read_bytes() for path in paths]],
        "open files": [[io.BytesIO(path.read_bytes()) for path in paths]],
        "pictures": [given],
        "opened": [[Image.open(path) for path in paths]],
        "tuple": (tuple(given),),
        "frames that are arrays": [list(array)],
        "array": [array],
        "channels first": [torch.from_numpy(array).permute(0, 3, 1, 2)],
        "array of clips": array[None],
        "row": [{"video": given, "label": 3}],
        "pair": [(given, 3)],
        "generator": (clip for clip in [given]),
    }
    digests = set()
    for form, images in forms.items():
        (batch,) = stream(images, VIDEOMAE, model=model)
        assert batch.inputs["pixel_values"].shape == (1, 4, 3, SIZE, SIZE), form
        digests.add(batch.digests)
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["VideoMAEModel", "VJEPA2Model"])
def test_processed_clips_need_no_processor(name):
    model, inputs = clip_model(name), zoo.clips(3)
    for given in (inputs, [*inputs], [{"pixel_values": clip} for clip in inputs], {"pixel_values_videos": inputs}):
        assert torch.equal(torch.stack(rows(given, None, model)[1]), inputs)
    found = testreg.inspect(model, inputs)
    assert (found.images, testreg.inspect(model, [*inputs]).blocks) == (3, found.blocks)


def test_the_models_own_video_processor_is_found_and_gets_the_frames(tmp_path, clips):
    processor = transformers.VJEPA2VideoProcessor(crop_size=SIZE)
    model = clip_model("VJEPA2Model")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = transformers.VJEPA2Model.from_pretrained(tmp_path)
    _, found = rows(clips, None, model)
    seen = [frames(1)[index] for index in (0, 3, 6, 9)]
    expected = processor(seen, return_tensors="pt", do_sample_frames=False)["pixel_values_videos"][0]
    assert torch.equal(found[1], expected)
    assert testreg.inspect(model, clips).images == 3


def test_find_patches_a_model_of_clips():
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        hidden_size=48, num_hidden_layers=5, num_attention_heads=4, intermediate_size=96, image_size=SIZE, patch_size=8,
        num_frames=4,
    )  # fmt: skip
    model = transformers.VideoMAEModel(config).eval()
    inputs = 0.1 * torch.randn(12, 4, 3, SIZE, SIZE)
    for clip, place in enumerate(torch.randint(0, 4, (12,)).tolist()):
        inputs[clip, :2, :, 8 * place : 8 * place + 8, 8:16] = 4  # one patch of two frames, which a neuron answers
    tower = find_tower(model)
    with torch.no_grad():
        embed = model.embeddings.patch_embeddings
        hot, plain = (embed(value * torch.ones(1, 4, 3, SIZE, SIZE))[0, 0] for value in (4, 0))
        direction = torch.nn.functional.normalize(hot - plain, dim=0)
        first, second = reach(tower.blocks[2], ("mlp.fc1", "intermediate.dense")), tower.downs[2]
        first.weight[7], first.bias[7] = 5 * direction, -15.0
        second.weight[:, 7] = 3 * torch.nn.functional.normalize(torch.randn(48), dim=0)
    assert testreg.inspect(model, inputs).artefact.block == 2
    plan = testreg.find(model, inputs, force=True)
    assert (2, 7) in plan.pairs
    assert plan.provenance["resolution"] == [SIZE, SIZE]
    with testreg.patch(model, plan):
        assert testreg.inspect(model, inputs).artefact is None


def write_video(path, count=10):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((40, 48, 3), 20 * index, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])  # mkv does not say how many frames it has
def test_video_files_are_clips(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}")
    write_video(tmp_path / "short.mp4", 3)
    made, (row,) = rows(tmp_path, f"{SIZE}:0:1", clip_model("VideoMAEModel"))
    levels = row.mean((1, 2, 3)) * 255
    assert torch.allclose(levels, torch.tensor([0.0, 40, 100, 140]), atol=3)  # of 10 frames, 0, 2, 5 and 7
    assert made.skipped == [(str(tmp_path / "short.mp4"), "a clip of 3 frames, where VideoMAEModel takes 4")]
    for form in ([path], [path.read_bytes()], [path.open("rb")], path):
        assert torch.equal(rows(form, f"{SIZE}:0:1", clip_model("VideoMAEModel"))[1][0], row)


def test_video_files_without_their_reader_say_what_to_install(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadImages, match=r"clip.mp4: a video file, which PyAV reads: pip install testreg\[video\]"):
        rows(tmp_path, VIDEOMAE, clip_model("VideoMAEModel"))
    assert path.exists()


def test_broken_frames_and_frames_of_several_sizes_skip_the_clip(tmp_path, clips):
    cut = [*frames(0)[:3], (clips / "0" / "3.png").read_bytes()[:200]]
    sizes = [*frames(0)[:3], Image.new("RGB", (8, 8))]
    made, found = rows([cut, sizes, frames(1)], VIDEOMAE, clip_model("VideoMAEModel"))
    assert len(found) == 1
    assert [name for name, _ in made.skipped] == ["images[0]", "images[1]"]
    assert "truncated" in made.skipped[0][1]
    assert "are they photos?" in made.skipped[1][1]


def test_photos_for_a_model_of_clips_are_told_apart(tmp_path):
    model = clip_model("VideoMAEModel")
    for seed in range(2):
        Image.fromarray(noise(seed)).save(tmp_path / f"{seed}.png")
    takes = "VideoMAEModel takes clips of 4 frames: give a folder that holds one folder of frames"
    with pytest.raises(BadImages, match=rf"2 broken .*There are photos, such as 0.png, and {takes}"):
        rows(tmp_path, VIDEOMAE, model)
    for photos in (tmp_path / "0.png", frames(0), [noise(0)], torch.randn(4, 3, SIZE, SIZE), [torch.randn(3, 8, 8)]):
        with pytest.raises(BadImages, match=takes):
            rows(photos, VIDEOMAE, model)
    with pytest.raises(BadImages, match=r"has 6 frames, .*clips of 4 frames"):
        rows(torch.randn(2, 6, 3, SIZE, SIZE), None, model)
    with pytest.raises(BadImages, match=r"pass tensor.permute\(0, 1, 4, 2, 3\)"):
        rows(torch.randn(2, 4, SIZE, SIZE, 3), None, model)


def test_clips_for_a_model_of_images_are_told_apart(tmp_path):
    model = vit(3)
    with pytest.raises(BadImages, match=r"is a clip, of the shape \(4, 3, .*ViTModel takes images .*flatten\(0, 1\)"):
        rows(torch.randn(2, 4, 3, SIZE, SIZE), None, model)
    (tmp_path / "clip.mp4").write_bytes(b"x" * 100)
    with pytest.raises(
        BadImages, match=r"1 passed over.*There are videos, such as clip.mp4, and ViTModel takes images"
    ):
        rows(tmp_path, ViT, model)
    with pytest.raises(BadImages, match="a video, where images are needed"):
        rows(tmp_path / "clip.mp4", ViT, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.fromarray(noise(0)).save(tmp_path / "photo.png")  # a phone keeps a short video beside each photo
        assert testreg.inspect(model, tmp_path, processor=f"{SIZE}:0.5:0.5").images == 1
