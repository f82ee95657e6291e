"""An event is one line for every kind of line reader, whatever the model writes."""

from __future__ import annotations

import json
import sys

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from server.http.protocol import sse


def test_every_character_stays_in_its_line() -> None:
    text = "".join(map(chr, range(0xD800))) + "".join(map(chr, range(0xE000, sys.maxunicode + 1, 97)))
    sent = sse.event(json.dumps({"content": text}, ensure_ascii=False))
    lines = list(httpx.Response(200, content=sent).iter_lines())
    assert len(lines) == 2
    assert lines[1] == ""
    assert sent.decode().splitlines()[0] == lines[0]
    assert json.loads(lines[0].removeprefix("data: ")) == {"content": text}


class Text(BaseModel):
    """An object with a text in it, and fields around it."""

    name: str
    text: str
    rest: None = None


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text of a run reads tables
@given(text=st.text(), name=st.text())
def test_a_text_event_is_the_event_of_its_object(text: str, name: str) -> None:
    event = sse.TextEvent(lambda text: Text(name=name, text=text, rest=None))
    for one in (text, "", '"\\/\b\f\n\r\t\x00\x1f\x7f\u0085\u2028\u2029\ud7ff\U0001f600'):
        assert event(one) == sse.chunk(Text(name=name, text=one, rest=None))
