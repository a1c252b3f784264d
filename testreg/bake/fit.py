"""The fit of weight-only registers to a model: what to measure, and which weights to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Harmful
from ..families import Tower, find_tower
from ..observe import run
from ..patch import patch
from ..plan import RegisterPlan
from . import algebra
from .anatomy import Parts, parts

ROWS = 32768  # sampled queries, of all early blocks and heads together
SAME = 0.01  # of its norm: how far apart states are that need not be told apart
SURPLUS = 0.25  # of the state's norm: that of a start which the first block has to lengthen

Inputs = Sequence[dict[str, Tensor]]


def slots(start: Tensor) -> RegisterPlan:
    """Registers as a stock architecture has them: constant, from the embeddings on, no neuron touched."""
    return RegisterPlan({}, registers=len(start), entry=0, state=start)


@torch.no_grad()
def constant(model: nn.Module, plan: RegisterPlan, images: Inputs) -> RegisterPlan:
    """The plan whose registers join behind its last register neuron, holding the mean states that they have there."""
    last = min(max(plan.neurons, default=0), len(find_tower(model).blocks) - 2)
    if plan.state is not None and plan.entry > last:
        return plan
    total, count = torch.zeros(()), 0
    with patch(model, plan) as acting, acting.recording() as record:
        for inputs in images:
            run(model, inputs)
            state = record.registers[last].float()  # (batch, registers, channels)
            total, count = total + state.sum(0), count + len(state)
    return RegisterPlan(plan.neurons, plan.registers, last + 1, total / count, plan.provenance)


@torch.no_grad()
def fit(model: nn.Module, plan: RegisterPlan, images: Inputs) -> Tensor:
    """Edit the weights of `model` so that registers which are there from the embeddings on do what `plan` does.

    Args:
        model: in float32 and without a patch; changed in place.
        plan: of the constant form.
        images: processed inputs, by batches.

    Returns:
        What the register slots hold, `(registers, channels)`; for a model with a norm between embeddings and blocks
        what they hold in front of it.

    Raises:
        Harmful: a register cannot be told from the other tokens.
    """
    tower = find_tower(model)
    assert plan.state is not None
    for block, row in plan.neurons.items():
        parts(tower, block).down.weight[:, list(row)] = 0
    oven = _Oven(model, tower, plan, images)
    if plan.entry == 0 and tower.seed is None:
        return plan.state  # nobody is to be kept from seeing them
    states, kinds = _kinds(plan.state)
    writer = max(plan.entry - 1, 0)
    norms = states.norm(dim=-1, keepdim=True)
    if tower.seed is None:
        start = oven.start(range(writer + 1), states) * norms / tower.channels**0.5
        oven.state = start[kinds]
    else:
        seed: Any = tower.seed
        held = oven.start(range(1), states, seed)
        oven.state = seed(held)[kinds]
        if writer:  # the norm keeps the start short, so the first block makes it long
            start = oven.start(range(1, writer + 1), states) * SURPLUS * norms / tower.channels**0.5
            oven.write(0, start, kinds)
        start = held
    oven.write(writer, states, kinds)
    return start[kinds]


@dataclass
class _Oven:
    model: nn.Module
    tower: Tower
    plan: RegisterPlan
    images: Inputs
    state: Tensor = field(init=False)  # of the registers in front of block 0, `(registers, channels)`

    def start(self, blocks: range, states: Tensor, seed: Any = None) -> Tensor:
        """For each kind of register, a free vector that the queries of `blocks` attend to least `(kinds, channels)`."""
        odds = self._odds(blocks)

        def through(vector: Tensor) -> Tensor:
            return algebra.direction(vector if seed is None else seed(vector))

        found = states[:0]
        for state in states:
            begin = algebra.direction(state)
            vector = algebra.repel(odds, self.plan.registers, begin, avoid=found, through=through)
            found = torch.cat([found, vector[None]])
        return found

    def _odds(self, blocks: range) -> algebra.Odds:
        samples = max(1, ROWS // (len(blocks) * parts(self.tower, blocks[0]).heads * len(self.images)))
        random = torch.Generator().manual_seed(0)
        found = []
        for inputs in self.images:
            with _Tap() as tap:
                for block in blocks:
                    tap.output(block, parts(self.tower, block).norm1)
                run(self.model, inputs)
            for block in blocks:
                part, tokens = parts(self.tower, block), tap.seen[block].flatten(0, 1)  # (batch * tokens, channels)
                picked = torch.randperm(len(tokens), generator=random)[:samples]
                queries, masses = _queries(part, tap.seen[block], picked)
                found.append(
                    algebra.odds(queries, masses, part.key.weight, _bias(part.key), part.norm1.weight, part.norm1.bias)
                )
        return algebra.Odds(torch.cat([one.slopes for one in found]), torch.cat([one.offsets for one in found]))

    def write(self, block: int, targets: Tensor, kinds: Tensor) -> None:
        """Let the MLP of `block` bring the registers to `targets` `(kinds, channels)`."""
        part = parts(self.tower, block)
        neurons = self._free(block, len(targets))
        with patch(self.model, slots(self.state)) as acting, acting.recording() as record:
            inputs, after = [], []
            for batch in self.images:
                with _Tap() as tap:
                    tap.output(block, part.norm2)
                    run(self.model, batch)
                inputs.append(tap.seen[block])  # (batch, registers + tokens, channels)
                after.append(record.registers[block])
        count = len(kinds)
        others = torch.cat([one[:, count:].flatten(0, 1) for one in inputs])
        registers = torch.cat([one[:, :count] for one in inputs])  # (images, registers, channels)
        now = torch.cat(after).mean(0)
        for kind, neuron in enumerate(neurons):
            mine = kinds == kind
            inside = registers[:, mine].flatten(0, 1)
            found = algebra.detector(inside, torch.cat([others, registers[:, ~mine].flatten(0, 1)]))
            if not found.margin > 0:
                raise Harmful(
                    f"in block {block} the registers cannot be told from the other tokens by one neuron (margin "
                    f"{found.margin:.2f}), so this plan cannot be made of weights alone: testreg.save keeps it in a "
                    f"checkpoint with code."
                )
            part.gate.weight[neuron], part.gate.bias[neuron] = found.weight, found.bias
            if part.up is not None:  # what the gate lets through is one
                part.up.weight[neuron], part.up.bias[neuron] = 0, 1
            with _Tap() as tap:
                tap.input(block, part.down)
                mlp: Any = self.tower.blocks[block].mlp
                mlp(inside)
            fired = tap.seen[block][:, neuron]
            part.down.weight[:, neuron] = algebra.column(targets[kind] - now[mine].mean(0), fired, part.scale2)

    def _free(self, block: int, count: int) -> tuple[int, ...]:
        """Neurons to rewrite: the block's register neurons, which are off now; then those that matter least."""
        part, free = parts(self.tower, block), self.plan.neurons.get(block, ())[:count]
        if len(free) == count:
            return free
        with _Tap() as tap:
            activations = []
            for inputs in self.images:
                tap.input(block, part.down)
                run(self.model, inputs)
                activations.append(tap.seen[block].flatten(0, 1))
        activation = torch.cat(activations)  # (images * tokens, neurons)
        columns = part.down.weight if part.scale2 is None else part.down.weight * part.scale2[:, None]
        effect = activation.std(0) * columns.norm(dim=0)
        effect[list(self.plan.neurons.get(block, ()))] = torch.inf
        least = effect.argsort()[: count - len(free)]
        # Their mean contribution stays, in the bias.
        part.down.bias.add_(part.down.weight[:, least] @ activation[:, least].mean(0))
        part.down.weight[:, least] = 0
        return (*free, *least.tolist())


class _Tap:
    """Keeps what passes modules, by name, inside a `with`."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> _Tap:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def output(self, name: int, module: nn.Module) -> None:
        self.handles.append(module.register_forward_hook(lambda _, args, output: self.seen.update({name: output})))

    def input(self, name: int, module: nn.Module) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda _, args: self.seen.update({name: args[0]})))


def _kinds(states: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones among register states `(kinds, channels)`, and which each register has `(registers,)`."""
    near = torch.cdist(states, states) < SAME * states.norm(dim=-1)
    firsts, kinds = near.int().argmax(-1).unique(return_inverse=True)  # the first register that is alike
    return states[firsts], kinds


def _queries(part: Parts, tokens: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of the `picked` among all tokens `(heads, picked, width)`, and the log masses of their attention."""
    images, count, _ = tokens.shape

    def split(projected: Tensor) -> Tensor:  # (images, tokens, channels) -> (heads, images, tokens, width)
        return projected.view(images, count, part.heads, -1).permute(2, 0, 1, 3)

    queries, keys = split(part.query(tokens)), split(part.key(tokens))
    queries = queries * queries.shape[-1] ** -0.5
    chosen = queries.flatten(1, 2)[:, picked]
    logits = chosen.unsqueeze(-2) @ keys[:, picked // count].transpose(-1, -2)  # (heads, picked, 1, tokens)
    return chosen, logits.squeeze(-2).logsumexp(-1)


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias
