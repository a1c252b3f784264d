"""What neurons write where the second linear has no plain weight: under adapters, and quantised."""

import warnings

import pytest
import torch
from growing import bare, grown, images
from torch import nn

import testreg
from testreg.finding.columns import columns
from testreg.runtime.towers import find_tower


class Lora(nn.Module):
    """An adapter of somebody's own: it says nothing of its sizes."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.01)

    def forward(self, activation):
        return self.base(activation) + self.up(self.down(activation))


def adapted(model):
    for block in find_tower(model).blocks:
        block.mlp.fc2 = Lora(block.mlp.fc2)
    return model


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it will go
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.parametrize("made", [adapted, quantised])
def test_columns_are_what_the_module_makes_of_each_neuron(made):
    model = bare()
    plain = model.layers[2].mlp.fc2.weight.detach().double()
    linear = made(model).layers[2].mlp.fc2
    found = columns(linear, 96, torch.zeros(0))
    if made is adapted:
        plain = plain + (linear.up.weight @ linear.down.weight).double()
    assert found.shape == (48, 96)
    assert (found - plain).abs().max() < 0.005 * plain.abs().max()


def test_a_plain_linear_is_read(monkeypatch):
    linear = nn.Linear(5, 3)
    monkeypatch.setattr(linear, "forward", lambda *_: pytest.fail("was called"))
    assert columns(linear, 5, torch.zeros(0)).equal(linear.weight.double())


@pytest.mark.parametrize("made", [adapted, quantised])
def test_planted_neurons_are_found(made):
    model, planted = grown(seed=3, where="content", neurons=2)
    model = made(model)
    plan = testreg.find(model, images(24), sizes=())
    assert {(block, neuron) for block, row in planted.neurons.items() for neuron in row} == set(plan.pairs)
    before = testreg.inspect(model, images(8, seed=1))
    with testreg.patch(model, plan):
        after = testreg.inspect(model, images(8, seed=1))
    assert before.artefact
    assert max(before.ratios) > 5 > 3 > max(after.ratios)
