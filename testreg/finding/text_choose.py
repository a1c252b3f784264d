"""Choose a language model's plan by trying: which neurons rest, which rows attention gets, how many and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import Harmful
from ..runtime.installer import patch
from ..runtime.plan import BEFORE, ON, RegisterPlan
from ..runtime.towers import Tower
from .choose import GONE, sizes_up_to
from .detect import Artefact, Candidate, rank
from .language import inspect
from .massive import rows_at, token_norms
from .scan import Kept, stack, together
from .text_trial import GIVEN, TextBench, TextScore

SAME = 1.1  # times the least drift is as good: then the smaller plan is better
CLOSE = 5e-4  # nats a token that are as good too
MOST_ROWS = 4
ROUNDS = 3  # rankings, where one set leaves massive tokens


@dataclass(frozen=True)
class TextTrial:
    """A plan that was tried, why, from which tokens its rows are, and what came of it, by how texts begin."""

    why: str
    rows: str
    plan: RegisterPlan
    scores: dict[str, TextScore]

    @property
    def left(self) -> float:
        """Share of massive tokens, however texts begin."""
        return max(score.left for score in self.scores.values())

    @property
    def drift(self) -> float:
        """How far from the unpatched model, in nats a token, however texts begin."""
        return max(score.drift for score in self.scores.values())

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        plan = self.plan
        about = {"why": self.why, "rows": self.rows, "neurons": len(plan.pairs), "registers": plan.registers}
        about |= {"entry": plan.entry, "positions": plan.positions}
        about |= {"left": round(self.left, 6), "drift": round(self.drift, 6)}
        for how, score in self.scores.items():
            about[how.replace(" ", "_")] = {name: round(number, 6) for name, number in asdict(score).items()}
        return about


class TextSearch:
    """Plans for one language model, tried on the same text.

    Args:
        start: the token that its texts begin with, if any.

    Attributes:
        candidates: neurons, best first.
        trials: all plans tried so far.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        found: Artefact,
        *,
        ranked: list[Kept],
        tried: list[Kept],
        start: int | None,
        batch_size: int,
    ):
        self.model, self.tower, self.found, self.ranked, self.batch_size = model, tower, found, ranked, batch_size
        self.step: Callable[[], Any] = lambda: None
        self.bench = TextBench(model, tower, tried, found, batch_size, start)
        self.rows = self._rows(start)
        self.candidates = self._rank(ranked)
        self.trials: list[TextTrial] = []
        if not self.candidates:
            raise Harmful(
                f"there are massive tokens ({found.share:.2%} of all after block {found.shown}), but no MLP neuron of "
                f"blocks 0 to {found.block} that can be told apart fires at them and not elsewhere: registers would "
                f"not remove them."
            )

    def plan(
        self, neurons: int, source: str = "", count: int = 1, entry: int = 0, positions: str = BEFORE
    ) -> RegisterPlan:
        """A plan with the best `neurons` candidates at rest, and `count` rows of one kind; with no kind, no rows."""
        rows: dict[int, list[int]] = {}
        for candidate in self.candidates[:neurons]:
            rows.setdefault(candidate.block, []).append(candidate.neuron)
        chosen = {block: tuple(row) for block, row in rows.items()}
        if not source:
            return RegisterPlan(chosen, 0, positions=positions)
        state = self.rows[source][entry:, None].expand(-1, count, -1)  # (blocks, registers, channels)
        return RegisterPlan(chosen, count, entry, state, positions=positions)

    def best(self) -> RegisterPlan:
        """The plan that takes the massive tokens away and changes the likelihood of text least."""
        neurons = self._neurons()
        for source in self.rows:
            self._try("which rows", source, self.plan(neurons, source))
        best = self._winner()
        self._try("where they stand", best.rows, replace(best.plan, positions=ON))
        best = self._winner()
        least = best.drift
        for count in range(2, MOST_ROWS + 1):
            plan = self.plan(neurons, best.rows, count, positions=str(best.plan.positions))
            drift = self._try("how many", best.rows, plan).drift
            if drift * SAME >= least:
                break
            least = drift
        best = self._winner()
        for entry in self._entries():
            plan = self.plan(neurons, best.rows, best.plan.registers, entry, str(best.plan.positions))
            self._try("from which block", best.rows, plan)
        return self._winner().plan

    def received(self, plan: RegisterPlan, bench: TextBench) -> dict[str, float]:
        """Attention that the first token gets from the mean query, over heads and blocks, without and with `plan`."""
        ids = bench.begun[GIVEN][0][:1]
        before = inspect(self.model, ids)
        with patch(self.model, plan):
            return {"unpatched": before.first, "patched": inspect(self.model, ids).first}

    def _entries(self) -> list[int]:
        """The blocks from which rows may matter: where massive tokens are there, and right before."""
        return [entry for entry in (self.found.block + 1, self.found.block) if 0 < entry < len(self.tower.blocks)]

    def _rows(self, start: int | None) -> dict[str, Tensor]:
        """What attention is given in every block `(blocks, channels)`, for a start token alone and for massive ones."""
        rows: dict[str, Tensor] = {}
        if start is not None:
            ids = torch.tensor([[start]])
            rows["start token"] = rows_at(self.model, self.tower, ids, torch.ones_like(ids, dtype=torch.bool))[:, 0]
        sums, count = torch.zeros(()), 0
        for batch in together(self.ranked, self.batch_size):
            where = torch.stack([self.found.threshold.outliers(kept.norms[self.found.shown]) for kept in batch])
            seen = rows_at(self.model, self.tower, stack(batch)["input_ids"], where).double()
            sums, count = sums + seen.sum(1), count + seen.shape[1]
        if count:
            rows["massive tokens"] = (sums / count).float()
        return rows

    def _rank(self, kept: list[Kept]) -> list[Candidate]:
        blocks = [block for block in range(self.found.block + 1) if self.tower.downs[block] is not None]
        ranking = rank(self.model, self.tower, kept, self.found, self.batch_size, blocks=blocks, entries=())
        return list(ranking.candidates)

    def _look_again(self, plan: RegisterPlan) -> bool:
        """Rank once more, on the model with `plan`, for the massive tokens that it leaves; False if none is new."""
        with patch(self.model, plan):
            kept = [
                replace(one, norms=norms)
                for batch in together(self.ranked, self.batch_size)
                for one, norms in zip(
                    batch, token_norms(self.model, self.tower, stack(batch)["input_ids"]), strict=True
                )
            ]
            ranking = self._rank(kept)
        known = {(candidate.block, candidate.neuron) for candidate in self.candidates}
        new = [candidate for candidate in ranking if (candidate.block, candidate.neuron) not in known]
        self.candidates += new
        return bool(new)

    def _neurons(self) -> int:
        """How many of the best candidates rest: the fewest that leave no massive token, with no register to help.

        With a register in front the first token may stay small by itself; what a text can begin with, and what a
        window can begin with, is not all in the text that is tried.
        """
        done = 0
        for _ in range(ROUNDS):
            for count in sizes_up_to(len(self.candidates)):
                if count > done and self._clean(self._try("how many neurons", "", self.plan(count))):
                    return count
            done = len(self.candidates)
            if not self._look_again(self.plan(done)):
                break
        return done

    def _try(self, why: str, rows: str, plan: RegisterPlan) -> TextTrial:
        for trial in self.trials:
            if trial.plan == plan:
                return trial
        self.trials.append(TextTrial(why, rows, plan, self.bench.scores(plan)))
        self.step()
        return self.trials[-1]

    def _clean(self, trial: TextTrial) -> bool:
        return trial.left <= GONE * self.bench.before

    def _winner(self) -> TextTrial:
        """Of the plans that leave no massive token, the one of least drift; of those as good, the smallest."""
        trials = [trial for trial in self.trials if trial.plan.registers]
        clean = [trial for trial in trials if self._clean(trial)]
        if not clean:
            return min(trials, key=lambda trial: (trial.left, trial.drift))
        least = min(trial.drift for trial in clean)
        good = [trial for trial in clean if trial.drift <= max(SAME * least, least + CLOSE)]
        return min(good, key=lambda trial: (len(trial.plan.pairs), trial.plan.registers, trial.drift))
