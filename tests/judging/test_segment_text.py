"""Open-vocabulary segmentation on a planted CLIP, whose answers are known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
import zoo
from PIL import Image
from torch import nn

from testreg import BadImages, RegisterPlan, UnsupportedModel, patch
from testreg.finding.observe import observe, run
from testreg.finding.trial import Threshold
from testreg.images import labels
from testreg.judging.arms import arms
from testreg.judging.dense import in_text_space, keys_as_queries, texts
from testreg.judging.evaluation import evaluate
from testreg.judging.tasks import SegmentText
from testreg.runtime.towers import find_tower

SIZE, PATCH, WIDTH = 64, 8, 32
COLOURS = {1: ("ruby", (255, 0, 0)), 2: ("emerald", (0, 255, 0)), 3: ("sapphire", (0, 0, 255))}
SWITCH = 8  # the channel that tells the register neuron where to fire
SPOILT = (0, 63)  # and the patches where it does: two corners


class Words:
    """A tokenizer of whole words: those of classes have the highest numbers."""

    known = ("a", "photo", "of", "the", *(name for name, _ in COLOURS.values()))

    def __call__(self, prompts, **settings):
        rows = [[1 + self.known.index(word) for word in prompt.strip(".").split()] for prompt in prompts]
        longest = max(map(len, rows))
        return {"input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows])}


def planted(*, attending: bool = False) -> hf.CLIPModel:
    """A CLIP whose patches say their colour and whose texts say their last word, in the same three directions.

    Blocks do nothing, but for one neuron in block 1, which writes the third colour's direction, loudly, into two
    corners; and, where `attending`, the last block's attention, whose queries are all alike, and keys are not.
    """
    vision = {
        "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": SIZE, "patch_size": PATCH,
    }  # fmt: skip
    text = {**zoo.TEXT, "num_hidden_layers": 1, "vocab_size": 16, "eos_token_id": 2}  # the highest number is the end
    config = hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=WIDTH)
    model = hf.CLIPModel(config).eval()
    tower = model.vision_model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            elif name != "logit_scale":
                parameter.zero_()
        for colour in range(3):
            tower.embeddings.patch_embedding.weight[colour, colour] = 1 / PATCH**2
            model.text_model.embeddings.token_embedding.weight[1 + Words.known.index(COLOURS[1 + colour][0])][
                colour
            ] = 5
        tower.embeddings.class_embedding[20:] = torch.linspace(-1, 1, 12)
        for place in SPOILT:
            tower.embeddings.position_embedding.weight[1 + place, SWITCH] = 3
        block = tower.encoder.layers[1]
        block.mlp.fc1.weight[5, SWITCH], block.mlp.fc1.bias[5] = 10, -20
        block.mlp.fc2.weight[2, 5] = 20
        model.visual_projection.weight[:3, :3] = model.text_projection.weight[:3, :3] = torch.eye(3)
        if not attending:
            return model
        last = tower.encoder.layers[2].self_attn
        last.v_proj.weight[:3, :3] = last.out_proj.weight[:3, :3] = torch.eye(3)
        last.k_proj.weight[0, 0] = last.k_proj.weight[1, 1] = last.k_proj.weight[2, 2] = 30
        for head in range(1, 4):
            last.k_proj.weight[8 * head : 8 * head + 3] = last.k_proj.weight[:3]
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stripes of two colours per photo, as wide as patches at least, upright and lying; the mask has an ignored row."""
    folder = tmp_path_factory.mktemp("stripes")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for index, (one, other) in enumerate([(1, 2), (2, 3), (3, 1), (1, 3)]):
        mask = np.full((SIZE, SIZE), one, np.uint8)
        mask[:, PATCH * (2 + index) :] = other
        mask = mask.T if index % 2 else mask
        pixels = np.array([(0, 0, 0), *(colour for _, colour in COLOURS.values())], np.uint8)[mask]
        mask = mask.copy()
        mask[3] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    names = {0: "unlabeled", **{value: name for value, (name, _) in COLOURS.items()}}
    (folder / "mask_classes.json").write_text(json.dumps(names))
    return folder


PROCESSOR = hf.CLIPImageProcessorPil(
    size={"height": SIZE, "width": SIZE},
    crop_size={"height": SIZE, "width": SIZE},
    image_mean=[0] * 3,
    image_std=[1] * 3,
)
PLAN = RegisterPlan({1: (5,)}, registers=1)


def judged(data, model, plan=PLAN, **settings):
    task = SegmentText(side=SIZE, tokenizer=Words(), threshold=Threshold(3.0), **settings)
    return evaluate(model, data, task, plan=plan, processor=PROCESSOR)


def test_the_planted_answers_come_out_exactly(data):
    table = judged(data, planted())
    assert table.of("patched", "mIoU").value == 100
    assert table.of("patched", "pixel accuracy").value == 100
    assert table.of("outliers interpolated", "mIoU").value == 100
    # Spoilt corners say the third colour: wrong where they are of another one, by the masks themselves.
    wrong, counted = 0, 0
    for sample in labels.masked(data):
        mask = sample.read_mask()
        real = mask != 255
        counted += int(real.sum())
        for rows, columns in ((slice(0, 8), slice(0, 8)), (slice(56, 64), slice(56, 64))):
            wrong += int((real & (mask != 3))[rows, columns].sum())
    assert wrong
    # An outlier's direction reaches as far as its own patch: half of the way to its neighbour by bilinear upsampling.
    assert table.of("unpatched", "pixel accuracy").value == pytest.approx(100 * (1 - wrong / counted), abs=0.2)
    assert table.of("random neurons instead", "pixel accuracy").value == pytest.approx(
        table.of("unpatched", "pixel accuracy").value
    )


def test_the_floor_is_the_most_common_class_everywhere(data):
    table = judged(data, planted(), None)
    masks = torch.stack([sample.read_mask() for sample in labels.masked(data)])
    pixels = torch.stack([(masks == value).sum() for value in COLOURS])
    name = COLOURS[1 + int(pixels.argmax())][0]
    share = 100 * float(pixels.max() / pixels.sum())
    assert table.of("floor", f"all {name}, pixel accuracy").value == pytest.approx(share)
    assert table.of("floor", f"all {name}, mIoU").value == pytest.approx(share / 3)


def test_keys_that_attend_to_keys_see_what_the_mean_does_not(data):
    """Queries that are all alike attend to everything alike, so every patch says the mean of all."""
    same, own = (judged(data, planted(attending=True), attention=kind) for kind in ("qk", "kk"))
    assert own.of("patched", "mIoU").value == 100
    assert same.of("patched", "mIoU").value < 60


def test_templates_and_names_are_averaged(data, tmp_path):
    asked = []

    class Noted(Words):
        def __call__(self, prompts, **settings):
            asked.extend(prompts)
            return super().__call__(prompts, **settings)

    task = SegmentText(
        side=SIZE,
        tokenizer=Noted(),
        template=("a photo of a {}.", "the {}"),
        classes={1: "ruby", 2: "emerald, sapphire"},
    )
    arm = arms(planted(), None, processor=PROCESSOR)[0]
    found = task._directions(arm)
    assert asked == [
        "a photo of a ruby.", "the ruby", "a photo of a emerald.", "the emerald",
        "a photo of a sapphire.", "the sapphire",
    ]  # fmt: skip
    assert found[1, 1] == pytest.approx(found[1, 2].item())
    assert found.norm(dim=-1).tolist() == pytest.approx([1, 1])


def test_pixels_of_other_classes_do_not_count(data):
    table = judged(data, planted(), foreground=(1, 2))
    assert table.of("patched", "mIoU").value == 100
    assert "2 classes" in table.of("patched", "mIoU").setting


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "ChineseCLIPModel"])
def test_a_token_in_text_space_is_what_the_models_own_pooling_makes_of_it(name):
    """The class token of CLIP, and SigLIP's pooling of a single patch, against the model's own image features."""
    model, inputs = zoo.build(name)
    tower = find_tower(model)
    last = len(tower.blocks) - 1
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=inputs["pixel_values"])
        wanted = getattr(wanted, "pooler_output", wanted)
    with observe(model, states=[last]) as seen:
        run(model, {"pixel_values": inputs["pixel_values"]})
    if tower.prefix:
        torch.testing.assert_close(in_text_space(model, tower, seen.states[last][:, 0]), wanted, rtol=1e-5, atol=1e-5)
        return
    states = seen.states[last]
    alone = in_text_space(model, tower, states)
    with torch.no_grad():
        head = tower.module.head(tower.module.post_layernorm(states[:, 3:4]))
    torch.testing.assert_close(alone[:, 3], head, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["none", "dynamic", "attention"])
@pytest.mark.parametrize("name", ["CLIPModel", "timm.VisionTransformer", "open_clip.VisionTransformer"])
def test_keys_to_keys_is_attention_of_keys_by_the_formula(name, form):
    if name not in zoo.ROWS:
        name = next(row for row in zoo.ROWS if row.startswith(name.split(".")[0]))
    model, inputs = zoo.build(name)
    inputs = {"pixel_values": inputs[zoo.pixels(inputs)]}
    tower = find_tower(model)
    last, state = len(tower.blocks) - 1, torch.linspace(-1, 1, tower.channels)
    plans = {
        "none": RegisterPlan({}, registers=0),
        "dynamic": RegisterPlan({0: (1,)}, registers=2),
        "attention": RegisterPlan({}, registers=2, state=state.expand(len(tower.blocks), 2, -1)),
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with patch(model, plans[form]), observe(model, keys=[last], values=[last]) as own:
        run(model, inputs)
    with (
        patch(model, plans[form]),
        keys_as_queries(tower, last),
        observe(model, attentions=[last], attended=[last], keys=[last], values=[last]) as seen,
    ):
        run(model, inputs)
    torch.testing.assert_close(seen.keys[last], own.keys[last])
    torch.testing.assert_close(seen.values[last], own.values[last])
    maps, keys = seen.attentions[last], seen.keys[last]  # without registers
    heads = maps.shape[1]
    split = keys.unflatten(-1, (heads, -1)).transpose(1, 2)  # (images, heads, tokens, channels)
    logits = split @ split.transpose(-1, -2) * split.shape[-1] ** -0.5
    alone = logits.softmax(-1)
    share = maps.sum(-1, keepdim=True)  # what registers leave
    torch.testing.assert_close(maps / share, alone, rtol=1e-4, atol=1e-5)
    assert seen.attended[last].shape == keys.shape
    assert (share < 1 - 1e-4).any() == (form != "none")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_compared_with_text_is_refused(data):
    with pytest.raises(UnsupportedModel, match="reads no text"):
        evaluate(zoo.build("ViTModel")[0], data, SegmentText(side=SIZE), processor=PROCESSOR)
    model, _ = zoo.build("ViTModel")
    with pytest.raises(UnsupportedModel, match="does not show how patches compare with text"):
        in_text_space(model, find_tower(model), torch.zeros(1, zoo.CHANNELS))
    with pytest.raises(BadImages, match="no tokenizer lies with"):
        texts(planted(), ["a ruby"])
    attention = nn.Module()
    tower = SimpleNamespace(attentions=[attention], module=attention)
    with pytest.raises(UnsupportedModel, match="no query and key"), keys_as_queries(tower, 0):
        pass


def test_settings_and_files_that_are_wrong_are_told(data, tmp_path):
    with pytest.raises(BadImages, match="must be one of plain, qk, kk"):
        SegmentText(attention="vv")
    with pytest.raises(BadImages, match="each template needs"):
        SegmentText(template=("a photo",))
    with pytest.raises(BadImages, match="does not say what its mask values are called"):
        labels.named_classes(data / "images")
    (tmp_path / "classes.txt").write_text("void\nruby\nemerald\n")
    assert labels.named_classes(tmp_path) == {1: "ruby", 2: "emerald"}
    (tmp_path / "classes.json").write_text("[1]")
    with pytest.raises(BadImages, match="must map mask values to names"):
        labels.named_classes(tmp_path)
    with pytest.raises(BadImages, match="two are the least"):
        SegmentText(foreground=(1,)).samples(data)
