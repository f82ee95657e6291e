"""Events are one line to whoever reads lines, whatever the model writes."""

from __future__ import annotations

import json
import sys

import httpx

from server.protocol import sse


def test_every_character_stays_in_its_line() -> None:
    text = "".join(map(chr, range(0xD800))) + "".join(map(chr, range(0xE000, sys.maxunicode + 1, 97)))
    sent = sse.event(json.dumps({"content": text}, ensure_ascii=False))
    lines = list(httpx.Response(200, content=sent).iter_lines())
    assert len(lines) == 2
    assert lines[1] == ""
    assert sent.decode().splitlines()[0] == lines[0]
    assert json.loads(lines[0].removeprefix("data: ")) == {"content": text}
