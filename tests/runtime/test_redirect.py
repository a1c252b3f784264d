"""The intervention against a plain loop over images and neurons, written from the paper's text (section 4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from testreg.runtime.redirect import grow, join, move, positions, real, unturned


def loop(activation: Tensor, neurons: list[int], registers: int, fill: bool, rest: list[float]) -> Tensor:
    """`move`, one number at a time."""
    result = activation.clone()
    for image in range(activation.shape[0]):
        for place, neuron in enumerate(neurons):
            column = [activation[image, token, neuron].item() for token in range(activation.shape[1])]
            for token in range(activation.shape[1]):
                if token >= registers:
                    result[image, token, neuron] = rest[place]
                elif fill:
                    result[image, token, neuron] = max(column)
    return result


@st.composite
def cases(draw: st.DrawFn):
    batch, registers = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    tokens, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    neurons = draw(st.lists(st.integers(0, width - 1), unique=True, max_size=width).map(sorted))
    values = draw(
        st.lists(
            st.floats(-100, 100, width=16),
            min_size=batch * (registers + tokens) * width,
            max_size=batch * (registers + tokens) * width,
        )
    )
    rest = draw(st.lists(st.floats(-9, 9, width=16), min_size=len(neurons), max_size=len(neurons)))
    shaped = torch.tensor(values).reshape(batch, registers + tokens, width)
    return shaped, neurons, registers, draw(st.booleans()), rest


@given(cases())
def test_move_equals_the_loop(case):
    activation, neurons, registers, fill, rest = case
    before = activation.clone()
    moved = move(activation, torch.tensor(neurons, dtype=torch.long), registers, torch.tensor(rest), fill=fill)
    assert torch.equal(moved, loop(activation, neurons, registers, fill, rest))
    assert torch.equal(activation, before), "edited in place"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_move_keeps_the_dtype(dtype):
    activation = torch.randn(2, 5, 4).to(dtype)
    moved = move(activation, torch.tensor([1, 3]), 2, torch.tensor([0.5, 0]).to(dtype), fill=True)
    assert moved.dtype == dtype
    assert torch.equal(moved, loop(activation, [1, 3], 2, True, [0.5, 0]))


def test_every_register_gets_the_maximum_of_its_own_image_and_neuron():
    activation = torch.tensor([[[0.0, 0.0], [1.0, 8.0], [5.0, 2.0]], [[0.0, 9.0], [3.0, 4.0], [2.0, 1.0]]])
    moved = move(activation, torch.tensor([0, 1]), 1, torch.zeros(2), fill=True)
    assert moved[:, 0].tolist() == [[5, 8], [3, 9]]  # the register itself took part: 9
    assert torch.count_nonzero(moved[:, 1:]) == 0


def test_the_gradient_of_the_maximum_goes_to_the_token_that_held_it():
    activation = torch.tensor([[[0.0], [1.0], [5.0]]], requires_grad=True)
    move(activation, torch.tensor([0]), 1, torch.zeros(1), fill=True).sum().backward()
    assert activation.grad.flatten().tolist() == [0, 0, 1]


def test_join_puts_registers_in_front_of_every_image_in_the_dtype_of_the_tokens():
    tokens = torch.randn(3, 4, 2, dtype=torch.bfloat16)
    joined = join(torch.ones(1, 2, 2), tokens)
    assert joined.dtype == torch.bfloat16
    assert joined.shape == (3, 6, 2)
    assert (joined[:, :2] == 1).all()
    assert torch.equal(joined[:, 2:], tokens)


REAL = torch.tensor([[True, True, False, True], [True, False, False, True]])
ADDITIVE = torch.zeros(2, 1, 4, 4).masked_fill(~REAL[:, None, None, :], torch.finfo(torch.float32).min)


@pytest.mark.parametrize("registers", [1, 3])
@pytest.mark.parametrize(
    ("mask", "free"),
    [
        (REAL, True),
        (REAL.long(), 1),
        (REAL[:, None, None, :].expand(2, 1, 4, 4), True),
        (ADDITIVE, 0.0),
        (ADDITIVE.half(), 0.0),
        (torch.randn(1, 3, 4, 4), 0.0),  # a position bias
    ],
    ids=["bool", "long", "bool-4d", "additive", "half", "bias"],
)
def test_grown_masks_let_everyone_see_the_registers_and_change_nothing_else(registers, mask, free):
    grown = grow(mask, registers, 4)
    assert grown.dtype == mask.dtype
    assert grown.shape[-1] == 4 + registers
    assert (grown[..., :registers] == free).all()
    if mask.ndim == 2:
        assert torch.equal(grown[..., registers:], mask)
    else:
        assert grown.shape[-2] == 4 + registers
        assert torch.equal(grown[..., registers:, registers:], mask)
        rows = grown[..., :registers, registers:]  # what the registers see: all but padding
        if mask.shape[0] == 2:
            assert torch.equal(rows == free, REAL[:, None, None, :].expand_as(rows))
            assert torch.equal(real(grown)[:, registers:], REAL)
        else:
            assert (rows == free).all()
    assert real(grown)[:, :registers].all()


def test_padding_never_wins_the_maximum():
    activation = torch.tensor([[[0.0], [1.0], [9.0]], [[0.0], [3.0], [2.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    moved = move(activation, torch.tensor([0]), 1, torch.zeros(1), fill=True, real=mask)
    assert moved[:, 0, 0].tolist() == [1, 3]
    assert torch.count_nonzero(moved[:, 1:]) == 0


def test_unturned_rows_are_the_rotation_by_nothing():
    angles = torch.randn(5, 4)
    together = unturned(torch.cat([angles.sin(), angles.cos()], -1), 2)
    cosines, sines = unturned((angles.cos(), angles.sin()), 2)
    assert torch.equal(together, torch.cat([sines, cosines], -1))
    assert torch.equal(cosines[2:], angles.cos())
    assert torch.equal(sines[2:], angles.sin())
    assert (cosines[:2] == 1).all()
    assert (sines[:2] == 0).all()


def test_positions_leave_the_tokens_where_they_were():
    tokens = torch.zeros(2, 5, 8)
    assert positions(None, 2, tokens).tolist() == [[0, 0, 0, 1, 2]] * 2
    assert positions(torch.tensor([[7, 4, 9]]), 2, tokens).tolist() == [[0, 0, 7, 4, 9]]


def test_a_query_less_mask_grows_along_its_keys_only():
    grown = grow(torch.zeros(2, 1, 1, 4), 2, 4)
    assert grown.shape == (2, 1, 1, 6)
