"""Calibration over two real processes: the answer of one process, one voice, and a quick end when one is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from forks import CONTEXT
from PIL import Image
from torch import distributed
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import testreg
from testreg.demo.planted import plant
from testreg.demo.planted_text import planted_text, text_for
from testreg.finding.count import count, total
from testreg.finding.parallel import Lost
from testreg.finding.still import quiet
from testreg.images.streaming import stream
from testreg.runtime.towers import find_tower

IMAGES, TEXTS, BATCH = 40, 25, 4
HISTOGRAMS = ("norms", "ratios", "peaks", "highest")


def tiny(planted=True):
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "intermediate_size": 256}
    model = ViTModel(ViTConfig(**sizes, num_hidden_layers=5, num_attention_heads=4)).eval()
    if planted:
        plant(model, neurons=2)
    return model


def tensors(count=IMAGES):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A planted checkpoint, and photos of which one is broken."""
    folder = tmp_path_factory.mktemp("files")
    tiny().save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    random = torch.Generator().manual_seed(2)
    for index in range(IMAGES):
        coarse = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=random).numpy()
        Image.fromarray(coarse).resize((64, 64)).save(folder / "photos" / f"{index:03}.png")
    (folder / "photos" / "017.png").write_bytes(b"no picture")
    return folder


def alike(ours, theirs):
    """Equal JSON values, numbers to 1e-6: an image's neighbours in its batch change how its sums are rounded.

    The scores of trials are rounded to six digits, so the last of these may differ by one.
    """
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(alike(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    return ours == pytest.approx(theirs, rel=1e-6, abs=1.1e-6) if isinstance(ours, float) else ours == theirs


def test_two_processes_give_the_plan_and_the_statistics_of_one(files, tmp_path):
    arguments = ["testreg", "find", str(files / "model"), "--images", str(files / "photos"), "--batch-size", str(BATCH)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def started(name, *launcher):
        command = [sys.executable, *launcher, "-m", *arguments, "--json", "--out", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    one, two = (
        json.loads(process.communicate(timeout=200)[0])  # one JSON value: the second process is silent
        for process in (started("one"), started("two", *launcher))
    )
    assert alike(two, one)  # with every number of the provenance
    assert two["provenance"]["images"]["count"] == IMAGES - 1
    assert two["provenance"]["images"]["skipped"] == 1
    plans = [testreg.RegisterPlan.load(tmp_path / name) for name in ("one", "two")]
    assert plans[0].neurons == plans[1].neurons
    assert torch.allclose(plans[0].state, plans[1].state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shares", [2, 3, 20])
def test_shares_of_the_images_add_up_exactly(shares):
    model = tiny()
    tower = find_tower(model)
    with quiet(model):

        def counted(share):
            return count(model, tower, stream(tensors(), batch_size=BATCH, share=share), False, size=9)

        whole = counted((0, 1))
        parts = [counted((index, shares)) for index in range(shares)]
    together = total(parts, stream(tensors()))
    assert all(part.norms.images <= -(-IMAGES // BATCH // shares) * BATCH for part in parts)
    assert together.norms.images == IMAGES
    assert together.digest == whole.digest
    for name in HISTOGRAMS:
        assert torch.equal(getattr(together.norms, name).counts, getattr(whole.norms, name).counts)
    assert torch.equal(together.norms.largest, whole.norms.largest)
    for ours, theirs in zip(together.sample, whole.sample, strict=True):
        assert ours.digest == theirs.digest
        assert torch.equal(ours.output, theirs.output)


def worker(rank, folder, what, results):
    """One of two processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 1 and what == "gone":
        os._exit(1)
    model = planted_text().model if what == "text" else tiny(planted=what != "no artefact")

    def images():
        for index, image in enumerate(tensors()):
            if rank == 1 and index == 30:
                if what == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "broken":
                    raise ValueError("the disc is gone")
                if what == "interrupted":
                    results.put((1, "half-way", ""))
                    time.sleep(1000)
            yield image

    try:
        given = {"text": text_for(TEXTS, 256)} if what == "text" else {"images": images()}
        plan = testreg.find(model, **given, batch_size=BATCH)
        plan.save(f"{folder}/plan-{rank}")  # a queue that nobody reads yet would hold back what is long
        results.put((rank, "plan", str(plan)))
    except BaseException as error:
        results.put((rank, type(error).__name__, str(error)))


@pytest.fixture(autouse=True)
def _served(forked):
    """Both processes are forks of the server."""


def two(folder, what):
    """What both processes say, by their ranks, when both are done."""
    results = CONTEXT.SimpleQueue()
    processes = [CONTEXT.Process(target=worker, args=(rank, folder, what, results), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    if what == "interrupted":
        assert results.get() == (1, "half-way", "")
        time.sleep(2)  # the first process is through with its share
        for process in processes:
            os.kill(process.pid, signal.SIGINT)  # as a terminal does
    for process in processes:
        process.join(60)
    assert not any(process.is_alive() for process in processes)
    said = {}
    while not results.empty():
        rank, *words = results.get()
        said[rank] = tuple(words)
    return said


def test_two_processes_read_text_as_one_does(tmp_path):
    one = testreg.find(planted_text().model, text=text_for(TEXTS, 256), batch_size=BATCH)
    assert set(two(tmp_path, "text")) == {0, 1}
    for rank in (0, 1):
        plan = testreg.RegisterPlan.load(tmp_path / f"plan-{rank}")
        assert torch.allclose(plan.state, one.state, rtol=1e-6, atol=1e-6)
        assert alike(plan.to_dict(), one.to_dict())
    assert one.provenance["text"]["sequences"] == TEXTS


@pytest.mark.parametrize("what", ["gone", "killed"])
def test_a_lost_process_ends_the_other_with_a_clear_word(tmp_path, what):
    said = two(tmp_path, what)  # within its 60 seconds, not after torch's 30 minutes
    assert set(said) == {0}
    assert said[0][0] == Lost.__name__
    assert "another process was lost" in said[0][1]


def test_an_error_in_one_process_is_an_error_in_all(tmp_path):
    said = two(tmp_path, "broken")
    assert said[1] == ("ValueError", "the disc is gone")
    assert said[0] == ("TestregError", "process 1 of 2 failed: ValueError: the disc is gone")


def test_a_verdict_is_the_same_in_all(tmp_path):
    said = two(tmp_path, "no artefact")
    assert said[0] == said[1]
    assert said[0][0] == "NoOutliers"


def test_interrupted_both_end_at_once(tmp_path):
    started = time.monotonic()
    said = two(tmp_path, "interrupted")  # the first one waits for the second one's statistics meanwhile
    assert set(said) <= {0, 1}
    assert said[1] == ("KeyboardInterrupt", "")
    assert said[0][0] in ("KeyboardInterrupt", Lost.__name__)
    assert time.monotonic() - started < 120
