"""Image processors by name and by numbers, those of vision-language models, and what to do where there is none."""

import numpy as np
import pytest
import torch
import transformers
import zoo
from PIL import Image

import testreg
from testreg.images import processors
from testreg.images.processors import processor_for
from testreg.images.streaming import stream
from testreg.images.takes import Takes
from testreg.runtime.errors import BadImages

SIZE = zoo.SIZE


def noise(seed=0, height=40, width=60):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with an image processor, and one without."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, _ = zoo.build("ViTModel")
    model.save_pretrained(folder / "with")
    model.save_pretrained(folder / "without")
    transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.1] * 3).save_pretrained(
        folder / "with"
    )
    return folder


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("32:0.5:0.25", [0.5] * 3, [0.25] * 3),
        ("32:0.1,0.2,0.3:1,2,3", [0.1, 0.2, 0.3], [1, 2, 3]),
        ("32:imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("32:clip", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ("32:0:1", [0] * 3, [1] * 3),
    ],
)
def test_the_numbers_of_a_processor(text, mean, std):
    (batch,) = stream(noise(), text)
    (row,) = batch.inputs["pixel_values"]
    resized = np.array(noise().resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))) / 255
    assert row.shape == (3, 32, 32)
    expected = torch.from_numpy((resized - mean) / std).permute(2, 0, 1)
    assert (row - expected).abs().max() < 2 / 255 / min(std)  # of whole levels


def test_the_usual_numbers_are_those_of_transformers():
    from transformers import image_utils as known

    assert {
        "imagenet": (tuple(known.IMAGENET_DEFAULT_MEAN), tuple(known.IMAGENET_DEFAULT_STD)),
        "clip": (tuple(known.OPENAI_CLIP_MEAN), tuple(known.OPENAI_CLIP_STD)),
    } == processors.NORMS


@pytest.mark.parametrize(
    "text", ["224", "224:", "224:0.5", "224:half", "224:0.5:0.5:0.5", "224:0.5,0.5:1", "224:a:b", "224:nan:1",
             "224:0.5:0", "224:0.5:-1", "2:0.5:0.5", "99999:0.5:0.5"],
)  # fmt: skip
def test_numbers_that_are_none_say_the_form(text):
    with pytest.raises(BadImages, match=r"no image processor.*SIZE:MEAN:STD, as in 224:0.5:0.5"):
        stream(noise(), text)


def test_a_processor_by_the_name_of_a_checkpoint(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    monkeypatch.setenv("HOME", str(checkpoint))
    expected = transformers.AutoImageProcessor.from_pretrained("with")(noise(), return_tensors="pt")["pixel_values"]
    for name in ("with", checkpoint / "with", "~/with", "with/preprocessor_config.json"):
        (batch,) = stream(noise(), name)
        assert torch.equal(batch.inputs["pixel_values"], expected), name
    model = transformers.ViTModel.from_pretrained("without")
    assert testreg.inspect(model, [noise()] * 2, processor="with").images == 2
    model.image_processor = processors.named("with")
    assert testreg.inspect(model, [noise()] * 2).images == 2


def test_a_checkpoint_without_a_processor_says_what_to_put_where(checkpoint):
    model = transformers.ViTModel.from_pretrained(checkpoint / "without")
    says = (
        r"'.*without' \(it has no preprocessor_config.json\): put a preprocessor_config.json beside the weights, .*"
        r"processor=NAME \(--processor NAME on the command line\).*224:0.5:0.5"
    )
    with pytest.raises(BadImages, match=says):
        testreg.inspect(model, noise())
    with pytest.raises(BadImages, match=says):
        stream(noise(), checkpoint / "without")
    with pytest.raises(BadImages, match=r"no directory ./nowhere: .*SIZE:MEAN:STD"):
        stream(noise(), "./nowhere")
    with pytest.raises(BadImages, match="int is no image processor"):
        stream(noise(), 224)


def llava(folder):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**zoo.VISION), text_config=transformers.LlamaConfig(**zoo.TEXT)
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder)


def test_a_vision_language_model_lends_its_tower_the_processor_and_the_tower_alone_says_so(tmp_path):
    model = llava(tmp_path)
    tower = model.model.vision_tower
    images = [noise(seed) for seed in range(3)]
    found = testreg.inspect(model, images)
    assert found.images == 3
    with pytest.raises(
        BadImages, match=r"CLIPVisionModel was not loaded.*testreg.find\(model, images\).*processor=NAME"
    ):
        testreg.inspect(tower, images)
    assert testreg.inspect(tower, images, processor=str(tmp_path)).blocks == found.blocks  # the line that it names


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "LlavaNextImageProcessor",
            {"crop_size": 32, "size": {"shortest_edge": 32}, "image_grid_pinpoints": [[32, 64]]},
        ),
        ("LlavaOnevisionImageProcessor", {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64]]}),
        ("Gemma3ImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("Idefics2ImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 32}}),
        ("Idefics3ImageProcessor", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}),
        ("SmolVLMImageProcessor", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}),
        ("JanusImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("GotOcr2ImageProcessor", {"size": {"height": 32, "width": 32}}),
    ],
)
def test_processors_that_cut_pictures_into_parts_give_the_tower_the_whole(kind, settings):
    processor = getattr(transformers, kind)(**settings)
    whole = Image.new("RGB", (64, 64), (255, 0, 0))
    whole.paste((0, 0, 255), (32, 0, 64, 64))  # red on the left, blue on the right
    (batch,) = stream(whole, processor, model=zoo.build("CLIPVisionModel")[0])
    assert set(batch.inputs) == {"pixel_values"}
    (row,) = batch.inputs["pixel_values"]
    assert row.ndim == 3
    red, blue = row[0], row[2]
    third = row.shape[-1] // 3
    assert red[:, :third].mean() > red[:, -third:].mean() + 0.5  # both halves are in it
    assert blue[:, -third:].mean() > blue[:, :third].mean() + 0.5


def test_models_of_timm_are_told_their_own_line():
    model = torch.nn.Linear(1, 1)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    with pytest.raises(
        BadImages, match=r"timm.data.create_transform\(\*\*timm.data.resolve_model_data_config\(model\)\)"
    ):
        processor_for(model)


def test_a_resized_processor_is_called_as_its_own():
    from testreg.images.resized import resized

    gray = Takes("ViTModel", channels=1)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    picture = noise().convert("L")
    made = processors.call(resized(processor, 2.0), picture, gray)["pixel_values"]
    assert made.shape == (1, 1, 64, 64)
    assert torch.equal(
        made, processors.call(processor, picture, gray, size={"height": 64, "width": 64})["pixel_values"]
    )


def test_settings_that_a_function_does_not_take_are_not_dropped():
    with pytest.raises(TypeError, match="do_resize"):
        processors.call(lambda picture: torch.zeros(3, 8, 8), noise(), Takes(), do_resize=False)
