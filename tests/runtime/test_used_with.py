"""Other tools on a patched model, and registers on what they made of one: rows of docs/used-with.md."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel, ViTConfig, ViTModel

import testreg
from testreg import RegisterPlan
from testreg.demo.planted import plant

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 32, "patch_size": 8}
NEURONS = {0: (3,), 1: (2, 7)}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FORMS = ("attention", "constant", "dynamic")


def plan(form: str) -> RegisterPlan:
    shape = {"attention": (2, 2, 32), "constant": (2, 32)}.get(form)
    state = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return RegisterPlan(NEURONS, 2, 0 if form == "dynamic" else 1, state)


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES)).eval()
    with torch.no_grad():
        for layer in model.layers:  # neurons whose rest is seen
            layer.mlp.fc2.weight.mul_(20)
    return model


def last(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        output = model(images)
    return output["last_hidden_state"] if isinstance(output, dict) else output.last_hidden_state


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def expected(form: str) -> Tensor:
    """What the patched model gives by itself, which is not what the unpatched one gives."""
    model = vit()
    plain = last(model)
    testreg.patch(model, plan(form))
    wanted = last(model)
    assert (wanted - plain).abs().max() > 1e-2
    return wanted


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", ["patch", "compile"])
def test_accelerate_compiles_regions(form: str, first: str, expected: Tensor) -> None:
    regions = importlib.import_module("accelerate.utils").compile_regions
    torch._dynamo.reset()
    model = vit()
    if first == "patch":
        testreg.patch(model, plan(form))
        model = regions(model, backend="eager")
    else:
        model = regions(model, backend="eager")
        testreg.patch(model, plan(form))
    same(last(model), expected)


def test_a_trace_keeps_the_registers(form: str, expected: Tensor) -> None:
    model = vit()
    testreg.patch(model, plan(form))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, about shapes
        traced = torch.jit.trace(model, IMAGES, strict=False)  # its output is no plain tuple
    testreg.active(model).remove()
    same(traced(IMAGES)["last_hidden_state"], expected)


@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_adapters_are_merged_under_a_patch(form: str, first: str, expected: Tensor) -> None:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(target_modules=["fc1", "fc2"], r=2)
    model = vit()
    if first == "patch":
        testreg.patch(model, plan(form))
        adapted = peft.get_peft_model(model, config)
    else:
        adapted = peft.get_peft_model(model, config)
        testreg.patch(adapted, plan(form))
    same(last(adapted), expected)  # an adapter begins as nothing
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    trained = last(adapted)
    assert (trained - expected).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    same(last(merged), trained)
    assert testreg.active(merged) is not None


def test_hooks_of_accelerate_come_and_go(form: str, expected: Tensor) -> None:
    hooks = importlib.import_module("accelerate.hooks")
    model = vit()
    for layer in model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    testreg.patch(model, plan(form))
    same(last(model), expected)
    hooks.remove_hook_from_submodules(model)  # gives blocks the forwards back that they had before the patch
    same(last(model), expected)


def test_a_block_that_got_its_own_forward_back_does_not_pass_for_patched(form: str, expected: Tensor) -> None:
    model = vit()
    testreg.patch(model, plan(form))
    del model.layers[1].forward
    same(last(model), expected)


def test_training_in_parallel(form: str, expected: Tensor, tmp_path: Path) -> None:
    model = vit()
    testreg.patch(model, plan(form))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        output = parallel(IMAGES).last_hidden_state
        same(output.detach(), expected)
        output.square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(layer.mlp.fc1.weight.grad.abs().sum() > 0 for layer in model.layers)


def test_copies_and_originals_are_patched_apart(form: str, expected: Tensor) -> None:
    model = vit()
    patched = testreg.patch(model, plan(form))
    twin = copy.deepcopy(model)
    patched.remove()
    same(last(twin), expected)
    assert testreg.active(model) is None
    same(last(model), last(vit()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
@pytest.mark.parametrize(
    "part", ["layers", "layers.0", "layers.1", "layers.2", "layers.1.attention", "layers.1.mlp.fc2"]
)
def test_a_part_that_was_copied_out_and_put_back(form: str, part: str, copied: Any, expected: Tensor) -> None:
    """What the part wore as one of the patched model is no second patch."""
    model = vit()
    patched = testreg.patch(model, plan(form))
    holder, _, name = part.rpartition(".")
    setattr(model.get_submodule(holder), name, copied(model.get_submodule(part)))
    same(last(model), expected)
    assert testreg.active(model) is patched
    patched.remove()
    same(last(model), last(vit()))


def test_a_part_that_is_put_back_after_the_patch_is_plain(form: str, expected: Tensor) -> None:
    model = vit()
    with testreg.patch(model, plan(form)):
        part = copy.deepcopy(model.layers[1])
    model.layers[1] = part
    same(last(model), last(vit()))
    testreg.patch(model, plan(form))
    same(last(model), expected)


@pytest.mark.parametrize(("part", "what"), [("mlp", "second linear"), ("attention", "attention")])
def test_blocks_that_share_a_part_are_refused(part: str, what: str) -> None:
    model = vit()
    setattr(model.layers[1], part, getattr(model.layers[2], part))
    with pytest.raises(testreg.BadPlan, match=f"shares its {what} with another block"):
        testreg.patch(model, plan("attention"))
    setattr(model.layers[1], part, copy.deepcopy(getattr(model.layers[2], part)))
    testreg.patch(model, plan("attention")).remove()


def test_a_second_linear_that_is_never_called_is_named() -> None:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**{**SIZES, "hidden_size": 48, "num_hidden_layers": 4, "image_size": 64})).eval()
    plant(model, neurons=2)
    for layer in model.layers:
        layer.mlp.forward = fused(layer.mlp)
    with pytest.raises(testreg.UnsupportedModel, match="is never called as a module"):
        testreg.find(model, torch.randn(12, 3, 64, 64))


def fused(mlp: nn.Module) -> Any:
    """As a fused kernel does it."""
    return lambda tokens: nn.functional.linear(mlp.activation_fn(mlp.fc1(tokens)), mlp.fc2.weight, mlp.fc2.bias)


@pytest.mark.parametrize(
    ("bias", "strict"),
    [
        ("use_relative_position_bias", False),
        ("use_shared_relative_position_bias", False),
        ("use_shared_relative_position_bias", True),
    ],
)
def test_beit_is_exported(form: str, bias: str, strict: bool) -> None:
    """Its mask of booleans is added to the bias under export: all its keys get 1, and so must the registers."""
    torch.manual_seed(0)
    model = BeitModel(BeitConfig(**SIZES, **{bias: True})).eval()
    for name, table in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(table)
    testreg.patch(model, plan(form))
    with torch.no_grad():
        exported = torch.export.export(model, (IMAGES,), strict=strict).module()
    same(last(exported), last(model))


def test_the_page_names_tests_that_are_there() -> None:
    root = Path(__file__).parents[2]
    rows = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (root / "docs" / "used-with.md").read_text())
    assert len(rows) > 15
    for file, name in rows:
        text = (root / file).read_text()
        assert not name or f"def {name}(" in text, (file, name)
