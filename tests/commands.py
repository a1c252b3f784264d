"""What tests of the command line share: commands run in this process, small checkpoints on disk, photos of noise."""

import hashlib

import numpy as np
import torch
import transformers
from click.testing import CliRunner
from PIL import Image

from testreg.cli.group import main

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip
PROCESSOR = {"size": {"height": 96, "width": 96}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PHOTOS = 12


def run(*arguments, code=0):
    """The command's result, which ended with `code`, and without a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*arguments, says, code=1):
    """One line on stderr that says all of `says`; nothing on stdout."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("testreg: ")
    for part in [says] if isinstance(says, str) else says:
        assert part in lines[0]


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def noise(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8))


def checkpoint(folder, model):
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    return folder


def classifier():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SHAPE, num_labels=5)
    return transformers.ViTForImageClassification(config).eval()
