"""An attention plan as one whose registers join as tokens, for forms that know those alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..runtime import RegisterPlan, find_tower
from ..runtime.errors import BadPlan
from .detect import threshold_of
from .observe import observe, run, unpatched
from .scan import patch_norms


def as_tokens(model: nn.Module, plan: RegisterPlan, inputs: Iterable[Mapping[str, Tensor]]) -> RegisterPlan:
    """The same neurons and as many registers, which join with the mean state that outliers have there.

    Args:
        model: patched or not; it is looked at without a patch.
        plan: of any form; one of tokens is given back as it is.
        inputs: of the model, one batch after the other.

    Raises:
        BadPlan: the plan does not say what an outlier is, or there is none in these images.
    """
    if plan.form != "attention":
        return plan
    tower, threshold, entry = find_tower(model), threshold_of(plan), max(1, plan.entry)
    shown = plan.provenance.get("artefact", {}).get("shown")
    if threshold is None or not isinstance(shown, int) or not 0 <= shown < len(tower.blocks):
        raise BadPlan("the plan does not say what an outlier is: find one with testreg.find(..., form='constant').")
    states: list[Tensor] = []
    with unpatched(model), observe(model, states={entry - 1, shown}) as seen:
        for batch in inputs:
            run(model, batch)
            outliers = threshold.outliers(patch_norms(seen.states[shown], tower))  # (images, patches)
            states.append(seen.states[entry - 1][:, tower.prefix :][outliers].float().cpu())  # (outliers, channels)
    found = torch.cat(states)
    if not len(found):
        raise BadPlan(f"no patch of these images is an outlier ({threshold}), so no register's state can be measured.")
    return replace(plan, entry=entry, state=found.mean(0))
