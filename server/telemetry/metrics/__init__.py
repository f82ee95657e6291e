"""Measurements for Prometheus. Only this package uses Prometheus's client library.

Labels come from closed sets (endpoints, outcomes, kinds), never from what a client sends.
"""

from __future__ import annotations

from server.telemetry.metrics.generation import GenerationMeter
from server.telemetry.metrics.registry import Metrics

__all__ = ["GenerationMeter", "Metrics"]
