"""A patched language model as stock files: plain weights in which the neurons rest, and a prefix for PEFT beside them.

A register's keys and values are what prefix tuning learns, so PEFT's own file holds them: no code, no testreg. The
weights alone, without the prefix, are a worse model than the unpatched one, and the card says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.atomic import replacing
from ..checkpoints.card import metadata
from ..checkpoints.saving import PROCESSOR, free, source_files
from ..runtime.decoders import LANGUAGE, is_linear, matrix, towers_of
from ..runtime.errors import Harmful, TestregError, UnsupportedModel
from ..runtime.fingerprint import name
from ..runtime.guard import acting_in
from ..runtime.installer import Patch, patch
from ..runtime.plan import BEFORE, RegisterPlan
from ..runtime.prefix import as_first_tokens, rotary
from ..runtime.towers import Tower

NOTHING = RegisterPlan({}, registers=0, positions=BEFORE)  # of several patches the last one acts, so this one is off
PREFIX = "prefix"  # the folder of the adapter: beside the weights transformers would take it for its own
SAME = 1e-4  # logits that differ by less, of the largest, are the same


@dataclass(frozen=True)
class Stock:
    """What was written.

    Attributes:
        directory: where the weights are; the adapter is in its folder `prefix`.
        difference: the largest difference of a logit from those of the patched model, over the largest logit.
    """

    directory: Path
    difference: float


def export_language(
    model: Any, tower: Tower, directory: str | Path, *, replace: bool = False, force: bool = False
) -> Stock:
    """Write a patched language model as weights of its own class and a prefix-tuning adapter of PEFT.

    Args:
        model: a causal language model of transformers on which a patch of its language model acts.
        directory: where to; made with its parents. Must be empty or not exist.
        replace: overwrite a checkpoint that `directory` holds.
        force: write what does not give the same logits too.

    Raises:
        TestregError: the model is not patched, or PEFT is not installed.
        UnsupportedModel: PEFT's prefix cannot hold these registers, or weights cannot make these neurons rest; the
            message says why.
        Harmful: what would be written does not give the patched model's logits.
    """
    acting: Patch | None = acting_in(tower)
    if acting is None:
        raise TestregError(f"{type(model).__name__} is not patched: give its plan, plan=FILE (--plan FILE).")
    try:
        import peft
    except ImportError as error:
        raise TestregError("the prefix is written by PEFT, which is not installed: pip install peft") from error
    plan = acting.plan
    _check(model, tower, plan)
    keys, values = as_first_tokens(tower)  # (blocks, heads, registers, channels) each
    target = free(directory, model, replace)
    source = source_files(model)
    ids = _sample(model)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=plan.registers,
        token_dim=keys.shape[1] * keys.shape[3],
        num_layers=keys.shape[0],
        num_attention_heads=keys.shape[1],
        num_transformer_submodules=1,
        encoder_hidden_size=keys.shape[1] * keys.shape[3],
        inference_mode=True,
    )
    held = torch.stack([keys, values], dim=1)  # (blocks, 2, heads, registers, channels)
    prompt = held.permute(3, 0, 1, 2, 4).reshape(plan.registers, -1)  # (registers, blocks * 2 * heads * channels)
    with patch(model, NOTHING), _resting(model, tower, plan), _trainable_as_before(model):
        adapted: Any = peft.PeftModelForCausalLM(model, config)
        weight = adapted.prompt_encoder["default"].embedding.weight
        weight.data = prompt.to(weight)
        with torch.no_grad():
            found = adapted(input_ids=ids).logits.float()
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if not difference <= SAME and not force:
            raise Harmful(
                f"with its registers as PEFT's prefix {type(model).__name__} gives other logits (by {difference:.1e} "
                f"of the largest): its attention treats a prefix in a way of its own. testreg.save keeps the registers "
                f"in a checkpoint with code; force=True (--force) writes the stock files nevertheless."
            )
        with replacing(target) as build:
            type(model).save_pretrained(model, build)
            adapted.save_pretrained(str(build / PREFIX))
            (build / PREFIX / "README.md").unlink(missing_ok=True)
            for file, path in source.items():
                if PROCESSOR.fullmatch(file):
                    copyfile(path, build / file)
            (build / "README.md").write_text(_card(model, plan, source.get("README.md")), encoding="utf-8")
    return Stock(target, difference)


def speaking(model: nn.Module) -> Tower | None:
    """The language model that is to be exported: one with registers, or all that `model` is; else None.

    Raises:
        UnsupportedModel: it is neither a Vision Transformer nor a causal language model, nor holds one.
    """
    towers = towers_of(model)
    return next((one for one in towers if one.family == LANGUAGE and (acting_in(one) or len(towers) == 1)), None)


def _check(model: Any, tower: Tower, plan: RegisterPlan) -> None:
    what = type(tower.module).__name__

    def cannot(reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"PEFT's prefix tuning cannot hold these registers of {what}: {reason}. testreg.save keeps them in a "
            f"checkpoint with code."
        )

    if not plan.registers:
        raise cannot("there are none")
    if plan.entry:
        raise cannot(f"a prefix is in every block, and they begin at block {plan.entry}")
    config = tower.module.config.get_text_config()  # type: ignore[union-attr,operator]
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if sliding or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise cannot("its attention has a sliding window, which a prefix would leave as a token does")
    if plan.positions != BEFORE and not rotary(tower):
        raise cannot("its positions are learned, and a prefix takes the first ones, where the text begins here")
    if getattr(model.config, "model_type", "") != getattr(config, "model_type", ""):
        raise cannot("it is a part of a larger model")
    if plan.rest and any(value for row in plan.rest.values() for value in row):
        raise cannot("its neurons rest at other values than 0, which weights alone do not make")


def feeding(block: nn.Module, attention: nn.Module, down: nn.Module, neurons: int) -> list[nn.Module]:
    """The linears of a block that make its MLP's neurons: one, a gate and another, or both in one."""
    apart = {*attention.modules(), down}
    linears = [part for part in block.modules() if is_linear(part) and part not in apart]
    return [part for part in linears if matrix(part).shape[0] in (neurons, 2 * neurons)]


@contextmanager
def _resting(model: Any, tower: Tower, plan: RegisterPlan) -> Iterator[None]:
    """Inside the `with`, the rows that make the register neurons are 0, in every linear that makes them.

    Raises:
        UnsupportedModel: they do not rest by that.
    """
    before: list[tuple[Tensor, Tensor]] = []

    def clear(weight: Tensor, rows: Any) -> None:
        before.append((weight, weight.detach().clone()))
        with torch.no_grad():
            weight[rows] = 0

    seen: dict[int, Tensor] = {}
    handles = []
    try:
        for index, row in plan.neurons.items():
            block, down, neurons = tower.blocks[index], tower.downs[index], tower.neurons[index]
            for linear in feeding(block, tower.attentions[index], down, neurons):
                made = matrix(linear)
                rows = [neuron + half for half in range(0, made.shape[0], neurons) for neuron in row]
                transposed = made.shape != linear.weight.shape or type(linear).__name__ == "Conv1D"
                clear(linear.weight, (slice(None), rows) if transposed else rows)  # type: ignore[arg-type]
                if getattr(linear, "bias", None) is not None:
                    clear(linear.bias, rows)  # type: ignore[arg-type]

            def keep(module: nn.Module, args: Any, index: int = index, row: Any = row) -> None:
                seen[index] = args[0][..., list(row)].detach()

            handles.append(down.register_forward_pre_hook(keep))
        with torch.no_grad():
            model(input_ids=_sample(model), use_cache=False)
        loud = [index for index, activation in seen.items() if activation.abs().max() > 0]
        if loud or len(seen) < len(plan.neurons):
            raise UnsupportedModel(
                f"weights alone do not make the neurons of block {(loud or list(plan.neurons))[0]} of "
                f"{type(tower.module).__name__} rest: testreg.save keeps them in a checkpoint with code."
            )
        for handle in handles:
            handle.remove()
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for weight, value in reversed(before):
                weight.copy_(value)


@contextmanager
def _trainable_as_before(model: nn.Module) -> Iterator[None]:
    """PEFT freezes what it adapts; afterwards every weight is as it was."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for weight, wanted in before:
            weight.requires_grad_(wanted)


def _sample(model: Any) -> Tensor:
    """Some token ids `(2, 24)` of the model's own."""
    known = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, known, (2, 24), generator=generator).to(model.get_input_embeddings().weight.device)


def _card(model: Any, plan: RegisterPlan, source: Path | None) -> str:
    base = name(model)
    data, licence = metadata(base, "transformers", source)
    lines = [
        f"# {base or type(model).__name__} with a register, as stock files",
        "",
        f"{plan}. The neurons rest in the weights, and what attention sees of the register is a prefix for PEFT in the "
        f"folder `{PREFIX}`. **Use both: the weights alone are a worse model.**",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")',
        f'model = PeftModel.from_pretrained(model, "DIRECTORY/{PREFIX}")',
        "```",
        "",
        "Made by testreg (arXiv 2506.08010 is the method for Vision Transformers).",
        "",
        "## Licence",
        "",
        f"That of the base model: {licence}." if licence else "That of the base model, whose card did not say which.",
        "",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)
