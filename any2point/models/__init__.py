"""Any2Point models: configuration, classifier, controls, saving and loading."""

from __future__ import annotations

from any2point.models.any2point import Any2Point, Encoding
from any2point.models.config import Any2PointConfig
from any2point.models.probe import TokenizerProbe
from any2point.models.summary import Summary

__all__ = ["Any2Point", "Any2PointConfig", "Encoding", "Summary", "TokenizerProbe"]
