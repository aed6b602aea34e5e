"""Pictures of runs and of what the model does, as PNG files; matplotlib is imported when one is drawn."""

from __future__ import annotations

from any2point.viz.pictures import confusion_picture, curves_picture
from any2point.viz.projection import projection_picture

__all__ = ["confusion_picture", "curves_picture", "projection_picture"]
