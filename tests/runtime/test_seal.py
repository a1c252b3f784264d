"""A seal holds while everything lies where it lay, and breaks at whatever is exchanged."""

import copy

import pytest
from torch import nn

from testreg.runtime.seal import Seal


def tower():
    return nn.Sequential(*(nn.ModuleDict({"attention": nn.Linear(2, 2), "down": nn.Linear(2, 2)}) for _ in range(3)))


def sealed(module):
    return Seal(module, [block["down"] for block in module if isinstance(block, nn.ModuleDict)])


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module[1].update({"down": nn.Linear(2, 2)}),
        lambda module: module.__setitem__(2, nn.ModuleDict({"down": module[2]["down"]})),  # a block around the same
        lambda module: module.append(nn.Identity()),
        lambda module: module.__delitem__(2),
        lambda module: module[0].update({"adapter": nn.Identity()}),
        lambda module: module[0]["down"].__dict__.update(forward=lambda tokens: tokens),
    ],
)
def test_what_is_exchanged_breaks_it(change):
    module = tower()
    seal = sealed(module)
    assert seal.holds()
    module[0]["attention"] = nn.Linear(2, 2)  # on nobody's way
    assert seal.holds()
    change(module)
    assert not seal.holds()
    assert sealed(module).holds()


def test_a_block_that_nothing_is_on_is_watched_too():
    module = tower()
    seal = Seal(module, [module[2]["down"]], list(module))
    assert seal.holds()
    module[0] = nn.Identity()
    assert not seal.holds()


def test_neither_an_empty_one_nor_a_copy_holds():
    seal = sealed(tower())
    assert not Seal().holds()
    assert not copy.deepcopy(seal).holds()


def test_what_lies_outside_cannot_be_sealed():
    module = tower()
    seal = Seal(module, [module[0]["down"], nn.Linear(2, 2)])
    assert not seal.possible
    assert not seal.holds()
    assert Seal(module, [module]).holds()  # the tower itself is on no way
