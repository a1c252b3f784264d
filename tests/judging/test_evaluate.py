"""Evaluation: readers of labels, arms, tasks, and the table."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from transformers import AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import testreg
from testreg import BadImages, BadPlan, RegisterPlan
from testreg.finding.trial import Threshold
from testreg.images import labels
from testreg.judging.arms import arms, random_neurons
from testreg.judging.asking import ask
from testreg.judging.evaluation import Row, _line, evaluate
from testreg.judging.tasks import TASKS, Attention, Classify, Depth, Discovery, Outliers, Probe, SegmentText
from testreg.runtime.towers import find_tower

PLAN = RegisterPlan({1: (3, 5), 2: (7,)}, registers=2)
PROCESSOR = ViTImageProcessorPil(size={"height": zoo.SIZE, "width": zoo.SIZE})
SMALL = {
    "discovery": Discovery(side=32),
    "attention": Attention(side=32),
    "probe": Probe(side=32, seeds=2, steps=5),
    "depth": Depth(side=32, seeds=2, steps=5),
    "segment-text": SegmentText(
        side=32, classes={1: "cat", 2: "dog"}, tokenizer=lambda prompts, **settings: tokens(prompts)
    ),
}
VOC = "<annotation><filename>{}</filename>{}</annotation>"
OBJECT = (
    "<object><name>cat</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six photos of two classes, each a bright rectangle on noise, with boxes, masks, depths and class folders."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(6):
        name, kind = f"{index}.png", ("cat", "dog")[index % 2]
        left, top = (int(value) for value in generator.integers(0, 20, 2))
        pixels = generator.integers(0, 60, (48, 64, 3), dtype=np.uint8)
        pixels[top : top + 24, left : left + 32] += 150
        mask = np.zeros((48, 64), np.uint8)
        mask[top : top + 24, left : left + 32] = 1 + index % 2
        mask[:2] = 255
        depth = 2000 + 1000 * (mask == 1).astype(np.uint16)
        for place, image in (("images", pixels), ("masks", mask), ("depths", depth), (f"classes/{kind}", pixels)):
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / place / name)
        images.append({"id": index, "file_name": name, "width": 64, "height": 48})
        annotations.append({"id": 2 * index + 1, "image_id": index, "bbox": [left, top, 32, 24], "iscrowd": 0})
        annotations.append({"id": 2 * index + 2, "image_id": index, "bbox": [0, 0, 64, 48], "iscrowd": 1})
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.fixture
def model():
    return zoo.build("ViTForImageClassification")[0]


# Readers


def test_coco_boxes_are_those_of_pycocotools_without_crowds(data, capsys):
    reference = COCO(str(data / "instances.json"))
    samples = labels.boxed(data)
    assert [sample.path.name for sample in samples] == [f"{index}.png" for index in range(6)]
    for index, sample in enumerate(samples):
        rows = reference.loadAnns(reference.getAnnIds(imgIds=[index], iscrowd=False))
        expected = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)]
        assert sample.boxes.tolist() == expected
        assert sample.size() == (64, 48)


def test_voc_boxes_count_pixels_from_one(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.jpg")
    (tmp_path / "a.xml").write_text(VOC.format("a.jpg", OBJECT.format(1, 1, 20, 10) + OBJECT.format(5, 2, 6, 4)))
    (tmp_path / "b.xml").write_text(VOC.format("b.jpg", ""))  # no object: left out
    (sample,) = labels.boxed(tmp_path)
    assert sample.boxes.tolist() == [[0, 0, 20, 10], [4, 1, 6, 4]]


def test_a_photo_on_its_side_has_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert labels.Sample(tmp_path / "a.jpg").size() == (10, 20)


def test_masks_lie_beside_photos_and_are_none_themselves(data, tmp_path):
    samples = labels.masked(data)
    assert [sample.path.name for sample in samples if sample.path.parent.name == "images"] == [
        f"{index}.png" for index in range(6)
    ]
    assert sorted(samples[0].read_mask().unique().tolist()) == [0, 1, 255]
    assert not any("masks" in sample.path.parts for sample in labels.photos(data))
    for mode in ("RGB", "F"):
        Image.new(mode, (4, 4)).save(tmp_path / "m.tif")
        with pytest.raises(BadImages, match="class index"):
            labels.Sample(tmp_path / "x.jpg", mask=tmp_path / "m.tif").read_mask()


def test_folders_are_classes(data):
    assert {sample.label for sample in labels.labelled(data / "classes")} == {"cat", "dog"}
    with pytest.raises(BadImages, match="per class"):
        labels.labelled(data / "classes" / "cat")


@pytest.mark.parametrize("read", [labels.boxed, labels.masked, labels.labelled])
def test_no_labels_are_an_error_that_says_what_is_needed(read, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(BadImages, match=str(tmp_path)):
        read(tmp_path)
    with pytest.raises(BadImages, match="no folder"):
        read(tmp_path / "nowhere")


def test_a_photo_that_is_named_but_missing_is_an_error(tmp_path):
    (tmp_path / "a.xml").write_text(VOC.format("gone.jpg", OBJECT.format(1, 1, 2, 2)))
    with pytest.raises(BadImages, match=r"gone\.jpg"):
        labels.boxed(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
rows = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 3) | values,
        "image_id": st.integers(0, 3) | values,
        "file_name": st.just("a.png") | values,
        "bbox": st.lists(st.floats() | st.integers(), min_size=4, max_size=4) | values,
        "iscrowd": values,
    },
)


@given(st.fixed_dictionaries({"images": st.lists(rows) | values, "annotations": st.lists(rows) | values}))
@settings(max_examples=80, deadline=None)
def test_any_json_is_read_or_refused(tmp_path_factory, annotations):
    folder = tmp_path_factory.mktemp("coco")
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "a.json").write_text(json.dumps(annotations))
    try:
        samples = labels.boxed(folder)
    except BadImages:
        return
    for sample in samples:
        assert sample.boxes.isfinite().all()
        assert (sample.boxes[:, 2:] >= sample.boxes[:, :2]).all()


@given(
    st.binary(max_size=60) | st.text(max_size=40).map(lambda t: VOC.format("a.png", OBJECT.format(t, 1, 2, 3)).encode())
)
@settings(max_examples=60, deadline=None)
def test_any_xml_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("voc")
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "a.xml").write_bytes(content)
    try:
        labels.boxed(folder)
    except BadImages:
        return


# Arms


def test_the_arms_are_the_protocols(model):
    found = {arm.name: arm for arm in arms(model, PLAN, processor=PROCESSOR)}
    assert list(found) == [
        "unpatched",
        "patched",
        "inert zero token",
        "neurons taken, no register",
        "random neurons instead",
        "outliers interpolated",
    ]
    inert = found["inert zero token"].plan
    assert (inert.neurons, inert.registers, inert.state) == ({}, 1, None)
    assert found["neurons taken, no register"].plan.neurons == PLAN.neurons
    assert found["neurons taken, no register"].plan.registers == 0
    assert [arm.name for arm in arms(model, None, processor=PROCESSOR)] == ["unpatched"]
    with pytest.raises(BadPlan):
        arms(model, RegisterPlan({9: (0,)}), processor=PROCESSOR)


def test_random_neurons_are_as_many_and_others(model):
    tower = find_tower(model)
    plan = RegisterPlan({0: tuple(range(40)), 2: (5,)}, registers=3, entry=1, state=torch.ones(zoo.CHANNELS))
    other = random_neurons(tower, plan)
    assert len(other.neurons[0]) == zoo.NEURONS - 40  # no more are left
    assert len(other.neurons[2]) == 1
    assert not set(other.pairs) & set(plan.pairs)
    assert (other.registers, other.entry) == (3, 1)
    assert torch.equal(other.state, plan.state)
    assert other == random_neurons(tower, plan)


def test_photos_keep_their_shape_and_are_cut_nowhere(model, data):
    (arm,) = arms(model, None, processor=ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False))
    photo = data / "images" / "0.png"
    assert arm.patch_size() == zoo.PATCH
    assert arm.inputs(photo)["pixel_values"].shape == (1, 3, 32, 32)
    wide = arm.inputs(photo, 40)["pixel_values"]
    assert wide.shape == (1, 3, 40, 56)  # 53.3 rounded to whole patches
    assert arm.inputs(photo, 40, square=True)["pixel_values"].shape == (1, 3, 40, 40)
    expected = np.asarray(Image.open(photo).resize((56, 40), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(wide[0].permute(1, 2, 0), expected, atol=1e-5)


def test_the_interpolating_arm_repairs_what_is_read_where_the_block_before_has_outliers(model, data):
    plain, *_, repairing = arms(model, PLAN, processor=PROCESSOR, threshold=Threshold(1.02))
    inputs = plain.inputs(data / "images" / "0.png")
    wanted = [("keys", 2), ("states", 1), ("states", 2)]
    before, after = plain.features(inputs, wanted), repairing.features(inputs, wanted)
    (standing,) = plain.features(inputs, [("states", 1)])
    norms = standing.norm(dim=-1)
    outliers = norms > 1.02 * norms.median()
    assert outliers.any()
    assert not outliers.all()
    for index in (0, 1):  # keys of block 2 read what block 1 gives
        assert torch.equal((before[index] != after[index]).any(dim=-1), outliers)
    attention = plain.attention(inputs), repairing.attention(inputs)
    assert torch.equal(attention[0] != attention[1], outliers)


# Tasks and the table


def tokens(prompts):
    """A word for each prompt, between a beginning and an end."""
    return {"input_ids": torch.tensor([[62, 2 + len(prompt), 63] for prompt in prompts])}


def folder_of(task, data):
    return data / ("classes" if task == "classify" else "")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_judges_every_arm_on_the_same_photos(task, model, data):
    if task == "segment-text":
        model, _ = zoo.build("CLIPModel")
    model.config.id2label = {0: "cat", 1: "dog", 2: "x", 3: "y", 4: "z"}
    before = ask(model, zoo.images()(2))[1]
    table = evaluate(model, folder_of(task, data), SMALL.get(task, task), plan=PLAN, processor=PROCESSOR)
    names = {row.arm for row in table} - {"floor"}
    wanted = {arm.name for arm in arms(model, PLAN, processor=PROCESSOR)}
    assert names == (wanted if TASKS[task].repairable else wanted - {"outliers interpolated"})
    for row in table:
        if row.kind == "floor" or row.arm == "unpatched":
            assert row.difference is None
            continue
        assert row.difference == pytest.approx(row.value - table.of("unpatched", row.metric).value, abs=1e-4)
        assert row.difference_low <= row.difference <= row.difference_high
        assert row.images == table.of("unpatched", row.metric).images
    if task in ("agreement", "attention"):  # whose values are continuous
        assert len({table.of(arm).value for arm in ("unpatched", "patched", "random neurons instead")}) == 3
    assert torch.equal(ask(model, zoo.images()(2))[1], before)
    assert testreg.active(model) is None


def test_the_numbers_are_the_models_own(model, data):
    model.config.id2label = {0: "cat", 1: "dog", 2: "x", 3: "y", 4: "z"}
    table = evaluate(model, data / "classes", "classify", processor=PROCESSOR)
    photos = sorted((data / "classes").rglob("*.png"))
    with torch.no_grad():
        logits = torch.cat([model(**PROCESSOR(Image.open(path), return_tensors="pt")).logits for path in photos])
    hits = [row.argmax() == ("cat", "dog").index(path.parent.name) for row, path in zip(logits, photos, strict=True)]
    assert table.of("unpatched", "top-1 of the head").value == pytest.approx(100 * np.mean(hits))
    assert table.of("floor").value == 50
    assert table.of("unpatched").images == 6


def test_heads_of_other_classes_are_not_judged(model, data):
    table = evaluate(model, data / "classes", "classify", processor=PROCESSOR)
    assert {row.metric for row in table if row.arm == "unpatched"} == {"kNN top-1, k 20"}


def test_text_judges_models_that_read_text(data):
    model = zoo.build("CLIPModel")[0]
    words = {"a photo of a cat.": [1, 2, 63], "a photo of a dog.": [5, 4, 63]}

    class Tokens(dict):
        def to(self, device):
            return self

    def tokenizer(prompts, **_):
        return Tokens(input_ids=torch.tensor([words[prompt] for prompt in prompts]))

    table = evaluate(model, data / "classes", Classify(tokenizer=tokenizer), processor=PROCESSOR)
    photos = sorted((data / "classes").rglob("*.png"))
    pixels = torch.cat([PROCESSOR(Image.open(path), return_tensors="pt")["pixel_values"] for path in photos])
    with torch.no_grad():
        found = model(input_ids=torch.tensor(list(words.values())), pixel_values=pixels).logits_per_image.argmax(1)
    hits = [int(row) == ("cat", "dog").index(path.parent.name) for row, path in zip(found, photos, strict=True)]
    assert table.of("unpatched", "zero-shot").value == pytest.approx(100 * np.mean(hits))


def test_the_patch_that_acts_is_the_one_that_is_judged(model, data):
    named = evaluate(model, data, "agreement", plan=PLAN, processor=PROCESSOR, limit=3, baselines=False)
    with testreg.patch(model, PLAN) as current:
        acting = evaluate(model, data, "agreement", processor=PROCESSOR, limit=3, baselines=False)
        assert testreg.active(model) is current
    assert named.rows == acting.rows
    assert named.of("unpatched", "cosine").value == pytest.approx(1)
    assert named.of("patched", "cosine").value < 0.9999
    assert {row.images for row in named} == {3}


def test_other_models_come_as_they_are(model, data):
    other = zoo.build("ViTForImageClassification")[0]
    testreg.patch(other, PLAN)
    other.image_processor = PROCESSOR
    table = evaluate(
        model, data, SMALL["attention"], plan=PLAN, processor=PROCESSOR, against={"saved": other}, baselines=False
    )
    for metric in ("mIoU", "mAP", "pixel accuracy"):
        assert table.of("saved", metric).value == pytest.approx(table.of("patched", metric).value)


def test_a_sweep_is_reported_apart_from_the_fixed_setting(model, data):
    table = evaluate(model, data, Discovery(side=32, sweep=True), processor=PROCESSOR, limit=2)
    kinds = [row.kind for row in table if row.arm == "unpatched"]
    assert kinds.count("fixed") == 1
    assert kinds.count("sweep") == 2 * 3 * 4 - 1  # features, blocks, biases; less the fixed one
    text = str(table)
    assert text.index("keys of block 2, bias -0.4") < text.index("whole-image box") < text.index("chosen on the test")


def test_boxes_come_back_in_pixels_of_the_photo(model, data, monkeypatch):
    seen = []
    monkeypatch.setattr("testreg.metrics.lost", lambda features, bias: (0, 0, features.shape[1], features.shape[0] - 1))
    monkeypatch.setattr("testreg.metrics.located", lambda box, boxes: seen.append((box.tolist(), boxes.tolist())) or 0)
    evaluate(model, data, Discovery(side=32), processor=PROCESSOR)
    truths = [sample.boxes.tolist() for sample in labels.boxed(data)]
    for (box, boxes), truth in zip(seen, truths, strict=False):
        assert box == pytest.approx([0, 0, 64, 48 * 3 / 4], abs=1e-4)  # four rows of patches, the last left out
        assert boxes == truth
    assert [box for box, _ in seen[6:]] == [[0, 0, 64, 48]] * 6  # the floor


def test_outliers_are_counted_where_they_stand_out(model, data):
    samples = labels.photos(data / "images")
    task = Outliers(threshold=Threshold(3))
    norms = [torch.ones(3, 16) for _ in samples]
    norms[0][1, 4], norms[2][1, 5] = 10, 10
    found = task.measure(norms, norms)
    everyone = np.arange(6)
    assert found["outlier patches"].of(everyone) == pytest.approx(2 / (6 * 16))
    assert found["images with one"].of(everyone) == pytest.approx(2 / 6)
    assert found["largest norm"].of(everyone) == pytest.approx((10 + 10 + 4) / 6)
    assert found["outlier patches, block 0"].of(everyone) == 0
    assert found["outlier patches, block 1"].kind == "block"
    assert "after block 1" in found["median norm"].setting


@pytest.mark.parametrize(
    ("told", "task", "outlier", "whose"),
    [
        ({"times": 2.5, "norm": 0.0}, "outliers", "2.5 times", "plan"),
        ({"times": 1.5, "norm": 14.0}, "discovery", "norm 14", "plan"),
        ({"times": 2.5, "norm": 0.0}, Outliers(threshold=Threshold(3)), "3.0 times", "task"),
        ({"times": 2.5, "norm": 0.0}, Discovery(side=32, threshold=Threshold(3)), "3.0 times", "task"),
        ({"times": 1e9, "norm": 0.0}, "outliers", "4.0 times", "default"),
        ({"times": 2.5, "norm": "x"}, "outliers", "4.0 times", "default"),
        ("x", "outliers", "4.0 times", "default"),
    ],
)
def test_an_outlier_is_what_it_was_when_the_plan_was_found(told, task, outlier, whose, model, data, monkeypatch):
    used = []
    monkeypatch.setattr(
        "testreg.finding.trial.Threshold.outliers", lambda self, norms: used.append(self) or norms > norms.max()
    )
    plan = replace(PLAN, provenance={"artefact": told})
    table = evaluate(model, data, SMALL.get(task, task) if isinstance(task, str) else task,
                     plan=plan, processor=PROCESSOR, limit=1)  # fmt: skip
    threshold = table.provenance["threshold"]
    assert threshold["outlier"].startswith(outlier)
    assert threshold["from"] == whose
    assert {str(one) for one in used} == {threshold["outlier"]}


def test_of_outliers_nothing_is_said_where_none_are_judged(model, data):
    for task, plan in (("sinks", PLAN), ("discovery", None)):
        table = evaluate(model, data, SMALL.get(task, task), plan=plan, processor=PROCESSOR, limit=1)
        assert table.provenance["threshold"] is None


def test_the_table_goes_to_disk_and_back(model, data, tmp_path):
    table = evaluate(model, data, "sinks", plan=PLAN, processor=PROCESSOR, limit=1, baselines=False)
    table.save(tmp_path / "table.json")
    table.save(tmp_path / "table.csv")
    kept = json.loads((tmp_path / "table.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(kept["rows"]) == len(rows) == len(table.rows)
    for row, as_json, as_csv in zip(table, kept["rows"], rows, strict=True):
        assert as_json["value"] == pytest.approx(row.value) == pytest.approx(float(as_csv["value"]))
        assert as_json["metric"] == row.metric == as_csv["metric"]
        assert as_json["low"] is None  # one photo has no interval
    assert kept["provenance"]["settings"]["epsilon"] == 0.3
    assert kept["provenance"]["plan"] == str(PLAN)


def test_a_line_of_the_table():
    row = Row("t", "fixed", "patched", "m", "", "", 1.0, 0.5, float("nan"), -0.0001, -0.0002, 0.01, 4)
    assert _line(row, 12).split()[1:] == ["1.000", "[0.500,", "nan]", "+0.000", "[0.000,", "0.010]"]
    assert _line(replace(row, low=float("nan"), difference=None), 12).split()[1:] == ["1.000"]


def test_wrong_questions_are_refused(model, data, tmp_path):
    with pytest.raises(BadImages, match="discovery"):
        evaluate(model, data, "segment", processor=PROCESSOR)
    with pytest.raises(BadImages, match="limit"):
        evaluate(model, data, "outliers", processor=PROCESSOR, limit=0)
    with pytest.raises(BadImages, match="processor=NAME"):
        evaluate(model, data, "outliers")
    (tmp_path / "a.jpg").write_bytes(b"no photo")
    with pytest.raises(BadImages, match="broken"):
        evaluate(model, tmp_path, "outliers", processor=PROCESSOR)


def test_on_the_real_checkpoint_registers_bring_objects_back(assets):
    model = AutoModelForImageClassification.from_pretrained(assets / "checkpoints" / "vit-tiny-augreg").eval()
    plan = RegisterPlan({7: (417,), 6: (59, 189)}, registers=1)
    table = evaluate(model, assets / "images" / "coco_cc", "discovery", plan=plan, baselines=False, limit=16)
    assert table.of("unpatched").value < 10
    assert table.of("patched").difference > 10
    assert table.of("floor").value > 10
