"""Plans on the hub, against a server on the loopback interface that speaks as the hub's client expects."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import zoo
from click.testing import CliRunner
from hub_server import Hub
from huggingface_hub import ModelCard

import testreg
from testreg import BadPlan, RegisterPlan
from testreg.checkpoints import sharing
from testreg.cli.group import main
from testreg.runtime.fingerprint import describe

BLOCKS = [{"median": 1.0 + i, "p99": 2.0 + i, "largest": 30.0, "share": 0.02, "images": 1.0} for i in range(3)]


def made_for(name: str, called: str, **fields) -> tuple[torch.nn.Module, RegisterPlan]:
    """A model, and a plan that says it was found on it."""
    model, _ = zoo.build(name)
    model.name_or_path = called
    fields = {"neurons": {1: (3, 7)}, **fields}
    provenance = {
        "base": describe(model, fields["neurons"]),
        "blocks": BLOCKS,
        "before": {"outlier_patches": 0.02, "output_cosine": 1.0},
        "after": {"outlier_patches": 0.0, "output_cosine": 0.9993},
    }
    return model, RegisterPlan(**fields, provenance=provenance)


def files(hub: Hub, name: str) -> dict[str, bytes]:
    return hub.repositories[name][-1][1]


def test_a_plan_makes_the_round_trip_and_says_where_it_comes_from(hub):
    model, plan = made_for("ViTModel", "google/vit-tiny", registers=2, entry=1, state=torch.arange(32.0))
    address = plan.push_to_hub("me/plans")
    commit = hub.repositories["me/plans"][-1][0]
    assert address == f"{hub.url}/me/plans/commit/{commit}"
    back = RegisterPlan.load("me/plans")
    assert back == plan
    assert back.provenance["hub"] == {
        "name": "me/plans", "file": "google--vit-tiny.safetensors", "revision": commit, "force": False,
    }  # fmt: skip
    assert {key: value for key, value in back.provenance.items() if key != "hub"} == plan.provenance
    assert RegisterPlan.load("me/plans", model=model) == plan


def test_the_card_has_the_model_the_numbers_and_a_picture(hub):
    made_for("ViTModel", "google/vit-tiny")[1].push_to_hub("me/plans")
    tree = files(hub, "me/plans")
    card = ModelCard(tree["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": ["google/vit-tiny"], "library_name": "testreg", "tags": ["testreg", "test-time-registers"],
    }  # fmt: skip
    assert "| outlier patches | 0.02 | 0 |" in card.text
    assert "| output cosine | 1 | 0.9993 |" in card.text
    assert "(google--vit-tiny.png)" in card.text
    assert tree["google--vit-tiny.png"].startswith(b"\x89PNG")
    assert 'RegisterPlan.load("me/plans", model=model)' in card.text
    (row,) = json.loads(tree["plans.json"]).values()
    assert (row["model"], row["form"], row["registers"]) == ("google/vit-tiny", "dynamic", 1)


def test_of_many_plans_that_of_the_models_weights_is_taken_whatever_its_precision(hub):
    vit, one = made_for("ViTModel", "google/vit-tiny")
    dino, other = made_for("Dinov2Model", "facebook/dino-tiny", neurons={2: (5,)})
    one.push_to_hub("me/plans")
    other.push_to_hub("me/plans")
    assert RegisterPlan.load("me/plans", model=vit) == one
    assert RegisterPlan.load("me/plans", model=dino) == other
    assert RegisterPlan.load("me/plans", model=dino.to(torch.bfloat16)) == other
    assert RegisterPlan.load("me/plans:facebook--dino-tiny.safetensors") == other
    assert RegisterPlan.load("me/plans", filename="google--vit-tiny.safetensors") == one
    text = files(hub, "me/plans")["README.md"].decode()
    assert "| google/vit-tiny | `google--vit-tiny.safetensors` | 1 dynamic | 0.02 to 0 | 1 to 0.9993 |" in text
    assert "(facebook--dino-tiny.png)" in text
    with pytest.raises(BadPlan, match=r"holds 2 plans \(facebook--dino-tiny.safetensors, google.*me/plans:FILE"):
        RegisterPlan.load("me/plans")
    with testreg.patch(dino, "me/plans") as patched:
        assert patched.plan == other
    stranger, _ = zoo.build("DeiTModel")
    stranger.name_or_path = "facebook/deit-tiny"
    with pytest.raises(
        BadPlan, match=r"no plan for the weights of 'facebook/deit-tiny'; it has some for facebook/dino"
    ):
        RegisterPlan.load("me/plans", model=stranger)
    assert sharing.has_plan(dino, ("me/plans",)) == "me/plans:facebook--dino-tiny.safetensors"
    assert sharing.has_plan(stranger, ("me/plans",)) is None


def test_a_plan_from_the_hub_is_checked_against_the_model_before_it_acts(hub):
    model, plan = made_for("ViTModel", "google/vit-tiny")
    plan.push_to_hub("me/plans")
    with torch.no_grad():
        model.layers[2].mlp.fc2.weight[0, 0] += 1  # of the same shapes, and other weights
    with pytest.raises(BadPlan, match="no plan for the weights"):
        RegisterPlan.load("me/plans", model=model)
    with pytest.raises(BadPlan, match=r"was found on 'google/vit-tiny'.* has other weights"):
        RegisterPlan.load("me/plans:google--vit-tiny.safetensors", model=model)
    with pytest.raises(BadPlan, match="has other weights"):
        testreg.patch(model, RegisterPlan.load("me/plans"))
    assert testreg.active(model) is None
    with testreg.patch(model, RegisterPlan.load("me/plans", force=True)) as patched:
        assert patched.plan == plan


def test_the_list_is_not_believed_where_it_lies(hub):
    """A list that gives another model's plan for this one's leads to a refusal, not to a patch."""
    model, plan = made_for("ViTModel", "google/vit-tiny")
    _, other = made_for("DeiTModel", "facebook/deit-tiny")
    other.push_to_hub("me/plans")
    rows = json.loads(files(hub, "me/plans")["plans.json"])
    rows["facebook--deit-tiny.safetensors"]["fingerprint"] = plan.provenance["base"]["fingerprint"]
    hub.commit("me/plans", {"plans.json": json.dumps(rows).encode()})
    with pytest.raises(BadPlan, match="was found on 'facebook/deit-tiny'"):
        RegisterPlan.load("me/plans", model=model)


@pytest.mark.parametrize(
    "rows", [b"[]", b"{", b'{"../x.safetensors": {}}', b'{"a.txt": {}}', b'{"a.safetensors": 1}', b"\xff"]
)
def test_a_damaged_list_is_an_error_that_says_what_to_do(hub, rows):
    hub.commit("me/plans", {"plans.json": rows})
    with pytest.raises(BadPlan, match="Name a plan, as in me/plans:FILE"):
        RegisterPlan.load("me/plans")


def test_revisions_and_folders(hub):
    _, one = made_for("ViTModel", "google/vit-tiny")
    _, two = made_for("ViTModel", "google/vit-tiny", neurons={0: (1,)})
    one.push_to_hub("me/plans", filename="sub/a.safetensors")
    first = hub.repositories["me/plans"][-1][0]
    two.push_to_hub("me/plans", filename="sub/a.safetensors")
    assert RegisterPlan.load("me/plans") == two
    assert RegisterPlan.load("me/plans", revision=first) == one
    assert RegisterPlan.load(f"me/plans@{first}") == one
    assert RegisterPlan.load(f"me/plans@{first}:sub/a.safetensors") == one
    assert RegisterPlan.load("me/plans", subfolder="sub", filename="a.safetensors") == two
    assert RegisterPlan.load("me/plans", subfolder="sub") == two
    with pytest.raises(BadPlan, match="no plan can be had from the hub under that name"):
        RegisterPlan.load("me/plans@nowhere")


def test_a_patched_checkpoint_gives_its_plan(hub, tmp_path):
    model, plan = made_for("ViTModel", "google/vit-tiny")
    testreg.patch(model, plan)
    testreg.save(model, tmp_path / "clean")
    hub.commit("me/clean", {file.name: file.read_bytes() for file in (tmp_path / "clean").iterdir()})
    assert RegisterPlan.load("me/clean") == plan
    assert RegisterPlan.load(tmp_path / "clean") == plan


def test_cached_and_offline(hub, monkeypatch):
    model, plan = made_for("ViTModel", "google/vit-tiny")
    plan.push_to_hub("me/plans")
    assert RegisterPlan.load("me/plans", model=model) == plan
    before = [path for method, path in hub.calls if method == "GET"]
    assert RegisterPlan.load("me/plans", model=model) == plan
    assert [path for method, path in hub.calls if method == "GET"] == before  # asked whether it is current, no more
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    calls = len(hub.calls)
    assert RegisterPlan.load("me/plans", model=model) == plan
    assert RegisterPlan.load("me/plans", local_files_only=True) == plan
    assert len(hub.calls) == calls
    with pytest.raises(BadPlan, match=r"\(HF_HUB_OFFLINE=1 is set\), and its cache.* holds no reg.* of me/o"):
        RegisterPlan.load("me/others")


def test_who_commits_meanwhile_loses_nothing(hub):
    _, one = made_for("ViTModel", "google/vit-tiny")
    _, two = made_for("Dinov2Model", "facebook/dino-tiny")
    hub.before_commit = lambda: two.push_to_hub("me/plans")
    one.push_to_hub("me/plans")
    assert set(json.loads(files(hub, "me/plans")["plans.json"])) == {
        "google--vit-tiny.safetensors", "facebook--dino-tiny.safetensors",
    }  # fmt: skip


def test_another_models_plan_is_not_replaced_and_a_card_of_ones_own_stays(hub):
    _, one = made_for("ViTModel", "me/mine")
    _, two = made_for("Dinov2Model", "me/mine")
    hub.commit("me/plans", {"README.md": b"# My own words"})
    one.push_to_hub("me/plans")
    with pytest.raises(BadPlan, match=r"has a plan me--mine.safetensors for 'me/mine' already.*--push me/plans:NAME"):
        two.push_to_hub("me/plans")
    assert RegisterPlan.load("me/plans") == one
    two.push_to_hub("me/plans", force=True)
    assert RegisterPlan.load("me/plans") == two
    assert files(hub, "me/plans")["README.md"] == b"# My own words"


def test_a_plan_without_provenance_is_shared_under_the_usual_name(hub):
    plan = RegisterPlan({1: (2,)})
    plan.push_to_hub("me/bare")
    assert RegisterPlan.load("me/bare") == plan
    model, _ = zoo.build("ViTModel")
    with pytest.raises(BadPlan, match="does not say on which weights it was found"):
        testreg.patch(model, "me/bare:registers.safetensors")
    with testreg.patch(model, RegisterPlan.load("me/bare", force=True)), testreg.patch(model, plan):
        pass
    assert set(files(hub, "me/bare")) == {".gitattributes", "registers.safetensors", "plans.json", "README.md"}


@pytest.mark.parametrize("name", ["me/none", "me/plans:nothing.safetensors"])
def test_what_is_not_there_is_an_error(hub, name):
    RegisterPlan({1: (2,)}).push_to_hub("me/plans")
    with pytest.raises(BadPlan, match="hub"):
        RegisterPlan.load(name)


def test_what_cannot_be_pushed_is_an_error_that_keeps_the_plan(hub, monkeypatch):
    monkeypatch.setattr(sharing, "HfApi", lambda token=None: huggingface_hub.HfApi("http://127.0.0.1:9", token=token))
    with pytest.raises(BadPlan, match=r"could not be written to me/plans.*found.save\(FILE\)"):
        RegisterPlan({1: (2,)}).push_to_hub("me/plans")


def test_a_file_that_is_not_there_is_none_of_the_hubs():
    for path in ("folder/plan.safetensors", "./plan", "/nowhere/at/all", "plan"):
        with pytest.raises(BadPlan, match="cannot be read as a register plan"):
            RegisterPlan.load(path)


def test_the_command_line_pushes_finds_and_checks(hub, tmp_path, monkeypatch):
    from testreg.demo.demonstration import write

    model, photos = write(tmp_path / "demo")
    runner = CliRunner()

    def run(*arguments: object, code: int = 0) -> str:
        result = runner.invoke(main, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        return result.output

    said = run("find", model, "--images", photos, "--push", "me/plans")
    assert f"Plan on the hub: {hub.url}/me/plans/commit/" in said
    assert "--plans me/plans --out DIRECTORY" in said
    run("patch", model, "--images", photos, "--plans", "me/plans", "--out", tmp_path / "clean")
    run("patch", model, "--images", photos, "--plan", "me/plans", "--out", tmp_path / "again")
    plan = RegisterPlan.load("me/plans")
    assert RegisterPlan.load(tmp_path / "clean") == RegisterPlan.load(tmp_path / "again") == plan
    assert testreg.active(testreg.load(tmp_path / "clean")).plan.provenance["hub"]["name"] == "me/plans"

    other = testreg.checkpoints.load_base(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1)
        testreg.runtime.towers.find_tower(other).downs[0].weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_bytes(
        (Path(model) / "preprocessor_config.json").read_bytes()
    )
    given = ("patch", tmp_path / "other", "--images", photos, "--out", tmp_path / "no")
    assert "has other weights" in run(*given, "--plan", "me/plans", code=1)
    assert "holds no plan for the weights of 'other'" in run(*given, "--plans", "me/plans", code=1)
    run(*given, "--plan", "me/plans", "--force")
    run(*given, "--plan", "me/plans", "--plans", "me/plans", code=2)
    assert "is no name on the hub" in run("find", model, "--images", photos, "--push", "nothing", code=2)
    assert "no name for a plan" in run("find", model, "--images", photos, "--push", "me/plans:plan.bin", code=2)
