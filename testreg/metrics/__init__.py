"""What can be measured of a model, as pure functions of tensors.

Imports nothing else of the package, and runs no model. Read `outliers` first, which is what registers take away;
`bootstrap` gives any of these numbers its interval.
"""

from .agreement import Agreement, agreement
from .bootstrap import Interval, bootstrap, share
from .classify import knn, top1, zero_shot
from .depth import rmse
from .lost import located, lost, overlap
from .outliers import BlockNorms, block_norms, interpolate, ratios
from .probe import depth_probe, linear_probe
from .segment import foreground, intersections, mean_iou, pixel_accuracy, pixel_ap, split
from .sinks import Sinks, received, sink_rate, sinks

__all__ = [
    "Agreement",
    "BlockNorms",
    "Interval",
    "Sinks",
    "agreement",
    "block_norms",
    "bootstrap",
    "depth_probe",
    "foreground",
    "interpolate",
    "intersections",
    "knn",
    "linear_probe",
    "located",
    "lost",
    "mean_iou",
    "overlap",
    "pixel_accuracy",
    "pixel_ap",
    "ratios",
    "received",
    "rmse",
    "share",
    "sink_rate",
    "sinks",
    "split",
    "top1",
    "zero_shot",
]
