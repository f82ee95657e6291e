"""Small wheels in a folder that pip is told to look in, as a user's configuration would."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from server.hub.wheels import WheelFile


def make_wheel(shelf: Path, package: str, member: str, content: bytes) -> WheelFile:
    """Write the wheel of `package` 1.0, which holds `member` of that content, into `shelf`."""
    shelf.mkdir(exist_ok=True)
    name = f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(shelf / name, "w") as archive:
        archive.writestr(f"{package}/{member}", content)
        archive.writestr(
            f"{package}-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.0\n",
        )
        archive.writestr(f"{package}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{package}-1.0.dist-info/RECORD", "")
    return WheelFile(
        requirement=f"{package.replace('_', '-')}==1.0",
        wheel=name,
        wheel_sha256=hashlib.sha256((shelf / name).read_bytes()).hexdigest(),
        member=f"{package}/{member}",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
    )
