"""Models larger than a device, spread by accelerate as `device_map="auto"` does: the same plan, the same patch."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

import testreg
from testreg.demo.planted import plant

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def tiny():
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "mlp_ratio": 4, "num_attention_heads": 4}
    model = Dinov2Model(Dinov2Config(**sizes, num_hidden_layers=5)).eval()
    plant(model, neurons=2)
    return model


def partly(model, folder):
    places = {"embeddings": "cpu", "layernorm": "cpu"}
    places |= {f"encoder.layer.{index}": "disk" if index > 1 else "cpu" for index in range(5)}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


WAYS = {
    "all on the host": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
    "all on a disk": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
    "last blocks on a disk": partly,
}


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan(images):
    return testreg.find(tiny(), images)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_plan_and_the_same_outputs(way, images, plan, tmp_path):
    here, away = tiny(), tiny()
    away = WAYS[way](away, tmp_path) or away
    assert any(weight.is_meta for weight in away.parameters())
    found = testreg.find(away, images)
    assert found == plan
    assert found.provenance["base"]["fingerprint"] == plan.provenance["base"]["fingerprint"]
    dynamic = testreg.RegisterPlan(plan.neurons, 2)
    for current in (plan, dynamic):
        with torch.no_grad(), testreg.patch(here, current), testreg.patch(away, current):
            ours, theirs = away(images).last_hidden_state, here(images).last_hidden_state
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(away(images).last_hidden_state, here(images).last_hidden_state)
