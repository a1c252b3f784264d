"""Whoever looks sees the same thing twice: no mask, no dropout, no luck, and the user's own draws untouched."""

import warnings

import pytest
import torch
import transformers as hf
import zoo
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import testreg
from testreg.demo.planted import plant
from testreg.export.onnx import export_onnx
from testreg.finding.observe import run
from testreg.judging.evaluation import evaluate
from testreg.judging.pictures import views
from testreg.runtime.errors import RandomNumbers
from testreg.runtime.families import FAMILIES
from testreg.runtime.towers import find_tower

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip
PLAN = testreg.RegisterPlan({1: (3, 5)}, registers=2)


def noise(count=24, seed=0):
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def twins():
    """A planted ViT, and the same weights as a ViT-MAE, which masks three quarters of the patches as it comes."""
    torch.manual_seed(0)
    vit = hf.ViTModel(hf.ViTConfig(**SHAPE), add_pooling_layer=False).eval()
    plant(vit, neurons=2)
    mae = hf.ViTMAEModel(hf.ViTMAEConfig(**SHAPE)).eval()
    mae.load_state_dict(vit.state_dict())
    return vit, mae


# RADIO's makers call the parts of the tower one by one, never the tower.
@pytest.mark.parametrize("name", [name for name in zoo.ROWS if name != "timm.VisionTransformer-radio"])
def test_every_family_gives_the_same_twice_and_draws_nothing(name):
    model, inputs = zoo.build(name)
    other = dict.fromkeys(("x", "image", "imgs"), "pixel_values")  # as makers call it
    inputs = {other.get(key, key): value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    inputs.pop("noise", None), inputs.pop("input_ids", None)
    model.train()
    states, seen = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RandomNumbers)
        for seed in (1, 2):
            torch.manual_seed(seed)
            states.append(torch.get_rng_state())
            seen.append(zoo.tensors(run(model, inputs)))
            assert torch.equal(torch.get_rng_state(), states[-1])  # a training that is under way goes on as it would
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    assert model.training


def test_a_masked_autoencoder_shows_every_patch_in_its_place(twins):
    vit, mae = twins
    one, other = ({"pixel_values": noise(2)}, {"pixel_values": noise(2, seed=1)[..., :64]})  # and a narrower image
    for inputs in (one, other):
        assert torch.equal(run(mae, inputs).last_hidden_state, run(vit, inputs).last_hidden_state)
    assert mae(one["pixel_values"]).last_hidden_state.shape[1] == 1 + 144 // 4  # by itself it masks, as ever


def test_a_masked_autoencoder_is_found_inspected_judged_and_drawn_as_the_same_weights_are(twins, tmp_path):
    vit, mae = twins
    plan = testreg.find(vit, noise())
    assert testreg.find(mae, noise()) == plan
    assert testreg.inspect(mae, noise()).to_dict() == {**testreg.inspect(vit, noise()).to_dict(), "family": "vit-mae"}
    for index in range(4):
        pixels = torch.randint(0, 255, (96, 96, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{index}.png")
    processor = ViTImageProcessorPil(size={"height": 96, "width": 96})
    rows = [
        [
            (row.arm, row.metric, row.value)
            for row in evaluate(model, tmp_path, "agreement", plan=plan, processor=processor)
        ]
        for model in (vit, mae)
    ]
    assert rows[0] == rows[1]
    ours, theirs = views(mae, {"pixel_values": noise(1)}), views(vit, {"pixel_values": noise(1)})
    assert torch.equal(ours[0].norms, theirs[0].norms)
    assert torch.equal(ours[0].attention, theirs[0].attention)


def test_the_one_for_pretraining_and_one_inside_an_adapter_too(twins):
    vit, mae = twins
    whole = hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(**SHAPE, decoder_hidden_size=32, decoder_num_attention_heads=4, decoder_num_hidden_layers=1)
    )
    whole.vit.load_state_dict(vit.state_dict())
    expected = testreg.inspect(vit, noise()).to_dict()
    assert testreg.inspect(whole, noise()).to_dict() == {**expected, "family": "vit-mae"}
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(mae, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert testreg.inspect(adapted, noise()).to_dict() == {**expected, "family": "vit-mae"}
    adapted.unload()


def test_the_method_that_masks_is_there_in_every_family_that_names_one():
    named = {family for family, row in FAMILIES.items() if row.masking}
    assert named == {"vit-mae"}
    for family in named:
        tower = find_tower(zoo.build(next(iter(zoo.MODELS[family])))[0])
        owner, _, method = tower.row.masking.rpartition(".")
        assert callable(getattr(tower.module.get_submodule(owner), method))


class Jittered(hf.ViTModel):
    """Draws numbers in evaluation mode, as no family of the libraries does."""

    def forward(self, pixel_values, **more):
        return super().forward(pixel_values + 0.1 * torch.randn_like(pixel_values), **more)


def test_a_model_that_draws_numbers_gets_the_same_ones_and_is_named():
    torch.manual_seed(0)
    model = Jittered(hf.ViTConfig(**zoo.VISION)).eval()
    inputs = zoo.images()(2)
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(1)
        torch.manual_seed(seed)
        with pytest.warns(RandomNumbers, match="Jittered draws random numbers in evaluation mode"):
            seen.append(run(model, inputs).last_hidden_state)
        assert torch.equal(torch.rand(1), expected)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], run(hf.ViTModel(model.config).eval(), inputs).last_hidden_state)


def test_dropout_of_a_model_that_is_being_trained_is_off_while_it_is_looked_at(tmp_path):
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**zoo.VISION, hidden_dropout_prob=0.5)).train()
    drawn = [views(model, {"pixel_values": zoo.images()(1)["pixel_values"]})[0].norms for _ in range(2)]
    assert torch.equal(*drawn)
    assert all(module.training for module in model.modules())


def test_what_needs_more_than_images_is_run_as_its_tower():
    config = hf.VideoMAEConfig(**zoo.VISION, num_frames=4)
    model = hf.VideoMAEForPreTraining(config).eval()  # needs a mask of the user's
    states = run(model, {"pixel_values": zoo.clips(2)}, whole=True).last_hidden_state
    assert states.shape == (2, 32, zoo.CHANNELS)


def test_an_onnx_file_of_a_masked_autoencoder_sees_every_patch(twins, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    vit, mae = twins
    file = export_onnx(mae, tmp_path / "mae.onnx")
    got = onnxruntime.InferenceSession(str(file)).run(["last_hidden_state"], {"pixel_values": noise(2).numpy()})[0]
    torch.testing.assert_close(
        torch.from_numpy(got), run(vit, {"pixel_values": noise(2)}).last_hidden_state, atol=1e-4, rtol=1e-4
    )
