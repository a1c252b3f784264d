"""Nothing from a checkpoint is trusted: what was changed, by accident or on purpose, is refused with a clear word."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patched_models import DYNAMIC, assert_same, contents, outputs, patched
from safetensors.torch import load_file, save_file
from zoo import build

import testreg
from testreg import BadCheckpoint, BadPlan, RegisterPlan, TestregError
from testreg.checkpoints import saving as checkpoint
from testreg.checkpoints.original import is_patched, load_base
from testreg.runtime.recipe import PLAN, Recipe, config_sha256, sha256


def edit(directory: Path, *keys, value, rehashed: bool = True) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    at = values
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    if rehashed and keys[0] == "base_config" and isinstance(values["base_config"], dict):
        base_config = {key: value for key, value in values["base_config"].items() if key != "transformers_weights"}
        values["testreg"]["config"] = config_sha256(base_config)
    path.write_text(json.dumps(values))


def rehash(directory: Path, name: str) -> None:
    """What someone does who wants a changed file to pass."""
    edit(directory, "testreg", "files", name, value=sha256(directory / name))


WEIGHTS = "model.testreg.safetensors"


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("model_type",), "vit", "no checkpoint with registers"),
        (("testreg",), None, "format None"),
        (("testreg", "format"), 2, "pip install -U testreg"),
        (("testreg", "format"), True, "pip install -U testreg"),
        (("testreg", "architecture"), "system", "no model class"),
        (("testreg", "architecture"), "Trainer", "no model class"),
        (("testreg", "architecture"), "os.system", "class is"),
        (("testreg", "architecture"), "Dinov2Model", "do not belong together"),
        (("testreg", "weights"), "/etc/passwd", "weights is"),
        (("testreg", "files"), {}, "number of files"),
        (("testreg", "files"), {f"a{index}.safetensors": "0" * 64 for index in range(10_001)}, "number of files"),
        (("testreg", "files", "../secret.safetensors"), "0" * 64, "file name"),
        (("testreg", "files", "/etc/secret.json"), "0" * 64, "file name"),
        (("testreg", "files", "weights.bin"), "0" * 64, "file name"),
        (("testreg", "files", "more.safetensors"), "0" * 64, r"lacks more\.safetensors"),
        (("testreg", "files", WEIGHTS), "0" * 64, "SHA-256 differs"),
        (("testreg", "files", WEIGHTS), 7, "SHA-256 of"),
        (("testreg", "init"), {"config": None}, "init is"),
        (("testreg", "attention"), "org/kernel", "attention is"),
        (("testreg", "surprise"), 1, "surprise"),
        (("base_config",), [], "damaged"),
        (("base_config", "model_type"), "testreg", "base model type"),
        (("base_config", "model_type"), "no-such-type", "pip install -U transformers"),
        (("base_config", "model_type"), "dinov2", "do not belong together"),
        (("base_config", "quantization_config"), {"quant_method": "bitsandbytes"}, "quantization_config"),
        (("base_config", "attn_implementation"), "org/kernel", "attn_implementation"),
        (("base_config", "num_hidden_layers"), 10**9, "num_hidden_layers"),
        (("base_config", "num_hidden_layers"), 0, "without a place|no blocks"),
        (("base_config", "num_hidden_layers"), 2, "without a place"),
        (("base_config", "num_labels"), 10**9, "num_labels"),
        (("base_config", "hidden_size"), 10**6, "cannot be loaded|another model"),
        (("base_config", "intermediate_size"), 10**9, "another model"),
        (("base_config", "hidden_size"), "wide", "config is damaged"),
        (("base_config", "patch_size"), 0, "cannot be loaded"),
    ],
)
def test_a_recipe_that_lies_is_refused(keys: tuple[str, ...], value, says: str, saved: Path) -> None:
    edit(saved, *keys, value=value)
    with pytest.raises(BadCheckpoint, match=says):
        testreg.load(saved)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 1e-3), ("num_attention_heads", 2)]
)
def test_a_config_that_was_changed_is_refused_and_names_may_change(key: str, value, saved: Path) -> None:
    names = {index: f"name {index}" for index in patched()[0].config.id2label}
    edit(saved, "base_config", "id2label", value=names, rehashed=False)
    edit(saved, "base_config", "transformers_version", value="5.99.0", rehashed=False)
    assert testreg.load(saved, output_hidden_states=True).config.id2label == names
    edit(saved, "base_config", key, value=value, rehashed=False)
    for load in (testreg.load, hf.AutoModel.from_pretrained):
        with pytest.raises(BadCheckpoint, match=r"config\.json is not what was saved"):
            load(saved)
    edit(saved, "testreg", "config", value=None)
    with pytest.raises(BadCheckpoint, match="SHA-256 of the config"):
        testreg.load(saved)


def test_files_that_are_not_those_that_were_saved_are_refused(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole + b"\0"):
        (saved / WEIGHTS).write_bytes(damaged)
        with pytest.raises(BadCheckpoint, match="SHA-256"):
            testreg.load(saved)
    (saved / WEIGHTS).write_bytes(whole[:-100])
    rehash(saved, WEIGHTS)
    with pytest.raises(BadCheckpoint, match="safetensors"):
        testreg.load(saved)
    (saved / WEIGHTS).write_bytes(whole)
    rehash(saved, WEIGHTS)
    testreg.load(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(BadCheckpoint, match="lacks"):
        testreg.load(saved)


def test_weights_that_are_missing_are_never_made_up(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    dropped = next(name for name in weights if "classifier" in name)
    save_file({name: weight for name, weight in weights.items() if name != dropped}, saved / WEIGHTS, {"format": "pt"})
    rehash(saved, WEIGHTS)
    with pytest.raises(BadCheckpoint, match=dropped):
        testreg.load(saved)


def test_a_swapped_plan_is_refused(saved: Path) -> None:
    DYNAMIC.save(saved / PLAN)
    with pytest.raises(BadCheckpoint, match="SHA-256"):
        testreg.load(saved)
    RegisterPlan({9: (1,)}).save(saved / PLAN)
    rehash(saved, PLAN)
    with pytest.raises(BadPlan, match="block 9"):
        testreg.load(saved)
    with open(saved / PLAN, "r+b") as file:
        file.truncate(2**27)
    rehash(saved, PLAN)
    with pytest.raises(BadCheckpoint, match="too large"):
        testreg.load(saved)


def test_swapped_shards_and_an_index_that_leads_elsewhere_are_refused(tmp_path: Path) -> None:
    directory = testreg.save(patched()[0], tmp_path / "clean", max_shard_size="40KB")
    one, two, *_ = sorted(directory.glob("*-of-*"))
    middle = tmp_path / "middle"
    one.rename(middle), two.rename(one), middle.rename(two)
    with pytest.raises(BadCheckpoint, match="swapped"):
        testreg.load(directory)
    index = directory / checkpoint.INDEX
    values = json.loads(index.read_text())
    values["weight_map"]["classifier.bias"] = "../../secret.safetensors"
    index.write_text(json.dumps(values))
    rehash(directory, one.name), rehash(directory, two.name), rehash(directory, index.name)
    with pytest.raises(BadCheckpoint, match="leads to files"):
        testreg.load(directory)


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"])
def test_files_that_transformers_would_load_instead_are_refused(name: str, saved: Path) -> None:
    (saved / name).write_text('{"base_model_name_or_path": "another/model"}')
    with pytest.raises(BadCheckpoint, match="does not write"):
        testreg.load(saved)


def test_no_pickle_is_ever_read(saved: Path) -> None:
    for name in ("pytorch_model.bin", "model.testreg.bin", "model.safetensors"):
        (saved / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # would run a command, or be read in place
    model, inputs = patched()
    assert_same(outputs(testreg.load(saved), inputs), outputs(model, inputs))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "\xff", "1" * 5000])
def test_a_damaged_config_is_a_clear_error(text: str, saved: Path) -> None:
    (saved / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadCheckpoint):
        testreg.load(saved)


def test_what_is_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    for load in (testreg.load, load_base):
        with pytest.raises(BadCheckpoint, match="no directory"):
            load(tmp_path / "nowhere")
        with pytest.raises(BadCheckpoint, match=r"config\.json"):
            load(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(BadCheckpoint, match="is a file"):
            load(tmp_path / "file")
    build("ViTModel")[0].save_pretrained(tmp_path / "plain")
    with pytest.raises(BadCheckpoint, match="patched"):
        testreg.load(tmp_path / "plain")
    assert not is_patched(tmp_path / "plain")
    assert not is_patched(tmp_path / "nowhere")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**6, 10**30) | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=10), values, max_size=3),
    max_leaves=8,
)


def paths(values, at=()):
    yield at
    for key, value in values.items() if isinstance(values, dict) else ():
        yield from paths(value, (*at, key))


@pytest.fixture(scope="module")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list]:
    directory = testreg.save(patched()[0], tmp_path_factory.mktemp("fuzz") / "clean")
    values = json.loads((directory / "config.json").read_text())
    return directory, values, [path for path in paths(values) if path]


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_recipe_makes_the_loader_crash_or_write(specimen, data: st.DataObject) -> None:
    directory, original, places = specimen
    values = copy.deepcopy(original)
    *path, last = data.draw(st.sampled_from(places))
    at = values
    for key in path:
        at = at[key]
    at[last] = data.draw(JSON)
    (directory / "config.json").write_text(json.dumps(values))
    before = contents(directory)
    try:
        model = testreg.load(directory)
        assert testreg.active(model) is not None
    except TestregError:
        pass  # the only error there may be
    assert contents(directory) == before
    assert len(list(directory.parent.iterdir())) == 1


@given(JSON)
def test_no_json_at_all_makes_the_recipe_crash(values) -> None:
    for whole in (values, {"model_type": "testreg", "testreg": values, "base_config": values}):
        with pytest.raises(BadCheckpoint):
            Recipe.from_config(whole)
