"""`inspect`: the norms of a model, block by block, against a plain computation; and the verdict."""

import json

import pytest
import torch
import zoo
from growing import bare, grown, images

import testreg
from testreg.runtime.towers import find_tower


def norms_of(model):
    with torch.no_grad():
        states = model(pixel_values=images(), output_hidden_states=True).hidden_states[1:-1]  # the last is normed
    return torch.stack([block[:, 1:].norm(dim=-1) for block in states], dim=1)  # (images, blocks, patches)


def test_every_number_of_every_block():
    model, planted = grown(where="corners", scale=30)
    seen = testreg.inspect(model, images())
    norms = norms_of(model)
    ratios = norms / norms.median(dim=-1, keepdim=True).values
    outliers = ratios > seen.threshold.times
    assert (len(seen.blocks), seen.images, seen.family) == (5, 16, "vit")
    for block, row in enumerate(seen.blocks[:-1]):
        values = norms[:, block]
        assert row.median == pytest.approx(values.median().item(), rel=0.025)
        assert row.p99 == pytest.approx(values.flatten().quantile(0.99).item(), rel=0.06)
        assert row.largest == pytest.approx(values.max().item(), rel=1e-4)
        assert row.share == pytest.approx(outliers[:, block].float().mean().item(), abs=1e-6)
        assert row.images == pytest.approx(outliers[:, block].any(1).float().mean().item(), abs=1e-6)
        assert seen.ratios[block] == pytest.approx(ratios[:, block].max().item(), rel=0.025)
    assert seen.artefact.block == planted.block
    assert seen.artefact.share == pytest.approx(4 / 144)
    assert seen.artefact.images == 1
    assert (
        f"2.78% of the patches, in 100% of the images, have up to {seen.ratios[seen.artefact.shown]:.0f}"
        in seen.verdict
    )
    assert f"from the output of block {planted.block} on" in seen.verdict


def test_a_clean_model():
    seen = testreg.inspect(bare(), images())
    assert seen.artefact is None
    assert seen.verdict.startswith("No artefact")
    assert f"{max(seen.ratios):.1f} times" in seen.verdict


def test_a_patched_model_shows_what_is_left():
    model, _ = grown(where="corners")
    with testreg.patch(model, testreg.find(model, images())):
        assert testreg.inspect(model, images()).artefact is None
    assert testreg.inspect(model, images()).artefact is not None


def test_a_threshold_of_ones_own():
    model, _ = grown(where="corners")
    largest = testreg.inspect(model, images()).blocks[-1].largest
    seen = testreg.inspect(model, images(), threshold=largest * 0.3)
    assert str(seen.threshold) == f"norm {largest * 0.3:g}"
    assert seen.artefact.share == pytest.approx(4 / 144, abs=1e-6)
    high = testreg.inspect(model, images(), threshold=largest * 1.1)
    assert high.artefact is None
    assert f"no group of patches lies above the norm {largest * 1.1:g} that was asked for" in high.verdict
    # Where all patches are beyond a norm, none of them stands out.
    low = testreg.inspect(model, images(), threshold=0.01)
    assert all(row.share < 0.05 for row in low.blocks)
    with pytest.raises(testreg.BadPlan, match="threshold must be a norm above 0"):
        testreg.inspect(model, images(), threshold=0)


def test_prefix_tokens_do_not_count():
    model, _ = zoo.build("Dinov2WithRegistersModel", 8)
    inputs = zoo.build("Dinov2WithRegistersModel", 8)[1]
    before = testreg.inspect(model, inputs)
    with torch.no_grad():
        model.embeddings.register_tokens.mul_(100)
    assert before.artefact is None
    assert testreg.inspect(model, inputs).artefact is None
    assert find_tower(model).prefix == 5


def test_training_mode_stays_and_it_is_plain_json():
    model, _ = grown(where="corners")
    model.train()
    model.layers[1].eval()
    seen = testreg.inspect(model, images(), batch_size=5)
    assert model.training
    assert not model.layers[1].training
    assert json.loads(json.dumps(seen.to_dict())) == seen.to_dict()
    assert [row["block"] for row in seen.to_dict()["blocks"]] == [0, 1, 2, 3, 4]


def test_one_image_is_enough_to_look_at():
    assert testreg.inspect(grown(where="corners")[0], images(1)).images == 1


def test_a_model_with_registers_of_its_own_is_told_apart():
    model, inputs = zoo.build("Dinov2WithRegistersModel", 8)
    plain, photos = zoo.build("Dinov2Model", 8)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True).attentions)  # (blocks, images, heads, T, T)
    seen = testreg.inspect(model, {name: value[:1] for name, value in inputs.items()})
    received = maps[:, 0].mean(-2)  # (blocks, heads, T)
    assert seen.native == model.config.num_register_tokens == 4
    assert seen.attention.prefix == pytest.approx(received[..., 0].mean().item(), rel=1e-4)
    assert seen.attention.native == pytest.approx(received[..., 1:5].sum(-1).mean().item(), rel=1e-4)
    assert seen.attention.patch == pytest.approx(received[..., 5:].amax(-1).mean().item(), rel=1e-4)
    assert seen.attention.rate == pytest.approx((received[..., 5:] > 0.3).float().mean((0, 1)).max().item())
    assert "The model has 4 registers of its own, which get" in seen.verdict
    assert "of its own" not in testreg.inspect(plain, photos).verdict


def test_where_attention_goes_before_and_after():
    model, _ = grown(where="corners")
    before = testreg.inspect(model, images())
    assert (before.native, before.attention.registers) == (0, pytest.approx(0, abs=1e-5))
    with testreg.patch(model, testreg.find(model, images())):
        after = testreg.inspect(model, images())
    assert after.attention.registers > before.attention.patch
    assert after.attention.patch < before.attention.patch
