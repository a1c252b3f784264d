"""What readers of a checkpoint ask of it beside its weights: its precision, its config, its labels and sizes."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageClassification, BertConfig, ViTConfig, ViTForImageClassification

import testreg
from testreg.runtime.errors import BadCheckpoint

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier of five labels without a dtype in its config, and where it is saved."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    labels = dict(enumerate("abcde"))
    config = ViTConfig(
        **sizes, image_size=32, patch_size=8, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    model = ViTForImageClassification(config).eval()
    testreg.patch(model, testreg.RegisterPlan({0: (3,)}, 2, 1, torch.randn(32)))
    path = tmp_path_factory.mktemp("reading") / "model"
    testreg.save(model, path)
    return model, path


def logits(model):
    with torch.no_grad():
        return model(IMAGES.to(model.dtype)).logits.float()


@pytest.mark.parametrize(("dtype", "gives"), [
    ("auto", torch.float32),
    (None, torch.float32),
    ("bfloat16", torch.bfloat16),
    (torch.float16, torch.float16),
])  # fmt: skip
def test_the_precision_may_be_given_as_from_pretrained_takes_it(saved, dtype, gives):
    model, path = saved
    loaded = testreg.load(path, dtype=dtype)
    assert loaded.dtype == gives
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6 if gives == torch.float32 else 0.02, rtol=0)


def test_a_precision_that_is_none_is_named(saved):
    with pytest.raises(BadCheckpoint, match="dtype must be a dtype of torch, its name, or 'auto', not 'half-ish'"):
        testreg.load(saved[1], dtype="half-ish")


def test_the_config_knows_labels_and_sizes(saved):
    config = AutoConfig.from_pretrained(saved[1], trust_remote_code=True)
    assert config.num_labels == 5
    assert config.id2label == dict(enumerate("abcde"))
    assert config.label2id["c"] == 2
    assert (config.hidden_size, config.image_size, config.patch_size, config.num_hidden_layers) == (32, 32, 8, 3)
    assert not hasattr(config, "no_such_setting")
    again = type(config).from_pretrained(saved[1])
    assert again.hidden_size == 32


def test_a_config_may_be_given(saved):
    model, path = saved
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    auto = AutoModelForImageClassification.from_pretrained(path, config=config, trust_remote_code=True)
    for loaded in (auto, testreg.load(path, config=config), testreg.load(path, config=config.base_config)):
        assert testreg.active(loaded)
        torch.testing.assert_close(logits(loaded), logits(model))
    changed = transformers.ViTConfig.from_dict(model.config.to_dict())
    changed.hidden_act = "relu"
    assert (logits(testreg.load(path, config=changed)) - logits(model)).abs().max() > 1e-3


def test_a_config_of_another_kind_is_named(saved):
    with pytest.raises(BadCheckpoint, match="config must be a ViTConfig, as the checkpoint's own is, not BertConfig"):
        testreg.load(saved[1], config=BertConfig())
