"""Patches made of weights alone: the algebra on its own, and stock checkpoints in the libraries that build them."""

import json
import math

import pytest
import torch
import torchvision_stub
import transformers as hf
from bakeable import BLOCKS, CHANNELS, MODELS, WIDE, largest, photos, planted
from torch.nn.functional import cosine_similarity, gelu, normalize, silu

import testreg
from testreg import BadCheckpoint, BadImages, BadPlan, Harmful, RegisterPlan, UnsupportedModel
from testreg.checkpoints.saving import save
from testreg.demo.planted import plant
from testreg.export.bake import algebra, bake, baked, export_stock, fit
from testreg.finding.observe import observe, run
from testreg.images.streaming import stream
from testreg.runtime.towers import find_tower

OF_TRANSFORMERS = ("dinov2", "swiglu", "dinov2-classifier", "native")
OF_TIMM = tuple(name for name in MODELS if name != "dinov2-classifier")


def answer(output):
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.last_hidden_state[:, 0]


def pull_of(seed, away=0.0):
    """That on a block of random weights with 2 heads of 4 channels, whose queries look away from zero by `away`."""
    random = torch.Generator().manual_seed(seed)
    queries, logits, outputs = (torch.randn(2, 50, size, generator=random) for size in (4, 9, 4))
    weights, biases = torch.randn(2, 8, 8, generator=random), torch.randn(4, 8, generator=random)
    affine = [(weights[0], biases[0]), (weights[1], biases[1]), (biases[2], biases[3])]
    return algebra.pull(queries + away, logits.logsumexp(-1), outputs, *affine)


class TestAlgebra:
    def test_a_pull_is_that_of_attention_with_one_more_token(self):
        random = torch.Generator().manual_seed(0)
        queries, logits, values = (torch.randn(2, *size, generator=random) for size in ((50, 4), (50, 9), (9, 4)))
        key, key_bias, value, value_bias, gain, bias = (
            torch.randn(*shape, generator=random) for shape in ((8, 8), (8,), (8, 8), (8,), (8,), (8,))
        )
        before = logits.softmax(-1) @ values
        pull = algebra.pull(queries, logits.logsumexp(-1), before, (key, key_bias), (value, value_bias), (gain, bias))
        token = algebra.direction(torch.arange(8.0) ** 2)
        new_key, new_value = (
            ((token * gain + bias) @ weight.T + fixed).view(2, 4)
            for weight, fixed in ((key, key_bias), (value, value_bias))
        )
        joined = torch.cat([logits, (queries * new_key[:, None]).sum(-1, keepdim=True)], dim=-1).softmax(-1)
        after = joined @ torch.cat([values, new_value[:, None]], dim=1)
        share = pull.log_odds(token).sigmoid()
        torch.testing.assert_close(share, joined[..., -1].flatten())
        unit = before.square().sum(-1).mean()
        torch.testing.assert_close(share**2 * pull.turn(token), ((after - before).square().sum(-1) / unit).flatten())

    def test_blocks_are_counted_on(self):
        pulls = [pull_of(seed) for seed in range(3)]
        token = algebra.direction(torch.arange(8.0))
        both = algebra.together(pulls)
        torch.testing.assert_close(both.log_odds(token), torch.cat([one.log_odds(token) for one in pulls]))
        torch.testing.assert_close(both.turn(token), torch.cat([one.turn(token) for one in pulls]))

    def test_direction_is_what_layer_norm_makes(self):
        vector = torch.randn(3, 16) * 50 + 7
        expected = torch.nn.functional.layer_norm(vector, (16,), eps=0)
        torch.testing.assert_close(algebra.direction(vector), expected, atol=1e-5, rtol=1e-5)

    def test_repelling_finds_the_one_optimum_from_anywhere(self):
        pull = pull_of(0, away=1)

        def seen(vector):
            return ((pull.log_odds(vector) + math.log(3)).sigmoid().pow(2) * pull.turn(vector)).mean()

        starts = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
        found = torch.stack([algebra.repel(pull, 3, start) for start in starts])
        torch.testing.assert_close(found, found[:1].expand_as(found), atol=0.02, rtol=0.02)
        tries = algebra.direction(torch.randn(3000, 8, generator=torch.Generator().manual_seed(4)))
        assert seen(found[0]) <= min(map(seen, tries))

    def test_repelling_avoids_directions(self):
        pull = pull_of(0)
        avoid = algebra.direction(torch.randn(2, 8))
        found = algebra.repel(pull, 1, torch.randn(8), avoid=avoid)
        torch.testing.assert_close(avoid @ found, torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.stack([found.mean(), found.std(correction=0)]), torch.tensor([0.0, 1.0]))

    @pytest.mark.parametrize("activation", [gelu, silu, torch.relu, lambda x: x * torch.sigmoid(1.702 * x)])
    def test_a_detector_is_silent_on_all_other_tokens(self, activation):
        others = torch.randn(500, 16)
        registers = 0.1 * torch.randn(20, 16) + 8 * torch.eye(16)[3]
        weight, bias, margin = algebra.detector(registers, others)
        assert 0 < margin <= 1
        assert activation(others @ weight + bias).abs().max() < 1e-6
        assert activation(registers @ weight + bias).min() > 0.99 * algebra.CLEARANCE

    def test_a_detector_knows_what_it_cannot_tell(self):
        tokens = torch.randn(500, 16)
        assert algebra.detector(tokens[:50], tokens[50:]).margin < 0

    def test_a_column_adds_the_write_on_average(self):
        write, fired, scale = torch.randn(8), torch.rand(30) + 20, torch.rand(8) + 0.1
        torch.testing.assert_close((fired[:, None] * algebra.column(write, fired, scale) * scale).mean(0), write)
        assert algebra.column(write, fired, torch.zeros(8)).abs().max() == 0


class TestBaked:
    @pytest.mark.parametrize("name", MODELS)
    def test_no_outliers_and_the_features_of_the_run_time_patch(self, name):
        model, plan = planted(name)
        images = photos()
        done = bake(model, plan, images)
        tower = find_tower(model)
        fresh = photos(96)[64:]  # none of which it has seen
        with observe(model, states=range(BLOCKS)) as seen:
            run(model, {"pixel_values": fresh})
            before = dict(seen.states)
            with testreg.patch(model, plan):
                run(model, {"pixel_values": fresh})
            patched = dict(seen.states)
        seed = find_tower(done.model).seed
        joined = done.registers if seed is None else seed(done.registers).detach()
        with testreg.patch(done.model, fit.slots(joined)), observe(done.model, states=range(BLOCKS)) as seen:
            run(done.model, {"pixel_values": fresh})
        written = range(plan.entry - 1, BLOCKS)
        assert all(largest(before[block][:, tower.prefix :]) > 10 for block in written)
        assert all(largest(seen.states[block][:, tower.prefix :]) < 3 for block in written)
        same = cosine_similarity(seen.states[BLOCKS - 1], patched[BLOCKS - 1], dim=-1)[:, tower.prefix :].mean()
        assert same >= 0.999
        assert done.drift.images == 16
        assert done.drift.patches == pytest.approx(float(same), abs=5e-4)
        assert done.drift.outlier < 3 < 10 < done.drift.outlier_unpatched

    @pytest.mark.parametrize("name", OF_TRANSFORMERS)
    @pytest.mark.parametrize("form", ["constant", "dynamic"])
    def test_of_transformers(self, name, form, tmp_path):
        model, plan = planted(name, form)
        export_stock(model, photos(), tmp_path / "out", plan=plan, library="transformers")
        stock = hf.AutoModel if name != "dinov2-classifier" else hf.AutoModelForImageClassification
        loaded = stock.from_pretrained(tmp_path / "out")
        assert type(loaded).__name__.startswith("Dinov2WithRegisters")
        native = 2 * (name == "native")
        assert loaded.config.num_register_tokens == 2 + native
        fresh = photos(80)[64:]
        with testreg.patch(model, plan), torch.no_grad():
            expected, got = model(fresh), loaded(fresh)
        assert cosine_similarity(answer(got), answer(expected)).mean() > 0.999
        with observe(loaded, states=range(BLOCKS)) as seen:
            loaded(fresh)
        for block in range(max(plan.neurons), BLOCKS):
            assert largest(seen.states[block][:, 3 + native :]) < 3
        if name != "dinov2-classifier":
            patches, wanted = got.last_hidden_state[:, 3 + native :], expected.last_hidden_state[:, 1 + native :]
            assert cosine_similarity(patches, wanted, dim=-1).mean() > 0.999

    @pytest.mark.parametrize("name", OF_TIMM)
    def test_of_timm(self, name, tmp_path):
        timm = pytest.importorskip("timm")
        model, plan = planted(name)
        done = export_stock(model, photos(), tmp_path, plan=plan, library="timm")
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert loaded.num_reg_tokens == 2 + (name == "deit") + 2 * (name == "native")
        fresh = photos(80)[64:]
        seed = find_tower(done.model).seed
        joined = done.registers if seed is None else seed(done.registers).detach()
        with torch.no_grad(), testreg.patch(done.model, fit.slots(joined)):
            expected = answer(run(done.model, {"pixel_values": fresh}, whole=True))
            got = loaded(fresh)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        wrapped = hf.AutoModel.from_pretrained(tmp_path).eval()
        assert type(wrapped).__name__ == "TimmWrapperModel"
        with torch.no_grad():
            torch.testing.assert_close(
                wrapped(fresh).last_hidden_state, loaded.forward_features(fresh), atol=1e-5, rtol=1e-5
            )

    def test_labels_and_preprocessing_go_along(self, tmp_path):
        timm = pytest.importorskip("timm")
        model, plan = planted("vit")
        model.config.id2label = {index: f"name {index}" for index in range(7)}
        processor = hf.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=2)
        export_stock(model, photos(), tmp_path, plan=plan, processor=processor)
        wrapped = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
        assert wrapped.config.id2label[3] == "name 3"
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert list(loaded.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["pretrained_cfg"]["interpolation"] == "bilinear"
        assert config["testreg"]["drift"]["images"] == 16

    def test_two_kinds_of_register(self):
        model, plan = planted("vit")
        other = plan.state[0] + 0.5 * plan.state[0].norm() * normalize(torch.randn(CHANNELS), dim=0)
        states = torch.stack([plan.state[0], other, plan.state[0]])
        three = RegisterPlan(plan.neurons, 3, plan.entry, states)
        done = bake(model, three, photos(), force=True)
        acting = testreg.patch(done.model, fit.slots(done.registers))
        with acting.recording() as record:
            run(done.model, {"pixel_values": photos(8)})
        arrived = record.registers[plan.entry - 1].mean(0)
        assert ((arrived - states).norm(dim=-1) < 0.05 * states.norm(dim=-1)).all()

    def test_a_norm_in_front_of_the_blocks_does_not_keep_the_start_short(self):
        model, plan = planted("clip")
        done = bake(model, plan, photos())
        joined = find_tower(done.model).seed(done.registers).detach()
        with testreg.patch(done.model, fit.slots(joined)) as acting, acting.recording() as record:
            run(done.model, {"pixel_values": photos(80)[64:]})
        length = plan.state.norm(dim=-1).mean()
        assert joined.norm(dim=-1).mean() < 0.1 * length
        assert record.registers[0].norm(dim=-1).mean() == pytest.approx(float(fit.SURPLUS * length), rel=0.1)

    @pytest.mark.parametrize("name", ["vit", "clip"])
    def test_registers_go_the_way_of_the_patchs(self, name):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        found = plant(model, upstream=2, decoys=False)
        plan = RegisterPlan(found.upstream | found.neurons, 2)  # dynamic: they fire in two blocks
        done = bake(model, plan, photos())
        fresh = {"pixel_values": photos(80)[64:]}
        seed = find_tower(done.model).seed
        joined = done.registers if seed is None else seed(done.registers).detach()
        went = []
        for one, following in ((model, plan), (done.model, fit.slots(joined))):
            with testreg.patch(one, following) as acting, acting.recording() as record:
                run(one, fresh)
            went.append(record.registers)
        for block in plan.neurons:
            assert cosine_similarity(went[0][block], went[1][block], dim=-1).mean() > 0.98
        last = max(plan.neurons)
        assert went[1][last].norm(dim=-1).mean() == pytest.approx(float(went[0][last].norm(dim=-1).mean()), rel=0.02)

    def test_what_the_plan_leaves_to_other_tokens_stays(self):
        model, plan = planted("vit")
        rest = dict.fromkeys(plan.neurons, (3.0, -2.0))
        plan = RegisterPlan(plan.neurons, 2, plan.entry, plan.state, rest=rest)
        done = bake(model, plan, photos())
        assert done.drift.patches > 0.999
        assert bake(model, RegisterPlan(plan.neurons, 2, plan.entry, plan.state), photos()).drift.patches > 0.999
        with testreg.patch(model, plan), torch.no_grad():
            expected = model(photos(8)).logits
        with testreg.patch(done.model, fit.slots(done.registers)), torch.no_grad():
            assert cosine_similarity(done.model(photos(8)).logits, expected).mean() > 0.999

    def test_a_half_precision_model_stays_so(self):
        model, plan = planted("vit")
        done = bake(model.half(), plan, photos())
        assert {weight.dtype for weight in done.model.parameters()} == {torch.float16}
        assert done.registers.dtype == torch.float16

    def test_the_model_is_not_changed_and_its_patch_stays_on(self):
        model, plan = planted("vit")
        images = photos(16)
        with testreg.patch(model, plan):
            before = model(images).logits
            bake(model, plan, images)
            assert torch.equal(model(images).logits, before)
        assert testreg.active(model) is None

    def test_from_what_save_wrote(self, tmp_path):
        model, plan = planted("dinov2", "dynamic")
        model.save_pretrained(tmp_path / "base")
        model = hf.AutoModel.from_pretrained(tmp_path / "base")
        with testreg.patch(model, plan):
            save(model, tmp_path / "patched")
        export_stock(tmp_path / "patched", photos(), tmp_path / "out")
        assert hf.AutoModel.from_pretrained(tmp_path / "out").config.num_register_tokens == 2


class TestRefusals:
    def test_too_few_different_images(self):
        model, plan = planted("vit")
        with pytest.raises(BadImages, match="3 different images"):
            bake(model, plan, photos(3).repeat(4, 1, 1, 1))

    def test_a_family_without_register_slots(self):
        model = hf.BeitModel(hf.BeitConfig(**WIDE)).eval()
        with pytest.raises(UnsupportedModel, match="register slots"):
            bake(model, RegisterPlan({1: (2,)}), photos(8))

    def test_a_library_without_the_architecture(self):
        model, plan = planted("vit")
        with pytest.raises(UnsupportedModel, match="transformers has no vit"):
            bake(model, plan, photos(8), library="transformers")

    def test_a_plan_without_neurons(self):
        model, _ = planted("vit")
        with pytest.raises(BadPlan, match="nothing to bake"):
            bake(model, RegisterPlan({}), photos(8))

    def test_registers_that_hold_nothing_or_come_too_late(self):
        model, plan = planted("vit")
        with pytest.raises(BadPlan, match="zeros"):
            bake(model, RegisterPlan(plan.neurons, 1, plan.entry, torch.zeros(CHANNELS)), photos(8))
        with pytest.raises(BadPlan, match="last block"):
            bake(model, RegisterPlan({BLOCKS - 1: (3,)}), photos(8))

    def test_a_model_without_a_patch(self, tmp_path):
        model, _ = planted("vit")
        with pytest.raises(BadPlan, match="not patched"):
            export_stock(model, photos(8), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_drifts_too_far_says_how_far(self, monkeypatch):
        model, plan = planted("vit")
        wrong = {block: -state for block, state in fit.trajectory(model, plan, []).items()}
        monkeypatch.setattr(baked, "trajectory", lambda *args: wrong)
        with pytest.raises(Harmful, match=r"cosine with the run-time patch is below 0\.99.*on 16 other images"):
            bake(model, plan, photos())
        assert bake(model, plan, photos(), force=True).drift.patches < 0.99

    def test_outliers_that_stay(self, monkeypatch):
        model, plan = planted("vit")

        def nothing(model, plan, states, images):
            return states[max(states)]

        monkeypatch.setattr(baked, "fit", nothing)
        with pytest.raises(Harmful, match="still outliers"):
            bake(model, plan, photos())

    def test_a_directory_in_use_stays(self, tmp_path):
        model, plan = planted("vit")
        (tmp_path / "mine.doc").write_text("mine")
        with pytest.raises(BadCheckpoint, match="not empty"):
            export_stock(model, photos(8), tmp_path, plan=plan)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.doc"]


LOADING = """
import sys
sys.modules["testreg"] = None  # importing it fails
import timm, torch
model = timm.create_model("local-dir:out", pretrained=True).eval()
norms = []
for block in model.blocks:
    block.register_forward_hook(lambda _, args, output: norms.append(output[:, model.num_prefix_tokens:].norm(dim=-1)))
with torch.no_grad():
    logits = model(torch.load("out/pixels.pt"))
torch.save((logits, torch.stack(norms)), "out/result.pt")
"""


def test_the_real_one_in_a_process_without_testreg(assets, forked, tmp_path):
    """`vit-tiny-augreg` as timm's: on photos that nothing was fitted to, no outlier and the unpatched answers."""
    pytest.importorskip("timm")
    if not torchvision_stub.FOLDER.is_dir():
        pytest.skip("no torchvision, without which timm does not import")
    checkpoint, photos = assets / "checkpoints/vit-tiny-augreg", assets / "images/coco_cc"
    splits = json.loads((photos / "splits.json").read_text())
    model = hf.AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    processor = hf.AutoImageProcessor.from_pretrained(checkpoint)
    neurons = {6: (59, 189), 7: (417,)}  # method.md, section 2
    calibration = [photos / "images" / name for name in splits["calib"]][:40]
    pixels = read([photos / "images" / name for name in splits["disc_eval"][:50]], processor)
    fired = {}
    tower = find_tower(model)
    hooks = [
        tower.downs[block].register_forward_pre_hook(lambda _, args, block=block: fired.update({block: args[0]}))
        for block in neurons
    ]
    with observe(model, states=[6, 7]) as seen:
        run(model, {"pixel_values": read(calibration[:16], processor)})
    for hook in hooks:
        hook.remove()
    outliers = seen.states[7].norm(dim=-1) > 100
    rest = {block: tuple(fired[block][~outliers][:, row].mean(0).tolist()) for block, row in neurons.items()}
    plan = RegisterPlan(neurons, 4, entry=7, state=seen.states[6][outliers].mean(0), rest=rest)
    export_stock(model, calibration, tmp_path / "out", plan=plan)

    torch.save(pixels, tmp_path / "out/pixels.pt")
    code, _, errors = forked.run(tmp_path, LOADING)
    assert code == 0, errors[-3000:]
    logits, norms = torch.load(tmp_path / "out/result.pt")  # (images, classes), (blocks, images, patches)
    with torch.no_grad():
        expected = model(pixels).logits
        with testreg.patch(model, plan):
            patched = model(pixels).logits
    assert (norms[8:] / norms[8:].median(-1, keepdim=True).values).max() < 3
    assert cosine_similarity(logits, expected).mean() >= 0.999
    assert cosine_similarity(logits, patched).mean() >= 0.9998
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.98
    assert (logits.argmax(-1) == patched.argmax(-1)).float().mean() >= 0.98


def read(files, processor):
    return torch.cat([batch.inputs["pixel_values"] for batch in stream(files, processor)])
