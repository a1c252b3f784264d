"""Stock files of language models: the same logits and words in a process that knows nothing of testreg."""

import json

import pytest
import torch
from safetensors.torch import load_file
from speakers import FAMILIES, PAD, WINDOWED, built, start_plan, text

import testreg
from testreg.export.language import export_language
from testreg.runtime.decoders import find_decoder

ALONE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
assert "testreg" not in sys.modules
for directory, asked in zip(sys.argv[1::2], sys.argv[2::2]):
    asked = json.loads(asked)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), directory + "/prefix").eval()
    ids, mask = torch.tensor(asked["ids"]), torch.tensor(asked["mask"])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    torch.save((logits, said), directory + "/said.pt")
assert "testreg" not in sys.modules
"""
STOCK = [name for name in FAMILIES if name not in WINDOWED]


def plan_for(model, registers=2):
    tower = find_decoder(model)
    state = start_plan(model).state.expand(-1, registers, -1)
    return testreg.RegisterPlan(
        {1: (2, 5)} if tower.downs[1] is not None else {}, registers, 0, state, positions="before"
    )


def exported(name, directory, **more):
    model = built(name)
    plan = plan_for(model)
    with testreg.patch(model, plan):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        written = export_language(model, find_decoder(model), directory, **more)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(weight.requires_grad for weight in model.parameters())
        assert testreg.active(model).plan == plan
    return model, plan, written


def test_every_family_in_a_process_without_testreg(forked, tmp_path):
    pytest.importorskip("peft")
    arguments, wanted = [], {}
    for name in STOCK:
        model, plan, written = exported(name, tmp_path / name)
        assert written.difference < 1e-4
        ids = text(3, 9)
        ids[0, :4], ids[1, :1] = PAD, PAD
        mask = (ids != PAD).long()
        with testreg.patch(model, plan), torch.no_grad():
            logits = model(input_ids=ids).logits
            said = model.generate(ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        wanted[name] = logits, said
        arguments += [tmp_path / name, json.dumps({"ids": ids.tolist(), "mask": mask.tolist()})]
    code, _, errors = forked.run(tmp_path, ALONE, *arguments)
    assert code == 0, errors
    for name, (logits, said) in wanted.items():
        found, words = torch.load(tmp_path / name / "said.pt")
        assert found == pytest.approx(logits, abs=1e-4, rel=1e-4), name
        assert torch.equal(words, said), name


def test_what_lies_there(tmp_path):
    pytest.importorskip("peft")
    exported("llama", tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "prefix/adapter_config.json",
        "prefix/adapter_model.safetensors",
    }  # fmt: skip
    weights, original = load_file(tmp_path / "out" / "model.safetensors"), built("llama").state_dict()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, original[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")}
    assert not weights["model.layers.1.mlp.up_proj.weight"][[2, 5]].any()
    assert json.loads((tmp_path / "out" / "prefix" / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the weights alone are a worse model" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("mistral", {}, "sliding window"),
        ("llama", {"entry": 1}, "they begin at block 1"),
        ("llama", {"registers": 0, "state": None}, "there are none"),
        ("gpt2", {"positions": "on"}, "its positions are learned"),
        ("llama", {"neurons": {1: (2,)}, "rest": {1: (0.5,)}}, "rest at other values than 0"),
    ],
)
def test_what_a_prefix_cannot_hold(name, plan, message, tmp_path):
    pytest.importorskip("peft")
    model = built(name)
    state = start_plan(model).state[plan.get("entry", 0) :]
    plan = testreg.RegisterPlan(**{"neurons": {}, "registers": 1, "state": state, "positions": "before", **plan})
    with testreg.patch(model, plan), pytest.raises(testreg.UnsupportedModel, match=message):
        export_language(model, find_decoder(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_would_lie_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from testreg.export import language

    keys_and_values = language.as_first_tokens
    monkeypatch.setattr(language, "as_first_tokens", lambda tower: tuple(2 * part for part in keys_and_values(tower)))
    with pytest.raises(testreg.Harmful, match="gives other logits"):
        exported("llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert exported("llama", tmp_path / "out", force=True)[2].difference > 0.01


def test_one_way_into_every_form(tmp_path):
    pytest.importorskip("peft")
    model = built("llama")
    plan = plan_for(model)
    written = testreg.export(model, tmp_path / "out", format="stock", plan=plan)
    assert written.directory == tmp_path / "out"
    assert (tmp_path / "out" / "prefix" / "adapter_config.json").is_file()
    assert testreg.active(model) is None
    with testreg.patch(model, plan):
        testreg.save(model, tmp_path / "saved")
    assert testreg.export(tmp_path / "saved", tmp_path / "again", format="stock").difference < 1e-4
    for given, says in (
        ({"plan": plan, "format": "stock", "images": [1]}, "takes no images"),
        ({"plan": plan, "format": "stock", "library": "timm"}, "does not take library"),
        ({"plan": plan}, "exported as stock files"),
        ({"format": "stock"}, "is not patched"),
    ):
        with pytest.raises(testreg.TestregError, match=says):
            testreg.export(model, tmp_path / "none", **given)
    assert not (tmp_path / "none").exists()


def test_without_a_patch(tmp_path):
    model = built("llama")
    with pytest.raises(testreg.TestregError, match="is not patched"):
        export_language(model, find_decoder(model), tmp_path / "out")
