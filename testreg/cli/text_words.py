"""What the command line says about language models, as text: pure functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import words
from .words import paragraphs

LOAD = """Saved to {out}. Load it:

    import testreg
    model = testreg.load("{out}")
    model.generate(**inputs)"""


def patched(told: Mapping[str, Any]) -> str:
    """What `patch` did, with the norms after it and the lines that load the result."""
    after = f"With registers:\n{sinks(told['after'])}"
    return paragraphs(plan(told["plan"]), after, guard(told["plan"]["provenance"]), LOAD.format(out=told["out"]))


def plan(values: Mapping[str, Any]) -> str:
    """A plan's `to_dict()`: where massive tokens are, and what is done about them."""
    told, pairs = values["provenance"], [(b, n) for b, row in values["neurons"].items() for n in row]
    lines = []
    if "artefact" in told:
        found, read = told["artefact"], told["text"]
        lines += [
            f"Massive    {found['share']:.2%} of the tokens, in {found['images']:.0%} of {read['sequences']} sequences "
            f"of {read['length']}: norms up to",
            f"           {told['before']['largest']:.0f} times the median, from block {found['block']} on; "
            f"{told['first_token']:.0%} of them are the first token",
        ]
    neurons = ", ".join(f"({block}, {neuron})" for block, neuron in pairs[:12]) + (", ..." if len(pairs) > 12 else "")
    where = "before the first token" if values["positions"] == "before" else "on the first token's place"
    lines += [
        f"Neurons    {len(pairs)} at rest (block, neuron): {neurons}",
        f"Registers  {values['registers']}, {where}, seen by every attention from block {values['entry']} on",
    ]
    return "\n".join(lines)


def stock(told: Mapping[str, Any]) -> str:
    """What `export --format stock` wrote of a language model."""
    out = told["out"]
    exact = f"to {told['difference']:.0e} of the largest" if told["difference"] else "exactly"
    return (
        f"Saved to {out}: weights in which the neurons rest, and the register as a prefix for PEFT. Use both:\n\n"
        f"    from peft import PeftModel\n    from transformers import AutoModelForCausalLM\n\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{out}")\n'
        f'    model = PeftModel.from_pretrained(model, "{out}/prefix")\n\n'
        f"Logits as of the patched model, {exact}."
    )


def guard(told: Mapping[str, Any]) -> str:
    """What changed, on text that no choice was made on."""
    if "guard" not in told:
        return ""
    given, other = told["guard"]["as_given"], told["guard"].get("begun_otherwise")
    seen = told["guard"]["received"]
    lines = [
        f"Held out   {told['guard']['sequences']} sequences on which nothing was chosen",
        f"           perplexity                     {given['unpatched']:.2f} -> {given['perplexity']:.2f}",
        f"           massive tokens                 {told['before']['massive']:.2%} -> {given['left']:.2%}",
        f"           largest norm over the median   {told['before']['largest']:.1f} -> {given['largest']:.1f}",
        f"           attention on the first token   {seen['unpatched']:.1%} -> {seen['patched']:.1%}",
    ]
    if other:
        lines.append(
            f"           begun otherwise: perplexity {other['unpatched']:.2f} -> {other['perplexity']:.2f}, largest "
            f"norm {other['largest']:.1f}"
        )
    return "\n".join(lines)


def explanation(told: Mapping[str, Any]) -> str:
    """The candidates and the plans tried."""
    lines = ["Candidates: neurons that fire at massive tokens and not elsewhere, by how far they move them away"]
    lines += words.candidates(told["candidates"], "at massive")
    lines += ["", "Plans tried; drift in nats a token, of the two beginnings the larger"]
    lines.append(
        "  neurons  registers  rows            entry  position  massive left  perplexity  begun otherwise     drift  "
        "tried for"
    )
    for row in told["trials"]:
        other = f"{row['begun_otherwise']['perplexity']:.2f}" if "begun_otherwise" in row else "-"
        lines.append(
            f"{'*' if row['chosen'] else ' '} {row['neurons']:>7}  {row['registers']:>9}  {row['rows']:<14}  "
            f"{row['entry']:>5}  {row['positions']:<8}  {row['left']:>12.2%}  "
            f"{row['as_given']['perplexity']:>10.2f}  {other:>15}  {row['drift']:>8.5f}  {row['why']}"
        )
    return "\n".join([*lines, "* chosen: of those that leave no massive token, the least drift, and the smallest"])


def sinks(found: Mapping[str, Any]) -> str:
    """A language model's `TextInspection.to_dict()`: one line per block."""
    lines = ["block  median norm   largest  activation   x median  sink heads  first token gets"]
    for row in found["blocks"]:
        share = (
            "           -                 -" if row["sink"] is None else f"{row['sink']:12.0%}{row['received']:18.1%}"
        )
        size = f"{row['median']:13.4g}{row['largest']:10.4g}{row['activation']:12.4g}{row['times']:11.4g}"
        lines.append(f"{row['block']:5d}{size}{share}")
    rates = ", ".join(f"{rate:.1%}" for rate in found["rates"])
    lines.append(f"Sink rate of the first tokens: {rates}; {found['sequences']} sequences of {found['tokens']} tokens.")
    return "\n".join(lines)
