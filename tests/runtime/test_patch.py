"""Every family through the same invariants: what a patch does, what it leaves alone, and that off means off."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import FIRST, ROWS, attention, build, given, pixels, tensors

from testreg import BadPlan, RegisterPlan, TestregError, active, patch
from testreg.runtime import redirect
from testreg.runtime.law import Law
from testreg.runtime.towers import find_tower

EVERY = pytest.mark.parametrize("name", list(ROWS))
ONE_PER_FAMILY = pytest.mark.parametrize("name", FIRST)
# Their blocks are, line for line, those of CLIP, SigLIP, ViT or BLIP: tracing them once is enough.
COPIES = "DeiT ViTMSN IJepa MetaClip2 ChineseCLIP AltCLIP CLIPSeg OwlViT Owlv2 Git Idefics3 SmolVLM Blip2 InstructBlip"
TRACED = [name for name in FIRST if not any(name.startswith(copied) for copied in COPIES.split())]

NEURONS = {0: (1, 5), 1: (3,), 2: (0, 47)}
DYNAMIC = RegisterPlan(NEURONS, registers=2)


def constant(model: nn.Module, entry: int = 1, registers: int = 3) -> RegisterPlan:
    channels = find_tower(model).channels
    state = 3 * torch.randn(registers, channels, generator=torch.Generator().manual_seed(2))
    return RegisterPlan(NEURONS, registers=registers, entry=entry, state=state)


def attention_form(model: nn.Module, entry: int = 1, registers: int = 3, law: Law | None = None) -> RegisterPlan:
    """Rows of two kinds, in every block from the entry on."""
    tower = find_tower(model)
    shape = len(tower.blocks) - entry, registers, tower.channels
    state = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return RegisterPlan(NEURONS, registers=registers, entry=entry, state=state, law=law)


# Three registers for the 16 patches that most tiny models see, two for fewer, four or more for more.
LAW = Law(slope=0.12, offset=1.08, fewest=4, most=64, bend=16, below=0.1)
FORMS = ("dynamic", "constant", "attention", "constant by a law", "attention by a law")


def forms(model: nn.Module) -> tuple[RegisterPlan, ...]:
    """The dynamic form from the embeddings on, the others from block 1 on, and with counts that follow the size."""
    fixed = DYNAMIC, constant(model), attention_form(model)
    return (*fixed, replace(constant(model), law=LAW), attention_form(model, law=LAW))


def run(model: nn.Module, inputs: dict, **more) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs, **more))


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for path, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[path], rtol=tolerance, atol=tolerance, msg=lambda m, p=path: f"{p}: {m}"
        )


def near(left: dict[str, Tensor], right: dict[str, Tensor], share: float = 0.05) -> None:
    """As near as half precision allows."""
    for path, tensor in left.items():
        assert (tensor - right[path]).float().norm() <= share * right[path].float().norm(), path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[path], right[path]) for path in left)


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {**inputs, pixels(inputs): inputs[pixels(inputs)].to(dtype)}


def everything(model: nn.Module) -> dict[str, bool]:
    """Arguments that ask a model of transformers for all that it can give."""
    if isinstance(model, hf.PreTrainedModel) and not hasattr(model, "timm_model"):
        return {"output_hidden_states": True, "output_attentions": True}
    return {}


# What a patch leaves alone


@EVERY
def test_every_output_keeps_its_shape_and_dtype(name):
    model, inputs = build(name)
    attention(model, "eager")
    wanted = everything(model)
    before = run(model, inputs, **wanted)
    shapes = {path: (tensor.shape, tensor.dtype) for path, tensor in before.items()}
    entered = [make(model, entry) for entry in range(3) for make in (constant, attention_form)]
    for plan in (*forms(model), *entered):
        with patch(model, plan):
            after = run(model, inputs, **wanted)
        assert {path: (tensor.shape, tensor.dtype) for path, tensor in after.items()} == shapes, plan
        assert all(tensor.isfinite().all() for tensor in after.values())
        assert not same(before, after), f"{plan} does nothing"


@EVERY
def test_removal_restores_every_bit_and_leaves_nothing(name):
    model, inputs = build(name)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_buffers", "_parameters", "_modules")

    def traces() -> list:
        return [(list(m.__dict__), *(list(getattr(m, hook)) for hook in hooks)) for m in model.modules()]

    before, traces_before = run(model, inputs), traces()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for plan in forms(model):
        with patch(model, plan):
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


@EVERY
def test_the_last_block_hands_back_its_own_memory(name):
    """What follows the blocks may call `.view`, as it could before."""
    model, inputs = build(name)
    seen: list[Tensor] = []
    with patch(model, DYNAMIC):
        find_tower(model).blocks[-1].register_forward_hook(lambda _, args, output: seen.append(_tokens(output)))
        run(model, inputs)
    assert seen[0].is_contiguous()


def _tokens(output) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


# What a patch does


@EVERY
@pytest.mark.parametrize("form", FORMS)
def test_register_neurons_are_silent_on_every_token_of_every_image(name, form):
    """Faults of other implementations: only the first image patched; one scalar for all neurons; patch 0 forgotten."""
    model, inputs = build(name)
    tower = find_tower(model)
    plan = forms(model)[FORMS.index(form)]
    with patch(model, plan):
        seen = {block: given(tower.downs[block]) for block in plan.neurons}
        run(model, inputs)
    for block, neurons in plan.neurons.items():
        inside = block >= plan.entry and plan.form != "attention"
        activation = tower.turned(seen[block][0])
        length = activation.shape[1] - tower.prefix  # registers + patches
        registers = (
            next(count for count in range(length) if count == plan.registers_for(length - count)) if inside else 0
        )
        tokens = activation[:, registers:, list(neurons)]  # (batch, tokens, neurons)
        assert torch.count_nonzero(tokens) == 0
        if inside:
            held = activation[:, :registers, list(neurons)]  # (batch, registers, neurons)
            assert torch.count_nonzero(held.amax(1)) > 0
            if form == "dynamic":  # one maximum per neuron and per image
                assert len(held.amax(1).unique()) > len(neurons)


@EVERY
def test_batch_of_eight_equals_eight_singles(name):
    model, inputs = build(name, batch=8)
    for plan in forms(model):
        with patch(model, plan):
            together = run(model, inputs)
            singles = [run(model, {key: _one(value, index) for key, value in inputs.items()}) for index in range(8)]
        compared = 0
        for path, tensor in together.items():
            alone = [single[path] for single in singles]
            if tensor.ndim and tensor.shape == (8, *alone[0].shape[1:]):  # but not logits between 8 images and 8 texts
                torch.testing.assert_close(tensor, torch.cat(alone), rtol=1e-5, atol=1e-5)
                compared += 1
        assert compared


def _one(value, index: int):
    return value[index : index + 1] if isinstance(value, Tensor) and value.shape[:1] == (8,) else value


@pytest.mark.parametrize("name", [name for name, tiny in ROWS.items() if tiny.other])
def test_other_sizes(name):
    for other in ROWS[name].other:
        model, inputs = build(name)[0], other(2)
        before = run(model, inputs)
        for plan in forms(model):
            with patch(model, plan):
                after = run(model, inputs)
            assert [tensor.shape for tensor in after.values()] == [tensor.shape for tensor in before.values()]
            assert not same(before, after)


@EVERY
def test_sdpa_equals_eager(name):
    model, inputs = build(name)
    for plan in forms(model):
        with patch(model, plan):
            eager = run(attention(model, "eager"), inputs)
            close(eager, run(attention(model, "sdpa"), inputs))


@pytest.mark.parametrize("name", [name for name in FIRST if not ROWS[name].single])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(name, dtype):
    def kinds(outputs: dict[str, Tensor]) -> dict[str, torch.dtype]:
        return {path: tensor.dtype for path, tensor in outputs.items()}

    for form in range(len(FORMS)):
        model, inputs = build(name)
        plain = [run(build(name)[0].to(kind), cast(inputs, kind)) for kind in (dtype, torch.float64)]
        with patch(model, forms(model)[form]):  # before the moves: the registers' state follows the model
            exact = run(model, inputs)
            half = run(model.to(dtype), cast(inputs, dtype))
            near(half, exact)
            assert kinds(half) == kinds(plain[0])
            assert kinds(run(model.double(), cast(inputs, torch.float64))) == kinds(plain[1])


@ONE_PER_FAMILY
def test_autocast_and_inference_mode(name):
    model, inputs = build(name)
    for plan in forms(model):
        with patch(model, plan):
            exact = run(model, inputs)
            with torch.inference_mode():
                assert same(exact, tensors(model(**inputs)))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                near(run(model, inputs), exact)


@EVERY
def test_recorded_registers_and_full_attention(name):
    model, inputs = build(name)
    attention(model, "eager")
    tower = find_tower(model)
    for plan in (constant(model), attention_form(model)):
        with patch(model, plan) as patched:
            with patched.recording() as record:
                outputs = run(model, inputs, **everything(model))
            run(model, inputs)  # not recorded
        handed = [path for path in outputs if "attentions" in path and not path.startswith(("text", "decoder"))]
        assert list(record.registers) == list(range(1, len(tower.blocks)))
        assert all(len(registers[0]) == plan.registers for registers in record.registers.values())
        assert bool(record.attentions) >= bool(handed)
        for block, full in record.attentions.items():
            torch.testing.assert_close(full.sum(-1), torch.ones_like(full.sum(-1)))
            for path in handed:
                if path.endswith(f"attentions.{block}"):
                    assert torch.equal(full[..., plan.registers :, plan.registers :], outputs[path])
                    assert (outputs[path].sum(-1) < 1).all()


@ONE_PER_FAMILY
def test_a_register_that_joins_with_the_embeddings_passes_the_norm_before_the_blocks(name):
    """As in the paper's code; a register with a state of its own is in the blocks' units already."""
    model, inputs = build(name)
    tower = find_tower(model)
    zeros, ones = torch.zeros(1, 1, tower.channels), torch.ones(tower.channels)
    with torch.no_grad():
        start = zeros if tower.seed is None else tower.seed(zeros)
    for plan, wanted in ((DYNAMIC, start), (RegisterPlan({}, 2, state=ones), ones.expand(1, 1, -1))):
        seen: list[Tensor] = []
        with patch(model, plan):
            first = next(module for module in tower.blocks[0].modules() if "Norm" in type(module).__name__)
            handle = first.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            run(model, inputs)
            handle.remove()
        joined = tower.turned(seen[0])
        assert torch.equal(joined[:, :2], wanted.expand(len(joined), 2, -1))


@ONE_PER_FAMILY
def test_register_neurons_may_rest_at_another_value_than_zero(name):
    """Zeroed neurons that rest at a value equal what a bias of the second linear would add."""
    model, inputs = build(name)
    down = find_tower(model).downs[1]
    with patch(model, RegisterPlan({1: (3, 9)}, registers=0, rest={1: (0.5, -2.0)})):
        patched = run(model, inputs)
    with torch.no_grad():
        added = down.weight[:, [3, 9]] @ torch.tensor([0.5, -2.0])
        down.weight[:, [3, 9]] = 0
    down.register_forward_hook(lambda module, args, output: output + added)
    close(patched, run(model, inputs))


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


@pytest.mark.parametrize("name", [name for name in FIRST if not ROWS[name].single])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_the_derivative(name, form):
    """Along a random direction of the images, in double precision: nothing is detached, nothing edited in place."""
    model, inputs = build(name)
    model.double().train()
    inputs, where = cast(inputs, torch.float64), pixels(inputs)
    point = inputs[where].requires_grad_()
    generator = torch.Generator().manual_seed(3)
    step = 1e-4 * torch.randn(point.shape, generator=generator, dtype=point.dtype)

    def loss(images: Tensor) -> Tensor:
        outputs = tensors(model(**{**inputs, where: images}))
        return sum((tensor**3).sum() for tensor in outputs.values() if tensor.is_floating_point())

    with patch(model, forms(model)[FORMS.index(form)]):
        loss(point).backward()
        with torch.no_grad():
            difference = (loss(point + step) - loss(point - step)) / 2
    torch.testing.assert_close((point.grad * step).sum(), difference, rtol=1e-3, atol=0)
    trained = [p for block in find_tower(model).blocks for p in block.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@ONE_PER_FAMILY
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    def gradients(form: int | None, checkpointed: bool) -> dict[str, Tensor]:
        model, inputs = build(name)
        model.train()
        image = inputs[pixels(inputs)].requires_grad_()
        with patch(model, forms(model)[form]) if form is not None else nullcontext():
            if checkpointed:
                _checkpoint(model, reentrant)
            outputs = tensors(model(**inputs))
            sum((tensor**2).sum() for tensor in outputs.values() if tensor.is_floating_point()).backward()
        return {**{key: p.grad for key, p in model.named_parameters() if p.grad is not None}, "image": image.grad}

    try:
        gradients(None, True)
    except RuntimeError as error:
        pytest.skip(f"not without a patch either: {error}")
    for form in range(len(FORMS)):
        close(gradients(form, True), gradients(form, False), 1e-4)


def _checkpoint(model: nn.Module, reentrant: bool) -> None:
    if hasattr(model, "set_grad_checkpointing") and not reentrant:
        model.set_grad_checkpointing()  # timm and open_clip
    elif getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    else:
        pytest.skip("the model has no such checkpointing")


# Copies, threads, nesting


@EVERY
def test_a_copy_owns_its_patch(name):
    for form in range(len(FORMS)):
        model, inputs = build(name)
        plain = run(model, inputs)
        mine = patch(model, forms(model)[form])
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
def test_two_threads_share_a_model(name):
    model, four = build(name, 4)
    halves = [
        {key: value[half] if isinstance(value, Tensor) else value for key, value in four.items()}
        for half in (slice(0, 2), slice(2, 4))
    ]
    barrier, results = threading.Barrier(2, timeout=60), {}

    def in_step(module, args, output):  # both threads are between the same two blocks, and hold new tensors there
        barrier.wait()
        return _new(output)

    def work(index: int) -> None:
        results[index] = run(model, halves[index])

    for plan in forms(model):
        with patch(model, plan):
            alone = [run(model, half) for half in halves]
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
    if isinstance(output, list):
        return [tokens.clone() for tokens in output]
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()


@EVERY
def test_a_hook_between_blocks_may_make_a_new_tensor(name):
    for form in range(len(FORMS)):
        model, inputs = build(name)
        with patch(model, forms(model)[form]):
            before = run(model, inputs)
            for block in find_tower(model).blocks:
                block.register_forward_hook(lambda module, args, output: _new(output))
            assert same(before, run(model, inputs))


@ONE_PER_FAMILY
def test_registers_are_copied_once_per_pass(name, monkeypatch):
    """They stay in front of the tokens' memory from block to block, unless something makes a new tensor in between."""
    model, inputs = build(name)
    tower, join, calls = find_tower(model), redirect.join, []
    monkeypatch.setattr(redirect, "join", lambda *args: (calls.append(1), join(*args))[1])
    with patch(model, DYNAMIC):
        run(model, inputs)
        assert len(calls) == 1
        for block in tower.blocks:
            block.register_forward_hook(lambda module, args, output: _new(output))
        run(model, inputs)
        assert len(calls) == 1 + len(tower.blocks)


@ONE_PER_FAMILY
def test_a_block_alone_has_no_registers_and_says_so(name):
    model, inputs = build(name)
    tower = find_tower(model)
    with patch(model, DYNAMIC):
        for _ in range(2):
            with pytest.raises(TestregError, match="block 2 was called without its registers"):
                tower.blocks[2](torch.zeros(2, 17, tower.channels))
            run(model, inputs)  # leaves no registers waiting for a block that comes alone later


@ONE_PER_FAMILY
def test_a_pass_that_broke_off_harms_no_later_one(name):
    model, inputs = build(name)

    def stop(*_):
        raise KeyboardInterrupt

    with patch(model, DYNAMIC):
        before = run(model, inputs)
        handle = find_tower(model).blocks[1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        handle.remove()
        assert same(before, run(model, inputs))


@ONE_PER_FAMILY
def test_nested_patches_undo_in_order_and_never_add_up(name):
    model, inputs = build(name)
    plain, late = run(model, inputs), constant(model)
    with patch(model, DYNAMIC):
        dynamic = run(model, inputs)
        with patch(model, DYNAMIC):
            assert same(run(model, inputs), dynamic)
        assert same(run(model, inputs), dynamic)
        with patch(model, late) as top:
            nested = run(model, inputs)
            assert active(model) is top
        assert same(run(model, inputs), dynamic)
    assert same(run(model, inputs), plain)
    with patch(model, late):
        assert same(run(model, inputs), nested)


@ONE_PER_FAMILY
def test_removing_twice_or_the_inner_one_first(name):
    model, inputs = build(name)
    plain = run(model, inputs)
    inner, outer = patch(model, DYNAMIC), patch(model, constant(model))
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
    block = find_tower(model).blocks[0]
    mine = block.forward
    block.forward = lambda *args, **kwargs: mine(*args, **kwargs)
    own = block.__dict__["forward"]
    with patch(model, DYNAMIC):
        run(model, inputs)
    assert block.__dict__["forward"] is own


@ONE_PER_FAMILY
def test_forwards_that_somebody_wrapped_before_are_patched_all_the_same(name):
    model, inputs = build(name)
    tower = find_tower(model)
    with patch(model, DYNAMIC):
        wanted = run(model, inputs)
    for module in (*tower.blocks, *tower.attentions):
        module.forward = _wrapped(module.forward)  # a wrapper that hides the names of the arguments
    with patch(model, DYNAMIC):
        assert same(run(model, inputs), wanted)


def _wrapped(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs)


# Tracing

ALTERNATING = [(name, index % len(FORMS)) for index, name in enumerate(TRACED)]


@pytest.mark.parametrize(("name", "form"), [*ALTERNATING, (TRACED[0], 1)])
def test_compiles_without_a_graph_break(name, form):
    model, inputs = build(name)
    with patch(model, forms(model)[form]), torch.no_grad():
        eager = run(model, inputs)
        torch._dynamo.reset()
        close(eager, tensors(torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)))


@pytest.mark.parametrize(
    ("name", "form", "strict"),
    [*((*case, False) for case in ALTERNATING), *((TRACED[0], form, True) for form in range(len(FORMS)))],
)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_exports(name, form, strict):
    model, inputs = build(name)
    with patch(model, forms(model)[form]), torch.no_grad():
        eager = run(model, inputs)
        program = torch.export.export(model, (), inputs, strict=strict)
        close(eager, tensors(program.module()(**inputs)))
        close(eager, run(model, inputs))  # tracing left nothing behind
        copy.deepcopy(model)


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
