"""What a model says of each image as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.answers import answer, direction
from ..finding.observe import observe, run
from ..runtime import find_tower


def ask(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """What the model says of each image as a whole, `(batch, channels)` on the CPU, and what that is.

    Logits of a head, image embeddings of a model that reads text too, the pooled output, or else the mean last state;
    of a packed tower, the mean direction of what it makes of the patches.
    """
    if (tower := find_tower(model)).row.packed:
        with observe(model, states=[len(tower.blocks) - 1]) as seen:
            output = run(model, inputs)
        return "direction", direction(output, seen.states[len(tower.blocks) - 1]).cpu()
    if hasattr(model, "get_image_features"):
        pooled = run(model, inputs).pooler_output
        with torch.no_grad():
            project: Any = getattr(model, "visual_projection", None)
            return "image_embeds", (pooled if project is None else project(pooled)).float().cpu()
    output = run(model, inputs, whole=True)
    kind, said = answer(output, lambda: _mean_state(output))
    return kind, said.cpu()


def _mean_state(output: Any) -> Tensor:
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        states = output.feature_maps[-1].flatten(2).transpose(1, 2)  # a backbone: (batch, channels, rows, columns)
    return states.float().mean(dim=1)
