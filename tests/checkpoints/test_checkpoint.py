"""A saved model comes back bit for bit, or not at all: never without its registers, never another one."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers as hf
from patched_models import DYNAMIC, assert_same, constant, contents, outputs, patched
from safetensors.torch import save_file
from zoo import TEXT, VISION, build

import testreg
from testreg import BadCheckpoint, RegisterPlan, TestregError
from testreg.checkpoints import saving as checkpoint
from testreg.checkpoints.original import load_base
from testreg.runtime import modeling_testreg as modeling
from testreg.runtime.errors import RegistersLeftOut
from testreg.runtime.recipe import Recipe

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
