"""`RegisterPlan`: a value that survives its file, and files that nobody has to trust."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file

from testreg import BadPlan, RegisterPlan

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NEURONS = st.dictionaries(
    st.integers(0, 50), st.lists(st.integers(0, 5000), unique=True, max_size=5).map(tuple), max_size=5
)
FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def plans(draw: st.DrawFn) -> RegisterPlan:
    registers = draw(st.integers(1, 8))
    state = draw(
        st.none()
        | arrays("float32", st.just((registers, 4)), elements=st.floats(-1e6, 1e6, width=32)).map(torch.tensor)
    )
    provenance = draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
    plan = RegisterPlan(draw(NEURONS), registers, draw(st.integers(0, 50)), state, provenance=provenance)
    numbers = st.floats(-9, 9, allow_nan=False)
    rest = {block: draw(st.lists(numbers, min_size=len(row), max_size=len(row))) for block, row in plan.neurons.items()}
    return replace(plan, rest=rest if draw(st.booleans()) else None)


@FILES
@given(plans())
def test_a_plan_survives_its_file(tmp_path, plan):
    plan.save(tmp_path / "plan.safetensors")
    loaded = RegisterPlan.load(tmp_path / "plan.safetensors")
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert loaded.provenance == json.loads(json.dumps(plan.provenance))
    assert RegisterPlan.from_dict(json.loads(json.dumps(plan.to_dict())), plan.state) == plan


@FILES
@given(st.binary(max_size=200))
def test_any_bytes_are_a_bad_plan(tmp_path, data):
    (tmp_path / "plan").write_bytes(data)
    with pytest.raises(BadPlan, match="plan"):
        RegisterPlan.load(tmp_path / "plan")


@FILES
@given(plans(), st.integers(0, 4000), st.integers(0, 255))
def test_a_damaged_file_is_a_bad_plan_or_still_a_plan(tmp_path, plan, where, byte):
    path = tmp_path / "plan"
    plan.save(path)
    data = bytearray(path.read_bytes())
    data[where % len(data)] = byte
    path.write_bytes(data[: len(data) - where % 3])
    try:
        assert isinstance(RegisterPlan.load(path), RegisterPlan)
    except BadPlan:
        assert bytes(data) != b""


@FILES
@given(JSON | st.fixed_dictionaries({}, optional={
    "version": st.just(1) | JSON,
    "neurons": st.dictionaries(st.text(max_size=3) | st.just("7"), JSON, max_size=2) | JSON,
    "registers": st.integers() | JSON, "entry": st.integers() | JSON, "rest": JSON, "form": st.just("dynamic") | JSON,
    "provenance": JSON,
}))  # fmt: skip
def test_any_json_gives_a_plan_or_a_bad_plan(tmp_path, values):
    def read(reader):
        with suppress(BadPlan):
            return reader()

    plan = read(lambda: RegisterPlan.from_dict(values))
    save_file({}, str(tmp_path / "plan"), metadata={"format": "testreg-plan", "plan": json.dumps(values)})
    assert read(lambda: RegisterPlan.load(tmp_path / "plan")) == plan
    if plan is not None:
        assert RegisterPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"neurons": [1, 2]}, "neurons must map blocks to neurons"),
        ({"neurons": {7: 417}}, "must be a sequence"),
        ({"neurons": {7: "417"}}, "must be a sequence"),
        ({"neurons": {7: (1, 1)}}, "names a neuron twice"),
        ({"neurons": {-1: (1,)}}, "whole number from 0"),
        ({"neurons": {7: (1.5,)}}, "whole number from 0"),
        ({"neurons": {7: (True,)}}, "whole number from 0"),
        ({"neurons": {}, "registers": -1}, "registers must be a whole number"),
        ({"neurons": {}, "registers": 10**9}, "at most 1024"),
        ({"neurons": {}, "entry": 0.5}, "entry must be"),
        ({"neurons": {7: (1, 2)}, "rest": {7: (0.5,)}}, "rest must hold one number per register neuron"),
        ({"neurons": {7: (1, 2)}, "rest": {8: (0.5, 0.5)}}, "rest must hold one number per register neuron"),
        ({"neurons": {7: (1, 2)}, "rest": 0.5}, "rest must hold one number per register neuron"),
        ({"neurons": {7: (1,)}, "rest": {7: (float("nan"),)}}, "no finite number"),
        ({"neurons": {7: (1,)}, "rest": {7: ("0.5",)}}, "no finite number"),
        ({"neurons": {7: (1,)}, "rest": {7: (10**400,)}}, "no finite number"),
        ({"neurons": {7: (10**5000,)}}, "whole number from 0, not one of many digits"),
        ({"neurons": {}, "registers": -(10**5000)}, "whole number from 0, not one of many digits"),
        ({"neurons": {}, "registers": 2, "state": torch.zeros(3, 4)}, r"\(3, 4\); 2 registers need"),
        ({"neurons": {}, "state": torch.tensor([0.0, float("nan")])}, "NaN or infinity"),
    ],
)
def test_values_out_of_range(values, says):
    with pytest.raises(BadPlan, match=says):
        RegisterPlan(**values)


def test_missing_file_and_other_files(tmp_path):
    with pytest.raises(BadPlan, match="cannot be read"):
        RegisterPlan.load(tmp_path / "nothing")
    with pytest.raises(BadPlan, match="cannot be read"):
        RegisterPlan.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(BadPlan, match="no register plan"):
        RegisterPlan.load(tmp_path / "model.safetensors")


def test_equality_is_what_it_does_to_a_model():
    plan = RegisterPlan({7: [417], 3: ()}, 2, 1, torch.ones(4), {"from": "here"})
    assert plan == RegisterPlan({7: (417,)}, 2, 1, torch.ones(2, 4), {"from": "there"})
    others = [
        RegisterPlan({7: (418,)}, 2, 1, torch.ones(4)),
        RegisterPlan({7: (417,)}, 3, 1, torch.ones(4)),
        RegisterPlan({7: (417,)}, 2, 2, torch.ones(4)),
        RegisterPlan({7: (417,)}, 2, 1, torch.zeros(4)),
        RegisterPlan({7: (417,)}, 2, 1),
        replace(plan, rest={7: (0.5,)}),
    ]
    assert all(plan != other for other in others)
    assert plan != "plan"
    assert len({plan, RegisterPlan({7: (417,)}, 2, 1, torch.ones(2, 4))}) == 1


def test_a_plan_is_frozen_and_keeps_its_own_state():
    state = torch.ones(1, 4)
    plan = RegisterPlan({7: (417, 3)}, state=state)
    state.zero_()
    assert (plan.state == 1).all()
    assert plan.neurons == {7: (3, 417)}
    assert plan.pairs == ((7, 3), (7, 417))
    assert (
        str(plan)
        == "1 constant register joining with the embeddings; 2 register neurons (block, neuron): (7, 3), (7, 417)"
    )
    with pytest.raises(AttributeError):
        plan.registers = 2
