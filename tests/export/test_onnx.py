"""ONNX export against PyTorch, in ONNX Runtime."""

import pytest
import torch
import transformers as hf
from torch import nn

import testreg
from testreg import BadCheckpoint, Harmful, RegisterPlan, TestregError
from testreg.demo.planted import plant

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import testreg.export.onnx  # noqa: E402
from testreg.export.onnx import export_onnx  # noqa: E402

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
ONE_BLOCK = TINY | {"num_hidden_layers": 1}  # tracing takes as long as there are blocks
ANY = RegisterPlan({0: (1, 5)}, 2)


def planted(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    return model, plant(model, where="corners", decoys=False)


def plans(neurons, channels):
    state = 30 * torch.randn(channels, generator=torch.Generator().manual_seed(0))
    late = max(neurons) + 1
    return {"dynamic": RegisterPlan(neurons, 2), "constant": RegisterPlan(neurons, 2, entry=late, state=state)}


def run(file, images):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": images.numpy()}), strict=True))


@pytest.mark.parametrize("form", ["dynamic", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_both_forms_at_other_batch_sizes(tmp_path, form, dtype):
    model, found = planted(hf.Dinov2Model, hf.Dinov2Config(**TINY, mlp_ratio=2))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with testreg.patch(model, plans(found.neurons, 32)[form]):
        file = export_onnx(model, tmp_path / "model.onnx", dtype=dtype)
        for batch in (1, 3, 8):
            images = torch.randn(batch, 3, 32, 32)
            with torch.no_grad():
                expected = model(images)
            got = run(file, images.to(dtype))
            assert set(got) == {"last_hidden_state", "pooler_output"}
            for name, value in got.items():
                error = (torch.from_numpy(value).float() - expected[name]).abs().max()
                assert error < (1e-4 if dtype == torch.float32 else 0.05)
    with torch.no_grad():  # the registers matter: without the patch it is another function
        assert (model(images).last_hidden_state - expected.last_hidden_state).abs().max() > 0.1
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [file]
    graph = onnx.load(str(file)).graph
    assert {node.domain for node in graph.node} == {""}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_norm_in_front_and_a_convolution_without_bias_in_float16(tmp_path):
    model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**ONE_BLOCK, intermediate_size=64)).eval()
    with testreg.patch(model, ANY):
        file = export_onnx(model, tmp_path / "clip.onnx", dtype=torch.float16)
    assert run(file, torch.zeros(2, 3, 32, 32).half())["pooler_output"].shape == (2, 32)


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    model = hf.Dinov2Model(hf.Dinov2Config(**ONE_BLOCK)).eval()
    images, file, data = torch.randn(3, 3, 32, 32), tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    whole = testreg.export.onnx.WHOLE
    with testreg.patch(model, ANY), torch.no_grad():
        expected = model(images).last_hidden_state
        data.write_text("mine")
        with pytest.raises(BadCheckpoint, match=r"model\.onnx\.data exists"):
            export_onnx(model, file)
        assert data.read_text() == "mine"
        for limit, files in (
            (0, [file, data]),
            (whole, [file]),
            (0, [file, data]),
        ):  # what one leaves, the next replaces
            monkeypatch.setattr(testreg.export.onnx, "WHOLE", limit)
            export_onnx(model, file, replace=True)
            assert sorted(tmp_path.iterdir()) == files
            got = torch.from_numpy(run(file, images)["last_hidden_state"])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert data.stat().st_size > 10 * 1024
    (tmp_path / "moved").mkdir()
    for path in (file, data):  # they go anywhere together
        path.rename(tmp_path / "moved" / path.name)
    assert run(tmp_path / "moved" / "model.onnx", images).keys() == {"last_hidden_state", "pooler_output"}
    (tmp_path / "moved" / "model.onnx.data").unlink()
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        run(tmp_path / "moved" / "model.onnx", images)


@pytest.mark.parametrize("form", ["dynamic", "constant"])
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(form, strict):
    model, found = planted(hf.Dinov2Model, hf.Dinov2Config(**TINY, mlp_ratio=2))
    with testreg.patch(model, plans(found.neurons, 32)[form]):
        shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
        program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes, strict=strict)
        images = torch.randn(5, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images)[0], model(images)[0], atol=1e-5, rtol=1e-5)


class TestRefusals:
    def model(self):
        return hf.Dinov2Model(hf.Dinov2Config(**ONE_BLOCK)).eval()

    def test_a_file_that_exists_stays(self, tmp_path):
        file = tmp_path / "model.onnx"
        file.write_text("mine")
        with pytest.raises(BadCheckpoint, match="exists"):
            export_onnx(self.model(), file)
        assert file.read_text() == "mine"

    @pytest.mark.parametrize("name", ["model.pt", ".", "model"])
    def test_a_name_that_is_none(self, tmp_path, name):
        with pytest.raises(BadCheckpoint, match=r"ends in \.onnx"):
            export_onnx(self.model(), tmp_path / name)

    def test_a_dtype_that_is_none(self, tmp_path):
        with pytest.raises(TestregError, match="float16"):
            export_onnx(self.model(), tmp_path / "model.onnx", dtype=torch.int8)

    def test_another_result_is_not_written(self, tmp_path, monkeypatch):
        real = onnxruntime.InferenceSession.run
        monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [value + 1e-2 for value in real(*args)])
        with pytest.raises(Harmful, match="differs from PyTorch"):
            export_onnx(self.model(), tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())

    def test_a_model_that_cannot_be_traced(self, tmp_path):
        class Odd(nn.Module):
            main_input_name = "pixel_values"
            config = hf.Dinov2Config(**TINY)

            def forward(self, images):
                return images if images.sum() > 0 else -images  # a branch that depends on the data

        with pytest.raises(testreg.UnsupportedModel, match="cannot be exported"):
            export_onnx(Odd(), tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())
