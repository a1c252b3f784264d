"""What kind of artefact it is, on planted models whose kind is known, and against plain computations."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from growing import bare, grown, images
from torch.nn.functional import cosine_similarity

import testreg
from testreg.finding import nature as natures
from testreg.finding.attending import attending
from testreg.finding.closer import glances
from testreg.finding.detect import Artefact
from testreg.finding.nature import Nature
from testreg.finding.scan import scan
from testreg.finding.still import quiet
from testreg.finding.trial import Threshold
from testreg.images import stream
from testreg.images.streaming import _digest
from testreg.metrics.outliers import locked
from testreg.runtime.errors import UnsupportedModel
from testreg.runtime.towers import find_tower


def kind(count=16, **settings):
    model, planted = grown(**settings)
    return model, planted, testreg.inspect(model, images(count))


def test_corners_are_locked_to_places():
    _, _, seen = kind(where="corners")
    assert (seen.nature.where, seen.nature.locked) == ("position", 1.0)
    assert seen.nature.places == (0, 11, 132, 143)
    assert seen.nature.sentences[0] == (
        "Locked to places: 100% of the outliers are at the same 4 patches in every image."
    )


def test_content_is_told_from_places():
    _, _, seen = kind(where="content")
    assert (seen.nature.where, seen.nature.locked, seen.nature.places) == ("content", 0.0, ())


def test_both_where_half_of_the_outliers_are_locked():
    rows = [torch.zeros(20, dtype=torch.bool) for _ in range(8)]
    for index, row in enumerate(rows):
        row[0] = row[1 + index] = True
    assert locked(rows, natures.OFTEN) == (0.5, (0,))
    assert locked(rows, 1 / 8) == (1.0, tuple(range(9)))
    assert locked([*rows, torch.zeros(21, dtype=torch.bool)], natures.OFTEN) == (None, ())


def test_too_few_images_are_said():
    _, _, seen = kind(2, where="corners")
    assert seen.nature.where == "unknown"
    assert seen.nature.pattern is None
    assert seen.nature.sentences[0].startswith("Too few images")


def test_states_values_and_attention_are_those_of_a_plain_computation():
    model, planted, seen = kind(where="corners")
    model.set_attn_implementation("eager")
    kept = sorted(images().unbind(), key=lambda image: _digest({"pixel_values": image[None]}))
    values: dict[int, torch.Tensor] = {}
    for block, layer in enumerate(model.layers):
        layer.attention.v_proj.register_forward_hook(
            lambda _, args, output, block=block: values.update({block: output})
        )
    with torch.no_grad():
        output = model(pixel_values=torch.stack(kept), output_hidden_states=True, output_attentions=True)
    behind = range(planted.block + 1, 5)
    corners = torch.tensor([0, 11, 132, 143])  # of four images, they are enough
    others = torch.ones(144, dtype=torch.bool).index_fill(0, corners, False)
    norms = torch.stack([values[block][:4, 1:].norm(dim=-1) for block in behind])  # (blocks, images, patches)
    ratio = (norms[..., corners].mean(-1) / norms[..., others].mean(-1)).mean()
    assert seen.nature.values == pytest.approx(ratio.item(), rel=1e-4)
    maps = torch.stack(output.attentions)[list(behind), :4].mean(-2)[..., 1:]  # (blocks, images, heads, patches)
    assert seen.nature.attention == pytest.approx(maps[..., corners].sum(-1).mean().item(), rel=1e-4)
    states = output.hidden_states[seen.artefact.shown + 1][:4, 1:][:, corners].flatten(0, 1)
    assert seen.nature.likeness == pytest.approx(
        cosine_similarity(states, states.mean(0)[None]).mean().item(), rel=1e-4
    )
    assert seen.nature.states == 1


@pytest.mark.parametrize(
    "unseen", [(), ("_keep_attention",), ("_keep_projected",), ("_keep_attention", "_keep_projected")]
)
def test_what_cannot_be_seen_hides_nothing_else(monkeypatch, unseen):
    model, _, whole = kind(where="corners")

    def refuse(*args):
        raise UnsupportedModel("this attention shows nothing.")

    for name in unseen:
        monkeypatch.setattr(sys.modules["testreg.finding.observe"], name, refuse)
    seen = testreg.inspect(model, images())
    hidden = {"attention": None} if "_keep_attention" in unseen else {}
    hidden |= {"values": None} if "_keep_projected" in unseen else {}
    wanted = replace(whole.nature, **hidden)
    assert replace(seen.nature, values=None) == replace(wanted, values=None)
    assert (seen.nature.values is None) == (wanted.values is None)
    # Attention that gives maps rounds otherwise.
    assert (seen.nature.values or 0.0) == pytest.approx(wanted.values or 0.0, rel=1e-5)
    assert seen.attention == (whole.attention if "attention" not in hidden else None)


def test_every_image_is_looked_at_closely_in_one_pass():
    model, _ = grown(where="corners")
    alone = []
    model.register_forward_hook(lambda module, args, output: alone.append(len(output.last_hidden_state) == 1))
    testreg.find(model, images(24), sizes=())
    assert sum(alone) == 4  # which show 16 outliers


def test_kinds_of_states_are_counted():
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(64)[:6] * 10
    for count in (1, 2, 3, 4):
        states = axes[torch.arange(60) % count] + 0.2 * torch.randn(60, 64, generator=generator)
        found, likeness = natures._kinds(states)
        assert found == count
        assert likeness > 0.95
    found, likeness = natures._kinds(torch.randn(60, 64, generator=generator))
    assert (found, likeness < 0.9) == (4, True)


def test_a_pattern_of_places_is_its_share_of_the_variance(monkeypatch):
    class Image:
        def __init__(self, features):
            self.features = features

    generator = torch.Generator().manual_seed(0)
    places = torch.randn(400, 8, generator=generator)

    def share(strength, count=16):
        noise = torch.randn(count, 400, 8, generator=generator)
        rows = [torch.zeros(400, dtype=torch.bool) for _ in range(count)]
        return natures._pattern([Image(strength * places + one) for one in noise], rows)

    assert share(0) == pytest.approx(0, abs=0.02)
    assert share(1) == pytest.approx(0.5, abs=0.03)
    assert share(3) == pytest.approx(0.9, abs=0.03)
    assert share(1, 3) is None


def test_patches_spoilt_at_ordinary_norm_are_counted():
    """A tenth of the patches get what outliers have, at a small part of its size."""
    model, planted, before = kind(where="corners")
    assert before.nature.alike < 0.01
    away = planted_direction(model, planted)
    marked = list(range(40, 54))

    def spoil(module, args, output):
        tokens = output[0] if isinstance(output, tuple) else output
        tokens[:, [1 + place for place in marked]] += 1.5 * 48**0.5 * away

    model.layers[planted.block].register_forward_hook(spoil)
    after = testreg.inspect(model, images())
    assert after.nature.alike == pytest.approx(14 / 140, abs=0.01)
    assert "spoilt at ordinary norm: 10% of the others lie the outliers' way" in " ".join(after.nature.sentences)
    assert after.artefact.share == pytest.approx(4 / 144, abs=1e-6)


def planted_direction(model, planted):
    seen = []
    handle = model.layers[planted.block].register_forward_hook(
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(pixel_values=images())
    handle.remove()
    patches = seen[0][:, 1:]
    corners = patches[:, [0, 11, 132, 143]].mean((0, 1))
    others = patches.mean((0, 1))
    return torch.nn.functional.normalize(corners - others, dim=0)


@pytest.mark.parametrize(
    ("values", "sink", "says"),
    [(0.1, "idle", "give nothing"), (0.3, "between", "between"), (0.8, "broadcasting", "tell"), (None, "unknown", "")],
)
def test_what_sinks_do_is_told_by_their_values(values, sink, says):
    found = Nature("position", 1.0, (0,), 1, 0.99, values, 0.3, 0.0, 0.0)
    assert found.sink == sink
    assert any(says in line for line in found.sentences)
    assert ("usual norm" in " ".join(found.sentences)) == (values is not None)


def test_no_image_that_shows_it_no_kind():
    model, planted = grown(where="corners")
    found = Artefact(Threshold(1e6), planted.block, planted.block, 0.01, 0.05)
    with quiet(model):
        tower = find_tower(model)
        _, kept = scan(model, tower, stream(images()))
        looks = glances(model, tower, list(kept), found)
    assert [look.state for look in looks] == [None] * 4
    assert natures.nature(list(kept), looks, found, attending(looks, tower, found)) is None


def test_no_artefact_no_kind():
    assert testreg.inspect(bare(), images()).nature is None


def test_a_plan_its_card_and_plain_json_say_it():
    model, _ = grown(where="corners")
    plan = testreg.find(model, images())
    told = plan.provenance["nature"]
    assert json.loads(json.dumps(told)) == told
    assert told["where"] == "position"
    from testreg.checkpoints.card import card

    text = card(plan, "ViTModel", "me/vit", None).text
    assert all(sentence in text for sentence in told["sentences"])
