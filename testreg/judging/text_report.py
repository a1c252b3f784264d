"""`report --text`: one HTML file that shows a language model before and after, with nothing to load from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from torch import Tensor, nn

from ..finding.language import inspect
from ..finding.observe import eager, read_text
from ..finding.still import quiet
from ..finding.text_inspection import TextInspection
from ..metrics.sinks import received
from ..runtime.decoders import find_decoder
from ..runtime.fitting import check
from ..runtime.guard import acting_in
from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..text.tokens import tokens as tokenize
from . import charts
from .perplexity import NOTHING
from .reporting import png

SEQUENCES, HEADS = 16, 4  # that are looked at, and shown


@dataclass(frozen=True)
class Side:
    """The model in one state.

    Attributes:
        seen: sinks and norms.
        maps: attention of one sequence `(blocks, heads, tokens, registers + tokens)`.
    """

    seen: TextInspection
    maps: list[Tensor]


def report_text(
    model: nn.Module,
    text: Any,
    *,
    plan: RegisterPlan | str | Path | None = None,
    tokenizer: Any = None,
    title: str | None = None,
) -> str:
    """A page that shows a language model before and after, as HTML text: norms per block, and what heads attend to.

    Args:
        model: a causal language model, or one that holds one, patched or not; as it was afterwards.
        text: see `testreg.find`; 16 sequences of 64 tokens are looked at.
        plan: the registers, or the path of their file; by default those of the patch that acts on the model; with
            neither, the model is shown as it is.
        title: by default the model's name.

    Raises:
        BadText, BadPlan, UnsupportedModel: what was given cannot be used.
    """
    tower = find_decoder(model)
    current = acting_in(tower)
    plan = RegisterPlan.of(plan) if plan is not None else current.plan if current else None
    ids = (text if isinstance(text, Tensor) else tokenize(model, text, tokenizer))[:SEQUENCES]
    before, after = _look(model, ids, NOTHING), None
    if plan is not None:
        check(tower, plan)
        after = _look(model, ids, plan)
    sides = [("before", before)] + ([("after", after)] if after else [])
    first = torch.stack([received(maps[None], causal=True)[0, :, 0] for maps in before.maps])  # (blocks, heads)
    strongest = first.flatten().topk(min(HEADS, first.numel())).indices.tolist()
    named = title or getattr(model, "name_or_path", "").rstrip("/").split("/")[-1] or type(model).__name__
    environment = Environment(loader=PackageLoader("testreg.judging"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("text_report.html").render(
        title=named,
        plan_text="" if plan is None else str(plan),
        verdict=(after or before).seen.verdict,
        numbers=_numbers(before.seen, after.seen if after else None),
        sequences=len(ids),
        tokens=ids.shape[1],
        norms_chart=Markup(_norms(sides)),
        heads=[_head(sides, *divmod(index, first.shape[1])) for index in strongest],
    )


def _look(model: Any, ids: Tensor, plan: RegisterPlan) -> Side:
    tower, maps = find_decoder(model), []
    with patch(model, plan) as state, quiet(model), eager(model):
        seen = inspect(model, ids)
        with state.recording() as record:
            handles = [
                attention.register_forward_hook(lambda module, args, output: maps.append(output[1][0].float().cpu()))
                for attention in tower.attentions
            ]
            try:
                read_text(model, tower, ids[:1])
            finally:
                for handle in handles:
                    handle.remove()
    for block, whole in record.attentions.items():  # with the columns of the registers
        maps[block] = whole[0].float().cpu()
    return Side(seen, maps)


def _numbers(before: TextInspection, after: TextInspection | None) -> list[dict[str, str]]:
    of: dict[str, Callable[[TextInspection], str]] = {
        "attention on the first token": lambda seen: f"{seen.first:.1%}",
        "attention on registers": lambda seen: f"{seen.taken if seen.registers else 0:.1%}",
        "sink rate of the first token": lambda seen: f"{seen.rates[0]:.1%}",
        "largest norm, times the median": lambda seen: f"{max(row.largest / row.median for row in seen.blocks):.1f}×",
    }
    return [{"name": name, "before": say(before), "after": say(after) if after else ""} for name, say in of.items()]


def _norms(sides: list[tuple[str, Side]]) -> str:
    series = {}
    for name, side in sides:
        series[f"{name} largest"] = [row.largest for row in side.seen.blocks]
        series[f"{name} median"] = [row.median for row in side.seen.blocks]
    return charts.lines(series, across="after block")


def _head(sides: list[tuple[str, Side]], block: int, head: int) -> dict[str, Any]:
    shown = []
    for name, side in sides:
        attention = side.maps[block][head]  # (tokens, registers + tokens)
        tokens, keys = attention.shape
        registers = float(attention[:, : keys - tokens].sum(-1).mean())
        note = f"first token {float(attention[:, keys - tokens].mean()):.0%}" + (
            f", registers {registers:.0%}" if keys > tokens else ""
        )
        coloured = colormaps["inferno"](attention.clamp(0, 1).numpy())
        shown.append({"name": name, "map": png(coloured), "ratio": f"{keys} / {tokens}", "note": note})
    return {"block": block, "head": head, "sides": shown}
