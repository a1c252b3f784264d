"""`find` and `inspect` on models that are compiled, which they see as written, and sharded, which they refuse."""

import numpy as np
import pytest
import torch
import transformers
from torch import distributed, nn

import testreg
from testreg.demo.planted import plant
from testreg.finding.observe import run
from testreg.runtime.errors import UnsupportedModel

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 48,
    "patch_size": 8,
}  # fmt: skip


def planted():
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE, num_labels=5)).eval()
    plant(model, neurons=2)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(images):
    return testreg.find(planted(), images), testreg.inspect(planted(), images)


def whole(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model):
    model.compile(backend="eager", fullgraph=True)
    return model


def by_block(model):
    for block in model.vit.layers:
        block.compile(backend="eager", fullgraph=True)
    return model


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.parametrize("compiled", [whole, in_place, by_block])
@pytest.mark.parametrize("ran", [False, True])
def test_a_compiled_model_is_seen_as_it_is_written(images, expected, compiled, ran):
    model = compiled(planted())
    if ran:
        with torch.no_grad():
            model(images[:2])
    assert testreg.find(model, images) == expected[0]
    assert testreg.inspect(model, images) == expected[1]
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(nn.Linear(2, 2), backend=counter)(torch.zeros(1, 2))
    assert counter.frame_count == 1  # what is compiled afterwards is


def test_pictures_that_can_be_read_only_once_give_the_same_plan(expected):
    from PIL import Image

    model, random = planted(), np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(12)]
    plan = testreg.find(model, pictures, processor="48:0.5:0.5")
    for once in (iter(pictures), [iter(pictures)]):
        again = testreg.find(model, once, processor="48:0.5:0.5")
        assert again.pairs == plan.pairs
        assert [row.get("refused") for row in again.provenance["sizes"]] == [None, None]


def test_a_model_of_clips_is_run_without_its_predictor():
    import zoo

    model, inputs = zoo.build("VJEPA2Model")
    called = []
    model.predictor.register_forward_hook(lambda *_: called.append(1))
    output = run(model, {"pixel_values": inputs["pixel_values_videos"]}, whole=True)
    assert called == []
    assert torch.equal(output.last_hidden_state, model(**inputs).last_hidden_state)


def test_a_sharded_model_is_refused_at_once_and_can_be_patched(images, expected, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, seen = planted(), []
        for block in model.vit.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        handle = model.vit.embeddings.register_forward_hook(lambda *_: seen.append(1))
        for look in (testreg.find, testreg.inspect):
            with pytest.raises(
                UnsupportedModel, match=r"sharded over processes .*before it is sharded.*patch the sharded"
            ):
                look(model, images)
        assert seen == []
        handle.remove()
        plain = planted()
        with torch.no_grad(), testreg.patch(plain, expected[0]), testreg.patch(model, expected[0]):
            assert torch.equal(model(images[:2]).logits, plain(images[:2]).logits)
    finally:
        distributed.destroy_process_group()
