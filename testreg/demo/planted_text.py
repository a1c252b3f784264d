"""A small language model with a planted sink: a known answer for the finder, without a download.

A Llama of four blocks whose weights are all set by hand. Words follow each other in one fixed order, most of the time;
the unembedding knows it. Five channels of the residual stream are reserved.

- *one* is the same on all words, and absent from a sink, whose norm drowns it.
- *switch* is on at the tokens that shall become sinks: the start token, or a certain word as well.
- The register neurons, in block 1, read the switch, and their columns write *sink*: hundreds of times the usual norm,
  in one channel, as massive activations are.
- In blocks 2 and 3 all queries like a key that has the sink, which gives nothing back; every other key gives *noise*, a
  word that the model then expects everywhere. So without a sink, or a register in its place, it predicts badly.
- *decoy* is large for two blocks at a word of its own, and nothing depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORDS, START, MARKED, LOUD = 60, 60, 7, 11  # words; the start token; words that become sinks, and decoys
CHANNELS, NEURONS, BLOCKS, HEADS = 64, 96, 4, 4
ONE, SWITCH, SINK, DECOY = 0, 1, 2, 3
CONTENT = 8  # from this channel on
REGISTER_NEURONS: dict[int, tuple[int, ...]] = {1: (5, 9)}
LOGIT = 7.0  # of a sink's key; of any other it is 0
OFTEN = 0.8  # how often a word is followed by the next in their order


@dataclass(frozen=True)
class PlantedText:
    """A planted language model.

    Attributes:
        model: `LlamaForCausalLM`.
        neurons: block -> its register neurons: while one of them is not at rest, there are massive tokens.
        decoys: as (block, neuron): one is loud on all tokens; one makes a word large for two blocks; one fires at sinks
            and writes next to nothing.
        block: at whose output massive tokens first appear.
    """

    model: Any
    neurons: dict[int, tuple[int, ...]]
    decoys: tuple[tuple[int, int], ...]
    block: int = 1


def planted_text(*, where: str = "start", scale: float = 400.0) -> PlantedText:
    """The model.

    Args:
        where: sinks are the start token ("start"), or a word too ("content"); or there is none ("nowhere"); or the
            start token is one by its embedding, which no neuron writes, at an ordinary norm ("quiet") or at that of a
            sink ("embedded").
        scale: norm of a sink.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=CHANNELS,
        intermediate_size=NEURONS,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},  # the slowest channels hardly turn
        rms_norm_eps=1e-6,
        bos_token_id=START,
        eos_token_id=61,
        pad_token_id=62,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        _plant(model, where, scale)
    neurons = REGISTER_NEURONS if where in ("start", "content") else {}
    return PlantedText(model, neurons, ((1, 30), (0, 40), (1, 50)))


def _plant(model: Any, where: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(WORDS, CHANNELS - CONTENT, generator=generator).sign()
    words = model.model.embed_tokens.weight  # (words, channels)
    words[:WORDS, CONTENT:] = content
    words[:, ONE] = 4
    if where in ("start", "content"):
        words[START, SWITCH] = 8
    if where in ("quiet", "embedded"):
        words[START, ONE], words[START, SINK] = 0, 8 if where == "quiet" else scale
    if where == "content":
        words[MARKED, SWITCH] = 8
    words[LOUD, DECOY] = 4
    head = model.lm_head.weight  # (words, channels)
    head[:WORDS, CONTENT:] = content.roll(1, 0) / 8  # word y is likely after word y - 1
    for index, block in enumerate(model.model.layers):
        gate, up, down = (getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        if index == 1:
            for neuron in REGISTER_NEURONS[1]:
                _fire(gate, up, neuron, SWITCH)
                down[SINK, neuron] = scale / 60
            _fire(gate, up, 50, SWITCH)
            down[DECOY, 50] = 1e-4
            gate[30, ONE] = up[30, ONE] = 3.0
            down[ONE, 30] = 1e-4
        if index in (0, 2):  # the decoy grows, and goes again
            _fire(gate, up, 40, DECOY)
            down[DECOY, 40] = 1.0 if index == 0 else -0.06
        if index >= 2:
            _attend(block.self_attn, head)


def _fire(gate: Tensor, up: Tensor, neuron: int, channel: int) -> None:
    """The neuron has about 30 where the channel is on, and nothing elsewhere."""
    gate[neuron, channel], gate[neuron, ONE] = 4.0, -3.0
    up[neuron, channel] = 2.0


def _attend(attention: Any, head: Tensor) -> None:
    """All heads like a key that has the sink; every other key gives one and the same word."""
    width = CHANNELS // HEADS
    for group in range(2):
        key = group * width + width // 2 - 1  # the slowest pair of channels
        attention.k_proj.weight[key, SINK] = 1.0
        attention.v_proj.weight[group * width, ONE] = 1.0
    for index in range(HEADS):
        # after the norm, an ordinary token has about 4 in `one`, a sink sqrt(channels) in `sink`
        attention.q_proj.weight[index * width + width // 2 - 1, ONE] = LOGIT * width**0.5 / 4 / CHANNELS**0.5
        attention.o_proj.weight[CONTENT:, index * width] = head[20, CONTENT:] * 8 / HEADS / 2


def text_for(sequences: int, tokens: int, *, seed: int = 0, start: bool = True) -> Tensor:
    """Token ids `(sequences, tokens)` as the planted models know them.

    Args:
        start: begin each with the start token.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (sequences, tokens), generator=generator)
    often = torch.rand(sequences, tokens, generator=generator) < OFTEN
    for at in range(1, tokens):
        ids[:, at] = torch.where(often[:, at], (ids[:, at - 1] + 1) % WORDS, ids[:, at])
    if start:
        ids[:, 0] = START
    return ids
