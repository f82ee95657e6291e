"""The batches of flat rows that the kernels are tested with; `dsa doctor` checks a machine with them, too."""

from __future__ import annotations

from lab.doctor.rows import EDGES, REFERENCE
from lab.doctor.rows import RowBatch as Batch
from lab.doctor.rows import RowLine as Line
from lab.doctor.tiles import PAGE

__all__ = ["EDGES", "PAGE", "REFERENCE", "Batch", "Line"]
