"""Every family through the same invariants: what a patch does, what it leaves alone, and that off means off."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import CHANNELS, DINO, FIRST, ROWS, build, tensors

from testreg import BadPlan, RegisterPlan, TestregError, active, patch
from testreg.families import find_tower

EVERY = pytest.mark.parametrize("name", list(ROWS))
ONE_PER_FAMILY = pytest.mark.parametrize("name", FIRST)
FORMS = pytest.mark.parametrize("form", ["dynamic", "constant"])

NEURONS = {0: (1, 5), 1: (3,), 2: (0, 47)}
DYNAMIC = RegisterPlan(NEURONS, registers=2)


def constant(entry: int = 1, registers: int = 3, channels: int = CHANNELS) -> RegisterPlan:
    state = 3 * torch.randn(registers, channels, generator=torch.Generator().manual_seed(2))
    return RegisterPlan(NEURONS, registers=registers, entry=entry, state=state)


PLANS = {"dynamic": DYNAMIC, "constant": constant()}


def run(model: nn.Module, inputs: dict, **more) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs, **more))


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for path, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[path], rtol=tolerance, atol=tolerance, msg=lambda m, p=path: f"{p}: {m}"
        )


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[path], right[path]) for path in left)


# What a patch leaves alone


@EVERY
def test_every_output_keeps_its_shape_and_dtype(name):
    model, inputs = build(name)
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    before = run(model, inputs, **wanted)
    assert any("attentions" in path for path in before)
    assert any("hidden_states" in path for path in before)
    for plan in (DYNAMIC, *(constant(entry) for entry in range(3))):
        with patch(model, plan):
            after = run(model, inputs, **wanted)
        shapes = {path: (tensor.shape, tensor.dtype) for path, tensor in after.items()}
        assert shapes == {path: (tensor.shape, tensor.dtype) for path, tensor in before.items()}, plan
        assert all(tensor.isfinite().all() for tensor in after.values())
        assert not same(before, after), f"{plan} does nothing"


@EVERY
@FORMS
def test_removal_restores_every_bit_and_leaves_nothing(name, form):
    model, inputs = build(name)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_buffers", "_parameters", "_modules")

    def traces() -> list:
        return [(list(m.__dict__), *(list(getattr(m, hook)) for hook in hooks)) for m in model.modules()]

    before, traces_before = run(model, inputs), traces()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with patch(model, PLANS[form]):
        assert not same(before, run(model, inputs))
        assert same(weights, model.state_dict())
    assert same(before, run(model, inputs))
    assert traces() == traces_before
    assert active(model) is None


@pytest.mark.parametrize("name", [name for name, tiny in ROWS.items() if tiny.text])
def test_text_outputs_are_untouched(name):
    model, inputs = build(name)
    before = run(model, inputs)
    with patch(model, DYNAMIC):
        after = run(model, inputs)
    assert torch.equal(before["text_embeds"], after["text_embeds"])
    assert not torch.equal(before["image_embeds"], after["image_embeds"])


# What a patch does


@EVERY
@FORMS
def test_register_neurons_are_silent_on_every_token_of_every_image(name, form):
    """Faults of other implementations: only the first image patched; one scalar for all neurons; patch 0 forgotten."""
    model, inputs = build(name)
    tower, plan = find_tower(model), PLANS[form]
    with patch(model, plan):
        seen: dict[int, Tensor] = {}
        for block, down in enumerate(tower.downs):
            down.register_forward_pre_hook(lambda _, args, block=block: seen.update({block: args[0]}))
        run(model, inputs)
    for block, neurons in plan.neurons.items():
        inside = block >= plan.entry
        registers = plan.registers if inside else 0
        tokens = seen[block][:, registers:, list(neurons)]  # (batch, tokens, neurons)
        assert torch.count_nonzero(tokens) == 0
        if inside:
            held = seen[block][:, :registers, list(neurons)]  # (batch, registers, neurons)
            assert torch.count_nonzero(held.amax(1)) > 0
            if form == "dynamic":  # one maximum per neuron and per image
                assert len(held.amax(1).unique()) > len(neurons)


@EVERY
@FORMS
def test_batch_of_eight_equals_eight_singles(name, form):
    model, inputs = build(name, batch=8)
    with patch(model, PLANS[form]):
        together = run(model, inputs)
        singles = [run(model, {key: _one(value, index) for key, value in inputs.items()}) for index in range(8)]
    compared = 0
    for path, tensor in together.items():
        alone = [single[path] for single in singles]
        if tensor.shape == (8, *alone[0].shape[1:]):  # but not the logits between 8 images and 8 texts
            torch.testing.assert_close(tensor, torch.cat(alone), rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared


def _one(value, index: int):
    return value[index : index + 1] if isinstance(value, Tensor) and value.shape[:1] == (8,) else value


@EVERY
def test_other_sizes(name):
    for other in ROWS[name].other:
        model, inputs = build(name)[0], other(2)
        before = run(model, inputs)
        for plan in PLANS.values():
            with patch(model, plan):
                after = run(model, inputs)
            assert [tensor.shape for tensor in after.values()] == [tensor.shape for tensor in before.values()]
            assert not same(before, after)


@EVERY
@FORMS
def test_sdpa_equals_eager(name, form):
    model, inputs = build(name)
    with patch(model, PLANS[form]):
        model.set_attn_implementation("eager")
        eager = run(model, inputs)
        model.set_attn_implementation("sdpa")
        close(eager, run(model, inputs))


@ONE_PER_FAMILY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(name, dtype):
    for plan in PLANS.values():
        model, inputs = build(name)
        with patch(model, plan):  # before the move: the registers' state follows the model
            exact = run(model, inputs)
            halved = {key: v.to(dtype) if v.is_floating_point() else v for key, v in inputs.items()}
            half = run(model.to(dtype), halved)
            assert {tensor.dtype for tensor in half.values()} == {dtype}
            for path, tensor in half.items():
                assert (tensor - exact[path]).norm() < 0.05 * exact[path].norm(), path
            model.double()
            doubled = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
            assert {tensor.dtype for tensor in run(model, doubled).values()} == {torch.float64}


@ONE_PER_FAMILY
def test_autocast_and_inference_mode(name):
    model, inputs = build(name)
    for plan in PLANS.values():
        with patch(model, plan):
            exact = run(model, inputs)
            with torch.inference_mode():
                assert same(exact, tensors(model(**inputs)))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                cast = run(model, inputs)
            for path, tensor in cast.items():
                assert (tensor - exact[path]).norm() < 0.05 * exact[path].norm(), path


@EVERY
def test_recorded_registers_and_full_attention(name):
    model, inputs = build(name)
    model.set_attn_implementation("eager")
    plan = constant()
    with patch(model, plan) as patched:
        with patched.recording() as record:
            outputs = run(model, inputs, output_attentions=True)
        run(model, inputs)  # not recorded
    handed = {path: tensor for path, tensor in outputs.items() if "attentions" in path and "text" not in path}
    assert list(record.registers) == list(record.attentions) == [1, 2]
    for registers in record.registers.values():
        assert registers.shape == (2, plan.registers, CHANNELS)
    for block, full in record.attentions.items():
        torch.testing.assert_close(full.sum(-1), torch.ones_like(full.sum(-1)))
        path = next(path for path in handed if path.endswith(f"attentions.{block}"))
        assert torch.equal(full[..., plan.registers :, plan.registers :], handed[path])
        assert (handed[path].sum(-1) < 1).all()


@ONE_PER_FAMILY
def test_no_registers_silences_neurons_only(name):
    model, inputs = build(name)
    tower = find_tower(model)
    with patch(model, RegisterPlan({1: (3,)}, registers=0)):
        patched = run(model, inputs)
    with torch.no_grad():
        tower.downs[1].weight[:, 3] = 0
    close(patched, run(model, inputs))


# Gradients


@ONE_PER_FAMILY
@FORMS
def test_gradient_is_the_derivative(name, form):
    """Along a random direction of the images, in double precision: nothing is detached, nothing edited in place."""
    model, inputs = build(name)
    model.double().train()
    pixels = inputs["pixel_values"].double().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    step = 1e-6 * torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype)

    def loss(images: Tensor) -> Tensor:
        outputs = tensors(model(**{**inputs, "pixel_values": images}))
        return sum((tensor**3).sum() for tensor in outputs.values() if tensor.is_floating_point())

    with patch(model, PLANS[form]):
        loss(pixels).backward()
        with torch.no_grad():
            difference = (loss(pixels + step) - loss(pixels - step)) / 2
    torch.testing.assert_close((pixels.grad * step).sum(), difference, rtol=1e-5, atol=0)
    trained = [p for block in find_tower(model).blocks for p in block.parameters()]
    assert all(parameter.grad is not None for parameter in trained)


@ONE_PER_FAMILY
@FORMS
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_gradient(name, form, reentrant):
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model, inputs = build(name)
        model.train()
        inputs["pixel_values"].requires_grad_()
        with patch(model, PLANS[form]):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            outputs = tensors(model(**inputs))
            sum((tensor**2).sum() for tensor in outputs.values()).backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        return {**grads, "pixels": inputs["pixel_values"].grad}

    close(gradients(True), gradients(False), 1e-5)


# Copies, threads, nesting


@EVERY
@FORMS
def test_a_copy_owns_its_patch(name, form):
    model, inputs = build(name)
    plain = run(model, inputs)
    mine = patch(model, PLANS[form])
    patched = run(model, inputs)
    twin = copy.deepcopy(model)
    theirs = active(twin)
    assert theirs is not mine
    assert theirs.plan == mine.plan
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy bound to the original would compute with these
    assert same(run(twin, inputs), patched)
    mine.remove()
    assert same(run(twin, inputs), patched)
    theirs.remove()
    assert same(run(twin, inputs), plain)
    assert active(twin) is None


@ONE_PER_FAMILY
@FORMS
def test_two_threads_share_a_model(name, form):
    model, _ = build(name)
    batches = [{k: v[half] for k, v in build(name, 4)[1].items()} for half in (slice(0, 2), slice(2, 4))]
    barrier, results = threading.Barrier(2, timeout=60), {}

    def in_step(module, args, output):  # both threads are between the same two blocks, and hold new tensors there
        barrier.wait()
        return _new(output)

    def work(index: int) -> None:
        results[index] = run(model, batches[index])

    with patch(model, PLANS[form]):
        alone = [run(model, batch) for batch in batches]
        handle = find_tower(model).blocks[1].register_forward_hook(in_step)
        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
    assert same(alone[0], results[0])
    assert same(alone[1], results[1])
    assert not same(alone[0], alone[1])


def _new(output):
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()


@EVERY
@FORMS
def test_a_hook_between_blocks_may_make_a_new_tensor(name, form):
    model, inputs = build(name)
    with patch(model, PLANS[form]):
        before = run(model, inputs)
        for block in find_tower(model).blocks:
            block.register_forward_hook(lambda module, args, output: _new(output))
        assert same(before, run(model, inputs))


@ONE_PER_FAMILY
def test_a_block_alone_has_no_registers_and_says_so(name):
    model, inputs = build(name)
    block = find_tower(model).blocks[2]
    with patch(model, DYNAMIC):
        for _ in range(2):
            with pytest.raises(TestregError, match="block 2 was called without its registers"):
                block(torch.zeros(2, 17, CHANNELS), *_more(block))
            run(model, inputs)  # leaves no registers waiting for a block that comes alone later


def _more(block: nn.Module) -> tuple:
    return (None,) if "CLIP" in type(block).__name__ or "Siglip" in type(block).__name__ else ()


@ONE_PER_FAMILY
def test_a_pass_that_broke_off_harms_no_later_one(name):
    model, inputs = build(name)
    block = find_tower(model).blocks[1]

    def stop(*_):
        raise KeyboardInterrupt

    with patch(model, DYNAMIC):
        before = run(model, inputs)
        handle = block.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        handle.remove()
        assert same(before, run(model, inputs))


@EVERY
def test_nested_patches_undo_in_order_and_never_add_up(name):
    model, inputs = build(name)
    plain = run(model, inputs)
    with patch(model, DYNAMIC):
        dynamic = run(model, inputs)
        with patch(model, DYNAMIC):
            assert same(run(model, inputs), dynamic)
        assert same(run(model, inputs), dynamic)
        with patch(model, PLANS["constant"]) as top:
            late = run(model, inputs)
            assert active(model) is top
        assert same(run(model, inputs), dynamic)
    assert same(run(model, inputs), plain)
    with patch(model, PLANS["constant"]):
        assert same(run(model, inputs), late)


@ONE_PER_FAMILY
def test_removing_twice_or_the_inner_one_first(name):
    model, inputs = build(name)
    plain = run(model, inputs)
    inner, outer = patch(model, DYNAMIC), patch(model, PLANS["constant"])
    late = run(model, inputs)
    inner.remove()
    inner.remove()
    assert active(model) is outer
    assert same(run(model, inputs), late)
    outer.remove()
    outer.remove()
    assert same(run(model, inputs), plain)


def test_a_forward_that_was_replaced_before_comes_back():
    model, inputs = build("ViTModel")
    block = model.layers[0]
    mine = block.forward
    block.forward = lambda *args, **kwargs: mine(*args, **kwargs)
    own = block.__dict__["forward"]
    with patch(model, DYNAMIC):
        run(model, inputs)
    assert block.__dict__["forward"] is own


# Tracing


ALTERNATING = [(name, "dynamic" if index % 2 else "constant") for index, name in enumerate(FIRST)]


@pytest.mark.parametrize(("name", "form"), [*ALTERNATING, (FIRST[0], "dynamic")])
def test_compiles_without_a_graph_break(name, form):
    model, inputs = build(name)
    with patch(model, PLANS[form]), torch.no_grad():
        eager = run(model, inputs)
        torch._dynamo.reset()
        close(eager, tensors(torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)))


@pytest.mark.parametrize(("name", "form"), [*ALTERNATING, (FIRST[0], "dynamic")])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_exports(name, form, strict):
    model, inputs = build(name)
    with patch(model, PLANS[form]), torch.no_grad():
        eager = run(model, inputs)
        program = torch.export.export(model, (), inputs, strict=strict)
        close(eager, tensors(program.module()(**inputs)))
        close(eager, run(model, inputs))  # tracing left nothing behind


# Oracles: code that nobody here wrote


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [1, 4])
@pytest.mark.parametrize("state", ["zeros", "values"])
def test_equals_the_architecture_with_native_registers(swiglu, registers, state):
    model, inputs = build("Dinov2Model-SwiGLU" if swiglu else "Dinov2Model")
    config = hf.Dinov2WithRegistersConfig(**DINO, use_swiglu_ffn=swiglu, num_register_tokens=registers)
    oracle = hf.Dinov2WithRegistersModel(config).eval()
    missing, unexpected = oracle.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["embeddings.register_tokens"], [])
    values = torch.zeros(registers, CHANNELS) if state == "zeros" else torch.randn(registers, CHANNELS)
    with torch.no_grad():
        oracle.embeddings.register_tokens.copy_(values)
    plan = RegisterPlan({}, registers=registers, state=None if state == "zeros" else values)
    wanted = run(oracle, inputs, output_hidden_states=True)
    with patch(model, plan) as patched, patched.recording() as record:
        found = run(model, inputs, output_hidden_states=True)
    for path, tensor in wanted.items():
        if tensor.ndim == 3:  # [class | registers | patches]
            tensor = torch.cat([tensor[:, :1], tensor[:, 1 + registers :]], 1)
        torch.testing.assert_close(found[path], tensor, rtol=1e-5, atol=1e-5)
    native = wanted["hidden_states.3"][:, 1 : 1 + registers]
    torch.testing.assert_close(record.registers[2], native, rtol=1e-5, atol=1e-5)


# Plans that do not fit


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (RegisterPlan({9: (1,)}), "names block 9, but the vit tower ViTModel has blocks 0 to 2"),
        (RegisterPlan({1: (3, 480)}), "names neuron 480 of block 1, but .* has neurons 0 to 47"),
        (RegisterPlan({1: (3,)}, entry=3), "join before block 3, but .* has blocks 0 to 2"),
        (RegisterPlan({1: (3,)}, state=torch.zeros(384)), "has 384 channels, but .* has 32 channels"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan, says):
    model, inputs = build("ViTModel")
    before = run(model, inputs)
    with pytest.raises(BadPlan, match=says):
        patch(model, plan)
    assert active(model) is None
    assert same(before, run(model, inputs))
