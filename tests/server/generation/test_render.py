"""`Renderer.events`, which has a fast way for text, gives the same bytes as its chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import TokenLogprob
from server.chat.parts import CallArguments, CallStart, Content, Reasoning, Warn
from server.generation.choice import Job, TextDelta
from server.generation.render import ChatRenderer
from server.generation.render_completion import CompletionRenderer
from server.generation.streamed import Head, Shown, Streamed
from server.http.protocol import sse
from server.http.protocol.notices import Notice
from tests.server.kit import TEXT, submit

LOGPROB = TokenLogprob(token_id=65, logprob=-0.5, rank=1, top=((65, -0.5),))

JOBS = [Job(index, submit((66, 67))) for index in range(2)]

HEAD = Head("i", created=7, model="m", fingerprint="fp", notices=[Notice(code="c", message="m")])

texts = st.text('aé\u2028"\n', max_size=4)  # what characters become is tested with the events
parts = st.one_of(
    st.builds(Content, texts),
    st.builds(Content, texts),
    st.builds(Content, texts),
    st.just(Content("")),
    st.builds(Reasoning, texts),
    st.builds(CallArguments, st.just(0), texts),
    st.just(Warn("stray_marker", "m")),
)
deltas = st.builds(
    TextDelta,
    index=st.integers(0, 1),
    parts=st.lists(parts, max_size=3).map(tuple),
    token_ids=st.just((65,)),
    logprobs=st.sampled_from([None, None, None, (), (LOGPROB,)]),
    prompt_logprobs=st.sampled_from([None, None, None, (None, LOGPROB)]),
    finish_reason=st.sampled_from([None, None, None, "stop", "length"]),
)


def chat(include_usage: bool) -> Streamed:
    return ChatRenderer(HEAD, text=TEXT, jobs=JOBS, shown=Shown(usage=include_usage))


def completion(include_usage: bool) -> Streamed:
    shown = Shown(usage=include_usage, logprobs=1, echo=True)
    return CompletionRenderer(HEAD, text=TEXT, jobs=JOBS, shown=shown, echoes=["", "echo"])


@given(stream=st.lists(deltas, max_size=8), include_usage=st.booleans())
def test_events_are_the_chunks_in_the_order_of_arrival(stream: list[TextDelta], include_usage: bool) -> None:
    for make in (chat, completion):
        plain, short = make(include_usage), make(include_usage)
        for delta in stream:
            chunks = plain.chunks(delta)
            assert short.events(delta) == b"".join(map(sse.chunk, chunks))


def test_a_call_and_its_arguments_stay_chunks_of_their_own() -> None:
    renderer = chat(include_usage=False)
    first = TextDelta(index=0, parts=(CallStart(0, "f"), CallArguments(0, "{}")), token_ids=())
    assert renderer.events(first).count(b"data: ") == 2
