"""Plans on the hub where the hub cannot be reached, and names that are none."""

from __future__ import annotations

import socket
import time

import huggingface_hub
import pytest

from testreg import BadPlan, RegisterPlan
from testreg.checkpoints import hub_files


@pytest.fixture(params=["refuses", "is silent", 503, 429])
def gone(request, hub, monkeypatch):
    """What a hub becomes that cannot be reached, when this is called."""

    def leave() -> None:
        if isinstance(request.param, int):
            hub.down = request.param
            return
        # Port 9 has nobody; this one has somebody who never says a word.
        port = silent.getsockname()[1] if request.param == "is silent" else 9
        address = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)

    monkeypatch.setattr(hub_files, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield leave


def test_a_hub_that_is_gone_leaves_what_was_loaded_once(hub, gone):
    plan = RegisterPlan({1: (2,)})
    plan.push_to_hub("me/plans")
    RegisterPlan.load("me/plans")
    gone()
    assert RegisterPlan.load("me/plans") == plan


def test_a_hub_that_is_gone_is_asked_once_and_told_in_one_sentence(hub, gone, caplog):
    gone()
    begun = time.monotonic()
    words = r"the hub cannot be reached \([^()]+\), and its cache on this disk holds no .* Try again online, or give a"
    with pytest.raises(BadPlan, match=words) as raised:
        RegisterPlan.load("me/plans")
    assert time.monotonic() - begun < 2
    assert len(hub.calls) <= 1
    assert type(raised.value) is BadPlan
    assert ".." not in str(raised.value)
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["plans", "me/my/plans", "me/my plans", "me/my--plans", "me/plans.git", "me/plans:a.safetensors", "", None]
)
def test_a_name_that_is_none_is_told_what_one_looks_like(hub, name):
    with pytest.raises(BadPlan, match="is no name on the hub: it is owner/name, where owner is an account") as raised:
        RegisterPlan({1: (2,)}).push_to_hub(name)
    assert "hf auth" not in str(raised.value)
    assert not hub.calls


@pytest.mark.parametrize("filename", ["plan.bin", "../plan.safetensors", "/plan.safetensors"])
def test_no_file_is_pushed_that_would_damage_the_list(hub, filename):
    with pytest.raises(BadPlan, match=r"no name for a plan: it is NAME.safetensors"):
        RegisterPlan({1: (2,)}).push_to_hub("me/plans", filename=filename)
    assert not hub.calls
