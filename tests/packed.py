"""Tiny random towers that take the patches of all images as one sequence: every one in transformers that can.

`PACKED` maps a family to its rows, `build(name)` gives one of them, `inputs(name, grids)` what it takes for images of
these grids `(frames, rows, columns)`. An image's patches are the same in any company.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from zoo import scale

CHANNELS, BLOCKS, NEURONS, PATCH = 32, 3, 48, 4
Grid = tuple[int, int, int]
IMAGES: tuple[Grid, ...] = ((1, 4, 8), (1, 8, 4), (2, 4, 4))  # two images and a video of two frames

SIZES = {
    "depth": BLOCKS, "num_hidden_layers": BLOCKS, "hidden_size": CHANNELS, "embed_dim": CHANNELS, "num_heads": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": NEURONS, "mlp_ratio": 1.5,
    "patch_size": PATCH, "out_hidden_size": CHANNELS, "num_position_embeddings": 64, "window_size": 16,
    "fullatt_block_indexes": [1], "deepstack_visual_indexes": [1], "image_size": 32, "head_dim": 8,
    "pos_emb_height": 4, "pos_emb_width": 4, "layer_types": ["window_attention", "full_attention", "window_attention"],
    "max_image_size": 32, "num_patches": 64, "posemb_grid_size": 8, "projection_hidden_dim": CHANNELS,
    "text_hidden_size": CHANNELS, "projection_intermediate_size": CHANNELS, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """One tiny tower.

    Attributes:
        package: where in transformers.
        tower, config: its class and its config's.
        patch: shape of the pixels of one patch.
        grid: name of the argument that holds the grids.
        cells: so many by so many patches are one item of the pixel values, and of the grid.
        more: further arguments, by the grids.
        frames: it takes images and videos in one call.
        settings: of the config, where they differ from `SIZES`.
    """

    package: str
    tower: str
    config: str
    patch: tuple[int, ...] = (3 * PATCH**2,)
    grid: str = "grid_thw"
    cells: int = 1
    more: Callable[[Sequence[Grid]], dict[str, Any]] = field(default=lambda grids: {})
    frames: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        module = importlib.import_module(f"transformers.models.{self.package}.modeling_{self.package}")
        configs = importlib.import_module(f"transformers.models.{self.package}.configuration_{self.package}")
        config = getattr(configs, self.config)
        known = config().to_dict()
        settings = {name: value for name, value in SIZES.items() if name in known}
        return getattr(module, self.tower)(config(**settings | self.settings))


TWO = (3 * 2 * PATCH**2,)  # patches of two frames each
SQUARE = (3, PATCH, PATCH)


def _merge_sizes(grids: Sequence[Grid]) -> dict[str, Any]:
    return {"merge_sizes": torch.tensor([2] * len(grids))}


PACKED: Mapping[str, Mapping[str, Packed]] = {
    "qwen2-vl": {
        "Qwen2-VL": Packed(
            "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig", TWO,
            settings={"hidden_size": 16, "mlp_ratio": 2},
        )
    },
    "qwen2.5-vl": {
        "Qwen2.5-VL": Packed("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig", TWO)
    },
    "qwen2.5-omni": {
        "Qwen2.5-Omni": Packed("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", "Qwen2_5OmniVisionEncoderConfig", TWO)
    },
    "qwen3-vl": {
        "Qwen3-VL": Packed("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig", TWO),
        "Qwen3-VL-MoE": Packed("qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionConfig", TWO),
    },
    "qwen3-omni": {
        "Qwen3-Omni": Packed("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", "Qwen3OmniMoeVisionEncoderConfig", TWO)
    },
    "qwen3.5": {
        "Qwen3.5": Packed("qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionConfig", TWO),
        "Qwen3.5-MoE": Packed("qwen3_5_moe", "Qwen3_5MoeVisionModel", "Qwen3_5MoeVisionConfig", TWO),
    },
    "qwen4": {"Qwen4": Packed("qwen4_exp", "Qwen4ExpVisionModel", "Qwen4ExpVisionConfig", TWO)},
    "cohere-compass": {
        "Cohere-Compass": Packed("cohere_compass", "CohereCompassVisionModel", "CohereCompassVisionConfig", TWO)
    },
    "exaone-4.5": {"EXAONE-4.5": Packed("exaone4_5", "Exaone4_5_VisionModel", "Exaone4_5_VisionConfig", TWO)},
    "glm-4v": {
        "GLM-4V": Packed("glm4v", "Glm4vVisionModel", "Glm4vVisionConfig", TWO, frames=False),
        "GLM-4V-MoE": Packed("glm4v_moe", "Glm4vMoeVisionModel", "Glm4vMoeVisionConfig", TWO, frames=False),
    },
    "glm-5": {"GLM-5": Packed("glm5_next", "Glm5NextVisionModel", "Glm5NextVisionConfig", TWO)},
    "glm-ocr": {"GLM-OCR": Packed("glm_ocr", "GlmOcrVisionModel", "GlmOcrVisionConfig", TWO)},
    "glm-image": {"GLM-Image": Packed("glm_image", "GlmImageVisionModel", "GlmImageVisionConfig", frames=False)},
    "ernie-4.5-vl": {
        "ERNIE-4.5-VL": Packed(
            "ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel", "Ernie4_5_VLMoeVisionConfig"
        )
    },
    "videollama-3": {
        "VideoLLaMA3": Packed("video_llama_3", "VideoLlama3VisionModel", "VideoLlama3VisionConfig", more=_merge_sizes)
    },
    "paddleocr-vl": {
        "PaddleOCR-VL": Packed("paddleocr_vl", "PaddleOCRVisionModel", "PaddleOCRVisionConfig", (1, *SQUARE))
    },
    "kimi": {"Kimi-K2.5": Packed("kimi_k25", "Kimi_K25VisionModel", "Kimi_K25VisionConfig", SQUARE, frames=False)},
    "hunyuan-vl": {
        "HunYuan-VL": Packed("hunyuan_vl", "HunYuanVLVisionTransformer", "HunYuanVLVisionConfig", frames=False)
    },
    "minimax-m3": {"MiniMax-M3": Packed("minimax_m3_vl", "MiniMaxM3VLVisionModel", "MiniMaxM3VLVisionConfig", TWO)},
    "cosmos-3": {"Cosmos-3-Edge": Packed("cosmos3_edge", "Cosmos3EdgeVisionModel", "Cosmos3EdgeVisionConfig")},
    "inkling-2": {
        "Inkling-2": Packed(
            "inkling2", "Inkling2VisionModel", "Inkling2VisionConfig", (2 * PATCH, 2 * PATCH, 3),
            grid="image_grid_thw", cells=2,
        )
    },
    "muse": {
        "Muse-Glimmer": Packed("muse_glimmer", "MuseGlimmerVisionModel", "MuseGlimmerVisionConfig", TWO),
        "Muse-Spark": Packed("muse_spark", "MuseSparkVisionModel", "MuseSparkVisionConfig", TWO),
    },
    "pixtral": {"Pixtral": Packed("pixtral", "PixtralVisionModel", "PixtralVisionConfig", grid="", frames=False)},
}  # fmt: skip

ROWS: Mapping[str, Packed] = {name: tiny for rows in PACKED.values() for name, tiny in rows.items()}


def build(name: str) -> nn.Module:
    """The tiny tower called `name` in evaluation mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = ROWS[name].make().eval()
        scale(tower)
    return tower


def grids(name: str) -> tuple[Grid, ...]:
    """Grids of three images that the tower takes, the last one a video of two frames where it takes videos."""
    return IMAGES if ROWS[name].frames else ((1, 4, 8), (1, 8, 4), (1, 4, 4))


def inputs(name: str, wanted: Sequence[Grid]) -> dict[str, Any]:
    """What the tower takes for the images with these grids."""
    tiny = ROWS[name]
    if not tiny.grid:  # pixels in place, with room around the smaller images
        sizes = [(rows * PATCH, columns * PATCH) for _, rows, columns in wanted]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        pixels = torch.zeros(len(wanted), 3, height, width)
        for index, (rows, columns) in enumerate(sizes):
            pixels[index, :, :rows, :columns] = _noise(wanted[index], (3, rows, columns))
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    cells = [(frames, rows // tiny.cells, columns // tiny.cells) for frames, rows, columns in wanted]
    own, patch = tiny.patch[:1] == (1,), tuple(size for size in tiny.patch if size != 1)
    patches = torch.cat([_noise(grid, (math.prod(cell), *patch)) for grid, cell in zip(wanted, cells, strict=True)])
    first = "pixel_values" if "pixel_values" in _arguments(tiny) else "hidden_states"
    return {first: patches[None] if own else patches, tiny.grid: torch.tensor(cells), **tiny.more(wanted)}


def _arguments(tiny: Packed) -> Sequence[str]:
    module = importlib.import_module(f"transformers.models.{tiny.package}.modeling_{tiny.package}")
    return list(inspect.signature(getattr(module, tiny.tower).forward).parameters)


def _noise(grid: Grid, shape: tuple[int, ...]) -> Tensor:
    """Random pixels, the same for the same grid."""
    seed = grid[0] + 10 * grid[1] + 1000 * grid[2]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
