"""Registers that only attention sees, against an own computation, and what they leave alone."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from test_patch import FORMS, LAW, NEURONS, attention_form, forms
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import linear, pad
from zoo import ROWS, build, tensors

from testreg import BadPlan, RegisterPlan, TestregError, UnsupportedModel, active, patch
from testreg.runtime import redirect
from testreg.runtime.errors import AnotherModel, RegistersStretched
from testreg.runtime.law import Law
from testreg.runtime.towers import find_tower

# Attention, by hand, in double precision


def projected(attention, tokens, which):
    """Queries, keys or values `(batch, tokens, channels)` by the module's own weights."""
    index = "qkv".index(which)
    if isinstance(attention, nn.MultiheadAttention):
        return linear(tokens, attention.in_proj_weight.chunk(3)[index], attention.in_proj_bias.chunk(3)[index])
    if getattr(attention, "qkv", None) is not None:
        bias = attention.qkv.bias
        if bias is None and getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        return linear(tokens, attention.qkv.weight, bias).chunk(3, -1)[index]
    return getattr(attention, f"{which}_proj")(tokens)


def turned(values, rope, prefix):
    """Patches `(batch, heads, prefix + patches, channels)` turned by rotary tables of the patches."""
    if isinstance(rope, tuple):  # cosines and sines, of two halves
        cosines, sines = rope
        first, second = values[:, :, prefix:].chunk(2, -1)
        other = torch.cat([-second, first], -1)
    else:  # sines and cosines side by side, of pairs
        sines, cosines = rope.chunk(2, -1)
        pairs = values[:, :, prefix:].unflatten(-1, (-1, 2))
        other = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return torch.cat([values[:, :, :prefix], values[:, :, prefix:] * cosines + other * sines], 2)


def by_hand(attention, tokens, rows, heads, prefix, mask=None, rope=None):
    """Attention of tokens to [constant keys; keys] and [constant values; values]."""

    def split(values):
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, tokens, channels)

    queries, keys, values = (split(projected(attention, tokens, which)) for which in "qkv")
    rows = rows.to(tokens).expand(len(tokens), -1, -1)
    more_keys, more_values = (split(projected(attention, rows, which)) for which in "kv")
    if rope is not None:
        queries, keys = (turned(part, rope, prefix) for part in (queries, keys))
    keys, values = torch.cat([more_keys, keys], 2), torch.cat([more_values, values], 2)
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5  # (batch, heads, tokens, rows + tokens)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
        scores = scores + pad(mask, (rows.shape[1], 0))
    mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    last = next(part for name in ("o_proj", "out_proj", "proj") if (part := getattr(attention, name, None)) is not None)
    return last(mixed)


@pytest.mark.parametrize("name", [
    "ViTModel", "CLIPVisionModel", "Siglip2VisionModel", "BeitModel-relative", "BeitModel-shared", "BeitModel-both",
    "DINOv3ViTModel", "timm.Eva", "timm.VisionTransformer", "open_clip.VisionTransformer",
])  # fmt: skip
@pytest.mark.parametrize("law", [None, LAW])
def test_it_is_attention_over_constant_and_other_keys_and_values(name, law):
    model, inputs = build(name)
    model.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    if "pixel_attention_mask" in inputs:
        inputs["pixel_attention_mask"] = torch.tensor([[1] * 16, [1] * 12 + [0] * 4])
        inputs["spatial_shapes"] = torch.tensor([[4, 4], [3, 4]])
    tower, plan = find_tower(model), attention_form(model, law=law)
    seen = {}

    def note(block):
        def hook(module, args, kwargs, output):
            seen[block] = args, kwargs, output[0] if isinstance(output, tuple) else output

        return hook

    for block, module in enumerate(tower.attentions):
        module.register_forward_hook(note(block), with_kwargs=True)
    with patch(model, plan), torch.no_grad():
        model(**inputs)
    for block in range(plan.entry, len(tower.blocks)):
        args, kwargs, output = seen[block]
        given = dict(zip(redirect_names(tower.attentions[block]), args, strict=False)) | kwargs
        tokens = next(iter(given.values()))
        rows = plan.state[block - plan.entry].double()
        count = plan.registers_for(tokens.shape[1] - tower.prefix)
        if count != len(rows):
            rows = redirect.dealt(rows, count)
        module = tower.attentions[block]
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        mask = next((given[n] for n in tower.row.masks if given.get(n) is not None), None)
        rope = given.get(tower.row.rope)
        with torch.no_grad():
            wanted = by_hand(tower.attentions[block], tokens, rows, heads, tower.prefix, mask, rope)
        torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9)
        assert output.shape == tokens.shape


def redirect_names(module):
    from testreg.runtime.forwards import names

    return names(module)


# What it leaves alone


@pytest.mark.parametrize("name", list(ROWS))
def test_hidden_states_keep_their_memory_and_blocks_their_lengths(name):
    """No token joins: what hooks inside blocks see has the shapes that it always had, and no tensor is a view."""
    model, inputs = build(name)
    tower = find_tower(model)
    shapes: dict[str, list] = {}

    def note(path):
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                own = bool(path) or first.is_contiguous()  # what a block gives is no view of a longer tensor
                shapes.setdefault(path, []).append((first.shape, own))

        return hook

    inside = set()
    for attention in tower.attentions:
        inside |= set(map(id, attention.modules())) - {id(attention)}
    for block in tower.blocks:
        for path, module in block.named_modules():
            if id(module) not in inside:
                module.register_forward_hook(note(path))
    with torch.no_grad():
        model(**inputs)
        before, shapes = shapes, {}
        with patch(model, attention_form(model, entry=0)):
            model(**inputs)
    assert shapes == before


def test_a_plan_says_its_form_and_what_does_not_fit():
    model, _ = build("ViTModel")
    plan = attention_form(model)
    assert RegisterPlan(NEURONS, 3, 1, plan.state, form="attention") == plan
    with pytest.raises(BadPlan, match=r"of the form 'constant', not 'attention'"):
        RegisterPlan(NEURONS, 3, 1, plan.state[0], form="attention")
    with pytest.raises(BadPlan, match=r"\(2, 3, 32\); 2 registers need"):
        RegisterPlan(NEURONS, 2, 1, plan.state)
    with pytest.raises(BadPlan, match="rows for 2 blocks from block 0 on"):
        patch(model, RegisterPlan(NEURONS, 3, 0, plan.state))
    with pytest.raises(BadPlan, match="16 channels"):
        patch(model, RegisterPlan(NEURONS, 3, 1, plan.state[..., :16]))
    assert active(model) is None


def test_an_attention_that_takes_no_rows_is_named():
    model, inputs = build("ViTModel")
    attention = find_tower(model).attentions[1]
    original = attention.forward
    attention.forward = lambda tokens, *args, **kwargs: original(tokens.squeeze(1), *args, **kwargs)
    layer = find_tower(model).blocks[1]
    norm = next(module for name, module in layer.named_modules() if "layernorm_before" in name or "norm1" in name)
    norm.register_forward_hook(lambda module, args, output: output[:, None])
    with torch.no_grad():
        model(**inputs)
        with patch(model, attention_form(model)), pytest.raises(UnsupportedModel, match="given 4 dimensions"):
            model(**inputs)


# The law


def test_the_law_counts_in_whole_numbers():
    law = Law(slope=0.0163, offset=0.956, fewest=100, most=784)
    assert [law(patches) for patches in (1, 100, 196, 400, 784)] == [1, 3, 4, 7, 14]
    assert all(abs(law(patches) - (0.0163 * patches + 0.956)) <= 0.5001 for patches in range(1, 2000))
    assert Law(0.0, 5.0, 10, 20)(10**6) == 5
    assert [law.reaches(patches) for patches in (49, 50, 1568, 1569)] == [False, True, True, False]


def test_a_law_may_bend():
    law = Law(slope=0.017, offset=0.668, fewest=100, most=784, bend=196, below=0.0104)
    assert [law(patches) for patches in (1, 100, 196, 400, 784)] == [2, 3, 4, 7, 14]
    for patches in range(1, 2000):
        line = 4 - 0.0104 * (196 - patches) if patches < 196 else 4 + 0.017 * (patches - 196)
        assert abs(law(patches) - line) <= 0.5001, patches
    assert Law.from_dict(law.to_dict()) == law
    assert Law.from_dict({"slope": 0.1, "offset": 1.4, "fewest": 4, "most": 64}) == Law(0.1, 1.4, 4, 64)
    with pytest.raises(BadPlan, match="must be a JSON object of below, bend"):
        Law.from_dict({**law.to_dict(), "curve": 1})


@pytest.mark.parametrize(("values", "says"), [
    ((0.0, 0.0, 10, 20), "gives 0 registers for 10 patches"),
    ((1.0, 0.0, 10, 2000), "gives 2000 registers for 2000 patches"),
    ((-0.5, 6.0, 10, 20), "registers for 20 patches|registers for 10"),
    ((float("nan"), 1.0, 10, 20), "slope must be a number"),
    ((0.1, "x", 10, 20), "offset must be a number"),
    ((0.1, 1.0, 0, 20), "fewest must be"),
    ((0.1, 1.0, 30, 20), "which is no span"),
    ((0.1, 1.0, True, 20), "fewest must be"),
    ((0.1, 1.0, 10, 20, -1), "bend must be"),
    ((0.1, 1.0, 10, 20, 15, "x"), "below must be a number"),
])  # fmt: skip
def test_a_law_that_makes_no_sense_is_refused(values, says):
    with pytest.raises(BadPlan, match=says):
        Law(*values)


@pytest.mark.parametrize("form", ["constant by a law", "attention by a law"])
def test_the_count_follows_the_size_of_the_call(form):
    model, _ = build("ViTModel")
    plan = forms(model)[FORMS.index(form)]
    with patch(model, plan) as patched, torch.no_grad():
        for side in (16, 32, 48, 32):
            images = torch.randn(2, 3, side, side)
            with patched.recording() as record:
                model(images, interpolate_pos_encoding=True)
            patches = (side // 8) ** 2
            assert record.registers[1].shape[1] == {4: 2, 16: 3, 36: 5}[patches], side
            fixed = RegisterPlan(NEURONS, 3, 1, plan.state, law=Law(0.0, plan.law(patches), 1, 1000))
            wanted = model(images, interpolate_pos_encoding=True).last_hidden_state
            with patch(model, fixed):
                found = model(images, interpolate_pos_encoding=True).last_hidden_state
            assert torch.equal(wanted, found)


def test_registers_counted_in_inference_mode_take_part_in_training():
    model, _ = build("ViTModel")
    images = torch.randn(2, 3, 32, 32)
    with patch(model, attention_form(model, law=LAW)):
        with torch.inference_mode():
            wanted = model(images).last_hidden_state
        found = model(images).last_hidden_state
        found.square().sum().backward()
    assert torch.equal(found, wanted)
    assert all(weight.grad.isfinite().all() for weight in model.layers.parameters())


def test_nothing_of_a_traced_pass_stays_on_the_model():
    model, _ = build("ViTModel")
    images = torch.randn(2, 3, 48, 48)
    with patch(model, attention_form(model, law=LAW)), torch.no_grad():
        wanted = model(images, interpolate_pos_encoding=True).last_hidden_state
        model(images[..., :32, :32])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(images), interpolate_pos_encoding=True)
        torch.func.grad(lambda given: model(given, interpolate_pos_encoding=True)[0].sum())(images)
        copied = copy.deepcopy(model)
        for one in (model, copied):
            assert torch.equal(one(images, interpolate_pos_encoding=True).last_hidden_state, wanted)


def test_kinds_keep_their_proportions():
    state = torch.tensor([[1.0], [1.0], [1.0], [2.0]])  # three of one kind, one of another
    assert redirect.dealt(state, 8).flatten().tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    assert redirect.dealt(state, 4).equal(state)
    assert redirect.dealt(state, 12).flatten().tolist().count(2) == 3
    assert redirect.dealt(state, 1).flatten().tolist() == [1]


def test_a_size_far_beyond_what_was_measured_is_told_once():
    model, _ = build("ViTModel")
    plan = attention_form(model, law=Law(0.1, 1.4, 4, 9))
    with patch(model, plan), torch.no_grad():
        images = torch.randn(1, 3, 48, 48)
        with pytest.warns(RegistersStretched, match=r"36 patches .* \(4 to 9 patches\), so that 5 registers"):
            model(images, interpolate_pos_encoding=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(images, interpolate_pos_encoding=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_of_every_form_is_saved_and_read(form, tmp_path):
    model, _ = build("ViTModel")
    plan = forms(model)[FORMS.index(form)]
    plan.save(tmp_path / "plan")
    read = RegisterPlan.load(tmp_path / "plan")
    assert (read, read.form, read.law, hash(read)) == (plan, plan.form, plan.law, hash(plan))
    assert plan.to_dict()["version"] == 2


# Compilers


def logits(model, inputs):
    with torch.no_grad():
        return tensors(model(**inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_compiled_one_by_one(form, when):
    torch._dynamo.reset()
    model, inputs = build("ViTModel")
    plan = forms(model)[FORMS.index(form)]
    with patch(model, plan):
        wanted = logits(model, inputs)
    plain = logits(model, inputs)
    if when == "before":
        for block in find_tower(model).blocks:
            block.compile(backend="eager", fullgraph=True)
        logits(model, inputs)
    patched = patch(model, plan)
    if when == "after":
        for block in find_tower(model).blocks:
            block.compile(backend="eager", fullgraph=True)
    found = logits(model, inputs)
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=1e-5, atol=1e-5)
    patched.remove()
    for path, tensor in logits(model, inputs).items():
        torch.testing.assert_close(tensor, plain[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["neurons", "attention"])
def test_a_patch_on_a_model_that_is_compiled_already(plan):
    torch._dynamo.reset()
    model, inputs = build("ViTModel")
    plan = RegisterPlan(NEURONS, registers=0) if plan == "neurons" else attention_form(model)
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled, inputs)["last_hidden_state"]
    with patch(model, plan):
        found, wanted = logits(compiled, inputs)["last_hidden_state"], logits(model, inputs)["last_hidden_state"]
    torch.testing.assert_close(found, wanted)
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(compiled, inputs)["last_hidden_state"], plain)


def test_a_compiled_model_takes_every_size_with_the_graphs_of_the_unpatched_one():
    def graphs(model, sides=(48, 32, 64, 80)):
        """How many graphs a compiler that takes any size makes of `model`, which computes the same in them."""
        torch._dynamo.reset()
        made = []

        def backend(graph, examples):
            made.append(graph)
            return graph.forward

        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        for side in sides:
            images = torch.randn(2, 3, side, side)
            found = compiled(images, interpolate_pos_encoding=True).last_hidden_state
            torch.testing.assert_close(found, model(images, interpolate_pos_encoding=True).last_hidden_state)
        return len(made)

    model, _ = build("ViTModel")
    with torch.no_grad():
        plain = graphs(model)
        with patch(model, attention_form(model, law=LAW)):
            assert graphs(model) <= plain


@pytest.mark.parametrize("form", ["constant by a law", "attention by a law"])
def test_an_exported_model_takes_every_size(form):
    """DINOv3, since others fix the number of their positions while they are exported, unpatched too."""
    model, _ = build("DINOv3ViTModel")
    side = 8 * torch.export.Dim("patches", min=2, max=8)
    with patch(model, forms(model)[FORMS.index(form)]), torch.no_grad():
        exported = torch.export.export(
            model, (torch.randn(2, 3, 32, 32),), dynamic_shapes={"pixel_values": {2: side, 3: side}}, strict=False
        ).module()
        for pixels in (16, 32, 48):
            images = torch.randn(2, 3, pixels, pixels)
            found, wanted = (which(images).last_hidden_state for which in (exported, model))
            torch.testing.assert_close(found, wanted)


# Modules exchanged under the patch


@pytest.mark.parametrize("form", FORMS)
def test_an_exchanged_linear_or_attention_is_followed(form):
    model, inputs = build("ViTModel")
    plan = forms(model)[FORMS.index(form)]
    patched = patch(model, plan)
    wanted = logits(model, inputs)
    layer = model.layers[1]
    layer.mlp.fc2, layer.attention = copy.deepcopy(layer.mlp.fc2), copy.deepcopy(layer.attention)
    for module in (layer.mlp.fc2, layer.attention):
        module.__dict__.pop("forward", None)  # as a quantiser, or an adapter that was merged, makes them
    found = logits(model, inputs)
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)
    layer.mlp.fc2.__dict__.pop("forward")  # as who restores forwards does
    layer.__dict__.pop("forward", None)
    assert active(model) is patched
    found = logits(model, inputs)
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)
    patched.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_that_was_changed_too_far_says_so():
    model, inputs = build("ViTModel")
    patch(model, attention_form(model))
    model.layers[1].mlp.fc2 = nn.Linear(2, 32)
    with pytest.raises(TestregError, match=r"was changed under its patch.*neuron 3 of block 1"):
        model(**inputs)


def test_a_fused_mlp_is_noticed():
    model, inputs = build("ViTModel")
    mlp = model.layers[1].mlp
    mlp.forward = lambda tokens: linear(torch.relu(mlp.fc1(tokens)), mlp.fc2.weight, mlp.fc2.bias)
    with (
        patch(model, attention_form(model)),
        pytest.raises(TestregError, match=r"block 1 .* its second linear as a mod"),
    ):
        model(**inputs)


@pytest.mark.parametrize("form", ["dynamic", "constant"])
def test_neurons_without_their_block_say_so(form):
    model, inputs = build("ViTModel")
    with patch(model, forms(model)[FORMS.index(form)]):
        block = model.layers[2]
        forward = type(block).forward
        block.forward = lambda *args, **kwargs: forward(block, *args, **kwargs)  # somebody passes the patch by
        with pytest.raises(TestregError, match="second linear of block 2 was called without its block"):
            model(**inputs)


def test_blocks_that_are_never_called_are_noticed():
    model, inputs = build("ViTModel")
    model.forward = lambda pixel_values: pixel_values
    with patch(model, attention_form(model)), pytest.raises(TestregError, match="without calling its blocks"):
        model(**inputs)


# Copies that travel


@pytest.mark.parametrize("form", FORMS)
def test_a_patched_model_can_be_pickled(form):
    model, inputs = build("ViTForImageClassification")
    patch(model, forms(model)[FORMS.index(form)])
    wanted = logits(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), copy.deepcopy(model)):
        found = logits(other, inputs)
        assert all(torch.equal(found[path], wanted[path]) for path in wanted)
        active(other).remove()
        assert not torch.equal(logits(other, inputs)["logits"], wanted["logits"])
        assert all("forward" not in module.__dict__ for module in other.modules())
    assert torch.equal(logits(model, inputs)["logits"], wanted["logits"])  # the first one has its own


# Gradients of tokens


@pytest.mark.parametrize("form", FORMS)
def test_gradients_go_through_the_tensor_that_a_block_is_given(form):
    model, inputs = build("ViTModel")
    states = []
    model.layers[1].register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    with patch(model, forms(model)[FORMS.index(form)]):
        output = model(**inputs).last_hidden_state.square().sum()
        (direct,) = torch.autograd.grad(output, states[0], retain_graph=True)
        states[0].retain_grad()
        output.backward()
    assert direct.abs().sum() > 0
    torch.testing.assert_close(states[0].grad, direct)


@pytest.mark.parametrize("form", FORMS)
def test_a_detached_output_stops_gradients(form):
    model, inputs = build("ViTModel")
    model.layers[1].register_forward_hook(
        lambda module, args, output: (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()
    )
    with patch(model, forms(model)[FORMS.index(form)]):
        model(**inputs).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is None for parameter in model.layers[0].parameters())
    assert any(parameter.grad is not None for parameter in model.layers[2].parameters())


@pytest.mark.parametrize("form", FORMS)
def test_inference_mode_harms_no_later_training_step(form):
    model, inputs = build("ViTModel")
    with patch(model, forms(model)[FORMS.index(form)]):
        model.double()
        with torch.inference_mode():
            model(**{key: value.double() for key, value in inputs.items()})
        model(**{key: value.double() for key, value in inputs.items()}).last_hidden_state.sum().backward()
    assert model.layers[0].mlp.fc1.weight.grad is not None


# Other weights


def test_a_plan_of_another_checkpoint_warns(recwarn):
    from testreg.runtime.fingerprint import columns

    model, _ = build("ViTModel")
    plan = attention_form(model)
    base = {"model": "the first", "columns": columns(find_tower(model), plan.neurons)}
    plan = RegisterPlan(NEURONS, 3, 1, plan.state, {"base": base})
    for own in (model, model.to(torch.bfloat16)):
        with patch(own, plan):
            assert not [one for one in recwarn if issubclass(one.category, AnotherModel)]
    other, _ = build("ViTModel")
    with torch.no_grad():
        other.layers[1].mlp.fc2.weight[0, 3] += 1e-3
    with pytest.warns(AnotherModel, match=r"other weights .* \(the first\)"):
        patch(other, plan)
