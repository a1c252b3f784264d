"""A saved model comes back bit for bit, or not at all: never without its registers, never half, never another one."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from zoo import CHANNELS, TEXT, VISION, build, tensors

import testreg
from testreg import BadCheckpoint, BadPlan, RegisterPlan, TestregError, UnsupportedModel
from testreg.checkpoints import atomic, original
from testreg.checkpoints import saving as checkpoint
from testreg.checkpoints.original import is_patched, load_base
from testreg.runtime import fingerprint as base
from testreg.runtime import modeling_testreg as modeling
from testreg.runtime.errors import RegistersLeftOut
from testreg.runtime.recipe import PLAN, Recipe, config_sha256, sha256

NEURONS = {0: (1, 5), 2: (47,)}
HOW_TO_LOAD = "testreg.load"


def constant(channels: int = CHANNELS, seed: int = 0, **provenance) -> RegisterPlan:
    state = 3 * torch.randn(2, channels, generator=torch.Generator().manual_seed(seed))
    return RegisterPlan(NEURONS, registers=2, entry=1, state=state, provenance=provenance)


DYNAMIC = RegisterPlan(NEURONS, registers=3)


def patched(name: str = "ViTForImageClassification", plan: RegisterPlan | None = None):
    model, inputs = build(name)
    testreg.patch(model, constant() if plan is None else plan)
    return model, inputs


@torch.no_grad()
def outputs(model, inputs) -> dict[str, torch.Tensor]:
    return tensors(model(**inputs))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(directory.iterdir())}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return testreg.save(patched()[0], tmp_path / "clean")


# What comes back


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("ViTModel", constant()),
        ("ViTForImageClassification", DYNAMIC),
        ("DeiTForImageClassification", constant()),
        ("Dinov2Model-SwiGLU", constant()),
        ("Dinov2Backbone", DYNAMIC),
        ("Dinov2WithRegistersModel", constant()),
        ("CLIPVisionModel", DYNAMIC),
        ("CLIPModel", DYNAMIC),
        ("SiglipVisionModel", constant()),
        ("Idefics2VisionTransformer", DYNAMIC),  # a class that transformers itself does not export
    ],
)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(name: str, plan: RegisterPlan, tmp_path: Path) -> None:
    model, inputs = patched(name, plan)
    loaded = testreg.load(testreg.save(model, tmp_path / "clean"))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert testreg.active(loaded).plan == plan
    assert_same(outputs(loaded, inputs), outputs(model, inputs))
    testreg.active(loaded).remove()
    testreg.active(model).remove()
    assert_same(outputs(loaded, inputs), outputs(model, inputs))  # the weights are the unpatched model's


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_shards_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = patched()
    model, inputs = model.to(dtype), {name: tensor.to(dtype) for name, tensor in inputs.items()}
    directory = testreg.save(model, tmp_path / "clean", max_shard_size="20KB")
    assert len(list(directory.glob("*-of-*.safetensors"))) > 2
    loaded = testreg.load(directory)
    assert loaded.dtype == dtype
    assert_same(outputs(loaded, inputs), outputs(model, inputs))
    assert testreg.load(directory, dtype=torch.float32).dtype == torch.float32


def test_the_attention_implementation_and_a_missing_pooler_come_back(tmp_path: Path) -> None:
    model, inputs = build("ViTModel")
    model = hf.ViTModel(model.config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    testreg.patch(model, DYNAMIC)
    loaded = testreg.load(testreg.save(model, tmp_path / "clean"))
    assert loaded.pooler is None
    assert loaded.config._attn_implementation == "eager"
    assert_same(outputs(loaded, inputs), outputs(model, inputs))
    for load in (testreg.load, hf.AutoModel.from_pretrained):
        assert load(tmp_path / "clean", attn_implementation="sdpa").config._attn_implementation == "sdpa"
        assert load(tmp_path / "clean", output_hidden_states=True).config.output_hidden_states
    clip, inputs = build("CLIPModel")
    clip.set_attn_implementation("eager")
    testreg.patch(clip, DYNAMIC)
    loaded = testreg.load(testreg.save(clip, tmp_path / "clip"))
    assert loaded.vision_model.config._attn_implementation == "eager"
    assert_same(outputs(loaded, inputs), outputs(clip, inputs))


def test_a_vision_language_model_comes_back(tmp_path: Path) -> None:
    text = hf.LlamaConfig(**{**TEXT, "num_key_value_heads": 4, "max_position_embeddings": 64})
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=60)
    model = hf.LlavaForConditionalGeneration(config).eval()
    testreg.patch(model, DYNAMIC)
    inputs = {"input_ids": torch.tensor([[1] + [60] * 16 + [2, 3]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    loaded = testreg.load(testreg.save(model, tmp_path / "clean"))
    assert type(loaded) is type(model)
    assert_same(outputs(loaded, inputs), outputs(model, inputs))


def test_a_real_checkpoint_comes_back_with_its_image_processor(assets: Path, tmp_path: Path) -> None:
    source = assets / "checkpoints" / "vit-tiny-augreg"
    model = load_base(source)
    assert type(model) is hf.ViTForImageClassification
    state = 30 * torch.randn(192, generator=torch.Generator().manual_seed(0))
    testreg.patch(model, RegisterPlan({7: (417,), 6: (59, 189)}, registers=4, entry=8, state=state))
    directory = testreg.save(model, tmp_path / "clean")
    inputs = {"pixel_values": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))}
    loaded = testreg.load(directory)
    assert_same(outputs(loaded, inputs), outputs(model, inputs))
    assert loaded.config.id2label == model.config.id2label
    name = "preprocessor_config.json"
    assert (directory / name).read_bytes() == (source / name).read_bytes()
    assert str(assets.resolve()) not in "".join(
        path.read_text() for path in directory.glob("*.[jm]*")
    )  # no private path


def test_the_image_processor_of_a_hub_name_comes_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "snapshots" / "abc"
    cache.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "training_args.bin", "script.py"):
        (cache / name).write_text("{}")
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda repo, file, revision: str(cache / file))
    model, _ = patched()
    model.name_or_path = model.config.name_or_path = "org/vit"
    directory = testreg.save(model, tmp_path / "clean")
    assert (directory / "preprocessor_config.json").is_file()
    assert (directory / "tokenizer.json").is_file()
    assert not (directory / "training_args.bin").exists()
    assert not (directory / "script.py").exists()
    assert "base_model: org/vit" in (directory / "README.md").read_text()
    assert Recipe.read(directory).base["model"] == "org/vit"


def test_auto_classes_load_it_once_testreg_is_imported(saved: Path) -> None:
    model, inputs = patched()
    assert_same(outputs(hf.AutoModelForImageClassification.from_pretrained(saved), inputs), outputs(model, inputs))
    tower = hf.AutoModel.from_pretrained(saved, output_hidden_states=True, dtype=torch.float32)
    assert type(tower) is hf.ViTModel
    assert tower.pooler is None  # none was saved, so none is made up
    with torch.no_grad():
        expected = model.vit(**inputs, output_hidden_states=True)
        assert torch.equal(tower(**inputs).last_hidden_state, expected.last_hidden_state)
        assert len(tower(**inputs).hidden_states) == len(expected.hidden_states)
    with pytest.raises(BadCheckpoint, match="AutoModelForCausalLM does not load"):
        hf.AutoModelForCausalLM.from_pretrained(saved)


# Where testreg is not installed, and where nobody trusts the code

WITHOUT = """
import sys
sys.modules["testreg"] = None  # not importable
import torch, transformers as hf
from safetensors.torch import load_file
directory, kept = sys.argv[1:]
expected = load_file(kept)
inputs = {"pixel_values": expected.pop("pixel_values")}

def refused(load, *words):
    try:
        load()
    except (ValueError, OSError) as error:
        assert all(word in str(error) for word in words), error
    else:
        raise SystemExit(f"{load} loaded the checkpoint without its registers")

for name in ("ViTModel", "ViTForImageClassification", "DeiTModel", "CLIPVisionModel", "Dinov2Backbone"):
    refused(lambda: getattr(hf, name).from_pretrained(directory), "testreg.load", "trust_remote_code=True")
for name in ("ViTModel", "ViTForImageClassification"):
    model_class = getattr(hf, name)
    refused(lambda: model_class.from_pretrained(directory, config=model_class.config_class()), "no file named")
for name in ("AutoConfig", "AutoModel", "AutoModelForImageClassification"):
    refused(lambda: getattr(hf, name).from_pretrained(directory, trust_remote_code=False), "trust_remote_code=True")
refused(lambda: hf.pipeline("image-classification", model=directory, trust_remote_code=False), "trust_remote_code=True")

with torch.no_grad():
    model = hf.AutoModelForImageClassification.from_pretrained(directory, trust_remote_code=True)
    assert type(model) is hf.ViTForImageClassification
    assert torch.equal(model(**inputs).logits, expected["logits"])
    tower = hf.AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert torch.equal(tower(**inputs).last_hidden_state, expected["last_hidden_state"])
try:
    model.save_pretrained(directory + "-again")
except Exception as error:
    assert "testreg.save" in str(error)
else:
    raise SystemExit("save_pretrained lost the registers in silence")
assert "testreg" not in {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
print("without: ok")
"""

WITH = """
import sys, testreg
assert "transformers" not in sys.modules  # importing testreg stays cheap
import importlib.util
importlib.util.find_spec("transformers.models.auto.configuration_auto")  # looked for, not loaded
import torch, transformers as hf
from safetensors.torch import load_file
directory, kept = sys.argv[1:]
expected = load_file(kept)
inputs = {"pixel_values": expected.pop("pixel_values")}
with torch.no_grad():
    for load in (testreg.load, hf.AutoModelForImageClassification.from_pretrained):
        assert torch.equal(load(directory)(**inputs).logits, expected["logits"])
try:
    hf.ViTModel.from_pretrained(directory)
except ValueError as error:
    assert "testreg.load" in str(error)
else:
    raise SystemExit("a stock class loaded the checkpoint without its registers")
print("with: ok")
"""


def test_a_new_process_with_and_without_testreg_gives_the_same_bits(saved: Path, forked, tmp_path: Path) -> None:
    model, inputs = patched()
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits, "last_hidden_state": model.vit(**inputs).last_hidden_state}
    save_file({**expected, **inputs}, tmp_path / "kept.safetensors")
    arguments = [str(saved), str(tmp_path / "kept.safetensors")]
    without = forked.start(tmp_path, WITHOUT, *arguments)
    run = subprocess.run(
        [sys.executable, "-c", WITH, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(testreg.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "with: ok" in run.stdout, run.stderr[-3000:]
    _, output, errors = without.wait()
    assert "without: ok" in output, errors[-3000:]


def test_the_code_that_travels_imports_nothing_that_stays() -> None:
    names = {path.stem for path in checkpoint.CODE}
    for path in checkpoint.CODE:
        lines = path.read_text().splitlines()
        named = {line.split()[1].lstrip(".") for line in lines if line.strip().startswith("from .")} - {""}
        assert named <= names
        assert not any("testreg." in line and line.startswith(("import", "from")) for line in lines)


def test_save_pretrained_never_loses_registers_in_silence(saved: Path, tmp_path: Path) -> None:
    model = testreg.load(saved)
    for guarded in (model, copy.deepcopy(model)):
        with pytest.raises(TestregError, match=r"testreg\.save"):
            guarded.save_pretrained(tmp_path / "lost")
        with pytest.raises(TestregError, match="push_to_hub"):
            guarded.save_pretrained(tmp_path / "lost", push_to_hub=True)
    assert not (tmp_path / "lost").exists()
    testreg.active(model).remove()
    model.save_pretrained(tmp_path / "plain")
    plain, inputs = build("ViTForImageClassification")
    assert_same(
        outputs(hf.ViTForImageClassification.from_pretrained(tmp_path / "plain"), inputs), outputs(plain, inputs)
    )


def test_save_pretrained_of_a_model_patched_in_memory_says_what_it_leaves_out(tmp_path: Path) -> None:
    model, inputs = build("ViTForImageClassification")
    plain, attributes = outputs(model, inputs), list(vars(model))
    one = testreg.patch(model, DYNAMIC)
    two, copied = testreg.patch(model, constant()), copy.deepcopy(model)
    for patched_model in (model, copied):
        with pytest.warns(RegistersLeftOut, match=r"testreg\.save\(model, PATH\)") as told:
            patched_model.save_pretrained(tmp_path / "weights")  # what trainers do
        assert told[0].filename == __file__
    assert_same(outputs(hf.ViTForImageClassification.from_pretrained(tmp_path / "weights"), inputs), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegistersLeftOut)
        testreg.save(model, tmp_path / "clean")
        two.remove()
        with pytest.raises(RegistersLeftOut):
            model.save_pretrained(tmp_path / "never")  # one patch is still on
        one.remove()
        testreg.active(copied).remove(), testreg.active(copied).remove()
        for unpatched in (model, copied):
            assert list(vars(unpatched)) == attributes
            unpatched.save_pretrained(tmp_path / "plain")


def test_who_keeps_or_copies_the_tower_alone_does_not_keep_the_model() -> None:
    model, _ = patched()
    tower, copied, alive = model.vit, copy.deepcopy(model.vit), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    for kept in (tower, copied):
        testreg.active(kept).remove()
        assert testreg.active(kept) is None


def test_a_save_pretrained_that_somebody_else_put_there_stays(tmp_path: Path) -> None:
    model, _ = build("ViTModel")
    model.save_pretrained = theirs = lambda *args: None
    with testreg.patch(model, DYNAMIC):
        assert model.save_pretrained is theirs
    assert model.save_pretrained is theirs
    image_pipeline = hf.pipeline("image-feature-extraction", model=hf.ViTModel(model.config), image_processor=object())
    with testreg.patch(image_pipeline, DYNAMIC), pytest.warns(RegistersLeftOut):
        image_pipeline.model.save_pretrained(tmp_path)


def test_a_trainer_saves_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, inputs = patched()
    rows = [{"pixel_values": inputs["pixel_values"][0], "labels": 1}] * 2
    settings = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = hf.Trainer(model, hf.TrainingArguments(str(tmp_path), **settings), train_dataset=rows)
    with pytest.warns(RegistersLeftOut):
        trainer.train()
    with pytest.warns(RegistersLeftOut):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert testreg.active(model) is not None
    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-2").eval()
    with testreg.patch(loaded, testreg.active(model).plan):
        assert_same(outputs(loaded, inputs), outputs(model.eval(), inputs))


def test_a_loaded_model_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    again = testreg.save(testreg.load(saved), tmp_path / "again")
    assert contents(again)["model.testreg.safetensors"] == contents(saved)["model.testreg.safetensors"]
    assert_same(*(outputs(testreg.load(path), build("ViTForImageClassification")[1]) for path in (saved, again)))


# The hub


def test_a_hub_name_and_revision_load_like_a_path(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(name: str, **kwargs) -> str:
        asked.update(kwargs, name=name)
        return str(saved)

    monkeypatch.setattr(modeling, "snapshot_download", snapshot_download)
    model, inputs = patched()
    assert_same(outputs(testreg.load("me/vit-clean", revision="v1", token="secret"), inputs), outputs(model, inputs))
    assert (asked["name"], asked["revision"], asked["token"]) == ("me/vit-clean", "v1", "secret")
    assert not any(pattern.endswith((".bin", ".py", ".pkl")) for pattern in asked["allow_patterns"])


def test_push_to_hub_uploads_the_whole_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Api:
        def create_repo(self, name: str, **kwargs) -> None:
            calls.append(("create", name))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            calls.append(("upload", repo_id, testreg.active(testreg.load(folder_path)).plan))

    monkeypatch.setattr(checkpoint, "HfApi", Api)
    testreg.save(patched()[0], tmp_path / "clean", push_to_hub="me/vit-clean")
    assert calls == [("create", "me/vit-clean"), ("upload", "me/vit-clean", constant())]


def test_an_upload_that_fails_says_that_the_checkpoint_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def create_repo(self, name: str, **kwargs) -> None:
            raise ConnectionError("offline")

    monkeypatch.setattr(checkpoint, "HfApi", Api)
    with pytest.raises(BadCheckpoint, match="is saved, but"):
        testreg.save(patched()[0], tmp_path / "clean", push_to_hub="me/vit-clean")
    testreg.load(tmp_path / "clean")


def test_a_hub_name_that_cannot_be_had_is_a_clear_error() -> None:
    with pytest.raises(BadCheckpoint, match="no directory here, and cannot be had from the hub"):
        testreg.load("me/no-such-model", local_files_only=True)


# Where to write


def test_an_unpatched_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TestregError, match="not patched"):
        testreg.save(build("ViTModel")[0], tmp_path / "clean")
    mine = type("Mine", (hf.ViTModel,), {"__module__": "mine"})(build("ViTModel")[0].config)
    testreg.patch(mine, DYNAMIC)
    with pytest.raises(UnsupportedModel, match="plan"):
        testreg.save(mine, tmp_path / "clean")
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_left_alone(saved: Path, tmp_path: Path) -> None:
    model, _ = patched(plan=DYNAMIC)
    before = contents(saved)
    with pytest.raises(BadCheckpoint, match="--force"):
        testreg.save(model, saved)
    assert contents(saved) == before
    testreg.save(model, saved, force=True)
    assert testreg.active(testreg.load(saved)).plan == DYNAMIC
    (tmp_path / "empty").mkdir()
    testreg.save(model, tmp_path / "empty")
    testreg.load(tmp_path / "empty")


@pytest.mark.parametrize("stranger", ["photo.jpg", "train.py", "notes.md", "boxes.json", ".git", "subfolder"])
def test_force_replaces_nothing_but_a_checkpoint(stranger: str, saved: Path) -> None:
    if "." in stranger[1:]:
        (saved / stranger).write_text("precious")
    else:
        (saved / stranger).mkdir()
    before = sorted(path.name for path in saved.iterdir())
    with pytest.raises(BadCheckpoint, match=stranger):
        testreg.save(patched()[0], saved, force=True)
    assert sorted(path.name for path in saved.iterdir()) == before


@pytest.mark.parametrize("config", [None, "precious", '{"theme": "dark"}'])
def test_force_replaces_no_directory_without_a_models_config(config: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("precious")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = contents(tmp_path)
    with pytest.raises(BadCheckpoint, match="config of a model"):
        testreg.save(patched()[0], tmp_path, force=True)
    assert contents(tmp_path) == before


def test_the_models_own_checkpoint_is_never_replaced(saved: Path) -> None:
    model, before = testreg.load(saved), contents(saved)
    (saved.parent / "link").symlink_to(saved)
    for directory in (saved, saved.parent / "link", saved / ".." / "clean"):
        with pytest.raises(BadCheckpoint, match="loaded from"):
            testreg.save(model, directory, force=True)
    assert contents(saved) == before


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BadCheckpoint, match="is a file"):
        testreg.save(patched()[0], tmp_path / "file", force=True)
    with pytest.raises(BadCheckpoint, match="could not be written"):
        testreg.save(patched()[0], tmp_path / "file" / "clean")
    assert (tmp_path / "file").read_text() == "precious"


# Killed at any moment


@pytest.mark.parametrize("syncs", [0, 3, 9])
def test_a_full_disk_leaves_the_old_checkpoint(syncs: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, fsync, calls = contents(saved), os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > syncs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(BadCheckpoint, match=r"No space left .* untouched"):
        testreg.save(patched(plan=DYNAMIC)[0], saved, force=True)
    with pytest.raises(BadCheckpoint, match="No space left"):
        testreg.save(patched(plan=DYNAMIC)[0], saved.parent / "new")
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["clean"]


def test_a_limit_on_file_sizes_leaves_the_old_checkpoint(saved: Path) -> None:
    """The real thing: the system refuses to write the weights, somewhere inside safetensors."""
    resource = pytest.importorskip("resource")
    import signal

    model, before = patched(plan=DYNAMIC)[0], contents(saved)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(BadCheckpoint, match="untouched"):
            testreg.save(model, saved, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["clean"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch, testreg
from testreg import RegisterPlan
from testreg.checkpoints import atomic, saving as checkpoint
from testreg.runtime.recipe import Recipe, sha256
torch.set_num_threads(1)
from zoo import build
root = Path(sys.argv[1])

def save(target, registers, **kwargs):
    model, _ = build("ViTModel")
    testreg.patch(model, RegisterPlan({0: (1,)}, registers=registers))
    testreg.save(model, target, **kwargs)

def at(moment, target):
    # In a child process: save, and die at the given call of a function that touches the disk.
    child = os.fork()
    if child == 0:
        seen = 0
        def deadly(function):
            def call(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for owner, names in ((os, ("fsync", "rename")), (atomic, ("_exchange",)), (atomic.shutil, ("rmtree",)),
                             (checkpoint, ("card",))):
            for name in names:
                setattr(owner, name, deadly(getattr(owner, name)))
        save(target, 2, force=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)

for fresh in (False, True):
    moment, found = 0, []
    while True:
        moment += 1
        target = root / f"{fresh}-{moment}" / "clean"
        if not fresh:
            save(target, 1)
        killed = at(moment, target)
        if target.exists():
            Recipe.read(target).verify(target)
            found.append(RegisterPlan.load(target / "registers.safetensors").registers)
        else:
            assert fresh
            found.append(0)
        save(target, 3, force=True)  # works, and clears what the killed process left
        assert [path.name for path in target.parent.iterdir()] == ["clean"], list(target.parent.iterdir())
        if not killed:
            break
    old = 0 if fresh else 1
    assert set(found) == {old, 2}, found
    assert found == sorted(found), found  # the old one up to some moment, the new one from then on
    print(len(found), "moments: ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill a copy of the process")
def test_killed_at_any_moment_the_directory_holds_the_old_checkpoint_or_the_new_one(forked, tmp_path: Path) -> None:
    _, output, errors = forked.run(tmp_path, KILLED, tmp_path)
    assert output.count("moments: ok") == 2, errors[-3000:]


def test_without_an_exchange_of_names_two_renames_do(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    testreg.save(patched(plan=DYNAMIC)[0], saved, force=True)
    assert testreg.active(testreg.load(saved)).plan == DYNAMIC
    assert [path.name for path in saved.parent.iterdir()] == ["clean"]

    rename, before = os.rename, contents(saved)
    for dies in (True, False):  # between the two renames, or the second is refused

        def second_fails(one: Path, other: Path, dies: bool = dies) -> None:
            if other == saved and (dies or not one.name.endswith(atomic.OLD)):
                raise KeyboardInterrupt if dies else OSError(errno.EACCES, os.strerror(errno.EACCES))
            rename(one, other)

        monkeypatch.setattr(atomic.os, "rename", second_fails)
        with pytest.raises(KeyboardInterrupt if dies else BadCheckpoint):
            testreg.save(patched()[0], saved, force=True)
        if dies:
            (old,) = saved.parent.iterdir()
            with pytest.raises(KeyboardInterrupt):
                testreg.save(patched()[0], saved)
            assert contents(old) == before  # the only copy is not cleared away
            rename(old, saved)
        assert contents(saved) == before
        assert [path.name for path in saved.parent.iterdir()] == ["clean"]


def test_whoever_may_read_the_directory_may_read_its_files(saved: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {saved.stat().st_mode & 0o666}


def test_two_at_once_do_not_clear_each_other_away(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "clean") as one:
        (one / "file").write_text("one")
        with atomic.replacing(tmp_path / "clean") as two:
            (two / "file").write_text("two")
        assert (tmp_path / "clean" / "file").read_text() == "two"
    assert (tmp_path / "clean" / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]


# Nothing from a checkpoint is trusted


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


# The unpatched checkpoint


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    build("ViTForImageClassification")[0].save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def rewrite(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def test_load_base_gives_the_class_that_the_config_names(plain: Path) -> None:
    model, inputs = build("ViTForImageClassification")
    assert type(load_base(plain)) is hf.ViTForImageClassification
    assert_same(outputs(load_base(plain), inputs), outputs(model, inputs))
    assert load_base(plain, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_base_takes_a_hub_name_and_keeps_it(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain / "preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(modeling, "snapshot_download", lambda name, **kwargs: str(plain))
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda repo, file, revision: str(plain / file))
    model = load_base("org/vit", revision="v1")
    assert model.name_or_path == "org/vit"
    testreg.patch(model, DYNAMIC)
    directory = testreg.save(model, tmp_path / "clean")
    assert Recipe.read(directory).base["model"] == "org/vit"
    assert (directory / "preprocessor_config.json").is_file()
    testreg.load(directory)


def test_load_base_names_the_weights_that_are_broken_or_missing(plain: Path, saved: Path) -> None:
    name = "vit.layers.1.mlp.fc1.weight"
    name = name if name in load_file(plain / "model.safetensors") else "vit.encoder.layer.1.intermediate.dense.weight"
    rewrite(plain, lambda weights: weights[name].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(BadCheckpoint, match=r"NaN or infinity in vit\.layers\.1\.mlp\.fc1\.weight"):
        load_base(plain)
    rewrite(plain, lambda weights: weights.pop(name))
    with pytest.raises(BadCheckpoint, match=r"lacks 1 weights .*vit\.layers\.1\.mlp\.fc1\.weight"):
        load_base(plain)
    (plain / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(BadCheckpoint, match="cannot be loaded"):
        load_base(plain)
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="pickled ones are never read"):
        load_base(plain)
    with pytest.raises(BadCheckpoint, match="registers already"):
        load_base(saved)


def test_a_tower_whose_pooler_was_never_saved_gets_none(tmp_path: Path) -> None:
    config = build("ViTModel")[0].config
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "plain")
    model = load_base(tmp_path / "plain")
    assert model.pooler is None
    testreg.patch(model, DYNAMIC)
    assert testreg.load(testreg.save(model, tmp_path / "clean")).pooler is None


def test_a_text_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UnsupportedModel, match="text model"):
        load_base(tmp_path / "text")


# Which checkpoint a plan belongs to


def test_a_fingerprint_belongs_to_the_weights_not_to_the_class_or_the_precision() -> None:
    model, _ = build("ViTForImageClassification")
    whole = base.fingerprint(model)
    assert base.fingerprint(model.vit) == whole
    assert set(base.fingerprint(copy.deepcopy(model).bfloat16()).items()) <= set(whole.items())
    assert base.fingerprint(copy.deepcopy(model).half())["float16"] == whole["float16"]
    testreg.patch(model, DYNAMIC)
    assert base.fingerprint(model) == whole
    with torch.no_grad():
        model.vit.layers[2].mlp.fc2.weight[0, 0] *= 1.1
    assert not set(base.fingerprint(model).values()) & set(whole.values())


def test_a_plan_of_another_checkpoint_is_refused() -> None:
    model, _ = build("ViTForImageClassification")
    plan = RegisterPlan(NEURONS, provenance={"base": json.loads(json.dumps(base.describe(model)))})
    base.check_base(plan, model)
    base.check_base(plan, copy.deepcopy(model).bfloat16())
    base.check_base(RegisterPlan(NEURONS), model)  # says nothing of where it comes from
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.bias += 0.1
    with pytest.raises(BadPlan, match="other weights"):
        base.check_base(plan, model)


# The model card


def test_the_card_says_what_was_done_and_carries_the_licence_over(plain: Path, tmp_path: Path) -> None:
    (plain / "README.md").write_text("---\nlicense: cc-by-nc-4.0\npipeline_tag: image-classification\n---\n# A model\n")
    (plain / "LICENSE").write_text("the licence")
    model = load_base(plain)
    numbers = {"before": {"outlier_patches": 0.02}, "after": {"outlier_patches": 0.0}}
    testreg.patch(model, constant(**numbers))
    directory = testreg.save(model, tmp_path / "clean")
    card = (directory / "README.md").read_text()
    front, text = card.split("---\n")[1:]
    assert "license: cc-by-nc-4.0" in front
    assert "base_model: plain" in front
    assert "pipeline_tag: image-classification" in front
    assert "| outlier patches | 0.02 | 0 |" in text
    assert "(0, 1), (0, 5), (2, 47)" in text
    assert 'testreg.load("' in text
    assert "trust_remote_code=True" in text
    assert (directory / "LICENSE").read_text() == "the licence"


@pytest.mark.parametrize(
    "front", ["", "---\n[\n---\n", "---\nlicense: [1, 2]\n---\n", "---\nlicense: !!python/x y\n---\n"]
)
def test_a_strange_card_of_the_base_model_does_no_harm(front: str, plain: Path, tmp_path: Path) -> None:
    (plain / "README.md").write_text(front + "text")
    model = load_base(plain)
    testreg.patch(model, DYNAMIC)
    assert (testreg.save(model, tmp_path / "clean") / "README.md").stat().st_size


def test_a_patched_name_on_the_hub_is_known_as_such(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "testreg"}))
    monkeypatch.setattr(original, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert is_patched("someone/vit-clean")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert not is_patched("someone/vit-clean")
