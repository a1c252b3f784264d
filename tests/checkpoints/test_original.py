"""The unpatched checkpoint: how it is loaded, which plan belongs to it, and what its card hands on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from patched_models import DYNAMIC, NEURONS, assert_same, constant, outputs
from safetensors.torch import load_file, save_file
from zoo import TEXT, build

import testreg
from testreg import BadCheckpoint, BadPlan, RegisterPlan, UnsupportedModel
from testreg.checkpoints import saving as checkpoint
from testreg.checkpoints.original import is_patched, load_base
from testreg.runtime import fingerprint as base
from testreg.runtime import modeling_testreg as modeling
from testreg.runtime.recipe import Recipe


def rewrite(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def test_load_base_gives_the_class_that_the_config_names(plain: Path) -> None:
    model, inputs = build("ViTForImageClassification")
    assert type(load_base(plain)) is hf.ViTForImageClassification
    assert_same(outputs(load_base(plain), inputs), outputs(model, inputs))
    assert load_base(plain, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_base_takes_a_hub_name_and_keeps_it(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain / "preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(modeling, "snapshot_download", lambda name, **kwargs: str(plain))
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda repo, file, revision: str(plain / file))
    model = load_base("org/vit", revision="v1")
    assert model.name_or_path == "org/vit"
    testreg.patch(model, DYNAMIC)
    directory = testreg.save(model, tmp_path / "clean")
    assert Recipe.read(directory).base["model"] == "org/vit"
    assert (directory / "preprocessor_config.json").is_file()
    testreg.load(directory)


def test_load_base_names_the_weights_that_are_broken_or_missing(plain: Path, saved: Path) -> None:
    name = "vit.layers.1.mlp.fc1.weight"
    name = name if name in load_file(plain / "model.safetensors") else "vit.encoder.layer.1.intermediate.dense.weight"
    rewrite(plain, lambda weights: weights[name].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(BadCheckpoint, match=r"NaN or infinity in vit\.layers\.1\.mlp\.fc1\.weight"):
        load_base(plain)
    rewrite(plain, lambda weights: weights.pop(name))
    with pytest.raises(BadCheckpoint, match=r"lacks 1 weights .*vit\.layers\.1\.mlp\.fc1\.weight"):
        load_base(plain)
    (plain / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(BadCheckpoint, match="cannot be loaded"):
        load_base(plain)
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="pickled ones are never read"):
        load_base(plain)
    with pytest.raises(BadCheckpoint, match="registers already"):
        load_base(saved)


def test_a_tower_whose_pooler_was_never_saved_gets_none(tmp_path: Path) -> None:
    config = build("ViTModel")[0].config
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "plain")
    model = load_base(tmp_path / "plain")
    assert model.pooler is None
    testreg.patch(model, DYNAMIC)
    assert testreg.load(testreg.save(model, tmp_path / "clean")).pooler is None


def test_a_text_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UnsupportedModel, match="text model"):
        load_base(tmp_path / "text")


# Which checkpoint a plan belongs to


def test_a_fingerprint_belongs_to_the_weights_not_to_the_class_or_the_precision() -> None:
    model, _ = build("ViTForImageClassification")
    whole = base.fingerprint(model)
    assert base.fingerprint(model.vit) == whole
    assert set(base.fingerprint(copy.deepcopy(model).bfloat16()).items()) <= set(whole.items())
    assert base.fingerprint(copy.deepcopy(model).half())["float16"] == whole["float16"]
    testreg.patch(model, DYNAMIC)
    assert base.fingerprint(model) == whole
    with torch.no_grad():
        model.vit.layers[2].mlp.fc2.weight[0, 0] *= 1.1
    assert not set(base.fingerprint(model).values()) & set(whole.values())


def test_a_plan_of_another_checkpoint_is_refused() -> None:
    model, _ = build("ViTForImageClassification")
    plan = RegisterPlan(NEURONS, provenance={"base": json.loads(json.dumps(base.describe(model, NEURONS)))})
    base.check_base(plan, model)
    base.check_base(plan, copy.deepcopy(model).bfloat16())
    base.check_base(RegisterPlan(NEURONS), model)  # says nothing of where it comes from
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.bias += 0.1
    with pytest.raises(BadPlan, match="other weights"):
        base.check_base(plan, model)


# The model card


def test_the_card_says_what_was_done_and_carries_the_licence_over(plain: Path, tmp_path: Path) -> None:
    (plain / "README.md").write_text("---\nlicense: cc-by-nc-4.0\npipeline_tag: image-classification\n---\n# A model\n")
    (plain / "LICENSE").write_text("the licence")
    model = load_base(plain)
    numbers = {"before": {"outlier_patches": 0.02}, "after": {"outlier_patches": 0.0}}
    testreg.patch(model, constant(**numbers))
    directory = testreg.save(model, tmp_path / "clean")
    card = (directory / "README.md").read_text()
    front, text = card.split("---\n")[1:]
    assert "license: cc-by-nc-4.0" in front
    assert "base_model: plain" in front
    assert "pipeline_tag: image-classification" in front
    assert "| outlier patches | 0.02 | 0 |" in text
    assert "(0, 1), (0, 5), (2, 47)" in text
    assert 'testreg.load("' in text
    assert "trust_remote_code=True" in text
    assert (directory / "LICENSE").read_text() == "the licence"


@pytest.mark.parametrize(
    "front", ["", "---\n[\n---\n", "---\nlicense: [1, 2]\n---\n", "---\nlicense: !!python/x y\n---\n"]
)
def test_a_strange_card_of_the_base_model_does_no_harm(front: str, plain: Path, tmp_path: Path) -> None:
    (plain / "README.md").write_text(front + "text")
    model = load_base(plain)
    testreg.patch(model, DYNAMIC)
    assert (testreg.save(model, tmp_path / "clean") / "README.md").stat().st_size


def test_a_patched_name_on_the_hub_is_known_as_such(hub) -> None:
    hub.commit("someone/vit-clean", {"config.json": json.dumps({"model_type": "testreg"}).encode()})
    hub.commit("someone/vit", {"config.json": json.dumps({"model_type": "vit"}).encode()})
    assert is_patched("someone/vit-clean")
    assert not is_patched("someone/vit")
    assert not is_patched("someone/nothing")
    hub.down = 503
    assert is_patched("someone/vit-clean")  # from the cache
    calls = len(hub.calls)
    assert not is_patched("someone/else")
    assert len(hub.calls) == calls + 1
