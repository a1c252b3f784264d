"""One artefact planted into every family: found by its images, moved, gone, and gone after a reload as well."""

from __future__ import annotations

import pytest
import torch
from zoo import FIRST, ROWS, build, tensors

import testreg
from testreg.runtime.towers import find_tower
from testreg.testing import check_planted

BLOCK, NEURON = 1, 7


@pytest.mark.parametrize("name", FIRST)
def test_planted_neurons_are_found_moved_and_gone(name):
    check_planted(build(name)[0], ROWS[name].inputs)


@pytest.mark.parametrize("name", FIRST)
def test_a_patched_model_of_every_family_is_saved_and_comes_back(name, tmp_path):
    model, inputs = build(name)
    state = torch.ones(find_tower(model).channels)
    testreg.patch(model, testreg.RegisterPlan({BLOCK: (NEURON,)}, registers=2, entry=1, state=state))
    if not type(model).__module__.startswith("transformers."):
        with pytest.raises(testreg.UnsupportedModel, match="Keep the plan"):
            testreg.save(model, tmp_path / "clean")
        return
    with torch.no_grad():
        wanted = tensors(model(**inputs))
        found = tensors(testreg.load(testreg.save(model, tmp_path / "clean"))(**inputs))
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=0, equal_nan=True)
