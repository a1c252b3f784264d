"""The tasks of an evaluation, by name."""

from .base import Measure, Measures, Task
from .classification import Classify
from .depth import Depth
from .discovery import Discovery
from .segmentation import Attention, Probe
from .text_segmentation import SegmentText
from .unlabelled import Agreements, Outliers, SinkRates

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Outliers, SinkRates, Agreements, Discovery, Attention, Probe, Depth, SegmentText, Classify)
}

__all__ = [
    "TASKS",
    "Agreements",
    "Attention",
    "Classify",
    "Depth",
    "Discovery",
    "Measure",
    "Measures",
    "Outliers",
    "Probe",
    "SegmentText",
    "SinkRates",
    "Task",
]
