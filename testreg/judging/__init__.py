"""Was it worth it? A model without and with registers: measured, tabled and drawn.

May import every room but `demo` and `cli`. Read `evaluation` first: each of its `tasks` measures the `arms`, which are
the model with nothing, with registers and with what else could explain an effect. `reporting` and `pictures` show.
"""

from typing import TYPE_CHECKING

from ..runtime import lazily

if TYPE_CHECKING:
    from .evaluation import Table, evaluate
    from .pictures import show
    from .reporting import report

__all__ = ["Table", "evaluate", "report", "show"]

if not TYPE_CHECKING:  # or checkers would take any name
    __getattr__ = lazily(
        __name__, {"Table": "evaluation", "evaluate": "evaluation", "report": "reporting", "show": "pictures"}
    )
