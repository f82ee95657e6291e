"""`dsa keys`: each command once, and a sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.access.keys import KeyBook
from server.cli.main import app


def test_a_key_is_made_listed_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    monkeypatch.setenv("DSA_KEYS", str(path))
    run = CliRunner().invoke
    secret = run(app, ["keys", "new", "alice"]).stdout.strip()
    record = KeyBook(path).find(secret)
    assert (record and record.name) == "alice"
    listed = run(app, ["keys", "list"]).stdout.split("\t")
    assert listed[:3] == ["alice", "user", "1"]
    assert run(app, ["keys", "new", "alice"]).exit_code == 1
    assert run(app, ["keys", "revoke", "alice"]).stdout == "revoked: 1 secret of alice\n"
    assert run(app, ["keys", "list"]).stdout == ""
    assert run(app, ["keys", "revoke", "alice"]).exit_code == 1
