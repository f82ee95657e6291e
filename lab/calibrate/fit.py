"""Fits non-negative coefficients to measured steps. The error of a step is relative to its time."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.plan.cost import Coefficients

Array = NDArray[np.float64]

_HUBER = 1.5
"""Errors above so many typical errors count linearly, not squared."""


def nonnegative_least_squares(matrix: Array, target: Array) -> Array:
    """Find the x >= 0 that minimises |matrix x - target|, with the active set method of Lawson and Hanson (1974).

    Args:
        matrix: [m, n]
        target: [m]

    Returns:
        [n]
    """
    n = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    a = matrix / scale
    x, free = np.zeros(n), np.zeros(n, dtype=bool)
    tolerance = 1e-10 * float(np.abs(a.T @ target).max(initial=0.0))
    for _ in range(10 * n):
        gradient = a.T @ (target - a @ x)
        gradient[free] = -np.inf
        if free.all() or float(gradient.max()) <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(a[:, free], target, rcond=None)[0]
            bad = free & (trial <= 0)
            if not bad.any():
                x = trial
                break
            # Go towards the trial until a coefficient reaches 0, and fix that coefficient at 0.
            step = float((x[bad] / (x[bad] - trial[bad])).min())
            x = x + step * (trial - x)
            free &= x > 1e-12 * float(x.max(initial=0.0))
            x[~free] = 0.0
            if not free.any():
                break
    solution: Array = x / scale
    return solution


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> Coefficients:
    """Fit the coefficients to steps; outliers count less.

    Args:
        rows: the units of work of each step, in the order of `Coefficients`
        seconds: the time of each step

    Raises:
        ValueError: there are no steps.
    """
    units, times = np.asarray(rows, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    weights = np.ones_like(times)
    x = np.zeros(units.shape[1])
    for _ in range(8):
        root = np.sqrt(weights)
        x = nonnegative_least_squares(units * (root / times)[:, None], root)
        error = np.abs(units @ x / times - 1)
        typical = max(1.4826 * float(np.median(error)), 1e-9)
        weights = np.minimum(1.0, _HUBER * typical / np.maximum(error, 1e-12))
    return Coefficients(**dict(zip(Coefficients.__struct_fields__, x.tolist(), strict=True)))


def modelled(coefficients: Coefficients, row: Sequence[float]) -> float:
    """Return the modelled seconds of a step with these units of work."""
    return float(sum(map(operator.mul, msgspec.structs.astuple(coefficients), row)))
