"""Whether a plan fits a tower."""

from __future__ import annotations

from collections import Counter

from .errors import BadPlan
from .plan import RegisterPlan
from .towers import Tower


def check(tower: Tower, plan: RegisterPlan) -> None:
    """Whether `plan` fits `tower`.

    Raises:
        BadPlan: a block, neuron, entry or state is out of the tower's range.
    """

    def misfit(has: str, wants: str) -> BadPlan:
        what = f"the {tower.family} tower {type(tower.module).__name__}"
        return BadPlan(f"{wants}, but {what} has {has}: the plan was made for another model.")

    if tower.row.packed and plan.registers and plan.form != "attention":
        raise BadPlan(
            f"{type(tower.module).__name__} packs the patches of all images into one sequence, in which a token would "
            f"belong to all of them: only registers that attention alone sees fit it (form='attention'), no "
            f"{plan.form} ones."
        )
    blocks = f"blocks 0 to {len(tower.blocks) - 1}"
    if plan.entry >= len(tower.blocks):
        raise misfit(blocks, f"the registers join before block {plan.entry}")
    for block, row in plan.neurons.items():
        if block >= len(tower.blocks):
            raise misfit(blocks, f"the plan names block {block}")
        if row[-1] >= tower.neurons[block]:
            raise misfit(
                f"neurons 0 to {tower.neurons[block] - 1} there", f"the plan names neuron {row[-1]} of block {block}"
            )
    if plan.state is not None and plan.state.shape[-1] != tower.channels:
        raise misfit(f"{tower.channels} channels", f"the register state has {plan.state.shape[-1]} channels")
    if plan.state is not None and plan.form == "attention" and plan.state.shape[0] != len(tower.blocks) - plan.entry:
        rows = f"the register state has rows for {plan.state.shape[0]} blocks from block {plan.entry} on"
        raise misfit(f"{len(tower.blocks) - plan.entry} of them", rows)
    registered = range(plan.entry, len(tower.blocks)) if plan.registers else ()
    for what, modules, touched in (
        ("second linear", tower.downs, plan.neurons),
        ("attention", tower.attentions, registered),
    ):
        times = Counter(map(id, modules))
        for block in touched:
            if times[id(modules[block])] > 1:
                raise BadPlan(
                    f"block {block} of {type(tower.module).__name__} shares its {what} with another block, so that it "
                    f"cannot be changed in one alone. Give each its own, as copy.deepcopy makes one."
                )
