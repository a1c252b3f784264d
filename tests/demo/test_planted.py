"""Planted artefacts behave as the real one does: measured by a plain scan that shares no code with the finder."""

import sys

import pytest
import torch
import transformers
import zoo
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

import testreg
from testreg import RegisterPlan
from testreg.demo.demonstration import PHOTOS, demo_model, demo_photos
from testreg.demo.planted import PLANTABLE, plant
from testreg.runtime.towers import find_tower

NAMES = [name for family in PLANTABLE for name in zoo.MODELS[family]]
FIRST = [next(iter(zoo.MODELS[family])) for family in PLANTABLE]
SWIGLU = "Dinov2Model-SwiGLU"
SETTINGS = [
    # seed, scale, where, neurons
    (0, 30, "content", 1),
    (1, 10, "content", 1),
    (2, 50, "content", 6),
    (3, 30, "content", 3),
    (4, 10, "corners", 1),
    (5, 40, "corners", 4),
    (6, 30, (5,), 2),
    (7, 20, (0, 9), 1),
]


def grown(name, batch=32, **settings):
    model, inputs = zoo.build(name, 4 if zoo.ROWS[name].text else batch)
    return model, inputs, plant(model, **settings)


@torch.no_grad()
def scan(model, inputs, zeroed=()):
    """Patch tokens at each block's output and neuron activations of all tokens, with some (block, neuron) zeroed."""
    tower = find_tower(model)
    tokens, activations, handles = {}, {}, []
    for index, (block, down) in enumerate(zip(tower.blocks, tower.downs, strict=True)):
        rows = [neuron for at, neuron in zeroed if at == index]

        def before(module, args, index=index, rows=rows):
            activations[index] = args[0].index_fill(-1, torch.tensor(rows, dtype=torch.long), 0)
            return (activations[index],)

        def after(module, args, output, index=index):
            tokens[index] = (output[0] if isinstance(output, tuple) else output)[:, tower.prefix :]

        handles += [down.register_forward_pre_hook(before), block.register_forward_hook(after)]
    output = model(**inputs)
    for handle in handles:
        handle.remove()
    return tokens, activations, output


def ratios(tokens):
    """Patch norms over the median norm, `(batch, patches)`."""
    norms = tokens.norm(dim=-1)
    return norms / norms.median()


def everything_about(model, inputs, planted):
    tokens, activations, output = scan(model, inputs)
    return tokens, activations, output, ratios(tokens[planted.block]) > 4


def pairs(neurons):
    return [(block, neuron) for block, row in neurons.items() for neuron in row]


def contributions(model, tokens, activations, outliers, block):
    """(block, neuron) -> what it adds along the outliers' direction, at outliers in contrast to other patches."""
    tower = find_tower(model)
    direction = normalize(tokens[block][outliers].mean(0) - tokens[block][~outliers].mean(0), dim=0)
    scores = {}
    for index, down in enumerate(tower.downs):
        patches = activations[index][:, tower.prefix :]
        contrast = patches[outliers].mean(0) - patches[~outliers].mean(0)
        for neuron, score in enumerate((contrast * (direction @ down.weight)).tolist()):
            scores[index, neuron] = score
    return scores


def check_artefact(model, inputs, planted, scale, most):
    tokens, activations, _, outliers = everything_about(model, inputs, planted)
    # In every image a few patches, far from the others; nothing before that block, and they stay.
    assert outliers.any(dim=1).all()
    assert outliers.float().mean() <= most
    loud = ratios(tokens[planted.block])
    assert 0.6 * scale < loud[outliers].mean() < 1.3 * scale
    assert ((loud > 2.2) & (loud < scale / 4)).float().mean() < 0.01
    assert all(ratios(tokens[block]).max() < 2.2 for block in range(planted.block))
    assert (ratios(tokens[max(tokens)])[outliers] > scale / 4).float().mean() > 0.97
    ordinary = [tokens[block][~outliers].norm(dim=-1).mean() for block in tokens]
    assert max(ordinary) < 2 * min(ordinary)
    # The planted neurons are who writes them, and the only ones.
    scores = contributions(model, tokens, activations, outliers, planted.block)
    best = sorted(scores, key=scores.get, reverse=True)
    count = len(pairs(planted.neurons))
    assert sorted(best[:count]) == pairs(planted.neurons)
    assert scores[best[count - 1]] > 1.5 * scores[best[count]]
    assert ratios(scan(model, inputs, pairs(planted.neurons))[0][max(tokens)]).max() < 2.2


@pytest.mark.parametrize("name", NAMES)
def test_every_model_carries_the_artefact(name):
    model, inputs, planted = grown(name)
    check_artefact(model, inputs, planted, 30, most=0.2)


@pytest.mark.parametrize("name", ["ViTModel", SWIGLU, "SiglipVisionModel"])
@pytest.mark.parametrize(("seed", "scale", "where", "neurons"), SETTINGS)
def test_for_seeds_scales_and_positions(name, seed, scale, where, neurons):
    model, inputs, planted = grown(name, seed=seed, scale=scale, where=where, neurons=neurons)
    check_artefact(model, inputs, planted, scale, most=0.25)


@pytest.mark.parametrize(("block", "where"), [(0, (20,)), (1, "content"), (5, "corners"), (10, "content")])
def test_in_any_block_of_a_deep_model(block, where):
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=12, num_attention_heads=4, image_size=112, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    planted = plant(model, block=block, where=where, neurons=2, seed=block)
    assert (planted.block, *planted.neurons) == (block, block)
    pixels = torch.randn(16, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    check_artefact(model, {"pixel_values": pixels}, planted, 30, most=0.08)


def test_content_or_position_decides_which_patches():
    rolled = {"pixel_values": zoo.build("ViTModel", 32)[1]["pixel_values"].roll(zoo.PATCH, dims=-1)}
    side = zoo.SIZE // zoo.PATCH
    model, inputs, planted = grown("ViTModel", where=(6, 11))
    for images in (inputs, rolled):
        *_, outliers = everything_about(model, images, planted)
        assert outliers.sum(0).tolist() == [32 if patch in (6, 11) else 0 for patch in range(side * side)]

    model, inputs, planted = grown("ViTModel", where="content")
    *_, outliers = everything_about(model, inputs, planted)
    *_, moved = everything_about(model, rolled, planted)
    follows = outliers.view(-1, side, side).roll(1, dims=-1).flatten(1)
    assert (follows & moved).sum() > 0.75 * (follows | moved).sum()
    assert (outliers & moved).sum() < 0.4 * (outliers | moved).sum()
    assert (outliers.sum(0) > 0).all()  # any patch may be one


@pytest.mark.parametrize("where", ["content", (5,)])
@pytest.mark.parametrize("name", [*FIRST, SWIGLU])
def test_decoys_are_tempting_and_innocent(name, where):
    model, inputs, planted = grown(name, neurons=2, where=where)
    tower = find_tower(model)
    tokens, activations, _, outliers = everything_about(model, inputs, planted)
    assert set(planted.decoys) == {"everywhere", "early", "tiny", "downstream"} | ({"class"} if tower.prefix else set())

    def activation(pair):
        return activations[pair[0]][..., pair[1]]  # (batch, tokens)

    def patches(pair):
        return activation(pair)[:, tower.prefix :]

    register = max(patches(pair)[outliers].mean() for pair in pairs(planted.neurons))
    ordinary = ratios(tokens[planted.block]) < 2.2  # one patch in hundreds is neither
    assert all(patches(pair)[ordinary].abs().max() < 2 for pair in pairs(planted.neurons))
    decoys = {kind: pair for kind, (pair,) in planted.decoys.items()}
    assert patches(decoys["everywhere"]).min() > register  # first by mean activation
    assert patches(decoys["tiny"])[outliers].mean() > 2 * register  # first by contrast
    early = patches(decoys["early"])
    assert early.min() > 10
    assert early[outliers].mean() > 1.2 * early[~outliers].mean()
    downstream = patches(decoys["downstream"])
    assert downstream[outliers].mean() > register
    assert downstream[ordinary].abs().max() < 0.1
    if tower.prefix:
        token = activation(decoys["class"])
        assert token[:, 0].min() > register
        assert token[:, tower.prefix :].abs().max() < 0.1

    last = max(tokens)
    drift = {}
    for kind, pair in decoys.items():
        without = scan(model, inputs, [pair])[0]
        still = ratios(without[planted.block]) > 4
        assert (still & outliers).sum() >= 0.95 * (still | outliers).sum(), kind
        assert (ratios(without[last])[still] > 7).float().mean() > 0.97, kind
        drift[kind] = cosine_similarity(without[last], tokens[last], dim=-1)[~outliers].mean().item()
    assert drift["early"] < 0.97
    assert drift["tiny"] > 0.9999


@pytest.mark.parametrize("name", ["ViTModel", SWIGLU])
def test_no_smaller_set_removes_the_outliers(name):
    model, inputs, planted = grown(name, neurons=3, scale=40)
    *_, outliers = everything_about(model, inputs, planted)
    neurons = pairs(planted.neurons)
    for spared in neurons:
        left = scan(model, inputs, [pair for pair in neurons if pair != spared])[0]
        assert (ratios(left[planted.block])[outliers] > 4).float().mean() > 0.97


def test_upstream_neurons_feed_the_register_neurons():
    model, inputs, planted = grown("ViTModel", where=(5,), upstream=2)
    tokens, activations, _, outliers = everything_about(model, inputs, planted)
    assert list(planted.upstream) == [planted.block - 1]
    for block, neuron in pairs(planted.upstream):
        at = activations[block][:, 1:, neuron]
        assert 2 < at[outliers].mean() < 15
        assert at[~outliers].abs().max() < 0.1
    without = scan(model, inputs, pairs(planted.upstream))[0]
    size, lessened = (t[planted.block][outliers].norm(dim=-1).mean() for t in (tokens, without))
    assert 0.3 * size < lessened < 0.85 * size
    (neuron,) = planted.neurons[planted.block]
    scores = contributions(model, tokens, activations, outliers, planted.block)
    assert max(scores, key=scores.get) == (planted.block, neuron)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel"])
@torch.no_grad()
def test_outliers_are_attention_sinks_afterwards(name):
    model, inputs, planted = grown(name)
    *_, outliers = everything_about(model, inputs, planted)
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions  # block: (batch, heads, tokens, tokens)
    prefix = find_tower(model).prefix
    drawn = [(attention.mean(dim=(1, 2))[:, prefix:] * outliers).sum(1).mean() for attention in maps]
    assert all(share > 0.75 for share in drawn[planted.block + 1 :])
    assert all(share < 0.5 for share in drawn[: planted.block + 1])


@pytest.mark.parametrize("where", ["content", "corners"])
@pytest.mark.parametrize("name", [*FIRST, SWIGLU])
def test_a_register_in_their_place_changes_less_than_zeroing(name, where):
    model, inputs, planted = grown(name, neurons=2, where=where)
    tokens, _, output, outliers = everything_about(model, inputs, planted)
    state = tokens[planted.block][outliers].mean(0)  # (channels,)
    last = max(tokens)

    def drift(after, pooled):
        ordinary = 1 - cosine_similarity(after[last], tokens[last], dim=-1)[~outliers].mean()
        return ordinary, 1 - cosine_similarity(pooled, output.pooler_output, dim=-1).mean()

    zeroed, _, without = scan(model, inputs, pairs(planted.neurons))
    constant = RegisterPlan(planted.neurons, registers=2, entry=planted.block + 1, state=state)
    for plan in (constant, RegisterPlan(planted.neurons, registers=1)):
        with testreg.patch(model, plan), torch.no_grad():
            after = {}
            hook = (
                find_tower(model)
                .blocks[last]
                .register_forward_hook(
                    lambda module, args, tokens, after=after: after.update(
                        {last: tokens[:, find_tower(model).prefix :]}
                    )
                )
            )
            patched = model(**inputs)
            hook.remove()
        assert ratios(after[last]).max() < 2.2
        ordinary, pooled = drift(after, patched.pooler_output)
        ordinary_zeroed, pooled_zeroed = drift(zeroed, without.pooler_output)
        assert ordinary < 0.1 * ordinary_zeroed
        assert pooled < 0.5 * pooled_zeroed
        assert ordinary < 0.005


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_survives_save_and_load(name, tmp_path):
    model, inputs, _ = grown(name, batch=2)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def earlier(block):
    """Let a block's linears have the names that they had in earlier releases of transformers 5; it is not run."""

    def tree(**parts):
        holder = nn.Module()
        for name, part in parts.items():
            holder.add_module(name, part)
        return holder

    own = block.attention
    inner = tree(query=own.q_proj, key=own.k_proj, value=own.v_proj)
    block.attention = tree(attention=inner, output=tree(dense=own.o_proj))
    if hasattr(block, "layernorm_before"):  # ViT's, not DINOv2's
        block.intermediate, block.output = tree(dense=block.mlp.fc1), tree(dense=block.mlp.fc2)
        del block.mlp
    elif hasattr(block.mlp, "gate_proj"):
        gate = block.mlp.gate_proj
        both = nn.Linear(gate.in_features, 2 * gate.out_features)
        block.mlp = tree(weights_in=both, weights_out=block.mlp.down_proj)


@pytest.mark.parametrize("name", ["Dinov2Model", "ViTModel", SWIGLU])
@pytest.mark.parametrize("where", ["content", "corners"])
@pytest.mark.skipif(not hasattr(transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1)), "layers"),
                    reason="the names are those of an earlier release already")  # fmt: skip
def test_the_names_of_earlier_releases_are_the_same_model(name, where):
    now, _ = zoo.build(name)
    then, _ = zoo.build(name)
    for block in find_tower(then).blocks:
        earlier(block)
    known, found = plant(now, where=where, neurons=2), plant(then, where=where, neurons=2)
    if name == SWIGLU:  # what the gate lets through is one
        both = find_tower(then).blocks[found.block].mlp.weights_in
        values = [neuron + both.out_features // 2 for neuron in found.neurons[found.block]]
        assert both.weight[list(found.neurons[found.block])].any()
        assert not both.weight[values].any()
        assert (both.bias[values] == 1).all()
    else:
        assert known == found
        pairs = zip(now.parameters(), then.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_the_seed_alone_decides():
    def weights(scramble, seed):
        model, _ = zoo.build("ViTModel")
        blocks = find_tower(model).blocks
        for block in blocks:
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=scramble)
        planted = plant(model, seed=seed)
        return planted, torch.cat([parameter.flatten() for block in blocks for parameter in block.parameters()])

    (first, one), (same, two), (other, three) = weights(1, 0), weights(2, 0), weights(1, 1)
    assert first == same
    assert torch.equal(one, two)
    assert first.neurons != other.neurons
    assert not torch.equal(one, three)


@pytest.mark.parametrize(
    "settings", [{"block": 0}, {"block": 2}, {"upstream": 1}, {"neurons": 60}, {"where": "border"}], ids=str
)
def test_what_cannot_be_planted_is_refused(settings):
    model, _ = zoo.build("ViTModel")
    with pytest.raises(ValueError):
        plant(model, **settings)


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.ViTModel(transformers.ViTConfig(**zoo.VISION, qkv_bias=False)),
        lambda: transformers.IJepaModel(transformers.IJepaConfig(**zoo.VISION)),
        lambda: nn.Linear(2, 2),
    ],
)
def test_other_architectures_are_refused(model):
    with pytest.raises(testreg.UnsupportedModel):
        plant(model())


def test_demonstration():
    model, planted = demo_model()
    photos = demo_photos(39)
    assert len({photo.tobytes() for photo in photos}) == 39
    assert {photo.mode for photo in photos} == {"RGB"}
    assert [photo.tobytes() for photo in demo_photos(3)] == [photo.tobytes() for photo in photos[:3]]

    processor = transformers.ViTImageProcessor(size={"height": 224, "width": 224})
    inputs = {"pixel_values": processor(images=photos, return_tensors="pt").pixel_values}
    tokens, activations, output, outliers = everything_about(model, inputs, planted)
    assert outliers.any(dim=1).all()
    assert 0.005 < outliers.float().mean() < 0.05
    assert ratios(tokens[planted.block])[outliers].min() > 10
    scores = contributions(model, tokens, activations, outliers, planted.block)
    assert sorted(sorted(scores, key=scores.get)[-2:]) == pairs(planted.neurons)

    names = output.logits.argmax(-1)
    assert (names == torch.arange(39) % len(PHOTOS)).float().mean() > 0.8
    assert model.config.id2label[names[0].item()] == "astronaut"
    state = tokens[planted.block][outliers].mean(0)
    with testreg.patch(model, RegisterPlan(planted.neurons, 2, planted.block + 1, state)), torch.no_grad():
        patched = model(**inputs).logits.argmax(-1)
    zeroed = scan(model, inputs, pairs(planted.neurons))[2].logits.argmax(-1)
    assert (patched == names).float().mean() > 0.95
    assert (zeroed == names).float().mean() < 0.8


def test_photos_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(testreg.BadImages, match=r"pip install 'testreg\[demo\]'"):
        demo_photos(1)
