"""The ecosystem's quantisers on a real model: patch, then quantise; or put a plan on a quantised model."""

import copy
import json

import pytest
import torch
from quantisers import QUANTISERS, quanto

import testreg
from testreg import RegisterPlan
from testreg.checkpoints.original import load_base
from testreg.export import put_at_rest
from testreg.images import stream

ROWS = {6: (59, 189), 7: (417,)}  # the register neurons of vit-tiny-augreg


@pytest.fixture(scope="module")
def real(assets):
    """The model, registers for it, photos, and what it answers with registers in float."""
    model = load_base(assets / "checkpoints/vit-tiny-augreg")
    folder = assets / "images/coco_cc"
    names = json.loads((folder / "splits.json").read_text())["calib"][:24]
    (batch,) = stream([folder / "images" / name for name in names], model=model, batch_size=24)
    photos = batch.inputs["pixel_values"]
    rows = {}
    hooks = [
        block.attention.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: rows.__setitem__(
                index, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for index, block in enumerate(model.vit.layers)
        if index > 7
    ]
    with torch.no_grad():
        states = model(photos, output_hidden_states=True).hidden_states[9]
    for hook in hooks:
        hook.remove()
    norms = states[:, 1:].norm(dim=-1)  # (photos, patches)
    outliers = norms > 4 * norms.median(-1, keepdim=True).values
    state = torch.stack([rows[index][:, 1:][outliers].mean(0) for index in range(8, 12)])  # (blocks, channels)
    plan = RegisterPlan(ROWS, 4, entry=8, state=state[:, None].expand(-1, 4, -1).clone())
    with testreg.patch(model, plan), torch.no_grad():
        expected = model(photos[:8]).logits
    return model, plan, photos, expected


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one, other).mean())


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("order", ["patch first", "quantise first"])
def test_both_orders(real, name, order):
    library, quantise, least = QUANTISERS[name]
    pytest.importorskip(library)
    original, plan, photos, expected = real
    model = copy.deepcopy(original)
    if order == "patch first":
        testreg.patch(model, plan)
        model = quantise(model, photos)
    else:
        model = quantise(model, photos)
        testreg.patch(model, plan)
    with torch.no_grad():
        got = model(photos[:8], output_hidden_states=True)
    assert cosine(got.logits, expected) > least, cosine(got.logits, expected)
    norms = got.hidden_states[-2][:, 1:].norm(dim=-1)
    assert float((norms.amax(-1) / norms.median(-1).values).max()) < 4
    assert testreg.active(model) is not None


def test_a_quantiser_that_reads_ahead_of_the_patch_wants_neurons_at_rest_in_the_weights(real):
    pytest.importorskip("optimum.quanto")
    original, plan, photos, expected = real
    answers = []
    for rest in (False, True):
        model = copy.deepcopy(original)
        left = put_at_rest(model, plan, {"pixel_values": photos[:2]}) if rest else plan
        testreg.patch(model, left)
        with torch.no_grad():
            answers.append(cosine(quanto(model, photos)(photos[:8]).logits, expected))
    assert answers[0] < 0.97 < 0.985 < answers[1], answers


def test_a_patched_model_is_exported_and_quantised(real):
    """`torch.export`, then pt2e: the exported program holds the registers."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    original, plan, photos, expected = real
    model = copy.deepcopy(original)
    with testreg.patch(model, plan):
        program = torch.export.export(model, (photos[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantiser)
    with torch.no_grad():
        prepared(photos[8:])
        converted = convert_pt2e(prepared)
        assert cosine(converted(photos[:8]).logits, expected) > 0.98


def test_onnx_runtime_quantises_a_patched_file(real, tmp_path):
    pytest.importorskip("onnxscript")
    quantisation = pytest.importorskip("onnxruntime.quantization")
    import onnxruntime

    original, plan, photos, expected = real
    model = copy.deepcopy(original)
    with testreg.patch(model, plan):
        file = testreg.export(model, tmp_path / "vit.onnx")
    quantisation.quantize_dynamic(file, tmp_path / "int8.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": photos[:8].numpy()})
    assert cosine(torch.from_numpy(logits), expected) > 0.95
