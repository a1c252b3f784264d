"""Int8 in ONNX Runtime: planted models answer as in float, and what cannot be used is refused before it is written."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf

import testreg
from testreg import BadCheckpoint, BadImages, BadPlan, Harmful, RegisterPlan, TestregError
from testreg.demo.planted import plant
from testreg.export import Int8, export_int8, quantiser
from testreg.export.rest import put_at_rest
from testreg.finding.evening import Seen

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx_ir as ir  # noqa: E402

from testreg.export import graph as graphs  # noqa: E402

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 96, "patch_size": 8,
}  # fmt: skip
WIDE = SHAPE | {"intermediate_size": 96}
MODELS = {
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**WIDE)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**WIDE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SHAPE, mlp_ratio=2)),
    "dinov2 swiglu": lambda: hf.Dinov2Model(hf.Dinov2Config(**SHAPE, mlp_ratio=4, use_swiglu_ffn=True)),
}


def images(count=36, seed=0):
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


def planted(name, scale=30.0):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    plant(model, decoys=False, scale=scale)
    return model


def run(file, pictures):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": pictures.numpy()}), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_planted_models_keep_their_patches(name, tmp_path):
    model = planted(name)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    file = tmp_path / "model.onnx"
    found = export_int8(model, images(), file)
    sides = {side.name: side for side in found.sides}
    assert "Registers found" in found.about
    assert sides["patched, int8"].patches >= 0.99
    assert sides["unpatched, int8"].patches < sides["patched, int8"].patches
    assert sides["unpatched, float"].outliers > 0.001
    assert sides["patched, float"].outliers == sides["patched, int8"].outliers == 0
    assert (found.calibrated, found.images) == (24, 12)
    assert testreg.active(model) is None
    assert all(torch.equal(before[key], weight) for key, weight in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [file]
    pictures = images(5, seed=1)
    whole = run(file, pictures)
    assert set(whole) == {"last_hidden_state", "pooler_output"}
    for batch in (1, 2):  # of any size, and each image by itself
        part = run(file, pictures[:batch])["last_hidden_state"]
        np.testing.assert_allclose(part, whole["last_hidden_state"][:batch], atol=1e-4)
    read = {value.op_type for node in ir.load(file).graph if node.op_type == "MatMul" for value in producers(node)}
    assert "DequantizeLinear" in read


def producers(node):
    return [value.producer() for value in node.inputs if value is not None and value.producer() is not None]


def test_a_model_without_the_artefact_needs_no_registers(tmp_path):
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**WIDE, num_labels=5)).eval()
    found = testreg.export(model, tmp_path / "vit.onnx", images=images(), int8=True)
    assert found.about.startswith("Nothing had to be patched")
    assert [side.name for side in found.sides] == ["unpatched, float", "unpatched, int8"]
    assert found.sides[1].cosine > 0.99
    assert set(run(tmp_path / "vit.onnx", images(3))) == {"logits"}


def test_neurons_rest_in_the_weights():
    model = planted("dinov2 swiglu")
    plan = testreg.find(model, images(), form="attention", sizes=())
    plan = replace(plan, rest={block: (2.0,) * len(row) for block, row in plan.neurons.items()})  # of any height
    with testreg.patch(model, plan), torch.no_grad():
        expected = model(images(4)).last_hidden_state
    assert put_at_rest(model, plan, {"pixel_values": images(2)}).neurons == {}
    left = RegisterPlan({}, plan.registers, entry=plan.entry, state=plan.state, law=plan.law)
    with testreg.patch(model, left), torch.no_grad():
        torch.testing.assert_close(model(images(4)).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_neurons_that_tokens_need_cannot_rest_in_the_weights():
    with pytest.raises(BadPlan, match="form='attention'"):
        put_at_rest(planted("dinov2"), RegisterPlan({1: (2,)}), {"pixel_values": images(2)})


def test_what_is_done_to_a_graph_changes_nothing(tmp_path):
    from testreg.export.tracing import Plain, traced

    model = planted("clip")
    plan = testreg.find(model, images(), form="attention", sizes=())
    with testreg.patch(model, plan):
        program, _ = traced(Plain(model, torch.float32).eval(), images(2))
        with torch.no_grad():
            expected = model(images(3)).last_hidden_state
    made = program.model
    graphs.name_linears(made.graph)
    assert graphs.lift_rows(made.graph) == 3 * (3 - plan.entry)  # queries, keys and values
    graphs.tidy(made)
    seen = {value.name: Seen() for value in graphs.inputs(made.graph)}
    assert len(seen) > 8
    for value in graphs.inputs(made.graph):
        seen[value.name].add(torch.randn(40, value.shape[-1]) * (1 + torch.arange(value.shape[-1])))
    before = {name: graphs.constant(value) for name, value in made.graph.initializers.items()}
    assert len(graphs.even_out(made.graph, seen)) == 2 * 3  # behind attention and activation
    assert all(
        graphs.constant(node.inputs[1]) is not before.get(node.inputs[1].name) for node in graphs.linears(made.graph)
    )
    graphs.tidy(made)
    ir.save(made, tmp_path / "even.onnx")
    got = torch.from_numpy(run(tmp_path / "even.onnx", images(3))["last_hidden_state"])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


class TestSettings:
    @pytest.fixture(scope="class")
    def model(self):
        model = planted("dinov2")
        testreg.patch(model, testreg.find(model, images(), form="attention", sizes=()))
        return model

    @pytest.mark.parametrize(
        "how",
        [
            Int8(target="vnni", calibration="percentile"),
            Int8(target="arm", calibration="entropy"),
            Int8(target="tensorrt", per_tensor=True),
            Int8(operators="all", keep=("Softmax", "LayerNormalization")),
        ],
        ids=str,
    )
    def test_each_is_written_as_it_says(self, model, how, tmp_path):
        found = export_int8(model, images(), tmp_path / "model.onnx", how=how, force=True)
        assert found.about.startswith("Registers as they were")
        assert found.sides[-1].kept > 0.9
        graph = ir.load(tmp_path / "model.onnx").graph
        kinds = {value.name: value.const_value.numpy() for value in graph.initializers.values()}
        weights = [array for array in kinds.values() if array.ndim == 2 and array.dtype.itemsize == 1]
        assert (
            {array.dtype for array in weights} == {np.dtype(np.int8)} if how.target != "any" else {np.dtype(np.uint8)}
        )
        read = {node.op_type for node in graph for value in producers(node) if value.op_type == "DequantizeLinear"}
        assert ("Add" in read) == (how.operators == "all")

    def test_a_layer_is_kept(self, model, tmp_path):
        for file, keep in (("a.onnx", ()), ("b.onnx", ("*.0.mlp.fc1",))):
            export_int8(model, images(), tmp_path / file, how=Int8(keep=keep))
        sizes = [(tmp_path / file).stat().st_size for file in ("a.onnx", "b.onnx")]
        assert 2 * 48 * 96 < sizes[1] - sizes[0] < 4 * 48 * 96

    @pytest.mark.parametrize(("name", "value"), [("target", "gpu"), ("operators", "some"), ("calibration", "mse")])
    def test_values_that_are_none(self, name, value):
        with pytest.raises(TestregError, match=f"{name} is '{value}': choose one of"):
            Int8(**{name: value})

    def test_a_pattern_that_fits_nothing(self, model, tmp_path):
        with pytest.raises(TestregError, match=r"nothing is called 'nope'.*fc1"):
            export_int8(model, images(), tmp_path / "model.onnx", how=Int8(keep=("nope",)))
        assert not list(tmp_path.iterdir())


class TestRefusals:
    def test_harm_is_named_and_not_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr("testreg.export.int8.LEAST", 1.1)
        with pytest.raises(Harmful, match=r"has a cosine of .*in front of encoder.layer.*--force"):
            export_int8(planted("dinov2"), images(), tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())

    def test_tokens_gain_nothing(self, tmp_path):
        model = planted("dinov2")
        with (
            testreg.patch(model, RegisterPlan({1: (2,)})),
            pytest.raises(TestregError, match=r"dynamic form.*attention"),
        ):
            export_int8(model, images(), tmp_path / "model.onnx")

    def test_too_few_photos_or_of_two_sizes(self, tmp_path):
        with pytest.raises(BadImages, match="6 images to calibrate on and 3 to compare on"):
            export_int8(planted("dinov2"), images(9), tmp_path / "model.onnx")
        sizes = [*images(30), torch.zeros(3, 48, 48)]
        with pytest.raises(BadImages, match="one size"):
            export_int8(planted("dinov2"), sizes, tmp_path / "model.onnx")

    def test_a_file_that_exists_stays(self, tmp_path):
        (tmp_path / "model.onnx").write_text("mine")
        with pytest.raises(BadCheckpoint, match="exists"):
            export_int8(planted("dinov2"), images(), tmp_path / "model.onnx")

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"int8": True}, "needs images"),
            ({"images": [1]}, "takes no images"),
            ({"format": "stock", "int8": True, "images": [1]}, "a form of ONNX"),
            ({"format": "tflite"}, "choose 'onnx' or 'stock'"),
        ],
    )
    def test_arguments_that_do_not_go_together(self, given, says, tmp_path):
        with pytest.raises(TestregError, match=says):
            testreg.export(planted("dinov2"), tmp_path / "model.onnx", **given)

    def test_an_interrupted_calibration_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("testreg.export.int8.quantise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_int8(planted("dinov2"), images(), tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())


def test_the_room_is_the_function_too(tmp_path):
    model = planted("dinov2")
    assert testreg.export is sys.modules["testreg.export"]
    file = testreg.export(model, tmp_path / "model.onnx", plan=RegisterPlan({1: (2,)}))
    assert testreg.active(model) is None
    assert file == tmp_path / "model.onnx"
    assert set(run(file, images(3))) == {"last_hidden_state", "pooler_output"}


def test_arguments_that_do_not_go_together_are_named(tmp_path):
    model = planted("dinov2")
    for more, says in (
        ({"int8": True, "images": images(), "library": "timm"}, "int8 does not take library"),
        ({"form": "stock"}, "the format onnx does not take form"),
        ({"int8": True, "images": images(2)}, "int8 needs at least 16 images, 8 of them held out"),
    ):
        with pytest.raises(testreg.TestregError, match=says):
            testreg.export(model, tmp_path / "model.onnx", **more)
    assert not list(tmp_path.iterdir())


def test_channels_are_evened_out_where_linears_alone_are_quantised():
    assert Int8().evens
    assert not Int8(operators="all").evens
    assert Int8(operators="all", even=True).evens


def test_every_target_is_of_the_quantisers_own_types():
    from onnxruntime import quantization

    for target in quantiser.TARGETS.values():
        assert {target.activations, target.weights} <= set(quantization.QuantType.__members__)
