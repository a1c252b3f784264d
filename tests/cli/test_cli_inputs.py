"""The command line's ways on: checkpoints without a processor, of their own code, of one channel, of clips; `~`."""

import json
import textwrap

import numpy as np
import pytest
import torch
import transformers
import zoo
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import testreg
from testreg.cli.group import main
from testreg.demo.planted import plant

SIZE = 48
NUMBERS = f"{SIZE}:0.5:0.5"
SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 96, "image_size": SIZE,
    "patch_size": 8,
}  # fmt: skip


def ask(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*arguments, says, code=1):
    result = ask(*arguments, code=code)
    assert result.stdout == ""
    for part in [says] if isinstance(says, str) else says:
        assert part in result.stderr


def planted(folder, channels=3):
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**SHAPE, num_labels=5, num_channels=channels)
    ).eval()
    plant(model, neurons=2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Planted checkpoints without a processor, of three channels and of one, and photos."""
    folder = tmp_path_factory.mktemp("inputs")
    planted(folder / "vit")
    planted(folder / "xray", 1)
    for index in range(12):
        random = np.random.default_rng(index)
        for place, shape in (("photos", (SIZE, SIZE, 3)), ("gray", (SIZE, SIZE))):
            (folder / place).mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / place / f"{index:02}.png")
    return folder


def test_a_checkpoint_without_a_processor_gets_one_and_its_patched_one_keeps_it(here, tmp_path):
    vit, photos = here / "vit", here / "photos"
    refused(
        "inspect", vit, "--images", photos, says=("it has no preprocessor_config.json", "put a preprocessor_config")
    )
    refused("inspect", vit, "--images", photos, says="pass --processor NAME")
    for wrong, says in (("224", "SIZE:MEAN:STD"), ("./nowhere", "no directory ./nowhere"), (vit, "it has no prep")):
        refused("inspect", vit, "--images", photos, "--processor", wrong, says=says)
    file, out = tmp_path / "plan", tmp_path / "clean"
    said = ask("find", vit, "--images", photos, "--processor", NUMBERS, "--out", file).stdout
    line = said.split("Apply it:")[1].split("testreg ")[1].replace("DIRECTORY", str(out))
    ask(*line.split())
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.5] * 3
    same = [
        json.loads(ask("inspect", out, "--images", photos, *more, "--json").stdout)
        for more in ((), ("--processor", NUMBERS), ("--processor", out))
    ]
    assert same[0] == same[1] == same[2]
    assert same[0]["artefact"] is None


@pytest.mark.parametrize(
    "command",
    [
        ("show", "{vit}", "{photos}/00.png", "--plan", "{plan}", "--out", "{out}.png"),
        ("report", "{vit}", "--images", "{photos}", "--plan", "{plan}", "--limit", "2", "--out", "{out}.html"),
        ("evaluate", "{vit}", "--data", "{photos}", "--task", "outliers", "--plan", "{plan}", "--limit", "2",
         "--no-baselines", "--against", "{vit}"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
@pytest.mark.parametrize(("model", "photos"), [("vit", "photos"), ("xray", "gray")])
def test_every_command_that_takes_photos_takes_a_processor(here, tmp_path, command, model, photos):
    testreg.RegisterPlan({2: (1,)}, entry=3, state=torch.ones(48)).save(tmp_path / "plan")
    names = {"vit": here / model, "photos": here / photos, "plan": tmp_path / "plan", "out": tmp_path / "x"}
    filled = [part.format(**names) for part in command]
    refused(*filled, says="no preprocessor_config.json")
    ask(*filled, "--processor", NUMBERS)


def test_onnx_takes_no_processor(here, tmp_path):
    refused("export", here / "vit", "--format", "onnx", "--out", tmp_path / "x.onnx", "--processor", NUMBERS, code=2,
            says="does not take --processor")  # fmt: skip


def test_a_model_of_one_channel(here):
    found = json.loads(
        ask("inspect", here / "xray", "--images", here / "gray", "--processor", NUMBERS, "--json").stdout
    )
    assert found["artefact"]["images"] == 1
    refused("inspect", here / "xray", "--images", here / "gray", "--processor", f"{SIZE}:imagenet",
            says=("takes images of 1 channel", "as in 224:0.5:0.5"))  # fmt: skip


def test_black_pictures_are_told(here, tmp_path):
    Image.fromarray(np.full((SIZE, SIZE), 3000, np.uint16)).save(tmp_path / "a.png")
    said = ask("inspect", here / "xray", "--images", tmp_path, "--processor", NUMBERS)
    assert f"testreg: 1 of 1 images are nearly only black ({tmp_path}/a.png)" in said.stderr


def test_clips(tmp_path):
    zoo.build("VideoMAEModel")[0].save_pretrained(tmp_path / "model")
    for clip in range(3):
        (tmp_path / "clips" / str(clip)).mkdir(parents=True)
        for frame in range(5):
            Image.new("RGB", (40, 40), (clip * 40, frame * 40, 0)).save(tmp_path / "clips" / f"{clip}/{frame}.png")
    arguments = ("inspect", tmp_path / "model", "--processor", "32:0.5:0.5", "--images")
    assert json.loads(ask(*arguments, tmp_path / "clips", "--json").stdout)["images"] == 3
    refused(*arguments, tmp_path / "clips" / "0", says=("There are photos, such as 0.png", "one folder of frames"))
    testreg.RegisterPlan({1: (1,)}).save(tmp_path / "plan")
    for *command, says in (
        ("show", "maps can be drawn for photos (images, channels, height, width) alone"),
        ("evaluate", "--task", "outliers", "--data", "VideoMAEModel takes clips of 4 frames"),
        ("report", "--images", "VideoMAEModel takes clips of 4 frames"),
    ):
        refused(command[0], tmp_path / "model", *command[1:], tmp_path / "clips" / "0", "--plan", tmp_path / "plan",
                "--processor", "32:0.5:0.5", says=says)  # fmt: skip


def test_the_home_directory_in_every_path(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "vit").symlink_to(here / "vit")
    (tmp_path / "photos").symlink_to(here / "photos")
    more = ("--processor", NUMBERS)
    ask("find", "~/vit", "--images=~/photos", "--out=~/plan", *more)
    ask("patch", "~/vit", "--images=~/photos", "--plan=~/plan", "--out=~/clean", *more)
    ask("show", "~/clean", "~/photos/00.png", "--out=~/map.png")
    ask("report", "~/clean", "--images=~/photos", "--limit=2", "--out=~/report.html")
    ask("evaluate", "~/clean", "--data=~/photos", "--task=outliers", "--limit=2", "--out=~/table.csv", "--no-baselines")
    assert {path.name for path in tmp_path.iterdir()} == {
        "vit", "photos", "plan", "clean", "map.png", "report.html", "table.csv",
    }  # fmt: skip
    assert (tmp_path / "clean" / "registers.safetensors").exists()


def test_onnx_of_a_model_without_registers_only_if_forced(here, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("testreg.export.onnx.export_onnx", lambda model, *rest, **more: written.append(type(model)))
    arguments = ("export", here / "vit", "--format", "onnx", "--out", tmp_path / "x.onnx")
    refused(*arguments, says=("has no registers: give --plan FILE", "--force writes it as it is"))
    assert written == []
    ask(*arguments, "--force")
    testreg.RegisterPlan({2: (1,)}).save(tmp_path / "plan")
    ask(*arguments, "--plan", tmp_path / "plan")
    own, _ = zoo.build("Dinov2WithRegistersModel")  # as `export --format stock` writes them
    own.save_pretrained(tmp_path / "own")
    ask("export", tmp_path / "own", *arguments[2:])
    assert [kind.__name__ for kind in written] == ["ViTForImageClassification"] * 2 + ["Dinov2WithRegistersModel"]


GARDEN = """
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    print("code of the checkpoint runs")

    class GardenConfig(PreTrainedConfig):
        model_type = "garden"

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()
            self.grow, self.shrink = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            x = x + self.attn(x)
            return x + self.shrink(self.grow(x).relu())

    class GardenViT(PreTrainedModel):
        config_class = GardenConfig
        main_input_name = "pixel_values"

        def __init__(self, config):
            super().__init__(config)
            self.class_embedding = nn.Parameter(torch.zeros(1, 1, 32))
            self.register_tokens = nn.Parameter(torch.zeros(1, 2, 32))
            self.patches = nn.Conv2d(3, 32, 8, 8)
            self.trunk = nn.ModuleList([Block() for _ in range(3)])
            self.post_init()

        def forward(self, pixel_values):
            x = self.patches(pixel_values).flatten(2).transpose(1, 2)
            prefix = torch.cat([self.class_embedding, self.register_tokens], 1)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], 1)
            for block in self.trunk:
                x = block(x)
            return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0])
"""


@pytest.fixture
def garden(tmp_path, monkeypatch):
    """A checkpoint that brings the code of its model."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "garden"
    folder.mkdir()
    (folder / "modeling_garden.py").write_text(textwrap.dedent(GARDEN))
    names = {"AutoConfig": "modeling_garden.GardenConfig", "AutoModel": "modeling_garden.GardenViT"}
    kind = get_class_from_dynamic_module(names["AutoModel"], str(folder))
    torch.manual_seed(0)
    kind(kind.config_class(auto_map=names)).save_pretrained(folder)
    return folder


def test_code_of_a_checkpoint_runs_only_if_trusted(garden, here, tmp_path, capfd):
    photos = here / "photos"
    more = ("--images", photos, "--processor", "32:0.5:0.5")
    refused("inspect", garden, *more, says=("model of its own code", "not run unasked", "--trust-remote-code"))
    assert "code of the checkpoint runs" not in capfd.readouterr().out
    error = ask("inspect", garden, *more, "--trust-remote-code", code=1).stderr
    row = error.split("--family '")[1].split("'")[0]
    assert row == '"GardenViT", "trunk", "shrink", "attn", prefix=3, package="transformers_modules"'
    found = json.loads(ask("inspect", garden, *more, "--trust-remote-code", "--family", row, "--json").stdout)
    assert (found["family"], found["images"], len(found["blocks"])) == ("--family", 12, 3)
    assert "--family" not in testreg.FAMILIES
    refused("patch", garden, *more, "--trust-remote-code", "--family", row, "--out", tmp_path / "out",
            says=("of the checkpoint's own code", "testreg find ... --out FILE"))  # fmt: skip
    for wrong in ("GardenViT", "__import__('os')", "1, 2", '"a", "b", nonsense=1', "*()"):
        refused("inspect", garden, *more, "--family", wrong, says="is no row of a family", code=2)


def test_weights_of_the_patched_checkpoint_do_not_hold_the_processor(here, tmp_path):
    model = transformers.ViTForImageClassification.from_pretrained(here / "vit")
    model.image_processor = testreg.images.processors.named(NUMBERS)
    testreg.patch(model, testreg.RegisterPlan({2: (1,)}))
    testreg.save(model, tmp_path / "clean")
    stored = load_file(next((tmp_path / "clean").glob("model*.safetensors")))
    assert stored.keys() == load_file(here / "vit" / "model.safetensors").keys()
