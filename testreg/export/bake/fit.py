"""The fit of weight-only registers to a model: what to measure, and which weights to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...finding.observe import run
from ...runtime.errors import Harmful
from ...runtime.installer import patch
from ...runtime.plan import RegisterPlan
from ...runtime.towers import Tower, find_tower
from . import algebra
from .anatomy import Parts, parts, turned

ROWS = 32768  # sampled queries, of all early blocks and heads together
SAME = 0.01  # of its norm: how far apart states are that need not be told apart
SURPLUS = 0.25  # of the state's norm: that of a start which the first block has to lengthen

Inputs = Sequence[dict[str, Tensor]]


def slots(start: Tensor) -> RegisterPlan:
    """Registers as a stock architecture has them: constant, from the embeddings on, no neuron touched."""
    return RegisterPlan({}, registers=len(start), entry=0, state=start)


@torch.no_grad()
def trajectory(model: nn.Module, plan: RegisterPlan, images: Inputs) -> dict[int, Tensor]:
    """What weights have to make of the registers: block -> their mean states after it `(registers, channels)`.

    Where they join, if they have a state then, and after every block whose register neurons they fire themselves. The
    last of them is what the patch leaves; before it, the norm of a state matters to no one, as all readers have a
    LayerNorm in front, so it is made as large as the last one's: what the image adds to a register is small beside it.
    """
    tower = find_tower(model)
    filled = {block for block in plan.neurons if block >= plan.entry and block < len(tower.blocks) - 1}
    states = {}
    if plan.state is not None:
        if plan.entry == 0 and tower.seed is not None:
            filled.add(0)  # no slot can hold it in front of the norm
        else:
            states[plan.entry - 1] = plan.state
    if filled:
        with patch(model, plan) as acting, acting.recording() as record:
            count = 0
            for inputs in images:
                run(model, inputs)
                count += len(record.registers[min(filled)])
                for block in filled:
                    states[block] = states.get(block, 0) + record.registers[block].float().sum(0)
        states |= {block: states[block] / count for block in filled}
    last = states[max(states)].norm(dim=-1, keepdim=True)
    return {
        block: state if block == max(states) or block < 0 else state * (last / state.norm(dim=-1, keepdim=True))
        for block, state in sorted(states.items())
    }


@torch.no_grad()
def fit(model: nn.Module, plan: RegisterPlan, states: dict[int, Tensor], images: Inputs) -> Tensor:
    """Edit the weights of `model` so that registers which are there from the embeddings on follow `states`.

    Args:
        model: in float32 and without a patch; changed in place.
        plan: whose register neurons are switched off, or held at what `plan.rest` says, by the bias.
        states: what `trajectory` gives.
        images: processed inputs, by batches.

    Returns:
        What the register slots hold, `(registers, channels)`; for a model with a norm between embeddings and blocks
        what they hold in front of it.

    Raises:
        Harmful: a register cannot be told from the other tokens.
    """
    tower = find_tower(model)
    for block, row in plan.neurons.items():
        down = parts(tower, block).down
        if plan.rest is not None:
            down.bias.add_(down.weight[:, list(row)] @ torch.tensor(plan.rest[block]))
        down.weight[:, list(row)] = 0
    kinds, firsts = _kinds(torch.cat(list(states.values()), dim=-1))
    targets = {block: state[firsts] for block, state in states.items()}  # (kinds, channels)
    oven = _Oven(model, tower, kinds, images)
    first, last = min(targets), targets[max(targets)]
    norms = last.norm(dim=-1, keepdim=True)
    if first < 0:  # nobody is to be kept from seeing them
        start = targets.pop(first)
        oven.state = start[kinds]
    elif tower.seed is None:
        start = oven.start(range(first + 1), last) * norms / tower.channels**0.5
        oven.state = start[kinds]
    else:
        seed: Any = tower.seed
        start = oven.start(range(1), last, seed)
        oven.state = seed(start)[kinds]
        if first:  # the norm keeps the start short, so the first block makes it long
            oven.write(0, oven.start(range(1, first + 1), last) * SURPLUS * norms / tower.channels**0.5)
    for block, target in targets.items():
        oven.write(block, target)
    return start[kinds]


@dataclass
class _Oven:
    model: nn.Module
    tower: Tower
    kinds: Tensor  # of each register, `(registers,)`
    images: Inputs
    state: Tensor = field(init=False)  # of the registers in front of block 0, `(registers, channels)`

    def start(self, blocks: range, states: Tensor, seed: Any = None) -> Tensor:
        """For each kind of register, a free vector that changes attention in `blocks` least `(kinds, channels)`."""
        pull = self._pull(blocks)

        def through(vector: Tensor) -> Tensor:
            return algebra.direction(vector if seed is None else seed(vector))

        found = states[:0]
        for state in states:
            begin = algebra.direction(state)
            vector = algebra.repel(pull, len(self.kinds), begin, avoid=found, through=through)
            found = torch.cat([found, vector[None]])
        return found

    def _pull(self, blocks: range) -> algebra.Pull:
        samples = max(1, ROWS // (len(blocks) * parts(self.tower, blocks[0]).heads * len(self.images)))
        random = torch.Generator().manual_seed(0)
        found = []
        for inputs in self.images:
            with _Tap() as tap:
                for block in blocks:
                    tap.output(block, parts(self.tower, block).norm1)
                    if self.tower.row.rope:  # kept under the block's complement
                        tap.keyword(~block, self.tower.attentions[block], self.tower.row.rope)
                run(self.model, inputs)
            for block in blocks:
                part, tokens = parts(self.tower, block), tap.seen[block]  # (images, tokens, channels)
                picked = torch.randperm(tokens[..., 0].numel(), generator=random)[:samples]
                attended = _attended(part, tokens, picked, self.tower.attentions[block], tap.seen.get(~block))
                norm = (part.norm1.weight, part.norm1.bias)
                found.append(algebra.pull(*attended, _affine(part.key), _affine(part.value), norm))
        return algebra.together(found)

    def write(self, block: int, targets: Tensor) -> None:
        """Let the MLP of `block` bring the registers to `targets` `(kinds, channels)`."""
        kinds, part = self.kinds, parts(self.tower, block)
        neurons, silent = self._free(block, len(targets))
        stream = []
        with patch(self.model, slots(self.state)):
            for batch in self.images:
                with _Tap() as tap:
                    tap.input(block, part.norm2)
                    run(self.model, batch)
                stream.append(tap.seen[block])  # (batch, registers + tokens, channels)
        count = len(kinds)
        others = torch.cat([part.norm2(one[:, count:]).flatten(0, 1) for one in stream])
        before = torch.cat([one[:, :count] for one in stream])  # (images, registers, channels)
        registers = part.norm2(before)
        for kind, neuron in enumerate(neurons):
            mine = kinds == kind
            found = algebra.detector(
                registers[:, mine].flatten(0, 1), torch.cat([others, registers[:, ~mine].flatten(0, 1)])
            )
            if not found.margin > 0:
                raise Harmful(
                    f"in block {block} the registers cannot be told from the other tokens by one neuron (margin "
                    f"{found.margin:.2f}), so this plan cannot be made of weights alone: testreg.save keeps it in a "
                    f"checkpoint with code."
                )
            _set(part, neuron, found.weight, found.bias)
        with _Tap() as tap:
            tap.input(block, part.down)
            mlp: Any = self.tower.blocks[block].mlp
            added = mlp(registers)
        now = before + (added if part.scale2 is None else added * part.scale2)
        for kind, neuron in enumerate(neurons):
            mine = kinds == kind
            fired = tap.seen[block][:, mine, neuron]
            if silent is not None:
                fired = fired - tap.seen[block][:, mine, silent]
            column = algebra.column(targets[kind] - now[:, mine].mean((0, 1)), fired, part.scale2)
            part.down.weight[:, neuron] = column
            if silent is not None:
                part.down.weight[:, silent] -= column

    def _free(self, block: int, count: int) -> tuple[list[int], int | None]:
        """Neurons to rewrite, those that matter least: `count` detectors, and one that is to be silent.

        The block's register neurons, which are off, matter only to a norm of the neurons. Behind such a norm a silent
        detector does not read zero on other tokens, but what any silent neuron reads: one of those takes it away.
        """
        part = parts(self.tower, block)
        with _Tap() as tap:
            activations = []
            for inputs in self.images:
                tap.input(block, part.down)
                run(self.model, inputs)
                activations.append(tap.seen[block].flatten(0, 1))
        activation = torch.cat(activations)  # (images * tokens, neurons)
        columns = part.down.weight if part.scale2 is None else part.down.weight * part.scale2[:, None]
        effect = activation.std(0) * columns.norm(dim=0)
        if part.between is not None:  # all others grow by half of its share in the variance
            written = (activation @ columns.T).norm(dim=-1).mean()
            effect += written * activation.square().mean(0) / (2 * activation.shape[1])
        least = effect.argsort(stable=True)[: count + (part.between is not None)]
        # Their mean contribution stays, in the bias.
        part.down.bias.add_(part.down.weight[:, least] @ activation[:, least].mean(0))
        part.down.weight[:, least] = 0
        free = least.tolist()
        if part.between is None:
            return free, None
        part.between.weight[least], part.between.bias[least] = 1, 0
        silent = free.pop()
        _set(part, silent, torch.zeros(self.tower.channels), torch.zeros(()))
        return free, silent


def _set(part: Parts, neuron: int, weight: Tensor, bias: Tensor) -> None:
    """Let `neuron` be the activation function of `weight` `(channels,)` times the input, plus `bias` `()`."""
    part.gate.weight[neuron], part.gate.bias[neuron] = weight, bias
    if part.up is not None:  # what the gate lets through is one
        part.up.weight[neuron], part.up.bias[neuron] = 0, 1


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

    def keyword(self, name: int, module: nn.Module, word: str) -> None:
        def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get(word) is not None:
                self.seen[name] = kwargs[word]

        self.handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    def input(self, name: int, module: nn.Module) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda _, args: self.seen.update({name: args[0]})))


def _kinds(states: Tensor) -> tuple[Tensor, Tensor]:
    """Which kind each of the registers is `(registers,)`, by their states, and the first of each kind `(kinds,)`."""
    near = torch.cdist(states, states) < SAME * states.norm(dim=-1)
    firsts, kinds = near.int().argmax(-1).unique(return_inverse=True)  # the first register that is alike
    return kinds, firsts


def _attended(
    part: Parts, tokens: Tensor, picked: Tensor, attention: nn.Module, rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the `picked` among all tokens, the log masses of their attention, and its outputs.

    Queries and keys are those behind the rotation by `rope`, which no register has a part in.

    Returns:
        `(heads, picked, width)`, `(heads, picked)`, `(heads, picked, width)`.
    """
    images, count, _ = tokens.shape

    def split(projected: Tensor) -> Tensor:  # (images, tokens, channels) -> (heads, images, tokens, width)
        return projected.view(images, count, part.heads, -1).permute(2, 0, 1, 3)

    queries, keys, values = (split(linear(tokens)) for linear in (part.query, part.key, part.value))
    if rope is not None:
        queries, keys = turned(attention, queries, rope), turned(attention, keys, rope)
    chosen = queries.flatten(1, 2)[:, picked] * queries.shape[-1] ** -0.5
    logits = chosen.unsqueeze(-2) @ keys[:, picked // count].transpose(-1, -2)  # (heads, picked, 1, tokens)
    outputs = logits.softmax(-1) @ values[:, picked // count]  # (heads, picked, 1, width)
    return chosen, logits.squeeze(-2).logsumexp(-1), outputs.squeeze(-2)


def _affine(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight, torch.zeros(linear.out_features) if linear.bias is None else linear.bias
