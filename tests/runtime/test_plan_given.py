"""A plan is taken as itself or as the path of its file, wherever one is taken, and written wherever it is wanted."""

from pathlib import Path

import pytest
import speakers
import torch
import zoo

import testreg
from testreg import BadPlan, RegisterPlan

PLAN = RegisterPlan({1: (3, 5)}, registers=2, entry=1, state=torch.ones(zoo.CHANNELS), rest={1: (0.5, 0.25)})
DYNAMIC = RegisterPlan({1: (3, 5)}, rest={1: (0.5, 0.25)})


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    PLAN.save("~/new/folder/plan.safetensors")  # made with its parents
    return tmp_path / "new" / "folder" / "plan.safetensors"


@torch.no_grad()
def test_patch_takes_the_path_of_a_plan(file):
    model, inputs = zoo.build("ViTModel")
    with testreg.patch(model, PLAN):
        expected = model(**inputs).last_hidden_state
    for given in (file, str(file), "~/new/folder/plan.safetensors"):
        with testreg.patch(model, given) as patch:
            assert patch.plan == PLAN
            assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert RegisterPlan.load("~/new/folder/plan.safetensors") == RegisterPlan.load(Path(file)) == PLAN


def test_a_dict_of_a_plan_is_taken_where_it_is_whole():
    assert RegisterPlan.of(DYNAMIC.to_dict()) == DYNAMIC
    assert RegisterPlan.of(DYNAMIC) is DYNAMIC


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (PLAN.to_dict(), r"constant registers, and what they hold is not in it: .*plan.save\(FILE\)"),
        ({7: (417,)}, r"write testreg.RegisterPlan\(\{7: \(417,\)\}\)"),
        ({"neurons": {"1": [3]}}, "a plan is a RegisterPlan, a path, or what plan.to_dict.. gave"),
        (3, r"testreg.find\(model, images\) gives, or the path of its file, not a int"),
        (None, "not a NoneType"),
        ("nowhere.safetensors", "nowhere.safetensors cannot be read as a register plan: .*testreg find --out"),
    ],
)
def test_what_is_no_plan_says_what_is(given, says):
    model, _ = zoo.build("ViTModel")
    with pytest.raises(BadPlan, match=says):
        testreg.patch(model, given)
    assert testreg.active(model) is None


def test_judging_and_baking_take_the_path_too(file):
    from testreg.export.bake import bake
    from testreg.judging.evaluation import evaluate
    from testreg.judging.pictures import show
    from testreg.judging.reporting import report

    model, inputs = zoo.build("ViTForImageClassification")
    images = inputs["pixel_values"]
    assert str(PLAN) in report(model, images, plan=file)
    assert len(show(model, file, images).axes) > 5
    for refuses in (
        lambda: evaluate(model, file.parent, "outliers", plan="nowhere"),
        lambda: bake(model, "nowhere", images),
    ):
        with pytest.raises(BadPlan, match="nowhere cannot be read as a register plan"):
            refuses()


def test_a_plan_of_the_other_kind_is_named():
    speaker, (seer, _) = speakers.built("llama"), zoo.build("ViTModel")
    with pytest.raises(BadPlan, match="of a Vision Transformer, but LlamaForCausalLM is a language model"):
        testreg.patch(speaker, PLAN)
    with pytest.raises(BadPlan, match="of a language model, but ViTModel is a Vision Transformer"):
        testreg.patch(seer, speakers.start_plan(speaker))
