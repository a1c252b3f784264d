"""Lets the real torchvision import next to a CPU build of torch.

Its wheel is built for CUDA, so the operators that its compiled part registers are missing; declaring their schemas is
enough for the Python part, which timm and open_clip import. The wheel lies in a folder of its own, `.venv/torchvision`,
where only processes that call `install` see it: elsewhere it would break every import of transformers.
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "torchvision"
OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_library = None  # the declarations last as long as this object


def install() -> bool:
    """Make torchvision importable in this process; False where its folder is absent. Call before importing transformers."""
    global _library
    if not FOLDER.is_dir():
        return False
    if _library is None:
        _library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            _library.define(f"{name}(Tensor x) -> Tensor")
            if "nms" not in name:
                _library.define(f"_{name}_backward(Tensor x) -> Tensor")
        sys.path.append(str(FOLDER))
    return True
