"""What earlier versions wrote is read, and computes what it computed then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import testreg

FOLDER = Path(__file__).parents[1] / "data" / "0.1"


@pytest.fixture(scope="module")
def then():
    """Pixels, and the logits that version 0.1 gave for them: as it is, and with each plan."""
    return load_file(FOLDER / "outputs.safetensors")


@pytest.mark.parametrize("form", ["dynamic", "constant"])
def test_a_plan_of_0_1_does_what_it_did(form, then):
    plan = testreg.RegisterPlan.load(FOLDER / f"{form}.safetensors")
    assert plan.form == form
    assert plan.pairs == ((0, 3), (0, 17), (1, 40))
    model = testreg.load(FOLDER / "checkpoint")
    testreg.active(model).remove()
    with torch.no_grad():
        unpatched = model(then["pixels"]).logits
        with testreg.patch(model, plan):
            patched = model(then["pixels"]).logits
    # As exact as another processor's sums allow; what registers change is a thousand times that.
    torch.testing.assert_close(unpatched, then["unpatched"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(patched, then[form], rtol=1e-5, atol=1e-6)
    assert (then[form] - then["unpatched"]).abs().max() > 1e-3


def test_a_checkpoint_of_0_1_does_what_it_did(then):
    model = testreg.load(FOLDER / "checkpoint")
    assert testreg.active(model).plan == testreg.RegisterPlan.load(FOLDER / "constant.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(then["pixels"]).logits, then["constant"], rtol=1e-5, atol=1e-6)
