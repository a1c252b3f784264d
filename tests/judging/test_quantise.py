"""Simulated quantisation: values that a few bits can hold, arms of an evaluation, what inspect says of its cost."""

from functools import partial

import pytest
import torch
import transformers as hf
from commands import noise
from torch import nn

import testreg
from testreg import BadImages, TestregError
from testreg.demo.planted import plant
from testreg.finding.evening import Seen, channels, even
from testreg.finding.linears import Linears, linears, normed
from testreg.finding.rounding import rounded, rounded_weight
from testreg.judging.evaluation import evaluate
from testreg.judging.quantise import FP8, Scheme, activation_of, quantised, weight_of

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip


def test_a_weight_has_as_many_values_as_its_bits():
    weight = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        whole, rows = (weight_of(weight, Scheme(bits, 16, per_channel=each)) for each in (False, True))
        end = 2 ** (bits - 1) - 1
        assert len(whole.unique()) <= 2 * end + 1
        torch.testing.assert_close(whole, (weight / (weight.abs().max() / end)).round() * weight.abs().max() / end)
        largest = weight.abs().amax(1, keepdim=True)
        torch.testing.assert_close(rows, (weight / (largest / end)).round() * largest / end)
    assert weight_of(weight, Scheme(16, 8)) is weight
    turned = weight_of(weight.T, Scheme(8, 16, per_channel=True), axis=1)
    torch.testing.assert_close(turned, weight_of(weight, Scheme(8, 16, per_channel=True)).T)


def test_an_activation_keeps_zero_and_its_ends():
    tokens = torch.tensor([[0.0, -1.0, 3.0], [0.0, 0.1, 0.2]])
    whole = activation_of(tokens, Scheme(8, 8), tokens.amin(), tokens.amax())
    scale = 4 / 255
    torch.testing.assert_close(whole, (tokens / scale).round() * scale, atol=scale / 2 + 1e-6, rtol=0)
    assert (whole[:, 0] == 0).all()
    rows = activation_of(tokens, Scheme(8, 8, per_token=True), tokens.amin(1), tokens.amax(1))
    assert (rows - tokens)[1].abs().max() < 0.2 / 255 < (whole - tokens)[1].abs().max()


@pytest.mark.skipif(FP8 is None, reason="this torch has no float8")
def test_float8_is_torchs_own():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().max() / 448
    expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(weight_of(weight, Scheme.parse("fp8")), expected)


def test_channels_are_divided_as_in_the_papers_equation():
    largest, weights = torch.tensor([16.0, 0.0]), torch.tensor([4.0, 1.0])
    torch.testing.assert_close(channels(largest, weights, 0.75), torch.tensor([16**0.75 / 4**0.25, 1e-5**0.75]))


def of_images(*images):
    seen = Seen()
    for image in images:
        seen.add(image)
    return seen


def eight_bits(seen, weight, **more):
    return even(seen, weight, partial(rounded, bits=8), partial(rounded_weight, bits=8, axis=0), **more)


def test_what_is_seen_of_images():
    images = [torch.randn(50, 6, generator=torch.Generator().manual_seed(index)) for index in range(40)]
    seen = of_images(*images)
    whole = torch.cat(images)
    assert torch.equal(seen.low, whole.amin(0))
    assert torch.equal(seen.high, whole.amax(0))
    assert torch.cat(seen.rows).shape == (256, 6)  # eight of each of 32 images
    assert torch.equal(seen.rows[3][[0, -1]], images[3][[0, -1]])


def test_evening_out_loses_least_and_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    sizes = 10 ** torch.linspace(-2, 1, 20)  # of the channels
    tokens = torch.randn(60, 20, generator=generator) * sizes

    def lost(found):
        values, again = found(tokens)
        held = rounded_weight(weight * found.scale, 8, 0)
        return (rounded(values, found.low, found.high, 8) * again @ held.mT - tokens @ weight.mT).square().mean()

    found = eight_bits(of_images(tokens), weight, divide=False)
    values, again = found(tokens)
    torch.testing.assert_close(again * values @ (weight * found.scale).mT, tokens @ weight.mT, atol=1e-4, rtol=1e-4)
    plain = rounded(tokens, tokens.amin(), tokens.amax(), 8) @ rounded_weight(weight, 8, 0).mT - tokens @ weight.mT
    assert lost(found) < plain.square().mean() / 3

    tokens *= 10 ** torch.linspace(-2, 1, 60)[:, None]  # tokens of many sizes
    seen = of_images(tokens)
    found = eight_bits(seen, weight, divide=True)
    assert lost(found) < lost(eight_bits(seen, weight, divide=False)) / 2
    values, again = found(tokens)
    assert values.abs().max() <= 1
    torch.testing.assert_close(again * values @ (weight * found.scale).mT, tokens @ weight.mT, atol=1e-3, rtol=1e-4)


def test_what_a_norm_made_is_known_however_it_was_joined():
    norm = nn.LayerNorm(4)
    with Linears(norm):
        tokens = norm(torch.randn(1, 3, 4))
        others = torch.randn(1, 2, 4)
        assert normed(torch.cat([others, tokens], 1))
        assert normed(torch.cat(tensors=[others, tokens], dim=1))
        assert not normed(torch.cat(tensors=[others, others], dim=1))


def test_tokens_are_divided_where_no_norm_made_them(planted):
    model, plan, _ = planted
    batch = {"pixel_values": torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))}
    with testreg.patch(model, plan):
        state = quantised(model, Scheme(8, 8, even=True), [batch])
        with state, torch.no_grad():
            model(**batch)
    divided = {name.split(".")[-1] for name, found in state.evened.items() if found.alike}
    others = {name.split(".")[-1] for name, found in state.evened.items() if not found.alike}
    assert divided == {"o_proj", "fc2"}
    assert others == {"q_proj", "k_proj", "v_proj", "fc1", "classifier"}


@pytest.mark.parametrize(
    ("text", "says"), [("int8", "no way to quantise"), ("w9a8", "have 9 bits"), ("w1a8", "have 1 bits")]
)
def test_schemes_that_are_none(text, says):
    with pytest.raises(TestregError, match=says):
        Scheme.parse(text)
    with pytest.raises(TestregError, match="clip is 3"):
        Scheme(8, 8, clip=3)
    for more in ({"clip": 0.999}, {"per_token": True}, {"activations": 16}):
        with pytest.raises(TestregError, match="leave out clip"):
            Scheme(**{"weights": 8, "activations": 8, "even": True, **more})


def test_every_linear_is_met_with_what_it_multiplies():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), attention)

    class Met(Linears):
        def meet(self, name, tokens, weight):
            seen[name] = (None if tokens is None else tuple(tokens.shape), tuple(weight.shape))
            return tokens, weight

    seen = {}
    tokens = torch.randn(2, 3, 8)
    with Met(model):
        attention(model[0](tokens), tokens, tokens)
    assert set(seen) == {name for name, _, _ in linears(model)}
    assert seen["0"] == ((2, 3, 8), (8, 8))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**SHAPE, num_labels=5)).eval()
    plant(model, decoys=False)
    model.image_processor = hf.ViTImageProcessor(size={"height": 96, "width": 96})
    folder = tmp_path_factory.mktemp("photos")
    for index in range(24):
        noise(index).save(folder / f"{index:02d}.png")
    plan = testreg.find(model, folder, form="attention", sizes=())
    return model, plan, folder


def test_arms_in_few_bits_beside_those_in_float(planted):
    model, plan, folder = planted
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    table = evaluate(model, folder, "agreement", plan=plan, quantise="w8a8")
    names = list(dict.fromkeys(row.arm for row in table))
    assert names == [
        "unpatched",
        "patched",
        "unpatched, w8a8",
        "unpatched, w8a8, clipped at 99.99 %",
        "patched, w8a8",
        "constant tokens, w8a8",
        "dynamic tokens, w8a8",
    ]
    cosine = {name: table.of(name, "cosine").value for name in names}
    assert cosine["unpatched, w8a8"] < cosine["patched, w8a8"] < cosine["patched"] < cosine["unpatched"]
    assert len({cosine[name] for name in names}) == len(names)  # each arm is another model
    assert table.provenance["quantised"] == "w8a8"
    assert (table.provenance["calibrated"], table.provenance["images"]) == (8, 16)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    few = evaluate(model, folder, "outliers", plan=plan, quantise=Scheme(4, 4, per_token=True), calibration=folder)
    assert {row.arm for row in few if row.kind == "fixed"} == {
        "unpatched", "patched", "unpatched, w4a4 per token", "patched, w4a4 per token",
    }  # fmt: skip
    assert few.provenance["images"] == 24


def test_too_few_photos_to_calibrate_on(planted):
    with pytest.raises(BadImages, match="too few to calibrate"):
        evaluate(planted[0], planted[2], "agreement", plan=planted[1], quantise="w8a8", limit=6)
    with pytest.raises(TestregError, match="is for quantise"):
        evaluate(planted[0], planted[2], "agreement", plan=planted[1], calibration=planted[2])


def test_linears_of_a_class_of_their_own():
    with pytest.raises(TestregError, match="no linear of Identity"):
        quantised(nn.Identity(), Scheme(8, 8), [{}], ask=lambda model, batch: None)


def test_inspect_says_what_it_will_cost(planted):
    model, plan, folder = planted
    seen = testreg.inspect(model, folder)
    worst = max(seen.scales, key=lambda scale: scale.times)
    block = min(plan.neurons)
    assert (worst.block, worst.linear.split(".")[-1]) == (block, "fc2")
    assert f"fc2 of block {block} ({worst.times:.0f} times)" in seen.verdict
    assert seen.to_dict()["scales"][block]["largest"] == worst.largest
    assert [scale.block for scale in seen.scales] == [0, 1, 2, 3]
    with testreg.patch(model, plan):
        after = testreg.inspect(model, folder)
    assert after.scales[block].times < worst.times / 3
    assert f"fc2 of block {block}" not in after.verdict
