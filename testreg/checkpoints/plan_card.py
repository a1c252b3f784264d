"""The card of a repository of plans, and a picture of norms for each."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..runtime.plan import RegisterPlan
from .card import before_and_after, kind_of_artefact

MARK = "<!-- plans of testreg -->"  # a card without it is somebody's own, and stays
BEFORE, QUIET = "#c4442f", "#59636e"


def plan_card(name: str, rows: Mapping[str, Mapping[str, Any]], pictures: Mapping[str, str]) -> ModelCard:
    """What the plans of a repository are for, with their numbers, and how to use them.

    Args:
        rows: plan file -> what the repository's list says of it.
        pictures: plan file -> picture of norms beside it.
    """
    models = list(dict.fromkeys(str(row["model"]) for row in rows.values() if "/" in str(row.get("model"))))
    data = ModelCardData(base_model=models or None, library_name="testreg", tags=["testreg", "test-time-registers"])
    one = len(rows) == 1
    only = next(iter(rows.values()))
    called = (_cell(only.get("model")) if one else "") or "MODEL"
    lines = [
        f"# Test-time registers for {only.get('model') or only.get('class')}"
        if one
        else f"# {name}: test-time registers",
        "",
        MARK,
        "",
        "Plans for testreg (`pip install testreg`): which neurons of a pretrained Vision Transformer write "
        "high-norm artefact patches, and which registers take their place. No weights, and no training. Method: Jiang "
        "et al., *Vision Transformers Don't Need Trained Registers*, NeurIPS 2025 (arXiv 2506.08010).",
        "",
        "```python",
        "import testreg",
        "",
        f'plan = testreg.RegisterPlan.load("{name}", model=model)  # found by the weights of the model',
        "with testreg.patch(model, plan):",
        "    outputs = model(**inputs)",
        "```",
        "",
        "or, for a checkpoint with registers:",
        "",
        f"    testreg patch {called} --plans {name} --images photos/ --out DIRECTORY",
        "",
    ]
    if not one:
        lines += ["| model | file | registers | outlier patches | cosine of the output |", "|---|---|---|---|---|"]
        lines += [_line(file, row) for file, row in rows.items()]
        lines.append("")
    for file, row in rows.items():
        lines += [f"## {_cell(row.get('model')) or file}", "", f"`{file}`: {_cell(row.get('plan'))}.", ""]
        lines += kind_of_artefact(row)
        if file in pictures:
            lines += [f"![Patch norms after every block, unpatched]({pictures[file]})", ""]
        lines += before_and_after(row, level=3)
    lines += ["## Licence", "", "That of the model that a plan is for.", ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def norms_picture(plan: RegisterPlan) -> bytes | None:
    """Largest, 99th percentile and median patch norm after every block of the unpatched model, as PNG.

    None where the plan's provenance does not say. Nothing of the images that it was found on is shown.
    """
    rows = plan.provenance.get("blocks")
    names = ("largest", "p99", "median")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        return None
    values = {name: [row.get(name) for row in rows] for name in names}
    if not all(isinstance(value, (int, float)) and value > 0 for row in values.values() for value in row):
        return None
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 3.2), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for name, style in zip(names, ("-o", "--", ":"), strict=True):
        axis.plot(values[name], style, color=BEFORE, label=name, markersize=4)
    if plan.entry:
        axis.axvline(plan.entry - 0.5, color=QUIET, linewidth=1, label="registers join")
    axis.set(yscale="log", xlabel="after block", ylabel="norm of a patch, unpatched")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _line(file: str, row: Mapping[str, Any]) -> str:
    def change(key: str) -> str:
        sides = [side.get(key) for side in (row.get("before"), row.get("after")) if isinstance(side, Mapping)]
        shown = [f"{side:.4g}" for side in sides if isinstance(side, (int, float))]
        return " to ".join(shown)

    registers = f"{_cell(row.get('registers'))} {_cell(row.get('form'))}"
    cells = (_cell(row.get("model")), f"`{file}`", registers, change("outlier_patches"), change("output_cosine"))
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    """A stranger's text in a table or a sentence."""
    return "" if value is None else " ".join(str(value).split()).replace("|", "/").replace("<", "&lt;")[:300]
