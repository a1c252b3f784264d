"""Choose a plan by trying: how many neurons, which registers, how many, where they join and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..runtime.errors import BadPlan, Harmful
from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower
from .detect import Artefact, Candidate, Ranking, rank
from .kinds import Kinds
from .scan import Kept, look, stack, together
from .trial import Bench, Score

MOST_REGISTERS = 16
GONE = 0.01  # of the outliers may stay
SAME = 1.05  # times the least drift is as good: then the smaller or the earlier plan is better
SLIGHT = 2.5e-4  # and what is no further from it, since nobody tells cosines of .9999 apart
PATIENCE = 2  # larger sets in a row that are no better end the search for one
ROUNDS = 3  # rankings, where one set leaves outliers
PAPER_NEURONS = 10
ALIKE = 0.95  # mean cosine of outlier states with their mean, below which they may be of several kinds


@dataclass(frozen=True)
class Wanted:
    """What the user fixed; None = let the images decide. See `testreg.find`."""

    threshold: float | None = None
    blocks: tuple[int, int] | None = None
    top_k: int | None = None
    registers: int | None = None
    form: Literal["dynamic", "constant", "attention"] | None = None
    entry: int | None = None
    recipe: Literal["auto", "paper"] = "auto"
    sizes: Sequence[int] | None = None


@dataclass(frozen=True)
class Trial:
    """A plan that was tried, why, and what came of it."""

    why: str
    plan: RegisterPlan
    score: Score

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        plan = self.plan
        about = {"why": self.why, "form": plan.form, "neurons": len(plan.pairs), "registers": plan.registers}
        scores = {name: round(number, 6) for name, number in asdict(self.score).items()}
        return {**about, "entry": plan.entry, **scores, "drift": round(self.score.drift, 6)}


class Search:
    """Plans for one model, tried on the same images.

    Attributes:
        ranking: of the neurons, best first.
        trials: all plans tried so far.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        found: Artefact,
        wanted: Wanted,
        *,
        ranked: list[Kept],
        tried: list[Kept],
        batch_size: int = 16,
        step: Callable[[], Any] = lambda: None,
    ):
        self.model, self.tower, self.found, self.wanted = model, tower, found, wanted
        self.images, self.batch_size, self.step = ranked, batch_size, step
        first, last = wanted.blocks or (0, found.block)
        self.blocks = range(first, last + 1)
        self.form = wanted.form or ("dynamic" if wanted.entry == 0 or wanted.recipe == "paper" else "attention")
        self.entries = self._entries()
        self.bench = Bench(model, tower, tried, found.threshold, found.block, batch_size, min(self.entries) or None)
        self.ranking = self._rank(ranked)
        self.candidates = list(self.ranking.candidates)
        self.trials: list[Trial] = []
        if not self.candidates:
            raise Harmful(
                f"there are outlier patches ({found.share:.2%} of all after block {found.shown}), but no MLP neuron of "
                f"blocks {first} to {last} fires at them and not elsewhere: registers would not remove them."
            )
        if wanted.top_k and wanted.top_k > len(self.candidates):
            raise BadPlan(
                f"top_k is {wanted.top_k}, but only {len(self.candidates)} neurons of blocks {first} to {last} fire at "
                f"outlier patches and not elsewhere: ask for at most so many, or for more blocks."
            )

    def plan(
        self,
        neurons: int,
        registers: int,
        entry: int,
        form: str | None = None,
        states: int = 1,
        *,
        zero: bool = False,
    ) -> RegisterPlan:
        """A plan with the best `neurons` candidates.

        Args:
            form: by default the one that is tried first.
            states: of how many kinds the registers are, each with a state of its own.
            zero: let the neurons rest at 0, not at their mean over ordinary patches.
        """
        rows: dict[int, list[Candidate]] = {}
        for candidate in sorted(self.candidates[:neurons], key=lambda candidate: candidate.neuron):
            rows.setdefault(candidate.block, []).append(candidate)
        rest = {block: tuple(candidate.ordinary for candidate in row) for block, row in rows.items()}
        state = None if (form or self.form) == "dynamic" else self._state(form or self.form, registers, entry, states)
        chosen = {block: tuple(candidate.neuron for candidate in row) for block, row in rows.items()}
        return RegisterPlan(chosen, registers, entry, state, rest=None if zero else rest)

    def best(self) -> RegisterPlan:
        """The plan that takes the outliers away and changes the model least."""
        wanted, entries = self.wanted, self.entries
        if wanted.recipe == "paper":
            neurons, registers = wanted.top_k or PAPER_NEURONS, wanted.registers or 1
            return self._try("as published", self.plan(neurons, registers, entries[0], zero=True)).plan
        registers = wanted.registers or min(MOST_REGISTERS, max(1, round(self.ranking.per_image)))
        neurons = self._neurons(registers, entries[0])
        for entry in entries[1:]:
            self._try("where registers join", self.plan(neurons, registers, entry))
        entry = self._winner().entry
        if wanted.registers is None:
            registers = self._registers(neurons, registers, entry)
        if self.form != "dynamic":
            self._kinds(neurons, registers, entry)
        if wanted.form is None and self.form == "attention":
            if entry:
                self._try("as tokens", self.plan(neurons, registers, entry, "constant"))
            self._try("as in the paper", self.plan(neurons, registers, wanted.entry or 0, "dynamic"))
        return self._winner()

    def _outliers(self, entry: int) -> Tensor:
        """What outliers are where registers join `(outliers, channels)`: before a block, or in its attention."""
        states = self.ranking.states
        return states[entry] if entry in states else self.ranking.rows[entry]

    def _state(self, form: str, registers: int, entry: int, count: int) -> Tensor:
        """What registers of `count` kinds hold that stand for the outliers: as tokens, or in attention alone."""
        kinds = Kinds(self._outliers(entry), count)
        if form == "constant":
            return kinds.mean(self.ranking.states[entry], registers)  # (registers, channels)
        rows = [kinds.mean(self.ranking.rows[block], registers) for block in range(entry, len(self.tower.blocks))]
        return torch.stack(rows)  # (blocks from the entry on, registers, channels)

    def _entries(self) -> list[int]:
        """Where registers may join, the likeliest first: where the outliers are written, after, or before that."""
        if self.wanted.entry is not None or self.form == "dynamic":
            return [self.wanted.entry or 0]
        block = self.found.block
        return [entry for entry in (block, block + 1, block - 1) if 1 <= entry < len(self.tower.blocks)]

    def _neurons(self, registers: int, entry: int) -> int:
        """How many of the best candidates: the fewest of the least drift, among those that leave no outliers."""
        if self.wanted.top_k is not None:
            self._try("as wanted", self.plan(self.wanted.top_k, registers, entry))
            return self.wanted.top_k
        done = 0
        for _ in range(ROUNDS):
            clean: list[tuple[int, Score]] = []
            for count in sizes_up_to(len(self.candidates)):
                if count <= done:
                    continue
                score = self._try("how many neurons", self.plan(count, registers, entry)).score
                if self._clean(score):
                    clean.append((count, score))
                least = min((score.drift for _, score in clean), default=0.0)
                if len(clean) > PATIENCE and all(score.drift > least for _, score in clean[-PATIENCE:]):
                    break
            if clean:
                return next(count for count, score in clean if as_good(score.drift, least))
            done = len(self.candidates)
            if not self._look_again(self.plan(done, registers, entry)):
                break
        return done

    def _rank(self, images: list[Kept]) -> Ranking:
        rows = self.form == "attention"
        return rank(
            self.model,
            self.tower,
            images,
            self.found,
            self.batch_size,
            blocks=self.blocks,
            entries=[entry for entry in self.entries if entry or rows],
            rows=rows,
            by_activation=self.wanted.recipe == "paper",
        )

    def _look_again(self, plan: RegisterPlan) -> bool:
        """Rank neurons once more, on the model with `plan`, for the outliers that it leaves; False if none is new."""
        with patch(self.model, plan):
            images = [
                replace(image, norms=norms.cpu())
                for batch in together(self.images, self.batch_size)
                for image, norms in zip(batch, look(self.model, self.tower, stack(batch)).norms, strict=True)
            ]
            ranking = self._rank(images)
        known = {(candidate.block, candidate.neuron) for candidate in self.candidates}
        new = [candidate for candidate in ranking.candidates if (candidate.block, candidate.neuron) not in known]
        self.candidates += new
        return bool(new)

    def _registers(self, neurons: int, registers: int, entry: int) -> int:
        """How many registers: climb from `registers` while it gets clearly better."""

        def drift(count: int) -> float:
            score = self._try("how many registers", self.plan(neurons, count, entry)).score
            return score.drift if self._clean(score) else float("inf")

        return climb(registers, drift, most=MOST_REGISTERS)

    def _kinds(self, neurons: int, registers: int, entry: int) -> None:
        """Registers with states of their own, if outlier states differ: more kinds while it gets better."""
        states = self._outliers(entry)
        if torch.nn.functional.cosine_similarity(states, states.mean(0)[None]).mean() > ALIKE:
            return
        least = self._try("how many registers", self.plan(neurons, registers, entry)).score.drift
        for count in range(2, registers + 1):
            trial = self._try("several kinds", self.plan(neurons, registers, entry, states=count))
            if trial.score.drift * SAME >= least:
                return
            least = trial.score.drift

    def _try(self, why: str, plan: RegisterPlan) -> Trial:
        for trial in self.trials:
            if trial.plan == plan:
                return trial
        self.trials.append(Trial(why, plan, self.bench.score(plan)))
        self.step()
        return self.trials[-1]

    def _clean(self, score: Score) -> bool:
        return score.left <= GONE * self.bench.before

    def _winner(self) -> RegisterPlan:
        """Of the plans that leave no outliers, the one of least drift; of those that are as good, the smallest."""
        clean = [trial for trial in self.trials if self._clean(trial.score)]
        if not clean:
            return min(self.trials, key=lambda trial: (trial.score.left, trial.score.drift)).plan
        least = min(trial.score.drift for trial in clean)
        good = [trial for trial in clean if as_good(trial.score.drift, least)]
        return min(good, key=self._preferred).plan

    @staticmethod
    def _preferred(trial: Trial) -> tuple[Any, ...]:
        """Among plans that are as good: few neurons, then the form that opens most, then the least drift."""
        plan = trial.plan
        return len(plan.pairs), plan.form != "attention", trial.score.drift, plan.registers


def climb(start: int, drift: Callable[[int], float], *, most: int, step: int = 1) -> int:
    """The number of registers that is reached from `start` in steps, as long as the drift gets clearly less.

    Down first: fewer cost less, and there are seldom more registers than outliers.
    """
    best, least = start, drift(start)
    for stride in (-step, step):
        while 1 <= best + stride <= most and (found := drift(best + stride)) * SAME < least:
            best, least = best + stride, found
        if best != start:
            break
    return best


def as_good(drift: float, least: float) -> bool:
    """Whether a plan of this drift is as good as one of the least."""
    return drift <= max(SAME * least, least + SLIGHT)


def sizes_up_to(most: int) -> Iterator[int]:
    """1, 2, ... 8, then about a quarter more each, up to `most`."""
    size = 1
    while size < most:
        yield size
        size = size + 1 if size < 8 else size * 5 // 4
    yield most
