"""Registers of language models, held against the model's own start token: code that nobody here wrote."""

import copy

import pytest
import torch
import transformers as hf
from speakers import END, FAMILIES, PAD, START, WINDOWED, built, start_plan, text, with_start
from transformers import DynamicCache, StaticCache

import testreg
from testreg.runtime.decoders import find_decoder, matrix


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_register_is_to_the_tokens_what_a_start_token_is(name):
    model = built(name)
    ids = text(tokens=7 if name in WINDOWED else 12)  # in a longer text a window would leave the start token behind
    before, wanted = logits(model, ids), logits(model, with_start(ids))[:, 1:]
    with testreg.patch(model, start_plan(model)):
        found = logits(model, ids)
        assert found.shape == before.shape
        assert found == pytest.approx(wanted, abs=3e-5)
        assert logits(model, ids, use_cache=False) == pytest.approx(wanted, abs=3e-5)
        cache = DynamicCache(config=model.config)
        pieces = [logits(model, piece, past_key_values=cache) for piece in ids.split([4, 1, ids.shape[1] - 5], dim=1)]
        assert torch.cat(pieces, 1) == pytest.approx(wanted, abs=3e-5)
    assert (before - wanted).abs().max() > 0.1
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_is_about_tokens_and_never_about_the_register(name):
    model, ids = built(name), text(tokens=20)
    plan = start_plan(model)
    with testreg.patch(model, plan):
        near = logits(model, ids)
    ids[:, 0] = (ids[:, 0] + 1) % 60
    with testreg.patch(model, plan):
        far = logits(model, ids)
    if name == "mistral":  # all layers have the window of 8: three of them reach 3 * 7 back
        model = built(name)
        model.config.num_hidden_layers = 1
        with testreg.patch(model, plan):
            ids_other = ids.clone()
            ids_other[:, 0] = (ids[:, 0] + 1) % 60
            one, other = logits(model, ids), logits(model, ids_other)
        assert torch.equal(one[:, 8:], other[:, 8:])  # what left the window is not seen
        unseen = copy.deepcopy(plan.state)
        unseen[0] *= -1
        with testreg.patch(model, testreg.RegisterPlan({}, 1, 0, unseen, positions="before")):
            moved = logits(model, ids)
        assert (moved - one).abs().amax(-1).min() > 1e-3  # the register is, by every token
    assert not torch.equal(near[:, :4], far[:, :4])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["greedy", "sample", "beams", "static", "no cache"])
def test_generate_as_if_the_start_token_were_there(name, attention, how):
    model = built(name)
    model.set_attn_implementation(attention)
    ids = text(3, 6)
    ids[0, :3] = PAD  # padded on the left
    ids[1, :1] = PAD
    mask = (ids != PAD).long()
    started = with_start(ids)
    for row, pads in enumerate((3, 1, 0)):
        started[row] = torch.cat([ids[row, :pads], torch.tensor([START]), ids[row, pads:]])
    more = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": how == "sample"}
    more |= {"beams": {"num_beams": 3}, "static": {"cache_implementation": "static"}}.get(how, {})
    more |= {"use_cache": False} if how == "no cache" else {}

    def said(ids, mask):
        torch.manual_seed(1)
        return model.generate(ids, attention_mask=mask, **more)[:, ids.shape[1] :]

    wanted = said(started, torch.cat([torch.ones(3, 1, dtype=torch.long), mask], 1).sort(1).values)
    with testreg.patch(model, start_plan(model)):
        found = said(ids, mask)
    assert torch.equal(found, wanted)
    assert not torch.equal(said(ids, mask), wanted)


def test_positions_on_the_first_token_s_place():
    model = built("llama")
    plan = start_plan(model)
    on = testreg.RegisterPlan({}, 1, 0, plan.state, positions="on")
    ids = text()
    with testreg.patch(model, on):
        found = logits(model, ids)
    places = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(12)])[None].expand(2, -1)
    mask = torch.ones(13, 13, dtype=torch.bool).tril()[None, None]  # given, or equal positions look like two texts
    wanted = logits(model, with_start(ids), position_ids=places, attention_mask=mask)[:, 1:]
    assert found == pytest.approx(wanted, abs=3e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2-moe"])
def test_resting_neurons_and_an_entry(name):
    model, ids = built(name), text()
    tower = find_decoder(model)
    plan = start_plan(model, entry=1)
    plan = testreg.RegisterPlan({1: (2, 5)}, 1, 1, plan.state, positions="before", rest={1: (0.5, 0.0)})
    with testreg.patch(model, plan):
        found = logits(model, ids)
        maps = {}
        handle = tower.downs[1].register_forward_hook(lambda module, args, out: maps.update(down=(args[0], out)))
        logits(model, ids)
        handle.remove()
    given, out = maps["down"]
    rested = given.clone()
    rested[..., 2], rested[..., 5] = 0.5, 0.0
    bias = tower.downs[1].bias if tower.downs[1].bias is not None else 0
    assert out.detach() == pytest.approx((rested @ matrix(tower.downs[1]).T + bias).detach(), abs=1e-5)
    assert (found - logits(model, ids)).abs().max() > 1e-3


def test_attention_maps_have_the_tokens_alone():
    model, ids = built("llama"), text()
    model.set_attn_implementation("eager")
    with testreg.patch(model, start_plan(model)) as patch, patch.recording() as record, torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    assert [one.shape for one in maps] == [(2, 4, 12, 12)] * 3
    assert record.attentions[1].shape == (2, 4, 12, 13)
    assert record.attentions[1].sum(-1) == pytest.approx(torch.ones(2, 4, 12))
    assert torch.equal(maps[1], record.attentions[1][..., 1:])


def test_a_cache_that_does_not_go_with_the_registers():
    model, ids = built("llama"), text()
    plan = start_plan(model)
    other = testreg.RegisterPlan({}, 1, 0, plan.state * 2, positions="before")
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    with testreg.patch(model, plan), pytest.raises(testreg.TestregError, match="filled without registers"):
        logits(model, ids, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    with testreg.patch(model, plan):
        logits(model, ids, past_key_values=cache)
        logits(model, ids, past_key_values=copy.deepcopy(cache))
    with testreg.patch(model, testreg.RegisterPlan({}, 1, 0, plan.state, positions="before")):
        logits(model, ids, past_key_values=cache)  # an equal plan
    with testreg.patch(model, other), pytest.raises(testreg.TestregError, match="under another plan"):
        logits(model, ids, past_key_values=cache)
    static = StaticCache(config=model.config, max_cache_len=32)
    with testreg.patch(model, plan):
        logits(model, ids, past_key_values=static)
    with testreg.patch(model, other), pytest.raises(testreg.TestregError, match="under another plan"):
        logits(model, ids, past_key_values=static)
    static.reset()
    with testreg.patch(model, other):
        logits(model, ids, past_key_values=static)


def test_precisions_copies_and_training():
    model, ids = built("llama"), text()
    plan = start_plan(model)
    wanted = logits(model, with_start(ids))[:, 1:]
    testreg.patch(model, plan)
    twin = copy.deepcopy(model)
    testreg.active(model).remove()
    assert logits(twin, ids) == pytest.approx(wanted, abs=3e-5)
    half = logits(twin.to(torch.bfloat16), ids)
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), wanted, dim=-1).mean() > 0.99
    twin.float().train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_patched_and_compiled():
    model, ids = built("llama"), text()
    with testreg.patch(model, start_plan(model)):
        wanted = logits(model, ids)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert logits(compiled, ids, use_cache=False) == pytest.approx(wanted, abs=1e-5)


def test_a_model_that_sees_and_speaks_takes_a_plan_for_each():
    vision = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    words = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=words, image_token_index=63)
    model = hf.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([text(1, 4), torch.full((1, 16), 63), text(1, 6, seed=1)], 1)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    speaks, sees = start_plan(model), testreg.RegisterPlan({1: (3,)})

    def said():
        return logits(model, ids, pixel_values=pixels)

    plain = said()
    with testreg.patch(model, speaks):
        spoken = said()
        with testreg.patch(model, sees):
            both = said()
            assert len({id(patch) for patch in testreg.runtime.guard.all_acting(model)}) == 2
        assert torch.equal(said(), spoken)
    with testreg.patch(model, sees):
        seen = said()
    assert torch.equal(said(), plain)
    answers = [plain, spoken, seen, both]
    assert all((one - other).abs().max() > 1e-5 for i, one in enumerate(answers) for other in answers[:i])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)), "ALiBi"),
        (
            lambda: hf.BertForMaskedLM(
                hf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
            ),
            "it is an encoder",
        ),
        (lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4)), "no blocks with"),
        (
            lambda: hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
            'positions="on"',
        ),
    ],
    ids=["bloom", "bert", "mamba", "gpt-j"],
)
def test_models_that_cannot_have_them(make, message):
    model = make()
    plan = testreg.RegisterPlan({}, 1, 0, torch.zeros(2, 1, 32), positions="before")
    with pytest.raises(testreg.UnsupportedModel, match=message):
        testreg.patch(model, plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"state": torch.zeros(4, 1, 32)}, "rows for 4 blocks"),
        ({"state": torch.zeros(3, 1, 16)}, "16 channels"),
        ({"state": torch.zeros(3, 1, 32), "neurons": {1: (48,)}}, "neuron 48"),
        ({"state": torch.zeros(3, 1, 32), "neurons": {5: (1,)}}, "block 5"),
        ({"state": torch.zeros(1, 32)}, "attention form"),
        ({"state": torch.zeros(3, 1, 32), "positions": "behind"}, "positions must be"),
    ],
)
def test_plans_that_do_not_fit(plan, message):
    with pytest.raises(testreg.BadPlan, match=message):
        testreg.patch(built("llama"), testreg.RegisterPlan(**{"neurons": {}, "positions": "before", **plan}))


def test_a_plan_travels_as_a_file(tmp_path):
    model = built("llama")
    plan = start_plan(model)
    plan.save(tmp_path / "plan")
    loaded = testreg.RegisterPlan.load(tmp_path / "plan")
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert loaded.language
    assert testreg.RegisterPlan({}, 1, 0, plan.state, positions="on") != plan
    assert testreg.RegisterPlan({}, 1, 0, plan.state) != plan


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_mask_is_refused(kind):
    model, ids = built("llama"), text()
    with testreg.patch(model, start_plan(model)):
        cache = testreg.StreamingCache(model, window=8)
        logits(model, ids)
        model.config._attn_implementation = kind
        with pytest.raises(testreg.UnsupportedModel, match=f'{kind} takes no mask.*attn_implementation="sdpa"'):
            logits(model, ids)
        with pytest.raises(testreg.UnsupportedModel, match=f"{kind} takes no mask"):
            logits(model, ids, past_key_values=cache)
