"""A known answer: models into which an artefact is planted, and a demonstration with one.

May import `runtime`. Read `planted` first, which says how; `demonstration` has a small model and photos.
"""

from .demonstration import demo_model, demo_photos, write
from .planted import Planted, plant

__all__ = ["Planted", "demo_model", "demo_photos", "plant", "write"]
