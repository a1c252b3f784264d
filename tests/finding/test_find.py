"""`find`: planted neurons are found exactly, the same images give the same plan, and what is of no use is refused."""

import copy
import json
import random

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForImageClassification

import testreg
from testreg.demo.planted import PLANTABLE, plant
from testreg.finding import search
from testreg.runtime.errors import ImagesRepeated

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip
DINO = {key: value for key, value in SHAPE.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
MAKE = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SHAPE)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**SHAPE)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)),
    "dinov2-with-registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**DINO)
    ),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SHAPE)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE)),
}


def noise(count=24, seed=0, size=(96, 96)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def grown(family="vit", seed=0, **settings):
    """A model in evaluation mode, and what is planted in it; nothing where `scale` is 0."""
    torch.manual_seed(seed)
    model = MAKE[family]().eval()
    planted = plant(model, seed=seed, **settings) if settings.get("scale", 30) else None
    return model, planted


def find(model, images, **wanted):
    """`testreg.find` at the images' own size alone: at others it takes four times as long."""
    return testreg.find(model, images, **{"sizes": (), **wanted})


def settings_of(seed, family):
    """Any setting in which no register neuron less removes the outliers."""
    draw = random.Random(f"{seed} {family}")
    neurons = draw.choice([1, 2, 3, 4])
    return {
        "seed": seed,
        "neurons": neurons,
        "scale": draw.choice([scale for scale in (10, 20, 30, 50) if scale / neurons >= 5]),
        "where": draw.choice(["content", "corners", (20, 77, 100)]),
        "upstream": draw.choice([0, 0, 1, 2]),
    }


def pairs(neurons):
    return {(block, neuron) for block, row in neurons.items() for neuron in row}


def check_exact(family, settings, sizes):
    model, planted = grown(family, **settings)
    plan = find(model, noise(16, seed=settings["seed"]), sizes=sizes)
    found, must = set(plan.pairs), pairs(planted.neurons)
    assert must <= found <= must | pairs(planted.upstream), settings
    assert not found & {pair for decoys in planted.decoys.values() for pair in decoys}, settings
    artefact = plan.provenance["artefact"]
    assert artefact["block"] == planted.block
    assert plan.provenance["guard"]["left"] == 0


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
@pytest.mark.parametrize("family", PLANTABLE)
def test_exactly_the_planted_neurons(family, seed):
    check_exact(family, settings_of(seed, family), sizes=None if seed < 2 else ())


def test_an_early_neuron_that_all_patches_need_is_left_alone():
    # It fires at the outliers too, louder than the neurons upstream of them.
    model, planted = grown("siglip", seed=15, scale=50, where="corners", upstream=2)
    plan = find(model, noise(seed=15))
    assert planted.decoys["early"][0] not in [(row["block"], row["neuron"]) for row in plan.provenance["candidates"]]
    assert pairs(planted.neurons) <= set(plan.pairs)


@pytest.mark.parametrize("family", PLANTABLE)
def test_a_clean_model_is_refused_with_its_norms(family):
    torch.manual_seed(0)
    with pytest.raises(testreg.NoOutliers, match=r"largest patch norm is [12]\.\d times .* Largest per block: [12]\."):
        find(MAKE[family]().eval(), noise())


# The same images, the same plan.


@pytest.fixture(scope="module")
def planted_vit():
    return grown("vit", seed=3, neurons=2, upstream=1, where="content")


def same(plan, other):
    assert (plan.neurons, plan.registers, plan.entry, plan.form) == (
        other.neurons, other.registers, other.entry, other.form,
    )  # fmt: skip
    torch.testing.assert_close(plan.state, other.state, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def first_plan(planted_vit):
    return testreg.find(planted_vit[0], noise())


def test_order_does_not_matter(planted_vit, first_plan):
    plan = find(planted_vit[0], noise().flip(0))
    same(plan, first_plan)
    assert plan.provenance["images"] == first_plan.provenance["images"]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_matter(planted_vit, first_plan, batch_size):
    same(find(planted_vit[0], noise(), batch_size=batch_size), first_plan)


def test_a_generator_and_duplicates_do_not_matter(planted_vit, first_plan):
    images = noise()
    same(find(planted_vit[0], (image for image in images)), first_plan)
    with pytest.warns(ImagesRepeated, match="only 24 of 38 images are different"):
        twice = find(planted_vit[0], torch.cat([images, images[:9], images[:1].expand(5, -1, -1, -1)]))
    same(twice, first_plan)
    assert twice.provenance["images"]["count"] == 38
    assert twice.provenance["split"] == first_plan.provenance["split"]


def test_few_repeats_are_not_worth_a_word(planted_vit, first_plan, recwarn):
    same(find(planted_vit[0], torch.cat([noise(), noise()[:2]])), first_plan)
    assert not [warning for warning in recwarn if warning.category is ImagesRepeated]


def test_twice_is_bit_for_bit_the_same(planted_vit, first_plan):
    assert testreg.find(planted_vit[0], noise()) == first_plan


def test_images_of_several_shapes():
    model, planted = grown("dinov2", seed=1, where="content")
    images = [*noise(10), *noise(7, seed=1, size=(96, 64)), *noise(7, seed=2, size=(112, 96))]
    plan = find(model, images, batch_size=4)
    assert set(plan.pairs) == pairs(planted.neurons)


# Overrides.


@pytest.mark.parametrize(
    ("wanted", "check"),
    [
        ({"top_k": 1}, lambda plan: len(plan.pairs) == 1),
        ({"registers": 7}, lambda plan: plan.registers == 7),
        ({"form": "dynamic"}, lambda plan: (plan.form, plan.entry, plan.state) == ("dynamic", 0, None)),
        ({"form": "dynamic", "entry": 2}, lambda plan: (plan.form, plan.entry) == ("dynamic", 2)),
        ({"form": "constant"}, lambda plan: plan.form == "constant"),
        ({"entry": 0}, lambda plan: (plan.form, plan.entry) == ("dynamic", 0)),
        ({"entry": 5}, lambda plan: plan.entry == 5),
        ({"blocks": (3, 3)}, lambda plan: set(plan.neurons) == {3}),
        ({"threshold": 60.0}, lambda plan: plan.provenance["artefact"]["threshold"] == "norm 60"),
        ({"recipe": "paper", "top_k": 3, "registers": 2}, lambda plan: (len(plan.pairs), plan.registers) == (3, 2)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_whatever_is_wanted_is_kept(planted_vit, wanted, check):
    model, planted = planted_vit
    plan = find(model, noise(), force=True, **wanted)
    assert check(plan)
    assert {key: plan.provenance["wanted"][key] for key in wanted} == wanted
    trials = plan.provenance["trials"]
    assert [trial["chosen"] for trial in trials].count(True) == 1
    if wanted.get("recipe") != "paper" and "top_k" not in wanted:
        assert pairs(planted.neurons) <= set(plan.pairs)


def test_the_published_recipe(planted_vit):
    model, planted = planted_vit
    plan = find(model, noise(), recipe="paper", force=True)
    assert (len(plan.pairs), plan.registers, plan.entry, plan.form, plan.rest) == (10, 1, 0, "dynamic", None)
    # By mean activation at outliers alone, which decoys have more of than register neurons.
    assert {planted.decoys["everywhere"][0], planted.decoys["tiny"][0]} <= set(plan.pairs)
    best = [row["outliers"] for row in plan.provenance["candidates"][:10]]
    assert best == sorted(best, reverse=True)
    assert {(row["block"], row["neuron"]) for row in plan.provenance["candidates"][:10]} == set(plan.pairs)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number from 1 to 96, not 0"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"registers": 2.5}, "registers must be a whole number from 1"),
        ({"entry": 6}, "entry must be a whole number from 0 to 5, not 6"),
        ({"form": "static"}, "form must be one of dynamic, constant, attention, not 'static'"),
        ({"recipe": "theirs"}, "recipe must be one of auto, paper"),
        ({"threshold": -1}, "threshold must be a norm above 0"),
        ({"threshold": float("nan")}, "threshold must be a norm above 0"),
        ({"threshold": "loud"}, "threshold must be a norm above 0"),
        ({"blocks": (4, 2)}, r"blocks must be the first and the last block, each from 0 to 5, not \(4, 2\)"),
        ({"blocks": (0, 6)}, "blocks must be the first and the last block"),
        ({"blocks": 3}, "blocks must be the first and the last block"),
        ({"form": "constant", "entry": 0}, "entry must be 1 or more"),
        ({"form": "constant", "recipe": "paper"}, "the published recipe has dynamic registers"),
    ],
    ids=str,
)
def test_what_cannot_be_wanted_is_refused_before_any_image_is_read(planted_vit, wanted, message):
    def unread():
        pytest.fail("images were read")
        yield

    with pytest.raises(testreg.BadPlan, match=message):
        find(planted_vit[0], unread(), **wanted)


def test_more_neurons_than_there_are(planted_vit):
    with pytest.raises(testreg.BadPlan, match=r"top_k is 90, but only \d neurons"):
        find(planted_vit[0], noise(), top_k=90)


def test_a_threshold_above_all_norms(planted_vit):
    with pytest.raises(testreg.NoOutliers, match="above the norm 100000 that was asked for"):
        find(planted_vit[0], noise(), threshold=1e5)


def test_blocks_in_which_no_register_neuron_is(planted_vit):
    with pytest.raises(testreg.Harmful, match="no MLP neuron of blocks 0 to 0"):
        find(planted_vit[0], noise(), blocks=(0, 0))


# Bad input; and the model afterwards.


@pytest.mark.parametrize("images", [noise(1), noise(5), noise(1).expand(40, -1, -1, -1)], ids=["1", "5", "the same"])
def test_too_few_different_images(planted_vit, images):
    with pytest.raises(testreg.BadImages, match=r"\d different images are too few: at least 6"):
        find(planted_vit[0], images)


def test_images_of_which_too_few_have_the_artefact():
    model, _ = grown("siglip", where="content")
    images = torch.linspace(-1, 1, 24)[:, None, None, None].repeat(1, 3, 96, 96)  # plain grey: nothing to follow
    images[:2] = noise(2)
    with pytest.raises(testreg.BadImages, match="2 of 24 images have outlier patches, and three are the least"):
        find(model, images)


def test_a_patched_model_is_refused(planted_vit, first_plan):
    model, _ = planted_vit
    with testreg.patch(model, first_plan), pytest.raises(testreg.TestregError, match="patched already"):
        find(model, noise())


def traces(model):
    """Everything that `find` could leave behind."""
    return [
        (name, module.training, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("fails", [None, "scan", "rank", "trial"])
def test_the_model_is_as_it_was(planted_vit, monkeypatch, fails):
    model = copy.deepcopy(planted_vit[0]).train()
    model.layers[2].eval()  # as frozen parts are
    images = noise()
    if fails == "scan":
        with torch.no_grad():
            model.layers[4].mlp.fc2.weight[0, 0] = float("nan")
    elif fails:
        owner, name = {"rank": (testreg.finding.detect._Sums, "means"), "trial": (testreg.finding.scan, "answer")}[
            fails
        ]
        calls, original = iter(range(100)), getattr(owner, name)

        def broken(*args, **kwargs):
            if fails == "rank" or next(calls) > 1:
                raise RuntimeError("broken")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)
    weights, before = copy.deepcopy(model.state_dict()), traces(model)
    if fails:
        with pytest.raises((testreg.TestregError, RuntimeError), match=r"NaN|broken"):
            find(model, images)
    else:
        find(model, images)
    assert traces(model) == before
    assert torch.is_grad_enabled()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]) or fails == "scan"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(planted_vit, first_plan, dtype):
    plan = find(copy.deepcopy(planted_vit[0]).to(dtype), noise())
    assert pairs(planted_vit[1].neurons) <= set(plan.pairs)
    assert plan.state.dtype == torch.float32


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_tower_inside_a_model_that_reads_text_too(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=SHAPE)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    planted = plant(model, seed=2, where="corners")
    assert set(find(model, noise()).pairs) == pairs(planted.neurons)


def test_provenance_is_plain_json_and_tells_all(first_plan):
    about = first_plan.provenance
    assert json.loads(json.dumps(about)) == about
    assert about["split"] == {"ranked": 8, "tried": 8, "held_out": 8}
    chosen = next(trial for trial in about["trials"] if trial["chosen"])
    least = min(trial["drift"] for trial in about["trials"] if trial["left"] == 0)
    assert chosen["drift"] <= max(1.05 * least, least + 2.5e-4)
    assert {trial["form"] for trial in about["trials"]} == {"attention", "constant", "dynamic"}
    assert about["before"]["outlier_patches"] > about["after"]["outlier_patches"] == 0
    assert about["resolution"] == [96, 96]


def test_resolution_is_that_of_images_not_of_packed_patches():
    assert search._resolution(torch.zeros(1, 3, 32, 48)) == [32, 48]
    assert search._resolution(torch.zeros(1, 4, 3, 32, 48)) == [32, 48]  # of a video
    assert search._resolution(torch.zeros(1, 16, 588)) is None


# The guard.


def test_no_good_plan_is_harmful_unless_forced(planted_vit):
    # One dynamic register that joins behind the neurons never receives what they write.
    wanted = {"form": "dynamic", "entry": 5, "registers": 1}
    model, _ = planted_vit
    with pytest.raises(testreg.Harmful, match=r"cosine with the unpatched model 0\.\d{3} of the output .* force=True"):
        find(model, noise(), **wanted)
    plan = find(model, noise(), force=True, **wanted)
    assert min(plan.provenance["guard"]["cosine"], plan.provenance["guard"]["features"]) < search.LEAST_COSINE


def test_outliers_that_stay_are_harmful():
    # What one of two neurons leaves is an outlier still.
    model, _ = grown("vit", seed=4, neurons=2, scale=50, where="corners")
    with pytest.raises(testreg.Harmful, match=r"leaves \d\.\d\d% of the patches outliers, of \d\.\d\d%"):
        find(model, noise(), top_k=1)


# Real checkpoints.


@pytest.fixture(scope="module")
def real(assets):
    folder = assets / "images" / "coco_cc"
    names = json.loads((folder / "splits.json").read_text())["calib"]
    model = AutoModelForImageClassification.from_pretrained(assets / "checkpoints" / "vit-tiny-augreg").eval()
    return model, [folder / "images" / name for name in names]


@pytest.mark.parametrize("count", [16, 64, 81])
def test_the_real_checkpoint(real, count):
    model, photos = real
    plan = testreg.find(model, photos[:count])
    about = plan.provenance
    assert about["images"]["count"] == count
    first = about["candidates"][0]
    assert (first["block"], first["neuron"]) == (7, 417)
    assert {(7, 417), (6, 189), (6, 59)} <= set(plan.pairs)
    assert len(plan.pairs) <= 6
    assert (plan.form, plan.entry) == ("attention", 7)
    assert [plan.registers_for(patches) for patches in (100, 196, 400)] in (
        [[3, plan.registers, 7], [2, plan.registers, 7]]
    )
    assert 12 <= plan.registers_for(784) <= 16
    assert 3 <= plan.registers <= 5
    assert 0.019 < about["before"]["outlier_patches"] < 0.021
    assert about["positions"] == [0, 13, 182, 195]  # the corners, as in every image
    guard = about["guard"]
    assert guard["left"] == 0
    assert guard["cosine"] > 0.999
    assert guard["features"] > 0.999
    assert guard["agreement"] > 0.95


def test_real_checkpoints_without_the_artefact_are_refused(real, assets):
    model = AutoModel.from_pretrained(assets / "checkpoints" / "deit-tiny").eval()
    with pytest.raises(testreg.NoOutliers, match=r"the largest patch norm is 2\.\d times the median"):
        testreg.find(model, real[1][:16])
