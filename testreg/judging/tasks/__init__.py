"""The tasks of an evaluation, by name."""

from .base import Measure, Measures, Task
from .classification import Classify
from .discovery import Discovery
from .segmentation import Attention, Probe
from .unlabelled import Agreements, Outliers, SinkRates

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Outliers, SinkRates, Agreements, Discovery, Attention, Probe, Classify)
}

__all__ = [
    "TASKS",
    "Agreements",
    "Attention",
    "Classify",
    "Discovery",
    "Measure",
    "Measures",
    "Outliers",
    "Probe",
    "SinkRates",
    "Task",
]
