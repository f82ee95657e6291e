"""A file of keys with known secrets, for tests of what callers may do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import yaml

from server.access.keys import digest_of


def write_keys(path: Path, **records: dict[str, Any]) -> Path:
    """Write a file whose keys have the secrets `secret-NAME`."""
    keys = [{"name": name, "sha256": [digest_of(f"secret-{name}")], **more} for name, more in records.items()]
    path.write_text(yaml.safe_dump({"keys": keys}))
    return path


def bearer(name: str) -> dict[str, str]:
    """The header of that key."""
    return {"authorization": f"Bearer secret-{name}"}


def code_of(response: httpx.Response) -> str:
    """The code of an error in OpenAI's form."""
    code: str = response.json()["error"]["code"]
    return code
