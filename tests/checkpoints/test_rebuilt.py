"""What the saved class would not build again is refused by name, before anything is written; the rest comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from test_checkpoint import DYNAMIC, assert_same, contents, outputs
from torch import nn
from torch.nn.utils import prune
from zoo import ROWS, VISION, build

import testreg
from testreg import BadCheckpoint, UnsupportedModel
from testreg.checkpoints.rebuilt import check_rebuilt
from testreg.runtime.recipe import Recipe

NAME = "ViTForImageClassification"


@pytest.fixture(autouse=True)
def quiet() -> None:
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint that is there already."""
    model, _ = build(NAME)
    testreg.patch(model, DYNAMIC)
    return testreg.save(model, tmp_path / "clean")


def no_head(model) -> None:
    model.classifier = nn.Identity()


def sequential_head(model) -> None:
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 5))


def removed_blocks(model) -> None:
    model.vit.layers = model.vit.layers[:2]


def resized_positions(model) -> None:
    model.vit.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 37, 32))


def another_buffer(model) -> None:
    model.vit.register_buffer("mean", torch.zeros(3))


def adapters_of_peft(model) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)


def adapters_of_transformers(model) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))


def weight_norm(model) -> None:
    nn.utils.parametrizations.weight_norm(model.vit.layers[2].mlp.fc1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def old_weight_norm(model) -> None:
    nn.utils.weight_norm(model.vit.layers[2].mlp.fc1)


def pruned(model) -> None:
    prune.l1_unstructured(model.vit.layers[2].mlp.fc1, "weight", 0.3)


def torch_ao(model) -> None:
    mapped = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    model.vit, model.classifier = mapped.vit, mapped.classifier


def torchao(model) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quanto(model) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def whole_numbers(model) -> None:
    model.classifier.weight = nn.Parameter(model.classifier.weight.to(torch.int8), requires_grad=False)


def another_activation(model) -> None:
    model.vit.layers[1].mlp.activation_fn = nn.ReLU()


def another_epsilon(model) -> None:
    model.vit.layernorm.eps = 1e-3


def another_config(model) -> None:
    model.config.num_hidden_layers = 4


CASES: dict[Callable, str] = {
    no_head: r"it has no classifier\.weight; it has no classifier\.bias; .*say it in model\.config",
    sequential_head: r"it has no classifier\.weight; .*it has classifier\.1\.weight besides",
    removed_blocks: r"it has no vit\.layers\.2\..*num_hidden_layers",
    resized_positions: r"vit\.embeddings\.position_embeddings has the shape \(1, 37, 32\), not \(1, 17, 32\)",
    another_buffer: r"it has vit\.mean besides",
    adapters_of_peft: r"q_proj\.lora_A.*merge_and_unload",
    adapters_of_transformers: r"q_proj\.lora_A.*merge_and_unload",
    weight_norm: r"it has no vit\.layers\.2\.mlp\.fc1\.weight; .*remove_parametrizations",
    old_weight_norm: r"fc1\.weight_g.*remove_weight_norm",
    pruned: r"fc1\.weight_orig.*prune\.remove",
    torch_ao: r"_packed_params\.dtype besides.*quantise what testreg\.load gives",
    torchao: r"weight is a Int8Tensor.*quantise what testreg\.load gives",
    quanto: r"is a QLinear, not a Linear.*quantise what testreg\.load gives",
    whole_numbers: r"classifier\.weight is of torch\.int8.*quantise what testreg\.load gives",
    another_activation: r"activation_fn is a ReLU, not a GELUActivation.*hidden_act",
    another_epsilon: r"vit\.layernorm is LayerNorm\(\(32,\), eps=0\.001",
    another_config: r"it has no vit\.layers\.3\.",
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_what_would_not_come_back_is_refused_by_name_and_a_good_checkpoint_stays(change, good: Path) -> None:
    model, _ = build(NAME)
    change(model)
    testreg.patch(model, testreg.RegisterPlan({0: (1, 5)}, registers=3))
    before = contents(good)
    with pytest.raises(UnsupportedModel, match=CASES[change]):
        testreg.save(model, good, force=True)
    with pytest.raises(UnsupportedModel):
        testreg.save(model, good.with_name("other"))
    assert contents(good) == before
    assert [path.name for path in good.parent.iterdir()] == [good.name]


def test_a_wrapper_that_computes_the_same_is_seen_through(tmp_path: Path) -> None:
    model, inputs = build(NAME)
    testreg.patch(model, DYNAMIC)
    compiled = torch.compile(model, backend="eager")
    assert_same(outputs(testreg.load(testreg.save(compiled, tmp_path / "clean")), inputs), outputs(model, inputs))


def test_a_wrapper_with_adapters_says_how_to_merge_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build(NAME)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc2"], init_lora_weights=False))
    testreg.patch(adapted, DYNAMIC)
    with pytest.raises(UnsupportedModel, match=r"PeftModel holds adapters.*merge_and_unload"):
        testreg.save(adapted, tmp_path / "clean")
    testreg.active(adapted).remove()
    merged = adapted.merge_and_unload()
    testreg.patch(merged, DYNAMIC)
    assert_same(outputs(testreg.load(testreg.save(merged, tmp_path / "clean")), inputs), outputs(merged, inputs))


def test_what_the_config_says_comes_back(tmp_path: Path) -> None:
    model, inputs = build(NAME)
    model.classifier, model.config.num_labels = nn.Identity(), 0
    model.vit.layers, model.config.num_hidden_layers = model.vit.layers[:2], 2
    for block in model.vit.layers:
        block.mlp.activation_fn = hf.activations.ACT2FN["relu"]
    model.config.hidden_act = "relu"
    testreg.patch(model, testreg.RegisterPlan({0: (1, 5)}, registers=3))
    assert_same(outputs(testreg.load(testreg.save(model, tmp_path / "clean")), inputs), outputs(model, inputs))


def test_dropout_and_other_things_of_training_are_no_difference(tmp_path: Path) -> None:
    model, inputs = build(NAME)
    model.vit.embeddings.dropout, model.vit.layers[0].mlp.dropout = nn.Identity(), nn.Dropout(0.3)
    model.vit.register_buffer("seen", torch.zeros(3), persistent=False)
    model.requires_grad_(False).train()
    testreg.patch(model, DYNAMIC)
    assert_same(outputs(testreg.load(testreg.save(model, tmp_path / "clean")), inputs), outputs(model.eval(), inputs))


def one_weight_for_two(model) -> None:
    model.vit.layers[1].mlp.fc2.weight = model.vit.layers[0].mlp.fc2.weight


def one_mlp_for_two(model) -> None:
    model.vit.layers[1].mlp.fc1 = model.vit.layers[0].mlp.fc1


def views_that_overlap(model) -> None:
    memory = torch.randn(64, 48)
    model.vit.layers[0].mlp.fc2.weight.data, model.vit.layers[1].mlp.fc2.weight.data = memory[:32], memory[16:48]


def transposed(model) -> None:
    model.vit.layers[0].mlp.fc2.weight.data = torch.randn(48, 32).T


@pytest.mark.parametrize("tie", [one_weight_for_two, one_mlp_for_two, views_that_overlap, transposed])
def test_weights_tied_by_hand_come_back(tie, tmp_path: Path) -> None:
    model, inputs = build(NAME)
    tie(model)
    testreg.patch(model, DYNAMIC)
    for size in ("5GB", "20KB"):
        loaded = testreg.load(testreg.save(model, tmp_path / "clean", force=True, max_shard_size=size))
        assert_same(outputs(loaded, inputs), outputs(model, inputs))


def vision_language_model(tie: bool):
    text = hf.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
        vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=62, eos_token_id=63,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=60, tie_word_embeddings=tie
    )
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration(config).eval()


def test_weights_that_the_class_ties_stay_tied_and_are_refused_where_they_are_not(tmp_path: Path) -> None:
    model = vision_language_model(tie=True)
    testreg.patch(model, DYNAMIC)
    loaded = testreg.load(testreg.save(model, tmp_path / "tied"))
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight and .*|.*embed_tokens\.weight .* differ, which its"):
        testreg.save(model, tmp_path / "untied")
    model.config.tie_word_embeddings = False
    loaded = testreg.load(testreg.save(model, tmp_path / "untied"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", [name for name in ROWS if hasattr(hf, name.split("-")[0])])
def test_every_family_is_what_its_class_builds(name: str) -> None:
    model, _ = build(name)
    assert check_rebuilt(model) == {}


# Weights of several dtypes

MIXES: dict[str, Callable] = {
    "a norm in float32": lambda model: (model.half(), model.vit.layernorm.float()),
    "the embeddings in float32": lambda model: (model.half(), model.vit.embeddings.float()),
    "half of both kinds": lambda model: (model.half(), model.classifier.bfloat16()),
    "a buffer": lambda model: (model.double(), model.vit.embeddings.float()),
}


@pytest.mark.parametrize("mix", MIXES)
def test_weights_of_several_dtypes_come_back_each_in_its_own(mix: str, tmp_path: Path) -> None:
    model, _ = build(NAME)
    MIXES[mix](model)
    testreg.patch(model, DYNAMIC)
    directory = testreg.save(model, tmp_path / "clean")
    wanted = model.state_dict()
    for dtype in ({}, {"dtype": "auto"}):
        found = testreg.load(directory, **dtype).state_dict()
        assert all(
            found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
        )
    assert {weight.dtype for weight in testreg.load(directory, dtype=torch.float32).state_dict().values()} == {
        torch.float32
    }
    assert hf.AutoModel.from_pretrained(directory, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_one_dtype_is_recorded_nowhere_and_a_lie_about_it_is_refused(good: Path) -> None:
    values = json.loads((good / "config.json").read_text())
    assert "dtypes" not in values["testreg"]  # as version 0.1 reads it
    for lie in ({"vit.layernorm.weight": "int4"}, ["float32"], {"x": 3}):
        values["testreg"]["dtypes"] = lie
        with pytest.raises(BadCheckpoint, match="dtype"):
            Recipe.from_config(values)
