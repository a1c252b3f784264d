"""`find` for language models: from text to a plan, with nothing to set."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from ..runtime.decoders import find_decoder
from ..runtime.errors import BadText, Harmful, NoOutliers, TestregError, UnsupportedModel
from ..runtime.fingerprint import describe
from ..runtime.guard import acting_in
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower
from ..text.streams import Texts, digest, start_of
from ..text.tokens import check as check_ids
from .detect import Artefact, largest_ratio, table
from .language import inspect
from .massive import massive, places, scan_text
from .parallel import share, shared
from .scan import Norms, Sample
from .still import quiet
from .text_choose import TextSearch
from .text_inspection import TextInspection
from .text_trial import GIVEN, TextBench, TextScore

LENGTH = 256  # tokens of a sequence
TOKENS = 40_960  # that are looked at, at most
FEWEST = 6  # sequences: two to rank neurons, two to try plans, two for the guard
LOOKED = 4  # sequences whose attention maps are looked at
# What the guard allows, on text that no choice was made on:
MOST_LEFT = 0.05  # of the massive tokens
MOST_WORSE = 1.02  # times the unpatched model's perplexity


@dataclass(frozen=True)
class Read:
    """What a share of the text does in the model."""

    norms: Norms
    sample: Sample
    names: int

    def __add__(self, other: Read) -> Read:
        return Read(self.norms + other.norms, self.sample + other.sample, self.names + other.names)


def find_text(
    model: nn.Module,
    text: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    tokens: int = TOKENS,
    force: bool = False,
    progress: bool = False,
) -> RegisterPlan:
    """Find where a language model has massive tokens, which neurons write them, and the registers for it.

    See `testreg.find`; several processes share the text as they share images.

    Raises:
        NoOutliers: there is no sink, or none that is a massive activation; the message has the numbers.
        Harmful: no plan takes the massive tokens away without harm; the message has the numbers.
        BadText, UnsupportedModel: what was given cannot be used.
    """
    tower = find_decoder(model)
    if not hasattr(model, "lm_head") and getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no head that gives the next token, by which plans are judged: load it with "
            f"transformers.AutoModelForCausalLM."
        )
    if acting_in(tower):
        raise TestregError("the model is patched already; take the patch off first: testreg.active(model).remove().")
    texts = Texts(model, text, tokenizer, length=LENGTH, limit=tokens)

    def decide(parts: list[Read]) -> RegisterPlan:
        read = reduce(add, parts)
        if len(read.sample) < FEWEST:
            if not read.norms.images:
                raise BadText(texts.nothing(FEWEST))
            raise BadText(
                f"{len(read.sample)} different sequences of {LENGTH} tokens are too few: {FEWEST} are needed at "
                f"least, 100 best."
            )
        kept = list(read.sample)
        looked = inspect(model, torch.cat([one.inputs["input_ids"] for one in kept[:LOOKED]]), batch_size=1)
        found = located(model, looked, read)
        ranked, tried, held = (kept[hand::3] for hand in range(3))
        start = start_of(model, tokenizer)
        few = max(1, batch_size // 4)  # logits are many times larger than states
        with tqdm(desc="plans tried", unit="", disable=not progress) as bar:
            search = TextSearch(model, tower, found, ranked=ranked, tried=tried, start=start, batch_size=few)
            search.step = bar.update
            plan = search.best()
        guard = TextBench(model, tower, held, found, few, start)
        scores = guard.scores(plan)
        if not force:
            for how, score in scores.items():
                _refuse_harm(plan, score, guard, how)
        return replace(plan, provenance=_told(model, read, found, looked, search, plan, guard, scores))

    with quiet(model):
        return shared(lambda: _read(model, tower, texts, batch_size, progress), decide)


def located(model: nn.Module, looked: TextInspection, read: Read) -> Artefact:
    """Where the massive tokens are.

    Raises:
        NoOutliers: there are none, or no sink.
    """
    ratios = largest_ratio(read.norms)
    numbers = (
        f"The largest norm is {float(ratios.max()):.1f} times the median of its sequence (after block "
        f"{int(ratios.argmax())}), in {read.norms.images} sequences."
    )
    if not looked.sinks:
        raise NoOutliers(f"there is nothing to give a register to. {looked.verdict} {numbers}")
    found = massive(read.norms, read.sample)
    if found is None:
        raise NoOutliers(
            f"{type(model).__name__} has attention sinks, but none that is a massive activation, so no neuron can be "
            f"taken from it: {looked.verdict} {numbers} A massive token has 10 to 1,000 times."
        )
    return found


def _read(model: nn.Module, tower: Tower, texts: Texts, batch_size: int, progress: bool) -> Read:
    """This process's share of the text through the model."""
    mine, size = share()
    names = 0

    def batches() -> Iterator[Tensor]:
        nonlocal names
        held: list[Tensor] = []
        with tqdm(desc="sequences", unit="", disable=not progress) as bar:
            for index, sequence in enumerate(texts):
                if index % size != mine:
                    continue
                check_ids(model, sequence[None])
                names += int(digest(sequence), 16)
                held.append(sequence)
                bar.update()
                if len(held) == batch_size or (held and len(held[0]) != len(sequence)):
                    yield torch.stack(held)
                    held = []
            if held:
                yield torch.stack(held)

    norms, sample = scan_text(model, tower, batches())
    return Read(norms, sample, names)


def _refuse_harm(plan: RegisterPlan, score: TextScore, guard: TextBench, how: str) -> None:
    if score.left > MOST_LEFT * guard.before:
        reason = f"leaves {score.left:.2%} of the tokens massive, of {guard.before:.2%}"
    elif not score.perplexity <= MOST_WORSE * score.unpatched:  # as NaN is not
        reason = (
            f"does harm: perplexity {score.unpatched:.2f} -> {score.perplexity:.2f} (at most {MOST_WORSE} times is "
            f"allowed)"
        )
    else:
        return
    raise Harmful(
        f"the best plan ({plan}) {reason}, on text that nothing was chosen on, {how}. Give more text, of the kind that "
        f"the model is for; force=True (--force on the command line) takes the plan as it is."
    )


def _told(
    model: Any,
    read: Read,
    found: Artefact,
    looked: TextInspection,
    search: TextSearch,
    plan: RegisterPlan,
    guard: TextBench,
    scores: dict[str, TextScore],
) -> dict[str, Any]:
    """A plan's provenance."""
    share_of, score = places(search.ranked, found), scores[GIVEN]
    return {
        "base": describe(model, plan.neurons, search.tower),
        "text": {
            "sequences": read.norms.images,
            "length": LENGTH,
            "digest": f"{read.names % 2**256:064x}",
        },
        "artefact": found.to_dict(),
        "first_token": float(share_of[0]),
        "sinks": {"kind": looked.kind, "rates": list(looked.rates), "elsewhere": looked.elsewhere},
        "blocks": [asdict(row) for row in table(read.norms, found.threshold)],
        "candidates": [asdict(candidate) for candidate in search.candidates[:32]],
        "trials": [{**trial.summary(), "chosen": trial.plan is plan} for trial in search.trials],
        "before": {"massive": guard.before, "largest": guard.largest, "perplexity": guard.unpatched},
        "after": {"massive": score.left, "largest": score.largest, "perplexity": score.perplexity},
        "guard": {
            **{how.replace(" ", "_"): asdict(one) for how, one in scores.items()},
            "sequences": guard.sequences,
            "received": search.received(plan, guard),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
