"""Lets the real torchvision import next to a CPU build of torch.

Where its wheel is built for CUDA, the operators that its compiled part would register are missing; declaring their
schemas is enough for the Python part, which timm and open_clip import. The wheel lies in a folder of its own,
`.venv/torchvision`, where only processes that call `install` see it: elsewhere it would break every import of
transformers.
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "torchvision"
OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_library = None  # the declarations last as long as this object


def install() -> bool:
    """Make torchvision importable in this process, before transformers is; False where its folder is absent."""
    global _library
    if not FOLDER.is_dir():
        return False
    if str(FOLDER) in sys.path:
        return True
    sys.path.append(str(FOLDER))
    try:
        torch.ops.load_library(FOLDER / "torchvision" / "_C.so")
    except OSError:  # built for another torch
        _library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            _library.define(f"{name}(Tensor x) -> Tensor")
            if "nms" not in name:
                _library.define(f"_{name}_backward(Tensor x) -> Tensor")
    return True
