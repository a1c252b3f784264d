"""Metrics against scikit-learn, pycocotools, numpy, closed forms and planted answers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier

from testreg import metrics

seeds = st.integers(0, 2**16)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Outliers


def test_block_norms_are_numpys():
    norms = list(random(0, 5, 3, 40).abs() * 10 + 1)
    norms[2][1, 7] = 500
    for block, row in enumerate(metrics.block_norms(norms, times=3.5)):
        values = np.stack([image[block].numpy() for image in norms])
        medians = np.quantile(values, 0.5, axis=1, method="lower", keepdims=True)
        assert row.median == pytest.approx(np.quantile(values, 0.5, method="lower"))
        assert row.p99 == pytest.approx(np.quantile(values, 0.99, method="higher"))
        assert row.largest == values.max()
        assert row.share == pytest.approx((values > 3.5 * medians).mean())
        assert row.images == pytest.approx((values > 3.5 * medians).any(axis=1).mean())
    assert metrics.block_norms(norms, times=20)[1].images == pytest.approx(1 / 5)
    both = [(values > 3.5 * np.quantile(values, 0.5, axis=1, method="lower", keepdims=True)) & (values > 9.0)
            for values in (image.numpy() for image in norms)]  # fmt: skip
    shares = [row.share for row in metrics.block_norms(norms, times=3.5, norm=9.0)]
    assert shares == pytest.approx(np.stack(both).mean(axis=(0, 2)).tolist())


def test_interpolation_gives_back_a_smooth_field():
    row, column = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    plane = torch.stack([row, column, 2 * row - column], dim=-1)  # linear: the mean around a patch is its own value
    outliers = torch.zeros(6, 9, dtype=torch.bool)
    outliers[2, 3] = outliers[4, 6] = True
    spoilt = torch.where(outliers[..., None], torch.tensor(1e4), plane)
    torch.testing.assert_close(metrics.interpolate(spoilt, outliers), plane, atol=1e-5, rtol=1e-5)


def test_interpolation_never_uses_an_outlier_and_changes_nothing_else():
    features, outliers = random(1, 5, 5, 4), torch.zeros(5, 5, dtype=torch.bool)
    outliers[:2, :3] = True
    found = metrics.interpolate(features, outliers)
    assert torch.equal(found[~outliers], features[~outliers])
    corner = features[~outliers].mean(0)  # its neighbours are outliers too
    torch.testing.assert_close(found[0, 0], corner)
    torch.testing.assert_close(found[0, 2], torch.stack([features[0, 3], features[1, 3]]).mean(0))
    huge = torch.where(outliers[..., None], features * 1e6, features)
    torch.testing.assert_close(metrics.interpolate(huge, outliers), found, rtol=1e-3, atol=1e-3)
    assert metrics.interpolate(features, torch.zeros_like(outliers)) is features


# Sinks


def test_uniform_causal_attention_has_the_closed_form():
    tokens = 6
    uniform = torch.tril(torch.ones(tokens, tokens)) / torch.arange(1, tokens + 1)[:, None]
    alpha = metrics.received(uniform, causal=True)
    expected = [np.mean([1 / (query + 1) for query in range(key, tokens)]) for key in range(tokens)]
    np.testing.assert_allclose(alpha.numpy(), expected, rtol=1e-6)


def test_the_sink_rate_counts_layers_and_heads():
    maps = torch.full((2, 1, 4, 5, 5), 0.2)
    maps[0, 0, :3] = torch.eye(5)[1]  # three of eight heads look at token 1 alone
    assert metrics.sink_rate(maps).tolist() == [[0, 3 / 8, 0, 0, 0]]
    assert metrics.sink_rate(maps, epsilon=0.1).tolist() == [[5 / 8, 1, 5 / 8, 5 / 8, 5 / 8]]


def test_sinks_of_a_vision_tower_tell_patches_from_class_token_and_registers():
    maps = torch.zeros(1, 2, 1, 4, 4)
    maps[0, 0, 0, :, 0], maps[0, 0, 0, :, 2] = 0.25, 0.75  # first image: a sink on a patch
    maps[0, 1, 0, :, 0], maps[0, 1, 0, :, 1:] = 0.3, 0.1  # second: the registers took 0.4
    found = metrics.sinks(maps, prefix=1)
    assert found.rate.tolist() == [1, 0]
    torch.testing.assert_close(found.largest, torch.tensor([0.75, 0.1]))
    torch.testing.assert_close(found.class_token, torch.tensor([0.25, 0.3]))
    torch.testing.assert_close(found.registers, torch.tensor([0.0, 0.4]))


# Agreement


def test_agreement_is_cosine_and_argmax():
    output, reference = random(2, 7, 10), random(3, 7, 10)
    found = metrics.agreement(output, reference)
    np.testing.assert_allclose(found.cosine, np.diag(cosine_similarity(output, reference)), rtol=1e-5)
    assert found.same.tolist() == (output.numpy().argmax(1) == reference.numpy().argmax(1)).tolist()


# LOST


def planted(rows, columns, top, left, height, width, noise, seed=0):
    """A background whose patches are alike, and an object whose patches are alike in another way."""
    features = torch.tensor([1.0, 0.0, 0.0]).expand(rows, columns, 3).clone()
    features[top : top + height, left : left + width] = torch.tensor([0.0, 1.0, 0.0])
    return features + noise * random(seed, rows, columns, 3)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_lost_finds_a_planted_object(data):
    rows, columns = data.draw(st.integers(6, 14)), data.draw(st.integers(6, 14))
    height, width = data.draw(st.integers(1, rows // 2)), data.draw(st.integers(1, columns // 2))
    top, left = data.draw(st.integers(0, rows - height)), data.draw(st.integers(0, columns - width))
    features = planted(rows, columns, top, left, height, width, noise=0.01, seed=data.draw(seeds))
    assert metrics.lost(features, bias=-0.4) == (left, top, left + width, top + height)
    scaled = features * (0.1 + random(0, rows, columns, 1).abs())  # norms do not count when they are normalised
    assert metrics.lost(scaled, bias=-0.4) == (left, top, left + width, top + height)


def test_lost_keeps_to_the_part_that_holds_the_seed():
    features = planted(8, 8, 1, 1, 2, 2, noise=0)
    features[5:7, 5:8] = torch.tensor([0.0, 1.0, 0.0])  # alike, but apart; and the first of equals is the seed
    assert metrics.lost(features, bias=-0.4) == (1, 1, 3, 3)


def test_lost_without_normalisation_uses_the_papers_inner_products():
    features = torch.ones(6, 6, 1)
    features[2:4, 3:5] = -1  # of fewer patches alike
    assert metrics.lost(features, bias=None) == (3, 2, 5, 4)
    assert metrics.lost(torch.zeros(3, 4, 2), bias=None) == (0, 0, 1, 1)  # nothing resembles anything
    lone = torch.zeros(3, 4, 2)
    lone[1, 2, 0] = 1  # resembles itself, which does not count
    assert metrics.lost(lone, bias=None) == (0, 0, 1, 1)


def voting():
    """One row: a seed at 0, a long one that is like it, one that is like the long one alone, and a background."""
    angles = torch.deg2rad(torch.tensor([0.0, 47.5, 120, 265, 265, 265, 265]))
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.tensor([1.0, 10, 1, 1, 1, 1, 1])[:, None]


def test_all_that_resemble_the_seed_vote_and_norms_weigh_unless_normalised():
    assert metrics.lost(voting()[None], bias=None) == (0, 0, 3, 1)  # -0.5 from the seed, 3 from the long one
    assert metrics.lost(voting()[None], bias=0.0) == (0, 0, 2, 1)  # -0.5 and 0.3


def test_only_the_hundred_patches_of_lowest_degree_vote():
    pairs = torch.zeros(110, 57)  # 55 pairs, each alike and like nothing else: of a lower degree than the long one
    pairs[torch.arange(110), 2 + torch.arange(110) // 2] = 1
    row = torch.cat([torch.nn.functional.pad(voting(), (0, 55)), pairs])
    assert metrics.lost(row[None, :-22], bias=None) == (0, 0, 3, 1)
    assert metrics.lost(row[None], bias=None) == (0, 0, 2, 1)


boxes = st.tuples(*[st.floats(0, 50, width=32)] * 2, *[st.floats(0.5, 50, width=32)] * 2)


@given(boxes, st.lists(boxes, min_size=1, max_size=4))
def test_overlap_is_that_of_pycocotools(box, others):
    def corners(box):
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]

    found = metrics.overlap(torch.tensor(corners(box)), torch.tensor([corners(other) for other in others]))
    expected = coco.iou(np.array([box], float), np.array(others, float), [0] * len(others))[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_a_box_is_located_from_half_on():
    truth = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    assert metrics.located(torch.tensor([0.0, 0, 10, 5]), truth)
    assert not metrics.located(torch.tensor([0.0, 0, 10, 4.9]), truth)


# Segmentation


@given(seeds, st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_iou_and_accuracy_are_scikit_learns(seed, classes):
    generator = np.random.default_rng(seed)
    true = generator.integers(0, classes, (2, 6, 7))
    predicted = np.where(generator.random((2, 6, 7)) < 0.6, true, generator.integers(0, classes, (2, 6, 7)))
    ignored = generator.random((2, 6, 7)) < 0.2
    ignored.flat[0] = False
    counts = sum(
        metrics.intersections(torch.tensor(p), torch.tensor(np.where(i, 255, t)), classes)
        for p, t, i in zip(predicted, true, ignored, strict=True)
    )
    seen = sorted({*true[~ignored], *predicted[~ignored]})
    expected = jaccard_score(true[~ignored], predicted[~ignored], average="macro", labels=seen)
    assert float(metrics.mean_iou(counts)) == pytest.approx(expected)
    assert float(metrics.pixel_accuracy(counts)) == pytest.approx(accuracy_score(true[~ignored], predicted[~ignored]))


def test_foreground_is_where_the_attention_is():
    attention = torch.zeros(4, 6)
    attention[1:3, 2:4] = 1
    scores = metrics.foreground(attention, 32, 48)
    assert scores.shape == (32, 48)
    assert (scores.min(), scores.max()) == (0, 1)
    true = torch.zeros(32, 48, dtype=torch.long)
    true[8:24, 16:32] = 1
    assert metrics.pixel_ap(scores, true) > 0.99
    assert metrics.pixel_ap(1 - scores, true) < 0.3
    counts = metrics.intersections(metrics.split(scores), true, 2)
    assert metrics.mean_iou(counts) > 0.7
    true[:, :8] = 255
    assert metrics.intersections(metrics.split(scores), true, 2)[:, 2].sum() == 32 * 40


def test_flat_attention_is_no_division_by_zero():
    assert metrics.foreground(torch.ones(3, 3), 6, 6).isfinite().all()


def test_the_probe_learns_what_is_linear_and_the_seed_decides_all():
    labels = (random(4, 6, 8, 8) > 0).long()
    features = torch.cat([labels[:, None].float(), random(5, 6, 5, 8, 8)], dim=1)
    probe = metrics.linear_probe(features, labels, 2, seed=1)
    assert (probe(features).argmax(1) == labels).float().mean() > 0.99
    again, other = (metrics.linear_probe(features, labels, 2, seed=seed) for seed in (1, 2))
    assert torch.equal(again(features), probe(features))
    assert not torch.equal(other(features), probe(features))


def test_the_probe_does_not_learn_from_what_is_ignored():
    labels = torch.zeros(4, 6, 6, dtype=torch.long)
    labels[:, 3:] = 1
    features = labels[:, None].float() + 0.1 * random(6, 4, 1, 6, 6)
    wrong = torch.where(random(7, 4, 6, 6) > 0, labels, 255)
    assert (metrics.linear_probe(features, wrong, 2)(features).argmax(1) == labels).all()


# Classes


@given(seeds, st.integers(1, 30))
@settings(max_examples=15, deadline=None)
def test_knn_is_scikit_learns_with_the_same_votes(seed, k):
    features, labels = random(seed, 20, 6), torch.arange(20) % 3
    found = metrics.knn(features, labels, k=k)
    expected = []
    for out in range(20):  # leave one out
        rest = [row for row in range(20) if row != out]
        judge = KNeighborsClassifier(
            min(k, 19), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        expected.append(judge.fit(features[rest].numpy(), labels[rest].numpy()).predict(features[[out]].numpy())[0])
    assert found.tolist() == expected


def test_top1_and_zero_shot_take_the_largest():
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    assert metrics.top1(logits, torch.tensor([1, 1])).tolist() == [True, False]
    images, texts = random(8, 9, 5), random(9, 4, 5)
    assert metrics.zero_shot(images, texts * 7).tolist() == cosine_similarity(images, texts).argmax(1).tolist()


# Intervals


def test_the_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = metrics.bootstrap(lambda index: values[index].mean(axis=-1), 400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.03)
    assert found.high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.03)


def test_paired_differences_have_narrow_intervals():
    generator = np.random.default_rng(0)
    first = generator.normal(0, 10, 200)
    second = first + 1 + generator.normal(0, 0.1, 200)
    found = metrics.bootstrap(lambda index: (second[index] - first[index]).mean(axis=-1), 200)
    assert 0.95 < found.low < found.value < found.high < 1.05


def test_one_image_has_no_interval_and_the_draws_are_the_same_each_time():
    one = metrics.bootstrap(lambda index: 5.0, 1)
    assert one.value == 5
    assert np.isnan([one.low, one.high]).all()
    values = np.arange(30.0)
    first, second = (metrics.bootstrap(lambda index: values[index].mean(axis=-1), 30) for _ in range(2))
    assert first == second
