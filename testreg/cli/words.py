"""What the command line says, as text: pure functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOAD = """Saved to {out}. Load it:

    import testreg
    model = testreg.load("{out}")
    outputs = model(**inputs)"""


def patched(told: Mapping[str, Any]) -> str:
    """What `patch` did, with the norms before and after and the lines that load the result."""
    provenance = told["plan"]["provenance"]
    tables = norms(provenance.get("blocks", []), told["after"]["blocks"])
    return paragraphs(plan(told["plan"]), tables, guard(provenance), LOAD.format(out=told["out"]))


def paragraphs(*parts: str) -> str:
    """All parts but empty ones, with an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def plan(values: Mapping[str, Any]) -> str:
    """A plan's `to_dict()`: where the artefact is, and what is done about it."""
    told, pairs = values["provenance"], [(b, n) for b, row in values["neurons"].items() for n in row]
    lines = []
    if "artefact" in told:
        found, blocks = told["artefact"], told["blocks"]
        worst = max(row["largest"] / row["median"] for row in blocks)
        lines.append(
            f"Artefact   {found['share']:.2%} of the patches, in {found['images']:.0%} of {told['images']['count']} "
            f"photos: norms up to {worst:.0f} times the median, from block {found['block']} on"
        )
        if told["positions"]:
            lines.append(f"           always at the same patches: {', '.join(map(str, told['positions'][:12]))}")
        lines += nature(told.get("nature"))
        if told["images"]["skipped"]:
            lines.append(f"           {told['images']['skipped']} files could not be read and were skipped")
    neurons = ", ".join(f"({block}, {neuron})" for block, neuron in pairs[:12]) + (", ..." if len(pairs) > 12 else "")
    where = "joining with the embeddings" if values["entry"] == 0 else f"joining before block {values['entry']}"
    if values["form"] == "attention":
        where = f"in front of every attention from block {values['entry']} on"
    kind = {
        "dynamic": "holding zeros that receive the neurons' maxima",
        "constant": "holding the outliers' mean state",
        "attention": "seen by nothing else",
    }
    lines.append(f"Neurons    {len(pairs)} (block, neuron): {neurons}")
    lines.append(f"Registers  {values['registers']}, {where}, {kind[values['form']]}")
    law = values.get("law")
    if law and (law["slope"] or law.get("below")):
        bend = f", {law['below']:.4f} below {law['bend']} patches" if law.get("bend") else ""
        lines.append(
            f"           {law['slope']:.4f} for every patch{bend}, and {law['offset']:.2f}, rounded: as the size needs"
        )
    return "\n".join(lines)


def nature(kind: Mapping[str, Any] | None) -> list[str]:
    """What kind of artefact it is, in a line; nothing where an old plan does not say."""
    if not kind:
        return []
    where = {"position": "locked to places", "content": "set by content", "both": "of places and of content"}
    said = [where[kind["where"]]] if kind["where"] in where else []
    said.append(f"in {kind['states']} state{'s' * (kind['states'] != 1)}")
    if kind["attention"] is not None:
        said.append(f"{kind['attention']:.0%} of the attention behind")
    if kind["values"] is not None:
        said.append(f"values of {kind['values']:.2f} times the usual norm ({kind['sink']})")
    return [f"           {', '.join(said)}"]


def norms(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]] = ()) -> str:
    """Patch norms per block, of one model or of two side by side."""
    columns = ("median", "p99", "largest", "share", "images")
    titles = ("median", "p99", "largest", "outliers", "photos")
    sides = [rows for rows in (before, after) if rows]
    width = sum((8, 8, 9, 9, 8))
    lines = []
    if len(sides) > 1:
        lines.append("       " + "".join(f"  {title:-^{width - 2}}" for title in (" unpatched ", " patched ")))
    lines.append("block  " + "".join(_cells(titles, str) for _ in sides))
    for block, rows in enumerate(zip(*sides, strict=True)):
        cells = (_cells([row[name] for name in columns], _number) for row in rows)
        lines.append(f"{block:>5}  " + "".join(cells))
    return "\n".join(lines)


def guard(told: Mapping[str, Any]) -> str:
    """What changed, on photos that no choice was made on."""
    if "guard" not in told:
        return ""
    score = told["guard"]
    same = _span(score.get("same_top_1_interval"), ".1%")
    output = _span(score.get("output_cosine_interval"), ".4f")
    lines = [
        f"Held out   {score['images']} photos on which nothing was chosen; 95 % intervals",
        f"           outlier patches          {told['before']['outlier_patches']:.2%} -> {score['left']:.2%}",
        f"           same top-1 answer        {score['agreement']:.1%}{same}",
        f"           cosine of the output     {score['cosine']:.4f}{output}",
        f"           cosine of other patches  {score['features']:.4f}",
    ]
    return "\n".join([*lines, *sizes(told.get("sizes", ()))])


def sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a plan does at other sizes, a line each."""
    lines = []
    for row in rows:
        side = "{}x{}".format(*row["side"])
        if "refused" in row:
            lines.append(f"           {side:<9} the model does not take this size: {row['refused']}")
            continue
        lines.append(
            f"           {side:<9} {row['registers']} registers for {row['patches']} patches; outliers "
            f"{row['before']:.2%} -> {row['left']:.2%}, same top-1 {row['agreement']:.0%}, cosine {row['cosine']:.4f}"
        )
    images = sorted({row["images"] for row in rows if "images" in row})
    each = " to ".join(map(str, [*images[:1], *images[1:][-1:]]))
    return ["", f"Sizes      {each or 0} photos each", *lines] if lines else []


def _span(interval: Sequence[float] | None, form: str) -> str:
    """An interval in brackets, where there is one."""
    return "" if interval is None else "  [{}, {}]".format(*(format(end, form) for end in interval))


def candidates(rows: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """The best candidates as a table, with the title of their activation where they fire."""
    lines = [f"  block  neuron      score  {where}  elsewhere     spread"]
    for row in rows[:16]:
        lines.append(
            f"  {row['block']:>5}  {row['neuron']:>6}  {row['score']:>9.3f}  {row['outliers']:>{len(where)}.3f}  "
            f"{row['ordinary']:>9.4f}  {row['spread']:>9.4f}"
        )
    return lines


def explanation(told: Mapping[str, Any]) -> str:
    """The candidates and the plans tried."""
    lines = ["Candidates: neurons that fire at outliers and not elsewhere, by how far they move outliers away"]
    lines += candidates(told["candidates"], "at outliers")
    lines += ["", f"Plans tried on {told['split']['tried']} photos; drift = 2 - both cosines"]
    lines.append("  neurons  registers  form      entry  outliers left  top-1  output  patches     drift  tried for")
    for row in told["trials"]:
        lines.append(
            f"{'*' if row['chosen'] else ' '} {row['neurons']:>7}  {row['registers']:>9}  {row['form']:<8}  "
            f"{row['entry']:>5}  {row['left']:>13.2%}  {row['agreement']:>5.0%}  {row['cosine']:>6.4f}  "
            f"{row['features']:>7.4f}  {row['drift']:>8.5f}  {row['why']}"
        )
    return "\n".join([*lines, "* chosen: of those that leave no outliers, the least drift, with the fewest neurons"])


def _cells(values: Sequence[Any], write: Any) -> str:
    widths = (8, 8, 9, 9, 8)
    shown = [f"{value:.2%}" if write is _number and index > 2 else write(value) for index, value in enumerate(values)]
    return "".join(f"{cell:>{width}}" for cell, width in zip(shown, widths, strict=True))


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def judged(data: str, provenance: Mapping[str, Any]) -> str:
    """What a table of `evaluate` is about: its photos, and what counts as an outlier where that matters."""
    said = f"{provenance['images']} photos of {data}"
    if threshold := provenance["threshold"]:
        whose = {"plan": "as when the plan was found", "task": "as set", "default": "no plan says otherwise"}
        said += f"\nAn outlier has {threshold['outlier']} or more ({whose[threshold['from']]})."
    return said


def stock(told: Mapping[str, Any]) -> str:
    """What `export --format stock` wrote, and how far it is from the model that it stands for."""
    drift, out = told["drift"], told["out"]
    load = {
        "transformers": f'from transformers import AutoModel\n    model = AutoModel.from_pretrained("{out}")',
        "timm": f'import timm\n    model = timm.create_model("local-dir:{out}", pretrained=True)',
    }
    lines = [
        f"Held out   {drift['images']} photos that nothing was fitted to",
        f"           largest norm over the median     {drift['outlier_unpatched']:.1f} -> {drift['outlier']:.1f}",
    ]
    for key, against in (("", "unpatched model"), ("_patched", "run-time patch")):
        lines.append(f"           with the {against}: cosine of the output {drift[f'answer{key}']:.4f}")
        if drift[f"agreement{key}"] is not None:
            lines[-1] += f", same top-1 answer {drift[f'agreement{key}']:.1%}"
    lines[-1] += f", cosine of the patches {drift['patches']:.4f}"
    return "\n".join([*lines, "", f"Saved to {out}. It loads without testreg:", "", f"    {load[told['library']]}"])


def int8(told: Mapping[str, Any]) -> str:
    """What `export --int8` wrote, beside the same model in float, without and with registers."""
    sides, patches = told["sides"], any(side["patches"] is not None for side in told["sides"])
    lines = [
        told["about"],
        "",
        f"Held out   {told['images']} photos; ranges are from {told['calibrated']} others",
        f"{'':<18}  agreement   cosine  {'patches  ' * patches}outliers      size  ms a photo",
    ]
    for side in sides:
        cells = f"{side['name']:<18}  {side['agreement']:>9.1%}  {side['cosine']:>7.4f}  "
        if patches:
            cells += f"{side['patches']:>7.4f}  "
        lines.append(f"{cells}{side['outliers']:>8.2%}  {side['size'] / 2**20:>4.1f} MiB  {1000 * side['time']:>10.1f}")
    real, best = sides[-2:]
    lines += [
        "agreement and cosine: with the model as it came, in float"
        + ("; patches: of their last state, with the same model in float" if patches else ""),
        f"int8 / float: size {best['size'] / real['size']:.3f}, "
        f"time {best['time'] / real['time']:.2f} on {told['processor']}",
        "",
        f"ONNX in {told['out']}: int8, checked in ONNX Runtime.",
    ]
    return "\n".join(lines)


def attention(found: Mapping[str, Any] | None) -> str:
    """Where a vision tower's attention goes: the `attention` of an `Inspection.to_dict()`."""
    if not found:
        return ""
    names = {"prefix": "class token", "native": "own registers", "registers": "test-time registers"}
    shares = [f"{name} {found[key]:.1%}" for key, name in names.items() if found[key] > 1e-3]
    shares.append(f"the patch that gets most {found['patch']:.1%}, a sink in {found['rate']:.0%} of the heads")
    return f"Attention goes to: {', '.join(shares)}."
