"""Towers that take all images as one sequence: each image has registers of its own, as if it were alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import packed
import pytest
import torch
import zoo
from packed import ROWS, build, grids, inputs
from torch import Tensor, nn
from zoo import tensors

from testreg import BadPlan, RegisterPlan, TestregError, UnsupportedModel, active, patch
from testreg.runtime import packed as places
from testreg.runtime.law import Law
from testreg.runtime.towers import find_tower

EVERY = pytest.mark.parametrize("name", list(ROWS))
QWEN = pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
NEURONS = {0: (1, 5), 2: (0, 31)}
REST = {0: (0.5, -1.0), 2: (0.0, 2.0)}


def plan(model: nn.Module, registers: int = 3, entry: int = 1, law: Law | None = None) -> RegisterPlan:
    tower = find_tower(model)
    shape = (len(tower.blocks) - entry, registers, tower.channels)
    state = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return RegisterPlan(NEURONS, registers=registers, entry=entry, state=state, rest=REST, law=law)


def states(model: nn.Module, given: dict) -> list[Tensor]:
    """The output of every block `(tokens, channels)`, and whatever the model says."""
    tower, found = find_tower(model), []
    handles = [
        block.register_forward_hook(lambda module, args, output: found.append(tower.batched(output)[0]))
        for block in tower.blocks
    ]
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return found


def cast(given: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}


def apart(name: str, model: nn.Module, wanted: Sequence[packed.Grid], dtype: torch.dtype) -> list[Tensor]:
    """The output of every block for images one by one, in one sequence again."""
    alone = [states(model, cast(inputs(name, [grid]), dtype)) for grid in wanted]
    return [torch.cat(parts) for parts in zip(*alone, strict=True)]


@EVERY
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_three_images_packed_equal_each_alone(name, attention):
    model = build(name).double()
    model.set_attn_implementation(attention)
    before = states(model, cast(inputs(name, grids(name)), torch.float64))
    with patch(model, plan(model)):
        together = states(model, cast(inputs(name, grids(name)), torch.float64))
        single = apart(name, model, grids(name), torch.float64)
    for block, (found, wanted, plain) in enumerate(zip(together, single, before, strict=True)):
        assert (found - wanted).abs().max() < 1e-10
        assert (found - plain).abs().max() > 1e-3, f"block {block} is as without registers"


@EVERY
def test_off_is_off(name):
    model, given = build(name), inputs(name, grids(name))
    before, keys = states(model, given), [list(module.__dict__) for module in model.modules()]
    for entry in (0, 2):
        with patch(model, plan(model, entry=entry)):
            assert not all(map(torch.equal, states(model, given), before))
        assert all(map(torch.equal, states(model, given), before))
    assert [list(module.__dict__) for module in model.modules()] == keys
    assert active(model) is None


@EVERY
def test_every_output_keeps_its_shape(name):
    model, given = build(name), inputs(name, grids(name))
    with torch.no_grad():
        before = tensors(model(**given, output_hidden_states=True))
        with patch(model, plan(model)):
            after = tensors(model(**given, output_hidden_states=True))
    assert {path: tensor.shape for path, tensor in after.items()} == {path: t.shape for path, t in before.items()}


@EVERY
def test_a_copy_owns_its_patch(name):
    model, given = build(name), inputs(name, grids(name))
    patch(model, plan(model))
    wanted = states(model, given)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(map(torch.equal, states(twin, given), wanted))


@EVERY
def test_token_forms_are_refused_with_the_reason(name):
    model = build(name)
    for state in (None, torch.ones(find_tower(model).channels)):
        with pytest.raises(BadPlan, match=r"packs the patches of all images into one sequence.*form='attention'"):
            patch(model, RegisterPlan({1: (3,)}, registers=2, entry=0 if state is None else 1, state=state))
    patch(model, RegisterPlan({1: (3,)}, registers=0)).remove()  # neurons at rest, no register


class Loop:
    """An attention over images one by one, written out: rows that only keys and values have, turned by nothing."""

    def __init__(self, attention: nn.Module, rows: Tensor | None):
        self.attention, self.rows = attention, rows

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple, **_) -> Tensor:
        heads, bounds = self.attention.num_heads, cu_seqlens.tolist()
        cosines, sines = (table[:, None] for table in position_embeddings)  # (tokens, 1, channels)
        found = []
        for start, end in pairwise(bounds):
            query, key, value = self.attention.qkv(hidden_states[start:end]).unflatten(-1, (3, heads, -1)).unbind(1)
            query, key = (
                part * cosines[start:end]
                + torch.cat([-part.chunk(2, -1)[1], part.chunk(2, -1)[0]], -1) * sines[start:end]
                for part in (query, key)
            )
            if self.rows is not None:
                _, more_keys, more_values = self.attention.qkv(self.rows).unflatten(-1, (3, heads, -1)).unbind(1)
                key, value = torch.cat([more_keys, key]), torch.cat([more_values, value])
            scores = torch.einsum("qhc,khc->hqk", query, key) / query.shape[-1] ** 0.5
            found.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), value).flatten(1))
        return self.attention.proj(torch.cat(found))


@QWEN
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_registers_are_keys_and_values_of_every_image(name, attention):
    """Against a loop over images that concatenates them to the keys and values."""
    model, given = build(name), inputs(name, grids(name))
    model.set_attn_implementation(attention)
    wanted_of, found_of = plan(model), build(name)
    tower = find_tower(found_of)
    for index, attend in enumerate(tower.attentions):
        attend.forward = Loop(attend, wanted_of.state[index - 1] if index else None)
    for index, neurons in NEURONS.items():
        tower.downs[index].register_forward_pre_hook(
            lambda module, args, neurons=neurons, index=index: args[0].index_copy(
                -1, torch.tensor(neurons), torch.tensor(REST[index]).expand(*args[0].shape[:-1], -1)
            )
        )
    with patch(model, wanted_of):
        found = states(model, given)
    for mine, theirs in zip(found, states(found_of, given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@QWEN
def test_the_law_counts_every_segment_by_its_own_length(name):
    model, law = build(name).double(), Law(slope=0.1, offset=0.5, fewest=16, most=64)
    with patch(model, plan(model, law=law)):
        together = states(model, cast(inputs(name, grids(name)), torch.float64))
        single = apart(name, model, grids(name), torch.float64)
    with patch(model, plan(model)):
        constant = states(model, cast(inputs(name, grids(name)), torch.float64))
    for found, wanted in zip(together, single, strict=True):
        assert (found - wanted).abs().max() < 1e-10
    assert (together[-1] - constant[-1]).abs().max() > 1e-6


def test_rows_that_images_share_need_a_mask():
    model = build("Pixtral")
    with patch(model, plan(model)), pytest.raises(UnsupportedModel, match=r"set_attn_implementation\('sdpa'\)"):
        find_tower(model).attentions[1](torch.zeros(1, 8, 32), None, cu_seq_lens_q=torch.tensor([0, 4, 8]))


# RADIO takes images of one size as others do, and of several sizes packed


def radio(sizes: Sequence[tuple[int, int]]) -> dict:
    patches = [packed._noise((1, *size), (size[0] * size[1], 3 * zoo.PATCH**2)) for size in sizes]
    return {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(sizes)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_radio_packed_equals_each_alone(attention):
    model, _ = zoo.build("RadioModel")
    model.double().set_attn_implementation(attention)
    sizes = [(4, 3), (2, 4), (3, 3)]

    def features(wanted: Sequence[tuple[int, int]]) -> Tensor:
        with torch.no_grad():
            return model(**cast(radio(wanted), torch.float64)).features.flatten(0, -2)

    with patch(model, plan(model)):
        together, single = features(sizes), torch.cat([features([size]) for size in sizes])
    assert (together - single).abs().max() < 1e-10
    assert (together - features(sizes)).abs().max() > 1e-3
    with (
        patch(model, RegisterPlan({1: (3,)}, registers=2)),
        pytest.raises(TestregError, match="packed into one sequence"),
    ):
        features(sizes)


# The tensors


def test_places_of_registers_in_a_packed_sequence():
    at = places.places(torch.tensor([0, 2, 5, 6]), 6, 2)
    tokens = torch.arange(10.0, 16.0)[:, None]
    joined = places.join(torch.tensor([[1.0], [2.0]]), tokens, at)
    assert joined.flatten().tolist() == [1, 2, 10, 11, 1, 2, 12, 13, 14, 1, 2, 15]
    assert at.segments.tolist() == [0, 4, 9, 12]
    assert torch.equal(places.leave(joined, at), tokens)
    cosines, sines = places.unturned((tokens, tokens), at)
    assert cosines.flatten().tolist() == [1, 1, 10, 11, 1, 1, 12, 13, 14, 1, 1, 15]
    assert sines.flatten().tolist() == [0, 0, 10, 11, 0, 0, 12, 13, 14, 0, 0, 15]
    assert (places.longest(3, at), places.longest(None, at)) == (5, None)


def test_counts_deal_the_rows_by_their_shares():
    at = places.places(torch.tensor([0, 2, 5, 6]), 6, 2, [4, 1, 0])
    joined = places.join(torch.tensor([[1.0], [2.0]]), torch.arange(10.0, 16.0)[None, :, None], at)
    assert joined.flatten().tolist() == [1, 1, 2, 2, 10, 11, 2, 12, 13, 14, 15]
    assert at.segments.tolist() == [0, 6, 10, 11]
    assert places.leave(joined, at).flatten().tolist() == [10, 11, 12, 13, 14, 15]
    assert places.longest(torch.tensor(3), at) == 7
