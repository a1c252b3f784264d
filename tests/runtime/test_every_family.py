"""One artefact planted into every family: found by its images, moved, gone, and gone after a reload as well."""

from __future__ import annotations

import pytest
import torch
from artefact import BLOCK, IMAGES, NEURON, marked, norms, plant
from torch import Tensor
from zoo import FIRST, build, tensors

import testreg
from testreg.finding.detect import rank, valley
from testreg.finding.scan import scan
from testreg.finding.search import located
from testreg.images.streaming import Batch
from testreg.runtime.towers import find_tower


@pytest.mark.parametrize("name", FIRST)
def test_planted_neurons_are_found_moved_and_gone(name):
    model, _ = build(name)
    inputs, special = marked(name)
    tower = find_tower(model)
    clean = norms(model, inputs)
    tokens = clean.shape[-1]
    if special.shape[1] != tokens:
        special = special.repeat(1, tokens // special.shape[1])  # videos: the patch is loud in every frame
    if name == "ViTMAEModel":
        order = inputs["noise"].argsort(1)
        special = special.gather(1, order)
    if name == "MaskedAutoencoderViT":
        special = special[:, model.noise[0].argsort()]
    plant(model, inputs, torch.cat([torch.zeros(IMAGES, tower.prefix, dtype=torch.bool), special], 1))
    spoilt = norms(model, inputs)
    threshold = 5 * spoilt[BLOCK].median()
    assert (clean < threshold).all()
    assert (spoilt[BLOCK:, special] > threshold).all()
    assert ((spoilt[BLOCK:] > threshold) == special).float().mean() > 0.9  # without bias it fires elsewhere, too

    given = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    seen, sample = scan(model, tower, [Batch(given, tuple(map(str, range(IMAGES))))])
    found = located(seen, valley(seen))
    ranking = rank(model, tower, list(sample), found, IMAGES, blocks=range(len(tower.blocks)), entries=())
    assert (ranking.candidates[0].block, ranking.candidates[0].neuron) == (BLOCK, NEURON)

    state = spoilt.new_ones(tower.channels)
    for plan in (
        testreg.RegisterPlan({BLOCK: (NEURON,)}, registers=2),
        testreg.RegisterPlan({BLOCK: (NEURON,)}, registers=2, entry=BLOCK + 1, state=state),
    ):
        with testreg.patch(model, plan):
            assert (norms(model, inputs) < threshold).all()


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
