"""What this installation lacks for a GPU, whether or not the machine has one: `python -P -m lab.doctor.software [--strict]`.

`make` and the Dockerfile run it after they have installed what a GPU needs. With --strict a lack is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lab.doctor.machine import gpu, missing_software


def main(arguments: Sequence[str]) -> int:
    """Print what is missing; return the exit status."""
    said = missing_software(gpu())
    kind = "error" if "--strict" in arguments else "warning"
    for sentence in said:
        sys.stderr.write(f"{kind}: {sentence}\n")
    return int(bool(said) and kind == "error")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
