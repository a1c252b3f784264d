"""`evaluate --task perplexity`: a language model without and with its register, whole, quantised, or as a window.

The arms tell what an effect is due to: a start token in front, the prefix alone, the neurons at rest alone, both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..finding.observe import run
from ..finding.still import quiet
from ..finding.text_trial import losses_of
from ..runtime.decoders import find_decoder
from ..runtime.errors import BadText, TestregError
from ..runtime.fitting import check
from ..runtime.guard import acting_in
from ..runtime.installer import patch
from ..runtime.plan import BEFORE, RegisterPlan
from ..runtime.streaming import StreamingCache
from ..text.streams import Texts, start_of
from .evaluation import PATCHED, UNPATCHED, Row, Table, row_of
from .quantise import Scheme, quantised
from .tasks import Measure

NAME, METRIC = "perplexity", "perplexity of the next token"
LENGTH, SEQUENCES = 512, 8  # tokens of a sequence, and how many are scored where no limit says otherwise
CALIBRATION = 16  # sequences that ranges are taken from, behind those that are scored
KEPT = 4  # tokens that StreamingLLM keeps
PIECE = 32  # tokens that are read into a window at once
NOTHING = RegisterPlan({}, registers=0, positions=BEFORE)  # of several patches the last one acts, so this one is off


@dataclass(frozen=True)
class Arm:
    """A language model in one state.

    Attributes:
        plan: its registers.
        start: the token that is put in front of each sequence.
        scheme: how it is quantised.
        kept: in a window, how many tokens stay; -1 = attention to the whole text.
    """

    name: str
    plan: RegisterPlan
    start: int | None = None
    scheme: Scheme | None = None
    kept: int | None = None


def perplexity(
    model: nn.Module,
    text: Any,
    *,
    plan: RegisterPlan | str | Path | None = None,
    tokenizer: Any = None,
    quantise: Scheme | str | None = None,
    window: int | None = None,
    baselines: bool = True,
    skip: int = 0,
    limit: int | None = None,
    progress: bool = False,
) -> Table:
    """Judge a causal language model by the perplexity of text that its registers were not found on.

    Args:
        model: patched or not; as it was afterwards.
        text: see `testreg.find`. 8 sequences of 512 tokens are scored; with a window, the last half of 8,192 tokens.
        plan: the registers to judge, or the path of their file; by default those of the patch that acts on the model;
            with neither, the model is judged alone.
        quantise: every linear as this scheme has it, such as "w8a8"; ranges come from 16 sequences behind those that
            are scored.
        window: read the text as one, each token seeing so many before it: with the register, with the first 4 tokens
            kept (StreamingLLM, arXiv 2309.17453), and with nothing.
        baselines: judge the start token in front, the prefix alone and the neurons at rest alone too.
        skip: tokens of the text to leave out first.
        limit: sequences to score, or tokens with a window.
        progress: draw bars on the standard error.

    Raises:
        BadText: there is too little text, or it is not the model's.
        BadPlan, UnsupportedModel: the plan does not fit, or the model is no causal language model.
    """
    tower = find_decoder(model)
    current = acting_in(tower)
    plan = RegisterPlan.of(plan) if plan is not None else current.plan if current else None
    if plan is not None:
        check(tower, plan)
    scheme = Scheme.parse(quantise, per_channel=True) if isinstance(quantise, str) else quantise
    if window is not None and scheme is not None:
        raise TestregError("a window and quantisation are judged apart: give one of them.")
    if window is not None:
        ids = _tokens(model, text, tokenizer, skip, limit or 16 * LENGTH, window + 1, whole=True)
        arms = _windows(plan)
        look: Callable[[Arm], np.ndarray] = lambda arm: _streamed(model, arm, ids, window, progress)  # noqa: E731
    else:
        count = limit or SEQUENCES
        wanted = (count + CALIBRATION * (scheme is not None)) * LENGTH
        ids = _tokens(model, text, tokenizer, skip, wanted, LENGTH)
        sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        scored, ranges = sequences[:count], sequences[count:]
        if scheme is not None and scheme.static and not len(ranges):
            raise BadText(f"{scheme} takes its ranges from text behind the {count} sequences of {LENGTH}: give more.")
        arms = _arms(plan, start_of(model, tokenizer), scheme, baselines)
        look = lambda arm: _scored(model, arm, scored, ranges, progress)  # noqa: E731
    rows: list[Row] = []
    reference: Measure | None = None
    with quiet(model):
        for arm in arms:
            with patch(model, arm.plan):
                measure = Measure(look(arm), unit="", statistic=_perplexity, setting=_setting(arm, window))
            reference = reference or measure
            rows.append(row_of(NAME, arm.name, METRIC, measure, reference))
    about = {"task": NAME, "sequences": len(reference.values) if reference else 0, "window": window}
    about |= {"tokens": int(reference.values[:, 1].sum()) if reference else 0, "skipped": skip}
    return Table(tuple(rows), {**about, "quantise": scheme and str(scheme), "plan": plan and str(plan)})


def _arms(plan: RegisterPlan | None, start: int | None, scheme: Scheme | None, baselines: bool) -> list[Arm]:
    found = [Arm(UNPATCHED, NOTHING, scheme=scheme)]
    if start is not None and baselines:
        found.append(Arm("start token in front", NOTHING, start, scheme))
    if plan is not None and baselines:
        found.append(Arm("prefix alone", replace(plan, neurons={}, rest=None), scheme=scheme))
        resting = RegisterPlan(plan.neurons, registers=0, rest=plan.rest, positions=plan.positions)
        found.append(Arm("neurons at rest alone", resting, scheme=scheme))
    if plan is not None:
        found.append(Arm(PATCHED, plan, scheme=scheme))
    return [Arm(f"{UNPATCHED}, float", NOTHING), *found] if scheme else found


def _windows(plan: RegisterPlan | None) -> list[Arm]:
    found = [Arm(f"{UNPATCHED}, window alone", NOTHING, kept=0), Arm(f"first {KEPT} tokens kept", NOTHING, kept=KEPT)]
    return found if plan is None else [*found, Arm(PATCHED, plan)]


def _setting(arm: Arm, window: int | None) -> str:
    return f"window {window}" if window else str(arm.scheme) if arm.scheme else ""


def _perplexity(values: np.ndarray) -> Any:
    """Of losses and counts `(..., sequences, 2)`."""
    sums = values.sum(axis=-2)
    return np.exp(np.minimum(sums[..., 0] / sums[..., 1], 700.0))


def _tokens(
    model: Any, text: Any, tokenizer: Any, skip: int, wanted: int, least: int, *, whole: bool = False
) -> Tensor:
    """Token ids `(tokens,)` of the text as one, at most `wanted` behind `skip`.

    Every `LENGTH` of them begins as the tokenizer begins a text; with `whole`, the first alone does.
    """
    if isinstance(text, Tensor):
        ids = text.flatten()[skip : skip + wanted]
    else:
        texts = Texts(model, text, tokenizer, length=skip + wanted + 1)
        sequence = next(iter(texts), None)
        ids = texts.rest if sequence is None else sequence
        begin = ids.new_tensor(texts.begin if len(ids) else [])
        body = ids[len(begin) + skip :]
        step = wanted if whole else LENGTH - len(begin)
        ids = torch.cat([torch.cat([begin, piece]) for piece in body.split(step)])[:wanted]
    known = model.get_input_embeddings().num_embeddings
    if len(ids) < least:
        behind = f" behind the first {skip}" if skip else ""
        raise BadText(f"{len(ids)} tokens{behind} are too few: {least} are needed at least, and {wanted} wanted.")
    if not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise BadText(f"the text has ids from {ids.min()} to {ids.max()}; the model knows 0 to {known - 1}.")
    return ids


def _scored(model: Any, arm: Arm, scored: Tensor, ranges: Tensor, progress: bool) -> np.ndarray:
    """Loss and number of the tokens of each sequence `(sequences, 2)`."""

    def begun(ids: Tensor) -> Tensor:
        if arm.start is None or bool((ids[:, 0] == arm.start).all()):
            return ids
        return torch.cat([torch.full_like(ids[:, :1], arm.start), ids], dim=1)

    state: AbstractContextManager[Any] = nullcontext()
    if arm.scheme is not None:
        batches: Iterator[dict[str, Tensor]] = ({"input_ids": begun(ids[None])} for ids in ranges)
        state = quantised(model, arm.scheme, batches, partial(run, whole=True))
    rows = []
    with state:
        for ids in tqdm(scored, desc=arm.name, unit="", leave=False, disable=not progress):
            losses = losses_of(model, begun(ids[None]))[0][1 - len(ids) :]  # of the same tokens in every arm
            rows.append((float(losses.double().sum()), len(losses)))
    return np.array(rows)


def _streamed(model: Any, arm: Arm, ids: Tensor, window: int, progress: bool) -> np.ndarray:
    """Loss and number of the tokens of every 512 in the last half `(parts, 2)`, read once from the beginning."""
    cache = StreamingCache(model, window, keep=arm.kept)
    device = model.get_input_embeddings().weight.device
    found, last = [], None
    with torch.no_grad():
        for piece in tqdm(ids.split(PIECE), desc=arm.name, unit="", leave=False, disable=not progress):
            logits = model(input_ids=piece[None].to(device), past_key_values=cache).logits[0].float().cpu()
            before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
            found.append(nn.functional.cross_entropy(before, piece[-len(before) :], reduction="none"))
            last = logits[-1:]
    losses = torch.cat(found).double()  # (tokens - 1,)
    parts = losses[len(losses) // 2 :].split(LENGTH)
    return np.array([(float(part.sum()), len(part)) for part in parts])
