"""A patched language model on disk: the same words again, with the package and without it, and never in silence."""

import pytest
import torch
import transformers as hf
from speakers import PAD, built, start_plan, text

import testreg
from testreg.runtime.decoders import find_decoder

ALONE = """
import sys, torch
sys.modules["testreg"] = None  # whoever imports it fails
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    ids, mask = torch.load(directory + "/asked.pt")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        said = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    torch.save((type(model).__name__, logits, said), directory + "/said.pt")
"""
NAMES = ("llama", "gpt2", "gemma3", "mixtral", "opt")


def plan_for(model):
    tower = find_decoder(model)
    neurons = {1: (2, 5)} if tower.downs[1] is not None else {}
    return testreg.RegisterPlan(
        neurons, 1, 0, start_plan(model).state, positions="before", rest={1: (0.5, 0.0)} if neurons else None
    )


def saved(name, directory):
    model = built(name)
    model.generation_config.max_new_tokens = 5
    ids = text(3, 9)
    ids[0, :4] = PAD
    mask = (ids != PAD).long()
    with testreg.patch(model, plan_for(model)), torch.no_grad():
        testreg.save(model, directory)
        logits = model(input_ids=ids).logits
        said = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return (ids, mask), logits, said


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_bit_for_bit(name, tmp_path):
    (ids, mask), logits, said = saved(name, tmp_path / "out")
    model = testreg.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
        words = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(words, said)
    assert model.generation_config.max_new_tokens == 5
    assert testreg.active(model).plan.language
    with pytest.raises(testreg.TestregError, match="save_pretrained would lose"):
        model.save_pretrained(tmp_path / "other")
    with pytest.raises(Exception, match="this model has test-time registers that a stock class would lose"):
        type(model).from_pretrained(tmp_path / "out")
    assert "AutoModelForCausalLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


def test_without_the_package(forked, tmp_path):
    wanted = {}
    for name in NAMES:
        asked, *wanted[name] = saved(name, tmp_path / name)
        torch.save(asked, tmp_path / name / "asked.pt")
    code, _, errors = forked.run(tmp_path, ALONE, *(tmp_path / name for name in NAMES))
    assert code == 0, errors
    for name, (logits, said) in wanted.items():
        kind, found, words = torch.load(tmp_path / name / "said.pt")
        assert kind == type(built(name)).__name__
        assert torch.equal(found, logits), name
        assert torch.equal(words, said), name


def test_one_plan_for_each_part_is_kept_apart(tmp_path):
    vision = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    words = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, bos_token_id=60
    )
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=words, image_token_index=63)
    )
    model = model.eval()
    sees, speaks = testreg.RegisterPlan({1: (3,)}), start_plan(model)
    both = pytest.raises(testreg.UnsupportedModel, match="a checkpoint holds one plan")
    with testreg.patch(model, sees), testreg.patch(model, speaks), both:
        testreg.save(model, tmp_path / "out")
    with testreg.patch(model, speaks):
        testreg.save(model, tmp_path / "speaks")
        wanted = model(input_ids=text()).logits
    loaded = testreg.load(tmp_path / "speaks")
    assert torch.equal(loaded(input_ids=text()).logits, wanted)
    assert testreg.active(loaded).plan == speaks
