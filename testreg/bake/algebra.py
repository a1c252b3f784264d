"""The algebra of a weight-only register, as pure functions of tensors. `docs/bake.md` derives it in one page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CLEARANCE = 20.0  # what a detector reads at least on registers, and at least below zero on all other tokens
STEPS = 80  # of L-BFGS; it converges in 20 to 60


def direction(vector: Tensor) -> Tensor:
    """`vector` as LayerNorm hands it on, before its gain and bias: zero mean and unit variance over the channels."""
    vector = vector - vector.mean(-1, keepdim=True)
    return vector * (vector.shape[-1] ** 0.5 / vector.norm(dim=-1, keepdim=True))


class Odds(NamedTuple):
    """The attention that queries pay to one more token: log odds `slopes @ direction + offsets`.

    While the token's norm is far above what blocks add to it, LayerNorm makes one direction of it in all of them, and
    its keys are affine in that direction.

    Attributes:
        slopes: `(queries, channels)`, offsets: `(queries,)`; queries of all early blocks and heads together.
    """

    slopes: Tensor
    offsets: Tensor


def odds(queries: Tensor, masses: Tensor, key: Tensor, key_bias: Tensor, gain: Tensor, bias: Tensor) -> Odds:
    """Those of one block.

    Args:
        queries: sampled, as attention multiplies them with keys, scale included `(heads, samples, width)`.
        masses: log of the sum of exponentials over the tokens that are there `(heads, samples)`.
        key: weight of the key projection `(heads * width, channels)`, with its bias `(heads * width,)`.
        gain: of the norm in front of the attention `(channels,)`, with its bias.
    """
    heads, _, width = queries.shape
    key = key.view(heads, width, -1)
    fixed = (key @ bias + key_bias.view(heads, width)).unsqueeze(-1)  # (heads, width, 1)
    slopes = queries @ (key * gain)  # (heads, samples, channels)
    offsets = (queries @ fixed).squeeze(-1) - masses  # (heads, samples)
    return Odds(slopes.flatten(0, 1), offsets.flatten())


def repel(
    odds: Odds,
    registers: int,
    start: Tensor,
    *,
    avoid: Tensor | None = None,
    through: Callable[[Tensor], Tensor] = direction,
) -> Tensor:
    """The direction that the queries attend to least: the start of a register that the early blocks do not see.

    Minimises the mean square of the attention that `registers` equal tokens receive. Its logarithm is a log-sum-exp of
    almost affine functions, so the result does not depend on `start`.

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
        logits = odds.slopes @ through(free(vector)) + odds.offsets + math.log(registers)
        value = (2 * torch.nn.functional.logsigmoid(logits)).logsumexp(0)
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
