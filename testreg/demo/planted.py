"""Register neurons planted into a random model: a known answer for the finder, and a demonstration without a download.

The construction, all of it closed-form weight edits: four directions of the residual stream are reserved, of zero mean
(LayerNorm only rescales them) and hidden from everything else that reads or writes the stream.

- *switch* is on at the patches that shall become outliers. Position-locked: the position embedding says so.
  Content-following: one attention head of block 0 takes the image's highest value of *trigger*, a filter of the pixels,
  and subtracts a part of it everywhere; one head of block 1 lets the patches that are still positive attend to an
  *anchor* token, whose value is the switch. Both saturate: a patch is an outlier or it is none.
- The register neurons, all in one block, read the switch, and their columns write *sink*: many times the usual norm,
  on two channels, as massive activations are.
- In later blocks all keys read the sink: outliers draw most of the attention and, their own content drowned in the
  norm, give nothing back. Without them all other tokens change; with a register in their place they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import UnsupportedModel
from ..runtime.paths import reach
from ..runtime.towers import Tower, find_tower

# LayerNorm, learnt position embeddings, separate query, key and value linears.
PLANTABLE = ("vit", "deit", "dinov2", "dinov2-with-registers", "clip", "siglip")
# What transformers has called their linears within 5.x: from the attention, and from the block.
QUERY, KEY, VALUE = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")
JOINS = ("attention.output.dense", "attention.o_proj", "self_attn.out_proj")
READS = ("mlp.gate_proj", "mlp.weights_in", "mlp.fc1", "intermediate.dense")  # gates first
BIASES = tuple(f"{name}.bias" for name in QUERY)
PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
# Lengths are in units of an ordinary embedding's norm. A reading is what LayerNorm leaves of a reserved direction, from
# -1 to 1 = the token has nothing else.
SWITCH, UPSTREAM, ANCHOR, NEVER = 1.0, 0.7, 0.8, -0.5
POSITION = 0.85  # of an embedding; the rest is content
NEAR_MAXIMUM = 0.7
THRESHOLD = 0.2  # reading of the switch from which register neurons fire
SINK_LOGIT = 9.0


@dataclass(frozen=True)
class Planted:
    """What `plant` planted.

    Attributes:
        neurons: block -> register neurons. Zeroing all of them removes every outlier; where `scale / neurons` is still
            an outlier's norm, nothing less does.
        upstream: block -> neurons that fire at the same patches before, and that the register neurons read: zeroing
            them lessens the outliers.
        decoys: what a careless finder picks, as (block, neuron); no outlier goes away without them. `everywhere` is the
            loudest on all tokens; `class` fires on the class token only (absent where there is none); `early` is loud,
            louder at outliers, and all ordinary tokens need it; `tiny` fires at outliers, louder than register neurons,
            but writes next to nothing; `downstream` fires because of the outliers, and writes along them.
        block: the block that writes the outliers, from its output on.
    """

    neurons: dict[int, tuple[int, ...]]
    upstream: dict[int, tuple[int, ...]]
    decoys: dict[str, tuple[tuple[int, int], ...]]
    block: int


@torch.no_grad()
def plant(
    model: nn.Module,
    *,
    seed: int = 0,
    scale: float = 30.0,
    where: str | Sequence[int] = "content",
    neurons: int = 1,
    upstream: int = 0,
    decoys: bool = True,
    block: int | None = None,
) -> Planted:
    """Overwrite the weights of the vision tower of `model` by random ones that carry the artefact.

    Args:
        model: a small model on the CPU, of one of the families in `PLANTABLE`, with at least three blocks; heads and
            text towers stay as they are.
        seed: of all weights and of which neurons are planted.
        scale: about the norm of the outliers over that of ordinary patches, 10 to 50 in real models.
        where: `"content"` = a few patches of each image, by their pixels; `"corners"` = the four corners; or patch
            indices, counted by rows at the resolution of the position embedding.
        neurons: how many register neurons share the work, in equal parts.
        upstream: how many neurons of the block before feed them.
        decoys: whether to plant those too.
        block: the block that writes the outliers; by default in the middle.

    Raises:
        UnsupportedModel: the model is of no plantable family, or its attention has no biases.
        ValueError: the model is too shallow or too narrow for what is to be planted.
    """
    tower = find_tower(model)
    if tower.family not in PLANTABLE or any(reach(module, BIASES) is None for module in tower.attentions):
        raise UnsupportedModel(
            f"{type(tower.module).__name__} ({tower.family}) is built in a way that cannot be planted; these can, with "
            f"biases in their attention: {', '.join(PLANTABLE)}."
        )
    first = int(where == "content") + int(upstream > 0)  # the switch must be there, and whoever feeds it
    block = max(first, len(tower.blocks) // 2) if block is None else block
    if not first <= block < len(tower.blocks) - 1:
        raise ValueError(
            f"block {block} cannot write the outliers: of {len(tower.blocks)} blocks, {first} must be before it and "
            f"one behind it."
        )
    soil = _Soil(tower, seed)
    if where == "content":
        soil.follow_content()
    else:
        soil.lock(where)

    fed = SWITCH + UPSTREAM * bool(upstream)
    planted = {block: soil.pick(block, neurons)}
    for neuron in planted[block]:
        loud = soil.uniform(30, 50)
        soil.neuron(block, neuron, soil.switch, loud / (_reading(fed, block) - THRESHOLD), THRESHOLD)
        soil.write(block, neuron, soil.sink, scale * _growth(block) / neurons / loud)
    chain = {block - 1: soil.pick(block - 1, upstream)} if upstream else {}
    for neuron in chain.get(block - 1, ()):
        soil.neuron(block - 1, neuron, soil.switch, 8 / (_reading(SWITCH, block - 1) - THRESHOLD), THRESHOLD)
        soil.write(block - 1, neuron, soil.switch, UPSTREAM / upstream / 8)
    soil.attend(block + 1)
    return Planted(planted, chain, soil.decoys(block, where) if decoys else {}, block)


def _growth(block: int) -> float:
    """The norm of ordinary tokens after a block, in units of that of the embeddings."""
    return math.sqrt(1 + 0.25 * (block + 1))


def _reading(amount: float, block: int) -> float:
    """What the norm in the middle of a block leaves of a reserved direction in a token that is ordinary otherwise."""
    return amount / math.hypot(_growth(block), amount)


class _Soil:
    """A tower with fresh random weights in which four directions are unused."""

    def __init__(self, tower: Tower, seed: int):
        self.tower, self.random = tower, torch.Generator().manual_seed(seed)
        self.channels, self.norm = tower.channels, math.sqrt(tower.channels)  # ordinary tokens have unit rms
        self.attentions: tuple[Any, ...] = tower.attentions
        self.downs: tuple[Any, ...] = tower.downs
        self.width = tower.channels // reach(tower.module, "config.num_attention_heads")  # channels of a head
        self.massive = torch.randperm(self.channels, generator=self.random)[:2]
        free = torch.cat([torch.ones(self.channels, 1), self.normal(self.channels, 4)], dim=1)
        free[:, 1] = torch.zeros(self.channels).index_copy(0, self.massive, torch.tensor([1.0, -1.0]))
        self.reserved = torch.linalg.qr(free).Q[:, 1:]  # (channels, 4), orthonormal and of zero mean
        self.sink, self.trigger, self.switch, self.anchor = self.reserved.T
        self.unused = [torch.randperm(count, generator=self.random).tolist() for count in tower.neurons]
        self._embed()
        for block, down in zip(tower.blocks, tower.downs, strict=True):
            self._draw(block, down)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.random).item()

    def pick(self, block: int, count: int) -> tuple[int, ...]:
        if len(self.unused[block]) < count:
            raise ValueError(f"block {block} has {self.tower.neurons[block]} neurons, too few to plant so many.")
        return tuple(sorted(self.unused[block].pop() for _ in range(count)))

    def hidden(self, weight: Tensor) -> Tensor:
        """`(..., channels)` without the reserved directions."""
        return weight - weight @ self.reserved @ self.reserved.T

    def _embed(self) -> None:
        self.pixels = next(module for module in self.tower.module.modules() if isinstance(module, nn.Conv2d))
        colours, height, width = self.pixels.weight.shape[1:]
        content = self.hidden(self.normal(colours, height, width, self.channels)).movedim(-1, 0)
        self.pixels.weight.copy_(content * math.sqrt((1 - POSITION**2) / (colours * height * width)))
        if self.pixels.bias is not None:
            self.pixels.bias.zero_()
        inside = {id(parameter) for block in self.tower.blocks for parameter in block.parameters()}
        for path, module in self.tower.module.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in inside:
                    continue
                if "position_embedding" in f"{path}.{name}":
                    self.positions = parameter.view(-1, self.channels)
                    parameter.copy_(self._vectors(parameter.shape))
                elif name in PREFIX_TOKENS:  # none of which ever becomes an outlier
                    anchor = ANCHOR * self.anchor * (name in PREFIX_TOKENS[:2])
                    parameter.copy_(self._vectors(parameter.shape) + self.norm * (NEVER * self.trigger + anchor))
                elif module is self.tower.seed:
                    parameter.fill_(name == "weight")
                elif isinstance(module, nn.LayerNorm) and name == "weight":
                    parameter[self.massive] = 0  # what follows the blocks sees the outliers, but not their size

    def _vectors(self, shape: Sequence[int]) -> Tensor:
        return POSITION * self.norm * nn.functional.normalize(self.hidden(self.normal(*shape)), dim=-1)

    def _draw(self, block: nn.Module, down: nn.Module) -> None:
        """Weights that keep ordinary norms and attention moderate; norms and layer scales that do nothing."""
        for name, parameter in block.named_parameters():
            if parameter.ndim == 1:  # of biases, norms and layer scales
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                weight = self.normal(*module.weight.shape) / math.sqrt(module.in_features)
                writes = module is down or name in JOINS
                hidden = self.hidden(weight.T).T if writes else self.hidden(weight)
                module.weight.copy_((0.5 if module is down else 0.9 if writes else 0.8) * hidden)

    def lock(self, where: str | Sequence[int]) -> None:
        """The switch from the position embedding."""
        side = math.isqrt(len(self.positions))
        corners = (0, side - 1, side * (side - 1), side * side - 1)
        if isinstance(where, str) and where != "corners":
            raise ValueError(f"where must be 'content', 'corners' or patch indices, not {where!r}.")
        chosen = list(corners if isinstance(where, str) else where)
        amount = SWITCH * (1 if self.tower.seed is None else math.sqrt(2))  # a norm behind it takes that back
        self.positions[-side * side :][chosen] += amount * self.norm * self.switch

    def follow_content(self) -> None:
        """The switch from attention: near the image's maximum of the trigger, or not."""
        if not self.tower.prefix:
            self.positions[0] += ANCHOR * self.norm * self.anchor
        kernel = self.normal(*self.pixels.weight.shape[1:])
        kernel -= kernel.mean(dim=(1, 2), keepdim=True)  # blind to brightness and colour
        self.pixels.weight.add_(self.trigger[:, None, None, None] * kernel / kernel.norm())
        width = math.sqrt(self.width)
        # Block 0: all tokens attend to the highest trigger, and take a part of it away from their own.
        q, k, v, out = self._head(0)
        q.bias[0] = 300 * width
        k.weight[0] = v.weight[0] = self.trigger / self.norm
        out.weight[:, 0] = -NEAR_MAXIMUM * self.norm * self.trigger
        # Block 1: what is left is positive at the maximum and near it only; these tokens attend to the anchor.
        q, k, v, out = self._head(1)
        q.weight[0] = 4000 * width * self.trigger / self.norm
        k.weight[0] = v.weight[0] = self.anchor / self.norm
        out.weight[:, 0] = SWITCH / _reading(ANCHOR, 1) * self.norm * self.switch

    def _head(self, block: int) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """The four linears of a block's attention, its first head cleared."""
        q, k, v = (reach(self.attentions[block], name) for name in (QUERY, KEY, VALUE))
        out = reach(self.tower.blocks[block], JOINS)
        for linear in (q, k, v):
            linear.weight[: self.width] = 0
        out.weight[:, : self.width] = 0
        return q, k, v, out

    def neuron(self, block: int, neuron: int, direction: Tensor, gain: float, threshold: float) -> None:
        """Let a neuron's activation be `gain * (reading of direction - threshold)` where that is positive."""
        reads, width = reach(self.tower.blocks[block], READS), self.tower.neurons[block]
        reads.weight[neuron] = gain * direction / self.norm
        reads.bias[neuron] = -gain * threshold
        value, row = reach(self.tower.blocks[block], "mlp.up_proj"), neuron
        if value is None and reads.out_features > width:  # gates and values are one linear
            value, row = reads, width + neuron
        if value is not None:  # what the gate lets through is one
            value.weight[row], value.bias[row] = 0, 1
        self.downs[block].weight[:, neuron] = 0

    def write(self, block: int, neuron: int, direction: Tensor, amount: float) -> None:
        """Let a neuron write `direction`, `amount` ordinary norms per unit of activation."""
        self.downs[block].weight[:, neuron] += amount * self.norm * direction

    def attend(self, start: int) -> None:
        """Make the sink an attention sink from block `start` on."""
        query, key = 4.0, SINK_LOGIT * math.sqrt(self.width) / 4.0  # times the readings' own 1
        for attention in self.attentions[start:]:
            reach(attention, QUERY).bias[:: self.width] = query
            reach(attention, KEY).weight[:: self.width] = key * self.sink / self.norm

    def decoys(self, block: int, where: str | Sequence[int]) -> dict[str, tuple[tuple[int, int], ...]]:
        found: dict[str, tuple[tuple[int, int], ...]] = {}

        def decoy(name: str, at: int, reads: Tensor, gain: float, threshold: float, **writes: float) -> None:
            (neuron,) = self.pick(at, 1)
            self.neuron(at, neuron, reads, gain, threshold)
            for direction, amount in writes.items():
                self.write(at, neuron, self.sink if direction == "sink" else self._ordinary(), amount)
            found[name] = ((at, neuron),)

        decoy("everywhere", block, self._ordinary(), 20, -5, ordinary=0.003, sink=0.0005)
        if self.tower.prefix:
            decoy("class", block, self.anchor, 400, _reading(ANCHOR, block) / 2, ordinary=0.003)
        decoy("early", 0, self.trigger if where == "content" else self.switch, 60, -1, ordinary=0.01)
        decoy("tiny", block, self.switch, 400, THRESHOLD, sink=0.00001)
        decoy("downstream", block + 1, self.sink, 120, 0.5, sink=0.01)
        return found

    def _ordinary(self) -> Tensor:
        direction = self.hidden(self.normal(self.channels))
        return direction / direction.norm()
