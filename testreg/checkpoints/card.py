"""The model card of a patched checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..runtime.plan import RegisterPlan

SEES = (
    "Register neurons write high-norm artefact patches; their activation is taken from the patches, and registers take "
    "the artefacts' place. Every output keeps its shape. Method: Jiang et al., *Vision Transformers Don't Need Trained "
    "Registers*, NeurIPS 2025 (arXiv 2506.08010), as made by testreg."
)
SPEAKS = (
    "A few neurons make a token, usually the first, a sink with massive activations; here they rest, and constant keys "
    "and values in front of every text take the sink's place. Every output keeps its shape. The neurons are found as "
    "in Jiang et al., *Vision Transformers Don't Need Trained Registers*, NeurIPS 2025 (arXiv 2506.08010), by testreg."
)
CARRIED = ("license", "license_name", "license_link", "pipeline_tag", "datasets", "language")


def card(plan: RegisterPlan, architecture: str, base: str, source: Path | None) -> ModelCard:
    """What was done, to which model, with which numbers, and how to load it.

    Args:
        base: hub name or directory name of the unpatched model.
        source: its own model card, from which the licence is carried over.
    """
    data, licence = metadata(base, "transformers", source)
    auto = "AutoModelForCausalLM" if plan.language else "AutoModel  # or the Auto class of the task"
    lines = [
        f"# {base or architecture} with test-time registers",
        "",
        f"This is {f'`{base}`' if base else f'a `{architecture}`'} with registers added at test time, without "
        f"training: its weights are unchanged. {plan}.",
        "",
        SPEAKS if plan.language else SEES,
        "",
        "## Load it",
        "",
        "```python",
        "import testreg",
        "",
        'model = testreg.load("PATH_OR_HUB_NAME")',
        "```",
        "",
        "or without testreg, from the code that lies in this repository:",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        f'model = {auto.split()[0]}.from_pretrained("PATH_OR_HUB_NAME", trust_remote_code=True)',
        "```",
        "",
        "A stock class, such as `" + architecture + "`, refuses these files: it would lose the registers.",
        "",
        *kind_of_artefact(plan.provenance),
        *before_and_after(plan.provenance),
        *_sizes(plan.provenance),
        "## Licence",
        "",
        f"That of the base model: {licence}." if licence else "That of the base model, whose card did not say which.",
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def metadata(base: str, library: str, source: Path | None) -> tuple[ModelCardData, str | None]:
    """The front matter of a card, and the name of the licence.

    What the base model's own card, `source`, says of its licence, its task and its data holds here too.
    """
    try:
        values = ModelCard.load(source).data.to_dict() if source else {}
    except Exception:  # a stranger's YAML; a card is no reason to fail
        values = {}
    known = {key: values[key] for key in CARRIED if values.get(key) is not None}
    tags = ["testreg", "test-time-registers"]
    data = ModelCardData(base_model=base or None, library_name=library, tags=tags, **known)
    return data, known.get("license_name") or known.get("license")


def kind_of_artefact(provenance: Mapping[str, Any]) -> list[str]:
    """What `provenance["nature"]` says of the artefact, in its own sentences."""
    nature = provenance.get("nature")
    said = nature.get("sentences") if isinstance(nature, Mapping) else None
    if not isinstance(said, list) or not said:
        return []
    return [" ".join(" ".join(str(line).split()).replace("<", "&lt;")[:500] for line in said[:8]), ""]


def before_and_after(provenance: Mapping[str, Any], level: int = 2) -> list[str]:
    """The numbers of `provenance["before"]` beside those of `provenance["after"]`, under a heading of that level."""
    before, after = provenance.get("before"), provenance.get("after")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return []
    rows = [
        f"| {str(key).replace('_', ' ').replace('|', '/')} | {before[key]:.4g} | {after[key]:.4g} |"
        for key in before
        if _number(before[key]) and _number(after.get(key))
    ]
    if not rows:
        return []
    return [f"{'#' * level} Before and after", "", "| | unpatched | with registers |", "|---|---|---|", *rows, ""]


def _sizes(provenance: Mapping[str, Any]) -> list[str]:
    """What the registers do at other sizes than the one that they were found at."""
    given = provenance.get("sizes")
    names = ("patches", "registers", "before", "left", "agreement", "cosine")
    rows = [
        f"| {row['side'][0]} x {row['side'][1]} | " + " | ".join(f"{row[name]:.4g}" for name in names) + " |"
        for row in (given if isinstance(given, list) else [])
        if isinstance(row, Mapping)
        and all(_number(row.get(name)) for name in names)
        and isinstance(row.get("side"), list)
        and len(row["side"]) == 2
        and all(map(_number, row["side"]))
    ]
    if not rows:
        return []
    titles = "| size | patches | registers | outliers unpatched | outliers left | same top-1 | cosine |"
    return ["## Other sizes", "", titles, "|---|---|---|---|---|---|---|", *rows, ""]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
