"""Real pretrained weights on real photos, through the same invariants as the tiny random models."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn
from zoo import tensors

from testreg import RegisterPlan, active, patch
from testreg.runtime.towers import find_tower

BOTH = ("dynamic", "constant")
CASES = {
    "vit-tiny-augreg": (hf.ViTForImageClassification, 7, (224, 224), BOTH),
    "deit-tiny": (hf.DeiTForImageClassification, 7, (224, 224), ("dynamic",)),
    "dinov2-small-depth": (hf.Dinov2Model, 8, (518, 518), ("constant",)),
    "dinov2-small-depth, not square": (hf.Dinov2Model, 8, (196, 392), ("dynamic",)),
}


def photos(assets: Path, size: tuple[int, int], count: int = 2) -> dict[str, Tensor]:
    files = sorted((assets / "images" / "coco_cc" / "images").iterdir())[:count]
    pixels = [
        np.array(Image.open(file).convert("RGB").resize(size[::-1]), dtype=np.float32) / 127.5 - 1 for file in files
    ]
    return {"pixel_values": torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2)}


def run(model: nn.Module, inputs: dict[str, Tensor], **more) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs, output_hidden_states=True, **more))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[path], right[path]) for path in left)


@pytest.mark.parametrize("case", CASES)
def test_real_weights(case, assets):
    kind, block, size, forms = CASES[case]
    model = kind.from_pretrained(assets / "checkpoints" / case.split(",")[0], dtype=torch.float32).eval()
    inputs, channels = photos(assets, size), find_tower(model).channels
    first = {"pixel_values": inputs["pixel_values"][:1]}
    state = torch.randn(3, channels, generator=torch.Generator().manual_seed(0))
    neurons = {block - 1: (59, 189), block: (417,)}
    plans = {"dynamic": RegisterPlan(neurons, 3), "constant": RegisterPlan(neurons, 3, block + 1, 20 * state)}

    plain = run(model, inputs)
    for form in forms:
        with patch(model, plans[form]):
            patched, alone = run(model, inputs), run(model, first)
            twin = copy.deepcopy(model)
            half = run(model.bfloat16(), {"pixel_values": first["pixel_values"].bfloat16()})
            model.float()
        assert {path: t.shape for path, t in patched.items()} == {path: t.shape for path, t in plain.items()}, form
        assert all(tensor.isfinite().all() for tensor in patched.values()), form
        assert not same(plain, patched), form
        for path, tensor in alone.items():
            torch.testing.assert_close(tensor, patched[path][:1], rtol=1e-4, atol=1e-3)
        assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}, form
        assert same(run(twin, inputs), patched), form
        active(twin).remove()
        assert same(run(twin, inputs), plain), form
        model = twin  # whose weights were never rounded to half precision

    last = "logits" if "logits" in plain else "pooler_output"
    plain_first = run(model, first)
    with patch(model, RegisterPlan({}, registers=1)):
        inert = run(model, first)
    assert torch.cosine_similarity(inert[last], plain_first[last]).min() > 0.95
    assert not same(inert, plain_first)
    assert same(run(model, first), plain_first)


def test_the_known_neuron_of_vit_tiny_writes_its_outliers(assets):
    """Measured: (7, 417) writes outliers of 25 times the usual norm; moved into registers they are gone."""
    model = hf.ViTForImageClassification.from_pretrained(assets / "checkpoints" / "vit-tiny-augreg").eval()
    inputs = photos(assets, (224, 224), 8)
    threshold = 100.0

    def largest() -> list[float]:
        states = [tensor for path, tensor in run(model, inputs).items() if "hidden_states" in path]
        return [state[:, 1:].norm(dim=-1).max().item() for state in states[:-1]]

    before = largest()
    assert max(before[:7]) < threshold < max(before[8:])
    with patch(model, RegisterPlan({6: (59, 189), 7: (417,)}, registers=3)):
        assert max(largest()) < threshold
