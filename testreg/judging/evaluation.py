"""`evaluate`: one task, several arms side by side, with intervals from the same photos."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from ..finding.detect import threshold_of
from ..finding.trial import Threshold
from ..images.labels import Sample, photos
from ..metrics import bootstrap
from ..runtime.errors import BadImages, TestregError
from ..runtime.installer import active
from ..runtime.plan import RegisterPlan
from .arms import PATCHED, UNPATCHED, USUAL, arms, in_few_bits
from .quantise import Scheme
from .tasks import TASKS, Measure, Task

TABLES = (".csv", ".json")  # how the names of tables end


@dataclass(frozen=True)
class Row:
    """One number of one arm, and how it differs from the unpatched arm on the same photos.

    Attributes:
        kind: "fixed"; "block", details of every block; "sweep", many settings, the best of which is chosen on these
            very photos; or "floor", which needs no model.
        unit: "%", where value, difference and their intervals are in percent, or "".
        low, high: ends of the confidence interval; NaN where there are too few photos.
        difference, difference_low, difference_high: value minus the unpatched one, resampled in pairs; None for the
            unpatched arm itself and where the arms cannot be paired.
        images: how many photos it is of.
    """

    task: str
    kind: str
    arm: str
    metric: str
    setting: str
    unit: str
    value: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    images: int


@dataclass(frozen=True)
class Table:
    """What `evaluate` found: rows, and where they come from."""

    rows: tuple[Row, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def of(self, arm: str, metric: str | None = None) -> Row:
        """The one row of an arm; of a metric whose name starts so, where there are several.

        Raises:
            KeyError: there is no such row.
        """
        for row in self.rows:
            if row.arm == arm and row.metric.startswith(metric or ""):
                return row
        raise KeyError(f"no row of the arm {arm!r} and metric {metric!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows]
        return {"provenance": dict(self.provenance), "rows": rows}

    def save(self, path: str | Path) -> None:
        """Write CSV where the name ends so, JSON otherwise."""
        path = Path(path).expanduser()
        if path.suffix.lower() != ".csv":
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def __str__(self) -> str:
        """All but the details of every block."""
        lines, width = [], max([30, *(len(row.arm) for row in self.rows)])
        for kind, title in (("fixed", ""), ("floor", "floors"), ("sweep", "sweep: chosen on the test photos")):
            rows = [row for row in self.rows if row.kind == kind]
            if not rows:
                continue
            lines += ["", title] if title else []
            for metric in dict.fromkeys(row.metric for row in rows):
                lines.append(metric)
                lines += [f"  {_line(row, width)}" for row in rows if row.metric == metric]
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    data: str | Path,
    task: str | Task,
    *,
    plan: RegisterPlan | str | Path | None = None,
    against: Mapping[str, nn.Module] | None = None,
    baselines: bool = True,
    quantise: str | Scheme | None = None,
    calibration: str | Path | None = None,
    limit: int | None = None,
    processor: Any = None,
    progress: bool = False,
) -> Table:
    """Judge `model` without and with registers.

    Args:
        model: a Vision Transformer, or a model that holds one, patched or not; as it was afterwards.
        data: a folder of photos, with the labels that the task needs (see `testreg.images.labels`).
        task: a name of `testreg.tasks.TASKS`, with its fixed setting, or a task with settings of its own.
        plan: the registers to judge, or the path of their file; by default those of the patch that acts on the model;
            with neither, the model is judged alone.
        against: other models by name, as they come.
        baselines: also judge an inert zero token, the neurons zeroed without a register, random neurons instead, and
            the outliers interpolated.
        quantise: judge the model with all its linears in few bits too, simulated: "w8a8", "w4a8", "fp8" and so on, or a
            `testreg.judging.quantise.Scheme`. Of the baselines come those against outliers: ranges clipped at a
            percentile, registers of the other forms.
        calibration: a folder of photos that static ranges are from; by default every third photo of `data`, which then
            is not judged on.
        limit: use only so many photos, the first in the order of names.
        progress: draw bars on the standard error.

    Raises:
        BadImages: the data have no labels of the kind needed, or are broken; or the task's name is not known.
        BadPlan: the plan does not fit the model.
        UnsupportedModel: no family describes the model, or it does not show what the task needs.
    """
    _have("scipy", "sklearn")
    task = _task(task)
    current = active(model)
    plan = RegisterPlan.of(plan) if plan is not None else current.plan if current else None
    samples = task.samples(data)[:limit]
    if not samples:
        raise BadImages(f"there is no photo in {data}, or the limit of {limit} leaves none.")
    scheme = Scheme.parse(quantise) if isinstance(quantise, str) else quantise
    samples, calibrating = _apart(samples, scheme, calibration)
    threshold, whose = _threshold(task, plan)
    if task.counts_outliers:
        task = replace(task, threshold=threshold)
    others = baselines and scheme is None
    compared = arms(model, plan, processor=processor, against=against, baselines=others, threshold=threshold)
    if scheme is not None:
        own = [arm for arm in compared if arm.model is model]
        compared += in_few_bits(own, scheme, calibrating, task.side, baselines=baselines)
    if not task.repairable:
        compared = [arm for arm in compared if not arm.repair]
    rows: list[Row] = []
    unpatched: Any = None
    reference: dict[str, Measure] = {}
    for arm in compared:
        with arm.on():
            seen = task.look(arm, _bar(samples, f"{task.name}, {arm.name}", progress))
        if arm is compared[0]:
            unpatched = seen
        found = task.measure(seen, unpatched)
        reference = reference or found
        rows += [row_of(task.name, arm.name, name, measure, reference.get(name)) for name, measure in found.items()]
    floors = task.floor(samples, unpatched)
    rows += [row_of(task.name, "floor", name, measure, None) for name, measure in floors.items()]
    provenance = {
        "task": task.name,
        "settings": {key: _plain(value) for key, value in vars(task).items() if key != "threshold" or value},
        "data": Path(data).name,
        "images": len(samples),
        "plan": None if plan is None else str(plan),
        "quantised": None if scheme is None else str(scheme),
        "calibrated": len(calibrating),
        "threshold": None,
    }
    if task.counts_outliers or any(arm.repair for arm in compared):
        provenance["threshold"] = {"outlier": str(threshold), "from": whose}
    return Table(tuple(rows), provenance)


FEWEST = 4  # photos to calibrate on


def _apart(samples: list[Sample], scheme: Scheme | None, calibration: Any) -> tuple[list[Sample], list[Any]]:
    """Photos to judge on, and others to calibrate on."""
    if scheme is None:
        if calibration is not None:
            raise TestregError("calibration is for quantise: give both (--quantise w8a8), or none.")
        return samples, []
    if calibration is not None:
        found = [sample.path for sample in photos(calibration)]
    else:
        found = [sample.path for sample in samples[::3]]
        samples = [sample for index, sample in enumerate(samples) if index % 3]
    if len(found) < FEWEST or not samples:
        raise BadImages(
            f"{len(found)} photos are too few to calibrate on: at least {FEWEST} are needed, 32 are better."
        )
    return samples, found


def _have(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise TestregError(
            f"evaluate needs {' and '.join(missing)}, not installed here: pip install testreg[evaluate]."
        )


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise BadImages(f"there is no task {task!r}: choose one of {', '.join(TASKS)}.")
    return TASKS[task]()


def _threshold(task: Task, plan: RegisterPlan | None) -> tuple[Threshold, str]:
    """From which norm on a patch is an outlier, and who says so."""
    if task.threshold:
        return task.threshold, "task"
    if plan is not None and (found := threshold_of(plan)):
        return found, "plan"
    return USUAL, "default"


def row_of(task: str, arm: str, name: str, measure: Measure, reference: Measure | None) -> Row:
    """One number of one arm with its interval, and how it differs from the `reference`, in pairs."""
    scale = 100 if measure.unit == "%" else 1
    count = len(measure.values)
    own = bootstrap(lambda index: scale * measure.of(index), count)
    change = None
    if reference is not None and measure is not reference and len(reference.values) == count:
        change = bootstrap(lambda index: scale * (measure.of(index) - reference.of(index)), count)
    return Row(
        task=task,
        kind=measure.kind,
        arm=arm,
        metric=name,
        setting=measure.setting,
        unit=measure.unit,
        value=own.value,
        low=own.low,
        high=own.high,
        difference=None if change is None else change.value,
        difference_low=None if change is None else change.low,
        difference_high=None if change is None else change.high,
        images=count,
    )


def _line(row: Row, width: int) -> str:
    digits = 1 if row.unit == "%" else 3
    unit = f" {row.unit}" if row.unit else ""

    def interval(low: float, high: float) -> str:
        return "" if low != low else f" [{plain(low)}, {plain(high)}]"

    def plain(value: float, form: str = "") -> str:
        return f"{round(value, digits) + 0.0:{form}.{digits}f}"  # no -0.0

    line = f"{row.arm:<{width}} {plain(row.value, '8')}{unit}{interval(row.low, row.high)}"
    if row.difference is not None and row.difference_low is not None and row.difference_high is not None:
        line += f"   {plain(row.difference, '+')}{interval(row.difference_low, row.difference_high)}"
    return line


def _bar(samples: list[Sample], text: str, progress: bool) -> Iterable[Sample]:
    return tqdm(samples, desc=text, unit="photo", leave=False, disable=not progress)


def _plain(value: Any) -> Any:
    """As JSON has it: NaN is null, and what it has no form for is text."""
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple, range, set)):
        return [_plain(part) for part in value]
    return str(value)


__all__ = ["PATCHED", "UNPATCHED", "Row", "Table", "evaluate"]
