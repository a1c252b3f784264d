"""Is the row of a family right: the checks that this project's own go through, for whoever writes one.

    from testreg.testing import check

    def test_the_row():
        check(GardenViT(), lambda images: {"images": torch.randn(images, 3, 32, 32)})

May import every room but `judging`, `demo` and `cli`. Read `checks` first; `hiding` has the oracle of registers that
nobody attends to, `planting` an artefact with a known answer. Nothing here needs a test runner.
"""

from .checks import check, check_each_image_alone, check_tower, check_undone
from .hiding import attend_by, check_hidden_registers, hidden
from .outputs import close, tensors, unit_gain
from .planting import check_planted, norms, plant

__all__ = [
    "attend_by",
    "check",
    "check_each_image_alone",
    "check_hidden_registers",
    "check_planted",
    "check_tower",
    "check_undone",
    "close",
    "hidden",
    "norms",
    "plant",
    "tensors",
    "unit_gain",
]
