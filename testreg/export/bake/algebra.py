"""The algebra of a weight-only register, as pure functions of tensors. `docs/bake.md` derives it in one page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CLEARANCE = 20.0  # what a detector reads at least on registers, and at least below zero on all other tokens
STEPS = 80  # of L-BFGS; it converges in 20 to 60
TINY = 1e-12  # squared distance that rounding can make up


def direction(vector: Tensor) -> Tensor:
    """`vector` as LayerNorm hands it on, before its gain and bias: zero mean and unit variance over the channels."""
    vector = vector - vector.mean(-1, keepdim=True)
    return vector * (vector.shape[-1] ** 0.5 / vector.norm(dim=-1, keepdim=True))


class Pull(NamedTuple):
    """What one more token would do to attention, for a sample of queries of all early blocks and heads together.

    While the token's norm is far above what blocks add to it, LayerNorm makes one direction of it in all of them, and
    its key and value are affine in that direction.

    Attributes:
        queries: as attention multiplies them with keys, scale included `(queries, width)`.
        masses: log of the sum of each query's exponentials over the tokens that are there `(queries,)`.
        outputs: what it gets from these tokens `(queries, width)`.
        heads: whose key and value it would meet `(queries,)`.
        keys, values: `(heads, width, channels)`, key_fixed, value_fixed: `(heads, width)`; the token's key in a head is
            `keys @ direction + key_fixed`.
    """

    queries: Tensor
    masses: Tensor
    outputs: Tensor
    heads: Tensor
    keys: Tensor
    key_fixed: Tensor
    values: Tensor
    value_fixed: Tensor

    def log_odds(self, direction: Tensor) -> Tensor:
        """Log odds that queries attend to a token of `direction` `(channels,)` and not to the others `(queries,)`."""
        keys = self.keys @ direction + self.key_fixed  # (heads, width)
        return (self.queries * keys[self.heads]).sum(-1) - self.masses

    def turn(self, direction: Tensor) -> Tensor:
        """Squared distances `(queries,)` between the token's value and what the queries get without it."""
        values = self.values @ direction + self.value_fixed  # (heads, width)
        return (values[self.heads] - self.outputs).square().sum(-1)


def pull(
    queries: Tensor,
    masses: Tensor,
    outputs: Tensor,
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
) -> Pull:
    """That on one block. Values are in units of what its attention gives, so that blocks can be added up.

    Args:
        queries, outputs: `(heads, samples, width)`, masses: `(heads, samples)`, as in `Pull`.
        key, value: weight `(heads * width, channels)` and bias `(heads * width,)` of the projection.
        norm: gain and bias of the norm in front of the attention, each `(channels,)`.
    """
    heads, samples, width = queries.shape
    gain, bias = norm

    def affine(weight: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        return (weight * gain).view(heads, width, -1), (weight @ bias + fixed).view(heads, width)

    unit = outputs.square().sum(-1).mean().sqrt()
    values, value_fixed = (part / unit for part in affine(*value))
    return Pull(
        queries.flatten(0, 1),
        masses.flatten(),
        outputs.flatten(0, 1) / unit,
        torch.arange(heads).repeat_interleave(samples),
        *affine(*key),
        values,
        value_fixed,
    )


def together(pulls: Sequence[Pull]) -> Pull:
    """That on several blocks, whose heads are counted on."""
    firsts = torch.tensor([0] + [len(one.values) for one in pulls[:-1]]).cumsum(0)
    counted = [one._replace(heads=one.heads + first) for one, first in zip(pulls, firsts, strict=True)]
    return Pull(*map(torch.cat, zip(*counted, strict=True)))


def repel(
    pull: Pull,
    registers: int,
    start: Tensor,
    *,
    avoid: Tensor | None = None,
    through: Callable[[Tensor], Tensor] = direction,
) -> Tensor:
    """The direction that changes attention least: the start of a register that the early blocks do not see.

    Minimises the mean square of what `registers` equal tokens change in attention's outputs, the attention they receive
    times the distance of their value. Its logarithm is nearly a log-sum-exp of affine functions, so that the result
    does not depend on `start`.

    Args:
        start: where to begin `(channels,)`.
        avoid: directions `(others, channels)` to be orthogonal to.
        through: how a free vector becomes the token's direction; a norm behind the embeddings bounds what is possible.

    Returns:
        The free vector, of zero mean and unit variance `(channels,)`.
    """
    basis = None if avoid is None or not len(avoid) else torch.linalg.qr(avoid.T).Q  # (channels, others)

    def free(vector: Tensor) -> Tensor:
        vector = vector - vector.mean()
        return direction(vector if basis is None else vector - basis @ (basis.T @ vector))

    vector = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([vector], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        token = through(free(vector))
        attention = torch.nn.functional.logsigmoid(pull.log_odds(token) + math.log(registers))
        value = (2 * attention + pull.turn(token).clamp(min=TINY).log()).logsumexp(0)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return free(vector.detach())


class Detector(NamedTuple):
    """A neuron that tells one kind of register from all other tokens: its row of the MLP's first linear.

    Attributes:
        weight: `(channels,)`, bias: `()`; pre-activation at least `CLEARANCE` on registers, at most `-CLEARANCE` on all
            other tokens, where every activation function of these models is zero.
        margin: the gap between the two, as a part of the distance between their means; 1 = they do not vary.
    """

    weight: Tensor
    bias: Tensor
    margin: float


def detector(registers: Tensor, others: Tensor) -> Detector:
    """Fisher's linear discriminant, shrunk, with its threshold in the middle of the gap.

    Args:
        registers: inputs of the MLP `(samples, channels)`, others: those of all other tokens.
    """
    covariance = torch.cov(others.T)
    ridge = 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + ridge, registers.mean(0) - others.mean(0))
    inside, outside = registers @ weight, others @ weight
    gap = inside.min() - outside.max()
    margin = float(gap / (inside.mean() - outside.mean()))
    scale = 2 * CLEARANCE / gap
    return Detector(weight * scale, -(outside.max() + gap / 2) * scale, margin)


def column(write: Tensor, activation: Tensor, scale: Tensor | None) -> Tensor:
    """The neuron's column of the MLP's second linear `(channels,)`, so that on average it adds `write`.

    Args:
        activation: the neuron's on registers `(samples,)`.
        scale: the layer scale behind the linear `(channels,)`, if any; a channel that it switches off stays as it is.
    """
    amount = write / activation.mean()
    return amount if scale is None else torch.where(scale.abs() > 1e-8, amount / scale, 0.0)
