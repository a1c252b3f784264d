"""What is different for timm's models, which transformers wraps: how they name their class, and where they say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.recipe import NOT_WITHOUT_REGISTERS

TIMM = "timm_wrapper"  # the model type of timm's models in transformers


def as_transformers_reads_it(config: Any) -> dict[str, Any]:
    """Name the class of a checkpoint that timm wrote, in its config, and say once how many classes its head has.

    timm names no class. Since 1.0.31 it counts classes among the model's arguments too, and TimmWrapper stops there.

    Returns:
        What `from_pretrained` has to be told.
    """
    config.architectures = config.architectures or [
        "TimmWrapperForImageClassification" if config.num_labels else "TimmWrapperModel"
    ]
    arguments = dict(config.model_args or {})
    arguments.pop("num_classes", None)
    config.model_args = arguments
    return {"model_args": config.model_args}


def preprocessing(base_config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a timm model's preprocessing is looked for, in `config.json`; timm itself stops at the architecture."""
    if base_config["model_type"] != TIMM or "pretrained_cfg" not in base_config:
        return {}
    return {
        "architecture": NOT_WITHOUT_REGISTERS,
        "image_processor_type": "TimmWrapperImageProcessor",
        "pretrained_cfg": base_config["pretrained_cfg"],
    }


def instead(model: Any) -> str:
    """How a model that is none of transformers' keeps its registers all the same."""
    if hasattr(model, "pretrained_cfg"):  # timm's, which transformers loads
        return (
            "patch the model as transformers loads it: timm.models.save_for_hf(model, DIR, safe_serialization=True) "
            "writes it down, and `testreg patch DIR --images PHOTOS --plan FILE --out OUT` patches what lies there."
        )
    return "apply it when you need it: testreg.patch(model, testreg.RegisterPlan.load(FILE))."
