"""Statistics of images: sums that add up exactly, a sample that does not depend on order, memory that does not grow."""

import gc
import pickle

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from testreg.finding.ondisk import OnDisk
from testreg.finding.scan import SAMPLE, Histogram, Kept, Norms, Sample, look, scan
from testreg.finding.still import quiet
from testreg.images.streaming import Batch, stream
from testreg.runtime.errors import TestregError
from testreg.runtime.towers import find_tower

BLOCKS = 3
HISTOGRAMS = ("norms", "ratios", "peaks", "highest")


def norms_of(images):
    total = Norms(BLOCKS)
    for image in images:
        total.add(image[None])
    return total


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 9))
def test_norms_of_two_halves_are_those_of_the_whole(seed, count, cut):
    images = torch.randn(count, BLOCKS, 7, generator=torch.Generator().manual_seed(seed)).exp()
    cut = min(cut, count)
    whole, sum_ = norms_of(images), norms_of(images[:cut]) + norms_of(images[cut:])
    assert sum_.images == whole.images == count
    assert torch.equal(sum_.largest, whole.largest)
    for name in HISTOGRAMS:
        assert torch.equal(getattr(sum_, name).counts, getattr(whole, name).counts)
    batched = Norms(BLOCKS)
    batched.add(images)
    assert torch.equal(batched.ratios.counts, whole.ratios.counts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=300), st.floats(0.01, 0.99))
def test_quantiles_lie_within_a_bin_of_the_exact_ones(values, share):
    histogram = Histogram(1)
    histogram.add(torch.tensor(values)[None, None])
    exact = sorted(values)[max(0, min(len(values) - 1, -int(-share * len(values) // 1) - 1))]
    assert histogram.quantile(share).item() == pytest.approx(exact, rel=0.025)


def kept(digest):
    return Kept(digest, torch.zeros(1, 1), torch.zeros(1), {})


def sampled(digests, size=4):
    sample = Sample(size)
    for digest in digests:
        sample.add(digest, lambda digest=digest: kept(digest))
    return sample


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=30), st.integers(0, 30), st.randoms())
def test_a_sample_holds_the_lowest_digests_once_each(digests, cut, random):
    lowest = sorted(set(digests))[:4]
    assert [image.digest for image in sampled(digests)] == lowest
    halves = sampled(digests[:cut]) + sampled(digests[cut:])
    assert [image.digest for image in halves] == lowest
    random.shuffle(digests)
    assert [image.digest for image in sampled(digests)] == lowest


def test_norms_are_those_of_the_hidden_states():
    model, inputs = zoo.build("ViTModel", 4)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1:]
        seen = look(model, find_tower(model), inputs)
    for block, states in enumerate(hidden[:-1]):
        assert torch.allclose(seen.norms[:, block], states[:, 1:].norm(dim=-1), atol=1e-5)
    assert torch.equal(seen.output, model(**inputs).pooler_output)


@pytest.mark.parametrize(
    "name", ["timm.VisionTransformer", "open_clip.VisionTransformer", "torchvision.VisionTransformer"]
)
def test_models_that_do_not_know_pixel_values_by_name(name):
    model, inputs = zoo.build(name, 4)
    images = inputs[zoo.pixels(inputs)]
    with quiet(model):
        norms, sample = scan(model, find_tower(model), stream(images))
    assert norms.images == len(sample) == 4


def test_padding_is_never_an_outlier():
    model, inputs = zoo.build("Siglip2VisionModel", 4)
    mask = inputs["pixel_attention_mask"].bool()
    assert not mask.all()
    loud = {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(~mask[..., None], 1e3)}
    tower = find_tower(model)
    quiet_norms, loud_norms = look(model, tower, inputs).norms, look(model, tower, loud).norms
    assert torch.allclose(quiet_norms, loud_norms, rtol=1e-4)
    for norms, real in zip(loud_norms, mask, strict=True):
        middle = norms[:, real].median(dim=-1, keepdim=True).values
        assert torch.equal(norms[:, ~real], middle.expand(-1, int((~real).sum())))


def test_broken_weights_are_named_by_their_block():
    model, inputs = zoo.build("ViTModel", 2)
    with torch.no_grad():
        find_tower(model).downs[1].weight[0, 0] = float("nan")
    with pytest.raises(TestregError, match="block 1 gives NaN"):
        look(model, find_tower(model), inputs)


def bytes_alive():
    gc.collect()
    return sum(dict(memory(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)).values())


def memory(tensor):
    """Where a tensor's memory is, and how large."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # a tracer's tensor has no memory
        return 0, 0


def test_memory_does_not_grow_with_the_number_of_images():
    model, _ = zoo.build("ViTModel")
    alive = {}

    def images():
        random = torch.Generator().manual_seed(0)
        for index in range(300):
            if index in (11, 299):  # both are the last of a batch
                alive[index] = bytes_alive()
            yield torch.randn(3, zoo.SIZE, zoo.SIZE, generator=random)

    with quiet(model):
        norms, sample = scan(model, find_tower(model), stream(images(), batch_size=4))
    assert (norms.images, len(sample)) == (300, SAMPLE)
    small = sum(image.norms.nbytes + image.output.nbytes for image in sample)
    assert alive[299] <= alive[11] + small < 1.1 * alive[11]


def test_a_kept_image_holds_neither_its_batch_nor_what_is_large():
    model, inputs = zoo.build("ViTModel", 16)
    batch = Batch(inputs, tuple(f"{index:064x}" for index in range(16)))
    with quiet(model):
        _, sample = scan(model, find_tower(model), [batch], size=2)
        seen = look(model, find_tower(model), inputs)
    for index, image in enumerate(sample):
        assert isinstance(image.large, OnDisk)
        for tensor in (image.norms, image.output):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert image.inputs.keys() == inputs.keys()
        assert all(torch.equal(image.inputs[name][0], inputs[name][index]) for name in inputs)
        assert torch.equal(image.features, seen.features[index])


def test_samples_of_other_processes_go_to_the_disk_of_this_one_as_far_as_they_are_kept():
    model, inputs = zoo.build("ViTModel", 16)
    parts = []
    for start in (0, 8):
        digests = tuple(f"{index:064x}" for index in range(start, start + 8))
        batch = Batch({name: rows[start : start + 8] for name, rows in inputs.items()}, digests)
        with quiet(model):
            parts.append(scan(model, find_tower(model), [batch], size=10)[1])
    travelled = [pickle.loads(pickle.dumps(part)) for part in parts]
    together = travelled[0] + travelled[1]
    assert len(together) == 10
    for index, image in enumerate(together):
        assert isinstance(image.large, OnDisk)
        assert torch.equal(image.inputs["pixel_values"][0], inputs["pixel_values"][index])
    for image in parts[0] + parts[1]:  # of one process, they stay where they are
        assert any(image.large is part.large for own in parts for part in own)
