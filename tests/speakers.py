"""Tiny random language models, one per family, and a plan whose register is what a real start token would be."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from testreg import RegisterPlan
from testreg.finding.massive import inputs
from testreg.runtime.decoders import find_decoder

WORDS, START, END, PAD = 60, 60, 61, 62
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 256, "bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}
SLIDING = {**GROUPED, "sliding_window": 8}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENDS = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SLIDING)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SLIDING, head_dim=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SLIDING, head_dim=8)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SHAPE)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **ENDS)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SHAPE)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
            word_embed_proj_dim=32, max_position_embeddings=256, **ENDS,
        )
    ),
    "olmo": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**SHAPE)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SHAPE)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**GROUPED, head_dim=8)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **ENDS)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=24)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4)),
}  # fmt: skip
WINDOWED = ("mistral", "gemma2", "gemma3", "gpt-oss")


def built(name: str, std: float = 0.3) -> Any:
    """The tiny model, in evaluation mode; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[name]().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std)
    return model


def text(batch: int = 2, tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def with_start(ids: Tensor) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], START), ids], dim=1)


def start_plan(model: Any, entry: int = 0, **more: Any) -> RegisterPlan:
    """A register that is what a start token of the model's own is to the tokens after it; no neuron rests."""
    tower, rows = find_decoder(model), []
    with torch.no_grad(), inputs(tower, lambda index, tokens: rows.append(tokens[0].detach())):
        tower.module(input_ids=torch.tensor([[START]]), use_cache=False)
    return RegisterPlan({}, 1, entry, torch.stack(rows)[entry:], positions="before", **more)
