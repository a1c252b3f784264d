"""Checkpoints that timm wrote, through transformers' TimmWrapper: found, patched, saved, exported, loaded again."""

import json

import pytest
import torch
import transformers as hf
from bakeable_timm import photos, planted
from commands import SHAPE, noise, run
from safetensors.torch import save_file

import testreg
from testreg import RegisterPlan, UnsupportedModel
from testreg.checkpoints.original import load_base
from testreg.demo.planted import plant
from testreg.export.bake import export_stock
from testreg.export.bake.stock import to_timm
from testreg.runtime.towers import find_tower

timm = pytest.importorskip("timm")

MEAN, NAMES = [0.4, 0.5, 0.6], [f"class {index}" for index in range(7)]


def written(model, folder):
    """What timm makes of `model`, with preprocessing and class names of its own."""
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": tuple(MEAN), "crop_pct": 0.8}
    names = {"label_names": NAMES[: model.num_classes]} if model.num_classes else {}
    timm.models.save_for_hf(model, str(folder), names, safe_serialization=True)
    return folder


SOURCES = ("vit", "eva", "vit-pre-norm")  # the last has no head


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """Checkpoints of timm, each with the plan that is right for it."""
    folder, found = tmp_path_factory.mktemp("timm"), {}
    for name in SOURCES:
        model, plan = planted(name)
        found[name] = written(model, folder / name / "source"), model, plan
    return found


@pytest.fixture(params=SOURCES)
def specimen(request, every):
    return every[request.param]


def pixels(count=4):
    return photos(count, seed=3)[0]


@torch.no_grad()
def outputs(model):
    return [value for value in model(pixels(), return_dict=False) if isinstance(value, torch.Tensor)]


def test_a_checkpoint_of_timm_is_loaded_with_its_head(specimen):
    folder, model, _ = specimen
    loaded = load_base(folder)
    assert type(loaded).__name__ == ("TimmWrapperForImageClassification" if model.num_classes else "TimmWrapperModel")
    assert torch.equal(outputs(loaded)[-1], model(pixels()))
    assert list(loaded.config.id2label.values()) == NAMES[: model.num_classes]
    assert load_base(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    loaded.save_pretrained(folder.parent / "again")  # of transformers now, which names the class
    assert type(load_base(folder.parent / "again")) is type(loaded)


CODE = """
import sys
sys.modules["testreg"] = None  # importing it fails
import timm, torch, transformers as hf

def refused(load):
    try:
        load()
    except (RuntimeError, ValueError) as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise SystemExit("loaded without its registers")

for folder in sys.argv[1:]:
    pixels, expected = torch.load(folder + ".pt")
    auto = hf.AutoModelForImageClassification if len(expected) == 1 else hf.AutoModel
    model = auto.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        values = [value for value in model(pixels, return_dict=False) if isinstance(value, torch.Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(values, expected, strict=True)), folder
    assert list(hf.AutoImageProcessor.from_pretrained(folder).data_config["mean"]) == [0.4, 0.5, 0.6], folder
    refused(lambda: timm.create_model("local-dir:" + folder, pretrained=True))
    refused(lambda: type(model).from_pretrained(folder))
    refused(lambda: auto.from_pretrained(folder, trust_remote_code=False))
    print("ok")
"""


def test_saved_ones_come_back_bit_for_bit_and_never_without_their_registers(every, forked, tmp_path):
    directories = []
    for name, (folder, _, plan) in every.items():
        model = load_base(folder)
        plain = outputs(model)
        testreg.patch(model, plan)
        saved = testreg.save(model, tmp_path / name)
        loaded, expected = testreg.load(saved), outputs(model)
        assert type(loaded) is type(model), name
        assert testreg.active(loaded).plan == plan, name
        assert all(torch.equal(one, other) for one, other in zip(outputs(loaded), expected, strict=True)), name
        assert not torch.equal(outputs(loaded)[0], plain[0]), name
        assert loaded.config.id2label == model.config.id2label, name
        torch.save((pixels(), expected), f"{saved}.pt")
        auto = hf.AutoModelForImageClassification if len(expected) == 1 else hf.AutoModel
        assert all(torch.equal(*both) for both in zip(outputs(auto.from_pretrained(saved)), expected, strict=True)), (
            name
        )
        directories.append(saved)
    _, said, errors = forked.run(tmp_path, CODE, *directories)
    assert said == "ok\n" * len(SOURCES), errors[-3000:]


def test_stock_weights_load_in_timm_and_in_transformers(specimen, tmp_path):
    folder, model, plan = specimen
    export_stock(load_base(folder), photos(32)[0], tmp_path / "out", plan=plan)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert tuple(loaded.pretrained_cfg["mean"]) == tuple(MEAN)
    assert loaded.pretrained_cfg["crop_pct"] == 0.8
    assert find_tower(loaded).prefix == find_tower(model).prefix + 2
    wrapped = [hf.AutoModel, hf.AutoModelForImageClassification][: 1 + bool(model.num_classes)]
    for auto in wrapped:
        again = auto.from_pretrained(tmp_path / "out")
        states, answer = loaded.forward_features(pixels()), loaded(pixels())
        expected = answer if auto is hf.AutoModelForImageClassification else states
        torch.testing.assert_close(again(pixels())[0], expected, atol=1e-6, rtol=1e-6)
        assert list(again.config.id2label.values()) == NAMES[: model.num_classes]
    assert list(hf.AutoImageProcessor.from_pretrained(tmp_path / "out").data_config["mean"]) == MEAN


def test_what_timm_built_says_how_it_can_be_saved(tmp_path):
    model, plan = planted("vit")
    testreg.patch(model, plan)
    with pytest.raises(UnsupportedModel, match=r"save_for_hf\(model, DIR.*testreg patch DIR"):
        testreg.save(model, tmp_path / "clean")
    wrapped = load_base(written(model, tmp_path / "source"))  # as the message says
    testreg.patch(wrapped, plan)
    loaded = testreg.load(testreg.save(wrapped, tmp_path / "clean"))
    with torch.no_grad():
        assert torch.equal(loaded(pixels()).logits, model(pixels()))


def test_the_command_line_from_beginning_to_end(tmp_path):
    """A planted model of transformers, under timm's names and written by timm."""
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**SHAPE, num_labels=5)).eval()
    plant(model, neurons=2)
    weights, config = to_timm(model, find_tower(model), torch.zeros(0, SHAPE["hidden_size"]))
    config["model_args"]["reg_tokens"] = len(weights.pop("reg_token")[0])
    built = timm.create_model(config["architecture"], num_classes=5, **config["model_args"])
    built.load_state_dict(weights)
    source, images = written(built, tmp_path / "source"), tmp_path / "photos"
    images.mkdir()
    for index in range(16):
        noise(index).save(images / f"{index}.png")

    assert "The artefact is there" in run("inspect", source, "--images", images).stdout
    plan, clean, stock = tmp_path / "plan.safetensors", tmp_path / "clean", tmp_path / "stock"
    run("find", source, "--images", images, "--out", plan)
    assert sorted(RegisterPlan.load(plan).neurons) == [3]
    said = run("patch", source, "--images", images, "--plan", plan, "--out", clean).stdout
    assert "-> 0.00%" in said
    assert "No artefact" in run("inspect", clean, "--images", images).stdout
    arguments = ("--format", "stock", "--images", images, "--json")
    drift = json.loads(run("export", clean, *arguments, "--out", stock).stdout)["drift"]
    assert drift["outlier"] < 3 < 10 < drift["outlier_unpatched"]
    assert drift["answer"] > 0.999
    assert "No artefact" in run("inspect", stock, "--images", images).stdout
    pytest.importorskip("onnxscript")
    assert "checked against PyTorch" in run("export", clean, "--format", "onnx", "--out", tmp_path / "x.onnx").stdout


def test_settings_of_a_stranger_are_an_error_of_ours(specimen, tmp_path):
    folder, *_ = specimen
    values = json.loads((folder / "config.json").read_text())
    strange = tmp_path / "strange"
    strange.mkdir()
    save_file({"weight": torch.zeros(1)}, strange / "model.safetensors", {"format": "pt"})
    for architecture, args in (("no_such_model", {}), ("vit_tiny_patch16_224", {"surprise": 1}), (None, []), (3, {})):
        (strange / "config.json").write_text(json.dumps({**values, "architecture": architecture, "model_args": args}))
        with pytest.raises(testreg.BadCheckpoint, match="strange"):
            load_base(strange)
